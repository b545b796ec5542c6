"""Publishing and loading: against a real HTTP server that speaks the hub's protocol on loopback."""

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from safetensors.torch import load_file

from mnemodyn import (
    Checkpoint,
    MnemoDyn,
    ModelConfig,
    Scaling,
    from_pretrained,
    load_checkpoint,
    publish,
)
from mnemodyn.checkpoint import CheckpointError, save_checkpoint
from mnemodyn.hub import HubError, find_checkpoint, write_folder

GOLDEN = Path(__file__).parent / "golden" / "lightning-epoch=01-val_mae=0.5000.ckpt"
# The library's own, of its upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
PARCELS = tuple(f"p{i}" for i in range(6))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = MnemoDyn(
        ModelConfig(
            n_parcels=6, n_timepoints=32, n_channels=4, input_width=4, field_rank=2, n_levels=2
        )
    ).eval()
    training = {
        "objective": {"hidden_share": 0.5},
        "settings": {"epochs": 2, "learning_rate": 1e-3},
        "train_participants": ["sub-a", "sub-b"],
        "validation_participants": ["sub-c"],
        "val_r2_hidden": 0.25,
    }
    save_checkpoint(folder / "best", Checkpoint(model, PARCELS, 0.8, Scaling(), "f" * 64, training))
    (folder / "history.csv").write_text("epoch,val_r2_hidden\n1,0.25\n")
    (folder / "run.json").write_text("{}")
    results = {
        "r2_hidden": {"model": 0.31, "var": 0.42},
        "r2_hidden_interval": {"model": [0.2, 0.4]},
        "n_participants": 9,
    }
    (folder / "reconstruction.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def same(a, b):
    torch.manual_seed(1)
    x = torch.randn(1, a.config.n_timepoints, a.config.n_parcels)
    with torch.no_grad():
        return torch.equal(a(x, 0.8).reconstruction, b(x, 0.8).reconstruction)


def test_published_and_loaded_again(run, hub):
    url = publish(run, "lab/tiny", results=[run / "reconstruction.json"])
    assert url.startswith(f"{hub.url}/lab/tiny/commit/")
    files = hub.files("lab/tiny")
    assert {"README.md", "config.json", "model.safetensors", "parcels.tsv", "history.csv"} <= set(
        files
    )
    assert files["parcels.tsv"].splitlines()[:2] == [b"index\tname", b"0\tp0"]
    assert ("PUT", f"/lfs/{json.loads(files['config.json'])['weights_sha256']}") in hub.log
    there, back = load_checkpoint(run / "best"), from_pretrained("lab/tiny")
    assert same(there.model, back.model)
    assert (back.parcels, back.t_r, back.scaling) == (there.parcels, there.t_r, there.scaling)
    assert b"sub-" not in files["config.json"]
    assert back.training["n_train_participants"] == 2
    model = MnemoDyn.from_pretrained("lab/tiny")
    assert same(model, there.model)
    assert model.checkpoint.parcels == PARCELS
    hub.shutdown()
    hub.server_close()
    assert same(from_pretrained("lab/tiny").model, there.model), (
        "the copy in the cache serves without a network"
    )


def test_the_card_states_what_the_run_states(run, tmp_path):
    folder = write_folder(
        run,
        tmp_path,
        repo_id="lab/tiny",
        results=[run / "reconstruction.json"],
        licence="cc-by-4.0",
    )
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("R² of hidden entries, model", 0.31)
    ], "a baseline's score is no result of this network"
    assert (
        "| R² of hidden entries, var | 0.420 | not given | 9 held-out participants |" in card.text
    )
    assert (
        "| R² of hidden entries, model | 0.310 | 0.200 to 0.400 | 9 held-out participants |"
        in card.text
    )
    assert "2 participants, 1 to choose it" in card.text
    assert "val_r2_hidden 0.25. Expect less" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    kept = write_folder(run, tmp_path / "kept", keep_participants=True)
    assert load_checkpoint(kept).training["train_participants"] == ["sub-a", "sub-b"]
    assert "No results on held-out" in (kept / "README.md").read_text()


def test_results_of_any_shape_that_the_book_writes(run, tmp_path):
    beside = {"value": 0.31, "low": 0.2, "high": 0.4}
    for name, content, row in (
        (
            "beside",
            {"r2_hidden": {"model": beside}},
            "| R² of hidden entries, model | 0.310 | 0.200 to 0.400 |",
        ),
        (
            "top",
            {"acc_interval": [0.4, 0.6], "acc": 0.5, "rows": [], "done": True},
            "| acc | 0.500 | 0.400 to 0.600 |",
        ),
        (
            "none",
            {"acc": 0.5, "acc_interval": [None, None], "auc": None},
            "| acc | 0.500 | not given | none |",
        ),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        text = (
            write_folder(run, tmp_path / "o", results=[tmp_path / f"{name}.json"]) / "README.md"
        ).read_text()
        (found,) = text.split("| --- | --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
        assert found.startswith(row), "that row, and no other"


def test_private_branch_and_subfolder(run, hub, monkeypatch):
    publish(run, "lab/p", private=True, revision="v1", subfolder="small")
    assert hub.repositories["lab/p"]["private"]
    assert set(hub.files("lab/p")) == set()
    assert "small/config.json" in hub.files("lab/p", "v1")
    assert from_pretrained("lab/p", revision="v1", subfolder="small").parcels == PARCELS
    publish(run, "lab/p", revision="v1", subfolder="small")
    with pytest.raises(
        CheckpointError, match="has no config.json and model.safetensors in its folder /"
    ):
        from_pretrained("lab/p", revision="v1")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "elsewhere")
    with pytest.raises(HubError, match="no such repository for this token.*hf auth login"):
        from_pretrained("lab/p", revision="v1", subfolder="small")


def test_the_mixin_of_the_library(run, hub, tmp_path):
    model = MnemoDyn.from_pretrained(run)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    url = model.push_to_hub("lab/tuned", commit_message="tuned")
    assert "/lab/tuned/commit/" in url
    assert same(MnemoDyn.from_pretrained("lab/tuned"), model)
    model.save_pretrained(tmp_path / "saved")
    for name in ("", "model.safetensors", "config.json"):
        assert same(MnemoDyn.from_pretrained(str(tmp_path / "saved" / name)), model)
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="does not know its parcels.*mnemodyn publish"):
        MnemoDyn(model.config).save_pretrained(tmp_path / "bare")
    clone = pickle.loads(pickle.dumps(model))
    assert clone.checkpoint.model is clone


def test_the_drafts_checkpoint_and_back(hub, tmp_path):
    there = load_checkpoint(GOLDEN, compat="reference")
    golden = load_file(GOLDEN.with_name(GOLDEN.stem + ".tensors.safetensors"))
    publish(GOLDEN, "lab/draft")
    back = from_pretrained("lab/draft")
    with torch.no_grad():
        a, b = (c.model(golden["x"].float()).reconstruction for c in (there, back))
    assert torch.equal(a, b)
    with torch.no_grad():
        c = back.model.double()(golden["x"].double()).reconstruction
    assert torch.allclose(c, golden["output"].double(), rtol=1e-8, atol=1e-8)
    # The file itself on the hub, where the draft's trainer puts it.
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN, folder)
    huggingface_hub.HfApi().create_repo("lab/raw")
    huggingface_hub.HfApi().upload_folder(repo_id="lab/raw", folder_path=folder.parent)
    raw = MnemoDyn.from_pretrained("lab/raw", compat="reference")
    assert torch.equal(raw(golden["x"].float()).reconstruction.detach(), a)


def test_the_best_of_a_version_folder(tmp_path):
    for name in ("epoch=01-val_mae=0.50", "epoch=02-val_mae=0.40", "epoch=03-val_mae=0.60", "last"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
    (tmp_path / "metrics.csv").touch()
    assert find_checkpoint(tmp_path).checkpoint.name == "epoch=02-val_mae=0.40.ckpt"
    assert find_checkpoint(tmp_path).metrics == tmp_path / "metrics.csv"
    (tmp_path / "checkpoints" / "epoch=04.ckpt").touch()
    with pytest.raises(
        CheckpointError, match="4 .ckpt files that do not all name one.*name the checkpoint itself"
    ):
        find_checkpoint(tmp_path)
    for name in ("a-val_acc=0.7", "b-val_acc=0.9"):
        (tmp_path / "acc").mkdir(exist_ok=True)
        (tmp_path / "acc" / f"{name}.ckpt").touch()
    assert find_checkpoint(tmp_path / "acc").checkpoint.name == "b-val_acc=0.9.ckpt"


def test_settings_beside_a_draft_without(tmp_path):
    content = torch.load(GOLDEN, weights_only=True)
    settings = content.pop("hyper_parameters")
    torch.save(content, tmp_path / "bare.ckpt")
    (tmp_path / "other.yaml").write_text(json.dumps(settings))
    (tmp_path / "log.csv").write_text("a\n1\n")
    with pytest.raises(CheckpointError, match="holds no hyper_parameters"):
        write_folder(tmp_path / "bare.ckpt", tmp_path / "out")
    folder = write_folder(
        tmp_path / "bare.ckpt",
        tmp_path / "out",
        hyper_parameters=tmp_path / "other.yaml",
        metrics=tmp_path / "log.csv",
    )
    assert same(load_checkpoint(folder).model, load_checkpoint(GOLDEN, compat="reference").model)
    assert (folder / "history.csv").read_text() == "a\n1\n"


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_an_interrupted_upload_commits_nothing(run, hub, where):
    publish(run, "lab/tiny", results=[run / "reconstruction.json"])
    before = dict(hub.files("lab/tiny"))
    model = MnemoDyn.from_pretrained(run)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    changed = run / where.strip("/")
    model.save_pretrained(changed)
    hub.broken = where
    with pytest.raises(HubError, match="broke off|was not reached"):
        publish(changed, "lab/tiny")
    assert hub.files("lab/tiny") == before
    hub.broken = ""
    publish(changed, "lab/tiny")
    assert same(from_pretrained("lab/tiny").model, model)


def test_the_hub_validates_the_card(run, hub, tmp_path):
    folder = write_folder(run, tmp_path, repo_id="lab/tiny", results=[run / "reconstruction.json"])
    huggingface_hub.ModelCard.load(folder / "README.md").validate()
    publish(run, "lab/tiny")
    assert hub.log.count(("POST", "/api/validate-yaml")) > 1, "and again at every commit"
    with pytest.raises(HubError, match=r'refused the model card: .*"license" must be one of'):
        publish(run, "lab/other", licence="free for all")
    assert hub.files("lab/other") == {}


def test_a_tampered_file(run, hub, tmp_path):
    publish(run, "lab/tiny")
    files = hub.files("lab/tiny")
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\x01"
    with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
        from_pretrained("lab/tiny", cache_dir=tmp_path / "fresh")


def test_refusals_name_the_mend(run, hub, monkeypatch):
    publish(run, "lab/tiny")
    with pytest.raises(HubError, match="has no revision 'v9'"):
        from_pretrained("lab/tiny", revision="v9")
    with pytest.raises(HubError, match="no such repository"):
        from_pretrained("lab/absent")
    with pytest.raises(HubError, match=r"refused the token \(status 401\).*HF_TOKEN"):
        publish(run, "lab/tiny", token="hf_wrong")
    with pytest.raises(HubError, match="no NAME/MODEL"):
        publish(run, "a/b/c")
    with pytest.raises(CheckpointError, match="no file or folder nowhere, and it is no NAME/MODEL"):
        from_pretrained("nowhere")
    with pytest.raises(CheckpointError, match="there is no file absent.json"):
        publish(run, "lab/tiny", results=["absent.json"])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        HubError,
        match=r"lab/other \(no file or folder here\): http://127.0.0.1:9 was not reached.*HF_HUB_OFFLINE",
    ):
        from_pretrained("lab/other")
    with pytest.raises(HubError, match="was not reached"):
        publish(run, "lab/tiny")


def test_a_folder_that_is_not_what_was_asked_for(run, tmp_path):
    with pytest.raises(CheckpointError, match="load it without compat"):
        from_pretrained(run, compat="reference")
    with pytest.raises(CheckpointError, match="load it with compat='reference'"):
        from_pretrained(GOLDEN)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a run without best/"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="its config.json holds its hyper-parameters"):
        write_folder(run, tmp_path / "out", hyper_parameters=run / "run.json")
