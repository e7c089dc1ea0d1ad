"""jaxgpt: train, evaluate and use language models in JAX, on a laptop, GPUs or a TPU pod."""

__version__ = "0.1.0"
