"""Compression of trained models: pruning, removal of layers, heads and columns, quantization."""
