"""Samples like a training, as one of the processes of test_processes.py. Writes latents to `<output>/<process>.npy`.

python -m tests.training.sample_latents --config FILE
"""

import pathlib
import runpy
import sys

import jax
import numpy as np

from stdit_jax.cli import connect_processes
from stdit_jax.run_samples import Sampler
from tests.runs import Run

if __name__ == "__main__":
  config = runpy.run_path(sys.argv[2])["get_config"]()
  connect_processes()
  run = Run(config)
  state, frozen, _ = run.start()
  sampler = Sampler(run)
  sampler(0, state, frozen)
  latents = sampler.latents(0, state, frozen)
  assert sampler.pipeline._step._cache_size() == 1, sampler.pipeline._step._cache_size()
  np.save(pathlib.Path(config.output) / f"{jax.process_index()}.npy", latents)
