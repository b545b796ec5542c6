"""The grid: settings checked before anything runs, finished cells kept, differences recomputed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from mnemodyn.cli import main
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate import ablations
from mnemodyn.evaluate.ablations import Cell, Condition, Grid, collect, read_grid, run_grid, score
from mnemodyn.model.config import ModelConfig
from mnemodyn.model.network import MnemoDyn
from mnemodyn.parameters import ParameterError
from mnemodyn.pretrain.objective import Masked

GRID = Path(__file__).parents[1] / "notebooks" / "ablations.yaml"
TINY = """
sizes:
  tiny:
    folds: 2
    n_test: 1
    n_timepoints: 32
    window: 16
    mask_window: 4
    settings: {n_timepoints: 16, n_channels: 4, input_width: 4, n_levels: 2, epochs: 1, windows_per_epoch: 8}
    cells: [haar, short, one]
cells:
  default: {group: default}
  haar: {group: wavelets, settings: {wavelet: haar}}
  short: {group: test, test: {window: 8}}
  one: {group: data, settings: {n_train: 1}}
"""


@pytest.fixture
def scans():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 64, 3)).cumsum(1).astype(np.float32)
    return [Scan(f"sub-{i}", v, 1.0, ("a", "b", "c"), source=f"{i}.tsv") for i, v in enumerate(values)]


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.yaml").write_text(TINY)
    return read_grid(tmp_path / "grid.yaml", "tiny")


@pytest.mark.parametrize("size", ["ci", "quick", "cpu", "full"])
def test_the_books_grid_is_sound(size):
    grid = read_grid(GRID, size)
    assert grid.cells[0].name == "default"
    assert not grid.cells[0].settings
    assert not grid.cells[0].test
    assert len({cell.label for cell in grid.cells}) == len(grid.cells)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wavelet: haar", "wavelets: haar", "unknown setting wavelets; did you mean wavelet"),
        ("wavelet: haar", "n_levels: 9", "n_levels 9 halves"),
        ("window: 8", "windw: 8", "unknown test of cell short: windw"),
        ("window: 8", "window: 7", "cell short: 7 frames do not divide a window of 32"),
        ("[haar, short, one]", "[hair]", "unknown cell hair; did you mean haar"),
        ("n_train: 1", "n_train: all", "n_train must be a number of scans"),
        ("folds: 2", "fold: 2", "unknown entry of size tiny: fold"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, old, new, message):
    (tmp_path / "grid.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(ParameterError, match=message.replace("[", r"\[")):
        read_grid(tmp_path / "grid.yaml", "tiny")
    with pytest.raises(ParameterError, match="unknown size huge"):
        read_grid(GRID, "huge")


def test_finished_cells_are_kept_and_differences_are_paired(grid, scans, tmp_path, monkeypatch):
    first = run_grid(grid, scans, tmp_path / "runs", log=lambda _: None)
    assert [r["person"] for r in first["default"]] == ["sub-0", "sub-1"]
    # Cells that differ in the test alone share a network: three trained a fold.
    assert len(list((tmp_path / "runs" / "networks").iterdir())) == 6
    monkeypatch.setattr(ablations, "load_checkpoint", lambda _: pytest.fail("computed again"))
    assert run_grid(grid, scans, tmp_path / "runs", log=lambda _: None) == first
    monkeypatch.undo()

    changed = json.loads((tmp_path / "runs" / "haar-1.json").read_text())
    changed["identity"]["fold"] = 7
    (tmp_path / "runs" / "haar-1.json").write_text(json.dumps(changed))
    assert run_grid(grid, scans, tmp_path / "runs", log=lambda _: None)["haar"][1]["error"] == first["haar"][1]["error"]

    rows = {row["name"]: row for row in collect(grid, first)["cells"]}
    r2 = {name: np.array([1 - r["error"] / r["total"] for r in found]) for name, found in first.items()}
    difference = r2["haar"] - r2["default"]
    half = student.ppf(0.975, 1) * difference.std(ddof=1) / np.sqrt(2)
    assert rows["haar"]["difference"]["value"] == pytest.approx(difference.mean(), abs=1e-6)
    assert rows["haar"]["difference"]["high"] == pytest.approx(difference.mean() + half, abs=2e-6)
    assert rows["short"]["difference"]["value"] == pytest.approx((r2["short"] - r2["default"]).mean(), abs=1e-6)
    assert rows["default"]["difference"] is None
    assert {r["total"] for r in first["haar"]} == {r["total"] for r in first["default"]}


def test_a_condition_is_scored_on_its_own_entries_and_in_the_same_units(scans):
    torch.manual_seed(0)
    config = ModelConfig(n_parcels=3, n_timepoints=16, n_channels=4, input_width=4, n_levels=2)
    model, scan = MnemoDyn(config).eval(), scans[0]
    cell = Cell(name="default", group="", label="", settings={}, test={})
    grid = Grid(cells=(cell,), settings={}, folds=1, n_timepoints=32, window=16, mask_window=4)
    x = torch.from_numpy(Scaling()(scan)).view(2, 32, 3)
    hidden = Masked(0.55, 4).hide((2, 32, 3), 5)

    def squares(x, hidden, t_r):
        with torch.no_grad():
            out = model(x, t_r, hidden=hidden).reconstruction
        return float((out - x)[hidden].square().sum())

    error, total, plain = score(model, scan, Scaling(), grid, Condition(), 5)
    assert error.sum() == pytest.approx(squares(x.reshape(4, 16, 3), hidden.reshape(4, 16, 3), 1.0), rel=1e-5)
    assert total.sum() == pytest.approx(float(x[hidden].square().sum()), rel=1e-5)
    assert (plain == error).all()
    half, mask = x[:, ::2].reshape(4, 8, 3), hidden[:, ::2].reshape(4, 8, 3)
    error, total, plain = score(model, scan, Scaling(), grid, Condition(every=2), 5)
    assert error.sum() == pytest.approx(squares(half, mask, 2.0), rel=1e-5)
    assert total.sum() == pytest.approx(float(half[mask].square().sum()), rel=1e-5)
    assert plain.sum() != pytest.approx(error.sum(), rel=1e-3)
    # A network that fills in zeros is off by the mean and the SD of the scan, whatever it reads.
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    for scaling in (Scaling(), Scaling("subtract_mean_global_sd").fit(scans), Scaling("subtract_mean")):
        error, total, _ = score(model, scan, scaling, grid, Condition(censored=0.2), 5)
        np.testing.assert_allclose(error, total, rtol=1e-5)


def test_settings_of_the_network_that_only_ablations_ask_for():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3)
    small = {"n_parcels": 3, "n_timepoints": 16, "n_channels": 4, "input_width": 4}
    none = MnemoDyn(ModelConfig(**small, n_levels=0, n_dense_layers=0, n_blocks=1, control="none"))
    block = none.blocks[0]
    expected = x + block.output(block.lift(torch.cat([x, torch.ones_like(x)], -1)))
    torch.testing.assert_close(none(x, 1.0).reconstruction, expected)
    value = MnemoDyn(ModelConfig(**small, n_levels=2, control="value", lift=False)).blocks[0]
    torch.testing.assert_close(value.control(x, 0.7), x)
    both = MnemoDyn(ModelConfig(**small, n_levels=2, control="both")).blocks[0]
    torch.testing.assert_close(both.control(x, 0.7, 2 * x), torch.cat([2 * x, x], -1))
    learned = MnemoDyn(ModelConfig(**small, n_levels=2, wavelet="learned"))
    fixed = MnemoDyn(ModelConfig(**small, n_levels=2))
    fixed.load_state_dict(learned.state_dict(), strict=False)
    torch.testing.assert_close(learned(x, 0.7).reconstruction, fixed(x, 0.7).reconstruction)
    learned(x, 0.7).reconstruction.square().sum().backward()
    assert all((block.angles.grad.abs() > 0).all() for block in learned.blocks)
    with pytest.raises(ValueError, match="wavelet must be fixed with compat"):
        ModelConfig.preset("reference", **{**small, "n_timepoints": 64}, wavelet="learned")
    lazy = MnemoDyn(ModelConfig(**small, n_levels=1, wavelet="lazy")).blocks[0]
    first, second = lazy.analysis(x.mT)
    torch.testing.assert_close(torch.cat([first, second], -1).sort().values, x.mT.sort().values)
    torch.testing.assert_close(lazy.synthesis(first, second, 16), x.mT)


def test_the_command_refuses_and_says_what(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(TINY)
    arguments = [
        "ablate",
        "hcp7",
        str(tmp_path / "grid.yaml"),
        "tyny",
        str(tmp_path),
        "--out",
        str(tmp_path / "o.json"),
    ]
    assert main(arguments) == 2
    assert "unknown size tyny; did you mean tiny?" in capsys.readouterr().err
