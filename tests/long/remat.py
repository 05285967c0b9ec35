"""Autoencoders with `remat` store at most 60 % of the activations, and have the same gradients.

python -m tests.long.remat
"""

from tests.training.test_autoencoding import test_remat_stores_less_and_keeps_the_gradients

if __name__ == "__main__":
  for name, frames in (("tiny-kl-f8", 2), ("tiny-temporal", 17), ("tiny-causal3d", 9)):
    test_remat_stores_less_and_keeps_the_gradients(name, frames)
    print(f"{name}, {frames} frames: passed", flush=True)
