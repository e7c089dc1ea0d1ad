"""Files to decontaminate from: each has an account, and one without effect is an error."""

import json

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.prepare import prepare

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi".split()  # noqa: SIM905


def sentence(i):
  return " ".join(f"{word}{chr(97 + i % 26)}{chr(97 + i // 26)}" for word in WORDS)


def jsonl(path, texts, column="text"):
  path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
  return path


@pytest.fixture
def run(tmp_path):
  corpus = jsonl(tmp_path / "in.jsonl", map(sentence, range(60)))

  def prepared(*benchmarks, **options):
    lines = []
    manifest = prepare.prepare(
      [corpus],
      tmp_path / "out",
      overwrite=True,
      report=lines.append,
      decontaminate=[str(path) for path in benchmarks],
      **({"tokenizer": "bytes", "validation": 0, "test": 0} | options),
    )
    return manifest, lines

  return prepared


def test_every_file_has_an_account(tmp_path, run):
  bench = tmp_path / "bench"
  bench.mkdir()
  jsonl(bench / "a.jsonl", map(sentence, range(5)))
  with (bench / "a.jsonl").open("a") as f:
    f.write('broken\n{"question": "x"}\n')
  (bench / "b.json").write_text(json.dumps({"data": [{"text": sentence(7)}, {"id": 3}]}))
  (bench / "c.pdf").write_text("x")
  manifest, lines = run(bench)
  assert manifest["dropped"] == {"contaminated": 6}
  about = [line.removeprefix(f"{bench}: ") for line in lines if line.startswith(f"{bench}: ")]
  assert about[0] == "passed over: 1 with suffix .pdf, such as bench/c.pdf"
  assert about[1] == "6 documents to look for"
  assert "dropped 1 by rule 'invalid json', such as" in about
  assert "dropped 2 by rule 'missing field', such as" in about
  assert f"6 training documents share runs of words with {bench}" in lines


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.jsonl", json.dumps({"question": "x"}), "no 'text' in 'question'"),
    ("a.jsonl", json.dumps({"text": ["x"]}), "text is a list, not a string"),
    ("a.json", json.dumps([{"question": "x"}]), "no 'text' in 'question'"),
    ("a.json", json.dumps({"data": [{"question": "x"}]}), "no 'text' in 'question'"),
    ("a.csv", "question,answer\nx,y\n", "no column 'text'"),
    ("a.jsonl", "", "it is empty"),
    ("a.txt", " ", "no text but white space"),
    ("a.txt", "\0", "byte 0 is 0"),
    ("a.txt", "too few words", "nothing to look for: .* fewer than 13 words"),
  ],
)
def test_a_file_without_a_text_is_an_error(tmp_path, run, name, content, message):
  (tmp_path / name).write_text(content)
  jsonl(tmp_path / "good.jsonl", [sentence(1)])
  with pytest.raises(UserError, match=message) as e:
    run(tmp_path / "good.jsonl", tmp_path / name)
  assert name in str(e.value) and "\n" not in str(e.value)
  assert "decontaminate" in str(e.value)


def test_a_file_among_others_of_a_folder_is_an_error_too(tmp_path, run):
  (tmp_path / "bench").mkdir()
  jsonl(tmp_path / "bench" / "a.jsonl", [sentence(1)])
  jsonl(tmp_path / "bench" / "b.jsonl", [sentence(2)], "question")
  with pytest.raises(UserError, match=r"bench/b.jsonl: no text .*--decontaminate-field"):
    run(tmp_path / "bench")
  manifest, _ = run(tmp_path / "bench" / "b.jsonl", decontaminate_field="question")
  assert manifest["dropped"] == {"contaminated": 1}


def test_runs_that_are_all_common_leave_nothing_to_look_for(tmp_path, run):
  jsonl(tmp_path / "bench.jsonl", [sentence(1)] * 20)
  with pytest.raises(UserError, match="more than 10 others.*common=0"):
    run(tmp_path / "bench.jsonl")
  manifest, _ = run(tmp_path / "bench.jsonl", decontaminate_options="common=0")
  assert manifest["dropped"] == {"contaminated": 1}


def test_held_out_without_held_out_documents_is_an_error(tmp_path, run):
  with pytest.raises(UserError, match="no document is held out"):
    run("held-out")


def test_a_file_called_like_a_split_does_not_replace_it(tmp_path, run, monkeypatch):
  monkeypatch.chdir(tmp_path)
  jsonl(tmp_path / "validation", [sentence(1)])
  _, lines = run("held-out", "validation", validation=0.3, decontaminate_options="words=5")
  said = [line.rpartition(" ")[2] for line in lines if "share runs of words with" in line]
  assert said == ["validation", "test", "./validation"]
