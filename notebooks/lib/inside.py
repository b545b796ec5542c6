"""What a trained network has learned: its field, operators and scales, what it reads from, what it generates."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.signal import butter, hilbert, sosfiltfilt, welch
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from torch import Tensor

from lib.quality import homotopic_pairs
from mnemodyn.model.front import conditional_mean, moments
from mnemodyn.model.network import MnemoDyn
from mnemodyn.model.operator import OperatorBlock
from mnemodyn.model.wavelet import wavedec


def parcel_order(parcels: Sequence[str]) -> list[int]:
    """Columns of left parcels that have a twin on the right, then those of the right, then the others."""
    pairs = sorted(homotopic_pairs(tuple(parcels)))
    paired = [left for left, _ in pairs] + [right for _, right in pairs]
    return paired + sorted(set(range(len(parcels))) - set(paired))


@torch.no_grad()
def field_response(block: OperatorBlock, x: Tensor) -> dict:
    """The field of one block along a window x (time, parcel), as a dict.

    ``values`` (rank,): singular values of the time-averaged matrix H (parcel, channel), over their sum; ``parcels``
    (parcel,): its leading left vector; ``varying``: share of H's energy that is not in its average; ``z`` (time,
    field_rank): what H is a function of.
    """
    field = block.field
    z = field.activation(field.bottleneck(field.activation(field.input(x))))
    # One row of H a parcel, or two where value and derivative drive it.
    rows = field.expansion.out_features // block.output.in_features
    h = field.activation(field.expansion(z)).view(len(x), rows, -1)
    mean = h.mean(0)
    left, values, _ = torch.linalg.svd(mean, full_matrices=False)
    return {
        "values": (values / values.sum()).numpy(),
        "parcels": left[:, 0].numpy(),
        "varying": float(1 - mean.square().sum() / h.square().mean(0).sum()),
        "z": z.numpy(),
    }


def coarse_mean(block: OperatorBlock) -> np.ndarray:
    """The coarse operators multiplied together, mean over channels: (sample in, sample out)."""
    product = torch.eye(block.coarse.n)
    for weight in block.coarse.weight.detach():
        product = product @ weight
    return product.view(-1, *product.shape[-2:]).mean(0).numpy()


def banded_gain(block: OperatorBlock, level: int) -> np.ndarray:
    """Root sum of squares of a level's kernels over taps, mean over segments: (2K out, 2K in), finest level 0."""
    operator: Any = block.banded[level]
    weight = (
        operator.mixing[..., None] * operator.kernel[:, None]
        if hasattr(operator, "kernel")
        else operator.weight
    )
    return weight.detach().square().sum(-1).sqrt().mean(0).numpy()


@torch.no_grad()
def streams(model: MnemoDyn, x: Tensor, t_r: float) -> dict[str, np.ndarray]:
    """What drives each block and what leaves its operators, for a window x (time, parcel): (time, channel) each."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, part: Tensor) -> None:
        found[name] = found.get(name, 0) + part[0].numpy()

    hooks, blocks = [], cast(list[OperatorBlock], model.blocks)
    for i, block in enumerate(blocks, 1):
        for part in (block.field, block.lift):
            if part is not None:
                hooks.append(
                    part.register_forward_hook(
                        lambda _, __, out, i=i: keep(f"drive of block {i}", out)
                    )
                )
        hooks.append(
            block.output.register_forward_pre_hook(
                lambda _, given, i=i: keep(f"latents of block {i}", given[0])
            )
        )
    try:
        model(x[None], t_r)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def scale_shares(x: np.ndarray, wavelet: str | Tensor, n_levels: int) -> np.ndarray:
    """Share of the energy of x (time, column) in each scale, (n_levels + 1,), its means removed, the finest first."""
    series = torch.tensor((x - x.mean(0)).T[None], dtype=torch.float64)
    with torch.no_grad():
        energy = np.array(
            [float(c.square().sum()) for c in wavedec(series, wavelet, n_levels)[::-1]]
        )
    return energy / energy.sum()


def reads_from(
    model: MnemoDyn,
    x: Tensor,
    hidden: Tensor,
    t_r: float,
    *,
    seed: int,
    chunk: int = 32,
    tolerance: float = 1e-2,
) -> tuple[np.ndarray, np.ndarray]:
    """What the prediction of one hidden entry of each parcel, drawn by `seed`, depends on in a window.

    `x` and `hidden` are (time, parcel), and every parcel has a hidden frame; `t_r` in seconds. `chunk` parcels are
    computed at once. `tolerance` is that of the front end's solver, which is differentiated; the scan's own covariance
    is taken as given.

    Returns
    -------
    strength, sign : ndarray, shape (parcel, parcel)
        Root sum of squares over time of the derivative of row's prediction with respect to column's visible values, and
        its sum over time: what a shift of all of column's visible values would do.
    """
    rng, front = np.random.default_rng(seed), model.front
    n = x.shape[1]
    frames = torch.tensor([int(rng.choice(np.flatnonzero(hidden[:, p].numpy()))) for p in range(n)])
    strength, sign = [], []
    for rows in torch.arange(n).split(chunk):
        given = x.expand(len(rows), -1, -1).clone().requires_grad_()
        mask, filled = hidden.expand(len(rows), -1, -1), None
        seen = given.masked_fill(mask, 0)
        if front is not None:
            centred = seen - front.mean
            mixing = front.mixing(centred[:1].detach(), mask[:1])  # of one scan, repeated
            mixing = None if mixing is None else mixing.expand(len(rows), -1, -1)
            filled = (
                conditional_mean(centred, mask, front.lags, mixing, tolerance=tolerance)
                + front.mean
            )
        out = model(seen, t_r, hidden=mask, filled=filled).reconstruction
        picked = out[
            torch.arange(len(rows)), frames[rows], rows
        ].sum()  # rows of a batch know nothing of one another
        (gradient,) = torch.autograd.grad(picked, given)
        strength.append(gradient.square().sum(1).sqrt())
        sign.append(gradient.sum(1))
    return torch.cat(strength).numpy(), torch.cat(sign).numpy()


def association(
    a: np.ndarray,
    b: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    *,
    seed: int,
    n_permutations: int = 1000,
) -> dict:
    """Spearman correlation of the off-diagonal entries of two (parcel, parcel) matrices.

    `low` and `high` are a 95 % bootstrap over rows of both. In permutations the homotopic `pairs` (left, right) are
    moved together, and other columns among themselves, in rows and columns alike: what two hemispheres share by
    symmetry stays. Spatial autocorrelation within a hemisphere does not; the test is lenient there.

    Returns
    -------
    dict
        ``r``, ``low``, ``high``, ``null_high`` (95th percentile of permutations), ``p`` (one-sided).
    """
    rng, n = np.random.default_rng(seed), len(b)
    off = ~np.eye(n, dtype=bool)
    ranked = np.zeros((2, n, n))
    for ranks, matrix in zip(ranked, (a, b), strict=True):
        ranks[off] = rankdata(matrix[off])

    def correlation(first: np.ndarray, rows: np.ndarray) -> float:
        kept = off[rows]
        return float(np.corrcoef(first[rows][kept], ranked[1][rows][kept])[0, 1])

    r = correlation(ranked[0], np.arange(n))
    low, high = np.quantile(
        [correlation(ranked[0], rng.integers(0, n, n)) for _ in range(n_permutations)],
        [0.025, 0.975],
    )
    paired = np.array(pairs, int).reshape(-1, 2)
    single, null = np.setdiff1d(np.arange(n), paired), []
    for _ in range(n_permutations):
        moved = np.arange(n)
        moved[paired] = paired[rng.permutation(len(paired))]
        moved[single] = single[rng.permutation(len(single))]
        null.append(correlation(ranked[0][np.ix_(moved, moved)], np.arange(n)))
    p = (1 + sum(value >= r - 1e-12 for value in null)) / (1 + n_permutations)
    found = {"r": r, "low": low, "high": high, "null_high": np.quantile(null, 0.95), "p": p}
    return {name: round(float(value), 6) for name, value in found.items()}


def parcel_shares(edges: np.ndarray) -> np.ndarray:
    """What edges contribute (scan, edge), in the order of ``triu_indices``, half to either end: (scan, parcel)."""
    n = round((1 + np.sqrt(1 + 8 * edges.shape[1])) / 2)
    rows, columns = np.triu_indices(n, 1)
    ends = np.zeros((edges.shape[1], n))
    ends[np.arange(len(rows)), rows] = ends[np.arange(len(rows)), columns] = 0.5
    return edges @ ends


def moran_surrogates(x: np.ndarray, centres: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Random maps (n, parcel) with the mean, variance and spatial autocorrelation (Moran's I) of a map x (parcel,).

    The map's parts along the eigenvectors of the centred matrix of inverse distances between `centres` (parcel, 3),
    all different, keep their size and get a random sign. Source: Wagner and Dray 2015, Methods in Ecology and
    Evolution 6, 1169-1178.
    """
    distance = cdist(centres, centres)
    np.fill_diagonal(distance, np.inf)
    weights = 1 / distance
    centred = weights - weights.mean(0) - weights.mean(1, keepdims=True) + weights.mean()
    vectors = np.linalg.eigh(centred)[1]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (n, len(x)))
    return x.mean() + (signs * (vectors.T @ (x - x.mean()))) @ vectors.T


def spatial_test(
    x: np.ndarray, y: np.ndarray, centres: np.ndarray, *, seed: int, n: int = 5000
) -> dict[str, float]:
    """Pearson correlation ``r`` of two maps (parcel,), tested against `moran_surrogates` of the first.

    ``null_low`` and ``null_high`` are the 2.5th and 97.5th percentile of the null, ``p`` is two-sided.
    """
    maps = np.vstack([x, moran_surrogates(x, centres, n, seed)])
    maps = maps - maps.mean(1, keepdims=True)
    r = maps @ (y - y.mean()) / (np.linalg.norm(maps, axis=1) * np.linalg.norm(y - y.mean()))
    low, high = np.quantile(r[1:], [0.025, 0.975])
    p = (1 + (np.abs(r[1:]) >= abs(r[0]) - 1e-12).sum()) / (1 + n)
    return {
        name: round(float(v), 6)
        for name, v in (("r", r[0]), ("null_low", low), ("null_high", high), ("p", p))
    }


def _future(model: MnemoDyn, past: Tensor, n: int, t_r: float) -> Tensor:
    """The next n frames as the network fills them, after past (batch, time, parcel)."""
    x = torch.cat([past, past.new_zeros(len(past), n, past.shape[2])], 1)
    hidden = torch.zeros_like(x, dtype=torch.bool)
    hidden[:, -n:] = True
    with torch.no_grad():
        return model(x, t_r, hidden=hidden).reconstruction[:, -n:]


def forecast_errors(model: MnemoDyn, windows: Tensor, t_r: float, step: int) -> Tensor:
    """Errors of the last `step` frames of windows (window, time, parcel), filled from those before them."""
    return windows[:, -step:] - _future(model, windows[:, :-step], step, t_r)


def generate(
    model: MnemoDyn | None,
    start: Tensor,
    n_frames: int,
    t_r: float,
    *,
    step: int,
    errors: Tensor | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Roll a network forward, `step` frames at a time: mask the future, fill it, append it, go on with the last frames.

    A filled future is a mean, which fades. So that dynamics go on, each step adds the error that was made in one
    randomly drawn training window, all parcels and frames of the step together.

    Without a model zero is predicted: what the errors alone look like, one after the other. `start` (batch, time,
    parcel) is the past to begin with; as many frames are kept as the past of every step. `errors` (window, step,
    parcel) are those of `forecast_errors`; without them the mean alone is rolled. Returns (batch, n_frames, parcel).
    """
    generator = torch.Generator().manual_seed(seed)
    past, parts = start, []
    for _ in range(-(-n_frames // step)):
        new = (
            start.new_zeros(len(past), step, past.shape[2])
            if model is None
            else _future(model, past, step, t_r)
        )
        if errors is not None:
            new = new + errors[torch.randint(len(errors), (len(past),), generator=generator)]
        parts.append(new)
        past = torch.cat([past, new], 1)[:, -start.shape[1] :]
    return torch.cat(parts, 1)[:, :n_frames].numpy()


def simulate_var(
    scans: Sequence[np.ndarray],
    start: np.ndarray,
    n_frames: int,
    *,
    seed: int,
    shrinkage: float = 0.1,
) -> np.ndarray:
    """Draw from the first-order autoregression of scaled scans (time, parcel), with its own noise.

    The transition is ridge least squares in its Yule-Walker form (Lütkepohl 2005, section 3.3): with
    `shrinkage` a, ``transition = (1 - a) C1 C^-1``, where ``C = (1 - a) C0 + a s I`` is then the
    stationary covariance. `start` is (batch, parcel); returns (batch, n_frames, parcel).
    """
    mean, lags = moments(scans, 1)
    white = np.eye(len(mean)) * np.trace(lags[0]) / len(mean)
    covariance = (1 - shrinkage) * lags[0] + shrinkage * white
    lagged = (1 - shrinkage) * lags[1]
    transition = np.linalg.solve(covariance, lagged.T).T
    noise = covariance - transition @ lagged.T
    values, vectors = np.linalg.eigh((noise + noise.T) / 2)
    root = vectors * np.sqrt(values.clip(0))
    rng = np.random.default_rng(seed)
    x = start - mean
    frames = []
    for _ in range(n_frames):
        x = x @ transition.T + rng.standard_normal(x.shape) @ root.T
        frames.append(x + mean)
    return np.stack(frames, 1)


def metastability(x: np.ndarray, t_r: float, band: tuple[float, float] = (0.01, 0.1)) -> float:
    """SD over time of the Kuramoto order parameter of x (time, parcel), phases from its Hilbert transform.

    Source: Shanahan 2010, Chaos 20, 013108; Cabral et al. 2011, NeuroImage 57, 130-139. `band` in Hz; the first and
    last tenth, where filter and transform are not themselves, are left out.
    """
    sos = butter(2, band, "bandpass", fs=1 / t_r, output="sos")
    phase = np.angle(hilbert(sosfiltfilt(sos, x - x.mean(0), axis=0), axis=0))
    edge = len(x) // 10
    return float(np.abs(np.exp(1j * phase).mean(1))[edge : len(x) - edge].std())


def summarise(x: np.ndarray, t_r: float, reference: np.ndarray) -> dict:
    """A series (time, parcel) in three numbers, and its spectrum.

    ``fc_similarity`` (Pearson r of the upper triangle of its FC with that of `reference`, (parcel, parcel)),
    ``metastability``, ``sd`` (mean over parcels), ``frequency`` (Hz) and ``power`` (per Hz, unit variance).
    """
    upper = np.triu_indices(x.shape[1], 1)
    similarity = np.corrcoef(np.nan_to_num(np.corrcoef(x.T))[upper], reference[upper])[0, 1]
    sd = x.std(0)
    frequency, spectrum = welch(
        (x - x.mean(0)) / np.where(sd > 0, sd, 1), fs=1 / t_r, nperseg=min(128, len(x)), axis=0
    )
    return {
        "fc_similarity": float(similarity),
        "metastability": metastability(x, t_r),
        "sd": float(sd.mean()),
        "frequency": frequency,
        "power": spectrum.mean(1),
    }
