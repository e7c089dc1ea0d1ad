"""Text from tokens: whole characters, stop strings, and the same text as when decoded at once."""

import functools
import io

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.inference.engine.requests import Token
from jaxgpt.inference.engine.text import Text, Vocabulary
from jaxgpt.text.tokenizers import huggingface
from jaxgpt.text.tokenizers import tokenizer as tokenizer_lib
from jaxgpt.text.tokenizers.base import ByteTokenizer
from jaxgpt.text.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.text.tokenizers import token_bytes_test

BYTES = ByteTokenizer()
WORDS = ["the cat sat on a mat and saw two dogs"] * 20


@functools.cache
def trained():
  """SentencePiece as the project trains it: other characters are bytes."""
  return tokenizer_lib.train_sentencepiece(WORDS, vocab_size=290)


@functools.cache
def with_space_in_front():
  """SentencePiece that puts a space in front of each text, and drops it."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS),
    model_writer=model,
    vocab_size=310,
    model_type="bpe",
    byte_fallback=True,
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    control_symbols=["<|user|>", "<|assistant|>", "<|end|>"],
    hard_vocab_limit=False,
    minloglevel=3,
  )
  return SentencePieceTokenizer(model.getvalue())


@functools.cache
def with_fallback():
  """A tokenizer.json as Llama 2 has it: a decoder that reads runs of bytes as wholes."""
  tokenizers = pytest.importorskip("tokenizers")
  n, d = tokenizers.normalizers, tokenizers.decoders
  return token_bytes_test.with_fallback(
    d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]),
    n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")]),
  )


@functools.cache
def of_words():
  """WordPiece, whose tokens do not stand for bytes."""
  tokenizers = pytest.importorskip("tokenizers")
  vocab = {w: i for i, w in enumerate(("[UNK]", "[SEP]", "the", "cat", "##s", "sat", "na", "ï"))}
  inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.decoder = tokenizers.decoders.WordPiece()
  inner.add_special_tokens(["[UNK]", "[SEP]"])
  return huggingface.HuggingFaceTokenizer({"tokenizer.json": inner.to_str().encode()})


FALLING_BACK = [trained, with_space_in_front, with_fallback]


def pieces(ids, stop=(), tokenizer=BYTES, prompt=()):
  """(texts of the releases, the tokens, whether a stop string ended it)."""
  text, texts, tokens = Text(Vocabulary(tokenizer), prompt, stop), [], []
  for i in ids:
    released, stopped = text.add(Token(i, ""))
    texts.append("".join(t.text for t in released))
    tokens += released
    if stopped:
      return texts, tokens, True
  last = text.end()
  return [*texts, "".join(t.text for t in last)], tokens + last, False


def test_a_character_is_released_whole():
  texts, tokens, _ = pieces(BYTES.encode("aé€😀b"))
  assert texts == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
  assert [t.text for t in tokens] == texts[:-1]


def test_bytes_that_are_no_character_are_shown_and_nothing_after_them_is_lost():
  ids = [i + 3 for i in b"a\xffb\xe2\x82c\xc3"]
  assert "".join(pieces(ids)[0]) == b"a\xffb\xe2\x82c\xc3".decode("utf-8", "replace")


@pytest.mark.parametrize(
  "text, stop, want, stopped",
  [
    ("one two", ["two"], "one ", True),
    ("one two", ["tw", "two", "e"], "on", True),
    ("one tw", ["two"], "one tw", False),
    ("aab", ["ab"], "a", True),
    ("ababac", ["abac"], "ab", True),
    ("x\n\ny", ["\n\n"], "x", True),
    ("naïve", ["ïv"], "na", True),
  ],
)
def test_a_text_ends_before_the_first_stop_string(text, stop, want, stopped):
  texts, tokens, ended = pieces(BYTES.encode(text), stop)
  assert ("".join(texts), ended) == (want, stopped)
  assert "".join(t.text for t in tokens) == want


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
  texts, _, _ = pieces(BYTES.encode("abXYcXYZ"), ["XYZ"])
  assert texts == ["a", "b", "", "", "XYc", "", "", ""]


@pytest.mark.parametrize("make", FALLING_BACK)
def test_a_character_written_in_bytes_is_released_whole(make):
  tokenizer = make()
  prompt, whole = tokenizer.encode("the"), "the €uro é 日本語 😀 \ufffd cat"
  new = tokenizer.encode(whole)[len(prompt) :]
  texts, tokens, _ = pieces(new, (), tokenizer, prompt)
  assert "".join(texts) == "".join(t.text for t in tokens) == whole[3:]
  assert "😀" in texts and "日" in texts
  assert pieces(new, ["本語"], tokenizer, prompt)[0][-1] == ""
  assert "".join(pieces(new, ["本語"], tokenizer, prompt)[0]) == " €uro é 日"


@pytest.mark.parametrize("make", FALLING_BACK)
def test_bytes_that_are_no_character_spoil_no_other_one(make):
  tokenizer = make()
  of_byte = {b: tokenizer.encode("é")[-1] + b - 0xA9 for b in range(256)}
  ids = [of_byte[b] for b in b"\xc3\xa9\xff\xe6\x97\xa5\xe2\x82"]
  prompt = tokenizer.encode("the")
  assert "".join(pieces(ids, (), tokenizer, prompt)[0]) == "é\ufffd日\ufffd"


def test_a_character_that_begins_in_the_prompt_is_the_text_s():
  ids = BYTES.encode("aé€b")
  for cut in range(1, len(ids)):
    written = "".join(pieces(ids[cut:], (), BYTES, ids[:cut])[0])
    assert written == "aé€b"[len(bytes(i - 3 for i in ids[:cut]).decode(errors="ignore")) :]
  # A text that does not finish it leaves it to the prompt.
  assert "".join(pieces(BYTES.encode("b"), (), BYTES, ids[:2])[0]) == "b"
  assert "".join(pieces([], (), BYTES, ids[:2])[0]) == ""


@pytest.mark.parametrize("make", [trained, with_space_in_front, with_fallback, of_words])
@pytest.mark.parametrize("text", ["the cats sat", "cat"])
def test_a_text_after_a_special_token_is_one_of_its_own(make, text):
  tokenizer = make()
  special = next(i for i in tokenizer.special_ids.values() if i != tokenizer.unk_id)
  prompt, ids = [*tokenizer.encode("the"), special], tokenizer.encode(text)
  assert "".join(pieces(ids, (), tokenizer, prompt)[0]) == tokenizer.decode(ids)
  assert "".join(pieces(ids, (), tokenizer, [])[0]) == tokenizer.decode(ids)


def test_spaces_at_the_beginning_of_an_answer_are_kept():
  for make in FALLING_BACK:
    ids = make().encode("   the   cat")
    assert "".join(pieces(ids, (), make())[0]) == make().decode(ids) == "   the   cat"


def test_words_that_are_no_bytes_are_decoded_as_a_whole():
  ids = of_words().encode("the cats sat")
  texts, _, _ = pieces(ids[1:], (), of_words(), ids[:1])
  assert texts == [" cat", "s", " sat", ""]


@pytest.mark.parametrize("make", [lambda: BYTES, *FALLING_BACK])
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_add_up_to_the_text_cut_at_the_first_stop_string(make, text, stop):
  tokenizer = make()
  ids = tokenizer.encode(text)
  text = tokenizer.decode(ids)
  texts, tokens, _ = pieces(ids, stop, tokenizer)
  whole = "".join(texts)
  found = [text.find(s) for s in stop if s in text]
  # A stop string that ends first wins, so the cut may be later than another one's beginning.
  first = next((n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)), len(text))
  want = text[: min((text[:first].find(s) for s in stop if s in text[:first]), default=len(text))]
  assert whole == want == "".join(t.text for t in tokens)
  assert whole == text if not found else len(whole) <= len(text)


def test_words_of_a_tokenizer_with_spaces_in_front_of_them_keep_their_spaces():
  tokenizer = trained()
  prompt, ids = tokenizer.encode("the cat"), tokenizer.encode("the cat sat on a mat")
  new = ids[len(prompt) :]
  got, tokens, _ = pieces(new, (), tokenizer, prompt)
  assert "".join(got) == tokenizer.continuation(prompt, new) == " sat on a mat"
  assert [t.id for t in tokens] == new
