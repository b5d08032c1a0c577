"""Kubernetes: TrainJob and JobSet."""
