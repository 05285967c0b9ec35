"""The temporal half of Open-Sora 1.2's video autoencoder: so far only how long its latents are, from which runs are planned."""

CHUNK, CHUNK_LATENTS, DOWNSAMPLING = 17, 5, 4


def latent_frames(num_frames):
  """Latent frames of a clip: chunks of 17 frames give 5 each, what is left over is padded in front to a multiple of 4.

  As Open-Sora 1.2, `VideoAutoencoderPipeline.get_latent_size`.
  """
  chunks, rest = divmod(num_frames, CHUNK)
  return chunks * CHUNK_LATENTS + -(-rest // DOWNSAMPLING)
