"""Publishing and loading against a real HTTP server that speaks the hub's protocol on loopback."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from mnemodyn import Checkpoint, MnemoDyn, ModelConfig, Scaling, from_pretrained, publish
from mnemodyn.checkpoint import CheckpointError, HubError, save_checkpoint
from mnemodyn.files import sha256
from mnemodyn.hub import write_folder
from mnemodyn.results import write_results

GOLDEN = Path(__file__).parent / "golden" / "lightning-epoch=01-val_mae=0.5000.ckpt"
# The library's own, of its upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
PARCELS = tuple(f"p{i}" for i in range(6))
CONFIG = ModelConfig(
    n_parcels=6, n_timepoints=32, n_channels=4, input_width=4, field_rank=2, n_levels=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run as training leaves it, with a table of results."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    training = {
        "objective": {"name": "masked", "hidden_share": 0.5},
        "settings": {"training": {"epochs": 2, "learning_rate": 1e-3}, "scaling": "raw"},
        "train_participants": ["sub-a", "sub-b"],
        "validation_participants": ["sub-c"],
        "val_r2_hidden": 0.25,
    }
    model = MnemoDyn(CONFIG).eval()
    save_checkpoint(folder / "best", Checkpoint(model, PARCELS, 0.8, Scaling(), "f" * 64, training))
    (folder / "history.csv").write_text("epoch,val_r2_hidden\n1,0.25\n")
    (folder / "run.json").write_text("{}")
    about = {"data": "HCP-7", "task": "hidden entries", "score": "r2", "kind": "real", "n": 9}
    rows = [
        {**about, "method": "model", "value": 0.31, "low": 0.2, "high": 0.4},
        {**about, "method": "var", "value": 0.42},
        {**about, "method": "model", "against": "var", "value": -0.11, "low": -0.2, "high": 0.0},
    ]
    write_results(folder / "results.csv", rows)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_published_and_loaded_again(run, hub):
    url = publish(run, "lab/tiny")
    assert url.startswith(f"{hub.url}/lab/tiny/commit/")
    files = hub.files("lab/tiny")
    names = {"README.md", "config.json", "model.safetensors", "parcels.tsv", "history.csv"}
    assert names <= set(files)
    assert files["parcels.tsv"].splitlines()[:2] == [b"index\tname", b"0\tp0"]
    weights = run / "best" / "model.safetensors"
    assert ("PUT", f"/lfs/{sha256(weights)}") in hub.log
    there = from_pretrained(run)
    back = from_pretrained("lab/tiny")
    assert back.fingerprint() == there.fingerprint()
    assert (back.t_r, back.data_fingerprint) == (0.8, "f" * 64)
    assert b"sub-" not in files["config.json"], "participants' identifiers stay at home"
    assert back.training["n_train_participants"] == 2
    hub.shutdown()
    hub.server_close()
    again = from_pretrained("lab/tiny")
    assert again.fingerprint() == there.fingerprint(), "the cache serves without a network"


def test_the_card_states_what_the_run_states(run, tmp_path):
    folder = write_folder(run, tmp_path, repo_id="lab/tiny", licence="cc-by-4.0")
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    scores = [(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results]
    expected = [("HCP-7 (real)", "hidden entries, r2", 0.31)]
    assert scores == expected, "a baseline's score is no result of this network"
    about = "| HCP-7 (real) | hidden entries |"
    assert f"{about} MnemoDyn | r2 | 0.310 | 0.200 to 0.400 | 9 |" in card.text
    assert f"{about} VAR(1) smoother | r2 | 0.420 | not given | 9 |" in card.text
    assert f"{about} MnemoDyn - VAR(1) smoother | r2 | -0.110 |" in card.text
    assert "2 participants, and 1 to choose the checkpoint" in card.text
    assert "| name masked, hidden_share 0.5 |" in card.text
    assert "| epochs 2, learning_rate 0.001 |" in card.text
    assert "val_r2_hidden 0.25. Expect less" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_text_from_data_is_text_on_the_card(run, tmp_path):
    nasty = "<img src=x onerror=alert(1)>\n---\n|"
    checkpoint = from_pretrained(run)
    training = {**checkpoint.training, "objective": {"name": nasty}, "settings": {nasty: nasty}}
    parcels = ("=1+1", "a\nb", "c|d", *PARCELS[3:])
    save_checkpoint(tmp_path / "run", replace(checkpoint, training=training, parcels=parcels))
    about = {"data": nasty, "task": nasty, "method": "model", "score": "r2", "kind": "real"}
    write_results(tmp_path / "r.csv", [{**about, "value": 0.5}])
    folder = write_folder(tmp_path / "run", tmp_path / "out", results=[tmp_path / "r.csv"])
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert "<" not in card.text.replace("\\<", "")
    shown = r"\<img src=x onerror=alert(1)\> --- \|"
    assert f"| {shown} (real) | {shown} | MnemoDyn | r2 | 0.500 |" in card.text
    assert card.data.eval_results[0].dataset_name == f"{nasty} (real)"
    assert (folder / "parcels.tsv").read_text().splitlines()[1] == "0\t'=1+1"
    with pytest.raises(HubError):
        write_folder(run, tmp_path / "out", repo_id='x")\nimport os')


def test_a_network_of_step_0_is_named_the_front_end_and_keeps_its_score(run, tmp_path):
    about = {"data": "D", "task": "hidden entries", "method": "model", "score": "r2"}
    about |= {"kind": "real", "low": 0.0, "high": 0.0}
    rows = [about | {"value": 0.5, "low": 0.4, "high": 0.6}]
    rows.append(about | {"against": "front_end", "value": 0.0})
    write_results(tmp_path / "r.csv", rows)
    folder = write_folder(run, tmp_path / "out", results=[tmp_path / "r.csv"])
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert "| front end alone (the step kept is 0) | r2 | 0.500 |" in card.text.replace("\\", "")
    assert "| MnemoDyn |" not in card.text
    assert [found.metric_value for found in card.data.eval_results] == [0.5]


def test_a_card_without_results(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "alone")
    folder = write_folder(tmp_path / "alone", tmp_path / "out")
    assert "No results on held-out" in (folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError):
        write_folder(run, tmp_path / "out", results=["absent.csv"])
    with pytest.raises(ValueError, match=r"history\.csv: not a table.*expected the columns"):
        write_folder(run, tmp_path / "out", results=[run / "history.csv"])


def test_private_branch_and_subfolder(run, hub, monkeypatch):
    publish(run, "lab/p", private=True, revision="v1", subfolder="small")
    assert hub.repositories["lab/p"]["private"]
    assert set(hub.files("lab/p")) == set()
    assert "small/config.json" in hub.files("lab/p", "v1")
    assert from_pretrained("lab/p", revision="v1", subfolder="small").parcels == PARCELS
    publish(run, "lab/p", revision="v1", subfolder="small")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        from_pretrained("lab/p", revision="v1")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "elsewhere")
    with pytest.raises(HubError, match="no such repository for this token.*hf auth login"):
        from_pretrained("lab/p", revision="v1", subfolder="small")


def test_the_drafts_checkpoint_and_back(hub, tmp_path):
    there = from_pretrained(GOLDEN, compat="reference")
    golden = load_file(GOLDEN.with_name(GOLDEN.stem + ".tensors.safetensors"))
    publish(GOLDEN, "lab/draft", compat="reference")
    back = from_pretrained("lab/draft")
    assert back.fingerprint() == there.fingerprint()
    with torch.no_grad():
        exact = back.model.double()(golden["x"].double()).reconstruction
    torch.testing.assert_close(exact, golden["output"].double(), rtol=1e-8, atol=1e-8)
    # The file itself on the hub, where the draft's trainer puts it.
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN, folder)
    huggingface_hub.HfApi().create_repo("lab/raw")
    huggingface_hub.HfApi().upload_folder(repo_id="lab/raw", folder_path=folder.parent)
    raw = from_pretrained("lab/raw", compat="reference")
    assert raw.fingerprint() == there.fingerprint()


@pytest.mark.parametrize("where", ["/lfs/", "/commit/"])
def test_an_interrupted_upload_commits_nothing(run, hub, where, tmp_path):
    publish(run, "lab/tiny")
    before = dict(hub.files("lab/tiny"))
    torch.manual_seed(len(where))
    changed = replace(from_pretrained(run), model=MnemoDyn(CONFIG).eval())
    save_checkpoint(tmp_path / "changed", changed)
    hub.broken = where
    with pytest.raises(HubError, match="lab/tiny: "):
        publish(tmp_path / "changed", "lab/tiny")
    assert hub.files("lab/tiny") == before
    hub.broken = ""
    publish(tmp_path / "changed", "lab/tiny")
    assert from_pretrained("lab/tiny").fingerprint() == changed.fingerprint()


def test_the_hub_validates_the_card(run, hub, tmp_path):
    folder = write_folder(run, tmp_path, repo_id="lab/tiny")
    huggingface_hub.ModelCard.load(folder / "README.md").validate()
    publish(run, "lab/tiny")
    assert hub.log.count(("POST", "/api/validate-yaml")) > 1, "and again at every commit"
    with pytest.raises(HubError, match='"license" must be one of'):
        publish(run, "lab/other", licence="free for all")
    assert hub.files("lab/other") == {}


def test_a_tampered_file(run, hub, tmp_path):
    publish(run, "lab/tiny")
    files = hub.files("lab/tiny")
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\x01"
    with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
        from_pretrained("lab/tiny", cache_dir=tmp_path / "fresh")


def test_refusals_say_what_to_do(run, hub, monkeypatch):
    publish(run, "lab/tiny")
    with pytest.raises(HubError, match="Revision Not Found"):
        from_pretrained("lab/tiny", revision="v9")
    with pytest.raises(HubError, match="no such repository"):
        from_pretrained("lab/absent")
    with pytest.raises(HubError, match="the hub does not allow this.*HF_TOKEN"):
        publish(run, "lab/tiny", token="hf_wrong")
    with pytest.raises(HubError, match="a/b/c: .*Repo id must be"):
        publish(run, "a/b/c")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="lab/other: the hub was not reached"):
        from_pretrained("lab/other")
    with pytest.raises(HubError, match="Connection refused"):
        publish(run, "lab/tiny")
