"""How good it is: reconstruction, identification, and what they are compared with."""

LABELS = {
    "model": "MnemoDyn",
    "zero": "zero (the parcel's mean)",
    "interpolation": "interpolation in time",
    "spatial_gaussian": "spatial Gaussian",
    "var": "VAR(1), Kalman smoother",
    "fc": "Pearson FC",
    "confounds": "confounds only",
    "site": "site only",
    "fc_harmonised": "FC, confounds regressed out",
    "fc_pca": "PCA of FC",
    "fc_mlp": "perceptron on FC",
    "tangent": "tangent-space FC",
    "model+fc": "MnemoDyn and FC",
    "untrained": "MnemoDyn, random weights",
    "last_frame": "MnemoDyn, last frame",
    "latent_correlation": "MnemoDyn, latent correlation",
    "response": "MnemoDyn, response",
    "draft_head": "draft's head, last frame",
    "finetune_last": "last block fine-tuned",
    "finetune_all": "all fine-tuned",
}
