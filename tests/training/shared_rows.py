"""Trains like `stdit_jax.train`, as one of the processes of test_processes.py, and writes what it read and made.

python -m tests.training.shared_rows --config FILE

`<output>/<process>.json` has `decoded`: [path, epoch] of each image; `steps`: for each micro step its epoch, the samples of
this process, and the weights and sample numbers on each of its devices. `<output>/<process>.npz` has the parameters on each
device.
"""

import dataclasses
import json
import pathlib
import runpy
import sys

import jax
import numpy as np

from data import loader
from stdit_jax.cli import connect_processes
from stdit_jax.parallel.shardings import path_name
from tests.runs import Run


def on_devices(array):
  return [np.asarray(shard.data).tolist() for shard in array.addressable_shards]


def main(config):
  run, decoded, steps, read = Run(config), [], [], loader.RowDecoder._read

  def read_and_note(self, row, num_frames, size, window, slot_row):
    decoded.append((row.path, window))
    return read(self, row, num_frames, size, window, slot_row)

  def note_batches(objective):
    batch_maker = objective.batch_maker

    def noted(encoders, name):
      make = batch_maker(encoders, name)

      def place_and_note(made, loaded, layout):
        batch = make.place(made, loaded, layout)
        step = {"epoch": loaded.epoch, "samples": [(s.sample_id, s.path) for s in loaded.samples]}
        steps.append(step | {"weights": on_devices(batch["weight"]), "ids": on_devices(batch["sample_id"])})
        return batch

      return dataclasses.replace(make, place=place_and_note)

    objective.batch_maker = noted

  loader.RowDecoder._read = read_and_note
  for parts in run.parts:
    note_batches(parts.objective)
  state = run.train()
  place = pathlib.Path(config.output) / str(jax.process_index())
  place.with_suffix(".json").write_text(json.dumps({"decoded": decoded, "steps": steps}))
  params = jax.tree_util.tree_flatten_with_path(state["params"])[0]
  np.savez(place, **{path_name(path): on_devices(x) for path, x in params})


if __name__ == "__main__":
  settings = runpy.run_path(sys.argv[2])["get_config"]()
  connect_processes()
  main(settings)
