"""A worker of a sweep: trains the runs that it is told to. See `jaxgpt.analysis.sweep.queue`.

python -m jaxgpt.commands.actions.sweep_worker
"""

import gc
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from typing import Any

from jaxgpt import config
from jaxgpt.commands.actions import backend
from jaxgpt.errors import UserError, first_line
from jaxgpt.hf.weight_source import WEIGHT_SOURCES
from jaxgpt.parallel import peer_watch
from jaxgpt.run import run_lock
from jaxgpt.storage import strict_json
from jaxgpt.tasks.in_training import EVALUATORS
from jaxgpt.training import loop
from jaxgpt.training.loop import trouble

_LOCK_SECONDS = 60  # for which a run folder may be held by a worker whose sweep was killed


def train(request: dict[str, Any]) -> dict[str, Any]:
  """Trains one run and says how it ended."""
  folder = request["folder"]
  end = time.monotonic() + _LOCK_SECONDS
  while run_lock.holder(folder) and time.monotonic() < end:
    time.sleep(0.5)
  try:
    if holder := run_lock.holder(folder):
      return {"end": "again", "message": f"{holder} trains in {folder}"}
    c, origin = config.load(request["base"], request["overrides"])
    until = min(request["until"], c.train.steps)
    outcome = loop.train(c, folder, origin, WEIGHT_SOURCES, EVALUATORS, until=until)
  except trouble.NotFiniteError as e:
    return {"end": "diverged", "message": first_line(e)}
  except UserError as e:
    again = e.exit_code == peer_watch.EXIT_LOST
    print(f"jaxgpt: error: {e}", file=sys.stderr)
    return {"end": "again" if again else "failed", "message": first_line(e)}
  except Exception as e:  # the other runs go on
    traceback.print_exc()
    return {"end": "failed", "message": f"{type(e).__name__}: {first_line(e, 300)}"}
  return {"end": "stopped" if outcome.stopped else "done"}


def main() -> None:
  """Reads requests until the input ends."""
  answers = os.fdopen(os.dup(1), "w")
  requests: queue.Queue[str | None] = queue.Queue()

  def read() -> None:
    for line in sys.stdin:
      requests.put(line)
    requests.put(None)
    os.kill(os.getpid(), signal.SIGTERM)  # a run that is being trained saves and stops

  threading.Thread(target=read, daemon=True).start()
  backend.start()
  while (line := requests.get()) is not None:
    request = json.loads(line)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
      os.dup2(log, stream)
    os.close(log)
    answer = train(request)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    print(strict_json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main()
