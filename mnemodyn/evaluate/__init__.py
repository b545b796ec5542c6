"""How good it is: reconstruction, identification, and what they are compared with."""

LABELS = {
    "model": "MnemoDyn",
    "zero": "zero (the parcel's mean)",
    "interpolation": "interpolation in time",
    "spatial_gaussian": "spatial Gaussian",
    "var": "VAR(1), Kalman smoother",
    "low_rank": "probabilistic PCA",
    "spatiotemporal_gaussian": "spatio-temporal Gaussian",
    "own_covariance": "the same, own covariance mixed in",
    "front_end": "the network's front end alone",
    "blocks_alone": "operator blocks without front end",
    "transformer": "patch transformer",
    "fc": "Pearson FC",
}
