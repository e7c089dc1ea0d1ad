"""A program that does not fit, in the words of the config."""

import re

from jaxgpt.plan.lower import GIB

_PLACES = (  # of an op_name -> what it is, and the keys that make it smaller
    (r"state\['opt'\]", "optimizer state", "more mesh.fsdp, or optim.name=adafactor"),
    (r"state\['(params|ema|frozen)'\]", "parameters", "more mesh.fsdp or mesh.tensor"),
    (r"_head|cross_entropy|log_softmax|language_model", "logits and their gradient",
     "fewer rows (data.batch_size, optim.accumulate), or more mesh.tensor"),
    (r"_embedded", "embedding table and its gradient", "more mesh.tensor"),
    (r"_layers/while/body.*mlp", "MLP activations",
     "model.remat without gate, up or down; fewer rows a microbatch (optim.accumulate)"),
    (r"_layers/while/body.*attn", "attention activations",
     "model.attention=splash; model.remat with fewer names; optim.accumulate"),
    (r"_layers/while", "activations saved for the backward pass",
     "model.remat with fewer names (full saves least); optim.accumulate"),
)


def place(op_name):
  """(path in the model, what it is, the config keys that make it smaller) of an op_name."""
  what, keys = next(((what, keys) for pattern, what, keys in _PLACES
                     if re.search(pattern, op_name)), ("temporaries", "data.batch_size"))
  parts = re.sub(r"jit\(\w+\)/|transpose\(|jvp\(|\)|checkpoint/|rematted_computation/|eval_jaxpr/",
                 "", op_name)
  return parts.strip("/") or "?", what, keys


def out_of_memory(error, c, topology):
  """Lines that say what took the memory and what to change.

  Args:
    error: a `lower.OutOfMemory`.
    c: the resolved config.
    topology: a `topology.Topology`.
  """
  yield (f"does not fit: {topology.chip.name} has {error.limit / GIB:.2f} GiB, the step needs "
         + (f"{error.needed / GIB:.2f} GiB" if error.needed else "more"))
  if error.buffers:
    yield "largest buffers:"
  for buffer in error.buffers[:8]:
    path, what, keys = place(buffer.op_name)
    yield f"  {buffer.bytes / GIB:6.2f} GiB  {buffer.shape}  {what}: {path}"
    yield f"              smaller with {keys}"
  yield (f"now: data.batch_size={c.data.batch_size}, optim.accumulate={c.optim.accumulate}, "
         f"model.remat={c.model.remat}; --search looks for what fits")
