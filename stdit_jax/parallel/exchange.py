"""Each row of a batch is made by one process, also if devices of several processes hold the row.

Devices that split tokens or heads hold the same part of a batch, and may belong to several processes. One of these processes
owns a row: it decodes and encodes the row. Its device then sends the row to the other devices of the part.
"""

import collections
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stdit_jax.parallel.shardings import Layout

Places = tuple[tuple[int, ...], ...]  # [parts, rows of a part]: the number of a device among the devices of the part


@functools.cache
def _processes(layout):
  """The process of each device, `[parts, devices of a part]`. The mesh axes that split the batch come first."""
  devices = layout.mesh.devices.reshape(layout.batch_parts, -1)
  return np.vectorize(lambda device: device.process_index, otypes=[int])(devices)


def crosses_processes(layout: Layout) -> bool:
  """Whether several processes hold the same part of a batch."""
  processes = _processes(layout)
  return bool((processes != processes[:, :1]).any())


def divide_rows(processes: np.ndarray, rows: int) -> Places:
  """Divides the rows of each part among processes, and then among their devices, as evenly as possible.

  Args:
    processes: of each device, `[parts, devices of a part]`.
    rows: of a part.
  """
  of_process, of_device, places = collections.Counter(), collections.Counter(), []
  for part, here in enumerate(processes.tolist()):
    places.append([])
    for _ in range(rows):
      device = min(range(len(here)), key=lambda d: (of_process[here[d]], of_device[part, d]))
      of_process[here[device]] += 1
      of_device[part, device] += 1
      places[-1].append(device)
  return tuple(map(tuple, places))


@functools.cache
def row_places(layout: Layout, rows: int) -> Places:
  """The device that starts with each row of a global batch of `rows` rows. Its process owns the row."""
  return divide_rows(_processes(layout), rows // layout.batch_parts)


def process_rows(layout: Layout, rows: int) -> tuple[int, ...]:
  """Numbers, in order, of the rows of a global batch of `rows` rows that this process owns."""
  owners = np.take_along_axis(_processes(layout), np.asarray(row_places(layout, rows)), 1)
  return tuple(np.flatnonzero(owners == jax.process_index()).tolist())


def exchange(batch: Any, specs: Any, layout: Layout, places: Places) -> Any:
  """Global arrays over the mesh from rows that each exist on one device. All processes call it together, in the same order.

  At first every device of a part gets an equal share of the elements of each row, by an all-to-all. Then the devices that
  `layout` gives the same elements gather them. So a device never holds the padded rows of all devices.

  Args:
    batch: tree of NumPy arrays. They begin with the rows of this process, in order. The exchange ignores further rows.
    specs: tree of `ArraySpec`. Only the axes matter.
    places: the device that has each row. `row_places` for a batch of several processes.
  """
  specs, structure = jax.tree.flatten(specs)
  values = structure.flatten_up_to(batch)
  sources = [_lay_out(_shares(value, spec.axes, layout), layout, places) for value, spec in zip(values, specs)]
  kinds = tuple((spec.axes, value.shape[1:]) for value, spec in zip(values, specs))
  structs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in sources)
  return structure.unflatten(_program(layout, places, kinds, structs)(*sources))


def _most(places):
  """The largest number of rows on one device."""
  return max(max(collections.Counter(part).values()) for part in places)


def _shares(rows, axes, layout):
  """Rows `[n, ...]` -> `[n, devices of a part, elements]`: the share of each device. Pads the elements with zeros."""
  devices = layout.mesh.size // layout.batch_parts
  pieces = np.split(rows, layout.token_parts, axes.index("tokens")) if "tokens" in axes else [rows]
  each = devices // len(pieces)  # devices that get the same piece
  size = math.prod(pieces[0].shape[1:])
  flat = np.stack([piece.reshape(len(rows), size) for piece in pieces], 1)
  return np.pad(flat, ((0, 0), (0, 0), (0, -size % each))).reshape(len(rows), devices, math.ceil(size / each))


@functools.cache
def _own_rows(layout, places):
  """{(part, device): numbers of the device's rows among the rows of this process} of all devices of this process."""
  processes, count, found = _processes(layout), itertools.count(), collections.defaultdict(list)
  for part, of in enumerate(places):
    for device in of:
      if processes[part, device] == jax.process_index():
        found[part, device].append(next(count))
  return found


def _lay_out(rows, layout, places):
  """Global array `[devices * most, ...]` with the rows of this process on their devices. Zeros fill up the other devices."""
  own, most, devices = _own_rows(layout, places), _most(places), layout.mesh.size // layout.batch_parts
  shape = layout.mesh.size * most, *rows.shape[1:]

  def piece(index):
    taken = rows[own.get(divmod(index[0].indices(shape[0])[0] // most, devices), [])]
    return np.pad(taken, ((0, most - len(taken)), (0, 0), (0, 0)))

  return jax.make_array_from_callback(shape, NamedSharding(layout.mesh, P(layout.mesh.axis_names)), piece)


@functools.cache
def _program(layout, places, kinds, structs):
  """The compiled exchange of arrays. It refuses other shapes, so it never compiles again.

  Args:
    kinds: (axes, shape of a row) of each array; structs: of `_lay_out`.
  """
  mesh, most = layout.mesh, _most(places)
  others = tuple(axis for axis in mesh.axis_names if axis not in layout.axes["batch"])
  # Where each row of a part is among the rows of all devices of the part.
  order = np.asarray([[d * most + of[:i].count(d) for i, d in enumerate(of)] for of in places], np.int32)

  def receive(order, x, axes, shape):
    names = (*axes[1:], *(None for _ in shape))
    shape = [n // layout.token_parts if name == "tokens" else n for n, name in zip(shape, names)]
    copies = tuple(axis for axis in others if axis not in [layout.axes[name] for name in axes])
    x = jax.lax.all_to_all(x, others, 1, 0, tiled=True)[:, 0]  # [most, devices, share] -> [devices * most, share]
    x = jax.lax.all_gather(x[order[0]], copies, axis=1, tiled=True)  # [rows of a part, elements]
    return x[:, : math.prod(shape)].reshape(-1, *shape)

  def exchanged(*arrays):
    return tuple(receive(arrays[0], x, *kind) for x, kind in zip(arrays[1:], kinds))

  moved = jax.shard_map(
    exchanged,
    mesh=mesh,
    in_specs=(layout.spec("batch"), *(struct.sharding.spec for struct in structs)),
    out_specs=tuple(layout.spec(*axes) for axes, _ in kinds),
    check_vma=False,  # JAX does not see that gathered arrays are the same on all devices
  )
  shardings = tuple(layout.sharding(*axes) for axes, _ in kinds)
  return jax.jit(functools.partial(moved, order), out_shardings=shardings).lower(*structs).compile()
