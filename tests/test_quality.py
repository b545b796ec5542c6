"""What is measured of scans before anything is learned, against plain NumPy and planted faults."""

import numpy as np
import pandas as pd
import pytest

from lib import figures, plots
from lib.quality import (
    connectivity,
    homotopic_pairs,
    mark,
    outlying,
    problems,
    spectrum,
    summary,
    survey,
)
from mnemodyn.data.collection import open_scans
from mnemodyn.data.scans import Scan, save_scan

PARCELS = ("a_L", "a_R", "b_L", "b_R", "c_L", "c_R")


def scans(n=40, seed=0, t_r=2.0, mixing=None):
    """SIMULATED scans with the same connectivity: a random walk that leaks, mixed over parcels."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((6, 6)) if mixing is None else mixing
    made = []
    for i in range(n):
        x = rng.standard_normal((300, 6))
        for t in range(1, 300):
            x[t] += 0.6 * x[t - 1]
        made.append(
            Scan(
                f"sub-{i:02d}",
                (x @ mixing).astype(np.float32),
                t_r,
                PARCELS,
                mean_fd=0.1 + 0.001 * i,
            )
        )
    return made


def changed(scan, **values):
    return Scan(**{name: getattr(scan, name) for name in scan.__dataclass_fields__} | values)


def test_twins_are_found_by_name():
    names = (
        "7Networks_LH_Vis_1",
        "7Networks_RH_Vis_1",
        "GP_ant-rh",
        "GP_ant-lh",
        "Left_thing",
        "x_L",
        "alh",
        "arh",
    )
    assert homotopic_pairs(names) == [(0, 1), (3, 2)]
    assert homotopic_pairs(PARCELS) == [(0, 1), (2, 3), (4, 5)]


def test_connectivity_is_pearsons_without_censored_frames_and_constant_parcels():
    scan = scans(1)[0]
    np.testing.assert_allclose(connectivity(scan), np.corrcoef(scan.values.T), atol=1e-6)
    censored = np.arange(300) < 50
    values = scan.values.copy()
    values[:50] = np.nan
    values[:, 2] = np.where(censored, np.nan, 7)
    found = connectivity(changed(scan, values=values, censored=censored))
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(
        found[np.ix_(kept, kept)], np.corrcoef(scan.values[50:, kept].T), atol=1e-6
    )
    assert not found[2].any()


def test_survey_measures_what_it_says():
    made = scans(5)
    found = survey(made)
    fc = np.stack([np.corrcoef(s.values.astype(float).T)[np.triu_indices(6, 1)] for s in made])
    z = np.arctanh(fc)
    for i, row in enumerate(found.table.to_dict("records")):
        x = made[i].values.astype(float)
        x = (x - x.mean(0)) / x.std(0)
        assert row["lag1"] == pytest.approx(
            np.mean([np.mean(x[1:, p] * x[:-1, p]) for p in range(6)])
        )
        assert row["fc_similarity"] == pytest.approx(
            np.corrcoef(z[i], np.delete(z, i, 0).mean(0))[0, 1], abs=1e-5
        )
        assert row["homotopic"] == pytest.approx(
            np.mean([np.corrcoef(x[:, p], x[:, p + 1])[0, 1] for p in (0, 2, 4)])
        )
        assert (row["frames"], row["minutes"], row["mean_fd"]) == (300, 10, 0.1 + 0.001 * i)
    np.testing.assert_allclose(
        found.connectivity[np.triu_indices(6, 1)], np.tanh(z.mean(0)), atol=1e-5
    )
    np.testing.assert_array_equal(np.diag(found.connectivity), 1)
    np.testing.assert_array_equal(found.connectivity, found.connectivity.T)
    np.testing.assert_array_equal(found.spectra[2][1], spectrum(made[2])[1])
    assert survey(made[:1]).table["fc_similarity"].isna().all()
    assert survey(made, mean_fd=[0.5, np.nan, 1, 2, 3]).table["mean_fd"].isna().tolist() == [
        False,
        True,
        *[False] * 3,
    ]
    assert list(found.digest(rows=4).columns) == ["measure", "5 %", "median", "95 %"]
    pd.testing.assert_frame_equal(found.digest(), found.table)


def test_planted_faults_stand_out_and_nothing_else():
    made = scans()
    rng = np.random.default_rng(5)
    made[3] = changed(made[3], mean_fd=2.0)
    made[7] = changed(
        made[7], values=rng.standard_normal((300, 6)).astype(np.float32)
    )  # noise in place of a brain
    found = outlying(survey(made).table)
    assert found["reasons"][3] == "mean_fd"
    assert found["reasons"][7] == "fc_similarity, lag1"
    assert found["worst"].drop([3, 7]).max() < found["worst"][[3, 7]].min() / 2
    fd = np.log([s.mean_fd for s in made])
    mad = np.median(np.abs(fd - np.median(fd)))
    assert found["mean_fd"][3] == pytest.approx((fd[3] - np.median(fd)) / (1.4826 * mad))


def test_lag1_is_judged_among_scans_of_one_repetition_time():
    slow, fast = (
        scans(20),
        [changed(s, t_r=0.8, values=np.repeat(s.values, 3, axis=0)) for s in scans(20, seed=1)],
    )
    table = survey([*slow, *fast]).table
    found = outlying(table)
    for part in (slice(0, 20), slice(20, 40)):
        lag1 = table["lag1"].to_numpy()[part]
        mad = np.median(np.abs(lag1 - np.median(lag1)))
        np.testing.assert_allclose(found["lag1"][part], (lag1 - np.median(lag1)) / (1.4826 * mad))
    together = outlying(survey([*slow, *(changed(s, t_r=2.0) for s in fast[:2])]).table)
    assert together["reasons"][20:].str.contains("lag1").all()


def test_equal_scans_have_no_spread():
    made = [changed(scans(1)[0], participant_id=f"sub-{i}", mean_fd=None) for i in range(3)]
    found = outlying(survey(made).table)
    assert found[["fc_similarity", "lag1", "mean_fd"]].isna().all().all()
    assert set(found["reasons"]) == {""}


def test_folder_and_cohort_are_opened_alike(tmp_path):
    for scan in scans(4):
        save_scan(scan, tmp_path / "in" / f"{scan.participant_id}_task-rest_timeseries.tsv")
    (tmp_path / "in" / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-00\t20\tM\nsub-01\t30\tF\n"
    )
    (tmp_path / "in" / "sub-09_task-rest_timeseries.tsv").write_text("a\tb\nx\ty\n")
    described = open_scans(tmp_path / "in", cohort="bids")
    assert len(described) == 4
    assert "sub-09_task-rest_timeseries.tsv" in " ".join(problems(described)["for example"])
    (tmp_path / "in" / "sub-09_task-rest_timeseries.tsv").unlink()
    plain = open_scans(tmp_path / "in")
    for one, other in zip(described, plain, strict=True):
        assert one.participant_id == other.participant_id
        np.testing.assert_array_equal(one.values, other.values)
    text = dict(zip(summary(plain).iloc[:, 0], summary(plain)["found"], strict=True))
    assert (text["scans"], text["sites"], text["repetition time (s)"]) == ("4", "not known", "2")
    assert problems(plain)["files"].tolist() == [0]
    assert mark(plain) == ""


def test_figures_draw_few_and_many_scans():
    for made in (scans(3), [*scans(25), *scans(5, seed=1, t_r=1.1)]):
        measured = survey(made)
        for figure in (
            plots.spectra(measured.spectra, measured.table["t_r"]),
            plots.outlying(measured.table, outlying(measured.table)),
            plots.carpet(changed(made[0], censored=np.arange(300) == 4)),
        ):
            picture = figures.show(figure, caption="c", alt="a")
            assert picture.source


def test_a_dollar_in_a_name_is_no_formula():
    names = tuple(rf"$\frac$ {name}$" for name in PARCELS)
    scan = changed(scans(1)[0], parcels=names)
    lines = plots.carpet(scan)
    matrix = plots.matrices({names[0]: np.eye(6) - 0.1}, "r", names=names)
    for figure in (lines, matrix):
        assert rf"<!-- {names[0]} -->" in figures.svg(figure).decode()
    # The powers of ten on an axis are formulas of matplotlib's own.
    figure, ax = figures.plt.subplots()
    ax.set(xscale="log", xlim=(1, 1e4), title="$x$")
    drawn = figures.svg(figure).decode()
    assert r"$\mathdefault{10^{4}}$" in drawn
    shown = {text.get_text(): text.get_parse_math() for text in (ax.title, *ax.get_xticklabels())}
    assert shown["$x$"] is False
    assert shown[r"$\mathdefault{10^{4}}$"] is True
