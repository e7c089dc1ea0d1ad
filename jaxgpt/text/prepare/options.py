"""The options of a preparation: arguments of `prepare.prepare` and of `jaxgpt data`."""

import dataclasses
import json
from typing import Any

from jaxgpt.config import options
from jaxgpt.config.options import Group, key_value, option
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import splits
from jaxgpt.text.readers import kinds

READING = Group("reading")
CLEANING = Group("cleaning")
TOKENS = Group("splits and tokens")
EXECUTION = Group("execution")

EXECUTORS = ("process", "local", "slurm", "ray")  # see `executors.make`

_TEMPLATED = ("chat", "preference")  # kinds that a chat template turns into text


def _character(text: str) -> str:
  return {"tab": "\t", "\\t": "\t"}.get(text, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The choices that decide the content of a prepared folder. Each has a default."""

  kind: str = option(
    "text",
    choices=tuple(kinds.KINDS),
    metavar="KIND",
    group=READING,
    help=f"kind of the documents: {' | '.join(kinds.KINDS)}",
  )
  fields: tuple[tuple[str, str], ...] = option(
    (),
    flag="field",
    metavar="NAME=COLUMN",
    parse=key_value(),
    group=READING,
    help="column of text, id, text_pair, label, labels, input, target, messages, prompt, chosen, "
    "rejected, words, tags, question, context, answers, query or positive, if it has another name",
  )
  labels: str = option(
    "",
    metavar="A,B,C|numbers",
    group=READING,
    unset="classes by their numbers, then by their letters; numbers with a fraction are a "
    "regression",
    help="the classes in order, for kinds classification, multi_label and tagging; or, for kind "
    "classification, numbers for a regression",
  )
  format: str | None = option(
    None,
    group=READING,
    unset="by the suffix of each file",
    help="format of all files: text, jsonl, csv, parquet, …",
  )
  encoding: str | None = option(
    None,
    metavar="NAME",
    group=READING,
    unset="UTF-8, or as a byte order mark tells",
    help="encoding of text, such as latin-1, cp1252, utf-16-le or shift_jis",
  )
  delimiter: str | None = option(
    None,
    metavar="CHARACTER",
    parse=_character,
    group=READING,
    unset="a comma",
    help="character between the fields of .csv files, such as ';', '|' or tab",
  )
  exclude: tuple[str, ...] = option(
    (), metavar="PATTERN", group=READING, help="shell pattern of files and folders to leave out"
  )
  max_record_bytes: int = option(
    kinds.MAX_BYTES,
    least=1024,
    below=1 << 31,
    group=READING,
    help="longest record; longer records are dropped, longer text files are cut",
  )
  max_errors: int | None = option(
    None, least=0, group=READING, unset="no limit", help="give up after this many broken records"
  )
  examples: int = option(
    kinds.EXAMPLES,
    least=0,
    metavar="N",
    group=READING,
    help="dropped documents to name for each rule",
  )
  clean: tuple[str, ...] = option(
    (),
    metavar="STEP[:KEY=VALUE,…]",
    group=CLEANING,
    help="cleaning step, such as ftfy, html, length:min_chars=200 or gopher_quality; steps run in "
    "the given order",
  )
  dedup: tuple[str, ...] = option(
    (),
    metavar="exact|near[:KEY=VALUE,…]",
    group=CLEANING,
    help="remove duplicates: exact ones, or near ones such as near:threshold=0.65",
  )
  decontaminate: tuple[str, ...] = option(
    (),
    metavar="PATH|held-out",
    group=CLEANING,
    help="remove training documents that share runs of words with these files, or with the "
    "validation and test splits (held-out)",
  )
  decontaminate_options: str = option(
    "",
    metavar="KEY=VALUE,…",
    group=CLEANING,
    help="settings of --decontaminate, such as words=13,runs=1,share=0,common=10,remove=true",
  )
  decontaminate_field: str = option(
    "text",
    metavar="COLUMN",
    group=CLEANING,
    help="column that holds the text in the files of --decontaminate",
  )
  validation: tuple[float | str, ...] = option(
    (),
    metavar="SHARE|PATH",
    parse=splits.parse,
    group=TOKENS,
    unset="0.05; 0 if --test names files",
    help="share of the documents in the validation split, or files that are the split",
  )
  test: tuple[float | str, ...] = option(
    (),
    metavar="SHARE|PATH",
    parse=splits.parse,
    group=TOKENS,
    unset="0.05; 0 if --validation names files",
    help="share of the documents in the test split, or files that are the split",
  )
  split_by: str = option(
    "",
    metavar="COLUMN",
    group=TOKENS,
    unset="the text",
    help="column whose value decides a document's split: all documents of one value share it",
  )
  salt: str = option(
    "", group=TOKENS, help="any text; another salt moves other documents into the held-out splits"
  )
  cut_chars: int | None = option(
    None,
    least=0,
    metavar="N",
    group=TOKENS,
    unset="cut only if there are too few documents to hold some out",
    help="cut documents into pieces of about N characters, at line ends; 0: never; kind text only",
  )
  tokenizer: str = option(
    "sentencepiece:4096",
    metavar="SPEC",
    group=TOKENS,
    help="bytes | sentencepiece:SIZE[:bpe|unigram|char] (trained on the data) | a .model, "
    ".tiktoken or tokenizer.json file | a folder with one of these | a prepared folder",
  )
  template: str = option(
    "",
    group=TOKENS,
    unset="the first that fits the tokenizer",
    help="chat template for kinds chat and preference: simple, chatml, llama3, gemma, …, or "
    "tokenizer for the template that came with the tokenizer",
  )
  template_variables: tuple[tuple[str, Any], ...] = option(
    (),
    flag="template-variable",
    metavar="NAME=VALUE",
    parse=key_value(json.loads),
    group=TOKENS,
    help="variable of the template that came with the tokenizer, such as enable_thinking=false; a "
    "conversation's own column chat_template_kwargs comes first",
  )
  train_on: str = option(
    "all",
    choices=("all", "last"),
    group=TOKENS,
    help="assistant's messages of a chat to train on: all, or those after the last user's message",
  )
  sample_bytes: int = option(
    4_000_000, least=1, group=TOKENS, help="bytes of training text to train a tokenizer on"
  )
  symbols: tuple[str, ...] = option(
    (),
    flag="symbol",
    metavar="TEXT",
    group=TOKENS,
    help="text that a trained tokenizer keeps as one token",
  )
  max_unknown: float | None = option(
    None,
    least=0,
    most=1,
    group=TOKENS,
    unset="no limit, but a warning above 0.01",
    help="give up if more than this share of the tokens is the unknown token",
  )
  shard_tokens: int = option(
    1 << 27, least=1, group=TOKENS, help="tokens after which a task starts another shard"
  )
  task_bytes: int = option(
    16_000_000,
    least=1,
    group=EXECUTION,
    help="approximate bytes of input per task; at most 512 tasks",
  )

  def __post_init__(self) -> None:
    for name in ("validation", "test"):
      object.__setattr__(self, name, splits.normal(name, getattr(self, name)))
    options.check(self)
    splits.check(bool(self.own_files), self.shares, self.split_by)
    if self.cut_chars and self.kind != "text":
      raise UserError(
        f"cut_chars={self.cut_chars} is for kind=text: an example of kind={self.kind} cannot be "
        "cut; leave it out"
      )
    if self.labels and self.kind not in kinds.LABELLED:
      raise UserError(
        f"labels={self.labels!r} is for kind={' or '.join(kinds.LABELLED)}, not for "
        f"kind={self.kind}; leave it out"
      )
    if self.labels == "numbers" and self.kind != "classification":
      raise UserError(
        f"labels=numbers, a regression, is for kind=classification, not for kind={self.kind}; name "
        "the classes in order, or leave it out"
      )
    if self.template and self.kind not in _TEMPLATED:
      raise UserError(
        f"template={self.template!r} is for kind=chat and preference, not for kind={self.kind}; "
        "leave it out"
      )
    if self.template_variables and self.kind not in _TEMPLATED:
      name, value = self.template_variables[0]
      raise UserError(
        f"template_variables={name}={value} are for kind=chat and preference, not for "
        f"kind={self.kind}; leave them out"
      )
    if self.train_on != "all" and self.kind != "chat":
      raise UserError(
        f"train_on={self.train_on!r} is for kind=chat, not for kind={self.kind}; leave it out"
      )
    if self.decontaminate_options and not self.decontaminate:
      raise UserError(
        f"decontaminate_options={self.decontaminate_options!r} needs decontaminate=PATH or "
        "decontaminate=held-out: add it"
      )
    if self.decontaminate_field != "text" and not self.decontaminate:
      raise UserError(
        f"decontaminate_field={self.decontaminate_field!r} needs decontaminate=PATH: add it"
      )

  @property
  def shares(self) -> splits.Shares:
    """The shares of the held-out splits: 0 for one with files of its own."""
    return splits.shares(self.validation, self.test)

  @property
  def own_files(self) -> dict[str, list[str]]:
    """{held-out split: the paths of its own files}, of the splits that have some."""
    given = {"test": self.test, "validation": self.validation}
    own = {name: splits.own_paths(value) for name, value in given.items()}
    return {name: paths for name, paths in own.items() if paths}
