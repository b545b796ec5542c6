"""How long must a scan be: matrices, estimators and the study, against closed forms and simulated people."""

import json
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from scipy.linalg import logm, sqrtm
from sklearn.covariance import LedoitWolf, ledoit_wolf

from lib import duration, duration_network
from mnemodyn import estimate_connectivity
from mnemodyn.data.scans import Collection, Scan
from mnemodyn.files import Kept
from mnemodyn.model.connectome import to_tangent, to_vector
from mnemodyn.results import read_results

N_PARCELS = 5


def covariances(n, seed=0):
    """Random covariances, (n, parcel, parcel)."""
    x = np.random.default_rng(seed).standard_normal((n, 40, N_PARCELS))
    mixing = np.random.default_rng(99).standard_normal((N_PARCELS, N_PARCELS))
    x = x @ mixing
    return np.swapaxes(x, 1, 2) @ x / 40


def two_days(n_people=12, n_frames=80, n_runs=2, seed=0, spread=0.6):
    """Runs of people who differ in how their parcels are mixed, (person, day, run, time, parcel)."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(N_PARCELS) + spread * rng.standard_normal((n_people, N_PARCELS, N_PARCELS))
    noise = rng.standard_normal((n_people, 2, n_runs, n_frames, N_PARCELS))
    runs = noise @ mixing[:, None, None]
    return duration.standardised(runs).astype(np.float32)


def people_of(runs):
    names = [f"sub-{i:02d}" for i in range(len(runs))]
    return duration.People(names, runs, 1.5)


@pytest.fixture(scope="module")
def people():
    return people_of(two_days())


# Matrices


def test_connectivity_is_pearson():
    window = np.random.default_rng(0).standard_normal((30, N_PARCELS)) * [1, 2, 3, 4, 5]
    found = duration.covariance(duration.standardised(window))
    expected = np.corrcoef(window, rowvar=False)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    z = duration.edges(found)
    np.testing.assert_allclose(z, np.arctanh(expected[np.triu_indices(N_PARCELS, 1)]))
    np.testing.assert_allclose(duration.from_edges(z, N_PARCELS), expected, atol=1e-12)
    # Scale does not matter to edges.
    scale = np.diag([1.0, 2, 3, 4, 5])
    np.testing.assert_allclose(duration.edges(scale @ found @ scale), z)


def test_tangent_vectors_against_the_matrix_logarithm():
    mean, *others = covariances(4)
    space = duration.Tangent(mean)
    vectors = space.vector(np.array(others))
    assert vectors.shape == (3, N_PARCELS * (N_PARCELS + 1) // 2)
    np.testing.assert_allclose(space.matrix(vectors), others, atol=1e-10)
    np.testing.assert_allclose(space.vector(mean), 0, atol=1e-10)
    root = np.linalg.inv(sqrtm(mean))
    steps = [logm(root @ other @ root).real for other in others]
    expected = np.linalg.norm(steps[0] - steps[1])
    assert np.linalg.norm(vectors[0] - vectors[1]) == pytest.approx(expected)
    upper = np.triu_indices(N_PARCELS, 1)
    np.testing.assert_allclose(vectors[0, : len(upper[0])], np.sqrt(2) * steps[0][upper], atol=1e-9)
    np.testing.assert_allclose(vectors[0, len(upper[0]) :], np.diag(steps[0]), atol=1e-9)


def test_vectors_at_the_geometric_mean_have_mean_zero():
    matrices = covariances(6)
    mean = duration.geometric_mean(matrices, tolerance=1e-10)
    np.testing.assert_allclose(duration.Tangent(mean).vector(matrices).mean(0), 0, atol=1e-8)
    # Of matrices that commute it is the mean of logarithms.
    diagonal = np.array([np.diag([1.0, 4.0]), np.diag([4.0, 9.0])])
    np.testing.assert_allclose(duration.geometric_mean(diagonal), np.diag([2.0, 6.0]), atol=1e-5)


# Estimators


def test_shrunk_covariances_are_those_of_scikit_learn(people):
    window = people.runs[0, 0, 0, :20].astype(float)
    found = duration.ESTIMATORS["Ledoit-Wolf"][0]().estimate(window[None])[0]
    fitted = LedoitWolf(assume_centered=True).fit(window)
    np.testing.assert_allclose(found, fitted.covariance_, atol=1e-12)
    # On standardised frames the target is the identity.
    plain = window.T @ window / len(window)
    size = np.trace(plain) / N_PARCELS
    expected = (1 - fitted.shrinkage_) * plain + fitted.shrinkage_ * size * np.eye(N_PARCELS)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_posterior_against_products_of_gaussians():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    prior = root @ root.T
    noise = 0.7
    x = rng.standard_normal((3, 4))
    # Precisions add up, and means are weighted by them.
    precision = np.linalg.inv(prior) + np.eye(4) / noise
    expected = [np.linalg.solve(precision, row / noise) for row in x]
    np.testing.assert_allclose(x @ duration.gain(prior, noise), expected)


def test_posce_draws_to_the_group(people):
    training = duration.training_of(people, tuple(range(8)), 20, 2)
    estimator = duration.Posterior().fit(training)
    query = duration.standardised(people.runs[8:, 0, 0, :20])
    own = training.tangent.vector(estimator.estimate(query)) - estimator.mean
    short = training.tangent.vector(
        np.array([ledoit_wolf(w, assume_centered=True)[0] for w in query])
    )
    assert (
        np.linalg.norm(own, axis=1) < np.linalg.norm(short - estimator.short_mean, axis=1)
    ).all()
    values = np.linalg.eigvals(estimator.gain)
    assert values.real.min() > 0
    assert values.real.max() < 1


def test_weights_of_edges_are_the_share_of_variance_between_people():
    rng = np.random.default_rng(0)
    share = np.array([0.0, 0.25, 0.5, 0.9])
    n_people, n_windows = 400, 6
    person = rng.standard_normal((n_people, 1, 4)) * np.sqrt(share)
    noise = rng.standard_normal((n_people, n_windows, 4)) * np.sqrt(1 - share)
    z = (3 + person + noise).reshape(-1, 4)
    found = duration.edge_weights(z, np.repeat(np.arange(n_people), n_windows))
    np.testing.assert_allclose(found, share, atol=0.06)


def test_the_weight_of_the_mixture_is_the_least_squares_one(people):
    training = duration.training_of(people, tuple(range(9)), 20, 3)
    fitted = duration.Mixed().fit(training)
    z = duration.edges(np.array([np.corrcoef(window.T) for window in training.windows]))
    group = duration.edges(training.of_runs).mean((0, 1, 2))
    pairs = zip(training.people, training.days, strict=True)
    other = [duration.edges(training.of_runs[who, 1 - day]).mean(0) for who, day in pairs]
    x = (z - group).ravel()
    y = (np.array(other) - group).ravel()
    assert fitted.weight == pytest.approx(
        np.linalg.lstsq(x[:, None], y, rcond=None)[0][0], rel=1e-4
    )


def test_the_front_end_counts_the_group_as_200_frames(people):
    training = duration.training_of(people, tuple(range(9)), 20, 2)
    query = duration.standardised(people.runs[9:, 0, 0, :50])
    found = duration.Adapted().fit(training).estimate(query)
    group = training.of_runs.mean((0, 1, 2))
    group = 0.95 * group + 0.05 * np.eye(N_PARCELS)
    expected = (50 * duration.covariance(query) + 200 * group) / 250
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", duration.ESTIMATORS)
def test_every_estimator_gives_covariances(people, method):
    training = duration.training_of(people, tuple(range(9)), 12, 2)
    estimator = duration.ESTIMATORS[method][0]().fit(training)
    query = duration.standardised(people.runs[9:, 0, 0, :12])
    found = estimator.estimate(query)
    assert found.shape == (3, N_PARCELS, N_PARCELS)
    np.testing.assert_allclose(found, np.swapaxes(found, 1, 2), atol=1e-6)
    assert (np.linalg.eigvalsh(found) > -1e-6).all()
    # Each is estimated alone.
    np.testing.assert_allclose(estimator.estimate(query[1:2])[0], found[1], atol=1e-5)


# The study


def test_people_are_those_with_the_usual_runs():
    runs = two_days(11)
    scans = []
    for i, person in enumerate(runs):
        for day, of_day in enumerate(person):
            for number, run in enumerate(of_day):
                name = f"sub-{i:02d}_ses-{day + 1}_run-{number}.tsv"
                scan = Scan(
                    f"sub-{i:02d}", run, 1.5, tuple("abcde"), session=str(day + 1), source=name
                )
                scans.append(scan)
    found = duration.People.of(Collection(scans[:-1]))
    assert found.names == [f"sub-{i:02d}" for i in range(10)]
    np.testing.assert_allclose(found.runs, runs[:10], atol=1e-5)
    assert found.minutes(40) == 1.0
    with pytest.raises(ValueError, match="two days"):
        duration.People.of(Collection([replace(scan, session="1") for scan in scans]))


@pytest.mark.parametrize("method", duration.ESTIMATORS)
def test_a_held_out_person_teaches_nobody_of_the_same_fold(method):
    runs = two_days(10)
    folds = np.arange(10) // 5
    changed = runs.copy()
    changed[2] = duration.standardised(changed[2][..., ::-1] ** 3)
    found = [
        duration.agreement(people_of(data), 20, method, folds, {"": duration.Test()})[""]
        for data in (runs, changed)
    ]
    same = np.array([0, 1, 3, 4])
    for space in duration.SPACES:
        # Among the candidates there is another one now.
        for key in ("residual", "total", "r"):
            first, second = [one[key][space] for one in found]
            np.testing.assert_allclose(first[same], second[same], rtol=1e-5)
            assert not np.isclose(first[2], second[2])
            # The other fold was taught by this person.
            assert not np.allclose(first[5:], second[5:], rtol=1e-6)


def test_scores_against_loops(people):
    folds = np.arange(12) % 3
    found = duration.agreement(people, 30, "fc", folds, {"": duration.Test()})
    compared = duration.Agreement(**found[""])
    scores = compared.scores(np.ones((1, 12)))
    error = total = 0.0
    correlations = []

    def day_of(runs):
        """Edges of the mean over runs of the second day."""
        return duration.edges(np.mean([np.corrcoef(run.T) for run in runs[1]], axis=0))

    for person in range(12):
        rest = people.runs[folds != folds[person]]
        mean = np.mean([day_of(person) for person in rest], axis=0)
        windows = rest[:, 0, 0, :30]
        bias = np.mean([duration.edges(np.corrcoef(window.T)) for window in windows], axis=0)
        own = duration.edges(np.corrcoef(people.runs[person, 0, 0, :30].T)) - bias
        other = day_of(people.runs[person]) - mean
        error += ((own - other) ** 2).sum()
        total += (other**2).sum()
        correlations.append(np.corrcoef(own, other)[0, 1])
    assert scores["r2_edges"][0] == pytest.approx(1 - error / total, rel=1e-4)
    assert scores["r_edges"][0] == pytest.approx(np.mean(correlations), rel=1e-4)


def test_differences_are_paired():
    """The same resamples of people on both sides: the interval is that of the difference."""
    rng = np.random.default_rng(0)
    both = rng.standard_normal((2, 101))
    curves = {"fc": {"r_edges": both}, "adapted": {"r_edges": both + 0.1}}
    rows = duration.differences(curves, [30, 60], {"data": "x"})
    assert [row["task"] for row in rows] == [f"the other day from {n} frames" for n in (30, 60)]
    for row in rows:
        assert (row["method"], row["against"]) == ("adapted", "fc")
        assert [row[name] for name in ("value", "low", "high")] == pytest.approx([0.1] * 3)


def test_hits_are_rows_that_find_their_own_place():
    looked_for = np.random.default_rng(0).standard_normal((4, 9))
    assert duration.hits(2 * looked_for + 1, looked_for).tolist() == [1, 1, 1, 1]
    assert duration.hits(looked_for[[1, 0, 2, 3]], looked_for).tolist() == [0, 0, 1, 1]


def test_controls_are_at_chance_and_people_are_found():
    people = people_of(two_days(30, n_frames=150, spread=0.8))
    folds = duration.folds_of(30, 3, 0)
    assert sorted(np.bincount(folds)) == [10, 10, 10]
    tests = {"": duration.Test(), **duration.CONTROLS}
    curves = duration.curves(people, [60], ["fc", "adapted"], folds, tests=tests, n_boot=100)
    assert curves[""]["fc"]["identified"].shape == (1, 101)
    found = {name: by_method["adapted"] for name, by_method in curves.items()}
    assert found[""]["identified"][0, 0] > 0.6
    assert found["same day, other direction"]["identified"][0, 0] > 0.6
    assert found["other day, second direction both times"]["r2_edges"][0, 0] > 0.2
    for name in ("people shuffled", "white noise"):
        assert found[name]["identified"][0, 0] < 0.3
        assert found[name]["r2_edges"][0, 0] < 0.05
        assert abs(found[name]["r_edges"][0, 0]) < 0.2
    # A mean of two runs has less noise.
    one_run = found["other day, its run of the same direction"]
    assert one_run["r_edges"][0, 0] < found[""]["r_edges"][0, 0]


def test_controls_that_need_a_second_run_are_left_out():
    assert set(duration.controls_of(2)) == set(duration.CONTROLS)
    same = "other day, its run of the same direction"
    left = duration.controls_of(1)
    assert set(left) == {"people shuffled", "white noise", same}


def test_what_was_kept_is_found_again(people, tmp_path, monkeypatch):
    folds = np.arange(12) % 3
    given = (people, [20], ["fc"], folds)
    first = duration.curves(*given, kept=Kept(tmp_path), n_boot=10)
    monkeypatch.setattr(duration, "agreement", lambda *_, **__: pytest.fail("computed again"))
    again = duration.curves(*given, kept=Kept(tmp_path), n_boot=10)
    np.testing.assert_array_equal(first[""]["fc"]["r2_edges"], again[""]["fc"]["r2_edges"])


def test_minutes_needed_on_a_curve_made_by_hand():
    curve = np.array([[0.2, 0.2, 0.2, 0.9], [0.4, 0.1, 0.3, 0.9], [0.8, 0.5, 0.4, 0.9]])
    threshold = np.array([0.6, 0.3, 0.5, 0.5])
    found = duration.minutes_needed(curve, threshold, [1, 2, 4])
    # Half-way in the logarithm between 2 and 4; half-way again; never; at once.
    np.testing.assert_allclose(found, [np.sqrt(8), np.sqrt(8), np.inf, 1])
    assert duration.capped(found, 4.0)["value"] == pytest.approx(np.sqrt(8))
    assert duration.capped(found, 4.0)["high"] <= 4
    row = {"value": 4.0, "low": 1.0, "high": 2.04}
    assert duration.words(row, 1.0, 4.0) == "≥ 4.0 (≤ 1.0 to 2.0)"


def test_centring_takes_a_common_step_away():
    people = people_of(two_days(24, n_frames=150, spread=0.5))
    methods = ["fc", "Ledoit-Wolf", "adapted"]
    rows = duration.with_and_without_centring(people, 40, methods, 12, 2)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row["less the mean"] > 3 / 12


@pytest.fixture
def folder(tmp_path):
    """A SIMULATED data set of twelve people on two days, in the layout of XCP-D."""
    runs = two_days()
    for i, person in enumerate(runs):
        for day, of_day in enumerate(person, 1):
            place = tmp_path / f"data/sub-{i:02d}/ses-{day}/func"
            place.mkdir(parents=True)
            for number, run in enumerate(of_day, 1):
                name = f"sub-{i:02d}_ses-{day}_task-rest_run-{number}_seg-A_stat-mean_timeseries"
                table = "\n".join("\t".join(map(str, row)) for row in [list("abcde"), *run])
                (place / f"{name}.tsv").write_text(table + "\n")
                (place / f"{name}.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    (tmp_path / "data/simulated.json").write_text("{}")
    return tmp_path


def run_cells(path, given):
    """Run a notebook's code in this process, which knows the libraries already; what it leaves defined."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, found)
        if "parameters" in cell.metadata.get("tags", []):
            unknown = set(given) - set(found)
            assert not unknown, unknown
            found.update(given)
    return found


NETWORK = {
    "n_timepoints": 40,
    "n_blocks": 1,
    "n_channels": 4,
    "input_width": 4,
    "n_levels": 2,
    "epochs": 1,
    "windows_per_epoch": 8,
    "fit_scans": 32,
}


def test_the_page_runs(folder, capsys):
    given = {
        "data": str(folder / "data"),
        "lengths": [12, 80],
        "methods": ["fc", "adapted"],
        "controls": [12],
        "n_folds": 3,
        "n_trained": 6,
        "n_boot": 20,
        "network": NETWORK,
        "output": str(folder / "kept"),
        "results": str(folder / "page.csv"),
    }
    found = run_cells("notebooks/duration.ipynb", given)
    table = read_results(folder / "page.csv")
    assert set(table["kind"]) == {"SIMULATED"}
    networks = {
        "network",
        "network before training",
        "network with the operator's latents",
    }
    assert set(table["method"]) == {*given["methods"], *networks}
    plain = table[(table["task"] == "the other day from 80 frames") & (table["against"] == "")]
    assert len(plain) == 5 * 5
    minutes = table[table["score"] == "minutes"]
    assert minutes["value"].between(0.3, 2.0).all()
    assert "12 SIMULATED people" in "\n".join(found["lines"])
    assert "folds" in capsys.readouterr().out


def test_candidates_are_the_unseen_people_of_a_fold(people):
    """A rule that answers with a training person would otherwise find nobody."""
    folds = np.arange(12) % 2
    one_run = duration.Test(truth=(1, 0))
    found = duration.agreement(people, 80, "fc", folds, {"": one_run})[""]
    for fold in (0, 1):
        inside = folds == fold
        shown = [duration.edges(np.corrcoef(run.T)) for run in people.runs[inside, 0, 0]]
        looked_for = [duration.edges(np.corrcoef(run.T)) for run in people.runs[inside, 1, 0]]
        rest = people.runs[~inside]
        bias = np.mean([duration.edges(np.corrcoef(run.T)) for run in rest[:, 0, 0]], axis=0)
        mean = [duration.edges(np.corrcoef(run.T)) for run in rest[:, 1, 0]]
        similarity = np.corrcoef(shown - bias, looked_for - np.mean(mean, axis=0))[:6, 6:]
        assert found["hit"][inside].tolist() == (similarity.argmax(1) == np.arange(6)).tolist()


def test_the_page_of_the_network_runs(folder):
    given = {
        "data": str(folder / "data"),
        "n_validation": 2,
        "lengths": [30, 60],
        "settings": NETWORK,
        "output": str(folder / "network"),
        "results": str(folder / "page.csv"),
    }
    found = run_cells("notebooks/connectome.ipynb", given)
    table = read_results(folder / "page.csv")
    assert set(table["kind"]) == {"SIMULATED"}
    assert list(table["method"]) == ["adapted", "shrunk in shared directions", "network"] * 2
    # The rest of a person is the other session, both runs.
    checkpoint = found["checkpoint"]
    scans = found["validation"]
    mean = checkpoint.model.front.lags[0].double()
    target = to_vector(checkpoint.model.connectome.target).numpy()
    error = 0
    total = 0
    for scan in scans:
        others = [
            s
            for s in scans
            if s.participant_id == scan.participant_id and s.session != scan.session
        ]
        rest = np.mean([np.corrcoef(s.values.T) for s in others], axis=0)
        truth = to_vector(to_tangent(torch.from_numpy(rest), mean)).numpy()
        short = replace(scan, values=scan.values[:30])
        estimate = estimate_connectivity(short, checkpoint, "connectome")[0]
        error += np.square(estimate - truth).sum()
        total += np.square(truth - target).sum()
    value = table[table["method"] == "network"]["value"].iloc[0]
    assert value == pytest.approx(1 - error / total, abs=1e-3)
    # Before training, whatever the maps have learned is gone.
    begun = estimate_connectivity(scans, duration_network.untrained(checkpoint), "connectome")
    checkpoint.model.connectome.write.data += 1.0
    after = duration_network.untrained(checkpoint)
    np.testing.assert_array_equal(estimate_connectivity(scans, after, "connectome"), begun)
    assert not np.allclose(estimate_connectivity(scans, checkpoint, "connectome"), begun)
