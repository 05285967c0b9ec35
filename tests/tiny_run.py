"""A run that tests can train: real clips and images of three aspect ratios, tiny models, and a configuration of them."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from configs import base
from stdit_jax.autoencoders import image_kl
from stdit_jax.interop import save_variables
from stdit_jax.models import t5
from tests import QUICK_FLAGS
from tests.data import files

ROOT = pathlib.Path(__file__).parents[1]
MAX_LENGTH = 16
SIZES = ((144, 256), (256, 144), (192, 192))


def make_assets(folder):
  """Makes six clips of two seconds, six images, their tables, and safetensors of a tiny autoencoder and text encoder."""
  rows = []
  for i in range(6):
    height, width = SIZES[i % 3]
    files.write_video(folder / f"{i}.mp4", frames=48, height=height, width=width)
    rows.append({"path": f"{i}.mp4", "text": f"clip {i} of columns", "num_frames": 48, "height": height, "width": width})
  for i in range(6):
    height, width = SIZES[i % 3]
    Image.fromarray(files.picture(10 + i, height, width)).save(folder / f"{i}.png")
    rows.append({"path": f"{i}.png", "text": f"picture {i}", "num_frames": 1, "height": height, "width": width})
  for i, row in enumerate(rows):
    row |= {"fps": 24, "text_features": f"text{i}.safetensors"}
    features = np.random.default_rng(i).standard_normal((5 + i, 64), np.float32)
    save_file({"y": features}, folder / row["text_features"])
  files.write_csv(folder / "features.csv", rows)
  save_file({"y": np.full((5, 64), np.nan, np.float32)}, folder / "nan.safetensors")
  files.write_csv(folder / "one_nan.csv", [*rows[:7], {**rows[7], "text_features": "nan.safetensors"}, *rows[8:]])
  files.write_csv(folder / "all_nan.csv", [{**row, "text_features": "nan.safetensors"} for row in rows])
  rows = [{k: v for k, v in row.items() if k != "text_features"} for row in rows]
  files.write_csv(folder / "table.csv", rows)
  files.write_csv(folder / "other.csv", rows[:-1])
  files.write_csv(folder / "no_text.csv", [{k: v for k, v in row.items() if k != "text"} for row in rows])
  (folder / "broken.png").write_bytes(b"no picture")
  files.write_csv(folder / "broken.csv", [rows[8], {**rows[8], "path": "broken.png"}])
  files.write_csv(folder / "gone.csv", [{**row, "path": f"gone{i}.mp4"} for i, row in enumerate(rows)])

  config = image_kl.get_config("tiny-kl-f8")
  variables = jax.jit(lambda key: image_kl.init(image_kl.ImageKL(config), key))(jax.random.key(1))
  save_variables(folder / "autoencoder.safetensors", "diffusers", variables, config=config)
  config = t5.get_config("byt5-tiny")
  variables = jax.jit(lambda key: t5.init(config, key))(jax.random.key(2))
  save_variables(folder / "t5.safetensors", "t5", variables, config=config)


def tiny_config(assets, output, **changes):
  """The config of a run: STDiT-3 of width 48, byte-level T5 trained with it, images and clips of 4 frames, batches of 2.

  The resolution is 64p, whose frames take a ninth of the encoding time of 144p. `changes`: keys with two underscores for a dot.
  """
  config = base.get_config()
  config.output = str(output)
  config.model.name = "STDiT3-tiny/2"
  config.model.fields.update(hidden_size=48, depth=1, model_max_length=MAX_LENGTH)
  config.text_encoder.update(name="byt5-tiny", tokenizer="byt5", max_length=MAX_LENGTH, where="step", train=True)
  config.autoencoder.update(name="tiny-kl-f8", weights=f"{assets}/autoencoder.safetensors")
  config.data.tables = ((f"{assets}/table.csv", 1),)
  config.data.buckets = (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2))
  config.data.workers = 0
  config.data.frame_interval = 3
  config.mask_ratios = {"random": 0.3, "image_head": 0.2}
  config.caption_dropout = 0.3
  config.optimizer.update(learning_rate=1e-3, warmup_steps=3, eps=1e-8)
  config.stages = ({"name": "tiny", "steps": 4},)
  config.log_every = 1
  config.checkpoint_every = 2
  config.sample.update(
    prompts=("a picture",), resolution="144p", aspect_ratio="1:1", num_frames=4, fps=8, steps=2, guidance_scale=2.0
  )  # fmt: skip
  with config.ignore_type():
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return config


def environment(**more):
  """The environment of subprocesses: this code, no PyTorch, the tests' compilation cache, by default one CPU device."""
  cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
  path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "without_torch"), str(ROOT), os.environ.get("PYTHONPATH")]))
  return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **cache, **more}


def write_config(path, assets, output, **changes):
  """Writes a configuration file whose get_config() returns `tiny_config` with these changes."""
  path.write_text(
    "from tests.tiny_run import tiny_config\n\n\ndef get_config():\n"
    f"  return tiny_config({str(assets)!r}, {str(output)!r}, **{changes!r})\n"
  )
  return path


def run_module(name, *arguments, **more):
  """Runs `python -m name arguments`. Returns a CompletedProcess with text."""
  command = [sys.executable, "-m", name, *map(str, arguments)]
  return subprocess.run(command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300)


def start_processes(config, folder, count=2, devices=2, module="stdit_jax.train", places=(ROOT, ROOT), **more):
  """Starts `count` connected processes of a module, with `devices` CPU devices each. Their logs are `folder/<i>.log`.

  `places` are their working directories.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"
  place = {"STDIT_JAX_COORDINATOR": f"localhost:{port}", "STDIT_JAX_NUM_PROCESSES": str(count)}
  processes = []
  for i in range(count):
    # NPROC: see tests/training/test_devices.py.
    own = environment(XLA_FLAGS=flags, NPROC="64", **place, STDIT_JAX_PROCESS_ID=str(i), **more)
    command = [sys.executable, "-m", module, "--config", str(config)]
    with (folder / f"{i}.log").open("a") as log:
      processes.append(subprocess.Popen(command, cwd=places[i], env=own, stdout=log, stderr=subprocess.STDOUT))
  return processes


def eight_config(assets, output, steps=2, **changes):
  """The config of a run of `steps` steps on images, in batches that eight devices share."""
  buckets = (("64p", 1, 1.0, 8),)
  settings = {"data__buckets": buckets, "data__drop_last": False, "stages": ({"name": "devices", "steps": steps},)}
  # With a tiny eps, rounding noise of a zero gradient becomes a full step (key biases of the cross attention).
  settings["optimizer__eps"] = 1e-4
  return tiny_config(assets, output, **settings, **changes)


def frozen_text(assets, where):
  """Changes of a config: a frozen text encoder with weights from a file."""
  return {
    "text_encoder__where": where,
    "text_encoder__train": False,
    "text_encoder__weights": str(assets / "t5.safetensors"),
  }


def text_from_disk(assets):
  """Changes of a config: no text encoder, since features of the captions come from files. Such a run starts sooner."""
  return {"data__tables": f"{assets}/features.csv", "text_encoder__where": "disk", "text_encoder__train": False}


def small_autoencoder():
  """Changes of a config: a small image autoencoder trains, without text and without precomputed latents.

  This training starts sooner than any other. Tests use it if the model does not matter.
  """
  return {
    "task": "autoencoder",
    "autoencoder__weights": "",
    "autoencoder__crop": 16,
    "autoencoder__fields": {"block_out_channels": (8, 8)},
    "data__captions": "optional",
    "data__buckets": (("64p", 1, 1.0, 2),),
  }
