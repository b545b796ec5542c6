# The book: the notebooks of studies.yaml, run with the parameters of a profile, then the pages.
#
#   make book PROFILE=quick CORES=2                   what most people want
#   snakemake --config profile=quick --cores 2 -n     what would run, and why
#
# On a cluster every notebook is a job of its own: see book/own_data.md.

from contextlib import ExitStack
import ctypes
import json
import os
from pathlib import Path
import shlex
import sys

from mnemodyn.files import digest, locked, read_yaml, sha256
from mnemodyn.run import check_parameters, read_parameters

# The package's command and Jupyter Book come from the environment that snakemake runs in.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

# One build at a time, held until its process ends, however that is. Snakemake's own lock outlives a killed build.
BUILDING = ExitStack()
# A build dies with `make`, and a page with the build (Linux knows how), so that neither meets its own remains.
DIES = "sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9)"
MNEMODYN = f"import ctypes, sys; {DIES}; from mnemodyn.cli import main; sys.exit(main())"
if "MAKELEVEL" in os.environ:
    eval(DIES)


onstart:
    try:
        BUILDING.enter_context(locked("book", "make book"))
    except RuntimeError as error:
        raise WorkflowError(f"one build at a time: {error}")


onsuccess:
    BUILDING.close()


onerror:
    BUILDING.close()


STUDIES = read_yaml(Path("studies.yaml").read_text())
NAME = config.get("profile", "quick")
# Not by `configfile`: Snakemake reads YAML 1.1, in which 1e-3 is text.
PROFILE = read_yaml(Path(f"profiles/{NAME}.yaml").read_text())
PROFILE |= {key: config[key] for key in ("data", "cohort", "t_r") if key in config}

unknown = set(PROFILE) - {"data", "cohort", "t_r", "pages", "resources"}
unknown |= {*PROFILE.get("pages", {}), *PROFILE.get("resources", {})} - set(STUDIES)
if unknown:
    raise WorkflowError(f"profiles/{NAME}.yaml: unknown keys or pages {sorted(unknown)}; pages: {list(STUDIES)}")
if not PROFILE.get("data"):
    raise WorkflowError(f"profile {NAME} needs scans: make book PROFILE={NAME} DATA=FOLDER")


def scheduled(study):
    """Whether this build runs a page: the profile of long studies runs those, every other one the rest."""
    if any(other.get("profile") == NAME for other in STUDIES.values()):
        return study.get("profile") == NAME
    # Scans of one's own, from a profile or from the command line, have other parcels than the shipped ones.
    when = {None: True, "shipped": PROFILE["data"] == "hcp7", "cohort": bool(PROFILE.get("cohort"))}
    return "profile" not in study and when[study.get("when")]


def outputs(page):
    folder = "book/committed" if "profile" in STUDIES[page] else "book/runs"
    return multiext(f"{folder}/{page}", ".ipynb", ".csv", ".manifest.json")


def inputs(wildcards):
    """The notebook, and the page that trains the network which it reads."""
    study = STUDIES[wildcards.page]
    network = outputs(study["checkpoint"]) if "checkpoint" in study else []
    return [f"notebooks/{study['notebook']}.ipynb", *network]


def resource(kind, default):
    return lambda wildcards: PROFILE.get("resources", {}).get(wildcards.page, {}).get(kind, default)


def parameters(wildcards):
    """A page's parameters as one quoted word of JSON, which keeps their types."""
    page = wildcards.page
    study = STUDIES[page]
    # A folder a profile, so that a quick look never costs a long run its network.
    given = {**PROFILE, "output": f"runs/{NAME}/{page}", "cache": f"runs/{NAME}/{page}/cache"}
    given["threads"] = resource("threads", 1)(wildcards)
    if "checkpoint" in study:
        given["checkpoint"] = f"runs/{NAME}/{study['checkpoint']}/best"
    defaults = read_parameters(inputs(wildcards)[0])
    given = {name: value for name, value in given.items() if name in defaults}
    given |= study.get("parameters", {}) | PROFILE.get("pages", {}).get(page, {})
    given["results"] = str(outputs(page)[1])
    return shlex.quote(json.dumps(check_parameters(defaults, given)))


def files(folder):
    found = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path]


# A page is run again when the content of any source has changed, but for what only runs a notebook.
RUNNER = {f"mnemodyn/{name}.py" for name in ("__init__", "cli", "run")}
SOURCES = {path: sha256(path) for path in files("mnemodyn") + files("notebooks/lib") + files("benchmarks") if path not in RUNNER}
# What other pages wait for begins first, and so does what a reader sees first.
LEADING = {"data"} | {study["checkpoint"] for study in STUDIES.values() if "checkpoint" in study}
PAGES = [page for page in STUDIES if scheduled(STUDIES[page])]
# What an earlier build left, as of other data, is no page of this one.
STALE = [path for page in set(STUDIES) - set(PAGES) for path in outputs(page) if "/runs/" in path]

# The build writes stubs for pages that this copy lacks.
WRITTEN = [path for path in files("book") if not path.startswith(("book/runs/", "book/committed/"))]
WRITTEN += [path for path in files("profiles") + files("book/committed") if not path.endswith(".md")]


# Snakemake removes outputs before it runs a rule again. The old book stands until the new one is whole, and then goes.
rule book:
    input:
        [outputs(page) for page in PAGES],
        WRITTEN,
        ["_config.yml", "_toc.yml", "studies.yaml", "CHANGELOG.md"],
    output:
        "_build/html/.whole",
    log:
        "_build/book.log",
    message:
        "The pages ..."
    localrule: True
    params:
        stale=STALE if "data" in PAGES else [],
    shell:
        """
        # Killed between the two moves below, a build has left the old book here.
        test -d _build/html -o ! -d _build/old || mv _build/old _build/html
        rm -rf _build/new _build/old {params.stale}
        jupyter-book build . --path-output _build/new -W -n --keep-going > {log} 2>&1
        touch _build/new/_build/html/.whole
        test ! -d _build/html || mv _build/html _build/old
        mv _build/new/_build/html _build/html
        rm -rf _build/new _build/old
        """


# The network that a page trains is no output: snakemake removes outputs before it runs a rule again,
# and an interrupted training would start anew.
rule page:
    input:
        inputs,
    output:
        multiext("{folder}/{page}", ".ipynb", ".csv", ".manifest.json"),
    wildcard_constraints:
        folder="book/runs|book/committed",
        # A committed page of another profile is a source, and not to be made anew.
        page="|".join(PAGES),
    message:
        "{input[0]}, the page {wildcards.page} ..."
    params:
        parameters=parameters,
        sources=digest(SOURCES),
    threads: resource("threads", 1)
    resources:
        mem_mb=resource("mem_mb", 4000),
        runtime=resource("runtime", 60),
        gpu=resource("gpu", 0),
    shell:
        "exec {sys.executable} -c {MNEMODYN:q} run {input[0]} {output[0]} -f /dev/stdin <<< {params.parameters}"


use rule page as leading_page with:
    wildcard_constraints:
        folder="book/runs|book/committed",
        page="|".join(LEADING & set(PAGES)) or "none",
    priority: 1


ruleorder: leading_page > page
