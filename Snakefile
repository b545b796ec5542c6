# The book: the notebooks, run with the parameters of a profile, then the pages.
#
#   make book PROFILE=quick CORES=2                         what most people want
#   snakemake --configfile profiles/quick.yaml --cores 2    the same, in an environment at hand
#   snakemake --configfile profiles/quick.yaml -n           what would run, and why
#
# On a cluster, from a login node, with this folder on a file system that the nodes share:
#
#   pip install snakemake-executor-plugin-slurm
#   snakemake --configfile profiles/paper.yaml --config data=FOLDER --executor slurm --jobs 4 \
#       --default-resources slurm_account=ACCOUNT slurm_partition=PARTITION
#
# Every notebook is then a job of its own that asks for the threads, mem_mb, runtime (minutes) and
# gpu that the profile gives under `resources`; the pages are built where snakemake runs.

import json
import os
from pathlib import Path
import shlex
import sys

import yaml

# The package's command and Jupyter Book come from the environment that snakemake runs in,
# activated or not.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

# Only where no profile is given: snakemake would merge the two, and a value that stands in one
# profile alone would leak into the other.
if not workflow.overwrite_configfiles:
    configfile: "profiles/quick.yaml"

RUNS = "book/runs"
# A folder a profile, so that a quick look never costs a long run its checkpoints.
PROFILE = Path(workflow.overwrite_configfiles[0]).stem if workflow.overwrite_configfiles else "quick"
TRAINED = f"{RUNS}/checkpoints/{PROFILE}"
# What the network is pretrained for, each in a run of its own; the first one's checkpoint is used by the other pages.
OBJECTIVES = ["masked", "denoise", "autoencode", "latent"]
PRETRAINED = [f"pretrain_{name}" for name in OBJECTIVES]
NOTEBOOKS = ["data", *PRETRAINED, "reconstruction", "objectives", "identification", "ablations", "operator", "speed"]
NOTEBOOKS += ["scaling", "downstream", "protocol"]
# One notebook, a page a cohort.
TASKS = yaml.safe_load(Path("notebooks/tasks.yaml").read_text())
PAGES = [name for name in NOTEBOOKS if name != "downstream"] + [f"downstream_{cohort}" for cohort in TASKS]
# What runs a notebook is not what a notebook's numbers depend on.
RUNNER = {f"mnemodyn/{name}.py" for name in ("__init__", "cli", "parameters", "running")}

# Values under `pretrain` are those of every objective; under `pretrain_latent`, of that one.
unknown = set(config.get("notebooks", {})) - {*NOTEBOOKS, "pretrain"}
if "data" not in config or unknown:
    raise WorkflowError(
        f"a profile needs 'data' and 'notebooks', the latter with some of {['pretrain', *NOTEBOOKS]}; "
        f"unknown: {sorted(unknown) or 'none'}"
    )
strangers = set(config.get("cohorts") or {}) - set(TASKS)
if strangers:
    raise WorkflowError(f"cohorts can be {sorted(TASKS)}, unknown: {sorted(strangers)}")
if not config["data"]:
    raise WorkflowError(f"profile {PROFILE} needs scans: make book PROFILE={PROFILE} DATA=FOLDER (--config data=FOLDER)")


def files(*patterns):
    """Every file that matches, folders and compiled Python left out."""
    found = {path for pattern in patterns for path in Path().glob(pattern) if path.is_file()}
    return sorted(str(path) for path in found if "__pycache__" not in path.parts)


def sources(*parts):
    """The package's files that a step uses, so that a change reruns what it touches."""
    found = files("mnemodyn/*.py", *(f"mnemodyn/{part}/**/*" for part in parts))
    return [path for path in found if path not in RUNNER]


def outputs(name):
    return [f"{RUNS}/{name}.{ending}" for ending in ("ipynb", "json", "manifest.json")]


def checkpoint(objective):
    return [f"{TRAINED}/{objective}/best/{name}" for name in ("config.json", "model.safetensors")]


def parameters(name, page=None, **paths):
    """A notebook's parameters as one quoted word of JSON, which keeps their types."""
    given = {}
    for part in (["pretrain", name] if name in PRETRAINED else [name]):
        given |= config.get("notebooks", {}).get(part) or {}
    return shlex.quote(json.dumps({**given, "results": f"{RUNS}/{page or name}.json", **paths}))


def resource(name, kind, default):
    return ((config.get("resources") or {}).get(name) or {}).get(kind, default)


rule book:
    input:
        expand(f"{RUNS}/{{name}}.{{ending}}", name=PAGES, ending=["ipynb", "json", "manifest.json"]),
        [path for path in files("book/**/*") if not path.startswith(f"{RUNS}/")],
        "_config.yml",
        "_toc.yml",
    output:
        "_build/html/index.html",
    log:
        "_build/book.log",
    message:
        "The pages ..."
    localrule: True
    # The folder goes first: a page that the table of contents no longer names must not survive.
    shell:
        "rm -rf _build && mkdir _build && "
        "jupyter-book build . -W -n --keep-going > {log} 2>&1"


# last.ckpt, from which an interrupted training goes on, is no output: snakemake removes a rule's
# outputs before it runs the rule again.
rule pretrain:
    input:
        "notebooks/pretrain.ipynb",
        sources("data", "model", "pretrain"),
    output:
        outputs("pretrain_{objective}"),
        checkpoint("{objective}"),
    wildcard_constraints:
        objective="|".join(OBJECTIVES),
    message:
        "{input[0]}, {wildcards.objective} ..."
    params:
        parameters=lambda wildcards: parameters(
            f"pretrain_{wildcards.objective}",
            data=config["data"],
            objective=wildcards.objective,
            output=f"{TRAINED}/{wildcards.objective}",
        ),
    # What others wait for, and the longest page, begin early: the last job runs alone.
    priority: 2
    threads: resource("pretrain", "threads", 2)
    resources:
        mem_mb=resource("pretrain", "mem_mb", 8000),
        runtime=resource("pretrain", "runtime", 240),
        gpu=resource("pretrain", "gpu", 0),
    shell:
        "mnemodyn run {input[0]} {output[0]} -f - <<< {params.parameters}"


# Every other page: what it reads beside its notebook, and the parameters that are paths. `speed` and `ablations` draw what
# was measured beforehand: a benchmark has no place in a run that shares the machine.
FIRST, DATA = checkpoint(OBJECTIVES[0]), {"data": config["data"]}
WEIGHTS = {"checkpoint": f"{TRAINED}/{OBJECTIVES[0]}/best"}
GRID, PUBLISHED = f"{TRAINED}/ablations.json", "book/data/published.csv"
EVALUATED = sources("data", "model", "evaluate")
BOOK = {
    "data": (sources("data"), DATA),
    "reconstruction": ([*EVALUATED, *FIRST, *files("book/data/reconstruction_*.json")], DATA | WEIGHTS),
    "identification": ([*EVALUATED, *FIRST], DATA | WEIGHTS),
    "operator": ([*EVALUATED, *FIRST, *files("book/data/cortex_*")], DATA | WEIGHTS),
    "objectives": (
        [*sources("data", "model", "evaluate", "pretrain"), *(path for name in OBJECTIVES for path in checkpoint(name))],
        DATA | {"checkpoints": {name: f"{TRAINED}/{name}/best" for name in OBJECTIVES}},
    ),
    "ablations": ([GRID, *files("book/data/ablations*.json"), PUBLISHED, *sources("evaluate")], {"quick": GRID}),
    "speed": (["book/data/speed_cpu.json", "book/data/store_cpu.json", *sources()], {}),
    "scaling": (["book/data/scaling.json", *sources()], {}),
    "protocol": ([PUBLISHED, "book/data/abide.json", *EVALUATED], {}),
}
for cohort, task in TASKS.items():
    own = {"data": config["cohorts"][cohort]} if cohort in (config.get("cohorts") or {}) else {}
    read = ["notebooks/tasks.yaml", PUBLISHED, *EVALUATED, *FIRST, *(files("book/data/abide*.json") if cohort == "abide" else [])]
    BOOK[f"downstream_{cohort}"] = (read, {"cohort": cohort, **WEIGHTS, **task, **own})

for page, (read, paths) in BOOK.items():
    name = "downstream" if page.startswith("downstream_") else page

    rule:
        name:
            page
        input:
            f"notebooks/{name}.ipynb",
            read,
        output:
            outputs(page),
        message:
            "{input[0]}" + (f" of {page.partition('_')[2]}" if page != name else "") + " ..."
        params:
            parameters=parameters(name, page, **paths),
        priority: int(name in ("objectives", "reconstruction"))
        threads: resource(name, "threads", 1)
        resources:
            mem_mb=resource(name, "mem_mb", 4000),
            runtime=resource(name, "runtime", 60),
            gpu=resource(name, "gpu", 0),
        shell:
            "mnemodyn run {input[0]} {output[0]} -f - <<< {params.parameters}"


# Finished cells stay in the folder, so that an interrupted grid goes on.
rule ablate:
    input:
        "notebooks/ablations.yaml",
        sources("data", "model", "pretrain"),
        "mnemodyn/evaluate/ablations.py",
    output:
        f"{RUNS}/checkpoints/{PROFILE}/ablations.json",
    log:
        f"{RUNS}/checkpoints/{PROFILE}/ablations.log",
    message:
        "The grid of ablations ..."
    params:
        data=shlex.quote(config["data"]),
        size=shlex.quote(config.get("ablations") or "quick"),
        folder=f"{RUNS}/checkpoints/{PROFILE}/ablations",
    threads: resource("ablate", "threads", 1)
    resources:
        mem_mb=resource("ablate", "mem_mb", 4000),
        runtime=resource("ablate", "runtime", 240),
        gpu=resource("ablate", "gpu", 0),
    shell:
        "mnemodyn ablate {params.data} {input[0]} {params.size} {params.folder} --out {output} "
        "--threads {threads} > {log}"
