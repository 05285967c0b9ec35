"""Sizes of the video autoencoder's latents, against those of Open-Sora 1.2."""

import json

from stdit_jax.autoencoders.temporal import latent_frames
from tests.helpers import REFERENCE


def test_latent_frames():
  rows = json.loads((REFERENCE / "vae_latent_sizes.json").read_text())["rows"]
  assert len({row["input"][0] for row in rows}) > 10
  for row in rows:
    assert latent_frames(row["input"][0]) == row["latent"][0]
