"""`jaxgpt data inspect` and `data show` print the content of the batch."""

import json

import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.run import run_folder
from jaxgpt.text.prepare import prepare
from jaxgpt.text.tokenizers import tokenizer
from jaxgpt.training import batches as batches_lib


@pytest.fixture
def run(tmp_path, tiny):
  """A function (overrides) -> a run folder as it is before step 0, and its resolved config."""

  def make(**over):
    c = config.resolve(tiny(data__batch_size=4, **over), 300)
    mesh = mesh_lib.make(c.mesh)
    digest = batches_lib.split_batches(c, "train").digest
    run_folder.enter(tmp_path / "run", c, {}, mesh, digest, tokenizer.ByteTokenizer())
    return str(tmp_path / "run"), c

  return make


def command(capsys, *args):
  code = main.main(["data", *args])
  return code, capsys.readouterr()


def test_each_row_of_a_step_names_its_documents_and_shows_its_text(run, capsys):
  folder, c = run()
  code, out = command(capsys, "inspect", folder, "--step=3", "--chars=0")
  assert code == 0
  b = batches_lib.split_batches(c, "train")
  assert "step 3 of" in out.out and "epochs before it: data" in out.out
  parts = out.out.split("\nrow ")[1:]
  assert len(parts) == 4
  for part, row, tokens in zip(parts, b.rows(3), b.batch(3)["tokens"], strict=True):
    split, pack = b.sources[0].split, b.sources[0].pack
    for doc, start, n in zip(*pack.spans(row.row), strict=True):
      assert (
        f"{split.source_name(doc)} (document {doc}), tokens {start} to {start + n} of "
        f"{split.lengths[doc] + 1}"
      ) in part
    text = tokenizer.ByteTokenizer().decode(tokens)
    shown = "\n".join(line[6:] for line in part.splitlines() if line.startswith("    | "))
    for word in text.split()[:3]:
      assert word in shown
    assert "learned" not in part, "all of it is"
  code, one = command(capsys, "inspect", folder, "--step=3", "--chars=0", "--row=2")
  assert one.out.split("\nrow ")[1].strip() == parts[2].strip()


def test_masks_are_shown_with_what_they_hide(run, capsys):
  folder, c = run(objective__name="masked_lm", model__causal=False)
  code, out = command(capsys, "inspect", folder, "--step=0", "--row=0", "--chars=0")
  assert code == 0
  batch = batches_lib.split_batches(c, "train").batch(0)
  hidden = batch["tokens"][0] == tokenizer.ByteTokenizer().mask_id
  assert out.out.count("<mask>") == hidden.sum() > 0
  assert "    to guess: '" in out.out


def test_long_texts_are_shortened(run, capsys):
  folder, _ = run()
  _, out = command(capsys, "inspect", folder, "--step=0", "--chars=5")
  assert "more characters)" in out.out


def test_rows_and_data_that_are_not_the_runs(run, tmp_path, capsys):
  folder, _ = run()
  code, out = command(capsys, "inspect", folder, "--step=0", "--row=4")
  assert code == 2 and "--row=4: the rows of a step are 0 to 3" in out.err
  (tmp_path / "x.txt").write_text("other words " * 400)
  prepare.prepare(tmp_path / "x.txt", tmp_path / "other", tokenizer="bytes")
  code, out = command(capsys, "inspect", folder, "--step=0", f"--data={tmp_path / 'other'}")
  assert code == 2 and "is not the data of this run" in out.err


def test_rows_of_labelled_data(tmp_path, capsys):
  kinds = {
    "chat": {
      "messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    },
    "classification": {"text": "abc", "text_pair": "de", "label": "good"},
    "preference": {"prompt": "abc", "chosen": "de", "rejected": "fg"},
  }
  said = {}
  for kind, record in kinds.items():
    (tmp_path / f"{kind}.jsonl").write_text((json.dumps(record) + "\n") * 20)
    prepare.prepare(
      tmp_path / f"{kind}.jsonl",
      tmp_path / kind,
      tokenizer="bytes",
      kind=kind,
      validation=0,
      test=0,
    )
    code, out = command(capsys, "show", str(tmp_path / kind), "--rows=2", "--seq-len=40")
    assert code == 0
    said[kind] = out.out
    assert out.out.count("\nrow ") == 2
  assert "| <s><|user|>abc<|end|><|assistant|>«de<|end|>»" in said["chat"]
  assert "learned: 'de<|end|>'" in said["chat"]
  assert "label good (class 0)\n    | <s>abc</s>\n    | de</s>" in said["classification"]
  assert "| <s>abc«de</s>»\n    learned: 'de</s>'" in said["preference"]
  assert "rejected: " in said["preference"] and "| <s>abc«fg</s>»" in said["preference"]


def test_a_file_of_the_name_of_a_command(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "show").write_text("some text")
  code, out = command(
    capsys,
    "./show",
    "--out=data",
    "--tokenizer=bytes",
    "--validation=0",
    "--test=0",
    "--format=text",
    "--executor=process",
  )
  assert code == 0, out.err
  with pytest.raises(SystemExit):
    main.main(["data", "inspect", "--help"])
  assert "jaxgpt data inspect" in capsys.readouterr().out


def test_a_text_in_words_ends_at_its_last_token(tmp_path, capsys):
  (tmp_path / "words.conll").write_text("Ada B-PER\nlived O\n")
  folder = str(tmp_path / "out")
  assert (
    main.main(
      ["data", str(tmp_path / "words.conll"), f"--out={folder}", "--kind=tagging"]
      + ["--tokenizer=bytes", "--validation=0", "--test=0"]
    )
    == 0
  )
  capsys.readouterr()
  code, out = command(capsys, "show", folder, "--rows=1", "--seq-len=32")
  assert code == 0
  # Nine bytes, and the beginning and the end of the text. A row of tags has no shifted targets.
  assert "tokens 0 to 10 of 11\n    | Ada [B-PER] lived [O]" in out.out
