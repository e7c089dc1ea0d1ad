"""`jaxgpt data` from end to end for each kind of data, with the documents that it drops."""

import json
import pickle
import random
import xml.etree.ElementTree

import numpy as np
import pytest

from jaxgpt.commands import main
from jaxgpt.data import source
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import data_card, prepare, shards, splits
from jaxgpt.text.prepare.tasks import reading
from jaxgpt.text.readers import documents
from jaxgpt.text.tokenizers import tokenizer

WORDS = ["".join(chr(97 + (7 * i + j * j) % 26) for j in range(3 + i % 5)) for i in range(200)]


def sentence(i, words=30):
  """Words in an order that no two sentences share for long."""
  return " ".join(random.Random(i).choices(WORDS, k=words))


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def run(tmp_path, rows, *more):
  write(tmp_path / "in.jsonl", rows)
  code = main.main(
    ["data", str(tmp_path / "in.jsonl"), f"--out={tmp_path}/out", "--tokenizer=bytes", *more]
  )
  assert code == 0
  return shards.read_manifest(tmp_path / "out")


def texts(folder, split):
  t, s = tokenizer.load(folder), source.open_split(folder, split)
  return [t.decode(s.read(i, 0, int(n) + 1)) for i, n in enumerate(s.lengths)]


def test_classification(tmp_path):
  rows = [{"sentence": sentence(i), "other": sentence(i + 1), "stars": i % 3} for i in range(80)]
  manifest = run(
    tmp_path,
    rows,
    "--kind=classification",
    "--field=text=sentence",
    "--field=text_pair=other",
    "--field=label=stars",
  )
  assert manifest["kind"] == "classification" and manifest["label_names"] == ["0", "1", "2"]
  split = source.open_split(tmp_path / "out", "train")
  by_text = {f"{row['sentence']}{row['other']}": row["stars"] for row in rows}
  assert len(split.labels) == len(split.second) == split.num_documents
  for text, label in zip(texts(tmp_path / "out", "train"), split.labels):
    assert by_text[text] == label
  data_card = json.loads((tmp_path / "out" / "card.json").read_text())
  assert sum(data_card["labels"].values()) == split.num_documents


def test_labels_that_are_floats_are_a_regression(tmp_path):
  manifest = run(
    tmp_path, [{"text": sentence(i), "label": i / 7} for i in range(60)], "--kind=classification"
  )
  assert manifest["label_names"] == []


def write_csv(path, rows):
  lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
  path.write_text("\n".join(lines) + "\n")
  return path


def test_a_csv_and_a_jsonl_number_their_classes_alike(tmp_path, capsys):
  rows = [{"text": sentence(i), "label": (10, 9, 1)[i % 3]} for i in range(60)]
  write_csv(tmp_path / "in.csv", rows)
  found = [run(tmp_path, rows, "--kind=classification")]
  said = capsys.readouterr().out
  assert "labels: 3 classes in this order: 1 (20), 9 (20), 10 (20)" in said
  more = ["--kind=classification", "--tokenizer=bytes", f"--out={tmp_path}/b"]
  assert main.main(["data", str(tmp_path / "in.csv"), *more]) == 0
  found.append(shards.read_manifest(tmp_path / "b"))
  assert [m["label_names"] for m in found] == [["1", "9", "10"]] * 2


def test_classes_in_an_order_of_your_own(tmp_path, capsys):
  rows = [{"text": sentence(i), "label": ("bad", "good")[i % 2]} for i in range(60)]
  given = ["--kind=classification", "--labels=good,bad"]
  assert run(tmp_path, rows, *given)["label_names"] == ["good", "bad"]
  split = source.open_split(tmp_path / "out", "train")
  by_text = {row["text"]: row["label"] for row in rows}
  found = zip(texts(tmp_path / "out", "train"), split.labels)
  assert all(by_text[text] == ("good", "bad")[int(label)] for text, label in found)
  rows[7]["label"] = "godo"
  write(tmp_path / "in.jsonl", rows)
  args = ["data", str(tmp_path / "in.jsonl"), f"--out={tmp_path}/c", "--tokenizer=bytes", *given]
  assert main.main(args) == 2
  assert "'godo' (in.jsonl:8)" in capsys.readouterr().err
  assert main.main(["data", str(tmp_path / "in.jsonl"), f"--out={tmp_path}/d", given[1]]) == 2
  assert "is for kind=classification" in capsys.readouterr().err


def test_one_number_with_a_fraction_among_classes_needs_a_word(tmp_path, capsys):
  rows = [{"text": sentence(i), "label": i % 2} for i in range(60)]
  rows[33]["label"] = 0.5
  write(tmp_path / "in.jsonl", rows)
  args = ["data", str(tmp_path / "in.jsonl"), "--tokenizer=bytes", "--kind=classification"]
  assert main.main([*args, f"--out={tmp_path}/a"]) == 2
  said = capsys.readouterr().err
  assert "1 are with a fraction, such as '0.5' in in.jsonl:34, and 59 are whole numbers" in said
  assert main.main([*args, f"--out={tmp_path}/a", "--labels=numbers"]) == 0
  assert shards.read_manifest(tmp_path / "a")["label_names"] == []


def test_a_row_without_a_label_is_counted(tmp_path):
  rows = [{"text": sentence(i), "label": "ab"[i % 2]} for i in range(60)]
  rows[3]["label"] = " "
  manifest = run(tmp_path, rows, "--kind=classification")
  assert manifest["label_names"] == ["a", "b"] and manifest["dropped"] == {"wrong type": 1}


def test_one_text_with_two_labels_is_no_duplicate(tmp_path, capsys):
  rows = [{"text": sentence(i), "label": "ab"[i % 2]} for i in range(50)]
  rows += [{"text": rows[4]["text"], "label": "a"}, {"text": rows[4]["text"] + " ", "label": "b"}]
  manifest = run(tmp_path, rows, "--kind=classification", "--dedup=exact")
  assert manifest["dropped"] == {"duplicate": 1} and manifest["kept"] == 51
  said = capsys.readouterr().out
  assert "1 texts have more than one label" in said
  assert "such as in.jsonl:5 and in.jsonl:52" in said


@pytest.mark.parametrize(
  "kind, row, learned",
  [
    ("seq2seq", {"input": "question", "target": "answer"}, "answer"),
    (
      "chat",
      {
        "messages": [
          {"role": "user", "content": "question"},
          {"role": "assistant", "content": "answer"},
        ]
      },
      "answer",
    ),
  ],
)
def test_what_is_learned_of_a_kind(tmp_path, kind, row, learned):
  manifest = run(tmp_path, [row, *[row] * 60], f"--kind={kind}", "--validation=0", "--test=0")
  assert manifest["chat_template"] == ("simple" if kind == "chat" else None)
  split, t = source.open_split(tmp_path / "out", "train"), tokenizer.load(tmp_path / "out")
  ((start, end),) = split.trained(3)
  assert t.decode(split.read(3, int(start), int(end - start))) == learned


def test_conversations_that_a_template_has_no_place_for_are_counted(tmp_path):
  def row(role, i):
    return {
      "messages": [
        {"role": role, "content": "question"},
        {"role": "assistant", "content": f"answer {i}"},
      ]
    }

  manifest = run(
    tmp_path,
    [row("narrator" if i % 3 == 0 else "user", i) for i in range(60)],
    "--kind=chat",
    "--validation=0",
    "--test=0",
  )
  assert manifest["dropped"] == {"chat template": 20}
  assert (manifest["read"], manifest["kept"]) == (60, 40)
  split = source.open_split(tmp_path / "out", "train")
  assert split.num_documents == 40
  data_card = json.loads((tmp_path / "out" / "card.json").read_text())
  first = data_card["dropped"]["chat template"]["examples"][0]
  assert "no place for a message of role 'narrator'" in first
  assert split.source_name(0).endswith(":2"), "the others keep their order"


def test_conversations_in_which_nothing_is_learned_are_counted_and_left_out(tmp_path):
  ask, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
  chats = [[ask, answer], [ask], [ask, {**answer, "weight": 0}], [ask, {**answer, "weight": None}]]
  manifest = run(
    tmp_path,
    [{"messages": chats[i % 4]} for i in range(60)],
    "--kind=chat",
    "--validation=0",
    "--test=0",
  )
  assert manifest["dropped"] == {"nothing learned": 30}
  assert (manifest["read"], manifest["kept"]) == (60, 30)
  split = source.open_split(tmp_path / "out", "train")
  assert split.num_documents == 30 and all(len(split.trained(i)) for i in range(30))
  examples = json.loads((tmp_path / "out" / "card.json").read_text())["dropped"]["nothing learned"]
  assert ".jsonl:2: no token is trained on" in examples["examples"][0]


def test_pairs_without_a_better_answer_or_out_of_order_are_counted_and_left_out(tmp_path):
  ask, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
  better = {"role": "assistant", "content": "a better answer"}
  rows = [
    {"prompt": "q", "chosen": "yes", "rejected": "no"},
    {"prompt": "q", "chosen": "yes", "rejected": "yes"},
    {"prompt": [ask], "chosen": [better], "rejected": [answer]},
    {"prompt": [ask], "chosen": [answer], "rejected": [answer]},
    {"prompt": [ask, answer], "chosen": [better], "rejected": [answer]},
  ]
  manifest = run(tmp_path, rows * 6, "--kind=preference", "--validation=0", "--test=0")
  assert manifest["dropped"] == {"equal answers": 12, "chat template": 6}
  assert (manifest["read"], manifest["kept"]) == (30, 12)
  data_card = json.loads((tmp_path / "out" / "card.json").read_text())
  [example, *_] = data_card["dropped"]["chat template"]["examples"]
  assert "ends with a message of role 'assistant', which chosen follows with another" in example


def test_preferences_are_pairs(tmp_path):
  rows = [
    {"prompt": f"{sentence(i, 4)}\n", "chosen": f"yes {i}", "rejected": "no"} for i in range(60)
  ]
  manifest = run(tmp_path, rows, "--kind=preference", "--validation=0", "--test=0")
  assert manifest["kept"] == 60 and manifest["total"]["documents"] == 120
  got = texts(tmp_path / "out", "train")
  assert got == [r["prompt"] + r[k] for r in rows for k in ("chosen", "rejected")]
  assert manifest["total"]["bytes"] == sum(len(text) for text in got)


def test_preferences_of_messages(tmp_path):
  def answer(content):
    return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": content}]

  rows = [
    {"prompt": "Why?", "chosen": answer(f"é {i}"), "rejected": answer("no")} for i in range(20)
  ]
  rows += [
    {"chosen": answer("x"), "rejected": "x"},  # neither the one nor the other
    {"chosen": answer("x")[:1], "rejected": answer("x")[:1]},
  ]
  manifest = run(
    tmp_path,
    rows,
    "--kind=preference",
    "--validation=0",
    "--test=0",
    "--clean=unicode",
    "--template=simple",
  )
  assert manifest["dropped"] == {"wrong type": 1, "chat template": 1}
  assert (manifest["kept"], manifest["chat_template"]) == (20, "simple")
  split, t = source.open_split(tmp_path / "out", "train"), tokenizer.load(tmp_path / "out")
  for i, want in ((0, "é 0"), (1, "no")):
    ((start, end),) = split.trained(i)
    ids = split.read(i, int(start), int(end - start))
    assert (t.decode(ids[:-1]), ids[-1]) == (want, t.special_ids["<|end|>"])
  assert manifest["total"]["bytes"] == sum(
    8 + len(f"é {i}".encode()) + len("no") for i in range(20)
  )


def test_the_account_adds_up_and_names_its_rules(tmp_path):
  bench = [sentence(1000 + i) for i in range(3)]
  write(tmp_path / "bench.jsonl", [{"q": text} for text in bench])
  unique = [sentence(i) for i in range(400)]
  rows = [{"text": text} for text in unique]
  rows += [{"text": text} for text in unique[:25]]  # exact duplicates
  rows += [{"text": f"before that, {text} and so on"} for text in bench] * 1
  rows += [{"text": "short"}] * 4 + [{"body": "x"}] * 3 + [{"text": " "}] * 2
  manifest = run(
    tmp_path,
    rows,
    "--clean=length:min_chars=20",
    "--dedup=exact",
    "--task-bytes=9000",
    "--executor=process",
    f"--decontaminate={tmp_path}/bench.jsonl",
    "--decontaminate-field=q",
  )
  held_out = sum(manifest["splits"][split]["documents"] for split in ("validation", "test"))
  assert held_out > 10
  assert manifest["dropped"] == {
    "duplicate": 25,
    "missing field": 3,
    "empty": 2,
    "length: too few characters": 4,
    "contaminated": manifest["dropped"]["contaminated"],
  }
  assert 1 <= manifest["dropped"]["contaminated"] <= 3
  assert manifest["read"] == len(rows) == manifest["kept"] + sum(manifest["dropped"].values())
  train = texts(tmp_path / "out", "train")
  assert not any(text in t for t in train for text in bench)
  assert len(set(train)) == len(train)


def test_training_documents_that_share_runs_with_held_out_ones_go(tmp_path):
  unique = [sentence(i) for i in range(300)]
  longer = [f"{text} {sentence(5000 + i)}" for i, text in enumerate(unique)]
  manifest = run(
    tmp_path,
    [{"text": text} for text in unique + longer],
    "--validation=0.2",
    "--decontaminate=held-out",
    "--task-bytes=20000",
    "--executor=process",
  )
  assert 60 < manifest["dropped"]["contaminated"] < 200
  held_out = texts(tmp_path / "out", "validation") + texts(tmp_path / "out", "test")
  train = texts(tmp_path / "out", "train")
  runs = {tuple(w[i : i + 13]) for w in map(str.split, held_out) for i in range(len(w) - 12)}
  assert not any(
    tuple(w[i : i + 13]) in runs for w in map(str.split, train) for i in range(len(w) - 12)
  )


def test_near_duplicates_over_several_tasks(tmp_path):
  pytest.importorskip("datatrove")
  unique = [sentence(i, 80) for i in range(60)]
  near = [text + " " + sentence(i, 2) for i, text in enumerate(unique[:20])]
  manifest = run(
    tmp_path,
    [{"text": text} for text in unique + near],
    "--dedup=near",
    "--dedup=exact",
    "--task-bytes=7000",
    "--executor=process",
    "--cut-chars=0",
  )
  assert manifest["dropped"] == {"near duplicate": 20}
  data_card = (tmp_path / "out" / "card.md").read_text()
  assert "like in.jsonl:1" in data_card


def test_too_many_errors_end_the_run(tmp_path):
  write(tmp_path / "in.jsonl", [{"text": sentence(i)} for i in range(50)] + [{"body": ""}] * 6)
  options = {"tokenizer": "bytes", "task_bytes": 2_000, "cut_chars": 0}
  with pytest.raises(UserError, match="max_errors=5"):
    prepare.prepare(tmp_path / "in.jsonl", tmp_path / "out", max_errors=5, **options)
  manifest = prepare.prepare(tmp_path / "in.jsonl", tmp_path / "out", max_errors=6, **options)
  assert manifest["read"] == 56


@pytest.mark.parametrize(
  "total, size", [(900, 100), (20_000, 500), (100_000, 1000), (400_000, 1000), (4_000_000, 10_000)]
)
def test_parts_of_few_documents_are_no_snippets(tmp_path, total, size):
  (tmp_path / "a.txt").write_text("x" * total)
  options = prepare.Options(tokenizer="bytes")
  assert reading.cut_chars(documents.find([tmp_path]), options, print) == size


def test_a_card_of_parts_is_that_of_the_whole(monkeypatch):
  stored = np.random.default_rng(0).integers(2, 3000, 2000).astype(np.uint32)
  whole, packed = data_card._lengths(stored), data_card._packing(stored)
  monkeypatch.setattr(data_card, "_CHUNK", 300)
  assert data_card._lengths(stored) == whole
  for seq_len, shares in data_card._packing(stored).items():
    assert shares == pytest.approx(packed[seq_len], abs=0.02)
    assert shares["one_per_row"] == packed[seq_len]["one_per_row"]


def test_a_card_says_what_is_in_the_folder(tmp_path):
  rows = [{"text": sentence(i, 5 + i)} for i in range(100)] + [{"text": "a|b\n"}] * 30
  manifest = run(tmp_path, rows, "--clean=length:min_chars=10", "--clean=unicode")
  data_card = json.loads((tmp_path / "out" / "card.json").read_text())
  train = manifest["splits"]["train"]
  assert data_card["splits"]["train"] == {k: train[k] for k in ("documents", "tokens", "bytes")}
  assert sum(count for _, count in data_card["lengths"]["histogram"]) == train["documents"]
  rule = data_card["dropped"]["length: too few characters"]
  assert rule["documents"] == 30 and rule["bytes"] == 30 * 4 and len(rule["examples"]) == 5
  assert data_card["sources"]["in.jsonl"]["documents"] == 100
  assert data_card["packing"]["512"]["best_fit"] > data_card["packing"]["512"]["one_per_row"]
  picture = xml.etree.ElementTree.parse(tmp_path / "out" / "lengths.svg").getroot()
  assert len(picture.findall("{*}rect")) == 1 + len(data_card["lengths"]["histogram"])
  assert "a\\|b" not in (tmp_path / "out" / "card.md").read_text().split("## Left out")[0]


@pytest.mark.parametrize(
  "args, message",
  [
    (["--clean=lenght"], "did you mean 'length'"),
    (["--dedup=nearly"], "--dedup=nearly"),
    (["--kind=chats"], "--kind: chats: did you mean 'chat'"),
    (["--field=text"], "--field: 'text' is not of the form KEY=VALUE"),
    (["--kind=chat", "--cut-chars=100"], "cut_chars=100 is for kind=text"),
    (["--executor=clouds"], "--executor: clouds"),
    (["--template=x", "--kind=chat"], "'x'"),
  ],
)
def test_bad_flags_are_named(tmp_path, capsys, args, message):
  write(tmp_path / "in.jsonl", [{"text": sentence(i), "messages": []} for i in range(9)])
  try:
    code = main.main(
      ["data", str(tmp_path / "in.jsonl"), f"--out={tmp_path}/out", "--tokenizer=bytes", *args]
    )
  except SystemExit as e:  # argparse
    code = e.code
  assert code == 2 and message in capsys.readouterr().err


def test_tasks_are_of_one_size_and_keep_the_order(tmp_path):
  write(tmp_path / "a.jsonl", [{"text": sentence(i)} for i in range(300)])
  write(tmp_path / "b.jsonl", [{"text": sentence(i)} for i in range(20)])
  for i in range(9):
    (tmp_path / f"c{i}.txt").write_text(sentence(i, 100))
  files = documents.find(tmp_path)
  total = sum(file.size for file in files)
  folder = tmp_path / "groups"
  folder.mkdir()
  count = len(reading.list_inputs({splits.BY_HASH: files}, total // 8, 0, folder, None)["splits"])
  groups = [pickle.loads((folder / f"{i:05d}").read_bytes()) for i in range(count)]
  assert count in (8, 9)
  sizes = [sum(part.size for part in group) for group in groups]
  assert sum(sizes) == total and max(sizes) < 1.5 * total / 8 and min(sizes) > 0.5 * total / 8
  whole = [d.text for d in documents.documents(files)]
  assert [d.text for group in groups for d in documents.documents(group)] == whole
