"""Metric writers: the terminal, JSONL and CSV in the run folder, TensorBoard, W&B and MLflow.

A writer is a subclass of `MetricWriter` and an entry of `WRITERS` that says which configs turn it
on. docs/extending.md shows how to add one. Writers get metrics in the order of the imports below.
"""

# isort: off
from jaxgpt.run.metric_writers.writer import WRITERS, Entry, MetricWriter, Run, Sample
from jaxgpt.run.metric_writers.files import CSV, JSONL, Csv, Jsonl, kept_until, read, record
from jaxgpt.run.metric_writers.samples import SAMPLES, Samples, read_samples
from jaxgpt.run.metric_writers.trackers import MLflow, TensorBoard, WandB
from jaxgpt.run.metric_writers.terminal import Terminal
from jaxgpt.run.metric_writers.opening import Writers, check_options, make
# isort: on

__all__ = [
  "CSV",
  "JSONL",
  "SAMPLES",
  "WRITERS",
  "Csv",
  "Entry",
  "Jsonl",
  "MLflow",
  "MetricWriter",
  "Run",
  "Sample",
  "Samples",
  "TensorBoard",
  "Terminal",
  "WandB",
  "Writers",
  "check_options",
  "kept_until",
  "make",
  "read",
  "read_samples",
  "record",
]
