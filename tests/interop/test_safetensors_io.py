"""Reading and writing safetensors: agreement with the safetensors library, and damaged files."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from stdit_jax.interop.safetensors_io import (
  DTYPES,
  CheckpointError,
  open_checkpoint,
  write_checkpoint,
)
from tests.object_store import BUCKET

ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "odd": np.arange(3, dtype=ml_dtypes.bfloat16),  # 6 bytes, so the next tensor would not be aligned
  "scalar": np.float64(2.5),
  "empty": np.zeros((0, 4), np.int64),
  "flags": np.array([True, False]),
}
ARRAYS = {name: np.asarray(value) for name, value in ARRAYS.items()}


def spec_of(arrays):
  return {name: (a.shape, a.dtype) for name, a in arrays.items()}


def write(path, arrays=ARRAYS, **options):
  return write_checkpoint(path, spec_of(arrays), arrays.items(), **options)


def raw_file(path, header, data=b"", length=None):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
  return path


def entry(start, stop, dtype="F32", shape=None):
  return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def test_written_files_are_read_by_this_package_and_the_library(tmp_path):
  (path,) = write(tmp_path / "x.safetensors", metadata={"format": "pt", "model": "m"})
  ours = open_checkpoint(path)
  library = safetensors.numpy.load_file(path)
  assert ours.metadata == {"format": "pt", "model": "m"}
  assert set(library) == set(ours.tensors) == set(ARRAYS)
  for name, array in ARRAYS.items():
    for other in (ours.read(name), library[name]):
      assert other.dtype == array.dtype
      assert other.shape == array.shape
      assert other.tobytes() == array.tobytes()
    assert ours.tensors[name].start % array.dtype.itemsize == 0
  assert os.listdir(tmp_path) == ["x.safetensors"]


def test_files_of_the_library_are_read(tmp_path):
  arrays = {name: ARRAYS[name] for name in ("a", "odd", "flags")}
  safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
  found = open_checkpoint(tmp_path)
  assert all(found.read(name).tobytes() == array.tobytes() for name, array in arrays.items())


def test_bfloat16_of_a_handwritten_file_is_read(tmp_path):
  path = raw_file(tmp_path / "x.safetensors", {"y": entry(0, 8, "BF16", [2, 2])}, b"\x80\x3f" * 4)
  np.testing.assert_array_equal(open_checkpoint(path).read("y"), np.ones((2, 2), ml_dtypes.bfloat16))


def test_an_unfinished_file_is_ignored(tmp_path):
  write(tmp_path / "x.safetensors")
  (tmp_path / ".y.tmp7-abcd.safetensors").write_bytes(b"half")
  assert set(open_checkpoint(tmp_path).tensors) == set(ARRAYS)


def test_shards_round_trip_with_their_index(tmp_path):
  arrays = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(7)}
  files = write(tmp_path / "out", arrays, max_shard_bytes=1000)
  assert [f.name for f in files][-2:] == ["model-00004-of-00004.safetensors", "model.safetensors.index.json"]
  index = json.loads(files[-1].read_text())
  assert index["metadata"]["total_size"] == 2800
  assert all(file.stat().st_size < 2000 for file in files[:-1])
  for path in (tmp_path / "out", files[-1]):
    found = open_checkpoint(path)
    assert all(np.array_equal(found.read(name), array) for name, array in arrays.items())
  with pytest.raises(CheckpointError, match="exists already"):
    write(tmp_path / "out", arrays, max_shard_bytes=1000)
  write(tmp_path / "out", arrays, max_shard_bytes=1000, overwrite=True)
  # A write with another number of shards replaces all old files. A stale index would hide the new file.
  with pytest.raises(CheckpointError, match="exists already"):
    write(tmp_path / "out")
  write(tmp_path / "out", overwrite=True)
  assert os.listdir(tmp_path / "out") == ["model.safetensors"]


HOSTILE = {
  "header too small.* may be damaged or cut short": lambda p: p.write_bytes(b"abc"),
  "header too large": lambda p: raw_file(p, {}, length=9 * 10**12),
  "invalid header length": lambda p: raw_file(p, {}, length=9000),
  "looks like a pickle or zip": lambda p: p.write_bytes(b"PK\x03\x04" + b"z" * 60),
  "invalid JSON": lambda p: raw_file(p, b'{"a": '),
  "invalid type: sequence": lambda p: raw_file(p, b"[1, 2]"),
  "recursion limit": lambda p: raw_file(p, b'{"a":' + b"[" * 100_000),
  "invalid JSON ": lambda p: raw_file(
    p, b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0],"b":%s}}' % (b"[" * 200 + b"]" * 200)
  ),
  "number out of range": lambda p: raw_file(
    p, b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0],"b":%s}}' % (b"9" * 5000)
  ),
  "utf-8": lambda p: raw_file(p, b'{"\xff": 1}'),
  "more than once": lambda p: raw_file(p, b'{"a": %s, "a": %s}' % ((b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}',) * 2)),
  "missing field `shape`": lambda p: raw_file(p, {"a": {"dtype": "F32"}}),
  "unknown variant `F33`": lambda p: raw_file(p, {"a": entry(0, 8, "F33")}, b"0" * 8),
  "unknown variant `.*x1b": lambda p: raw_file(p, {"a": entry(0, 8, "\x1b[2J\n")}, b"0" * 8),
  "its dtype is C64; allowed: BOOL": lambda p: raw_file(p, {"a": entry(0, 8, "C64", [1])}, b"0" * 8),
  "expected string or map": lambda p: raw_file(p, {"a": entry(0, 8, ["F32"])}, b"0" * 8),
  "`-2`, expected usize": lambda p: raw_file(p, {"a": entry(0, 8, shape=[-2, -1])}, b"0" * 8),
  "boolean `true`": lambda p: raw_file(p, {"a": entry(0, 8, shape=[True, 2])}, b"0" * 8),
  "floating point `2.0`": lambda p: raw_file(p, {"a": entry(0, 8, shape=[2.0])}, b"0" * 8),
  "at most 32 sides and 2\\^63 bytes": lambda p: raw_file(p, {"a": entry(0, 0, shape=[0, 2**62, 2**62])}),
  "at most 32 sides and 2\\^63 bytes ": lambda p: raw_file(p, {"a": entry(0, 0, "F64", [0, 2**61])}),  # too big for NumPy
  "at most 32 sides and 2\\^63 bytes  ": lambda p: raw_file(p, {"a": entry(0, 4, shape=[1] * 65)}, b"0" * 4),
  "can't be printed": lambda p: raw_file(p, {"a\x1b[2J": entry(0, 0)}),
  "end of hex escape": lambda p: raw_file(p, b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
  "invalid offset": lambda p: raw_file(p, {"a\n": entry(0, 8) | {"data_offsets": [8, 0]}}, b"0" * 8),
  "`-8`, expected usize": lambda p: raw_file(p, {"a": entry(0, 8) | {"data_offsets": [-8, 0]}}, b"0" * 8),
  "not fully covered.* cut short": lambda p: raw_file(p, {"a": entry(0, 8)}, b"0" * 7),
  "invalid shape": lambda p: raw_file(p, {"a": entry(0, 8, shape=[3])}, b"0" * 8),
  "overflow": lambda p: raw_file(p, {"a": entry(0, 8, shape=[2**40, 2**40, 0x7FFFFFFF])}, b"0" * 8),
  "invalid offset for tensor `b`": lambda p: raw_file(p, {"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12),  # an overlap
  "invalid offset for tensor `b` ": lambda p: raw_file(p, {"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12),  # a hole
  "not fully covered": lambda p: raw_file(p, {"a": entry(0, 4)}, b"0" * 12),
  "expected a string": lambda p: raw_file(p, {"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_files_get_one_clear_error(tmp_path, message):
  path = tmp_path / "x.safetensors"
  HOSTILE[message](path)
  with pytest.raises(CheckpointError, match=message.strip()) as error:
    open_checkpoint(path)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_files_in_a_bucket_are_read_and_checked(tmp_path, store):
  (path,) = write(tmp_path / "x.safetensors", metadata={"model": "m"})
  store.write("weights/x.safetensors", path.read_bytes())
  found = open_checkpoint(f"gs://{BUCKET}/weights")
  assert found.metadata == {"model": "m"}
  assert all(found.read(name).tobytes() == array.tobytes() for name, array in ARRAYS.items())
  store.write("weights/x.safetensors", path.read_bytes()[:-1])
  with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid safetensors file: .*not fully covered"):
    open_checkpoint(f"gs://{BUCKET}/weights/x.safetensors")


def test_every_cut_of_a_file_is_refused(tmp_path):
  (path,) = write(tmp_path / "x.safetensors")
  whole = path.read_bytes()
  for length in range(len(whole)):
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError):
      open_checkpoint(path)


def test_random_damage_never_crashes(tmp_path):
  (path,) = write(tmp_path / "x.safetensors")
  whole, random = path.read_bytes(), np.random.default_rng(0)
  for _ in range(300):
    damaged = bytearray(whole)
    for place in random.integers(0, len(whole), 3):
      damaged[place] = random.integers(0, 256)
    path.write_bytes(damaged)
    try:
      found = open_checkpoint(path)
      [found.read(name, allow_non_finite=True) for name in found.tensors]
    except CheckpointError:
      pass


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_named(tmp_path, dtype, value):
  array = np.zeros((3, 5), DTYPES[dtype])
  array[1, 2] = value
  (path,) = write(tmp_path / "x.safetensors", {"fine": np.ones(3, np.float32), "bad": array})
  file = open_checkpoint(path)
  file.read("fine")
  with pytest.raises(CheckpointError, match="'bad' holds 1 NaN or infinite"):
    file.read("bad")
  assert file.read("bad", allow_non_finite=True).tobytes() == array.tobytes()


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
def test_pickles_are_refused_with_a_recipe_that_works(tmp_path, suffix, monkeypatch):
  torch = pytest.importorskip("torch")
  tied = torch.nn.Linear(3, 3)
  path = tmp_path / f"model.{suffix}"
  torch.save({"state_dict": {"a": tied.weight, "b": tied.weight, "c": tied.weight.T}}, path)
  for given in (path, tmp_path):
    with pytest.raises(CheckpointError, match="are not read") as error:
      open_checkpoint(given)
  recipe = "\n".join(line.strip("\n")[2:] for line in str(error.value).splitlines()[1:])
  monkeypatch.chdir(tmp_path)
  exec(recipe, {})
  found = open_checkpoint(tmp_path / "model.safetensors")
  assert np.array_equal(found.read("c"), tied.weight.detach().numpy().T)
  assert set(found.tensors) == {"a", "b", "c"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..\\x.safetensors", "x.bin"])
def test_an_index_stays_in_its_folder(tmp_path, name):
  write(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
  with pytest.raises(CheckpointError, match="is refused"):
    open_checkpoint(folder)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
  write(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
  index = tmp_path / "model.safetensors.index.json"
  for weight_map, message in (
    ({"b": "x.safetensors"}, "disagree"),
    ({"a": "x.safetensors", "b": "x.safetensors"}, "'b' is not in that file"),
    ({"a": "y.safetensors"}, "No such file"),
    ({"a": 3}, "weight_map"),
    ([], "weight_map"),
  ):
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
      open_checkpoint(index)


def test_ambiguous_and_missing_files_are_refused(tmp_path):
  with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
    open_checkpoint(tmp_path)
  write(tmp_path / "a.safetensors")
  write(tmp_path / "b.safetensors")
  with pytest.raises(CheckpointError, match=r"name one of a\.safetensors, b\.safetensors"):
    open_checkpoint(tmp_path)
  with pytest.raises(CheckpointError, match="no such file"):
    open_checkpoint(tmp_path / "c.safetensors")


def test_a_failed_write_leaves_no_file(tmp_path):
  path = tmp_path / "x.safetensors"
  spec = {"a": ((2,), np.dtype(np.float32))}
  for tensors, message in (
    ([], "were not written"),
    ([("a", np.ones(3, np.float32))], "`spec` has"),
    ([("a", np.ones(2, np.float64))], "`spec` has"),
    ([("a", np.ones(2, np.float32))] * 2, "written twice"),
  ):
    with pytest.raises(CheckpointError, match=message):
      write_checkpoint(path, spec, tensors)
    assert os.listdir(tmp_path) == []
  write(path)
  before = path.read_bytes()
  with pytest.raises(CheckpointError, match="exists already"):
    write(path)
  with pytest.raises(CheckpointError, match="were not written"):
    write_checkpoint(path, spec, [], overwrite=True)
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_write_without_room_or_permission_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match="GB are needed"):
    write_checkpoint(tmp_path / "x.safetensors", {"a": ((10**15,), np.dtype(np.float32))}, [])
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="can't be written"):
    write(tmp_path / "file" / "x.safetensors")
