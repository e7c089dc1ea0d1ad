"""Quantized matmuls, and frozen weights that are kept as codes."""
