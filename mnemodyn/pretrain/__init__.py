"""Pretraining without labels: what is hidden, what is asked, and the training itself."""
