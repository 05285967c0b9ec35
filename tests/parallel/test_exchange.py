"""Rows that one process makes reach all devices of their part, bit for bit. Processes share the rows evenly."""

import collections

import jax
import numpy as np
import pytest

from stdit_jax.parallel import exchange
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import ArraySpec, Layout

# (process of each device of each part, rows of a part, rows of each process)
DIVIDED = [
  ([[0, 0, 1, 1]], 3, [2, 1]),
  ([[0, 0, 1, 1]], 1, [1, 0]),
  ([[0, 0, 1, 1], [0, 0, 1, 1]], 1, [1, 1]),  # two parts on the same hosts: one row each
  ([[0, 0, 1, 1], [2, 2, 3, 3]], 5, [3, 2, 3, 2]),
  ([[0, 1, 2, 3]], 6, [2, 2, 1, 1]),
  ([[0, 0], [1, 1]], 2, [2, 2]),
]


@pytest.mark.parametrize(("processes", "rows", "wanted"), DIVIDED)
def test_processes_divide_the_rows_that_they_share(processes, rows, wanted):
  places = exchange.divide_rows(np.asarray(processes), rows)
  assert [len(part) for part in places] == [rows] * len(processes)
  owners = collections.Counter(processes[part][device] for part, of in enumerate(places) for device in of)
  assert [owners[i] for i in range(len(wanted))] == wanted
  for of, here in zip(places, processes):  # the devices of a process share its rows
    for process in set(here):
      each = [of.count(device) for device, owner in enumerate(here) if owner == process]
      assert max(each) - min(each) <= 1


@pytest.mark.skipif(jax.device_count() < 8, reason="runs in the child process of test_devices.py")
@pytest.mark.parametrize(
  ("sizes", "split_tokens", "processes", "rows"),
  [
    ({"data": 2, "sequence": 4}, True, [[0, 0, 1, 1], [2, 2, 3, 3]], 3),
    ({"sequence": 8}, True, [[0, 0, 1, 1, 2, 2, 3, 3]], 1),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, True, [[0, 0, 1, 1]] * 2, 5),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, False, [[0, 1]] * 4, 3),
  ],
)
def test_rows_reach_all_devices_of_their_part_unchanged(sizes, split_tokens, processes, rows):
  """The arrays equal those that every device got from the host. The second batch compiles nothing."""
  layout, rng = Layout(make_mesh(sizes), split_tokens), np.random.default_rng(0)
  assert not exchange.crosses_processes(layout)
  count = rows * layout.batch_parts
  assert exchange.process_rows(layout, count) == tuple(range(count))
  tokens, row = ArraySpec((), axes=("batch", None, "tokens")), ArraySpec(())
  specs = {"moments": [tokens, tokens], "mask": row, "sample_id": row, "pixels": row, "weight": row}

  def batch():
    moments = rng.standard_normal((2, count, 3, 16, 5), np.float32)
    moments[:, 0, 0] = np.nan, -0.0, np.inf, 0, 1e-42
    pixels = rng.integers(0, 256, (count, 2, 3, 3, 3), np.uint8)
    return {
      "moments": list(moments), "mask": rng.random((count, 7)) < 0.5, "pixels": pixels,
      "sample_id": rng.integers(0, 2**32, (count, 2), np.uint32), "weight": rng.random(count).astype(np.float32),
    }  # fmt: skip

  places = exchange.divide_rows(np.asarray(processes), rows)
  before = exchange._program.cache_info().currsize
  for values in (batch(), batch()):
    made = exchange.exchange(values, specs, layout, places)
    for spec, ours, value in zip(*(jax.tree.leaves(tree) for tree in (specs, made, values)), strict=True):
      wanted = jax.device_put(value, layout.sharding(*spec.axes))
      assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype)
      assert ours.sharding.is_equivalent_to(wanted.sharding, ours.ndim)
      for a, b in zip(ours.addressable_shards, wanted.addressable_shards, strict=True):
        assert (a.device, a.index, np.asarray(a.data).tobytes()) == (b.device, b.index, np.asarray(b.data).tobytes())
  assert exchange._program.cache_info().currsize == before + 1
