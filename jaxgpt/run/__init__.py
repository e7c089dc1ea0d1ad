"""The run folder: checkpoints, provenance, metric writers, initial weights, stop signals."""
