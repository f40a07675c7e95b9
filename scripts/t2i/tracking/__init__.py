"""Record metrics of runs in MLflow, and read them as curves."""
