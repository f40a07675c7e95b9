"""Metrics of runs: recorded in MLflow, and read back as curves."""
