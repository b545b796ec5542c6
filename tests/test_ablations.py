"""The ablations: the grid checked before anything runs, finished cells kept, differences by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from lib import ablations
from lib.ablations import Cell, Grid, condition, divide, read_grid, run_grid, score, table
from mnemodyn.checkpoint import Checkpoint
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Collection, DataError, Scan
from mnemodyn.evaluate.reconstruction import hide
from mnemodyn.model.network import MnemoDyn
from mnemodyn.settings import ModelConfig, Settings

GRID = Path(__file__).parents[1] / "notebooks" / "ablations.yaml"
TINY = """
sizes:
  tiny:
    folds: 2
    n_test: 1
    window: 16
    settings:
      model: {n_timepoints: 16, n_channels: 4, input_width: 4, n_levels: 2}
      objective: {mask_window: 4}
      training: {epochs: 1, windows_per_epoch: 8}
    cells: [haar, short, one]
cells:
  default: {group: default, label: default}
  haar: {group: wavelets, label: haar, settings: {model: {wavelet: haar}}}
  short: {group: test, label: short, window: 8}
  one: {group: data, label: one, n_train: 1}
"""


@pytest.fixture
def scans():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((5, 64, 3)).cumsum(1).astype(np.float32)
    series = [
        Scan(f"sub-{i}", v, 1.0, ("a", "b", "c"), source=f"{i}") for i, v in enumerate(values)
    ]
    return Collection(series, name="test")


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.yaml").write_text(TINY)
    return read_grid(tmp_path / "grid.yaml", "tiny")


@pytest.mark.parametrize("size", ["ci", "quick", "long"])
def test_the_books_grid_is_sound(size):
    cells = read_grid(GRID, size).cells
    assert cells[0] == Cell("default", "default", "default", {})
    assert len({cell.label for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("wavelet: haar", "wavelets: haar", "wavelets is not a setting; did you mean"),
        ("wavelet: haar", "n_levels: 9", "n_levels 9 halves"),
        ("[haar, short, one]", "[hair]", "size tiny names a cell 'hair' that is not described"),
        ("n_train: 1", "against: lazy", "cell one needs the cell lazy"),
        ("tiny:", "huge:", "no size 'tiny'; known are huge"),
    ],
)
def test_unknown_settings_are_refused(tmp_path, old, new, message):
    (tmp_path / "grid.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_grid(tmp_path / "grid.yaml", "tiny")


def test_folds_have_other_people_and_the_held_out_ones_are_never_read(scans, grid):
    folds = [divide(scans, grid, fold) for fold in (0, 1)]
    people = [{name: list(s.table["participant_id"]) for name, s in f.items()} for f in folds]
    assert people[0] == {"score": ["sub-0"], "choose": ["sub-1"], "train": ["sub-2", "sub-3"]}
    assert people[1] == {"score": ["sub-1"], "choose": ["sub-2"], "train": ["sub-0", "sub-3"]}
    with pytest.raises(DataError, match="3 participants beside 1, got 2"):
        divide(scans.select([0, 1, 2]), grid, 0)


def test_finished_cells_are_kept_and_differences_are_paired(grid, scans, tmp_path, monkeypatch):
    first = run_grid(grid, scans, tmp_path / "runs")
    # Cells that differ in the test alone share a network: three are trained in a fold.
    assert len(list((tmp_path / "runs" / "networks").iterdir())) == 6
    monkeypatch.setattr(ablations, "pretrain", lambda *_: pytest.fail("trained again"))
    assert run_grid(grid, scans, tmp_path / "runs") == first

    r2 = {}
    for name, found in first.items():
        r2[name] = np.array([1 - r["error"] / r["total"] for r in found])
    rows = table(grid, first).set_index("name")
    difference = r2["haar"] - r2["default"]
    half = student.ppf(0.975, 1) * difference.std(ddof=1) / np.sqrt(2)
    assert rows.loc["haar", "value"] == pytest.approx(difference.mean())
    assert rows.loc["haar", "high"] == pytest.approx(difference.mean() + half)
    assert rows.loc["short", "value"] == pytest.approx((r2["short"] - r2["default"]).mean())
    assert rows.loc["default", "r2"]["value"] == pytest.approx(r2["default"].mean())
    assert {r["total"] for r in first["haar"]} == {r["total"] for r in first["default"]}
    results = ablations.result_rows(table(grid, first), {"data": "test", "kind": "real", "n": 2})
    assert [row.get("against") for row in results] == [None, *[None, "default"] * 3]


def test_a_test_condition_is_scored_on_its_own_entries_and_in_the_same_units(scans):
    torch.manual_seed(0)
    config = ModelConfig(n_parcels=3, n_timepoints=16, n_channels=4, input_width=4, n_levels=2)
    model, one = MnemoDyn(config).eval(), scans.select([0])
    settings = Settings.from_mapping({"objective": {"hidden_share": 0.5, "mask_window": 4}})
    default = Cell("default", "", "", {})
    grid = Grid((default,), settings, folds=1, n_test=1, window=16)
    checkpoint = Checkpoint(model, ("a", "b", "c"), 1.0, Scaling())
    (given,) = hide(one, Scaling(), hidden_share=0.5, mask_window=4, seed=5)
    x, hidden = torch.from_numpy(given.values), torch.from_numpy(given.hidden)

    def squares(x, hidden, t_r, window):
        with torch.no_grad():
            parts = (part.reshape(-1, window, 3) for part in (x, hidden))
            out = model(next(parts), t_r, hidden=next(parts)).reconstruction.reshape(x.shape)
        return float((out - x)[hidden].square().sum())

    found = score(checkpoint, one, grid, default, 5)
    assert found["error"] == pytest.approx(squares(x, hidden, 1.0, 16), rel=1e-5)
    assert found["total"] == pytest.approx(float(x[hidden].square().sum()), rel=1e-5)
    assert found["plain"] == found["error"]
    found = score(checkpoint, one, grid, Cell("slower", "", "", {}, every=2), 5)
    assert found["error"] == pytest.approx(squares(x[::2], hidden[::2], 2.0, 8), rel=1e-5)
    assert found["plain"] != pytest.approx(found["error"], rel=1e-3)
    missing = condition(given, Cell("censored", "", "", {}, censored=0.3), 5)
    gone = np.isnan(missing.values).all(1)
    assert 10 < gone.sum() < 30
    assert not missing.scored[gone].any()
    np.testing.assert_array_equal(missing.scored[~gone], given.scored[~gone])


def test_a_fill_of_zeros_is_off_by_the_scans_mean_whatever_the_network_reads(scans):
    config = ModelConfig(n_parcels=3, n_timepoints=16, n_channels=4, input_width=4, n_levels=2)
    model = MnemoDyn(config).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    settings = Settings.from_mapping({"objective": {"mask_window": 4}})
    cell = Cell("censored", "", "", {}, censored=0.2)
    grid = Grid((cell,), settings, folds=1, n_test=1, window=16)
    for scaling in (Scaling(), Scaling("subtract_mean_global_sd").fit(scans)):
        checkpoint = Checkpoint(model, ("a", "b", "c"), 1.0, scaling)
        found = score(checkpoint, scans.select([0]), grid, cell, 5)
        assert found["error"] == pytest.approx(found["total"], rel=0.2)


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
        ModelConfig(
            n_parcels=3,
            n_timepoints=64,
            lift=False,
            compat="reference",
            interpolation="spline",
            wavelet="learned",
        )
    lazy = MnemoDyn(ModelConfig(**small, n_levels=1, wavelet="lazy")).blocks[0]
    first, second = lazy.analysis(x.mT)
    torch.testing.assert_close(torch.cat([first, second], -1).sort().values, x.mT.sort().values)
    torch.testing.assert_close(lazy.synthesis(first, second, 16), x.mT)
