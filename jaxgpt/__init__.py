"""jaxgpt: train, evaluate and use language models in JAX, on a laptop, GPUs or a TPU pod."""

__version__ = "0.1.0"

__all__ = ["Beams", "Constraint", "load"]


def __getattr__(name: str) -> object:
  """`jaxgpt.load` and what goes with it. The imports take seconds and are made at the first use."""
  if name == "load":
    from jaxgpt.tasks.api import load

    return load
  if name in ("Beams", "Constraint"):
    from jaxgpt.inference.engine import requests

    return getattr(requests, name)
  raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
