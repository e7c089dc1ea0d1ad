"""Tagged words in the form of CoNLL-2003."""

from jaxgpt.text.readers import documents

TEXT = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German\tJJ\tI-NP\tI-MISC


Peter NNP I-NP I-PER
Blackburn

-DOCSTART- -X- O O

Rome NNP I-NP I-LOC
. . O O"""


def read(path, dropped, **options):
  found = documents.documents(documents.find(str(path)), kind="tagging", dropped=dropped, **options)
  return [(d.source, d.fields["words"], d.fields["tags"]) for d in found]


def test_a_sentence_is_a_record_and_a_word_without_tag_costs_one(tmp_path):
  for name, options in (("a.conll", {}), ("eng.train", {"form": "conll"})):
    (tmp_path / name).write_text("\ufeff" * (name == "a.conll") + TEXT)
    dropped = documents.Dropped()
    assert read(tmp_path / name, dropped, **options) == [
      (f"{name}:3", ["EU", "rejects", "German"], ["I-ORG", "O", "I-MISC"]),
      (f"{name}:13", ["Rome", "."], ["I-LOC", "O"]),
    ]
    assert dropped.counts == {"missing field": 1} and dropped.read == 3
    assert dropped.examples["missing field"] == [
      f"{name}:9: 'Blackburn' has no tag: a line has a word and its tag"
    ]


def test_only_spaces_and_tabs_separate_columns(tmp_path):
  text = "10\xa0000 \tCD  B-NUM \r\n\u2028x\u3000y O\n \t\nz O\n"
  (tmp_path / "a.conll").write_bytes(text.encode())
  dropped = documents.Dropped()
  assert read(tmp_path / "a.conll", dropped) == [
    ("a.conll:1", ["10\xa0000", "\u2028x\u3000y"], ["B-NUM", "O"]),
    ("a.conll:4", ["z"], ["O"]),
  ]
  assert not dropped.counts


def test_bytes_that_are_no_text_cost_one_sentence(tmp_path):
  (tmp_path / "a.conll").write_bytes(b"a X\n\xff Y\n\nb Z\n")
  dropped = documents.Dropped()
  assert [words for _, words, _ in read(tmp_path / "a.conll", dropped)] == [["b"]]
  assert dropped.counts == {"invalid utf-8": 1}
