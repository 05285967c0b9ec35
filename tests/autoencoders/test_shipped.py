"""The autoencoders in the repository are small and self-describing, and they reconstruct frames."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from stdit_jax.autoencoders import metrics
from stdit_jax.loading import ModelSettings, load_autoencoder

FILM = pathlib.Path(__file__).parents[2] / "data" / "film"


@pytest.mark.parametrize(("name", "frames", "decibels"), [("autoencoder", 1, 27), ("video_autoencoder", 17, 33)])
def test_shipped_autoencoders_reconstruct_frames(name, frames, decibels):
  """Files are at most 6 MB and name their model. A clip repeats one frame of data/film/film.webp.

  The video autoencoder decoded these frames before, so it reconstructs them better than the image autoencoder.
  """
  path = FILM / f"{name}.safetensors"
  assert path.stat().st_size <= 6e6
  codec, _, _ = load_autoencoder(ModelSettings(autoencoder=str(path)))
  with Image.open(FILM / "film.webp") as sheet:
    pictures = np.asarray(sheet.convert("RGB")).reshape(3, 144, 4, 256, 3)[:, :, 0]
  for picture in pictures[: 3 if frames == 1 else 1]:
    clip = np.repeat(picture[None], frames, 0)
    latents, _ = codec.encode(clip)
    assert latents.shape == (codec.config.latent_frames(frames), 18, 32, 4)
    assert metrics.psnr(clip, codec.decode(latents, frames)) > decibels
