"""Questions on passages as tokens: places in the passage, and windows over it."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config.keys.training import most_overlap
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import examples, huggingface, passages, tokenizer
from jaxgpt.text.tokenizers.encoded import Refused
from tests.text.tokenizers import huggingface_test

tokenizers = pytest.importorskip("tokenizers")
T = tokenizer.ByteTokenizer()
TEXT = st.text("ab é日🙂.</s>", min_size=1, max_size=40)


@functools.cache
def bert():
  inner = huggingface_test.bert()
  inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  return huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()}, "bert")


@settings(max_examples=40, deadline=None)
@given(question=TEXT, passage=TEXT, data=st.data())
def test_characters_lead_to_tokens_and_back(question, passage, data):
  start = data.draw(st.integers(0, len(passage) - 1))
  end = data.draw(st.integers(start + 1, len(passage)))
  (found,) = passages.encode([(question, passage)], T)
  assert found.ids.tolist() == [1, *T.encode(question), 2, *T.encode(passage), 2]
  tokens = found.tokens(start, end)
  assert found.characters(*tokens) == (start, end)
  assert T.decode(found.ids[slice(*tokens)]) == passage[start:end]


def test_an_answer_within_a_token_has_that_token():
  (found,) = passages.encode([("where", "they went to Pythonia")], bert())
  start, end = found.tokens(14, 16)  # 'yt'
  low, high = found.characters(start, end)
  assert low <= 14 and high >= 16 and found.tokens(13, 13) is None


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seq_len=st.integers(4, 40))
def test_windows_hold_each_token_and_overlap(data, seq_len):
  overlap = data.draw(st.integers(0, most_overlap(seq_len)), "overlap")
  second = np.array(data.draw(st.lists(st.integers(3, 30), min_size=1, max_size=4), "second"))
  stored = second + 1 + data.draw(st.integers(0, 100), "passage")
  rows = passages.windows(stored, second, seq_len, overlap)
  assert (np.diff(rows.doc) >= 0).all() and set(rows.doc) == set(range(len(second)))
  assert (rows.question + rows.length + 1 <= seq_len).all()
  for doc in range(len(second)):
    own = rows.doc == doc
    starts, ends = rows.start[own], rows.start[own] + rows.length[own]
    assert starts[0] == second[doc] and ends[-1] == stored[doc] - 1
    assert (starts[1:] + overlap == ends[:-1]).all(), "neighbours share the overlap"
    assert (ends[1:] > ends[:-1]).all(), "each goes on"
    assert (rows.question[own] == min(second[doc], seq_len // 2)).all()
    full = rows.question[own] + rows.length[own] + 1
    assert (full[:-1] == seq_len).all(), "only the last has room left"


@settings(max_examples=60, deadline=None)
@given(passage=st.integers(1, 60), overlap=st.integers(0, 6))
def test_windows_are_those_of_the_tokenizers_library(passage, overlap):
  """The rows of `truncation="only_second"` with `stride`."""
  t = bert()
  question, words = "to it", " ".join("the cat ran 12"[i % 14] + "x" for i in range(passage))
  theirs = tokenizers.Tokenizer.from_str(t._inner.to_str())
  theirs.enable_truncation(24, stride=overlap, strategy="only_second")
  whole = theirs.encode(question, words)
  (found,) = passages.encode([(question, words)], t)
  rows = passages.windows([len(found.ids)], [found.second], 24, overlap)
  assert rows.question[0] == found.second, "the question is not cut"
  ours = [
    [*found.ids[:q].tolist(), *found.ids[start : start + length].tolist(), t.eos_id]
    for _, q, start, length in zip(*(a.tolist() for a in rows))
  ]
  assert ours == [row.ids for row in (whole, *whole.overflowing)]


def question(*answers, context="Jim went to York."):
  found = [{"text": text, "answer_start": context.index(text)} for text in answers]
  fields = {"question": "Where?", "context": context, "answers": found}
  return Document("a.json:1#1", context, fields=fields)


def test_all_answers_are_stored_and_one_without_a_token_is_refused():
  documents = [question("York", "to York"), question(), question("\u200b", context="a \u200b b")]
  stored, none, refused = examples.encode_batch(documents, "question_answering", bert())
  words = [bert().decode(stored[0].ids[a:b]) for a, b in stored[0].answers]
  assert words == ["york", "to york"] and none[0].answers.shape == (0, 2)
  assert isinstance(refused, Refused) and refused.rule == "answer not in context"


def test_a_tokenizer_with_two_ends_between_texts_has_them_before_the_passage():
  inner = huggingface_test.bert()
  inner.post_processor = tokenizers.processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
  t = huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()}, "roberta")
  (found,) = passages.encode([("to", "it")], t)
  assert found.ids.tolist() == [2, *t.encode("to"), 3, 3, *t.encode("it"), 3]
  assert found.ids[found.second :].tolist() == [*t.encode("it"), 3]
