"""A positive control, SIMULATED, and the smallest gain that studies of real scans would have seen.

In the control, drivers are smooth noise, and driven parcels are leaky iterated integrals of pairs of
drivers. Such an integral is uncorrelated with every driver, so that no covariance finds it, and it is
what a controlled differential equation can represent (Kidger et al. 2020). The control varies the four
reasons that Nozari et al. (2024) give for a signal that linear models describe best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.signal import lfilter

from lib import reconstruction as study
from lib.figures import COLOURS, MARKERS, errors, legend_above, log_ticks, panels
from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan
from mnemodyn.evaluate.baselines import Gaussian
from mnemodyn.evaluate.reconstruction import HiddenScan, Network, compare, fill, hide, r2, sums
from mnemodyn.files import Kept
from mnemodyn.pretrain.training import pretrain
from mnemodyn.results import read_results
from mnemodyn.settings import Settings

N_DRIVERS = 8
N_DRIVEN = 16
DATA = "iterated integrals"  # in tables of results
MEMORY = 0.9  # share of a driver, and of an integral, that is left after a frame
WARM_UP = 50  # frames simulated before a scan begins
SHRINKAGES = (0.01, 0.05, 0.2)  # of the Gaussians, tried on validation scans
PARCELS = tuple(
    [f"driver-{i}" for i in range(N_DRIVERS)] + [f"driven-{i}" for i in range(N_DRIVEN)]
)
# Of all points the same system: which drivers a parcel integrates, and its linear mixture of drivers.
_SYSTEM = np.random.default_rng(0)
PAIRS = _SYSTEM.permutation(list(combinations(range(N_DRIVERS), 2)))[:N_DRIVEN]
MIXTURE = _SYSTEM.standard_normal((N_DRIVERS, N_DRIVEN))


@dataclass(frozen=True)
class Control:
    """One simulated system.

    Attributes
    ----------
    share : float
        Share of the driven parcels' variance that is the integral, 0 to 1. The rest is linear.
    noise : float
        Standard deviation of the observation noise, where the signal of every parcel has 1.
    units : int
        Independent copies of the system of which every parcel is the mean: averaging in space.
    frames : int
        Frames of which every observed frame is the mean: averaging in time.
    scans : int
        Training scans.
    """

    share: float = 1.0
    noise: float = 0.2
    units: int = 1
    frames: int = 1
    scans: int = 200

    @property
    def name(self) -> str:
        """The point as a folder's name, and as the condition in a table of results."""
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items())


def leaky(x: np.ndarray) -> np.ndarray:
    """``y[t] = MEMORY * y[t - 1] + x[t]`` along time, for x of shape (..., time, parcel)."""
    return lfilter([1.0], [1.0, -MEMORY], x, axis=-2)


def integrals(drivers: np.ndarray) -> np.ndarray:
    """Leaky iterated integrals of x_i dx_j for the pairs of drivers, (..., time, driven parcel)."""
    steps = np.diff(drivers, axis=-2, prepend=drivers[..., :1, :])
    first, second = PAIRS.T
    return leaky(drivers[..., first] * steps[..., second])


def parts(control: Control, n_scans: int, n_frames: int, seed: int) -> dict[str, np.ndarray]:
    """The ``drivers``, the ``nonlinear`` and the ``linear`` part of the driven parcels, before noise.

    Each has shape (scan, time, parcel), mean 0 and standard deviation 1 over the frames of a scan.
    """
    rng = np.random.default_rng(seed)
    n_all = WARM_UP + n_frames * control.frames
    shape = (n_scans, control.units, n_all, N_DRIVERS)
    # With this factor a driver has variance 1 once it has warmed up.
    drivers = leaky(rng.standard_normal(shape) * np.sqrt(1 - MEMORY**2))
    found = {
        "drivers": drivers,
        "nonlinear": integrals(drivers),
        "linear": drivers @ MIXTURE,
    }
    return {name: _observed(values, control.frames) for name, values in found.items()}


def _observed(values: np.ndarray, frames: int) -> np.ndarray:
    """The mean over units and over stretches of `frames`, standardised; `values` (scan, unit, time, parcel)."""
    mean = values[:, :, WARM_UP:].mean(1)
    n_scans, n_all, n_parcels = mean.shape
    mean = mean.reshape(n_scans, n_all // frames, frames, n_parcels).mean(2)
    centred = mean - mean.mean(1, keepdims=True)
    return centred / centred.std(1, keepdims=True)


def simulate(control: Control, n_scans: int, n_frames: int, seed: int) -> list[Scan]:
    """SIMULATED scans of a system, a person each; the same seed gives the same scans."""
    found = parts(control, n_scans, n_frames, seed)
    nonlinear = np.sqrt(control.share) * found["nonlinear"]
    linear = np.sqrt(1 - control.share) * found["linear"]
    values = np.concatenate([found["drivers"], nonlinear + linear], axis=2)
    # A stream of its own, so that all strengths of the noise have the same signal.
    rng = np.random.default_rng([seed, 1])
    values += control.noise * rng.standard_normal(values.shape)
    return [
        Scan(
            f"sub-{seed}-{i}", one.astype(np.float32), 1.0, PARCELS, source=f"SIMULATED-{seed}-{i}"
        )
        for i, one in enumerate(values)
    ]


def hidden(scans: Sequence[Scan], masks: Mapping[str, Any]) -> list[HiddenScan]:
    """Scans with entries of every parcel hidden, of which those of driven parcels are scored."""
    driven = np.arange(len(PARCELS)) >= N_DRIVERS
    found = hide(scans, Scaling(), **masks, seed=10_000)
    return [replace(one, scored=one.scored & driven) for one in found]


def settings_for(
    model: Mapping[str, Any], masks: Mapping[str, Any], training: Mapping[str, Any], steps: int
) -> Settings:
    """Settings of operator blocks without a front end, trained for so many steps."""
    size = training["batch_size"]
    windows = size * max(1, steps // training["epochs"])
    return study.settings_of(
        model, masks, {**training, "windows_per_epoch": windows}, model["n_timepoints"], None
    )


def score(
    control: Control, sizes: Mapping[str, int], settings: Settings, folder: Path, kept: Kept
) -> dict[str, Any]:
    """Train the blocks, fit two Gaussians, and fill unseen scans; kept, so that a stopped study goes on.

    `sizes` are ``n_frames`` of a training scan, and the scans for ``validation`` and ``test``.
    Returns sums of squares (scan,): ``total``, and the residual ones by method.
    """

    def make() -> dict[str, Any]:
        window = settings.model.n_timepoints
        train = simulate(control, control.scans, sizes["n_frames"], seed=1)
        validation = simulate(control, sizes["validation"], window, seed=2)
        test = simulate(control, sizes["test"], window, seed=3)
        masks = {
            "hidden_share": settings.objective.hidden_share,
            "mask_window": settings.objective.mask_window,
        }
        checkpoint, _ = pretrain(train, validation, folder / control.name, settings)
        methods = gaussians(train, hidden(validation, masks))
        methods["blocks_alone"] = Network(checkpoint.model)
        held = hidden(test, masks)
        found = {"total": study.totals(held, window)[0]}
        for name, method in methods.items():
            found[name], _, _ = sums(held, fill(method, held), window)
            print(f"{control.name}, {name}: R2 {1 - found[name].sum() / found['total'].sum():.3f}")
        return found

    return kept(control.name, [asdict(control), dict(sizes), settings.to_dict()], make)


def gaussians(train: Sequence[Scan], validation: Sequence[HiddenScan]) -> dict[str, Any]:
    """The spatial and the spatio-temporal Gaussian, their shrinkage chosen on validation scans."""
    scaled = study.Scaled(train, Scaling())
    found = {}
    for covariance in ("spatial", "spatiotemporal"):
        tried = [Gaussian(covariance, shrinkage=a).fit(scaled) for a in SHRINKAGES]
        scores = [r2(method, validation) for method in tried]
        found[f"{covariance}_gaussian"] = tried[int(np.argmax(scores))]
    return found


def axis(base: Control, name: str, values: Sequence[float]) -> dict[float, Control]:
    """The points of a curve: the base system with other values of one attribute."""
    return {value: replace(base, **{name: value}) for value in values}


def rows_of(found: Mapping[str, np.ndarray], control: Control) -> pd.DataFrame:
    """Rows of results of one point: R2 of every method, and of the blocks minus it.

    Intervals are over unseen scans, each of which stands for a person.
    """
    residuals = {name: np.array(values) for name, values in found.items()}
    total = residuals.pop("total")
    people = np.array([f"sub-{i}" for i in range(len(total))])
    place = {"data": DATA, "task": f"driven parcels, {control.name}", "kind": "SIMULATED"}
    return study.as_table(compare(residuals, total, people, **place, ours="blocks_alone"))


def gain(rows: pd.DataFrame) -> pd.Series:
    """The row that says what the blocks gain over the spatio-temporal Gaussian."""
    return rows[rows["against"] == "spatiotemporal_gaussian"].iloc[0]


def curves(axes: Mapping[str, Mapping[float, pd.Series]], labels: Mapping[str, str]) -> Figure:
    """The gain of the blocks against each attribute of the system, a panel each."""
    figure, panes = panels(len(axes), 2.7, sharey=True)
    for pane, (name, points) in zip(panes, axes.items(), strict=True):
        drawn = pd.DataFrame(points.values())
        pane.errorbar(list(points), drawn["value"], errors(drawn), marker="o", ms=4, lw=1.2)
        pane.axhline(0, color="black", lw=0.8, ls=":")
        pane.set_xlabel(labels[name])
        if name in ("units", "frames", "scans"):
            log_ticks(pane, list(points), "{:g}")
    panes[0].set_ylabel("gain in R²")
    figure.suptitle("SIMULATED", fontsize=9)
    plt.close(figure)
    return figure


def against_gaussian(rows: pd.DataFrame, gaussian: pd.Series, real: pd.Series) -> Figure:
    """The blocks' gain against the Gaussian's R2: simulated points, and one of real scans."""
    figure, (pane,) = panels(1, 3.0)
    gains = rows[rows["against"] == "spatiotemporal_gaussian"]
    known = rows[(rows["against"] == "") & (rows["method"] == "spatiotemporal_gaussian")]
    # One row of either a point, in the same order.
    x = known["value"].to_numpy(float)
    style: dict[str, Any] = {"ls": "", "ms": 4, "lw": 1.2}
    pane.errorbar(x, gains["value"], errors(gains), marker="o", label="SIMULATED", **style)
    bar = errors(real.to_frame().T)
    name = f"{real['data']}, real"
    pane.errorbar([gaussian["value"]], [real["value"]], bar, marker="s", label=name, **style)
    pane.axhline(0, color="black", lw=0.8, ls=":")
    pane.set(xlabel="R² of the spatio-temporal Gaussian", ylabel="gain of the blocks in R²")
    legend_above(figure, pane)
    plt.close(figure)
    return figure


@dataclass(frozen=True)
class Comparison:
    """A difference between two methods on real scans: a row of a committed table.

    Attributes
    ----------
    label : str
        What a reader sees.
    table : str
        Name of the page whose table has the row.
    data, task, method, against, score : str
        The row's place in the table; see :mod:`mnemodyn.results`.
    """

    label: str
    table: str
    data: str
    task: str
    method: str
    against: str
    score: str = "r2"


_ALL = "hidden entries, 731 training people"
_MOVED = "hidden entries, blocks from ABIDE"
_TURNS = "hidden entries, every participant held out once"
GAUSSIAN = Comparison(
    "ABIDE, entries: spatio-temporal Gaussian",
    *("scaling_abide", "ABIDE", _ALL, "spatiotemporal_gaussian", ""),
)
BLOCKS_ALONE = Comparison(
    "ABIDE, entries: blocks alone \u2212 spatio-temporal Gaussian",
    *("scaling_abide", "ABIDE", _ALL, "blocks_alone", "spatiotemporal_gaussian"),
)
DIAGNOSIS = Comparison(
    "ABIDE, diagnosis: MnemoDyn \u2212 FC",
    *("downstream_abide", "ABIDE", "diagnosis", "model", "fc", "balanced_accuracy"),
)
#: The operator against the same without it.
NULLS = (
    Comparison(
        "ABIDE, entries: front end with blocks \u2212 front end",
        *("reconstruction_abide", "ABIDE", "hidden entries", "model", "front_end"),
    ),
    Comparison(
        "HCP-7, entries: front end with blocks \u2212 front end",
        *("reconstruction_hcp7", "HCP-7", "hidden entries", "model", "front_end"),
    ),
    Comparison(
        "HCP, 80 people, entries: front end with blocks \u2212 front end",
        *("reconstruction_hcp80", "hcp80", "hidden entries", "model", "front_end"),
    ),
    BLOCKS_ALONE,
    Comparison(
        "HCP, 80 people, entries: blocks alone \u2212 spatio-temporal Gaussian",
        *("reconstruction_hcp80", "hcp80", "hidden entries", "blocks_alone"),
        "spatiotemporal_gaussian",
    ),
    Comparison(
        "HCP-7, entries: operators from ABIDE \u2212 random ones",
        *("scaling_abide", "HCP-7", _MOVED, "transferred", "random_operators"),
    ),
    DIAGNOSIS,
    Comparison(
        "ABIDE, diagnosis: MnemoDyn and FC \u2212 FC",
        *("downstream_abide", "ABIDE", "diagnosis", "model+fc", "fc", "balanced_accuracy"),
    ),
)
#: How precise a difference in R2 is that does not vanish by construction.
PRECISION = (
    Comparison(
        "ABIDE, entries: front end \u2212 adapted Gaussian",
        *("reconstruction_abide", "ABIDE", "hidden entries", "front_end", "own_covariance"),
    ),
    Comparison(
        "HCP-7, entries: front end \u2212 adapted Gaussian",
        *("reconstruction_hcp7", "HCP-7", _TURNS, "front_end", "own_covariance"),
    ),
)
# A difference of this many standard errors is seen in 80 % of studies, at a two-sided level of 5 %.
SEEN = 1.96 + 0.84
# An interval over fewer people than these says too little of its own width to be extrapolated.
FEWEST = 20


def find_row(folder: Path, what: Comparison) -> pd.Series:
    """The row of a comparison; a LookupError that names the table and the row where there is none."""
    path = folder / f"{what.table}.csv"
    if not path.is_file():
        raise LookupError(f"{path} is missing; it is committed with the book, or made by its page")
    table = read_results(path)
    place = ("data", "task", "method", "against", "score")
    wanted = {name: getattr(what, name) for name in place}
    found = table[(table[list(place)] == pd.Series(wanted)).all(axis=1)]
    if len(found) != 1:
        raise LookupError(f"{path} has {len(found)} rows for {wanted}, and must have one")
    return found.iloc[0]


def seen(row: pd.Series, n: float) -> float:
    """The gain that is seen in 80 % of studies of `n` people, by the interval of a row.

    The width of an interval shrinks with the root of the people. NaN where the row's interval has no
    width: two methods that give the same are no sample of what a difference would vary by.
    """
    width = row["high"] - row["low"]
    if width < 1e-12:
        return float("nan")
    standard_error = width / (2 * 1.96)
    return float(SEEN * standard_error * np.sqrt(row["n"] / n))


def excluded(row: pd.Series) -> float:
    """The gain above which a row's interval excludes all; NaN where it has no width, or shows a gain."""
    if row["high"] - row["low"] < 1e-12 or row["low"] > 0:
        return float("nan")
    return max(float(row["high"]), 0.0)


def power(folder: Path, comparisons: Sequence[Comparison], n_most: int) -> pd.DataFrame:
    """A row a comparison, with what its interval excludes and what would be seen with more people."""
    rows = []
    for what in comparisons:
        row = find_row(folder, what)
        now = seen(row, row["n"])
        rows.append(
            {
                **asdict(what),
                **row[["n", "kind"]],
                # No zero is shown as negative.
                **(row[["value", "low", "high"]] + 0.0),
                "excluded": excluded(row),
                "seen": now,
                "seen_with_most": seen(row, n_most) if row["n"] >= FEWEST else np.nan,
            }
        )
    return pd.DataFrame(rows)


def power_table(found: pd.DataFrame, n_most: int) -> pd.DataFrame:
    """The table of `power` in a reader's words."""
    words = {
        "label": "comparison",
        "n": "people",
        "value": "difference",
        "low": "from",
        "high": "to",
        "excluded": "gains above this are excluded",
        "seen": "seen with these people",
        "seen_with_most": f"seen with {n_most:,}",
    }
    return found[list(words)].rename(columns=words)


def power_rows(found: pd.DataFrame, n_most: int) -> list[dict[str, Any]]:
    """The numbers of `power` that are known, as rows of results."""
    words = {
        "excluded": "gains above this are excluded",
        "seen": "gain seen with 80 % power",
        "seen_with_most": f"gain seen with 80 % power by {n_most:,} people, extrapolated",
    }
    rows = []
    for one in found.to_dict("records"):
        place = {name: one[name] for name in ("data", "method", "score", "n", "kind")}
        for name, said in words.items():
            task = f"{one['task']}, against {one['against']}, {said}"
            if not np.isnan(one[name]):
                rows.append({**place, "task": task, "value": one[name]})
    return rows


def gaps(folder: Path, against: str, people: Sequence[int]) -> pd.DataFrame:
    """How far the blocks alone lie above `against` by training people, ``x``, in the table of scaling."""
    rows = []
    for n in people:
        task = f"hidden entries, {n} training people"
        what = Comparison("", "scaling_abide", "ABIDE", task, "blocks_alone", against)
        rows.append({**find_row(folder, what), "x": n})
    return pd.DataFrame(rows)


def extrapolate(rows: pd.DataFrame, n: float) -> tuple[float, float]:
    """``value`` at `n` from the last point on, by two slopes in log10 ``x``: of all points, and of the last two."""
    x = np.log10(rows["x"].to_numpy(float))
    value = rows["value"].to_numpy(float)
    whole = np.polyfit(x, value, 1)[0]
    last = (value[-1] - value[-2]) / (x[-1] - x[-2])
    ahead = np.log10(n) - x[-1]
    return float(value[-1] + whole * ahead), float(value[-1] + last * ahead)


def power_figure(found: pd.DataFrame, by_people: Mapping[str, pd.DataFrame], n_most: int) -> Figure:
    """Left, the gain that is seen against people tested; right, gaps against training people."""
    figure, (left, right) = panels(2, 3.6)
    drawn = found[found["seen"].notna()].to_dict("records")
    for one, colour, marker in zip(drawn, COLOURS, MARKERS, strict=False):
        style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.2}
        # No line where nothing is extrapolated.
        ends = {one["n"]: one["seen"], n_most: one["seen_with_most"]}
        left.plot(list(ends), list(ends.values()), label=one["label"], markevery=[0], **style)
    left.set(xscale="log", yscale="log", xlabel="people tested", ylabel="gain seen with 80 % power")
    for (name, rows), marker in zip(by_people.items(), MARKERS, strict=False):
        bars = right.errorbar(
            rows["x"], rows["value"], errors(rows), marker=marker, ms=4, label=name
        )
        last = rows.iloc[-1]
        for end in extrapolate(rows, n_most):
            ends = ([last["x"], n_most], [last["value"], end])
            right.plot(*ends, color=bars[0].get_color(), lw=0.8, ls="--")
    right.axhline(0, color="black", lw=0.8, ls=":")
    right.set(
        xscale="log",
        xlabel="training people",
        ylabel="gain of the blocks alone in R²",
        ylim=(None, 0.02),
    )
    right.legend(loc="upper right", bbox_to_anchor=(1, 0.96), title="compared with", fontsize=8)
    legend_above(figure, left, ncols=1)
    plt.close(figure)
    return figure
