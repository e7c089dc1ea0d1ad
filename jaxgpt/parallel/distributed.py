"""Several processes as one run: joining, small agreements, barriers, and ending together.

    joined(settings)
      ├─ connect     jax.distributed.initialize: process 0 is the coordinator
      ├─ peer watch  a TCP connection to process 0, which notices that a peer failed or died
      ├─ the run     every process executes the same program. Collectives exchange arrays
      └─ end         all leave together, with the same exit code

The coordinator also has a key-value store. The agreements below (`share`, `gather`, `barrier`)
exchange small JSON values through it, never arrays. All processes must call them in the same order,
because each call takes the next number as its key.
"""

import contextlib
import itertools
import json
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError, first_line
from jaxgpt.parallel import cluster, peer_watch, sharding

_MOST_CALLS = 100  # most calls of `Agreement.soon` per exchange
_BARRIER = 600  # seconds; a process may be busy reading a large index
_numbers = itertools.count()  # for keys that differ between agreements and agree between processes


@contextlib.contextmanager
def joined(settings: cluster.Settings | None, seconds: float = 300) -> Iterator[None]:
  """Context manager that runs its body as one of several processes, which end together.

  An error in one process ends all of them and is printed once. If a process is killed, the others
  exit with `peer_watch.EXIT_LOST`. In both cases this context does not return.

  Args:
    settings: From `cluster.find`. None: this process is alone, and nothing happens.
    seconds: Time to wait for the other processes.
  """
  if settings is None:
    yield
    return
  _connect(settings, seconds)
  if jax.process_count() == 1:
    yield
    return
  watch = _start_peer_watch()
  try:
    yield
  except UserError as e:
    _fail(watch, str(e), e.exit_code)
  except KeyboardInterrupt:
    _fail(watch, "interrupted", 130)
  except Exception as e:
    if not watch.wait():  # if a peer died, the error is only a collective that broke
      traceback.print_exc()
    _fail(watch, f"{type(e).__name__}: {e}; its own output has the traceback", 1)
  else:
    barrier("end")
    watch.done()
    jax.distributed.shutdown()


def _fail(watch: peer_watch.PeerWatch, message: str, code: int) -> NoReturn:
  """Tells the other processes, prints the error unless another process does, and exits."""
  notice = watch.fail(message, code)
  if notice is None or notice.message is None or jax.process_index() == 0:
    watch.announce(message if notice is None else watch.describe(notice))
  elif notice.message != message:
    watch.announce(f"{_name(jax.process_index())}: {message}")
  watch.leave(notice.code if notice else code)


def _connect(settings: cluster.Settings, seconds: float) -> None:
  """Joins the others, or exits with a reason. On its own, JAX would abort with a stack trace."""
  connected = threading.Event()
  threading.Thread(target=_give_up, args=(settings, seconds, connected), daemon=True).start()
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # The service would handle SIGTERM, which the training loop does.
  jax.config.update("jax_enable_preemption_service", False)
  explicit: dict[str, Any] = {
    "coordinator_address": settings.coordinator,
    "num_processes": settings.num_processes,
    "process_id": settings.process_id,
    "cluster_detection_method": "deactivate",
  }
  try:
    jax.distributed.initialize(
      initialization_timeout=int(seconds + 60), **(explicit if settings.coordinator else {})
    )
  except (RuntimeError, ValueError, OSError) as e:
    at = settings.coordinator or "the address that the cluster's environment gives"
    raise UserError(
      f"can't join the other processes at {at} ({first_line(e)}); is its port free, and do all "
      "name the same coordinator? (A TPU machine that is alone: set TPU_SKIP_MDS_QUERY=1)",
      exit_code=peer_watch.EXIT_LOST,
    ) from e
  finally:
    connected.set()


def _give_up(settings: cluster.Settings, seconds: float, connected: threading.Event) -> None:
  """Exits with a diagnosis unless this process is connected in time. Runs in its own thread."""
  if connected.wait(seconds):
    return
  address = settings.coordinator or global_state.coordinator_address or "of the cluster"
  process = settings.process_id if settings.coordinator else global_state.process_id
  if process == 0:
    why = _who_is_missing(address.rpartition(":")[2])
  else:
    why = _is_reachable(address)
  peer_watch.say(
    f"process {process} on {socket.gethostname()}: no start within {seconds} s at the "
    f"coordinator {address}: {why}"
  )
  peer_watch.leave(peer_watch.EXIT_LOST)


def _who_is_missing(port: str) -> str:
  """The machines without a connection to the coordinator, as far as this machine can tell."""
  number = int(port) if port.isdigit() else 0
  if missing := cluster.absent(number, cluster.hosts()):
    return f"{', '.join(missing)} did not come; look at what was printed there"
  came = ", ".join(sorted(cluster.connected(number))) or "nobody"
  return (
    f"not all processes came: connected are, with this one, {came}; look at what the others printed"
  )


def _is_reachable(address: str) -> str:
  """Whether a process listens at HOST:PORT, as text."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port or 0)), timeout=5).close()
  except (OSError, ValueError) as e:
    return (
      f"nobody answers there ({e}); process 0 must run on that host, and the port be open "
      "between them"
    )
  return "it answers, so other processes are missing; look at their output"


def _start_peer_watch() -> peer_watch.PeerWatch:
  """Publishes this process's host name, waits for all processes, and connects the peer watch."""
  me, count = jax.process_index(), jax.process_count()
  # Process 0 opens a port and shares it with a secret; the others connect after the barrier.
  listener, meeting = None, None
  if me == 0:
    listener = peer_watch.listen()
    meeting = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
  _client().key_value_set(f"jaxgpt/name/{me}", socket.gethostname())
  meeting = share(meeting)
  barrier("start")
  host = (global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
  return peer_watch.PeerWatch(
    me, [_name(i) for i in range(count)], (host, meeting["port"]), meeting["token"], listener
  )


def _client() -> Any:
  """The coordinator's key-value store."""
  return global_state.client


def _name(process: int) -> str:
  """Display name of a process: its number, and its host once published."""
  host = dict(_published("jaxgpt/name/")).get(str(process))
  return f"process {process} of {jax.process_count()}" + (f" ({host})" if host else "")


def _published(folder: str) -> list[tuple[str, str]]:
  return [(key.rpartition("/")[2], value) for key, value in _client().key_value_dir_get(folder)]


def is_first() -> bool:
  """Whether this is process 0, which writes files and prints. True if the process is alone."""
  return jax.process_index() == 0


def barrier(name: str, seconds: float = _BARRIER) -> None:
  """Waits until all processes have arrived.

  Args:
    name: Name of this place in the program, for the error message.
    seconds: Time to wait.

  Raises:
    UserError: Some processes did not arrive in time. The message names them, and the exit code
      says that the same command may succeed later.
  """
  if jax.process_count() == 1:
    return
  key = f"jaxgpt/barrier/{next(_numbers)}-{name}"
  _client().key_value_set(f"{key}/{jax.process_index()}", "")
  try:
    _client().wait_at_barrier(key, int(seconds * 1000))
  except RuntimeError as e:
    came = {int(process) for process, _ in _published(f"{key}/")}
    missing = [_name(i) for i in range(jax.process_count()) if i not in came]
    if not missing:
      raise
    raise UserError(
      f"{', '.join(missing)} did not come to {name!r} within {seconds:g} s; look at "
      "what it printed last",
      exit_code=peer_watch.EXIT_LOST,
    ) from e


def share(value: Any) -> Any:
  """Broadcasts a JSON value from process 0. All processes must call it.

  Args:
    value: The value in process 0. Other processes may pass anything.

  Returns:
    Process 0's value.

  Raises:
    UserError: Process 0 did not send it in time.
  """
  if jax.process_count() == 1:
    return value
  key = f"jaxgpt/share/{next(_numbers)}"
  if is_first():
    _client().key_value_set(key, json.dumps(value))
    return value
  return _received(key, 0)


def gather(value: Any) -> list[Any] | None:
  """Collects a JSON value of each process in process 0. All processes must call it.

  Returns:
    In process 0 the values in the order of the processes, in others None.

  Raises:
    UserError: In process 0, if a process did not send its value in time.
  """
  return gather_later()(value)


def gather_later() -> Callable[[Any], list[Any] | None]:
  """`gather` with a value that is not known yet. All processes must call it.

  Returns:
    A function to call once, with the value, in any thread and at any time. It returns and raises
    as `gather` does.
  """
  if jax.process_count() == 1:
    return lambda value: [value]
  key = f"jaxgpt/gather/{next(_numbers)}"

  def gathered(value: Any) -> list[Any] | None:
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if not is_first():
      return None
    found = [_received(f"{key}/{i}", i) for i in range(jax.process_count())]
    _client().key_value_delete(key)  # with all below it: a long run gathers often
    return found

  return gathered


def _received(key: str, sender: int) -> Any:
  """The JSON value of a key, once its sender has set it."""
  try:
    return json.loads(_client().blocking_key_value_get(key, _BARRIER * 1000))
  except RuntimeError as e:
    raise UserError(
      f"{_name(sender)} sent nothing within {_BARRIER} s; look at what it printed last",
      exit_code=peer_watch.EXIT_LOST,
    ) from e


def check_same(what: str, value: str, cure: str) -> None:
  """Checks that a value is the same in all processes.

  Args:
    what: Name of the value, for the message.
    value: This process's value.
    cure: The way out, for the message.

  Raises:
    UserError: The value differs from process 0's.
  """
  of_first = share(value)
  if value != of_first:
    raise UserError(f"{what} is {value!r} here and {of_first!r} in process 0; {cure}")


class Agreement:
  """A number that any process may raise, and that all processes see raised at the same step.

  The loop uses it for stop signals: all processes must leave at the same step, or the next
  collective would block. The exchange is an all-reduce (max) of a few bytes. Its result is read one
  call later, so that nobody waits for the step in flight. Even so it costs time when steps are
  small, so it runs about once per second. The number of calls between two exchanges follows from
  the step time of the slowest process, which the same message carries:

      calls       1    2    3    …    k   k+1
      exchange   ask  read            ask  read     k ≈ 1 s / slowest time per call
  """

  seconds = 1.0  # between two exchanges

  def __init__(self, mesh: jax.sharding.Mesh):
    """Prepares the all-reduce over a mesh of the devices of all processes."""
    self._rows = NamedSharding(mesh, P(mesh.axis_names))
    self._max = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(mesh, P()))
    self._largest = 0
    self._asked: jax.Array | None = None  # the result of an exchange, still on the devices
    self._calls, self._every, self._since = 0, 1, time.monotonic()

  def soon(self, number: int) -> int:
    """The largest number of all processes as of some calls ago, the same in all of them.

    All processes must call it at the same places. If this process is alone, it returns the largest
    number so far.
    """
    if jax.process_count() == 1:
      self._largest = max(self._largest, number)
      return self._largest
    self._read()
    self._calls += 1
    if self._calls >= self._every:
      self._ask(number)
    return self._largest

  def now(self, number: int) -> int:
    """Like `soon`, but up to date: waits for all processes. Call it where the pace may change."""
    self.soon(number)
    if jax.process_count() > 1:
      self._read()
      self._ask(number)
      self._read()
      self._every = 1
    return self._largest

  def _ask(self, number: int) -> None:
    now = time.monotonic()
    milliseconds = 1 + int((now - self._since) * 1000 / max(self._calls, 1))
    self._calls, self._since = 0, now
    mine = np.tile(np.array([number, milliseconds], np.int32), (jax.local_device_count(), 1))
    self._asked = self._max(sharding.global_array(self._rows, mine, jax.process_count()))

  def _read(self) -> None:
    if self._asked is None:
      return
    number, milliseconds = (int(x) for x in jax.device_get(self._asked))
    self._asked = None
    self._largest = max(self._largest, number)
    # At most doubles, because the next calls may take longer, and a late answer can cost a run its
    # last checkpoint.
    self._every = max(
      1, min(2 * self._every, _MOST_CALLS, int(self.seconds * 1000) // milliseconds)
    )
