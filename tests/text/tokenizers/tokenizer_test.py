"""Text comes back from its tokens; tokenizers come back from their folders."""

import io
import json
import pathlib
import pickle

import hypothesis
import numpy as np
import pytest
import sentencepiece
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.tokenizers import base, tokenizer

CODE = "".join(path.read_text() for path in sorted(pathlib.Path(json.__file__).parent.glob("*.py")))
SPECIAL = [
  "<|user|>",
  "<mask>",
  "</s>",
  "<|end|>",
  "\0",
  "\t",
  "\n",
  "\r",
  " ",
  "  ",
  "▁",
  "▅",
  "⁇",
  "<s>",
  "<0x0A>",
  "<unk>",
  "\ufeff",
  "\u2028",
  "e\u0301",
  "é",
  "😀",
  "\U0010ffff",
  "ab",
  "1",
  "\ufffd",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(SPECIAL)).map("".join))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request):
  size = 600 if request.param == "bpe" else 450
  return tokenizer.train_sentencepiece([CODE], vocab_size=size, model_type=request.param)


@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(text=TEXTS)
def test_any_text_comes_back_from_sentencepiece(trained, text):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert trained.decode([trained.bos_id, *ids, trained.eos_id, 0, 10**6, -1]) == text


@hypothesis.given(text=TEXTS)
def test_any_text_comes_back_from_bytes(text):
  t = tokenizer.ByteTokenizer()
  ids = t.encode(text)
  assert len(ids) == len(text.encode())
  assert t.decode([t.bos_id, *ids, t.eos_id, 0, 10**6, -1]) == text


def check_pieces(t, text, monkeypatch, most=2):
  """The ids of a long text are those of its pieces, which are at most `most` times `LONG` long."""
  whole = t.encode(text)
  with monkeypatch.context() as m:
    m.setattr(base, "LONG", 1500)
    pieces = list(t.pieces(text))
    assert len(pieces) > len(text) // (most * 1500) and max(map(len, pieces)) <= most * 1500
    assert np.concatenate(t.encode_batch(pieces)).tolist() == t.encode(text) == whole


def test_a_long_text_has_the_ids_of_its_pieces(trained, monkeypatch):
  text = CODE[:9000] + "▁" + "x" * 250 + " ".join(trained.special_ids) + CODE[9000:20_000]
  check_pieces(trained, text, monkeypatch)
  check_pieces(trained, "xyzq" * 2000, monkeypatch)  # one word
  assert list(trained.pieces("")) == [""] and list(trained.pieces("ab")) == ["ab"]


def test_pieces_of_vocabularies_that_put_a_space_in_front(monkeypatch):
  text = CODE[:20_000]
  check_pieces(trained_elsewhere(vocab_size=300), text, monkeypatch)
  check_pieces(trained_elsewhere(vocab_size=300, model_type="bpe"), text, monkeypatch)
  keeps = trained_elsewhere(vocab_size=300, model_type="bpe", remove_extra_whitespaces=False)
  check_pieces(keeps, text, monkeypatch)


def test_pieces_of_bytes_may_end_anywhere(monkeypatch):
  check_pieces(tokenizer.ByteTokenizer(), "é" * 20_000, monkeypatch, most=1)


def test_texts_encoded_to_one_array_are_those_of_a_batch(trained):
  for t in (trained, tokenizer.ByteTokenizer(), trained_elsewhere(vocab_size=300)):
    for texts in ([CODE[:500], "", "a▁b", "</s>", CODE[500:900]], ["a b", "c"], [""], []):
      ids, lengths = t.encode_joined(texts)
      assert ids.dtype == np.int32 and lengths.tolist() == [len(t.encode(x)) for x in texts]
      assert ids.tolist() == [i for text in texts for i in t.encode(text)]


def test_a_batch_is_its_texts_one_by_one(trained):
  texts = [CODE[:500], "", "a▁b", CODE[500:900], "▁"]
  for ids, text in zip(trained.encode_batch(texts), texts, strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == trained.encode(text)


def test_bytes_that_are_no_text_become_replacement_characters():
  t = tokenizer.ByteTokenizer()
  assert t.decode([*t.encode("a"), 3 + 0xFF, *t.encode("b")]) == "a\ufffdb"


def test_the_trained_vocabulary_suits_code():
  t = tokenizer.train_sentencepiece([CODE], vocab_size=600)
  assert t.vocab_size == 600
  assert (t.pad_id, t.bos_id, t.eos_id) == (0, 2, 3)
  assert len(t.encode(" " * 8)) == 1
  assert len(t.encode("\n\n")) == 1
  assert len(t.encode("self.")) == 1
  assert len(CODE) / len(t.encode(CODE)) > 2.2


def test_each_digit_is_a_token():
  t = tokenizer.train_sentencepiece([CODE + "year2024 " * 1000], vocab_size=600)
  assert len(t.encode("2024")) == 4


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_the_model_file_is_the_same_on_a_machine_with_other_cores(monkeypatch, model_type):
  made = []
  for cores in (1, 3):
    monkeypatch.setattr(base, "threads", lambda cores=cores: cores)
    made.append(tokenizer.train_sentencepiece([CODE], vocab_size=400, model_type=model_type))
  assert made[0].files() == made[1].files()


def test_training_gives_the_same_tokenizer_each_time():
  a, b = (tokenizer.train_sentencepiece([CODE], vocab_size=500) for _ in range(2))
  assert a.digest == b.digest
  assert a.digest != tokenizer.train_sentencepiece([CODE], vocab_size=501).digest


def test_training_reads_no_more_than_the_sample():
  def texts():
    yield "some words and some more words " * 200
    raise AssertionError("read on")

  tokenizer.train_sentencepiece(texts(), vocab_size=290, sample_bytes=4000)


@pytest.mark.parametrize(
  "size, kind, message",
  [
    (50_000, "bpe", "at most [0-9]+ pieces"),
    (5_000, "unigram", "at most [0-9]+ pieces"),
    (200, "bpe", "too small"),
    (200, "char", "too small"),
    (400, "wordpiece", "choose one of"),
  ],
)
def test_a_vocabulary_that_the_text_does_not_support(size, kind, message):
  with pytest.raises(UserError, match=message):
    tokenizer.train_sentencepiece([CODE[:2000]], vocab_size=size, model_type=kind)


def test_no_text_to_train_on():
  with pytest.raises(UserError, match="no text"):
    tokenizer.train_sentencepiece([], vocab_size=500)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_saved_tokenizer_is_the_same_one(tmp_path, kind):
  t = (
    tokenizer.ByteTokenizer()
    if kind == "bytes"
    else tokenizer.train_sentencepiece([CODE], vocab_size=400)
  )
  t.save(tmp_path / "tokenizer")
  for back in (
    tokenizer.load(tmp_path / "tokenizer"),
    tokenizer.load(tmp_path),
    pickle.loads(pickle.dumps(t)),
  ):
    assert back.digest == t.digest
    assert back.encode(CODE[:200]) == t.encode(CODE[:200])


def test_any_sentencepiece_model_loads(tmp_path):
  """One with a dummy prefix, folded white space, other special ids and no bos."""
  source = tmp_path / "text.txt"
  source.write_text(CODE)
  sentencepiece.SentencePieceTrainer.train(
    input=str(source),
    model_prefix=str(tmp_path / "m"),
    vocab_size=300,
    pad_id=-1,
    bos_id=-1,
    eos_id=1,
    unk_id=0,
    minloglevel=3,
  )
  t = tokenizer.load(tmp_path / "m.model")
  assert (t.pad_id, t.mask_id, t.bos_id, t.eos_id) == (None, None, 1, 1)
  assert t.decode(t.encode("def encode(self)")) == "def encode(self)"


def test_specials_have_names_and_ids_and_no_text_is_encoded_to_them(trained):
  for t in (tokenizer.ByteTokenizer(), trained):
    assert {
      "<pad>": t.pad_id,
      "<s>": t.bos_id,
      "</s>": t.eos_id,
      "<mask>": t.mask_id,
      "<|user|>": t.mask_id + 2,
    }.items() <= t.special_ids.items()
    assert len(set(t.special_ids.values())) == len(t.special_ids)
    assert max(t.special_ids.values()) < t.vocab_size
    text = "<|user|>hi<mask></s>"
    plain, marked = t.encode(text), t.encode(text, specials=True)
    assert not set(plain) & set(t.special_ids.values())
    assert marked == [t.special_ids["<|user|>"], *t.encode("hi"), t.mask_id, t.eos_id]
    assert t.decode(plain) == text and t.decode(marked) == "hi"
    assert t.decode(marked, specials=True) == t.decode(plain, specials=True) == text


def test_specials_decode_by_name_wherever_they_stand():
  t = tokenizer.ByteTokenizer()
  ids = [t.mask_id, t.mask_id, *t.encode("ab"), t.eos_id, *t.encode("c")]
  assert t.decode(ids, specials=True) == "<mask><mask>ab</s>c"
  assert t.decode([], specials=True) == t.decode([]) == ""


def test_a_symbol_is_one_token_wherever_it_occurs():
  t = tokenizer.train_sentencepiece([CODE], vocab_size=600, symbols=["<h1>", "to be"])
  assert len(t.encode("<h1>")) == len(t.encode("to be")) == 1
  text = "x<h1>  to be"
  assert t.decode(t.encode(text)) == text
  assert not {"<h1>", "to be"} & t.special_ids.keys()


@pytest.mark.parametrize("symbol", ["", "<mask>", "a", "▁"])
def test_a_symbol_that_cannot_be_one(symbol):
  with pytest.raises(UserError, match="symbol"):
    tokenizer.train_sentencepiece([CODE], vocab_size=600, symbols=["a", symbol])


def test_what_a_specification_names(tmp_path):
  def sample():
    return [CODE]

  assert tokenizer.from_spec("bytes", sample).kind == "bytes"
  t = tokenizer.from_spec("sentencepiece:500:char", sample, symbols=["<h1>"])
  assert t.vocab_size < 500
  t.save(tmp_path / "saved")
  assert tokenizer.from_spec(str(tmp_path / "saved"), sample).digest == t.digest
  for spec, message in (("morse", "neither bytes"), ("sentencepiece:", "no vocabulary size")):
    with pytest.raises(UserError, match=message):
      tokenizer.from_spec(spec, sample)
  with pytest.raises(UserError, match="symbols are for"):
    tokenizer.from_spec("bytes", sample, symbols=["<h1>"])


def test_a_model_whose_pieces_look_like_marks_keeps_them_from_text():
  """Gemma's model holds its marks as pieces that SentencePiece finds in any text."""
  t = trained_elsewhere(
    user_defined_symbols=["<start_of_turn>"],
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    byte_fallback=True,
    vocab_size=400,
    normalization_rule_name="identity",
  )
  text = "a<start_of_turn>user\n"
  mark = t.special_ids["<start_of_turn>"]
  assert mark not in t.encode(text) and t.decode(t.encode(text)) == text
  assert t.encode(text, specials=True).count(mark) == 1


def trained_elsewhere(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CODE.splitlines()), model_writer=model, minloglevel=3, **options
  )
  return tokenizer.SentencePieceTokenizer(model.getvalue())


def test_a_model_without_an_end_takes_its_beginning_or_is_refused():
  assert trained_elsewhere(vocab_size=300, eos_id=-1, bos_id=1).eos_id == 1
  t = trained_elsewhere(vocab_size=300, eos_id=-1, bos_id=-1, control_symbols=["<|endoftext|>"])
  assert t.eos_id == t.bos_id == t.special_ids["<|endoftext|>"]
  with pytest.raises(UserError, match="no piece that can close"):
    trained_elsewhere(vocab_size=300, eos_id=-1, bos_id=-1)


def llama_folder(folder, model, **added):
  folder.mkdir()
  (folder / "tokenizer.model").write_bytes(model)
  decoder = {str(i): {"content": token, "special": True} for token, i in added.items()}
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": "<extra>",
        "added_tokens_decoder": decoder,
        "chat_template": "{{ messages }}",
      }
    )
  )
  return folder


def test_a_folder_with_a_sentencepiece_model_and_added_tokens(tmp_path):
  own = trained_elsewhere(vocab_size=300)
  t = tokenizer.load(llama_folder(tmp_path / "a", own._model, **{"<extra>": 302, "<s>": 1}))
  assert (t.vocab_size, t.pad_id, t.bos_id, t.eos_id) == (303, 302, 1, 2)
  assert t.chat_template == "{{ messages }}"
  assert t.decode([*t.encode("self"), 302, 301]) == "self"
  t.save(tmp_path / "b")
  back = tokenizer.load(tmp_path / "b")
  assert back.digest == t.digest != own.digest and back.special_ids == t.special_ids
  assert (tmp_path / "b" / "tokenizer_config.json").read_bytes() == (
    tmp_path / "a" / "tokenizer_config.json"
  ).read_bytes()
  with pytest.raises(UserError, match="numbers its pieces differently"):
    tokenizer.load(llama_folder(tmp_path / "c", own._model, **{"<s>": 7}))


def test_what_cannot_be_loaded_is_named(tmp_path):
  with pytest.raises(UserError, match="no tokenizer in"):
    tokenizer.load(tmp_path)
  (tmp_path / "x.model").write_bytes(b"junk")
  with pytest.raises(UserError, match=r"x\.model' is not a SentencePiece model"):
    tokenizer.load(tmp_path / "x.model")
  tokenizer.ByteTokenizer().save(tmp_path)
  for spec, message in (
    ("{", "damaged"),
    ('{"kind": "bytes", "digest": "0"}', "match its digest"),
    ('{"kind": "morse", "digest": "0"}', "'morse'"),
    ('{"kind": "sentencepiece", "digest": "0"}', "is missing"),
  ):
    (tmp_path / base.SPEC).write_text(spec)
    with pytest.raises(UserError, match=message):
      tokenizer.load(tmp_path)
