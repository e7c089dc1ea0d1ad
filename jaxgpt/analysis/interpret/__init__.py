"""Interpretability: reads a model at named taps, intervenes there, and explains its outputs."""
