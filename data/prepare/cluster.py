"""The same shards on a Ray cluster: every shard of a step that looks at files or asks somebody is a task, made by the very
function that makes it here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from data.prepare.steps import run_shard
from data.prepare.workers import Pool

_RETRIES = 3  # of a task whose node or process died


def connect(address: str) -> Callable[[list, int], Iterator[tuple[str, dict]]]:
  """-> function (jobs, workers) that yields (part, metadata) as shards are done, on the cluster at `address`.

  All machines need this code, the packages, the sources and the output folder under the same names.
  Raises ValueError where Ray or the cluster is not there.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
  except ImportError:
    raise ValueError("--ray needs `pip install -c constraints.txt ray`") from None
  try:
    # Ray's own log tails other programs' files (libtpu's among them).
    ray.init(
      address=None if address == "local" else address, log_to_driver=False, logging_level="error", ignore_reinit_error=True
    )
  except ConnectionError as error:
    raise ValueError(f"--ray {address}: {' '.join(str(error).split())[:200]}") from None

  def run(jobs: list[tuple], workers: int) -> Iterator[tuple[str, dict]]:
    here = os.getcwd()
    # A task of more cores than any machine has would never begin, and nobody would say so.
    workers = min(workers, max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))
    if not workers:
      raise ValueError(f"--ray {address}: no machine of the cluster has a CPU to give")
    task = ray.remote(num_cpus=workers, max_retries=_RETRIES, retry_exceptions=False)(_shard)
    parts = {task.remote(job, workers, here): job[-1].part for job in jobs}
    while parts:
      (ready,), _ = ray.wait(list(parts), num_returns=1)
      try:
        yield parts.pop(ready), ray.get(ready)
      except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError)):
          raise error.cause from None
        raise

  return run


def _shard(job: tuple, workers: int, folder: str) -> dict[str, Any]:
  """In a task: one shard, by processes of this node."""
  os.chdir(folder)
  with Pool(workers, job[-1].limits) as pool:
    job[-1].pool = pool
    return run_shard(*job)
