"""MLflow: runs, data sets, and the model registry."""
