"""The device mesh: axes `data` and `fsdp`, both over the batch; `fsdp` also splits parameters and optimizer state."""

import math

import jax
from jax.sharding import AxisType

AXES = ("data", "fsdp")


def mesh_sizes(sizes, num_devices):
  """Completes one size of -1 so that the product is `num_devices`; ValueError with the sizes that work otherwise."""
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise ValueError(f"mesh: unknown axis {unknown[0]!r}; allowed: {', '.join(AXES)}")
  sizes = {axis: int(sizes.get(axis, 1)) for axis in AXES}
  free = [axis for axis, n in sizes.items() if n == -1]
  if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
    raise ValueError(f"mesh: sizes must be positive, at most one -1, but are {sizes}")
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if free and num_devices % fixed == 0:
    sizes[free[0]] = num_devices // fixed
  if math.prod(sizes.values()) != num_devices:
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    raise ValueError(
      f"mesh: {sizes} does not make {num_devices} devices; sizes that work are factors of {num_devices} ({divisors}), "
      "or -1 for one axis"
    )
  return sizes


def make_mesh(sizes, devices=None):
  """Mesh over all devices. Axes are Auto: XLA propagates shardings, `constrain` pins them where it matters."""
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(sizes, len(devices))
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
