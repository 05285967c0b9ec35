"""Clips are encoded by one program per size, which a process compiles once in its life."""

import json
import re

import jax

from stdit_jax.autoencoders import temporal
from stdit_jax.interop import save_variables
from tests.data import files
from tests.tiny_run import SIZES, start_processes, text_from_disk, write_config

LENGTHS = {9: 48, 5: 20, 2: 10, 1: 1}  # {frames of a bucket: frames of the rows that fit it alone}


def train_in_two_processes(assets, folder, name):
  """(names of compiled encode programs, log) of each process. The cache of compiled programs is `folder/cache`."""
  (folder / name).mkdir()
  autoencoder = {"autoencoder__name": "tiny-temporal", "autoencoder__weights": str(folder / "autoencoder.safetensors")}
  buckets = tuple(("64p", frames, 1.0, 8) for frames in LENGTHS)
  settings = {"data__buckets": buckets, "data__drop_last": False, **text_from_disk(assets)}
  settings |= {"data__tables": ((str(folder / "table.csv"), 1),)}
  config = write_config(
    folder / name / "config.py", assets, folder / name / "run", stages=({"name": "same", "steps": 8},), mesh={"data": 8},
    **autoencoder, **settings,
  )  # fmt: skip
  own = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "COMPILATIONS": str(folder / name / "compilations")}
  started = start_processes(config, folder / name, devices=4, module="tests.training.train_and_count", **own)
  codes = [process.wait(600) for process in started]
  logs = [(folder / name / f"{i}.log").read_text() for i in (0, 1)]
  assert codes == [0, 0], [log[-3000:] for log in logs]
  found = [json.loads((folder / name / f"compilations.{i}").read_text()) for i in (0, 1)]
  return [[program for program, cached in own if "encode" in program and not cached] for own in found], logs


def test_each_process_compiles_each_size_once_and_never_again(assets, tmp_path):
  """Twelve sizes of clips, in two processes with four devices each."""
  variables = temporal.init(temporal.build(temporal.TABLE["tiny-temporal"]), jax.random.key(0))
  save_variables(tmp_path / "autoencoder.safetensors", "open-sora-vae", variables, config=temporal.TABLE["tiny-temporal"])
  rows = [
    {"path": f"{assets}/{i}.{'png' if frames == 1 else 'mp4'}", "num_frames": frames, "height": height, "width": width}
    for i, (height, width) in enumerate(SIZES) for frames in LENGTHS.values()
  ]  # fmt: skip
  features = {"text": "columns", "fps": 24, "text_features": f"{assets}/text0.safetensors"}
  files.write_csv(tmp_path / "table.csv", [{**row, **features} for row in rows])
  first, logs = train_in_two_processes(assets, tmp_path, "first")
  assert all(len(programs) == len(set(programs)) for programs in first)  # a process may find a file of the other one
  assert len({*first[0], *first[1]}) == 12
  assert re.search(r"12 encode programs: \d from files, \d+ to compile", logs[0])
  assert logs[0].index("step 1/8") < logs[0].index("all are ready")  # training waits only for the sizes of its step
  again, logs = train_in_two_processes(assets, tmp_path, "again")
  assert again == [[], []]
  assert "12 encode programs: 12 from files, 0 to compile" in logs[0]
