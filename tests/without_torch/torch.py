"""Stands before PyTorch on the path of the processes that tests start: training and sampling work where it is not installed.

It also saves each of them the two seconds in which tensorboardX imports PyTorch where it finds it.
"""

raise ImportError("stdit_jax needs no PyTorch")
