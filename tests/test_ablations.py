"""The grid: settings checked before anything runs, finished cells kept, differences recomputed by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mnemodyn.evaluate.ablations import (
    Cell,
    Condition,
    Grid,
    collect,
    diagnose,
    read_grid,
    run_grid,
    score,
)
from scipy.stats import mannwhitneyu
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression

from mnemodyn.cli import main
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import DataError, Scan
from mnemodyn.evaluate import ablations
from mnemodyn.model.network import MnemoDyn
from mnemodyn.pretrain.objectives import Masked
from mnemodyn.run import ParameterError
from mnemodyn.settings import ModelConfig
from mnemodyn.splits import repeated_folds

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
    return [
        Scan(f"sub-{i}", v, 1.0, ("a", "b", "c"), source=f"{i}.tsv") for i, v in enumerate(values)
    ]


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.yaml").write_text(TINY)
    return read_grid(tmp_path / "grid.yaml", "tiny")


@pytest.mark.parametrize("size", ["ci", "quick", "cpu", "abide", "full"])
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
    assert [r["people"] for r in first["default"]] == ["sub-0", "sub-1"]
    # Cells that differ in the test alone share a network: three trained a fold.
    assert len(list((tmp_path / "runs" / "networks").iterdir())) == 6
    monkeypatch.setattr(ablations, "from_pretrained", lambda _: pytest.fail("computed again"))
    assert run_grid(grid, scans, tmp_path / "runs", log=lambda _: None) == first
    monkeypatch.undo()

    changed = json.loads((tmp_path / "runs" / "haar-1.json").read_text())
    changed["identity"]["fold"] = 7
    (tmp_path / "runs" / "haar-1.json").write_text(json.dumps(changed))
    assert (
        run_grid(grid, scans, tmp_path / "runs", log=lambda _: None)["haar"][1]["error"]
        == first["haar"][1]["error"]
    )

    rows = {row["name"]: row for row in collect(grid, first)["cells"]}
    r2 = {
        name: np.array([1 - r["error"] / r["total"] for r in found])
        for name, found in first.items()
    }
    difference = r2["haar"] - r2["default"]
    half = student.ppf(0.975, 1) * difference.std(ddof=1) / np.sqrt(2)
    assert rows["haar"]["difference"]["value"] == pytest.approx(difference.mean(), abs=1e-6)
    assert rows["haar"]["difference"]["high"] == pytest.approx(difference.mean() + half, abs=2e-6)
    assert rows["short"]["difference"]["value"] == pytest.approx(
        (r2["short"] - r2["default"]).mean(), abs=1e-6
    )
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
    assert error.sum() == pytest.approx(
        squares(x.reshape(4, 16, 3), hidden.reshape(4, 16, 3), 1.0), rel=1e-5
    )
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
    for scaling in (
        Scaling(),
        Scaling("subtract_mean_global_sd").fit(scans),
        Scaling("subtract_mean"),
    ):
        error, total, _ = score(model, scan, scaling, grid, Condition(censored=0.2), 5)
        np.testing.assert_allclose(error, total, rtol=1e-5)


def test_merged_parcels_are_scored_beside_the_finer_network():
    rng = np.random.default_rng(0)
    groups = np.array([0, 1, 0, 1, 1, 0])
    latent = rng.standard_normal((64, 2)).cumsum(0)
    values = (
        latent[:, groups] * [1, 2, 3, 1, 2, 3] + 0.01 * rng.standard_normal((64, 6)) + 100
    ).astype(np.float32)
    scan = Scan("sub-0", values, 1.0, tuple("abcdef"))
    found = ablations.merged_parcels([scan], 3)
    assert (found == found[0]).tolist() in ((groups == 0).tolist(), (groups == 1).tolist())
    merged = ablations._merge(scan, groups)
    np.testing.assert_allclose(merged.values[:, 1], values[:, [1, 3, 4]].mean(1), rtol=1e-6)

    torch.manual_seed(0)
    sizes = {"n_timepoints": 16, "n_channels": 4, "input_width": 4, "n_levels": 2}
    coarse, fine = (MnemoDyn(ModelConfig(n_parcels=n, **sizes)).eval() for n in (2, 6))
    grid = Grid(cells=(), settings={}, folds=1, n_timepoints=32, window=16, mask_window=4)
    error, _, plain = score(
        coarse, merged, Scaling(), grid, Condition(), 5, (fine, Scaling(), scan, groups)
    )
    np.testing.assert_array_equal(error, score(coarse, merged, Scaling(), grid, Condition(), 5)[0])
    hidden = Masked(0.55, 4).hide((2, 32, 2), 5)
    x = torch.from_numpy((values - values.mean(0)) / values.std(0))
    with torch.no_grad():
        mask = hidden[..., [0, 1, 0, 1, 1, 0]].reshape(4, 16, 6)
        filled = fine(x.view(4, 16, 6), 1.0, hidden=mask).reconstruction
    filled = filled.view(64, 6).numpy() * values.std(0) + values.mean(0)
    means = np.stack([filled[:, groups == i].mean(1) for i in (0, 1)], 1)
    off = ((means - merged.values) / merged.values.std(0)).reshape(2, 32, 2)
    np.testing.assert_allclose(plain, (off**2 * hidden.numpy()).sum((1, 2)), rtol=1e-3)
    assert (plain != error).all()


def test_a_diagnosis_is_scored_by_folds_over_people():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"participant_id": [f"sub-{i}" for i in range(60)], "diagnosis": ["a", "b"] * 30}
    )
    y = np.arange(60) % 2
    features = rng.standard_normal((60, 4)) + 1.5 * y[:, None] * [1, 0, 0, 0]
    found = diagnose(features * [1, 10, 100, 1], table, "diagnosis")
    areas = []
    for _, _, train, test in repeated_folds(table, "diagnosis").split(table["participant_id"]):
        x = (features - features[train].mean(0)) / features[train].std(0)
        side = LogisticRegression(C=0.01).fit(x[train], y[train]).decision_function(x[test])
        areas.append(
            mannwhitneyu(side[y[test] == 1], side[y[test] == 0]).statistic / (y[test].sum() ** 2)
        )
    assert found["auc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert 0.5 < found["balanced_accuracy"] < 0.9


def test_a_target_is_a_second_outcome_of_people_the_network_was_not_trained_on(
    scans, grid, tmp_path
):
    rng = np.random.default_rng(1)
    scans = [
        replace(scans[i % 5], participant_id=f"sub-{i:02}", source=f"{i}")
        for i in rng.permutation(40)
    ]
    table = pd.DataFrame({"participant_id": [s.participant_id for s in scans]})
    table["diagnosis"] = [("a", "b")[int(p[-1]) % 2] for p in table["participant_id"]]
    cells = (grid.cells[0], Cell(name="m", group="data", label="m", settings={"merge": 1}, test={}))
    grid = replace(grid, cells=cells, n_score=16, target="diagnosis")
    with pytest.raises(DataError, match="target diagnosis needs a cohort"):
        run_grid(grid, scans, tmp_path, log=lambda _: None)
    table.loc[table["participant_id"] == "sub-03", "diagnosis"] = None
    folds = [ablations._Fold(grid, i, scans, tmp_path, table) for i in (0, 1)]
    for fold in folds:
        sides = [{s.participant_id for s in side} for side in fold.sides.values()]
        assert [len(side) for side in sides] == [16, 1, 22]
        assert len(set.union(*sides)) == 39
        assert set(fold.table["participant_id"]) == sides[0] - {"sub-03"}
    assert not set(folds[0].people) & set(folds[1].people)
    found = collect(grid, run_grid(grid, scans, tmp_path, table=table, log=lambda _: None))
    assert found["cells"][1]["auc_difference"]["value"] == pytest.approx(0, abs=0.2)
    assert 0 <= found["connectivity"]["auc"]["value"] <= 1
    assert found["n_labelled"] == [len(fold.table) for fold in folds]
    assert list(ablations.table(found, "auc").columns)[4:6] == ["auc", "value"]


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
