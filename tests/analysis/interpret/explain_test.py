"""The page on what a model computes from a prompt."""

import base64
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jaxgpt import config
from jaxgpt.analysis.interpret import explain, lens, lens_file, page, taps, tuned_lens
from jaxgpt.commands import main
from jaxgpt.inference import load
from jaxgpt.model import transformer
from jaxgpt.run import generation
from jaxgpt.text.tokenizers import tokenizer

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.S)


def written(capsys, workdir, out, *more):
  """(exit code, the numbers in the page, what was printed)."""
  code = main.main(["explain", f"--workdir={workdir}", f"--out={out}", *more])
  said = capsys.readouterr()
  found = json.loads(DATA.search(out.read_text())[1]) if out.exists() else None
  return code, found, said.out + said.err


def random_maps(cfg):
  """Translators that change a stream a little."""
  keys = jax.random.split(jax.random.key(0))
  zeros = tuned_lens.none(cfg)
  draw = lambda key, like: 0.05 * jax.random.normal(key, like.shape)
  return tuned_lens.Translators(*map(draw, keys, zeros))


@pytest.mark.slow
def test_the_page_of_a_language_model(trained, tmp_path, capsys):
  out = tmp_path / "page.html"
  run = load.load(trained, devices=jax.local_devices()[:1])
  moves = random_maps(run.parts.model.cfg)
  lens_file.write(tmp_path / "lens.npz", moves, run)
  code, found, said = written(
    capsys,
    trained,
    out,
    "--prompt=the cat</script>",
    "--corrupted=the dog</script>",
    "--top=3",
    f"--lens={tmp_path}/lens.npz",
  )
  assert code == 0 and f"wrote {out}" in said and "causal tracing" in said
  T, L, N = 17, 2, 4
  assert found["tokens"][1:5] == ["t", "h", "e", " "] and len(found["tokens"]) == T
  # Compared with the model itself; the numbers of each analysis have tests of their own.
  m = explain.of_run(run)
  ids = np.asarray([explain.encode(run, "the cat</script>")])
  logits = m.model.apply({"params": m.params}, ids, np.arange(T)[None]).logits[0]
  p = np.asarray(jax.nn.softmax(logits))
  np.testing.assert_allclose(
    [at["own"] for at in found["predictions"][:-1]], p[np.arange(T - 1), ids[0, 1:]], rtol=1e-3
  )
  assert [len(at["top"]) for at in found["predictions"]] == [3] * T
  np.testing.assert_allclose([at["top"][0][1] for at in found["predictions"]], p.max(-1), rtol=1e-3)
  maps = np.frombuffer(base64.b64decode(found["attention"]["data"]), np.uint8)
  maps = maps.reshape(found["attention"]["shape"]) / 255
  assert maps.shape == (L, N, T, T) and (maps[..., ~np.tri(T, dtype=bool)] == 0).all()
  np.testing.assert_allclose(maps.sum(-1), 1, atol=T / 255 / 2)
  final = [of[0] for of in found["lens"]["top"][-1]]
  assert len(found["lens"]["top"]) == L + 1 and final == [
    at["top"][0] for at in found["predictions"]
  ]
  assert found["tuned_lens"]["file"] == f"{tmp_path}/lens.npz" and "tuned lens (" in said
  assert found["tuned_lens"]["top"][-1] == found["lens"]["top"][-1]  # the model itself
  inputs = taps.Inputs(ids)
  h_LBTD = taps.read(m.model, m.params, inputs, ("resid_pre",)).at["resid_pre"]
  for layer, (a, b, top) in enumerate(zip(*moves, found["tuned_lens"]["top"][:-1], strict=True)):
    logits_BTV = lens.unembed(m.model, m.params, inputs, h_LBTD[layer] + h_LBTD[layer] @ a + b)
    p_T = np.asarray(jax.nn.softmax(logits_BTV[0]).max(-1))
    np.testing.assert_allclose([at[0][1] for at in top], p_T, rtol=2e-3)
  np.testing.assert_allclose(
    np.sum(found["components"]["values"], 0), np.asarray(logits.max(-1)), atol=1e-2
  )
  assert np.shape(found["components"]["heads"]) == (L, N, T) and found["components"]["gap"] < 1e-4
  g = found["gradients"]
  assert g["complete"] and g["position"] == T - 1
  np.testing.assert_allclose(sum(g["integrated"]), g["value"] - g["baseline"], atol=5e-3)
  t = found["trace"]
  assert t["differ"] == [5, 6, 7]
  assert np.shape(t["positions"]) == (L, T) and np.shape(t["heads"]) == (L, N)
  np.testing.assert_allclose(np.asarray(t["positions"])[0, [0, 1, 2, 3, 4, 8]], 0, atol=1e-2)
  assert np.shape(found["scores"]["induction"]) == (L, N)
  assert found["left_out"] == []


def test_prompts_that_cannot_be_explained_are_refused(trained, tmp_path, capsys):
  for more, words in (
    (("--prompt=",), "--prompt='': there is nothing to explain"),
    (("--prompt=" + "x" * 40,), "shorten it"),
    (("--prompt=abc", "--corrupted=ab"), "--corrupted has 3 tokens, --prompt 4"),
    (("--prompt=abc", "--corrupted=abc"), "change a word"),
  ):
    code, found, said = written(capsys, trained, tmp_path / "page.html", *more)
    assert (code, found) == (2, None) and words in said and said.count("\n") == 1
  code, _, said = written(capsys, trained, tmp_path / "none" / "page.html", "--prompt=abc")
  assert code == 2 and "a folder that exists" in said


def encoder(**fields):
  """A run of an encoder of bytes that was never trained."""
  c = config.base()
  c.model.update(
    dict(
      num_layers=2,
      width=16,
      num_heads=2,
      max_len=32,
      causal=False,
      norm_placement="post",
      init_std=0.5,
    )
    | fields
  )
  c.data.seq_len = 32
  c.mesh.fsdp = 1
  found = tokenizer.from_spec("bytes", [])
  c.model.vocab_size = found.vocab_size
  c.objective.name = "classification" if "num_labels" in fields else "masked_lm"
  c = config.resolve(c)
  mesh, parts = load.place(c, jax.local_devices()[:1])
  params = jax.jit(lambda: transformer.init(parts.model, jax.random.key(0)))()
  return load.Run(c, parts, mesh, params, 0, found, "", generation.Generation({}))


@pytest.mark.slow
def test_an_encoder_predicts_at_its_mask_and_leaves_out_what_makes_no_sense():
  run = encoder()
  mask = next(n for n, i in run.tokenizer.special_ids.items() if i == run.tokenizer.mask_id)
  found = explain.explain(run, f"ab{mask}c")
  assert found["kind"] == "masked"
  assert found["tokens"][3] == mask and found["gradients"]["position"] == 3
  assert found["components"] is None and found["scores"] is None
  assert "norm_placement='post'" in found["left_out"][0]
  assert found["gradients"]["complete"]
  assert found["gradients"]["integrated"][0] == found["gradients"]["integrated"][3] == 0
  page.render(found)


@pytest.mark.slow
def test_a_classifier_has_one_prediction_of_the_whole_text():
  run = encoder(head="classifier", num_labels=3, label_names=("a", "b", "c"), pooling="first")
  found = explain.explain(run, "abc")
  assert found["kind"] == "rows" and len(found["predictions"]) == 1
  assert {name for name, _ in found["predictions"][0]["top"]} == {"a", "b", "c"}
  assert found["gradients"]["position"] is None and found["gradients"]["complete"]
  assert "model.head='classifier'" in found["left_out"][0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_runs_in_a_browser_without_errors(trained, tmp_path, capsys):
  out = tmp_path / "page.html"
  written(capsys, trained, out, "--prompt=the cat", "--corrupted=the dog")
  assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z]+:", out.read_text())
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
  done = subprocess.run(
    [
      "chromium",
      *options,
      f"--user-data-dir={tmp_path}/profile",
      "--enable-logging=stderr",
      "--dump-dom",
      f"file://{out}",
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert "CONSOLE" not in done.stderr
  for part in ("tokens", "predictions", "attention", "lens", "attribution", "trace", "scores"):
    assert f'id="h-{part}"' in done.stdout
  assert done.stdout.count('<canvas width="8"') >= 8
