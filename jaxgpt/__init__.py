"""jaxgpt: train, evaluate and use language models in JAX, on a laptop, GPUs or a TPU pod."""

__version__ = "0.1.0"

__all__ = ["load"]


def __getattr__(name: str) -> object:
  """`jaxgpt.load`, whose imports take seconds and are made when it is first used."""
  if name == "load":
    from jaxgpt.tasks.api import load

    return load
  raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
