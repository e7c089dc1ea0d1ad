"""Tokenizers of other tools: Hugging Face folders and files, tiktoken's vocabularies."""

import base64
import functools
import io
import json
import pathlib
import pickle
import sys

import hypothesis
import numpy as np
import pytest
import sentencepiece

from jaxgpt.errors import UserError
from jaxgpt.text.readers.documents import Document
from jaxgpt.text.tokenizers import examples, tokenizer
from jaxgpt.text.tokenizers import tiktoken as tiktoken_lib
from tests.text.tokenizers import tokenizer_test

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

TEXT = tokenizer_test.CODE[:60_000]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(specials):
  """A byte-level BPE tokenizer as GPT-2, Qwen and Llama 3 have."""
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.decoder = tokenizers.decoders.ByteLevel()
  t.train_from_iterator(
    [TEXT, "<|x|>" * 5000],
    tokenizers.trainers.BpeTrainer(
      vocab_size=400,
      show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  t.add_special_tokens(list(specials))
  return t


def bert():
  t = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
  t.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
  t.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  t.decoder = tokenizers.decoders.WordPiece()
  names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  t.train_from_iterator(
    [TEXT],
    tokenizers.trainers.WordPieceTrainer(vocab_size=400, special_tokens=names, show_progress=False),
  )
  t.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  t.enable_truncation(8)
  t.enable_padding(length=8)
  return t


def folder(path, inner, **config):
  path.mkdir()
  inner.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  path = tmp_path_factory.mktemp("hf") / "qwen"
  folder(
    path,
    byte_level(QWEN),
    bos_token=None,
    eos_token="<|im_end|>",
    pad_token={"__type": "AddedToken", "content": "<|endoftext|>"},
    chat_template="{{ messages }}",
  )
  (path / "model.safetensors").write_text("weights")
  return path


@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(text=tokenizer_test.TEXTS)
def test_any_text_comes_back_from_byte_level_vocabularies(qwen, text):
  t = tokenizer.load(qwen)
  assert t.decode([t.bos_id, *t.encode(text), t.eos_id, 10**6, -1]) == text


def test_a_folder_as_transformers_saves_it(qwen):
  t = tokenizer.load(qwen)
  assert t.kind == "huggingface" and t.vocab_size == 403  # the added tokens are counted
  assert (t.bos_id, t.eos_id, t.pad_id, t.mask_id) == (402, 402, 400, None)
  assert t.special_ids == dict(zip(QWEN, (400, 401, 402)))
  assert t.chat_template == "{{ messages }}"


def test_names_of_specials_in_a_text_are_text(qwen):
  t = tokenizer.load(qwen)
  text = "<|im_end|>\n<|im_start|>system\n"
  assert t.encode(text) == byte_level([]).encode(text).ids
  assert t.decode(t.encode(text)) == text
  marked = t.encode(text, specials=True)
  assert marked == [402, *t.encode("\n"), 401, *t.encode("system\n")]
  assert t.decode(marked, specials=True) == text


def test_a_unigram_vocabulary_that_knows_the_names_of_its_specials_as_words(tmp_path):
  inner = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "</s>ab")], unk_id=0
    )
  )
  inner.add_special_tokens(["</s>"])
  t = tokenizer.load(folder(tmp_path / "t5", inner, eos_token="</s>", unk_token="<unk>"))
  assert t.eos_id == t.bos_id == 1
  assert t.encode("a</s>b") == [t.encode(c)[0] for c in "a</s>b"]


@pytest.mark.parametrize("lone", [True, False])
def test_bert(tmp_path, lone):
  path = folder(
    tmp_path / "bert",
    bert(),
    **(
      {}
      if lone
      else dict(
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        unk_token="[UNK]",
      )
    ),
  )
  t = tokenizer.load(path / "tokenizer.json" if lone else path)
  assert (t.pad_id, t.unk_id, t.bos_id, t.eos_id, t.mask_id) == (0, 1, 2, 3, 4)
  ids = t.encode("Return the value of this object, or raise ValueError")  # longer than 8
  assert len(ids) > 8 and not {0, 2, 3, 4} & set(ids)
  assert len(t.encode("self")) < 8
  assert t.decode([2, *ids, 3]) == "return the value of this object, or raise valueerror"


def test_a_file_alone_tells_its_ends_by_their_usual_names(tmp_path):
  byte_level(["<|begin_of_text|>", "<|end_of_text|>"]).save(str(tmp_path / "llama.json"))
  t = tokenizer.load(tmp_path / "llama.json")
  assert (t.bos_id, t.eos_id, t.pad_id) == (400, 401, None)
  byte_level(["<|endoftext|>"]).save(str(tmp_path / "gpt2.json"))
  t = tokenizer.load(tmp_path / "gpt2.json")
  assert (t.bos_id, t.eos_id) == (400, 400)
  byte_level([]).save(str(tmp_path / "none.json"))
  with pytest.raises(UserError, match=r"none\.json.* names no token that ends a text.*eos_token"):
    tokenizer.load(tmp_path / "none.json")


def test_a_post_processor_tells_the_ends(tmp_path):
  inner = byte_level(["<a>", "<b>"])
  inner.post_processor = tokenizers.processors.RobertaProcessing(("<b>", 401), ("<a>", 400))
  inner.save(str(tmp_path / "a.json"))
  t = tokenizer.load(tmp_path / "a.json")
  assert (t.bos_id, t.eos_id) == (400, 401)
  inner.post_processor = tokenizers.processors.Sequence(
    [
      tokenizers.processors.ByteLevel(),
      tokenizers.processors.TemplateProcessing(single="<a> $A", special_tokens=[("<a>", 400)]),
    ]
  )
  inner.save(str(tmp_path / "b.json"))
  t = tokenizer.load(tmp_path / "b.json")
  assert (t.bos_id, t.eos_id) == (400, 400)


def test_a_long_text_has_the_ids_of_its_pieces(qwen, tmp_path, monkeypatch):
  made = (
    tokenizer.load(qwen),
    tokenizer.load(tiktoken_folder(tmp_path / "tiktoken")[0]),
    tokenizer.load(folder(tmp_path / "bert", bert())),
  )
  for t in made:
    text = TEXT[:9000] + " ".join(t.special_ids) + "\n\n  \n" + TEXT[9000:20_000]
    tokenizer_test.check_pieces(t, text, monkeypatch)


def test_a_saved_one_is_the_same_and_its_files_are_as_they_came(qwen, tmp_path):
  t = tokenizer.load(qwen)
  t.save(tmp_path / "tokenizer")
  for back in (tokenizer.load(tmp_path), pickle.loads(pickle.dumps(t))):
    assert back.digest == t.digest and back.special_ids == t.special_ids
    assert back.encode(TEXT[:300]) == t.encode(TEXT[:300])
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "tokenizer" / name).read_bytes() == (qwen / name).read_bytes()
  assert not (tmp_path / "tokenizer" / "model.safetensors").exists()
  (tmp_path / "tokenizer" / "tokenizer.json").write_text(
    (qwen / "tokenizer.json").read_text() + " "
  )
  with pytest.raises(UserError, match="does not match its digest"):
    tokenizer.load(tmp_path)
  (tmp_path / "tokenizer" / "tokenizer.json").unlink()
  with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
    tokenizer.load(tmp_path)


def test_a_batch_is_its_texts_one_by_one(qwen):
  t = tokenizer.load(qwen)
  texts = [TEXT[:500], "", "<|im_end|>", TEXT[500:900]]
  for ids, text in zip(t.encode_batch(texts), texts, strict=True):
    assert ids.dtype == np.int32 and ids.tolist() == t.encode(text)


def test_transformers_reads_a_saved_one_and_encodes_the_same(qwen, tmp_path):
  transformers = pytest.importorskip("transformers")
  t = tokenizer.load(qwen)
  t.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert (theirs.eos_token_id, theirs.pad_token_id) == (t.eos_id, t.pad_id)
  assert t.encode(TEXT[:2000]) == theirs.encode(TEXT[:2000], add_special_tokens=False)
  marked = "<|im_start|>user\nhi<|im_end|>\n"
  assert t.encode(marked, specials=True) == theirs.encode(marked, add_special_tokens=False)


def test_files_that_are_no_tokenizer(tmp_path, monkeypatch):
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"not a tokenizer\.json that tokenizers .* reads"):
    tokenizer.load(tmp_path)
  byte_level(QWEN).save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text("[]")
  with pytest.raises(UserError, match=r"tokenizer_config\.json can't be read"):
    tokenizer.load(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(UserError, match=r"pip install 'jaxgpt\[data\]'"):
    tokenizer.load(tmp_path)


def tiktoken_folder(path, **settings):
  """The ranks of a vocabulary that is trained here, as a .tiktoken file has them."""
  inner = byte_level([])
  to_byte = {c: b for b, c in tiktoken_bytes().items()}
  ranks = {bytes(to_byte[c] for c in token): i for token, i in inner.get_vocab().items()}
  path.mkdir()
  lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
  (path / "mine.tiktoken").write_text("".join(lines))
  (path / "tiktoken.json").write_text(
    json.dumps(
      {"pattern": GPT2_PATTERN, "special_tokens": {"<|endoftext|>": 400, "<mask>": 410}, **settings}
    )
  )
  return path, inner


def tiktoken_bytes():
  """GPT-2's printable character for each byte."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in plain]
  return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_a_tiktoken_vocabulary(tmp_path):
  path, inner = tiktoken_folder(tmp_path / "a")
  t = tokenizer.load(path)
  assert (t.kind, t.vocab_size) == ("tiktoken", 411)
  assert (t.bos_id, t.eos_id, t.mask_id, t.pad_id) == (400, 400, 410, None)
  assert t.encode(TEXT[:2000]) == inner.encode(TEXT[:2000]).ids
  text = "<|endoftext|> é▁\0 <mask>"
  assert t.decode([*t.encode(text), 400, 405, 999]) == text
  assert not {400, 410} & set(t.encode(text))
  assert t.encode(text, specials=True)[0] == 400
  t.save(tmp_path / "b")
  for back in (
    tokenizer.load(tmp_path / "b"),
    tokenizer.load(path / "mine.tiktoken"),
    pickle.loads(pickle.dumps(t)),
  ):
    assert back.digest == t.digest and back.encode(text) == t.encode(text)


def test_a_tiktoken_vocabulary_that_is_not_whole(tmp_path):
  path, _ = tiktoken_folder(tmp_path / "a", special_tokens={"<x>": 400})
  with pytest.raises(UserError, match="eos_token"):
    tokenizer.load(path)
  path, _ = tiktoken_folder(tmp_path / "b", special_tokens={"<x>": 400}, eos_token="<x>")
  assert tokenizer.load(path).eos_id == 400
  path, _ = tiktoken_folder(tmp_path / "c", pattern=None)
  with pytest.raises(UserError, match=r"tiktoken\.json of .* is not right"):
    tokenizer.load(path)
  (path / "mine.tiktoken").write_text("IQ== 0\nnot base64\n")
  with pytest.raises(UserError, match=r"mine\.tiktoken:2 is not a base64"):
    tokenizer.load(path)
  (path / "mine.tiktoken").write_text("IQ== 0\n")
  with pytest.raises(UserError, match="no token for byte 0"):
    tokenizer.load(path)
  lone = pathlib.Path(tmp_path / "lone.tiktoken")
  lone.write_text("IQ== 0\n")
  with pytest.raises(UserError, match=r"no tiktoken\.json next to it"):
    tokenizer.load(lone)


PROCESSORS = tokenizers.processors
CLS, SEP = ("<s>", 0), ("</s>", 1)


@pytest.mark.parametrize(
  "processor, ends",
  [
    (PROCESSORS.RobertaProcessing(SEP, CLS), 2),
    (PROCESSORS.BertProcessing(SEP, CLS), 1),
    (
      PROCESSORS.TemplateProcessing(  # XLM-RoBERTa
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[CLS, SEP]
      ),
      2,
    ),
    (
      PROCESSORS.Sequence(
        [
          PROCESSORS.ByteLevel(),
          PROCESSORS.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[CLS, SEP]
          ),
        ]
      ),
      1,
    ),
  ],
)
def test_a_pair_is_separated_as_the_tokenizer_does_it(tmp_path, processor, ends):
  words = ["<s>", "</s>", "<unk>", "a", "b", "c"]
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.add_special_tokens(["<s>", "</s>"])
  inner.post_processor = processor
  (tmp_path / "tokenizer.json").write_text(inner.to_str())
  roles = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
  own = tokenizer.load(tmp_path)
  assert own.pair_ends == ends
  fields = {"text": "a b", "text_pair": "c c b", "label": 1}
  [[pair]] = examples.encode_batch(
    [Document("f:1", "", "", fields)], "classification", own, label_names=("0", "1")
  )
  assert pair.ids.tolist() == inner.encode("a b", "c c b").ids
  types = (np.arange(len(pair.ids)) >= pair.second).astype(int)
  first = pair.ids.tolist().index(1) + 1  # one end belongs to the first text
  assert types.tolist() == [0] * first + [1] * (len(types) - first)


def sentencepiece_with_a_dummy_prefix():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat and the dog ran"] * 50),
    model_writer=model,
    vocab_size=290,
    model_type="bpe",
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=3,
  )
  return tokenizer.SentencePieceTokenizer(model.getvalue())


def with_a_dummy_prefix(tmp_path):
  t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
  t.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  t.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  t.train_from_iterator(
    ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran"] * 50,
    tokenizers.trainers.BpeTrainer(
      vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    ),
  )
  return tokenizer.load(folder(tmp_path / "t", t, bos_token="<s>", eos_token="</s>"))


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "bytes"])
def test_a_continuation_keeps_the_space_before_its_first_word(tmp_path, kind):
  t = {
    "sentencepiece": sentencepiece_with_a_dummy_prefix,
    "huggingface": lambda: with_a_dummy_prefix(tmp_path),
    "bytes": tokenizer.ByteTokenizer,
  }[kind]()
  whole, prompt = t.encode("the cat sat on the mat"), t.encode("the cat sat")
  assert whole[: len(prompt)] == prompt
  assert t.continuation([t.bos_id, *prompt], whole[len(prompt) :]) == " on the mat"
  assert t.continuation([t.bos_id], whole) == "the cat sat on the mat"
  assert t.continuation(prompt, []) == ""


@pytest.mark.parametrize("kind", ["sentencepiece", "trained", "bytes", "tiktoken"])
@hypothesis.given(
  text=hypothesis.strategies.text(alphabet="the cat\n▁é東🙂<|end|> </s>", max_size=30)
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_places_of_tokens(kind, text):
  """Ids are those of the text, and each token stands for its characters."""
  t = PLACED[kind]()
  [got] = t.encode_rendered([text], [[]])
  assert got.ids.tolist() == t.encode(text, specials=True)
  assert (got.starts[:-1] <= got.starts[1:]).all() and (got.ends[:-1] <= got.ends[1:]).all()
  assert ((got.starts >= 0) & (got.ends <= len(text))).all()
  covered = {i for a, b in zip(got.starts, got.ends) for i in range(a, b)}
  if kind != "sentencepiece":  # which drops spaces at both ends
    assert covered == set(range(len(text)))
  for start, end in t.special_ranges(text):
    (at,) = np.flatnonzero((got.starts == start) & (got.ends == end))
    assert got.ids[at] == t.special_ids[text[start:end]]


@functools.lru_cache
def trained():
  return tokenizer.train_sentencepiece([TEXT[:20_000]], vocab_size=400)


@functools.lru_cache
def ranks():
  lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
  more = f"{base64.b64encode(b' cat').decode()} 256\n{base64.b64encode(b'he').decode()} 257\n"
  settings = {"pattern": GPT2_PATTERN, "special_tokens": {"</s>": 258, "<|end|>": 259}}
  return tiktoken_lib.TiktokenTokenizer(
    ("".join(lines) + more).encode(), json.dumps(settings).encode()
  )


PLACED = {
  "sentencepiece": functools.lru_cache(sentencepiece_with_a_dummy_prefix),
  "trained": trained,
  "bytes": tokenizer.ByteTokenizer,
  "tiktoken": ranks,
}
