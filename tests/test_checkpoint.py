"""A checkpoint comes back whole, refuses what does not fit, and executes nothing."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mnemodyn import Checkpoint, from_pretrained, save_checkpoint
from mnemodyn.checkpoint import CheckpointError
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.files import sha256
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig

PARCELS = ("a", "b", "c")
DRAFT = Path(__file__).parent / "golden" / "lightning-epoch=01-val_mae=0.5000.ckpt"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(n_parcels=3, n_timepoints=16, n_blocks=1, n_channels=4, n_levels=2)
    scaling = Scaling("subtract_mean_global_sd", 2.5)
    checkpoint = Checkpoint(MnemoDyn(config), PARCELS, 0.72, scaling, "f" * 64, {"epochs": 3})
    return save_checkpoint(tmp_path / "run" / "best", checkpoint)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def make_scan(parcels):
    values = np.random.default_rng(0).standard_normal((20, len(parcels))).astype(np.float32)
    return Scan("sub-1", values, 0.72, tuple(parcels), source="scan.tsv")


def test_comes_back_whole(folder, tmp_path):
    a = from_pretrained(folder)
    b = from_pretrained(save_checkpoint(tmp_path / "copy", a))
    x = torch.randn(2, 16, 3)
    assert torch.equal(a.model(x, 0.72).reconstruction, b.model(x, 0.72).reconstruction)
    assert (b.parcels, b.t_r, b.scaling.sd, b.data_fingerprint) == (PARCELS, 0.72, 2.5, "f" * 64)
    assert b.training == {"epochs": 3}
    assert not b.model.training
    assert b.model.config.n_channels == 4
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_paths_that_stand_for_it(folder):
    expected = from_pretrained(folder).fingerprint()
    for path in (folder.parent, folder / "config.json", folder / "model.safetensors"):
        assert from_pretrained(str(path)).fingerprint() == expected
    assert from_pretrained(folder.parent, subfolder="best").fingerprint() == expected
    with pytest.raises(ValueError, match="compat must be none or reference, got 'draft'"):
        from_pretrained(folder, compat="draft")
    with pytest.raises(CheckpointError, match="nowhere: there is no such file.*no NAME/MODEL"):
        from_pretrained("nowhere")
    (folder.parent.parent / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no best/ yet"):
        from_pretrained(folder.parent.parent)


def test_the_fingerprint_tells_what_matters(folder):
    checkpoint = from_pretrained(folder)
    before = checkpoint.fingerprint()
    assert from_pretrained(folder).fingerprint() == before
    with torch.no_grad():
        next(checkpoint.model.parameters()).add_(1e-3)
    assert checkpoint.fingerprint() != before
    rewrite(folder, scaling={"method": "zscore_per_parcel"})
    assert from_pretrained(folder).fingerprint() != before


def test_damage_is_named(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: its SHA-256"):
        from_pretrained(folder)
    weights.write_bytes(whole[:50])
    rewrite(folder, weights_sha256=sha256(weights))
    with pytest.raises(CheckpointError, match=r"config\.json: not a checkpoint"):
        from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: model\.safetensors is missing"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: expected a folder with config"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format must be 1, got 99"),
        ({"model": {"n_parcels": 3, "n_timepoints": 16, "n_heads": 8}}, "n_heads"),
        ({"scaling": {"method": "unheard"}}, "unheard"),
    ],
)
def test_another_configuration_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_damaged_json_is_refused(folder):
    (folder / "config.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match=r"config\.json: not a checkpoint"):
        from_pretrained(folder)


def test_weights_that_do_not_fit_are_listed(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["blocks.0.output.bias"] = torch.zeros(7)
    del weights["blocks.0.lift.bias"]
    save_file(weights, path)
    rewrite(folder, weights_sha256=sha256(path))
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert 'Missing key(s) in state_dict: "blocks.0.lift.bias"' in str(error.value)
    assert "size mismatch for blocks.0.output.bias" in str(error.value)


def test_other_parcels_or_another_order_are_refused(folder):
    checkpoint = from_pretrained(folder)
    checkpoint.check(make_scan(PARCELS))
    with pytest.raises(CheckpointError, match=r"scan\.tsv: the checkpoint expects 3 .*, got 2"):
        checkpoint.check(make_scan("ab"))
    with pytest.raises(CheckpointError, match="order, .*column 0 should be 'a', got 'b'"):
        checkpoint.check(make_scan("bac"))
    with pytest.raises(CheckpointError, match="column 2 should be 'c', got 'd'"):
        checkpoint.check(make_scan("abd"))


def test_a_checkpoint_of_the_draft(tmp_path):
    tensors = load_file(DRAFT.with_suffix(".tensors.safetensors"))
    checkpoint = from_pretrained(DRAFT, compat="reference")
    assert not checkpoint.model.training
    stated = (checkpoint.parcels, checkpoint.t_r, checkpoint.scaling, checkpoint.data_fingerprint)
    assert stated == (None, None, None, None)
    assert checkpoint.training["epoch"] == 2
    assert checkpoint.training["settings"]["normalize"] == "robust_scaler"
    x = tensors["x"].float()
    expected = checkpoint.model(x).reconstruction
    again = from_pretrained(save_checkpoint(tmp_path / "ours", checkpoint))
    assert torch.equal(again.model(x).reconstruction, expected)
    assert again.parcels is None
    assert again.training == checkpoint.training
    exact = checkpoint.model.double()(tensors["x"]).reconstruction
    torch.testing.assert_close(exact, tensors["output"], rtol=1e-8, atol=1e-8)


def test_a_draft_states_no_parcels_and_no_scaling():
    checkpoint = from_pretrained(DRAFT, compat="reference")
    scan = make_scan([f"p{i}" for i in range(12)])
    with pytest.warns(UserWarning, match=r"scan\.tsv: .* only their number, 12, was checked"):
        checkpoint.check(scan)
    with pytest.raises(CheckpointError, match=r"scan\.tsv: the checkpoint expects 12 .*, got 3"):
        checkpoint.check(make_scan("abc"))
    with pytest.raises(CheckpointError, match="does not state its scaling"):
        checkpoint.require_scaling()


def test_settings_of_a_draft_beside_it(tmp_path):
    content = torch.load(DRAFT, weights_only=True)
    settings = content.pop("hyper_parameters")
    inner = tmp_path / "version_0" / "checkpoints"
    inner.mkdir(parents=True)
    torch.save(content, inner / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"holds no hyper_parameters.*no hparams\.yaml"):
        from_pretrained(inner / "model.ckpt", compat="reference")
    # JSON is YAML.
    (tmp_path / "version_0" / "hparams.yaml").write_text(json.dumps(settings))
    expected = from_pretrained(DRAFT, compat="reference").model.config
    assert from_pretrained(inner / "model.ckpt", compat="reference").model.config == expected
    (inner / "hparams.yaml").write_text("storage: !!python/object/apply:os.getcwd []")
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        from_pretrained(inner / "model.ckpt", compat="reference")


def test_the_best_of_a_version_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("mnemodyn.checkpoint._load_draft", lambda path: path.name)
    inner = tmp_path / "checkpoints"
    inner.mkdir()
    for name in ("epoch=01-val_mae=0.50", "epoch=02-val_mae=0.40", "epoch=03-val_mae=0.60", "last"):
        (inner / f"{name}.ckpt").touch()
    best = from_pretrained(tmp_path, compat="reference")
    assert best == "epoch=02-val_mae=0.40.ckpt"
    (inner / "epoch=04.ckpt").touch()
    with pytest.raises(CheckpointError, match="one validation metric.*found 4; name the file"):
        from_pretrained(tmp_path, compat="reference")
    (tmp_path / "acc").mkdir()
    for name in ("a-val_acc=0.7", "b-val_acc=0.9"):
        (tmp_path / "acc" / f"{name}.ckpt").touch()
    assert from_pretrained(tmp_path / "acc", compat="reference") == "b-val_acc=0.9.ckpt"


def test_the_other_compat_is_named(folder):
    with pytest.raises(CheckpointError, match="needs compat='reference', or --compat reference"):
        from_pretrained(DRAFT)
    with pytest.raises(CheckpointError, match=r"expected one \.ckpt of the published draft"):
        from_pretrained(folder, compat="reference")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    content = torch.load(DRAFT, weights_only=True)
    content["hyper_parameters"]["storage"] = Bomb(tmp_path / "exploded")
    torch.save(content, tmp_path / "bomb.ckpt")
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        from_pretrained(tmp_path / "bomb.ckpt", compat="reference")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"\x80\x02}q\x00.", b"cut"],
)
def test_foreign_files_are_refused(tmp_path, content):
    if content == b"cut":
        content = DRAFT.read_bytes()[:-500]
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: not a Lightning checkpoint"):
        from_pretrained(tmp_path / "a.ckpt", compat="reference")


# What a file asks for, and what it holds


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("n_channels", 20_000, "size mismatch"),
        ("n_channels", 10**30, "not a checkpoint"),
        ("n_blocks", 10**9, "need more than the 16 weights given"),
        ("n_levels", 10**12, "halves a scan"),
        ("n_timepoints", 10**9, "size mismatch"),
        ("n_timepoints", 10**400, "not a checkpoint"),
        ("n_segments", 10**9, "size mismatch"),
        ("wavelet", "../../etc", "wavelet must be a name"),
    ],
)
def test_a_configuration_takes_no_memory_that_the_weights_do_not(folder, setting, value, message):
    model = json.loads((folder / "config.json").read_text())["model"]
    rewrite(folder, model={**model, setting: value})
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(folder)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"t_r": "2"},
        {"t_r": -1},
        {"t_r": float("nan")},
        {"parcels": 3},
        {"parcels": [1, 2, 3]},
        {"parcels": ["a", "b"]},
        {"parcels": ["a", "b", "a"]},
        {"training": []},
        {"scaling": []},
        {"scaling": {"method": "standard", "offset": [0, 0], "scale": [1, 1]}},
        {"scaling": {"method": "standard", "offset": [0, 0, float("nan")], "scale": [1, 1, 1]}},
        {"model": None},
        {"weights_sha256": 5},
        {"unheard": 1},
    ],
)
def test_a_configuration_of_the_wrong_kinds_is_refused(folder, changes):
    rewrite(folder, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json: not a checkpoint of this version"):
        from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not a checkpoint of this version"):
        from_pretrained(folder)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file({name: change(value) for name, value in load_file(path).items()}, path)
    rewrite(folder, weights_sha256=sha256(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    change_weights(folder, lambda weights: weights.clone().fill_(value))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* NaN or infinite weights"):
        from_pretrained(folder)
    content = torch.load(DRAFT, weights_only=True)
    content["state_dict"] = {name: w.fill_(value) for name, w in content["state_dict"].items()}
    torch.save(content, folder / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: .* NaN or infinite weights"):
        from_pretrained(folder / "a.ckpt", compat="reference")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_converted_and_that_is_said(folder, kind):
    exact = from_pretrained(folder).model.state_dict()
    change_weights(folder, lambda weights: weights.to(kind))
    content = torch.load(DRAFT, weights_only=True)
    content["state_dict"] = {name: w.to(kind) for name, w in content["state_dict"].items()}
    torch.save(content, folder / "a.ckpt")
    with pytest.warns(UserWarning, match=rf"model\.safetensors: weights of {kind}"):
        found = from_pretrained(folder).model.state_dict()
    for name, weights in exact.items():
        assert torch.equal(found[name], weights.to(kind).float())
    with pytest.warns(UserWarning, match=rf"a\.ckpt: weights of {kind}"):
        draft = from_pretrained(folder / "a.ckpt", compat="reference")
    assert {weights.dtype for weights in draft.model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim_k": 10**6, "dim_d": 10**6}, "do not fit|need more"),
        ({"D_out": [12] * 10**5}, "need more than"),
        ({"K_dense": 10**9}, "need more than"),
    ],
)
def test_settings_of_a_draft_take_no_memory_that_its_weights_do_not(tmp_path, settings, message):
    content = torch.load(DRAFT, weights_only=True)
    content["hyper_parameters"].update(settings)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: .*({message})"):
        from_pretrained(tmp_path / "a.ckpt", compat="reference")


def test_a_small_draft_with_much_in_it_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1).expand(10**12)}}, path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: its tensors are larger than the file"):
        from_pretrained(path, compat="reference")
    torch.save({"state_dict": {"a": torch.zeros(10**6)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    with pytest.raises(CheckpointError, match=r"a\.ckpt: not a Lightning checkpoint"):
        from_pretrained(path, compat="reference")


def test_an_unsafe_way_to_load_is_never_advised(tmp_path):
    for content in (pickle.dumps(Bomb(tmp_path / "exploded")), b"no checkpoint", b""):
        (tmp_path / "a.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            from_pretrained(tmp_path / "a.ckpt", compat="reference")
        assert "weights_only" not in str(error.value)
        assert "safe_globals" not in str(error.value)
    assert not (tmp_path / "exploded").exists()
