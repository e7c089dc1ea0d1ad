"""Several processes as one run: how they find each other, agree, wait for each other and end.

JAX's runtime connects them (`jax.distributed`) and has a key-value store, which the small
agreements here go through; arrays never do.
"""

import contextlib
import itertools
import json
import secrets
import socket
import threading
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.errors import UserError
from jaxgpt.parallel import cluster, peer_watch, sharding

_CALLS = 100  # at most so many between two questions of an agreement
_BARRIER = 600  # seconds; a process may be busy reading a large index
_numbers = itertools.count()  # agreements have names of their own: their order is the same in all


@contextlib.contextmanager
def joined(settings, seconds=300):
  """Runs what is in it as one of several processes, which end together.

  An error in one of them becomes the end of all, said once; a process that is killed ends the
  others with exit code `lifeline.EXIT_LOST`. Then this context does not return.

  Args:
    settings: from `processes.find`; None: alone, and nothing happens.
    seconds: to wait for the others.
  """
  if settings is None:
    yield
    return
  _connect(settings, seconds)
  if jax.process_count() == 1:
    yield
    return
  line = _lifeline()
  try:
    yield
  except UserError as e:
    _fail(line, str(e), e.exit_code)
  except KeyboardInterrupt:
    _fail(line, "interrupted", 130)
  except Exception as e:
    if not line.wait():  # a peer that is gone shows as a broken collective first
      traceback.print_exc()
    _fail(line, f"{type(e).__name__}: {e}; its own output has the traceback", 1)
  else:
    barrier("end")
    line.done()
    jax.distributed.shutdown()


def _fail(line, message, code):
  notice = line.fail(message, code)
  if notice is None or notice.message is None or jax.process_index() == 0:
    line.announce(message if notice is None else line.describe(notice))
  elif notice.message != message:
    line.announce(f"{_name(jax.process_index())}: {message}")
  line.leave(notice.code if notice else code)


def _connect(settings, seconds):
  """Joins the others, or ends this process: JAX would abort with a stack trace."""
  came = threading.Event()
  threading.Thread(target=_give_up, args=(settings, seconds, came), daemon=True).start()
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the loop
  explicit = {
    "coordinator_address": settings.coordinator,
    "num_processes": settings.num_processes,
    "process_id": settings.process_id,
    "cluster_detection_method": "deactivate",
  }
  try:
    jax.distributed.initialize(
      initialization_timeout=seconds + 60, **(explicit if settings.coordinator else {})
    )
  except (RuntimeError, ValueError, OSError) as e:
    at = settings.coordinator or "the address that the cluster's environment gives"
    raise UserError(
      f"can't join the other processes at {at} ({(str(e).splitlines() or [e])[0]}); "
      "is its port free, and do all name the same coordinator? (A TPU machine that "
      "is alone: set TPU_SKIP_MDS_QUERY=1)",
      exit_code=peer_watch.EXIT_LOST,
    ) from e
  finally:
    came.set()


def _give_up(settings, seconds, came):
  if came.wait(seconds):
    return
  address = settings.coordinator or global_state.coordinator_address or "of the cluster"
  which = settings.process_id if settings.coordinator else global_state.process_id
  if which == 0:
    why = _who_came(address.rpartition(":")[2])
  else:
    why = _reach(address)
  peer_watch.say(
    f"process {which} on {socket.gethostname()}: no start within {seconds} s at the "
    f"coordinator {address}: {why}"
  )
  peer_watch.leave(peer_watch.EXIT_LOST)


def _who_came(port):
  """Which machines have no connection to the coordinator, as far as that can be known here."""
  port = int(port) if port.isdigit() else 0
  if missing := cluster.absent(port, cluster.hosts()):
    return f"{', '.join(missing)} did not come; look at what was printed there"
  came = ", ".join(sorted(cluster.connected(port))) or "nobody"
  return (
    f"not all processes came: connected are, with this one, {came}; look at what the others printed"
  )


def _reach(address):
  """Whether somebody listens at HOST:PORT, in words."""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port or 0)), timeout=5).close()
  except (OSError, ValueError) as e:
    return (
      f"nobody answers there ({e}); process 0 must run on that host, and the port be open "
      "between them"
    )
  return "it answers, so other processes are missing; look at their output"


def _lifeline():
  """Publishes this process's name, waits for those of all, and connects their lifelines."""
  me, count = jax.process_index(), jax.process_count()
  listener, meeting = None, None
  if me == 0:
    listener = peer_watch.listen()
    meeting = {"port": listener.getsockname()[1], "token": secrets.token_hex(16)}
  global_state.client.key_value_set(f"jaxgpt/name/{me}", socket.gethostname())
  meeting = share(meeting)
  barrier("start")
  host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
  return peer_watch.Lifeline(
    me, [_name(i) for i in range(count)], (host, meeting["port"]), meeting["token"], listener
  )


def _name(process):
  """What to call a process: its number, and its host where it has said so."""
  host = dict(_published("jaxgpt/name/")).get(str(process))
  return f"process {process} of {jax.process_count()}" + (f" ({host})" if host else "")


def _published(folder):
  return [
    (key.rpartition("/")[2], value) for key, value in global_state.client.key_value_dir_get(folder)
  ]


def is_first():
  """Whether this is the process that writes and prints; also true where it is alone."""
  return jax.process_index() == 0


def barrier(name, seconds=_BARRIER):
  """Waits until all processes are here.

  Args:
    name: of this place, for the message.
    seconds: to wait.

  Raises:
    UserError: some did not come in time; names them. Its exit code says: try again.
  """
  if jax.process_count() == 1:
    return
  key = f"jaxgpt/barrier/{next(_numbers)}-{name}"
  global_state.client.key_value_set(f"{key}/{jax.process_index()}", "")
  try:
    global_state.client.wait_at_barrier(key, int(seconds * 1000))
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


def share(value):
  """What the first process has, a plain JSON value, in all of them; called by all.

  Raises:
    UserError: the first process did not come in time.
  """
  if jax.process_count() == 1:
    return value
  key = f"jaxgpt/share/{next(_numbers)}"
  if is_first():
    global_state.client.key_value_set(key, json.dumps(value))
    return value
  try:
    return json.loads(global_state.client.blocking_key_value_get(key, _BARRIER * 1000))
  except RuntimeError as e:
    raise UserError(
      f"{_name(0)} sent nothing within {_BARRIER} s; look at what it printed last",
      exit_code=peer_watch.EXIT_LOST,
    ) from e


def gather(value):
  """What each process has, plain JSON values by their numbers, in the first; None in others.

  Raises:
    UserError: in the first, that one did not come in time.
  """
  if jax.process_count() == 1:
    return [value]
  key, client = f"jaxgpt/gather/{next(_numbers)}", global_state.client
  client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
  if not is_first():
    return None
  out = []
  for i in range(jax.process_count()):
    try:
      out.append(json.loads(client.blocking_key_value_get(f"{key}/{i}", _BARRIER * 1000)))
    except RuntimeError as e:
      raise UserError(
        f"{_name(i)} sent nothing within {_BARRIER} s; look at what it printed last",
        exit_code=peer_watch.EXIT_LOST,
      ) from e
  return out


def check_same(what, value, cure):
  """Raises a UserError where `value`, a string, differs from that of the first process."""
  of_first = share(value)
  if value != of_first:
    raise UserError(f"{what} is {value!r} here and {of_first!r} in process 0; {cure}")


class Agreement:
  """A number that any process may raise, and that all see raised at the same place of the program.

  An all-reduce of a few bytes, whose answer is read a call later, so that nobody waits for what is
  in flight; and about once a second, because with small steps even that takes a share of the time.
  How many calls that is follows from the slowest process's time, which the same message carries.
  """

  seconds = 1.0  # between two questions

  def __init__(self, mesh):
    """Args: mesh: over the devices of all processes."""
    self._rows = NamedSharding(mesh, P(mesh.axis_names))
    self._max = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(mesh, P()))
    self._largest = 0
    self._asked = None  # the answer on the devices
    self._calls, self._every, self._since = 0, 1, time.monotonic()

  def soon(self, number):
    """The largest `number` of all processes some calls ago; called by all at the same places.

    Where this process is alone, the largest so far.
    """
    if jax.process_count() == 1:
      self._largest = max(self._largest, number)
      return self._largest
    self._read()
    self._calls += 1
    if self._calls >= self._every:
      self._ask(number)
    return self._largest

  def now(self, number):
    """As `soon`, but of this moment: waits for all. What follows may have another pace."""
    self.soon(number)
    if jax.process_count() > 1:
      self._read()
      self._ask(number)
      self._read()
      self._every = 1
    return self._largest

  def _ask(self, number):
    now = time.monotonic()
    milliseconds = 1 + int((now - self._since) * 1000 / max(self._calls, 1))
    self._calls, self._since = 0, now
    mine = np.tile(np.array([number, milliseconds], np.int32), (jax.local_device_count(), 1))
    self._asked = self._max(sharding.global_array(self._rows, mine, jax.process_count()))

  def _read(self):
    if self._asked is None:
      return
    number, milliseconds = (int(x) for x in jax.device_get(self._asked))
    self._asked = None
    self._largest = max(self._largest, number)
    # Carefully, for the next calls may take longer: a late answer can cost a run its last save.
    self._every = max(1, min(2 * self._every, _CALLS, int(self.seconds * 1000) // milliseconds))
