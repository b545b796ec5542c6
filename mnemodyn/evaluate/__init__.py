"""What a model is measured against, and how: baselines, metrics, identification."""
