"""Metrics: recorded in MLflow, read back as curves."""
