"""The commands as a user types them, and their messages on common mistakes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from jaxgpt import config
from jaxgpt.commands import generate, main
from jaxgpt.errors import UserError
from jaxgpt.text.prepare import shards

CONFIG = """from jaxgpt import config

def get_config():
  c = config.base()
  c.model.update(dict(num_layers=1, width=16, num_heads=2, mlp_width=32))
  c.data.update(dict(seq_len=32, batch_size=8))
  c.train.steps = 4
  c.schedule.warmup_steps = 1
  c.log.every = 2
  return c
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory, corpus):
  """A folder with a config, data and a finished run."""
  folder = tmp_path_factory.mktemp("site")
  (folder / "c.py").write_text(CONFIG)
  (folder / "data").symlink_to(corpus)
  assert (
    main.main(
      [
        "train",
        f"--config={folder}/c.py",
        f"--config.data.path={folder}/data",
        f"--workdir={folder}/run",
      ]
    )
    == 0
  )
  return folder


def run(capsys, *args):
  """(exit code, standard output, standard error) of a command."""
  try:
    code = main.main([str(a) for a in args])
  except SystemExit as e:  # argparse
    code = e.code
  out, err = capsys.readouterr()
  return code, out, err


def refused(capsys, *args):
  """The one message of a command that must fail."""
  code, _, err = run(capsys, *args)
  assert code in (1, 2)
  assert "Traceback" not in err
  lines = [line for line in err.splitlines() if "error:" in line]
  assert len(lines) == 1, err
  return lines[0]


def train(site, *more, data="data", workdir="other"):
  return [
    "train",
    f"--config={site}/c.py",
    f"--config.data.path={site}/{data}",
    f"--workdir={site}/{workdir}",
    *more,
  ]


def test_help_answers_at_once_without_jax():
  code = "import sys, jaxgpt.commands.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
  code += "print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.splitlines()[-1] == "False"
  assert all(f"  {name} " in out.stdout for name in ("data", "train", "evaluate", "generate"))


@pytest.mark.parametrize("command", ["data", "train", "evaluate", "generate", "demo"])
def test_each_command_has_help(capsys, command):
  code, out, _ = run(capsys, command, "--help")
  assert code == 0 and "usage:" in out


def test_evaluate_reports_bits_per_byte(site, capsys):
  code, out, _ = run(capsys, "evaluate", f"--workdir={site}/run", "--split=test")
  assert code == 0 and "bits per byte" in out and "test at step 4" in out


def test_generate_continues_the_prompt(site, capsys):
  args = ["generate", f"--workdir={site}/run", "--prompt=the cat", "--max-new=5", "--samples=2"]
  code, out, _ = run(capsys, *args)
  assert code == 0 and out.count("the cat") == 2
  assert run(capsys, *args)[1] == out, "the same seed draws the same text"


def test_one_text_file_is_enough(site, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("".join(f"line {i} of a poem\n" for i in range(400)))
  code, out, _ = run(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/d", "--tokenizer=bytes")
  assert code == 0 and "cut" in out
  code, out, _ = run(
    capsys, *train(site, f"--config.data.path={tmp_path}/d", f"--workdir={tmp_path}/run")
  )
  assert code == 0 and "validation loss" in out


def test_jsonl_makes_a_document_of_each_line(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\nbroken\n' * 40)
  code, out, _ = run(
    capsys,
    "data",
    tmp_path / "a.jsonl",
    f"--out={tmp_path}/d",
    "--tokenizer=bytes",
    "--field=text=body",
    "--validation=0",
    "--test=0",
  )
  assert code == 0 and "80 documents" in out and "dropped 40" in out


def test_a_misspelt_key(site, capsys):
  assert "did you mean 'optim.lr'" in refused(capsys, *train(site, "--config.optim.lrr=1"))


def test_a_misspelt_option(site, capsys):
  assert "--workdri" in refused(capsys, *train(site, "--workdri=x"))


def test_a_missing_config_file(site, capsys):
  message = refused(capsys, "train", f"--config={site}/no.py", f"--workdir={site}/x")
  assert "no such file" in message


def test_no_data_path(site, capsys):
  message = refused(capsys, "train", f"--config={site}/c.py", f"--workdir={site}/x")
  assert "data.path is not set" in message


def test_a_missing_corpus(site, tmp_path, capsys):
  assert "nowhere" in refused(capsys, "data", tmp_path / "nowhere", f"--out={tmp_path}/d")
  assert "nowhere" in refused(capsys, *train(site, data="nowhere"))


def test_an_empty_file(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("")
  assert "no document" in refused(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/d")
  assert not (tmp_path / "d").exists()


def test_a_text_shorter_than_one_context(site, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("Too short.")
  args = ["data", tmp_path / "a.txt", f"--out={tmp_path}/d", "--tokenizer=bytes"]
  assert run(capsys, *args)[0] == 0
  code, out, _ = run(
    capsys, *train(site, f"--config.data.path={tmp_path}/d", f"--workdir={tmp_path}/run")
  )
  assert code == 0 and "has no validation split: this run is not evaluated" in out
  assert "holds 4 steps; no validation split" in out
  message = refused(capsys, "evaluate", f"--workdir={tmp_path}/run")
  assert "has no validation split; choose one of train" in message and "--data=DIR" in message


def test_evaluate_on_other_data(site, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("".join(f"line {i} of a poem\n" for i in range(400)))
  run(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/d", "--tokenizer=bytes")
  digest = shards.read_manifest(tmp_path / "d")["digest"]
  args = ["evaluate", f"--workdir={site}/run", f"--data={tmp_path}/d", "--split=test"]
  code, out, _ = run(capsys, *args)
  assert code == 0 and f"(other data than the run's, digest {digest[:12]}) at step 4: loss" in out
  code, out, _ = run(capsys, *args, "--json")
  found = json.loads(out)
  assert found["data_digest"] == digest and found["split"] == "test" and found["bits_per_byte"] > 0
  own = json.loads(run(capsys, "evaluate", f"--workdir={site}/run", "--json")[1])
  assert own["data_digest"] != digest
  run(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/e", "--tokenizer=sentencepiece:290")
  message = refused(capsys, *args[:2], f"--data={tmp_path}/e")
  assert "tokens of another tokenizer" in message and "--tokenizer=RUN/tokenizer" in message


def test_a_prompt_longer_than_the_context(site, capsys):
  message = refused(capsys, "generate", f"--workdir={site}/run", "--prompt=" + "word " * 40)
  assert "201 tokens" in message and "context 32" in message


def test_a_workdir_with_a_run_of_another_config(site, capsys):
  message = refused(capsys, *train(site, "--config.optim.lr=0.5", workdir="run"))
  assert "optim.lr was 0.001, is 0.5" in message


def test_a_changed_key_comes_before_those_that_follow_from_it(site, capsys):
  """Of a wider model five derived sizes differ, each with a name before model.width."""
  message = refused(capsys, *train(site, "--config.model.width=32", workdir="run"))
  assert "of another config: model.width was 16, is 32; " in message
  assert "model.attn_scale was" in message and "model.head_dim" in message
  # Also where the new command leaves out what the old one gave.
  other = refused(capsys, *train(site, "--config.model.head_dim=4", workdir="run"))
  assert "of another config: model.head_dim was 8, is 4; " in other


@pytest.mark.parametrize("workdir", ["file/run", "file"])
def test_a_workdir_that_cannot_be_written(site, capsys, workdir):
  (site / "file").write_text("")
  message = refused(capsys, *train(site, workdir=workdir))
  assert "can't be written" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the case above stands in")
def test_a_read_only_workdir(site, tmp_path, capsys):
  tmp_path.chmod(0o500)
  assert "can't be written" in refused(capsys, *train(site, f"--workdir={tmp_path}/run"))


def test_an_out_folder_that_cannot_be_written(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("some text\n" * 100)
  (tmp_path / "file").write_text("")
  message = refused(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/file/d")
  assert "--out=" in message and "cannot be written" in message


@pytest.mark.parametrize(
  "name, text",
  [
    ("config.json", "null"),
    ("config.json", '{"config": 3}'),
    ("config.json", "{"),
    ("config.json", '{"config": {"optim": {"lr": "x"}}}'),
    ("config.json", '{"config": {"optim": {"lrr": 1}}}'),
    ("starts.jsonl", '{"time": 1}\n'),
    ("starts.jsonl", '{"ti'),
  ],
)
def test_a_damaged_run_folder(site, tmp_path, capsys, name, text):
  shutil.copytree(site / "run", tmp_path / "run")
  (tmp_path / "run" / name).write_text(text)
  assert name in refused(capsys, *train(site, f"--workdir={tmp_path}/run"))
  assert name in refused(capsys, "evaluate", f"--workdir={tmp_path}/run")


def test_data_that_was_moved(site, tmp_path, capsys):
  shutil.copytree(site / "run", tmp_path / "run")
  shutil.copytree(site / "data", tmp_path / "moved")
  text = (tmp_path / "run" / "config.json").read_text()
  (tmp_path / "run" / "config.json").write_text(text.replace(f"{site}/data", "gone"))
  (tmp_path / "run" / "files.json").unlink()  # the change is the user's
  message = refused(capsys, "evaluate", f"--workdir={tmp_path}/run")
  assert "the run's data folder 'gone' holds no manifest.json" in message and "--data=" in message
  args = ["evaluate", f"--workdir={tmp_path}/run", f"--data={tmp_path}/moved"]
  assert run(capsys, *args)[0] == 0


def test_data_that_is_not_the_runs(site, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("".join(f"other text {i}\n" for i in range(2000)))
  run(capsys, "data", tmp_path / "a.txt", f"--out={tmp_path}/d", "--tokenizer=bytes")
  moved = tmp_path / "run"
  shutil.copytree(site / "run", moved)
  found = json.loads((moved / "config.json").read_text())
  found["config"]["data"]["path"] = f"{tmp_path}/d"  # as if it had been prepared again
  (moved / "config.json").write_text(json.dumps(found))
  (moved / "files.json").unlink()
  message = refused(capsys, "evaluate", f"--workdir={moved}")
  assert "is not the data of this run" in message


def test_reading_a_run_leaves_a_checkpoint_that_is_being_saved(site, tmp_path, capsys):
  shutil.copytree(site / "run", tmp_path / "run")
  saving = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
  saving.mkdir()
  assert run(capsys, "evaluate", f"--workdir={tmp_path}/run")[0] == 0
  assert saving.exists()


def test_a_batch_that_the_mesh_does_not_divide(site, capsys):
  message = refused(capsys, *train(site, "--config.data.batch_size=12"))
  assert "data.batch_size=12" in message and "mesh.fsdp=8" in message


def test_a_folder_without_a_run(tmp_path, capsys):
  assert "holds no run" in refused(capsys, "evaluate", f"--workdir={tmp_path}")
  assert "holds no run" in refused(capsys, "generate", f"--workdir={tmp_path}/nowhere")


def test_a_step_that_was_not_kept(site, capsys):
  message = refused(capsys, "evaluate", f"--workdir={site}/run", "--step=3")
  assert "no checkpoint of step 3" in message and "there are: 4" in message


def test_sampling_settings_out_of_range(site, capsys):
  assert "--top-p=1.5" in refused(capsys, "generate", f"--workdir={site}/run", "--top-p=1.5")
  assert "--samples" in refused(capsys, "generate", f"--workdir={site}/run", "--samples=0")
  assert "--seed" in refused(capsys, "generate", f"--workdir={site}/run", f"--seed={10**20}")


def test_a_run_says_how_its_texts_end(site):
  values = json.loads((site / "run" / "generation_config.json").read_text())
  assert values == {"eos_token_id": [2]}


@pytest.mark.parametrize(
  "given, read",
  [("plain", "plain"), ("@@me, hi", "@me, hi"), ("@{file}", "from\na file\n"), ("a@b", "a@b")],
)
def test_prompts_and_files_with_prompts(tmp_path, given, read):
  (tmp_path / "p.txt").write_bytes(b"from\r\na file\n")
  assert generate.read_prompt(given.format(file=tmp_path / "p.txt")) == read


@pytest.mark.parametrize(
  "prompt, message",
  [
    ("@", "No such file"),
    ("@missing.txt", "No such file.*with @@ for an @ at its beginning"),
    ("@{folder}", "Is a directory"),
    ("@{folder}/latin", "can't decode byte 0xe9"),
    ("@/dev/zero", "more than 67,108,864 bytes"),
  ],
)
def test_files_that_are_no_prompt(tmp_path, prompt, message):
  (tmp_path / "latin").write_bytes(b"caf\xe9")
  with pytest.raises(UserError, match=message):
    generate.read_prompt(prompt.format(folder=tmp_path))


def test_chat_with_a_run_that_has_no_template(site, capsys):
  line = refused(capsys, "generate", f"--workdir={site}/run", "--prompt=x", "--chat")
  assert "has no chat template" in line and "without --chat" in line


@pytest.mark.parametrize(
  "words",
  [
    ["generate", "--workdir=r", "--prompt=caf\udce9"],
    ["generate", "--workdir=r", "--prompt", "caf\udce9"],
    ["data", "--out=\udce9", "a.txt"],
    ["train", "--config=c.py", "--config.data.path=\udce9", "--workdir=r"],
  ],
)
def test_a_value_that_is_not_utf8_is_refused(capsys, words):
  assert "is not UTF-8 text" in refused(capsys, *words)


@pytest.mark.parametrize(
  "encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow), "utf-16"]
)
def test_terminals_that_are_not_utf8(encoding, tmp_path):
  """Help and errors are written with escapes for the characters that a terminal lacks."""
  environment = os.environ | {"PYTHONIOENCODING": encoding}
  for words, has in (
    (["data", "--help"], "usage: jaxgpt data"),
    (["generate", f"--workdir={tmp_path}/\u2713\u6771", "--prompt=x"], "holds no run"),
  ):
    done = subprocess.run(
      [sys.executable, "-m", "jaxgpt", *words], capture_output=True, env=environment, check=False
    )
    assert has in (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == (0 if "--help" in words else 2)


def test_a_vocabulary_smaller_than_the_tokenizer(site, capsys):
  message = refused(capsys, *train(site, "--config.model.vocab_size=100"))
  assert "model.vocab_size=100" in message and "264" in message


def test_tensorboard_files(site, capsys):
  code, _, _ = run(capsys, *train(site, "--config.log.tensorboard=True", workdir="tb"))
  assert code == 0 and list((site / "tb" / "tensorboard").glob("events.*"))


def test_prepared_data_is_not_overwritten_by_accident(site, tmp_path, capsys):
  (tmp_path / "a.txt").write_text("some text\n" * 200)
  args = ["data", tmp_path / "a.txt", f"--out={tmp_path}/d", "--tokenizer=bytes"]
  assert run(capsys, *args)[0] == 0
  assert "--overwrite" in refused(capsys, *args)
  assert run(capsys, *args, "--overwrite")[0] == 0


def test_the_config_of_a_run_is_the_file_plus_the_command_line(site):
  from jaxgpt.run import run_folder

  saved = run_folder.read_config(site / "run")
  assert saved.data.path == f"{site}/data"
  assert config.flatten(saved)["model.width"] == 16
