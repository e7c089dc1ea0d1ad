import socket
import sys
import types

import pytest

from jaxgpt.errors import UserError
from jaxgpt.parallel import cluster

ENV = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}

SLURM = {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}


def test_machines_that_have_not_connected_are_named():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    assert cluster.connected(port) == set()
    with socket.create_connection(("127.0.0.1", port)):
      assert cluster.connected(port) == {"127.0.0.1"}
      names = ["localhost", "node-7.invalid", socket.gethostname()]
      assert cluster.absent(port, names) == ["node-7.invalid"]


def test_addresses_of_the_sixth_version_are_read(tmp_path):
  word = lambda *bytes_: int.from_bytes(bytes(bytes_), sys.byteorder)
  rows = [
    [word(0, 0, 0, 0), word(0, 0, 0, 0), word(0, 0, 255, 255), word(10, 0, 0, 7)],
    [word(0x20, 1, 0xD, 0xB8), 0, 0, word(0, 0, 0, 1)],
  ]
  table = tmp_path / "tcp6"
  table.write_text(
    "head\n"
    + "".join(
      f"0: {'0' * 32}:1F90 {''.join(f'{w:08X}' for w in row)}:9C40 01 rest\n" for row in rows
    )
  )
  assert cluster.connected(8080, [table]) == {"10.0.0.7", "2001:db8::1"}


def test_names_of_the_machines_are_those_of_the_cluster():
  assert cluster.hosts({}) == ()
  assert cluster.hosts({"TPU_WORKER_HOSTNAMES": "a,b"}) == ("a", "b")
  answers = {"n[1-2]": "n1\nn2\n"}
  asked = lambda command, **_: types.SimpleNamespace(stdout=answers[command[-1]])
  assert cluster.hosts({"SLURM_STEP_NODELIST": "n[1-2]"}, run=asked) == ("n1", "n2")

  def no_slurm(*_, **__):
    raise FileNotFoundError

  assert cluster.hosts({"SLURM_STEP_NODELIST": "n[1-2]"}, run=no_slurm) == ()


@pytest.mark.parametrize(
  "args, env, want",
  [
    ((), {}, None),
    ((), ENV, cluster.Settings("a:1", 4, 2)),
    ((None, None, "3"), ENV, cluster.Settings("a:1", 4, 3)),
    (("[::1]:99", "2", "0"), {}, cluster.Settings("[::1]:99", 2, 0)),
    (("b:2", "1", "0"), {}, None),
    (
      (),
      {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "n[1-2]"},
      cluster.Settings(),
    ),
    ((), {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # the batch script, outside of srun
    ((), {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
    ((), {"OMPI_COMM_WORLD_SIZE": "2"}, cluster.Settings()),
    (
      ("b:2", "2", "0"),
      {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"},
      cluster.Settings("b:2", 2, 0),
    ),  # flags win over the cluster
    ((), ENV | SLURM, cluster.Settings("a:1", 4, 2)),  # and so do JAX's variables
    ((), ENV | SLURM | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ((), {"JAX_COORDINATOR_ADDRESS": "a:1"} | SLURM, cluster.Settings()),  # JAX has the other two
  ],
)
def test_who_is_joined(args, env, want):
  assert cluster.find(*args, env=env, on_tpu=False) == want


@pytest.mark.parametrize(
  "env, want",
  [
    ({}, cluster.Settings()),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, cluster.Settings()),
    ({"TPU_WORKER_HOSTNAMES": "a", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ({"JAX_PLATFORMS": "cpu"}, None),
  ],
)
def test_on_a_tpu_machine_jax_knows_the_others(env, want):
  assert cluster.find(env=env, on_tpu=True) == want


@pytest.mark.parametrize(
  "args, words",
  [
    (("a:1", "2", None), r"--process-id \(or JAX_PROCESS_ID\) is missing"),
    ((None, "2", "0"), r"--coordinator \(or JAX_COORDINATOR_ADDRESS\) is missing"),
    (("a", "2", "0"), "--coordinator=a must be HOST:PORT"),
    (("a:x", "2", "0"), "--coordinator=a:x must be HOST:PORT"),
    (("a:1", "two", "0"), "--num-processes=two .* must be integers"),
    (("a:1", "2", "2"), r"--process-id=2 must lie in \[0, --num-processes=2\)"),
  ],
)
def test_settings_that_do_not_fit_are_named(args, words):
  with pytest.raises(UserError, match=words):
    cluster.find(*args, env={}, on_tpu=False)
