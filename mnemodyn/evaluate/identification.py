"""Whose scan is it? Participants identified from two halves (connectome fingerprinting).

Two halves of one scan share the day, the head position and the preprocessing, which identify a person as well as the
brain does: accuracy within a scan is an upper bound on that across days.

References
----------
.. [1] Finn et al. (2015), Nature Neuroscience 18, 1664-1671: identification accuracy.
.. [2] Amico and Goñi (2018), Scientific Reports 8, 8254: differential identifiability.
"""

from collections.abc import Callable, Sequence

import numpy as np


def pearson_fc(x: np.ndarray) -> np.ndarray:
    """Fisher-z Pearson connectivity of a window (time, parcel): its upper triangle, row by row, float64.

    Raises
    ------
    ValueError
        If there are fewer than 4 frames or 2 parcels, an entry is not finite, a parcel is constant, or two parcels are
        copies up to scale (their z is infinite).
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 4 or x.shape[1] < 2:
        raise ValueError(f"x must be (time >= 4, parcel >= 2), got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or infinity")
    constant = np.flatnonzero(np.ptp(x, axis=0) == 0).tolist()
    if constant:
        raise ValueError(f"every parcel of x must vary, got constant parcels {constant}")
    edges = np.triu_indices(x.shape[1], 1)
    correlation = np.corrcoef(x, rowvar=False)[edges]
    copies = np.transpose(edges)[np.abs(correlation) > 1 - 1e-12].tolist()
    if copies:
        raise ValueError(f"parcels of x must not be copies up to scale, got {copies}")
    return np.arctanh(correlation)


def _similarity(queries: np.ndarray, database: np.ndarray, standardise: bool) -> np.ndarray:
    """Pearson correlation over features, (query, database entry)."""
    if standardise:
        mean, sd, keep = database.mean(0), database.std(0), np.ptp(database, axis=0) > 0
        queries, database = ((a[:, keep] - mean[keep]) / sd[keep] for a in (queries, database))
    if any(half.shape[1] < 2 or not np.ptp(half, axis=1).all() for half in (queries, database)):
        raise ValueError("features must vary, got a participant (or half) with one value only")
    return np.corrcoef(queries, database)[: len(queries), len(queries) :]


def _both_ways(first: np.ndarray, second: np.ndarray, standardise: bool) -> list[np.ndarray]:
    """Check both halves; similarities with queries from `first`, then from `second`."""
    first, second = (np.asarray(half, dtype=np.float64) for half in (first, second))
    if first.ndim != 2 or min(first.shape) < 2 or first.shape != second.shape:
        expected, got = "(participant >= 2, feature >= 2)", f"{first.shape} and {second.shape}"
        raise ValueError(f"first and second must be {expected} of one shape, got {got}")
    for name, half in (("first", first), ("second", second)):
        if not np.isfinite(half).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    return [_similarity(*halves, standardise) for halves in ((first, second), (second, first))]


def _best_match(similarity: np.ndarray) -> np.ndarray:
    """Most similar database entry of each query; -1 where two are equal to rounding."""
    tied = (similarity >= similarity.max(1, keepdims=True) - 1e-12).sum(1) > 1
    return np.where(tied, -1, similarity.argmax(1))


def identify(first: np.ndarray, second: np.ndarray, *, standardise: bool = False) -> dict:
    """Identify every participant of one half among those of the other, both ways round.

    A hit is a participant whose own entry is the most similar of the other half, by Pearson correlation over features.
    A tie is a miss: features shared by everybody identify nobody.

    `first` and `second` are (participant, feature), the same participants in the same order. To `standardise` is to
    scale every feature by its mean and SD over the database half before correlating. False follows [1]_ and suits
    features of one unit, such as connectivity. Features of unequal units (a model's latents) need True: otherwise the
    few widest decide every correlation. It raises `idiff` by itself: compare features treated alike.

    Returns
    -------
    dict
        ``accuracy_first`` and ``accuracy_second`` (queries from that half) and ``accuracy``, their mean;
        ``hits_first``, ``hits_second``, (participant,) boolean; ``similarity_self`` and ``similarity_other``, mean
        Pearson r within and between participants; ``idiff``, 100 times their difference [2]_.

    Raises
    ------
    ValueError
        If shapes disagree, there are fewer than two participants or features, an entry is not finite, or the features
        of a participant are all equal.
    """
    ways = _both_ways(first, second, standardise)
    own = np.eye(len(ways[0]), dtype=bool)
    hits = [_best_match(similarity) == np.arange(len(own)) for similarity in ways]
    within, between = (
        float(np.mean([similarity[pairs] for similarity in ways])) for pairs in (own, ~own)
    )
    return {
        "accuracy": float(np.mean(hits)),
        "accuracy_first": float(hits[0].mean()),
        "accuracy_second": float(hits[1].mean()),
        "hits_first": hits[0],
        "hits_second": hits[1],
        "similarity_self": within,
        "similarity_other": between,
        "idiff": 100 * (within - between),
    }


def chance(n_participants: int) -> float:
    """Expected accuracy of a guess: one in `n_participants` (ValueError below 1)."""
    if n_participants < 1:
        raise ValueError(f"n_participants must be >= 1, got {n_participants}")
    return 1 / n_participants


def permutation_interval(
    first: np.ndarray,
    second: np.ndarray,
    *,
    standardise: bool = False,
    n_permutations: int = 1000,
    seed: int,
) -> dict:
    """Accuracy when the participants of the second half are shuffled; arguments and errors as of `identify`.

    Returns
    -------
    dict
        ``accuracy`` (observed, mean of both directions), ``chance``, ``null`` (n_permutations,) accuracies, ``upper``
        (their 95 % quantile, one of its values) and ``p_value``,
        ``(1 + #{null >= accuracy}) / (1 + n_permutations)``, never zero.
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be >= 1, got {n_permutations}")
    forward, backward = map(_best_match, _both_ways(first, second, standardise))
    people = np.arange(len(forward))

    def accuracy(place: np.ndarray) -> float:
        # `place[i]` is where participant i of `first` is taken to be in `second`.
        return float(np.mean([forward == place, backward[place] == people]))

    rng = np.random.default_rng(seed)
    null = np.array([accuracy(rng.permutation(people)) for _ in range(n_permutations)])
    observed = accuracy(people)
    return {
        "accuracy": observed,
        "chance": chance(len(people)),
        "null": null,
        "upper": float(np.quantile(null, 0.95, method="higher")),
        "p_value": float((1 + (null >= observed).sum()) / (1 + n_permutations)),
    }


def identify_by_length(
    features: Callable[[np.ndarray], np.ndarray],
    scans: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    max_windows: int | None = None,
    standardise: bool = False,
) -> list[dict]:
    """Identification accuracy as a function of window length, in frames.

    Each scan (time, parcel), one a participant, is halved, and each half cut from its own first frame into windows
    without overlap, at most `max_windows`. The k-th windows of the first halves are identified against the k-th of the
    second by their `features`: all pairs are half a scan apart.

    Returns
    -------
    list of dict
        One a length: ``length`` (frames), ``n_windows`` (a half), ``accuracy`` and ``idiff`` (means over k),
        ``accuracies`` (n_windows,). Windows of a scan are not independent: the spread of these is no standard error.

    Raises
    ------
    ValueError
        If a length is not in 1 to half the shortest scan, `max_windows` is below 1, or `identify` or `features` raises.
    """
    scans = [np.asarray(scan) for scan in scans]
    half = min((len(scan) // 2 for scan in scans), default=0)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be None or >= 1, got {max_windows}")
    rows = []
    for length in lengths:
        if not 1 <= length <= half:
            raise ValueError(f"lengths must be in 1 to {half} (half a scan), got {length}")
        found = []
        for start in [k * length for k in range(half // length)][:max_windows]:
            halves = [
                np.array(
                    [
                        features(scan[begin + start :][:length])
                        for scan, begin in zip(scans, begins, strict=True)
                    ]
                )
                for begins in ([0] * len(scans), [len(scan) // 2 for scan in scans])
            ]
            found.append(identify(*halves, standardise=standardise))
        accuracies = np.array([f["accuracy"] for f in found])
        row = {"length": int(length), "n_windows": len(found), "accuracy": float(accuracies.mean())}
        rows.append(
            row | {"idiff": float(np.mean([f["idiff"] for f in found])), "accuracies": accuracies}
        )
    return rows
