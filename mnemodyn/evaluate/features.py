"""What a scan is known by before any network: connectivity, and what the scanner and the person's motion tell."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from mnemodyn.data.scaling import Scaling
from mnemodyn.data.scans import Scan

CONFOUNDS = ("age", "sex", "site", "mean_fd", "n_frames")


def frames(scan: Scan) -> np.ndarray:
    """Z-scored frames that are not censored, (time, parcel), float32; a constant parcel is 0."""
    x = Scaling()(scan)
    return x if scan.censored is None else x[~scan.censored]


def connectivity(scans: Iterable[Scan]) -> np.ndarray:
    """Fisher-z Pearson connectivity, (scan, edge), float32, by nilearn; scans are read one at a time.

    A constant parcel's correlations are 0; those of copies are cut off at 0.999999.
    """
    from nilearn.connectome import ConnectivityMeasure, sym_matrix_to_vec
    from sklearn.covariance import EmpiricalCovariance

    pearson = ConnectivityMeasure(
        EmpiricalCovariance(store_precision=False), kind="correlation", standardize=False
    )
    rows = []
    for scan in scans:
        x = frames(scan)
        moving = x.any(0)
        r = np.zeros((x.shape[1], x.shape[1]))
        r[np.ix_(moving, moving)] = pearson.fit_transform([x[:, moving].astype(float)])[0]
        z = np.arctanh(np.clip(sym_matrix_to_vec(r, discard_diagonal=True), -0.999999, 0.999999))
        rows.append(z.astype(np.float32))
    return np.array(rows)


def confounds(table: pd.DataFrame, target: str, only: Sequence[str] = CONFOUNDS) -> np.ndarray:
    """Age, sex, site, mean framewise displacement and number of frames, or `only` some, without the target.

    Of a row a scan of `table`, (scan, column): a column a number, and one a category; NaN for numbers that are missing.
    A cohort that does not know one of them is described by the others, or by a column of zeros.
    """
    known = [
        name for name in only if name != target and name in table and table[name].notna().any()
    ]
    parts = [
        pd.get_dummies(table[name].astype(object)) if name in ("sex", "site") else table[name]
        for name in known
    ]
    return np.column_stack([np.asarray(part, float) for part in parts] or [np.zeros(len(table))])
