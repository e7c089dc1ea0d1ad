"""A step that `plan --save` wrote is what training runs; another one is not."""

import json

import jax
import pytest

from jaxgpt import config
from jaxgpt.commands import main
from jaxgpt.errors import UserError
from jaxgpt.parallel import mesh as mesh_lib
from jaxgpt.plan import lower
from jaxgpt.training import build as build_lib
from jaxgpt.training import compiled_step, train_step

COMPILED = "/jax/core/compile/backend_compile_duration"

FILE = """
from jaxgpt import config

def get_config():
  c = config.base()
  c.update_from_flattened_dict({values})
  return c
"""


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
  """(config file, compiled step, a function that trains and says what was compiled)."""
  folder = tmp_path_factory.mktemp("saved")
  values = config.flatten(tiny(model__vocab_size=264, train__steps=3, mesh__fsdp=4, mesh__data=2))
  path = folder / "tiny.py"
  path.write_text(FILE.format(values={k: v for k, v in values.items() if v is not None}))
  assert (
    main.main(["plan", f"--config={path}", "--topology=here", f"--save={folder / 'step'}"]) == 0
  )

  def train(name, *flags, step=folder / "step"):
    names = []
    listener = lambda event, _, **about: event == COMPILED and names.append(about["fun_name"])
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
      code = main.main(
        [
          "train",
          f"--config={path}",
          f"--workdir={folder / name}",
          f"--config.mesh.compiled_step={step}",
          *flags,
        ]
      )
    finally:
      jax.monitoring.unregister_event_duration_listener(listener)
    assert code == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines]
    return losses, any("train_step" in name for name in names)

  return path, folder / "step", train


@pytest.mark.slow
def test_a_start_with_a_saved_step_compiles_none_and_trains_the_same(saved, capsys):
  _, _, train = saved
  want, compiled = train("compiled", step="")
  assert compiled and len(want) >= 3
  got, compiled = train("loaded")
  assert not compiled and got == want
  assert "matches this step: nothing is compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_the_doctor_says_whether_a_saved_step_would_be_used(saved, capsys):
  path, step, _ = saved
  flags = ["doctor", f"--config={path}", f"--config.mesh.compiled_step={step}"]
  assert main.main(flags) == 0
  assert f"{step} is this step" in capsys.readouterr().out
  assert main.main([*flags, "--config.optim.b1=0.8"]) == 0
  assert f"{step} is not used: the program was" in capsys.readouterr().out


def load(path, step, *flags):
  """The answer of `compiled_step.load` for a config with these flags; nothing is compiled."""
  c = lower.resolve(config.load(path, flags)[0])
  mesh = mesh_lib.make(c.mesh)
  parts = build_lib.build(c, mesh)
  made = train_step.make(parts.objective, parts.tx, parts.schedule, c)
  lowered = train_step.lower(made, parts.state, lower.batch_shapes(c), mesh)
  return compiled_step.load(str(step), lowered, mesh, c.mesh.compiler_options)


@pytest.mark.slow
def test_another_step_is_compiled_and_the_reason_is_told(saved, capsys):
  _, _, train = saved
  _, compiled = train("other", "--config.optim.lr=0.5")
  assert compiled
  assert (
    "does not match this step; compiling it instead: the program was" in capsys.readouterr().out
  )


@pytest.mark.parametrize(
  "flags, why",
  [
    (["--config.data.batch_size=16"], "the program was"),
    (["--config.mesh.fsdp=8", "--config.mesh.data=1"], "the mesh was data=2 fsdp=4, and is fsdp=8"),
    (["--config.mesh.compiler_options=('a=b',)"], "the compiler's options was none, and is a=b"),
  ],
)
def test_what_differs_is_named(saved, flags, why):
  compiled, reason = load(*saved[:2], *flags)
  assert compiled is None and why in reason


def test_other_versions_and_variables_are_named(saved, monkeypatch):
  path, step, _ = saved
  assert load(path, step)[1] is None
  monkeypatch.setattr(
    compiled_step.installed, "version", lambda name: "9.9.9" if name == "jaxlib" else None
  )
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--x=1")
  compiled, reason = load(path, step)
  assert compiled is None
  assert "and is jaxlib 9.9.9" in reason
  assert "the variable LIBTPU_INIT_ARGS was none, and is --x=1" in reason


def test_a_damaged_file_is_not_used_and_another_kind_of_file_is_refused(saved, tmp_path):
  path, step, _ = saved
  damaged, whole = tmp_path / "damaged", step.read_bytes()
  damaged.write_bytes(whole[:-100] + bytes(100))
  assert load(path, damaged) == (None, "the file is damaged")
  for wrong, words in ((path, "is not a compiled step"), (tmp_path / "nowhere", "cannot be read")):
    with pytest.raises(UserError, match=words):
      load(path, wrong)


def test_where_pallas_kernels_stand_in_the_source_is_no_part_of_a_program():
  class Lowered:
    def __init__(self, text):
      self.as_text = lambda: text

  mesh = jax.make_mesh((8,), ("data",))
  text = r'{backend_config = "{\22debug_locations\22: \22AAAA==\22, \22body\22: \22BB\22}"}'
  one, other, third = (
    compiled_step.identity(Lowered(t), mesh)["the program"]
    for t in (text, text.replace("AAAA", "CCCC"), text.replace("BB", "DD"))
  )
  assert one == other != third


def test_a_program_for_gpus_is_not_saved_where_there_are_none(saved, tmp_path, capsys):
  code = main.main(
    ["plan", f"--config={saved[0]}", "--topology=h100x8", f"--save={tmp_path / 'x'}"]
  )
  assert code == 2 and "save it on the GPUs with --topology=here" in capsys.readouterr().err


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--topology=here", "--search"], "--search has no effect with --topology=here"),
    (["--topology=here", "--json=x"], "--json has no effect with --topology=here"),
    (["--topology=v5e-8", "--search", "--golden=x"], "--golden has no effect with --search"),
    (["--topology=v5e-8", "--shardings", "--top=3"], "--top has no effect with --shardings"),
    (["--topology=v5e-8", "--keep-batch"], "--keep-batch needs --search"),
    (["--topology=h100x8", "--top=3"], "for GPUs, leave it out"),
  ],
)
def test_flags_of_plan_that_would_do_nothing_are_refused(saved, capsys, flags, words):
  assert main.main(["plan", f"--config={saved[0]}", *flags]) == 2
  assert words in capsys.readouterr().err


def test_what_cannot_be_written_or_serialized_is_said(tmp_path):
  compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
  with pytest.raises(UserError, match="cannot be written"):
    compiled_step.save(tmp_path / "no" / "folder", compiled, {})
  with pytest.raises(UserError, match="cannot be saved: AttributeError"):
    compiled_step.save(tmp_path / "x", object(), {})
