"""The programs that encode clips in a training from videos: how many a host needs, and the compiler's time for them."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from data import aspect_ratios
from stdit_jax.autoencoders.family import encoder_only
from stdit_jax.autoencoders.registry import autoencoder_model, family_of, make_codec
from stdit_jax.config import Autoencoder
from stdit_jax.training.clip_encoder import Size, lower_program, program_sizes
from stdit_jax.training.stages import Stage


def encode_sizes(stage: Stage) -> tuple[list[Size], list[Size]]:
  """Sizes (frames, height, width) of a stage's programs: (of single frames, of longer clips), by pixels. One program each."""
  config, sizes = autoencoder_model(stage.config.autoencoder).config, set()
  for bucket in stage.config.data.parsed_buckets():
    if bucket.batch_size and bucket.keep_prob:
      own = list(aspect_ratios.SIZES[bucket.resolution].values())
      used = aspect_ratios.used_ratios(bucket.resolution, stage.config.data.aspect_ratios)
      sizes |= {size for i in used for size in program_sizes(config, (bucket.num_frames, *own[i]))}
  found = sorted(sizes, key=lambda size: (np.prod(size), size))
  return [size for size in found if size[0] == 1], [size for size in found if size[0] > 1]


def typical(sizes: Sequence[Size], count: int = 1) -> list[Size]:
  """`count` of the sizes, in the middle of equal parts of the list."""
  return [sizes[(2 * i + 1) * len(sizes) // (2 * count)] for i in range(min(count, len(sizes)))]


def lower_encoder(config: Autoencoder, size: Size, device: Any) -> jax.stages.Lowered:
  """The program of a size for a device of a topology. All devices of a host share it."""
  model = autoencoder_model(config)
  variables = encoder_only(family_of(model.config).init_shapes(model.config))
  return lower_program(make_codec(model, variables, config.micro_batch), size, device)


def compile_seconds(lowered: jax.stages.Lowered) -> float:
  """Processor seconds of the compiler for a program."""
  began = time.process_time()
  lowered.compile()
  return time.process_time() - began
