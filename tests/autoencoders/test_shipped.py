"""The autoencoders of the film that the repository ships: small, self-describing, and they give pictures back."""

import argparse
import pathlib

import numpy as np
import pytest
from PIL import Image

from stdit_jax.autoencoders import metrics
from stdit_jax.loading import load_autoencoder

FILM = pathlib.Path(__file__).parents[2] / "data" / "film"


@pytest.mark.parametrize(("name", "frames", "decibels"), [("autoencoder", 1, 27), ("video_autoencoder", 17, 33)])
def test_shipped(name, frames, decibels):
  """At most 6 MB each, they say what they are, and keep what the film's denoiser made, as still scenes, so well: the second, by
  which it was decoded, better than the first."""
  path = FILM / f"{name}.safetensors"
  assert path.stat().st_size <= 6e6
  codec, _, _ = load_autoencoder(argparse.Namespace(run=None, config=None, model=None, autoencoder=str(path)))
  with Image.open(FILM / "film.webp") as sheet:
    pictures = np.asarray(sheet.convert("RGB")).reshape(3, 144, 4, 256, 3)[:, :, 0]
  for picture in pictures:
    clip = np.repeat(picture[None], frames, 0)
    latents, _ = codec.encode(clip)
    assert latents.shape == (codec.config.latent_frames(frames), 18, 32, 4)
    assert metrics.psnr(clip, codec.decode(latents, frames)) > decibels
