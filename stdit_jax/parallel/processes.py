"""The coordination service that joins the processes of a run on several hosts."""

from typing import Any


def coordination() -> tuple[Any, int, int]:
  """(client of the coordination service, index of this process, number of processes). The client is None for one process.

  The client has a key-value store and barriers without a time limit. Neither needs a device. `jax.distributed.initialize` makes
  the client, and JAX (0.10, 0.11) has no public name for it: `jax.process_index` would start the devices, and the barrier of
  `jax.experimental.multihost_utils` computes on them. No other module uses the private name.
  """
  from jax._src.distributed import global_state

  client = global_state.client if global_state.num_processes > 1 else None
  return client, global_state.process_id, global_state.num_processes
