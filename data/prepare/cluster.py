"""Shards on a Ray cluster: each shard of a step that reads files or sends requests is one task, made by `run_shard`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from data.prepare.messages import one_line
from data.prepare.steps import Job, Made, run_shard
from data.prepare.workers import Pool

_RETRIES = 3  # repetitions of a task whose node or process died


def connect(address: str) -> Callable[[list[Job], int], Made]:
  """-> function (jobs, workers) that makes shards on the cluster at `address` and yields (part, metadata) of each.

  All machines need this code, the packages, the sources and the output folder under the same names.
  Raises ValueError if Ray is not installed or the cluster does not answer.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  try:
    import ray
    from ray.exceptions import RayTaskError
  except ImportError:
    raise ValueError("--ray needs `pip install -c constraints.txt ray`") from None
  try:
    # With `log_to_driver` Ray would also print log files of other programs, such as libtpu.
    where = None if address == "local" else address
    ray.init(where, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
  except ConnectionError as error:
    raise ValueError(f"--ray {address}: {one_line(error)[:200]}") from None

  def run(jobs: list[Job], workers: int) -> Made:
    here = os.getcwd()
    # A task that needs more cores than the largest machine has would wait for ever.
    workers = min(workers, max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))
    if not workers:
      raise ValueError(f"--ray {address}: no machine of the cluster offers a CPU. Start one with `ray start --num-cpus`")
    task = ray.remote(num_cpus=workers, max_retries=_RETRIES, retry_exceptions=False)(_shard)
    parts = {task.remote(job, workers, here): job.context.part for job in jobs}
    while parts:
      (ready,), _ = ray.wait(list(parts), num_returns=1)
      try:
        yield parts.pop(ready), ray.get(ready)
      except RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError)):
          raise error.cause from None
        raise

  return run


def _shard(job: Job, workers: int, folder: str) -> dict[str, Any]:
  """In a task: makes one shard with processes of this node."""
  os.chdir(folder)
  with Pool(workers, job.context.limits) as pool:
    job.context.pool = pool
    return run_shard(*job)
