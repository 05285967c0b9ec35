"""Makes videos and images from text, images and videos, with a training run's folder or converted weights.

  python -m stdit_jax.sample --run runs/quickstart --prompt "a gray rabbit in a meadow" --num-frames 17
  python -m stdit_jax.sample --run runs/quickstart --prompt "the rabbit hops away" --task animate rabbit.png
  python -m stdit_jax.sample --run runs/quickstart --prompt "|0|a meadow|2|a forest" --task endless --loops 4 --num-frames 34
  python -m stdit_jax.sample --config configs/open_sora_1_2.py --weights denoiser.safetensors --text-encoder t5-xxl/ \\
      --config.text_encoder.tokenizer=t5-xxl/ --autoencoder vae.safetensors --prompt "..." --resolution 480p --aspect-ratio 9:16

Tasks, given as NAME and its files:
{tasks}

A prompt `|0|text|2|other` changes with the loops. A prompt may end with its own files and mask strategy, as with Open-Sora:
{{"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,0,-1"}}. --explain prints where each frame comes from.

A file's name consists of the number of the prompt, its first words, the task and the seed. The JSON file beside it has its
settings. The command keeps files that exist with the same settings, unless --overwrite is given. With other settings the new
file gets another name, -2, -3, ...

On several hosts, every process runs the same command (`cli.connect_processes`), and the first process writes.
"""

import os
import signal
import sys
from collections.abc import Sequence

import jax

from data import paths
from stdit_jax import cli, loading
from stdit_jax.autoencoders.registry import autoencoder_model
from stdit_jax.errors import InputError
from stdit_jax.generation import production, tasks, work
from stdit_jax.generation.prompts import read_prompt_file
from stdit_jax.generation.settings import SampleSettings


def parse(argv: Sequence[str] | None = None) -> SampleSettings:
  """The settings of a command line (default: of this process)."""
  described = str(__doc__).format(tasks=str(tasks.__doc__).partition("\n\n")[2].strip("\n"))
  return cli.parse_settings(SampleSettings, "stdit_jax.sample", described, argv)


def check_numbers(settings: SampleSettings) -> None:
  """Raises ValueError for numbers outside their ranges."""
  cli.check_positive(settings, "num_samples", "batch_size", "steps", "loops", "autoencoder_memory")
  last_seed = settings.seed + settings.num_samples - 1
  if settings.seed < 0 or last_seed >= 2**32:
    raise ValueError(f"--seed: seeds are {settings.seed} to {last_seed}; allowed: 0 to {2**32 - 1}")
  if not 0 <= settings.condition_edit <= 1:
    raise ValueError(f"--condition-edit is {settings.condition_edit:g}; allowed: 0 to 1")


def read_prompts(settings: SampleSettings) -> list[str]:
  """All prompts. Raises ValueError if there are none, or if the prompt file can't be read."""
  prompts = [*(settings.prompt or ()), *(read_prompt_file(settings.prompt_file) if settings.prompt_file else ())]
  if not prompts:
    where = f" in {settings.prompt_file}" if settings.prompt_file else ""
    raise ValueError(f'no prompt{where}; give --prompt "..." or --prompt-file FILE')
  return prompts


def main(argv: Sequence[str] | None = None) -> None:
  settings = parse(argv)
  with cli.one_line_errors():
    check_numbers(settings)
    prompts = read_prompts(settings)
    cli.connect_processes()
    config, step = loading.read_model(settings)
    autoencoder = autoencoder_model(config.autoencoder).config
    works = work.make_work(settings, prompts, config, autoencoder)
    if settings.explain:
      return work.explain(works, autoencoder, settings.compat)
    works = work.with_settings(works, settings, config.sample, loading.describe(settings, step), autoencoder)
    paths.check(settings.output, "--output")
    cli.use_compilation_cache()
    cli.keep_freed_memory()
    targets = work.choose_targets(settings, works)
    if not targets:
      return print(f"all {len(works)} files exist and are kept (--overwrite makes them again)")
    if len(targets) < len(works) and jax.process_index() == 0:
      print(f"{len(works) - len(targets)} of {len(works)} files exist and are kept (--overwrite makes them again)")
    paths.check_writable(os.path.dirname(targets[0].path) or ".", "--output")
    check = lambda made: production.check_memory(made, targets, settings)  # noqa: E731
    pipeline = loading.load_pipeline(settings, config, step, check)
  with cli.one_line_errors((OSError, InputError)):
    production.produce(pipeline, targets, settings)


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exiting the `with` blocks deletes unfinished files
  with cli.interruptible("finished files are kept"):
    main()
