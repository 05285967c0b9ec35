"""The device mesh. It has four axes. Each may run within a TPU slice, over several slices, or both.

data      batch
fsdp      batch; splits parameters, their average and the optimizer state
sequence  batch for short clips, tokens for long ones (`shardings.Layout`)
tensor    heads and the hidden side of the MLPs
"""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_sizes(sizes: dict[str, int], num_devices: int, name: str = "mesh", of: str = "devices") -> dict[str, int]:
  """Sizes of all axes, with one size of -1 completed so that the product is `num_devices`.

  Raises:
    ValueError: the product of the sizes is not the number of devices. The message names sizes that work.
  """
  if unknown := sorted(set(sizes) - set(AXES)):
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
      f"{name}: {sizes} does not make {num_devices} {of}; sizes that work are factors of {num_devices} ({divisors}), "
      "or -1 for one axis"
    )
  return sizes


def make_mesh(sizes: dict[str, int], devices: list | None = None, slices: dict[str, int] | None = None) -> Mesh:
  """Mesh over all devices. Axes are Auto: XLA propagates shardings, and `constrain` pins the important ones.

  Args:
    sizes: {axis: devices along it within a slice}. One size may be -1.
    devices: by default all devices of all processes. Devices of a topology (`topology_devices`) work, too.
    slices: {axis: slices along it}, by default all along `data`.

  Raises:
    ValueError: the product of the sizes is not the number of devices. The message names sizes that work.
  """
  devices = jax.devices() if devices is None else devices
  # TPU slices communicate only over the slow data-centre network, so the mesh must know the slice of each device.
  num_slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
  over = mesh_sizes(slices or {"data": -1}, num_slices, "slices", "slices")
  within = mesh_sizes(sizes, len(devices) // num_slices)
  shape = tuple(within.values())
  if num_slices > 1:
    grid = mesh_utils.create_hybrid_device_mesh(shape, tuple(over.values()), devices, allow_split_physical_axes=True)
  elif devices[0].platform == "tpu":
    try:  # along the torus, if the sizes are products of its sides
      grid = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
      grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def own_devices() -> list:
  """The devices of this process that one program may use together. On TPUs of several hosts this is the first device alone.

  There libtpu refuses programs for the devices of one host: on v5e:16x16 all of them, on v5e:4x4 and v6e:4x4 those with
  collectives (compiled with libtpu, without TPUs).
  """
  devices = jax.local_devices()
  return devices[:1] if devices[0].platform == "tpu" and jax.process_count() > 1 else devices
