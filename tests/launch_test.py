"""Launch scripts: dry runs, restarts after a run ends, and manifests against their schemas."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
TRAIN = ["--config=c.py", "--workdir=gs://b/a run"]


def run(script, *args, seconds=60, **env):
  """(exit code, standard output, standard error) of a script of launch/."""
  done = subprocess.run(
    [LAUNCH / script, *args], env=os.environ | env, timeout=seconds, capture_output=True, text=True
  )
  return done.returncode, done.stdout, done.stderr


def program(folder, name, text):
  """An executable script that stands in for a program."""
  path = folder / name
  path.write_text("#!/usr/bin/env bash\n" + text)
  path.chmod(0o755)
  return path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path):
  assert os.access(path, os.X_OK)
  assert subprocess.run(["bash", "-n", path]).returncode == 0
  shellcheck = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  )
  if not shellcheck:
    pytest.skip("no shellcheck")
  done = subprocess.run([shellcheck, "-s", "bash", path], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "script, args, env, wanted",
  [
    (
      "retry.sh",
      ["jaxgpt", "train", *TRAIN],
      {"MAX_RESTARTS": "7"},
      ["up to 7 times", "jaxgpt train --config=c.py"],
    ),
    (
      "local.sh",
      TRAIN,
      {"PROCESSES": "3", "PORT": "99"},
      ["jaxgpt train --coordinator=127.0.0.1:99 --num-processes=3 --process-id=2 --config=c.py"],
    ),
    ("gpus.sh", TRAIN, {"GPUS": "0,1"}, ["CUDA_VISIBLE_DEVICES=0,1", "jaxgpt train --config=c.py"]),
    (
      "slurm.sbatch",
      TRAIN,
      {},
      ["srun --kill-on-bad-exit=1 jaxgpt train --config=c.py", "scontrol requeue"],
    ),
    (
      "gke/xpk.sh",
      ["mine", *TRAIN],
      {"CLUSTER": "k", "IMAGE": "i", "SLICES": "2"},
      [
        "xpk workload create --cluster=k --workload=mine --docker-image=i",
        "--num-slices=2",
        "--restart-on-exit-codes=75",
        "--spot",
        "--command=jaxgpt train --join-timeout=900 --config=c.py",
      ],
    ),
    (
      "tpu_vm.sh",
      TRAIN,
      {"TYPE": "v6e-256", "SPOT": "1"},
      [
        "queued-resources create jaxgpt",
        "--accelerator-type=v6e-256",
        "--spot",
        "--worker=all",
        "launch/retry.sh .venv/bin/jaxgpt train --config=c.py",
        "queued-resources delete",
      ],
    ),
  ],
)
def test_a_dry_run_prints_what_would_be_run(script, args, env, wanted):
  code, out, _ = run(script, *args, DRY_RUN="1", **env)
  assert code == 0
  out = out.replace("\\", "")  # of the shell's quotes
  for words in wanted:
    assert words in out, out


@pytest.mark.parametrize("script", ["retry.sh", "gke/xpk.sh", "tpu_vm.sh"])
def test_a_launcher_without_arguments_says_how_it_is_used(script):
  code, _, err = run(script)
  assert code == 2 and "usage:" in err


ENDS = """n=$(cat "$HERE/n" 2>/dev/null || echo 0); echo $((n + 1)) > "$HERE/n"
codes=($CODES); exit "${codes[$n]}"
"""


@pytest.mark.parametrize(
  "codes, want, starts",
  [
    ("0", 0, 1),
    ("2 0", 2, 1),
    ("75 143 137 1 0", 0, 5),
    ("75 2", 2, 2),
    ("75 75 75 75 75 75", 75, 6),
  ],
)
def test_a_run_is_tried_again_where_that_can_help(tmp_path, codes, want, starts):
  command = program(tmp_path, "command", ENDS)
  code, _, err = run(
    "retry.sh", command, HERE=str(tmp_path), CODES=codes, RETRY_WAIT="0", MAX_RESTARTS="5"
  )
  assert code == want and int((tmp_path / "n").read_text()) == starts
  assert ("giving up" in err) == (codes == "75 75 75 75 75 75")


def test_a_launcher_that_is_stopped_stops_its_run_and_does_not_restart_it(tmp_path):
  command = program(
    tmp_path,
    "command",
    'trap "echo saved > $HERE/saved; exit 143" TERM\ntouch $HERE/up; while :; do sleep 0.1; done',
  )
  p = subprocess.Popen([LAUNCH / "retry.sh", command], env=os.environ | {"HERE": str(tmp_path)})
  while not (tmp_path / "up").exists():
    time.sleep(0.05)
  p.send_signal(signal.SIGTERM)
  assert p.wait(20) == 143 and (tmp_path / "saved").exists()


TWICE = """trap 'n=$((n + 1)); touch "$HERE/saving"; ((n >= 2)) && exit 130' INT
n=0; touch "$HERE/up"; while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("number, twice", [("SIGINT", True), ("SIGHUP", False)])
def test_a_terminal_stops_a_run_through_its_launcher_and_leaves_no_orphan(tmp_path, number, twice):
  """Ctrl-C goes to all processes of a terminal; the second one ends the run at once."""
  text = TWICE if twice else TWICE.replace(">= 2", ">= 1").replace("' INT", "' HUP")
  command = program(tmp_path, "command", text.replace("130", "130" if twice else "129"))
  # Tests may run in the background, where a shell lets them ignore SIGINT and can't trap it.
  words = ["env", "--default-signal=INT,HUP", LAUNCH / "retry.sh", command]
  p = subprocess.Popen(words, env=os.environ | {"HERE": str(tmp_path)}, start_new_session=True)
  end = time.monotonic() + 60
  try:
    for name in ["up", "saving"][: 1 + twice]:
      while not (tmp_path / name).exists():
        assert time.monotonic() < end, f"{name} does not appear"
        time.sleep(0.05)
      assert p.poll() is None
      os.killpg(p.pid, signal.Signals[number])
    assert p.wait(20) == (130 if twice else 129)
    with pytest.raises(ProcessLookupError):
      os.killpg(p.pid, 0)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(p.pid, signal.SIGKILL)


@pytest.mark.parametrize(
  "code, state, restarts, want, requeued",
  [
    (0, "RUNNING", "0", 0, False),
    (2, "RUNNING", "0", 2, False),
    (75, "RUNNING", "0", 0, True),
    (143, "RUNNING", "3", 0, True),
    (143, "CANCELLED", "0", 143, False),
    (75, "RUNNING", "100", 75, False),
  ],
)
def test_slurm_requeues_what_can_go_on(tmp_path, code, state, restarts, want, requeued):
  """With stand-ins for SLURM's programs; docs/launch.md says what was tried with SLURM itself."""
  program(tmp_path, "srun", f'echo "$@" >> {tmp_path}/calls; exit {code}')
  program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/calls')
  program(tmp_path, "squeue", f"echo {state}")
  env = {
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_RESTART_COUNT": restarts,
  }
  got, _, err = run("slurm.sbatch", *TRAIN, **env)
  calls = (tmp_path / "calls").read_text()
  assert got == want, err
  assert "--kill-on-bad-exit=1 jaxgpt train --config=c.py" in calls
  assert ("requeue 12" in calls) == requeued


GCLOUD = """echo "${@//$'\\n'/ }" >> "$HERE/calls"
case "$4" in
  describe) n=$(cat "$HERE/n" 2>/dev/null || echo 0); echo $((n + 1)) > "$HERE/n"
            ((${ANSWERS:-0} == 0 || n % 8 == 7)) || { echo "ERROR: no network" >&2; exit 1; }
            ((${ANSWERS:-0} == 0 || n > 16)) || { echo WAITING_FOR_RESOURCES; exit; }
            [[ -z ${DENIED:-} ]] || { echo "ERROR: PERMISSION_DENIED" >&2; exit 1; }
            cat "$HERE/state" 2>/dev/null || { echo "ERROR: NOT_FOUND: none" >&2; exit 1; } ;;
  create) printf 'ACTIVE\nTo update, run: gcloud components update\n' > "$HERE/state" ;;
  delete) rm -f "$HERE/state" ;;
  ssh) if [[ "$*" == *MAX_RESTARTS* && ! -e $HERE/preempted ]]; then
         touch "$HERE/preempted"; echo SUSPENDED > "$HERE/state"; exit 255
       fi ;;
esac
"""


def test_a_preempted_slice_is_replaced(tmp_path):
  """With a stand-in for gcloud, whose first slice is preempted while it trains."""
  program(tmp_path, "gcloud", GCLOUD)
  code, _, err = run(
    "tpu_vm.sh",
    *TRAIN,
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    HERE=str(tmp_path),
    NAME="slice-of-a-test",
    POLL="0",
  )
  verbs = [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines()]
  verbs = [verb for verb in verbs if verb != "describe"]
  one = ["create", "scp", "ssh", "ssh"]  # install, train
  assert code == 0 and "exit code 255, the slice is SUSPENDED" in err
  assert verbs == [*one, "delete", *one, "delete"]
  assert not (tmp_path / "state").exists()


def test_a_slice_of_which_nothing_is_known_is_not_asked_for_again(tmp_path):
  program(tmp_path, "gcloud", GCLOUD)
  code, _, err = run(
    "tpu_vm.sh",
    *TRAIN,
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    DENIED="1",
    HERE=str(tmp_path),
    NAME="slice-of-a-test",
    POLL="0",
  )
  assert code == 1 and "PERMISSION_DENIED" in err and "slice-of-a-test may still be there" in err
  assert "create" not in (tmp_path / "calls").read_text()


def test_a_bad_network_now_and_then_does_not_end_the_wait_for_a_slice(tmp_path):
  """Of eight looks at the queue seven fail, which is fewer than ten one after the other."""
  program(tmp_path, "gcloud", GCLOUD)
  (tmp_path / "preempted").touch()
  code, _, err = run(
    "tpu_vm.sh",
    *TRAIN,
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    ANSWERS="1",
    HERE=str(tmp_path),
    NAME="slice-of-a-test",
    POLL="0",
  )
  assert code == 0 and err.count("no network") > 10


def test_a_slice_that_is_never_made_is_given_up(tmp_path):
  program(tmp_path, "gcloud", GCLOUD.replace("ACTIVE", "FAILED"))
  code, _, err = run(
    "tpu_vm.sh",
    *TRAIN,
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    HERE=str(tmp_path),
    NAME="slice-of-a-test",
    POLL="0",
  )
  assert code == 1 and "10 requests for slice-of-a-test failed" in err
  assert not (tmp_path / "state").exists()


def exact(required, **properties):
  """A JSON schema of an object: these properties, no others."""
  return {
    "type": "object",
    "properties": properties,
    "required": required,
    "additionalProperties": False,
  }


COUNT, TEXT, FLAG = {"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "boolean"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
MAP = {"type": "object", "additionalProperties": TEXT}
# From the API of JobSet v1alpha2, batch/v1 Job and core/v1 Pod, as far as the manifest uses it.
CONTAINER = exact(
  ["name", "image"],
  name=TEXT,
  image=TEXT,
  command=TEXTS,
  args=TEXTS,
  ports={"type": "array", "items": exact(["containerPort"], containerPort=COUNT)},
  resources=exact(["limits"], limits={"type": "object"}),
)
POD = exact(
  ["containers", "restartPolicy"],
  containers={"type": "array", "items": CONTAINER},
  restartPolicy={"const": "Never"},  # podFailurePolicy demands it
  hostNetwork=FLAG,
  dnsPolicy=TEXT,
  terminationGracePeriodSeconds=COUNT,
  nodeSelector=MAP,
  tolerations={
    "type": "array",
    "items": exact(["key", "operator"], key=TEXT, operator={"enum": ["Exists", "Equal"]}),
  },
)
EXIT_CODES = exact(
  ["operator", "values"],
  containerName=TEXT,
  operator={"enum": ["In", "NotIn"]},
  values={"type": "array", "items": COUNT, "minItems": 1},
)
JOB = exact(
  ["template", "backoffLimit", "parallelism", "completions"],
  parallelism=COUNT,
  completions=COUNT,
  backoffLimit={"type": "integer", "minimum": 0},
  podFailurePolicy=exact(
    ["rules"],
    rules={
      "type": "array",
      "items": exact(
        ["action", "onExitCodes"],
        onExitCodes=EXIT_CODES,
        action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
      ),
    },
  ),
  template=exact(["spec"], spec=POD),
)
RULE = exact(
  ["name", "action"],
  name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
  action={
    "enum": [
      "FailJobSet",
      "RestartJobSet",
      "RestartJobSetAndIgnoreMaxRestarts",
      "RestartJob",
      "RestartJobAndIgnoreMaxRestarts",
    ]
  },
  onJobFailureReasons={
    "type": "array",
    "items": {
      "enum": [
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
      ]
    },
  },
)
JOBSET = exact(
  ["apiVersion", "kind", "metadata", "spec"],
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=exact(["name"], name=TEXT, annotations=MAP),
  spec=exact(
    ["replicatedJobs", "failurePolicy"],
    failurePolicy=exact(
      ["maxRestarts"],
      maxRestarts=COUNT,
      rules={"type": "array", "items": RULE},
      restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
    ),
    replicatedJobs={
      "type": "array",
      "items": exact(
        ["name", "template"], name=TEXT, replicas=COUNT, template=exact(["spec"], spec=JOB)
      ),
    },
  ),
)
# From SkyPilot's YAML reference.
EXIT_CODE = {"type": "integer", "minimum": 0, "maximum": 255}
SKYPILOT = exact(
  ["resources", "run"],
  name=TEXT,
  num_nodes=COUNT,
  workdir=TEXT,
  setup=TEXT,
  run=TEXT,
  envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
  resources=exact(
    [],
    accelerators=TEXT,
    use_spot=FLAG,
    job_recovery=exact(
      [],
      strategy=TEXT,
      max_restarts_on_errors={"type": "integer", "minimum": 0},
      recover_on_exit_codes={"type": "array", "items": EXIT_CODE},
    ),
  ),
)


def test_the_jobset_is_one_and_its_numbers_fit_together():
  jobset = yaml.safe_load((LAUNCH / "gke" / "jobset.yaml").read_text())
  jsonschema.validate(jobset, JOBSET)
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] >= 10  # a preemption is one of them
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  chips = int(container["resources"]["limits"]["google.com/tpu"])
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
  assert math.prod(int(n) for n in topology) == job["parallelism"] * chips
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"] == {
    "containerName": container["name"],
    "operator": "In",
    "values": [2],
  }
  assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert container["command"] == ["jaxgpt", "train"]
  assert (
    f"--config.mesh.data={jobset['spec']['replicatedJobs'][0]['replicas']}" in container["args"]
  )


def test_the_skypilot_task_is_one_and_ends_in_the_same_command(tmp_path):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  jsonschema.validate(task, SKYPILOT)
  codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
  assert {75, 143, 137} <= set(codes) and not {0, 1, 2, 130} & set(codes)
  (tmp_path / "jaxgpt" / "bin").mkdir(parents=True)
  program(
    tmp_path / "jaxgpt" / "bin",
    "jaxgpt",
    'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID|$*"',
  )
  env = {
    "HOME": str(tmp_path),
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NODE_RANK": "1",
    "CONFIG": "c.py",
    "WORKDIR": "gs://b/r",
    "DATA": "gs://b/d",
    "OVERRIDES": "--config.seed=1",
    "PATH": os.environ["PATH"],
  }
  done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True)
  assert done.stdout == (
    "10.0.0.1:8476 2 1|train --config=c.py --workdir=gs://b/r "
    "--config.data.path=gs://b/d --config.seed=1\n"
  )


@pytest.mark.slow
def test_a_local_run_whose_process_is_killed_resumes_by_itself(tmp_path, corpus):
  """Two processes; one is killed while it trains; the launcher restarts both, and they finish."""
  root = LAUNCH.parent
  args = [
    f"--config={root}/configs/char_level.py",
    f"--config.data.path={corpus}",
    f"--workdir={tmp_path}/run",
    "--config.train.steps=300",
    "--config.checkpoint.every=20",
    "--config.eval.every=0",
    "--config.log.every=10",
    "--config.schedule.warmup_steps=2",
    "--config.model.num_layers=1",
    "--config.model.width=32",
    "--config.model.num_heads=2",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
  ]
  env = os.environ | {
    "JAXGPT": f"{sys.executable} -m jaxgpt",
    "PYTHONPATH": str(root),
    "RETRY_WAIT": "0",
    "XLA_FLAGS": "",
    "PROCESSES": "2",
  }
  launcher = subprocess.Popen(
    [LAUNCH / "local.sh", *args], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )
  until = time.monotonic() + 240
  while not (tmp_path / "run" / "checkpoints" / "20").exists() and time.monotonic() < until:
    time.sleep(0.1)
  os.kill(second_process(launcher.pid), signal.SIGKILL)
  out, err = launcher.communicate(timeout=300)
  assert launcher.returncode == 0, err
  assert "process 1 of 2" in err and "was lost" in err and "restart 1 of at most" in err
  assert "done:" in out and "holds 300 steps" in out
  starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
  records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  assert len(starts) == 2
  assert [r["step"] for r in records if r["kind"] == "train"] == list(range(10, 301, 10))


def second_process(ancestor):
  """The id of the process that runs with --process-id=1 among a process's descendants."""
  parents = {}
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):  # it has ended meanwhile
      fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
      parents[int(path.name)] = (int(fields[1]), (path / "cmdline").read_text())

  def descends(pid):
    while pid in parents:
      pid = parents[pid][0]
      if pid == ancestor:
        return True

  (found,) = [
    pid for pid, (_, command) in parents.items() if "--process-id=1" in command and descends(pid)
  ]
  return found
