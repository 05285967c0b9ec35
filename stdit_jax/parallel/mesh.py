"""The device mesh. It has four axes, within a slice and over slices:

data      the batch
fsdp      the batch; also splits parameters, their averages and the optimizer state
sequence  the batch of short clips, the tokens of long clips (`shardings.Layout`)
tensor    heads, and the hidden dimension of the MLPs
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_sizes(sizes: Mapping[str, int], num_devices: int, name: str = "mesh", of: str = "devices") -> dict[str, int]:
  """Returns the sizes of all axes. A size of -1 takes the remaining devices; axes without a size have one device.

  Raises:
    ValueError: an axis is unknown, or the product of the sizes is not `num_devices`. The message names sizes that work.
  """
  unknown = sorted(set(sizes) - set(AXES))
  if unknown:
    raise ValueError(f"{name}: unknown axis {unknown[0]!r}; allowed: {', '.join(AXES)}")
  sizes = {axis: int(sizes.get(axis, 1)) for axis in AXES}
  free = [axis for axis, n in sizes.items() if n == -1]
  if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
    raise ValueError(f"{name}: sizes are {sizes}; allowed: whole numbers of at least 1, and -1 for one axis")
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if free and num_devices % fixed == 0:
    sizes[free[0]] = num_devices // fixed
  if math.prod(sizes.values()) != num_devices:
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    raise ValueError(
      f"{name}: {sizes} does not make {num_devices} {of}. Give factors of {num_devices} ({divisors}) that have this "
      "product, or -1 for one axis"
    )
  return sizes


def count_slices(devices: Sequence[Any]) -> int:
  """Number of TPU slices among `devices`. Only the data-centre network joins slices. 1 on other platforms."""
  return len({d.slice_index for d in devices}) if devices[0].platform == "tpu" and hasattr(devices[0], "slice_index") else 1


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None, slices: Mapping[str, int] | None = None) -> Mesh:
  """The mesh over all devices. Its axes are Auto: XLA propagates shardings, and `constrain` fixes important ones.

  Args:
    sizes: {axis: devices along the axis within a slice}; one size may be -1.
    devices: None: all. Devices of a topology (`topology_devices`) are allowed.
    slices: {axis: slices along the axis}; None: all along `data`.

  Raises:
    ValueError: the sizes do not make the number of devices. The message names sizes that do.
  """
  devices = jax.devices() if devices is None else devices
  num_slices = count_slices(devices)
  over = mesh_sizes(slices or {"data": -1}, num_slices, "slices", "slices")
  within = mesh_sizes(sizes, len(devices) // num_slices)
  shape = tuple(within.values())
  if num_slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(shape, tuple(over.values()), devices, allow_split_physical_axes=True)
  elif devices[0].platform == "tpu":
    try:  # axes along the torus, if the sizes are products of its sides
      grid = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
      grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
