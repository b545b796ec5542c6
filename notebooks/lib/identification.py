"""Whose scan is it? Participants identified from two halves of their scans (connectome fingerprinting).

Two halves of one scan share the day, the head position and the preprocessing, and these identify a person as well as
the brain does. Accuracy within a scan is therefore an upper bound on accuracy across days.

References
----------
.. [1] Finn et al. (2015), Nature Neuroscience 18, 1664-1671: identification accuracy.
.. [2] Amico and Goñi (2018), Scientific Reports 8, 8254: differential identifiability.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np


def pearson_fc(x: np.ndarray) -> np.ndarray:
    """Fisher-z Pearson connectivity of a window (time, parcel): the upper triangle, row by row, float64.

    Raises
    ------
    ValueError
        If there are fewer than 4 frames or 2 parcels, an entry is not finite, or a parcel is constant.
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
    return np.arctanh(np.corrcoef(x, rowvar=False)[edges].clip(-0.999999, 0.999999))


def _similarity(queries: np.ndarray, database: np.ndarray, standardise: bool) -> np.ndarray:
    """Pearson correlation over features, (query, database entry)."""
    if standardise:
        varies = np.ptp(database, axis=0) > 0
        mean = database[:, varies].mean(0)
        sd = database[:, varies].std(0)
        queries = (queries[:, varies] - mean) / sd
        database = (database[:, varies] - mean) / sd
    for half in (queries, database):
        if half.shape[1] < 2 or not np.ptp(half, axis=1).all():
            raise ValueError("features must vary, got a participant (or half) with one value only")
    return np.corrcoef(queries, database)[: len(queries), len(queries) :]


def _both_ways(first: np.ndarray, second: np.ndarray, standardise: bool) -> list[np.ndarray]:
    """Similarities with queries from `first`, then from `second`."""
    first = np.asarray(first, dtype=np.float64)
    second = np.asarray(second, dtype=np.float64)
    if first.ndim != 2 or min(first.shape) < 2 or first.shape != second.shape:
        expected = "(participant >= 2, feature >= 2) of one shape"
        raise ValueError(
            f"first and second must be {expected}, got {first.shape} and {second.shape}"
        )
    if not np.isfinite(first).all() or not np.isfinite(second).all():
        raise ValueError("first and second must be finite, got NaN or infinity")
    return [_similarity(first, second, standardise), _similarity(second, first, standardise)]


def _best_match(similarity: np.ndarray) -> np.ndarray:
    """The most similar database entry of each query; -1 where two are equal to rounding.

    A tie is a miss: features that everybody shares identify nobody.
    """
    tied = (similarity >= similarity.max(1, keepdims=True) - 1e-12).sum(1) > 1
    return np.where(tied, -1, similarity.argmax(1))


def identify(first: np.ndarray, second: np.ndarray, *, standardise: bool = False) -> dict:
    """Identify every participant of one half among those of the other, both ways round.

    A hit is a participant whose own entry in the other half is the most similar one, by Pearson
    correlation over features.

    Parameters
    ----------
    first, second : ndarray, shape (participant, feature)
        The same participants in the same order.
    standardise : bool
        Scale every feature by its mean and SD over the database half before correlating. False follows
        [1]_ and suits features of one unit, such as connectivity. Features of unequal units, such as
        latents, need True: otherwise the few widest decide every correlation. It raises `idiff` by
        itself, so compare only features that were treated alike.

    Returns
    -------
    dict
        ``accuracy`` (mean of both directions); ``hits_first`` and ``hits_second``, (participant,) bool;
        ``similarity_self`` and ``similarity_other``, mean Pearson r within and between participants;
        ``idiff``, 100 times their difference [2]_.

    Raises
    ------
    ValueError
        If shapes disagree, there are fewer than two participants or features, an entry is not finite,
        or the features of a participant are all equal.
    """
    ways = _both_ways(first, second, standardise)
    people = np.arange(len(ways[0]))
    own = np.eye(len(people), dtype=bool)
    hits = [_best_match(similarity) == people for similarity in ways]
    within = float(np.mean([similarity[own] for similarity in ways]))
    between = float(np.mean([similarity[~own] for similarity in ways]))
    return {
        "accuracy": float(np.mean(hits)),
        "hits_first": hits[0],
        "hits_second": hits[1],
        "similarity_self": within,
        "similarity_other": between,
        "idiff": 100 * (within - between),
    }


def permutation_test(
    first: np.ndarray,
    second: np.ndarray,
    *,
    standardise: bool = False,
    n_permutations: int = 1000,
    seed: int,
) -> dict:
    """Accuracy beside that with the participants of the second half shuffled; arguments as of `identify`.

    Returns
    -------
    dict
        ``accuracy`` (observed, mean of both directions), ``null`` (n_permutations,) the shuffled
        accuracies, ``upper`` their 95 % quantile, and ``p``,
        ``(1 + #{shuffled >= observed}) / (1 + n_permutations)``, never zero.
    """
    forward, backward = [_best_match(way) for way in _both_ways(first, second, standardise)]
    people = np.arange(len(forward))

    def accuracy(place: np.ndarray) -> float:
        # place[i] is where participant i of `first` is taken to be in `second`.
        return float(np.mean([forward == place, backward[place] == people]))

    rng = np.random.default_rng(seed)
    shuffled = np.array([accuracy(rng.permutation(people)) for _ in range(n_permutations)])
    observed = accuracy(people)
    return {
        "accuracy": observed,
        "null": shuffled,
        "upper": float(np.quantile(shuffled, 0.95, method="higher")),
        "p": float((1 + (shuffled >= observed).sum()) / (1 + n_permutations)),
    }


def halves(
    features: Callable[[np.ndarray], dict[str, np.ndarray]],
    scans: Sequence[np.ndarray],
    start: int,
    length: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features of a window of every scan, once from its first and once from its second half.

    `features` turns a window (time, parcel) into vectors by name; the window begins `start` frames after
    the beginning of the half and has `length` frames. Returns two arrays (participant, feature) a name.
    """
    first = [features(scan[start : start + length]) for scan in scans]
    second = [features(scan[len(scan) // 2 + start :][:length]) for scan in scans]
    return {
        name: (np.array([one[name] for one in first]), np.array([one[name] for one in second]))
        for name in first[0]
    }


def identify_by_length(
    features: Callable[[np.ndarray], dict[str, np.ndarray]],
    scans: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    max_windows: int | None = None,
    standardise: Collection[str] = (),
) -> list[dict]:
    """Identification accuracy as a function of window length.

    Each scan (time, parcel), one a participant, is halved, and each half is cut into windows without
    overlap, at most `max_windows`. The k-th windows of the first halves are identified against the k-th
    of the second halves: all pairs are half a scan apart. Features named in `standardise` are
    standardised, see `identify`.

    Returns
    -------
    list of dict
        One a length and set of features: ``features``, ``length`` (frames), ``n_windows`` (a half),
        ``accuracy`` and ``idiff`` (means over windows), ``accuracies`` (n_windows,). Windows of a scan
        are not independent.

    Raises
    ------
    ValueError
        If a length is not in 1 to half the shortest scan, or `identify` or `features` raises.
    """
    half = min(len(scan) // 2 for scan in scans)
    rows = []
    for length in lengths:
        if not 1 <= length <= half:
            raise ValueError(f"lengths must be in 1 to {half} (half a scan), got {length}")
        found: dict[str, list[dict]] = {}
        for start in [k * length for k in range(half // length)][:max_windows]:
            for name, pair in halves(features, scans, start, length).items():
                result = identify(*pair, standardise=name in standardise)
                found.setdefault(name, []).append(result)
        for name, results in found.items():
            accuracies = np.array([one["accuracy"] for one in results])
            rows.append(
                {
                    "features": name,
                    "length": int(length),
                    "n_windows": len(results),
                    "accuracy": float(accuracies.mean()),
                    "accuracies": accuracies,
                    "idiff": float(np.mean([one["idiff"] for one in results])),
                }
            )
    return rows
