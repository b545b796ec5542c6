"""How good it is: reconstruction, identification, and what they are compared with."""

LABELS = {
    "model": "MnemoDyn",
    "zero": "zero (the parcel's mean)",
    "interpolation": "interpolation in time",
    "spatial_gaussian": "spatial Gaussian",
    "var": "VAR(1), Kalman smoother",
    "fc": "Pearson FC",
}
