"""A preparation gives the same bytes when it is killed and continued, and on every executor."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxgpt.errors import UserError
from jaxgpt.text.prepare import executors, jobs, monitor, prepare, run_job
from tests import quick

# Runs prepare in a child that kills itself at its Nth operation on a file of the work, for each N.
_CRASH_MATRIX = """
import json, os, signal, sys
from jaxgpt.text.prepare import prepare
folder, step, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
events = ("open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")
state = {"left": None}
def hook(event, args):
  if state["left"] is not None and event in events and folder + "/out" in str(args):
    state["left"] -= 1
    if not state["left"]:
      os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
def run(n, out):
  child = os.fork()
  if not child:
    state["left"] = n
    prepare.prepare([folder + "/in"], out, **options)
    os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
n, kills = 1, 0
while True:
  out = f"{folder}/out{n}"
  code = run(n, out)
  if code == 0:
    break
  assert code == -signal.SIGKILL, code
  if not os.path.exists(out) or os.path.exists(out + ".unfinished"):
    code = run(-1, out)
    assert code == 0 or not os.listdir(out + ".unfinished"), n
  n, kills = n + step, kills + 1
print(kills)
"""


def write_corpus(folder, files=12, documents=40, words=60):
  """JSON Lines files of short documents, some of which are broken or appear again."""
  draw = random.Random(0)
  folder.mkdir(exist_ok=True)
  for i in range(files):
    lines = []
    for j in range(documents):
      text = " ".join(
        draw.choice(["alpha", "beta", "gamma", "δέλτα", "x", f"w{i}{j}"])
        for _ in range(draw.randrange(1, words))
      )
      lines.append(json.dumps({"text": text + "\n"}) if draw.random() > 0.05 else "{broken")
    (folder / f"{i:02}.jsonl").write_text("\n".join(lines) + "\n")


def digests(folder):
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


OPTIONS = {
  "tokenizer": "sentencepiece:300",
  "task_bytes": 10_000,
  "shard_tokens": 2_000,
  "cut_chars": 0,
}


def crash_everywhere(tmp_path, step):
  write_corpus(tmp_path / "in", files=2, documents=20)
  options = {**OPTIONS, "task_bytes": 2_000, "clean": ["unicode"], "dedup": ["exact"]}
  prepare.prepare([tmp_path / "in"], tmp_path / "whole", **options)
  done = subprocess.run(
    [sys.executable, "-c", _CRASH_MATRIX, str(tmp_path), str(step), json.dumps(options)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  kills = int(done.stdout)
  whole = digests(tmp_path / "whole")
  outs = [
    path
    for path in tmp_path.iterdir()
    if path.name.startswith("out") and not path.name.endswith(".unfinished")
  ]
  assert len(outs) == kills + 1
  for out in outs:
    assert digests(out) == whole, out
  return kills


def test_killed_at_file_operations_all_over_the_run(tmp_path):
  assert crash_everywhere(tmp_path, 59) > 5


@pytest.mark.slow
def test_killed_at_every_file_operation(tmp_path):
  assert crash_everywhere(tmp_path, 1) > 150


def command(folder, out, *more):
  options = [f"--{key.replace('_', '-')}={value}" for key, value in OPTIONS.items()]
  return [
    sys.executable,
    "-m",
    "jaxgpt",
    "data",
    str(folder),
    f"--out={out}",
    *options,
    "--workers=2",
    *more,
  ]


def kill_at_random(tmp_path, kills, *more):
  """Kills the whole process group of `jaxgpt data` so many times, running it again and again."""
  pytest.importorskip("datatrove")
  write_corpus(tmp_path / "in", files=2)
  start = time.monotonic()
  subprocess.run(
    command(tmp_path / "in", tmp_path / "whole", *more), check=True, capture_output=True
  )
  seconds = time.monotonic() - start
  whole, draw, killed, runs = digests(tmp_path / "whole"), random.Random(1), 0, 0
  while killed < kills:
    out = tmp_path / f"out{runs}"
    runs += 1
    while True:
      process = subprocess.Popen(
        command(tmp_path / "in", out, *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
      )
      try:
        code = process.wait(draw.uniform(0.1, 1.0) * seconds if killed < kills else None)
        assert code == 0, process.stderr.read()
        break
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
        left = out.with_name(f"{out.name}.unfinished")
        if out.exists() and not (left.exists() and any(left.iterdir())):
          break  # all was done
    assert digests(out) == whole
  assert not list(tmp_path.glob("*.unfinished/*"))


@pytest.mark.slow
def test_twenty_kills_of_the_whole_process_group(tmp_path):
  kill_at_random(
    tmp_path,
    20,
    "--clean=length:min_chars=3",
    "--dedup=exact",
    "--dedup=near",
    "--decontaminate=held-out",
  )


@pytest.mark.slow
def test_three_kills_of_the_whole_process_group(tmp_path):
  kill_at_random(tmp_path, 3)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
  pytest.importorskip("datatrove")
  write_corpus(tmp_path / "in", files=5)
  prepare.prepare([tmp_path / "in"], tmp_path / "process", **OPTIONS)
  subprocess.run(
    command(tmp_path / "in", tmp_path / "local", "--workers=3"), check=True, capture_output=True
  )
  assert digests(tmp_path / "local") == digests(tmp_path / "process")


@pytest.mark.parametrize("delay", quick.first([0.3, 0.0, 1.0]))
def test_ctrl_c_is_one_line_whoever_hears_it(tmp_path, delay):
  pytest.importorskip("datatrove")
  write_corpus(tmp_path / "in", files=4, documents=2000, words=200)
  process = subprocess.Popen(
    command(tmp_path / "in", tmp_path / "out", "--task-bytes=20000"),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,
    # The background jobs of a shell, and so these tests, may ignore SIGINT and pass that on.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  assert process.stdout.readline().startswith(b"inputs:")  # now workers are started
  time.sleep(delay)
  os.killpg(process.pid, signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert (process.returncode, errors) == (130, b"jaxgpt: interrupted\n")
  assert (tmp_path / "out.unfinished").is_dir()


@pytest.mark.slow
def test_killing_the_main_process_alone_leaves_no_lock_behind(tmp_path):
  pytest.importorskip("datatrove")
  write_corpus(tmp_path / "in", files=4, documents=400, words=200)
  more = ["--task-bytes=20000"]
  process = subprocess.Popen(
    command(tmp_path / "in", tmp_path / "out", *more),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  for line in process.stdout:
    if line.startswith(b"tokenizer:"):  # the next job begins
      break
  time.sleep(0.1)
  process.kill()
  assert process.wait() == -signal.SIGKILL  # it was still at work
  subprocess.run(command(tmp_path / "in", tmp_path / "out", *more), check=True, capture_output=True)
  options = {**OPTIONS, "task_bytes": 20_000}
  prepare.prepare([tmp_path / "in"], tmp_path / "again", **options)
  assert digests(tmp_path / "out") == digests(tmp_path / "again")


@pytest.mark.parametrize("workers", quick.first([1, 2]))
def test_a_full_disk_is_one_message_and_the_run_goes_on(tmp_path, workers):
  """A limit on the size of files stands in for it."""
  pytest.importorskip("datatrove")
  write_corpus(tmp_path / "in", files=3, documents=200, words=200)
  options = [f"--workers={workers}", "--task-bytes=100000"]
  run = command(tmp_path / "in", tmp_path / "out", *options)
  limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", *run]
  done = subprocess.run(limited, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "cannot be written" in done.stderr and "make room" in done.stderr
  subprocess.run(run, check=True, capture_output=True)
  subprocess.run(
    command(tmp_path / "in", tmp_path / "whole", *options), check=True, capture_output=True
  )
  assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def _job(tmp_path, run, tasks=3):
  work = jobs.Work(tmp_path / "work", {})
  return work.job("some", tasks, run, [], print)


def fail(rank, folder, progress):
  if rank == 1:
    raise UserError("no such thing as task 1")
  return {}


def die(rank, folder, progress):
  if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  return {}


def break_(rank, folder, progress):
  return {"value": 1 // (rank - 1)}


@pytest.mark.parametrize(
  "run, error, message",
  [
    (fail, UserError, "no such thing as task 1"),
    (die, UserError, "ended without a result"),
    (break_, RuntimeError, "ZeroDivisionError"),
  ],
)
def test_failures_of_workers_are_told(tmp_path, run, error, message):
  pytest.importorskip("datatrove")
  job = _job(tmp_path, run)
  with pytest.raises(error, match=message):
    run_job.run(job, executors.make("local", 2), print)
  assert job.missing()[0] in (0, 1)


def test_a_task_whose_outputs_are_damaged_is_done_again(tmp_path):
  calls = []

  def write(rank, folder, progress):
    calls.append(rank)
    (folder / "out.txt").write_text(f"{rank} " * 10)
    return {"rank": rank}

  job = _job(tmp_path, write)
  assert run_job.run(job, None, print) == [{"rank": rank} for rank in range(3)]
  (job.task_folder(1) / "out.txt").write_text("1")
  run_job.run(job, None, print)
  assert calls == [0, 1, 2, 1]
  assert (job.task_folder(1) / "out.txt").read_text() == "1 " * 10


def test_progress_is_told_though_a_file_is_half_written(tmp_path, monkeypatch):
  monkeypatch.setattr(monitor, "_REPORT_SECONDS", 0.02)
  monkeypatch.setattr(monitor, "_COUNT_SECONDS", -1)

  def slow(rank, folder, progress):
    progress(2, 3_000_000)
    half = folder.with_name(".half-1-2")
    half.mkdir(exist_ok=True)
    (half / "progress").write_text("")
    time.sleep(0.3)
    return {}

  lines = []
  run_job.run(_job(tmp_path, slow), None, lines.append)
  assert any("0 of 3 tasks done, at work on 2 documents, 3 MB" in line for line in lines)
  assert any("2 of 3 tasks done, at work on 2 documents, 3 MB" in line for line in lines)


def test_a_terminal_is_shown_documents_and_bytes_a_second(tmp_path, monkeypatch):
  monkeypatch.setattr(monitor, "_SHOW_SECONDS", 0.02)
  monkeypatch.setattr(monitor, "_REPORT_SECONDS", 0.01)
  monkeypatch.setattr(monitor, "_COUNT_SECONDS", -1)

  class Report(list):
    def __init__(self):
      self.shown = []

    def __call__(self, line):
      self.append(line)

    def show(self, status):
      self.shown.append(status)

  def slow(rank, folder, progress):
    progress(2, 3_000_000)
    time.sleep(0.2)
    return {}

  job, report = _job(tmp_path, slow), Report()
  run_job.run_task(job, 1)  # by an earlier run
  run_job.run(job, None, report)
  *shown, last = report.shown
  assert last is None and not any("at work" in line for line in report)
  assert {(s.done, s.tasks, s.documents) for s in shown} <= {
    (1, 3, 2),
    (1, 3, 4),
    (2, 3, 4),
    (2, 3, 6),
    (3, 3, 6),
  }
  assert (2, 3, 6) in {(s.done, s.tasks, s.documents) for s in shown}
  assert 5e6 < shown[-1].rate < 6e6 / 0.35  # what was there before is not counted


@pytest.mark.parametrize(
  "args, message",
  [
    (("cloud",), "--executor=cloud: choose one of process"),
    (("local", -1), "--workers=-1"),
    (("process", 0, {"time": 1}), "process has no such option"),
    (("slurm", 0, {"partition": "cpu"}), "--executor-option=time="),
    (("slurm", 0, {"queue": "cpu"}), "choose one of time, partition"),
  ],
)
def test_bad_executors_are_named(args, message):
  pytest.importorskip("datatrove")
  with pytest.raises(UserError, match=message):
    executors.make(*args)


# Slurm, whose commands are played by scripts, and Ray on this machine.
_SBATCH = """#!/usr/bin/env python3
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1]).read_text()
pathlib.Path(os.environ["FAKE_SLURM"], "scripts").open("a").write(script)
export = dict(item.split("=") for item in sys.argv[1].split(",") if item.count("=") == 1
              and not item.startswith("--"))
last = int(re.search(r"--array=0-(\\d+)", script)[1])
for i in range(last + 1):
  if "launch_pickled_pipeline" in script:
    subprocess.run(["bash", "-c", script], check=False, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL,
                   env={**os.environ, **export, "SLURM_ARRAY_TASK_ID": str(i),
                        "SLURM_NODELIST": "here"})
print("Submitted batch job 7")
"""
_COMMANDS = {
  "sbatch": _SBATCH,
  "srun": '#!/bin/bash\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\n"$@"\n',
  "squeue": "#!/bin/bash\nexit 1\n",
  "scontrol": "#!/bin/bash\necho here\n",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Puts stand-ins for Slurm's commands on the path; they append each submission to `scripts`."""
  pytest.importorskip("datatrove")
  folder = tmp_path / "bin"
  folder.mkdir()
  for name, script in _COMMANDS.items():
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
  monkeypatch.setenv("FAKE_SLURM", str(folder))
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(executors.__file__).parents[3]))
  monkeypatch.setenv("PATH", f"{folder}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
  monkeypatch.setattr(executors, "_POLL_SECONDS", 0.01)
  return folder


def test_slurm_jobs_do_the_work(tmp_path, slurm):
  write_corpus(tmp_path / "in", files=2)
  prepare.prepare([tmp_path / "in"], tmp_path / "here", **OPTIONS)
  options = {"partition": "cpu", "time": "01:00:00", "mem_per_cpu_gb": 4}
  prepare.prepare(
    [tmp_path / "in"], tmp_path / "there", **OPTIONS, executor=executors.make("slurm", 3, options)
  )
  assert digests(tmp_path / "there") == digests(tmp_path / "here")
  scripts = (slurm / "scripts").read_text()
  for line in ("--partition=cpu", "--time=01:00:00", "--mem-per-cpu=4G", "%3"):
    assert line in scripts


def test_a_slurm_job_that_fails_is_told(tmp_path, slurm):
  write_corpus(tmp_path / "in", files=3)
  (slurm / "srun").write_text("#!/bin/bash\nexit 1\n")
  options = {"partition": "cpu", "time": "01:00:00"}
  with pytest.raises(UserError, match="ended without a result"):
    prepare.prepare(
      [tmp_path / "in"], tmp_path / "out", **OPTIONS, executor=executors.make("slurm", 0, options)
    )
  (slurm / "sbatch").write_text("#!/bin/bash\nexit 1\n")
  with pytest.raises(UserError, match="cannot submit a job"):
    prepare.prepare(
      [tmp_path / "in"], tmp_path / "out", **OPTIONS, executor=executors.make("slurm", 0, options)
    )


@pytest.mark.slow
def test_ray_does_the_work(tmp_path):
  pytest.importorskip("datatrove")
  pytest.importorskip("ray")
  write_corpus(tmp_path / "in", files=4)
  prepare.prepare([tmp_path / "in"], tmp_path / "here", **OPTIONS)
  subprocess.run(
    command(
      tmp_path / "in", tmp_path / "ray", "--executor=ray", "--executor-option=mem_per_cpu_gb=0.5"
    ),
    check=True,
  )
  assert digests(tmp_path / "ray") == digests(tmp_path / "here")
