"""The positive control's simulator against plain NumPy, and the arithmetic of power on numbers made by hand."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest

from lib import positive
from lib.positive import N_DRIVEN, N_DRIVERS, PAIRS, WARM_UP, Comparison, Control
from mnemodyn.files import Kept
from mnemodyn.results import read_results, write_results
from mnemodyn.run import check_parameters, read_parameters

ROOT = Path(__file__).parents[1]


def test_pairs_are_different_and_of_two_drivers():
    assert PAIRS.shape == (N_DRIVEN, 2)
    assert len({tuple(pair) for pair in PAIRS.tolist()}) == N_DRIVEN
    assert (PAIRS[:, 0] != PAIRS[:, 1]).all()
    assert PAIRS.max() == N_DRIVERS - 1


def test_integrals_are_those_of_a_plain_loop():
    x = np.random.default_rng(0).standard_normal((3, 20, N_DRIVERS))
    expected = np.zeros((3, 20, N_DRIVEN))
    for k, (i, j) in enumerate(PAIRS):
        for t in range(1, 20):
            step = x[:, t, i] * (x[:, t, j] - x[:, t - 1, j])
            expected[:, t, k] = 0.9 * expected[:, t - 1, k] + step
    np.testing.assert_allclose(positive.integrals(x), expected, atol=1e-12)


def test_averages_are_over_units_and_over_frames():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 3, WARM_UP + 12, 5))
    mean = np.zeros((2, 4, 5))
    for t in range(4):
        first = WARM_UP + 3 * t
        mean[:, t] = values[:, :, first : first + 3].mean((1, 2))
    for scan, found in zip(mean, positive._observed(values, 3), strict=True):
        np.testing.assert_allclose(found, (scan - scan.mean(0)) / scan.std(0), atol=1e-12)


def test_drivers_are_autoregressions_of_variance_one(monkeypatch):
    # Without the standardisation of each scan.
    monkeypatch.setattr(positive, "_observed", lambda values, frames: values[:, 0, WARM_UP:])
    drivers = positive.parts(Control(), 40, 400, seed=0)["drivers"]
    assert drivers.var() == pytest.approx(1, abs=0.05)
    lagged = (drivers[:, 1:] * drivers[:, :-1]).mean() / drivers.var()
    assert lagged == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_the_nonlinear_variance(share):
    """By a regression of the driven parcels on both parts, without noise."""
    control = Control(share=share, noise=0.0)
    scans = positive.simulate(control, 60, 300, seed=5)
    driven = np.stack([scan.values for scan in scans])[..., N_DRIVERS:]
    found = positive.parts(control, 60, 300, seed=5)
    shares = []
    for k in range(N_DRIVEN):
        columns = np.c_[found["nonlinear"][..., k].ravel(), found["linear"][..., k].ravel()]
        slopes, *_ = np.linalg.lstsq(columns, driven[..., k].ravel(), rcond=None)
        variances = slopes**2 * columns.var(0)
        shares.append(variances[0] / variances.sum())
    np.testing.assert_allclose(shares, share, atol=1e-3)
    assert driven.var() == pytest.approx(1, abs=0.05)


def test_integrals_are_uncorrelated_with_drivers_and_each_other():
    found = positive.parts(Control(), 200, 400, seed=6)
    x = found["drivers"].reshape(-1, N_DRIVERS)
    d = found["nonlinear"].reshape(-1, N_DRIVEN)
    correlation = np.corrcoef(np.c_[x, d].T)
    # 80,000 frames, of which about one in twenty is independent: five standard errors are 0.08.
    across = correlation[:N_DRIVERS, N_DRIVERS:]
    assert np.abs(across).max() < 0.08
    assert np.abs(correlation - np.eye(len(correlation)))[N_DRIVERS:, N_DRIVERS:].max() < 0.08
    # The linear part is no such part.
    linear = found["linear"].reshape(-1, N_DRIVEN)
    assert np.abs(np.corrcoef(np.c_[x, linear].T)[:N_DRIVERS, N_DRIVERS:]).max() > 0.5


def test_averaging_in_space_leaves_the_mixture_and_not_the_integral():
    """R2 of what is computed from the observed drivers: one for the mixture; about 1 / units for the integral."""
    for units, expected in ((1, 1.0), (4, 0.25)):
        found = positive.parts(Control(units=units), 100, 400, seed=7)
        mixed = found["drivers"] @ positive.MIXTURE
        computed = positive.integrals(found["drivers"])
        squared = []
        for k in range(N_DRIVEN):
            pair = [computed[..., k].ravel(), found["nonlinear"][..., k].ravel()]
            squared.append(np.corrcoef(pair)[0, 1] ** 2)
            both = [mixed[..., k].ravel(), found["linear"][..., k].ravel()]
            assert np.corrcoef(both)[0, 1] > 0.97
        assert np.mean(squared) == pytest.approx(expected, abs=0.1)


def test_scans_depend_on_the_seed_alone():
    control = Control(share=0.5, units=2, frames=2)
    first, again = (positive.simulate(control, 3, 40, seed=1) for _ in range(2))
    # Without noise, so that it is the signal that differs.
    quiet, other = (
        positive.simulate(replace(control, noise=0.0), 3, 40, seed=seed) for seed in (1, 2)
    )
    for a, b, c, d in zip(first, again, other, quiet, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
        assert not np.allclose(c.values, d.values)
        assert a.participant_id == b.participant_id != c.participant_id
    assert first[0].values.shape == (40, N_DRIVERS + N_DRIVEN)


def test_noise_is_added_to_the_same_signal():
    quiet, loud = (positive.simulate(Control(noise=s), 20, 200, seed=3) for s in (0.0, 0.5))
    added = np.stack([b.values - a.values for a, b in zip(quiet, loud, strict=True)])
    assert added.std() == pytest.approx(0.5, rel=0.02)


def test_only_driven_parcels_are_scored():
    masks = {"hidden_share": 0.4, "mask_window": 5}
    one = positive.hidden(positive.simulate(Control(), 1, 60, seed=3), masks)[0]
    assert one.hidden[:, :N_DRIVERS].any()
    assert not one.scored[:, :N_DRIVERS].any()
    np.testing.assert_array_equal(one.scored[:, N_DRIVERS:], one.hidden[:, N_DRIVERS:])


def test_a_curve_has_the_base_with_one_value_changed():
    points = positive.axis(Control(noise=0.2), "noise", [0.2, 1.0])
    assert points == {0.2: Control(noise=0.2), 1.0: Control(noise=1.0)}
    assert len({point.name for point in points.values()}) == 2


def test_rows_are_r2_and_its_difference():
    total = np.full(8, 10.0)
    rng = np.random.default_rng(0)
    gaussian = 8 + rng.normal(size=8)
    found = {
        "total": total,
        "spatial_gaussian": total,
        "spatiotemporal_gaussian": gaussian,
        "blocks_alone": gaussian - 1,
    }
    row = positive.gain(positive.rows_of(found, Control()))
    assert (row["method"], row["kind"], row["n"]) == ("blocks_alone", "SIMULATED", 8)
    assert [row["value"], row["low"], row["high"]] == pytest.approx([0.1, 0.1, 0.1])


ROW = {"data": "D", "task": "t", "method": "model", "against": "fc", "score": "r2", "kind": "real"}
WHAT = Comparison("it", "page", "D", "t", "model", "fc")


@pytest.fixture
def committed(tmp_path):
    rows = [
        {**ROW, "value": 0.01, "low": -0.0096, "high": 0.0296, "n": 100},
        {**ROW, "score": "auc", "value": -0.03, "low": -0.04, "high": -0.02, "n": 100},
        {**ROW, "task": "none", "value": 0.0, "low": 0.0, "high": 0.0, "n": 100},
    ]
    write_results(tmp_path / "page.csv", rows)
    return tmp_path


def test_power_by_hand(committed):
    whats = [WHAT, Comparison("auc", "page", "D", "t", "model", "fc", "auc")]
    whats.append(Comparison("none", "page", "D", "none", "model", "fc"))
    first, worse, nothing = positive.power(committed, whats, n_most=10_000).to_dict("records")
    # The interval is 0.0392 wide: a standard error of 0.01, of which 2.8 are seen.
    assert first["seen"] == pytest.approx(0.028)
    assert first["seen_with_most"] == pytest.approx(0.0028)
    assert first["excluded"] == pytest.approx(0.0296)
    assert worse["excluded"] == 0
    assert np.isnan([nothing["excluded"], nothing["seen"], nothing["seen_with_most"]]).all()
    rows = positive.power_rows(positive.power(committed, whats, 10_000), 10_000)
    assert [row["score"] for row in rows] == ["r2"] * 3 + ["auc"] * 3
    assert rows[2]["value"] == pytest.approx(0.0028)
    write_results(committed / "power.csv", rows)


def test_what_is_excluded_and_what_is_too_few():
    better = pd.Series({"low": 0.01, "high": 0.03})
    assert np.isnan(positive.excluded(better)), "a gain that is shown is not excluded"
    nulls = positive.power(ROOT / "book/committed", positive.NULLS + positive.PRECISION, 40_000)
    few = nulls["n"] < 20
    assert few.any()
    assert nulls.loc[few, "seen_with_most"].isna().all()
    assert nulls.loc[~few & nulls["seen"].notna(), "seen_with_most"].notna().all()


def test_80_percent_of_studies_see_a_gain_of_that_size():
    """By simulation: studies whose true gain is what `seen` says of an interval of 1.96 standard errors."""
    row = pd.Series({"low": -1.96, "high": 1.96, "n": 50})
    values = np.random.default_rng(0).normal(positive.seen(row, 50), 1, 100_000)
    assert (values - 1.96 > 0).mean() == pytest.approx(0.8, abs=0.005)
    assert positive.seen(row, 200) == pytest.approx(positive.seen(row, 50) / 2)


def test_a_missing_row_is_named(committed):
    with pytest.raises(LookupError, match=r"page.csv has 0 rows for .*'method': 'modle'"):
        positive.find_row(committed, Comparison("it", "page", "D", "t", "modle", "fc"))
    with pytest.raises(LookupError, match=r"absent.csv is missing"):
        positive.find_row(committed, Comparison("it", "absent", "D", "t", "model", "fc"))


def test_lines_go_on_from_the_last_point():
    rows = pd.DataFrame({"x": [10, 100, 1000], "value": [0.0, 0.3, 0.4]})
    # Slopes a power of ten: 0.2 of all points by least squares, 0.1 of the last two.
    assert positive.extrapolate(rows, 100_000) == pytest.approx((0.8, 0.6))


def test_the_committed_tables_have_every_row():
    found = positive.power(ROOT / "book/committed", positive.NULLS + positive.PRECISION, 40_000)
    assert found["n"].notna().all()
    for against in ("spatiotemporal_gaussian", "front_end"):
        assert len(positive.gaps(ROOT / "book/committed", against, [8, 731])) == 2


def test_a_point_is_kept(tmp_path, capsys):
    model = {"n_timepoints": 32, "n_channels": 4, "input_width": 4, "n_levels": 2}
    masks = {"hidden_share": 0.4, "mask_window": 5}
    settings = positive.settings_for(model, masks, {"batch_size": 4, "epochs": 1}, steps=2)
    assert settings.training.windows_per_epoch == 8
    sizes = {"n_frames": 40, "validation": 2, "test": 3}
    point = Control(scans=3)
    given = (point, sizes, settings, tmp_path, Kept(tmp_path / "kept"))
    found = positive.score(*given)
    assert {name: np.shape(values) for name, values in found.items()} == dict.fromkeys(
        ["total", "spatial_gaussian", "spatiotemporal_gaussian", "blocks_alone"], (3,)
    )
    capsys.readouterr()
    again = positive.score(*given)
    assert not capsys.readouterr().out
    np.testing.assert_array_equal(again["blocks_alone"], found["blocks_alone"])


def test_the_page_runs(tmp_path, monkeypatch):
    """Its cells with tiny parameters, in this process, which is quicker than a kernel of its own."""
    monkeypatch.chdir(ROOT)
    tiny = {
        "base": {"scans": 3},
        "axes": {"share": [0.0, 1.0], "scans": [3]},
        "sizes": {"n_frames": 40, "validation": 2, "test": 3},
        "model": {"n_timepoints": 32, "n_channels": 4, "input_width": 4, "n_levels": 2},
        "training": {"batch_size": 4, "epochs": 1},
        "steps": 2,
        "output": str(tmp_path / "out"),
        "results": str(tmp_path / "page.csv"),
    }
    path = ROOT / "notebooks/positive_control.ipynb"
    names = check_parameters(read_parameters(path), tiny)
    with matplotlib.rc_context():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names.update(tiny)
    table = read_results(tmp_path / "page.csv")
    assert set(table["kind"]) == {"SIMULATED", "real"}
    assert (table["task"] == "driven parcels, " + Control(scans=3).name).any()
