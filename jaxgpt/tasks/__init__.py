"""Applications: benchmarks, predictions and metrics of trained models."""
