"""SIMULATED cohorts: what was planted is there, what was broken is found, and the files are those of the real ones."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.linalg import expm, solve_continuous_lyapunov

from mnemodyn.cli import main
from mnemodyn.data.cohorts import index
from mnemodyn.data.scans import DataError
from mnemodyn.data.simulate import (
    EDGE_SD,
    REACH,
    _covariances,
    _sample,
    linear_process,
    simulate_cohort,
)

# phenotype file, columns that the published work reads, ending of a scan, t_r, scans a participant
REAL = {
    "abide": (
        "Phenotypic_V1_0b_preprocessed1.csv",
        {"FILE_ID", "DX_GROUP", "SITE_ID", "AGE_AT_SCAN", "SEX", "func_mean_fd"},
        "_rois_cc200.1D",
        {2.0, 2.5},
        1,
    ),
    "adhd200": ("participants.tsv", {"dx", "gender", "age"}, "_timeseries.tsv", {2.0}, 1),
    "adni": ("adni.csv", {"researchGroup", "subjectAge", "subjectSex"}, ".ptseries.nii", {3.0}, 2),
    "hbn": ("participants.tsv", {"Sex", "Age"}, "_timeseries.tsv", {0.8}, 1),
    "hcp_aging": (
        "hcp_aging.csv",
        {"interview_age", "sex", "nih_flanker_computed", "neo2_score_ne"},
        "_94_parcellated.dtseries.nii",
        {0.8},
        2,
    ),
    "nkir": ("participants.tsv", {"sex"}, "_94_parcellated.dtseries.nii", {1.4}, 1),
    "ukb": ("ukb.csv", {"21003-2.0", "31-0.0"}, "_94_parcellated.dtseries.nii", {0.735}, 1),
}


@pytest.mark.parametrize("name", REAL)
def test_every_layout_is_indexed_and_its_broken_files_are_found(tmp_path, name):
    table, columns, ending, times, n_scans = REAL[name]
    truth = simulate_cohort(
        name, tmp_path, n_participants=10, seed=1, n_frames=490 if name == "ukb" else 60
    )
    found = index(name, tmp_path)
    assert dict(zip(found.excluded.file, found.excluded.problem, strict=True)) == truth["broken"]
    assert sorted(truth["broken"].values()) == sorted(
        [
            "constant-parcels",
            "duplicate-series",
            "duplicate-series",
            "nan",
            "no-phenotype",
            "truncated",
        ]
    )
    people = found.table[found.table.phenotype].groupby("participant_id").size()
    assert people.tolist() == [n_scans] * 10
    assert found.simulated
    assert "SIMULATED" in str(found).splitlines()[0]
    assert found.table.path.str.endswith(ending).all()
    assert set(found.table.t_r.round(6)) <= times
    separator = "," if table.endswith("csv") else "\t"
    assert columns <= set(pd.read_csv(tmp_path / table, sep=separator))
    assert json.loads((tmp_path / "simulated.json").read_text())["effects"] == truth["effects"]
    if name == "hcp_aging":
        assert set(found.table.run) == {"REST1_AP", "REST1_PA"}
        assert found.table.groupby("family").participant_id.nunique().max() == 2


def connectivity(found, table):
    return np.stack([np.corrcoef(found[i].values.T) for i in table.index])


def block_mean(fc, block):
    part = fc[:, block][:, :, block]
    return part[:, ~np.eye(len(block), dtype=bool)].mean(1)


def slope(x, y):
    design = np.stack([np.ones_like(x), x], 1)
    beta, residual, *_ = np.linalg.lstsq(design, y)
    variance = residual[0] / (len(y) - 2)
    return beta[1], np.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    sizes = {"sex": 1.5, "age": 0.0}
    truth = simulate_cohort(
        "nkir",
        folder,
        n_participants=160,
        seed=4,
        n_frames=200,
        effects=sizes,
        broken=False,
    )
    found = index("nkir", folder)
    table = found.table.dropna(subset=["sex", "age"])
    assert len(table) > 130
    return truth, table, connectivity(found, table)


def test_a_planted_effect_has_its_size(planted):
    truth, table, fc = planted
    effect = truth["effects"]["sex"]
    assert effect["per"] == "male against female"
    assert effect["slope"] == pytest.approx(1.5 * EDGE_SD)
    estimate, error = slope((table.sex == "male").to_numpy(float), block_mean(fc, effect["block"]))
    assert abs(estimate - effect["slope"]) < 2.6 * error
    assert error < 0.2 * effect["slope"]


def test_no_effect_where_none_was_planted(planted):
    truth, table, fc = planted
    age = ((table.age - table.age.mean()) / table.age.std()).to_numpy()
    male = (table.sex == "male").to_numpy(float)
    for x, block in ((age, "age"), (age, "sex"), (male, "age")):
        estimate, error = slope(x, block_mean(fc, truth["effects"][block]["block"]))
        assert abs(estimate) < 2.6 * error
        assert error < 0.25 * EDGE_SD  # the smallest effect that is told from none is one of 0.65


def test_a_ridge_on_connectivity_predicts_what_was_planted_and_nothing_else(planted):
    _, table, fc = planted
    edges = fc[:, *np.triu_indices(fc.shape[1], 1)]
    half = len(edges) // 2
    z = edges - edges[:half].mean(0)
    kernel = z @ z[:half].T
    r = {}
    for name, y in (("sex", (table.sex == "male").to_numpy(float)), ("age", table.age.to_numpy())):
        weights = np.linalg.solve(kernel[:half] + 3 * np.eye(half), y[:half] - y[:half].mean())
        r[name] = np.corrcoef(kernel[half:] @ weights, y[half:])[0, 1]
    assert r["sex"] > 0.3  # 2.5 standard errors above chance
    assert abs(r["age"]) < 2.6 / np.sqrt(half)


def test_covariances_move_by_the_planted_amount_and_stay_positive_definite():
    s = np.exp(-np.abs(np.subtract.outer(np.arange(24), np.arange(24))) / 5)
    blocks = np.array_split(np.random.default_rng(0).permutation(24), 3)
    corners = np.array(np.meshgrid(*[[-REACH, 0, REACH]] * 3)).reshape(3, -1).T
    sigma = _covariances(s, blocks, corners)
    assert np.linalg.eigvalsh(sigma).min() > 0
    np.testing.assert_allclose(np.diagonal(sigma, axis1=1, axis2=2), 1)
    change = _covariances(s, blocks, np.array([[1.0, 0, 0]])) - _covariances(
        s, blocks, np.zeros((1, 3))
    )
    expected = np.zeros((24, 24))
    for i in blocks[0]:
        for j in set(blocks[0]) - {i}:
            expected[i, j] = EDGE_SD
    np.testing.assert_allclose(change[0], expected, atol=1e-12)


def test_the_process_is_sampled_with_its_covariances():
    k = 0.5 * np.eye(6) - 0.1 * np.eye(6, k=1)
    s = solve_continuous_lyapunov(k, np.eye(6))
    x = _sample(k, s, 0.7, (400, 200), np.random.default_rng(0))
    np.testing.assert_allclose(np.einsum("bti,btj->ij", x, x) / 80000, s, atol=0.03)
    lagged = np.einsum("bti,btj->ij", x[:, 1:], x[:, :-1]) / 79600
    np.testing.assert_allclose(lagged, expm(-0.7 * k) @ s, atol=0.03)


def test_the_process_fitted_to_real_scans_is_stationary():
    k, s, parcels = linear_process()
    assert len(parcels) == 94
    assert np.linalg.eigvals(k).real.min() > 0
    np.testing.assert_allclose(np.diag(s), 1)
    assert np.linalg.eigvalsh(s).min() > 0


def test_a_seed_is_a_cohort(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate_cohort("abide", tmp_path / folder, n_participants=3, seed=seed, n_frames=30)

    def content(folder):
        return {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}

    assert content("a") == content("b")
    assert content("a") != content("c")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bids", {}, "bids cannot be simulated: it has no layout"),
        ("abid", {}, "one of the shipped cohorts: abide"),
        ("ukb", {"n_frames": 100}, "n_frames must be >= 490 for ukb, got 100"),
        ("hbn", {"effects": {"iq": 1}}, r"can be of \['age', 'sex', 'site'\], got \['iq'\]"),
    ],
)
def test_settings_are_checked(tmp_path, name, settings, message):
    with pytest.raises(DataError, match=message):
        simulate_cohort(name, tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "../sub-{participant}.tsv"},
        {"path": "HERE/sub-{participant}.tsv"},
        {"path": "{site}./sub-{participant}.tsv", "sites": ["."]},
        {"path": "down/sub-{participant}.tsv", "participant": "../../../../x{:03d}"},
        {"path": "sub-{participant}_{run}.tsv", "runs": ["1", "x/../../y"]},
        {"path": "linked/sub-{participant}.tsv"},
        {"file": "../people.tsv"},
        {"file": "HERE/people.tsv"},
    ],
)
def test_a_description_writes_nothing_outside_the_folder(tmp_path, changed):
    here = tmp_path / "here"
    (here / "in").mkdir(parents=True)
    (here / "in" / "linked").symlink_to(here)
    changed = json.loads(json.dumps(changed).replace("HERE", str(here)))
    phenotype = {"file": changed.pop("file", "people.tsv"), "match": {"id": "{participant}"}}
    layout = {"path": "sub-{participant}.tsv", "participant": "{:03d}", "t_r": 2.0}
    layout |= {"n_frames": 120, "years": [20, 40], **changed}
    described = {"name": "small", "scans": ["**/*.tsv"], "phenotype": phenotype, "layout": layout}
    described |= {"age": {"column": "age"}, "targets": ["age"]}
    (tmp_path / "cohort.yaml").write_text(json.dumps(described))
    with pytest.raises(DataError, match="outside the folder of the cohort; correct layout"):
        simulate_cohort(tmp_path / "cohort.yaml", here / "in", n_participants=2)
    assert [path.name for path in here.rglob("*")] == ["in", "linked"]


def test_command_and_a_folder_that_is_not_empty(tmp_path, capsys):
    words = [
        "simulate",
        "hbn",
        str(tmp_path / "s"),
        "--participants",
        "3",
        "--frames",
        "20",
        "--effect",
        "sex",
        "0.5",
    ]
    assert main(words) == 0
    assert "SIMULATED hbn" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "simulated.json").read_text())["effects"]["sex"]["d"] == 0.5
    # Given again it is whole, as after a kill at the very end; with other arguments it is another.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main([*words, "--seed", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
