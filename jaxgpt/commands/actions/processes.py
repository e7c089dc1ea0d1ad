"""The options of commands that may run in several processes."""

import dataclasses

from jaxgpt.config.options import Group, integer, option

PROCESSES = Group(
  "several processes",
  "SLURM, Open MPI and Cloud TPU (also on GKE) need none of these. Elsewhere, start the same "
  "command once per process. All processes must see the run folder and the data.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
  """How a process joins others, see `parallel.cluster.find`."""

  coordinator: str | None = option(
    None,
    metavar="HOST:PORT",
    group=PROCESSES,
    unset="JAX_COORDINATOR_ADDRESS",
    help="address of process 0",
  )
  num_processes: str | None = option(
    None, metavar="N", group=PROCESSES, unset="JAX_NUM_PROCESSES", help="number of processes"
  )
  process_id: str | None = option(
    None,
    metavar="I",
    group=PROCESSES,
    unset="JAX_PROCESS_ID",
    help="number of this process, from 0",
  )
  join_timeout: int = integer(
    300, least=1, metavar="SECONDS", group=PROCESSES, help="time to wait for the other processes"
  )
