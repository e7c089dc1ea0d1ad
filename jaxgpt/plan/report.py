"""Reports of a compiled step: figures as plain numbers, and tables for people."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import ml_collections

from jaxgpt.data import stages
from jaxgpt.model import stacks
from jaxgpt.parallel.chips import GIB, Chip
from jaxgpt.plan import cost as cost_lib
from jaxgpt.plan import hlo, lower, memory_estimate, per_device, roofline, time_estimate
from jaxgpt.plan.lower import Compiled
from jaxgpt.plan.schedule import kernels as kernels_lib
from jaxgpt.plan.topology import Topology
from jaxgpt.training import metrics, xla_options

Figures: TypeAlias = dict[str, Any]


def figures(compiled: Compiled, topology: Topology, price: float | None = None) -> Figures:
  """Memory, time and communication of a step before it runs, as plain numbers.

  Args:
    compiled: From `lower.compile_step`.
    topology: The hardware.
    price: Price of a chip-hour, or None.

  Returns:
    A dict for `json.dump`. Times are in seconds and sizes in bytes, per device unless the name says
    otherwise. 'estimate' is 'schedule' for TPUs, whose compiler estimates cycles, and 'roofline'
    for GPUs.

  Raises:
    UserError: See `lower.text`.
  """
  c, chip = compiled.c, topology.chip
  assert chip is not None, "figures need a chip from the table"
  program = hlo.parse(lower.text(compiled))
  took = (_by_roofline if chip.gpu else _by_cycles)(program, compiled, chip)
  memory = _by_kind(compiled) | {
    "limit": chip.hbm_limit,
    "fits": compiled.memory.total <= chip.hbm_limit,
  }
  tokens = per_device.tokens_of_step(c)
  model_flops = metrics.flops_per_token(c.model, c.data.seq_len) * tokens / topology.num_devices
  seconds = took["seconds"]
  # `unhidden` and `host` are differences of two estimates: the figure of merit leaves them out.
  merit = sum(seconds[kind] for kind in ("matmul", "other", "unestimated", "exposed", "between"))
  step = sum(seconds.values())
  tokens_per_device = tokens / topology.num_devices
  of_run = tokens_of_run(c)
  # The stages of data.stages before the last one are taken to be as fast per token as that one.
  chip_hours = of_run / tokens * step * topology.num_chips / 3600
  return (
    _setup(compiled, topology)
    | {
      "memory": memory,
      "options": xla_options.options(
        compiled.mesh.devices.flat[0].device_kind, c.mesh.compiler_options
      ),
    }
    | took
    | {
      "model_flops": model_flops,
      "seconds": seconds | {"step": step},
      "merit": merit / tokens_per_device,
      "merit_of_all": (merit + seconds["kernels"]) / tokens_per_device,
      "merit_with_kernels": step / tokens_per_device,
      "mfu": model_flops / step / chip.clocked_flops,
      "hardware_utilisation": (took["matmul_flops"] + took["kernel_flops"])
      / step
      / chip.clocked_flops,
      "tokens_per_second": tokens / step,
      "tokens_per_second_per_chip": tokens / step / topology.num_chips,
      "steps": c.train.steps,
      "tokens": of_run,
      "stages_not_compiled": [list(stage) for stage in c.data.stages],
      "chip_hours": chip_hours,
      "cost": None if price is None else chip_hours * price,
      "compile_seconds": compiled.seconds,
    }
  )


def tokens_of_run(c: ml_collections.ConfigDict) -> int:
  """Tokens of all steps of a run, with the batches of `data.stages`."""
  return sum(
    per_device.tokens_of_step(own) * max(min(stage.end, c.train.steps) - stage.start, 0)
    for stage, own in stages.configs(c)
  )


def _setup(compiled: Compiled, topology: Topology) -> Figures:
  """The hardware and the settings of the config that matter most."""
  c, sizes, chip = compiled.c, compiled.mesh.shape, topology.chip
  return {
    "topology": topology.name,
    "chips": topology.num_chips,
    "devices": topology.num_devices,
    "chip": chip.name if chip else None,
    "mesh": dict(sizes),
    "attention": compiled.attention,
    "attention_in_training": lower.attention_forms(c, topology)[1],
    "pipeline": str(stacks.pipeline_of(c, sizes) or ""),
    "bubble": stacks.bubble(c, sizes),
    "batch_size": c.data.batch_size,
    "seq_len": c.data.seq_len,
    "accumulate": c.optim.accumulate,
    "remat": c.model.remat,
  }


def _by_kind(compiled: Compiled) -> Figures:
  """The memory of a step by kind, with saved activations separate from other temporaries.

  The compiler reports only the sum of the two. The activations are arithmetic.
  """
  c, memory = compiled.c, compiled.memory
  sizes, counts = dict(compiled.mesh.shape), per_device.count(c)
  found = memory_estimate.buffers(c, sizes, counts, form=compiled.attention)
  saved = min(int(sum(b.bytes for b in found if b.kind == "saved")), memory.temporaries)
  return memory._asdict() | {
    "activations": saved,
    "temporaries": memory.temporaries - saved,
    "total": memory.total,
  }


def _by_cycles(program: hlo.Program, compiled: Compiled, chip: Chip) -> Figures:
  """Figures from the schedule of the TPU compiler: seconds by kind, FLOPs, kernels, collectives."""
  share = time_estimate.visible_share(compiled.c, chip.attention_block, compiled.mesh.shape["seq"])
  room = per_device.grouped_room(compiled.c, compiled.mesh.shape)
  calls = cost_lib.of_program(program).calls
  kernels = kernels_lib.of_step(calls, chip, share, room)
  # Kernels have no cycles in the program, but they too hide the collectives next to them.
  cycles = {
    call: one.seconds * chip.clock / one.calls
    for call, one in zip(calls, kernels, strict=True)
    if one.calls
  }
  cost = cost_lib.of_program(
    program, chip.ici_bandwidth / chip.clock, cycles, chip.host_bandwidth / chip.clock
  )
  seconds = {
    "matmul": cost.cycles["matmul"] / chip.clock,
    "other": cost.cycles["other"] / chip.clock,
    "unestimated": cost.unestimated_seconds(chip.hbm_bandwidth, chip.clocked_flops),
    "kernels": sum(one.seconds for one in kernels),
    "exposed": cost.moved("exposed") / chip.ici_bandwidth,
    "unhidden": cost.unhidden_bytes / chip.ici_bandwidth,
    "between": cost.bytes("between") / chip.dcn_bandwidth,
    "host": cost.host_wait_cycles / chip.clock,
  }
  return {
    "estimate": "schedule",
    "seconds": seconds,
    "cycles": dict(cost.cycles),
    "unestimated": {kind: runs for kind, (runs, _, _) in sorted(cost.unestimated.items())},
    "matmul_flops": cost.flops,
    "kernel_flops": sum(one.flops for one in kernels),
    "kernels": {name: calls for name, (calls, _) in sorted(cost.kernels.items())},
    "kernel_calls": [one._asdict() for one in kernels],
    "collectives": [
      dict(zip(("opcode", "dtype", "phase"), key)) | {"calls": calls, "bytes": size}
      for key, (calls, size) in sorted(cost.collectives.items())
    ],
    "between_bytes": cost.bytes("between"),
    "exposed_bytes": cost.moved("exposed"),
    "overlapped_bytes": cost.moved("overlapped"),
    "host_bytes": dict(cost.host_bytes),
    "host_bandwidth": chip.host_bandwidth,
    "assumed_trips": cost.assumed_trips,
  }


def _by_roofline(program: hlo.Program, compiled: Compiled, chip: Chip) -> Figures:
  """The same figures for a GPU's program, from a roofline."""
  hosts = [device.process_index for device in compiled.mesh.devices.flat]
  roof = roofline.of_program(program, chip, hosts)
  return {
    "estimate": "roofline",
    "seconds": roof.seconds | {"between": 0.0, "unestimated": 0.0, "host": 0.0},
    "between_bytes": 0.0,
    "memory_traffic": roof.traffic,
    "matmul_flops": roof.flops,
    "kernel_flops": roof.kernel_flops,
    "kernels": dict(sorted(roof.kernels.items())),
    "collectives": [
      dict(zip(("opcode", "dtype", "link", "phase"), key)) | {"calls": calls, "bytes": size}
      for key, (calls, size) in sorted(roof.collectives.items())
    ],
    "link_bytes": {link: roof.bytes(link=link) for link in (roofline.NVLINK, roofline.NETWORK)},
    "exposed_bytes": roof.bytes("exposed"),
    "overlapped_bytes": roof.bytes("overlapped"),
    "host_bytes": {},
    "host_bandwidth": chip.host_bandwidth,
    "assumed_trips": roof.assumed_trips,
  }


def table(f: Figures) -> Iterator[str]:
  """Lines with the figures, for people.

  Args:
    f: From `figures`.
  """
  mesh = " x ".join(f"{axis} {size}" for axis, size in f["mesh"].items() if size > 1) or "1 device"
  halves = "" if f["devices"] == f["chips"] else f" ({f['devices']} devices)"
  kind = "chip" if f["estimate"] == "schedule" else "GPU"
  yield (
    f"{f['topology']}: {f['chips']} {kind}s{halves}, mesh {mesh}; {f['batch_size']} rows of "
    f"{f['seq_len']:,} tokens, accumulate {f['accumulate']}, remat {f['remat']}, attention "
    f"{f['attention']}; compiled in {f['compile_seconds']:.0f} s"
  )
  yield from lower.other_attention(f["attention"], f["attention_in_training"])
  if f["pipeline"]:
    yield f["pipeline"]
  yield from _memory_lines(f["memory"])
  yield from _time_lines(f)
  yield from _collective_lines(f)
  s = f["seconds"]
  yield ""
  yield (
    f"estimated step  {s['step']:.3f} s, MFU {f['mfu']:.1%}, hardware utilisation "
    f"{f['hardware_utilisation']:.1%}"
  )
  yield (
    f"throughput      {f['tokens_per_second_per_chip']:,.0f} tokens/s per {kind}, "
    f"{f['tokens_per_second']:,.0f} in total"
  )
  yield (
    f"the run         {f['steps']:,} steps, {f['tokens'] / 1e9:,.1f}B tokens, "
    f"{f['chip_hours'] / f['chips'] / 24:,.1f} days, {f['chip_hours']:,.0f} {kind}-hours"
    + ("" if f["cost"] is None else f", cost {f['cost']:,.0f}")
  )
  yield from _stage_lines(f)
  yield (
    f"figure of merit {f['merit_of_all'] * 1e6:.2f} device-µs per token, {f['merit'] * 1e6:.2f} "
    "without kernels"
  )
  options = " ".join(f"{name}={value}" for name, value in f["options"].items())
  yield f"XLA's options   {options or 'defaults'}"


def _stage_lines(f: Figures) -> Iterator[str]:
  """A line on the stages that were not compiled, if there are any."""
  if others := f["stages_not_compiled"]:
    shapes = ", ".join(f"{rows:,} x {length:,}" for _, rows, length in others)
    yield (
      f"data.stages     only the last, {f['batch_size']:,} rows x {f['seq_len']:,} tokens, is "
      f"compiled; not checked, and in the run at the same tokens/s: {shapes}"
    )


def of_this_machine(compiled: Compiled) -> Iterator[str]:
  """Lines with the memory of a program for this machine, whose rates are not in the chip table.

  Args:
    compiled: From `lower.compile_step`.
  """
  devices = list(compiled.mesh.devices.flat)
  yield (
    f"{len(devices)} x {devices[0].device_kind}, attention {compiled.attention}; compiled in "
    f"{compiled.seconds:.0f} s"
  )
  yield from _memory_lines(_by_kind(compiled) | {"limit": None})


def heaviest_lines(lines: Sequence[cost_lib.Line], chip: Chip) -> Iterator[str]:
  """Lines with a table of the heaviest instructions.

  Args:
    lines: From `cost.heaviest`.
    chip: The chip, for the peak rate.
  """
  yield ""
  yield "heaviest instructions: cycles per step, runs, share of the peak, results, place"
  for line in lines:
    share = line.flops / chip.flops_per_cycle / line.cycles
    place = "/".join(line.op_name.split("/")[-5:])
    yield (
      f"  {line.cycles / 1e6:>8.1f}M x{line.runs:<4} "
      + (f"{share:>4.0%}" if share else "    ")
      + f"  {line.shapes[:56]:<56}  {place[-70:] or line.name}"
    )


def _memory_lines(m: Figures) -> Iterator[str]:
  yield ""
  yield "HBM per device        GiB"
  names = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "average": "average (EMA)",
    "batch": "batch",
    "padding": "padding of these",
    "activations": "activations",
    "temporaries": "temporaries",
    "outputs": "results",
    "code": "program",
  }
  for key, name in names.items():
    if m[key] >= GIB / 1000:
      yield f"  {name:<18} {m[key] / GIB:>6.2f}"
  of = (
    f" of {m['limit'] / GIB:.2f}: {'fits' if m['fits'] else 'DOES NOT FIT'}" if m["limit"] else ""
  )
  yield f"  {'total':<18} {m['total'] / GIB:>6.2f}{of}"


def _time_lines(f: Figures) -> Iterator[str]:
  s = f["seconds"]
  by_schedule = f["estimate"] == "schedule"
  note = (
    "" if by_schedule else " (a roofline: everything at peak rates, without a compiler's schedule)"
  )
  yield ""
  yield f"time per step          s     details{note}"
  yield (
    f"  {'matmul':<14} {s['matmul']:>8.4f}     {f['matmul_flops']:.3g} FLOPs "
    f"(model: {f['model_flops']:.3g})"
    + (f", {f['cycles'].get('matmul', 0):.3g} cycles" if by_schedule else "")
  )
  yield (
    f"  {'other compute':<14} {s['other']:>8.4f}     "
    + (
      f"{f['cycles'].get('other', 0):.3g} cycles"
      if by_schedule
      else f"{f['memory_traffic']:.3g} bytes read and written"
    )
  )
  if s["unestimated"]:
    kinds = ", ".join(f"{runs:g} x {kind}" for kind, runs in f["unestimated"].items())
    yield (
      f"  {'no estimate':<14} {s['unestimated']:>8.4f}     {kinds}: libtpu estimates no cycles, "
      "assumed at the peak rates of memory and MXU, and may be wrong"
    )
  kernels = ", ".join(f"{calls:g} x {name}" for name, calls in f["kernels"].items()) or "none"
  rate = _kernel_source(f["kernel_calls"]) if by_schedule else ""
  yield f"  {'kernels':<14} {s['kernels']:>8.4f}     {kernels}{rate}"
  yield f"  {'exposed':<14} {s['exposed']:>8.4f}     {f['exposed_bytes']:.3g} bytes of collectives"
  yield (
    f"  {'not hidden':<14} {s['unhidden']:>8.4f}     of {f['overlapped_bytes']:.3g} bytes that "
    "overlap with compute"
  )
  if f["between_bytes"]:
    yield (
      f"  {'between slices':<14} {s['between']:>8.4f}     {f['between_bytes']:.3g} bytes over the "
      "data center network"
    )
  if f["host_bytes"] or "offload:" in f["remat"]:
    yield _host_line(f)
  if f["assumed_trips"]:
    loops = ", ".join(f"{name} x {runs}" for name, runs in sorted(f["assumed_trips"].items()))
    yield (
      "  these times may be far off: the program does not say how often loops run; assumed: "
      + loops
    )


def _host_line(f: Figures) -> str:
  """The line on transfers to the host's memory and back."""
  if not f["host_bytes"]:
    return (
      f"  {'host':<14}     ?        transfers were not found in the program, and are not counted"
    )
  moved = ", ".join(f"{size:.3g} bytes {way}" for way, size in sorted(f["host_bytes"].items()))
  rate = f["host_bandwidth"]
  return f"  {'host':<14} {f['seconds']['host']:>8.4f}     {moved}" + (
    f" at {rate / 1e9:.0f} GB/s per direction; the step's wait for these transfers"
    if rate
    else "; not counted: the chip table has no bandwidth to the host"
  )


def _kernel_source(kernels: Sequence[Figures]) -> str:
  """Where the seconds of the kernels come from, as the end of a line."""
  counted = sum(one["cycles"] for one in kernels)
  assumed = [one for one in kernels if one["source"] == kernels_lib.ASSUMED]
  text = f", {counted:.3g} cycles" if counted else ""
  grouped = [one for one in kernels if one["source"] == kernels_lib.GROUPED]
  if grouped:
    text += f"; {sum(k['seconds'] for k in grouped):.4f} s of experts at an even load and "
    text += f"{kernels_lib.GROUPED_RATE:.0%} of peak"
  if assumed:
    part = "" if len(assumed) == len(kernels) else f"{sum(k['seconds'] for k in assumed):.4f} s "
    text += f"; {part}assumed at {kernels_lib.ASSUMED_RATE:.0%} of peak: {assumed[0]['reason']}"
  return text


def _collective_lines(f: Figures) -> Iterator[str]:
  yield ""
  yield "collectives per step" + (
    ", and the bytes that each GPU sends" if "link_bytes" in f else ""
  )
  for row in f["collectives"]:
    if row["bytes"] >= 1e6:
      link = f"{row['link']:<8} " if "link" in row else ""
      yield (
        f"  {row['opcode']:<18} {row['dtype']:<5} {link}{row['phase']:<10} {row['calls']:>6} "
        f"{row['bytes'] / 1e9:>9.3f} GB"
        + (" at an even load" if row["opcode"] == "ragged-all-to-all" else "")
      )
