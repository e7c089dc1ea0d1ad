"""Quantized weights in formats of other libraries."""
