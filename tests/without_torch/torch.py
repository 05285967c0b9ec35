"""Hides PyTorch from the processes that tests start, because training and sampling must work without it.

It also saves the two seconds in which tensorboardX imports an installed PyTorch.
"""

raise ImportError("stdit_jax needs no PyTorch")
