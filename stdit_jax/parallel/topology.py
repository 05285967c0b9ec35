"""Accelerators: their published peaks, and device descriptions to compile programs for them on any machine."""

import contextlib
import dataclasses
import importlib.metadata
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one accelerator."""

  device_kind: str  # JAX's name of it
  tflops: float  # bfloat16 TFLOP/s, dense
  memory_gbs: float  # GB/s of its memory
  interconnect_gbits: float  # Gbit/s of all links together (GPUs: of NVLink, in one direction)
  # Memory that a program may use. TPUs: the limit of libtpu 0.0.52. GPUs: 0.9 of all (XLA_PYTHON_CLIENT_MEM_FRACTION=.9).
  memory_gib: float


TPUS = {
  "v4": Chip("TPU v4", 275, 1228, 2400, 30.75),
  "v5e": Chip("TPU v5 lite", 197, 819, 1600, 15.75),
  "v5p": Chip("TPU v5", 459, 2765, 4800, 95.73),
  "v6e": Chip("TPU v6 lite", 918, 1640, 3584, 31.24),
}
GPUS = {
  "a100": Chip("NVIDIA A100-SXM4-80GB", 312, 2039, 2400, 71.3),
  "h100": Chip("NVIDIA H100 80GB HBM3", 989, 3350, 3600, 71.2),
  "h200": Chip("NVIDIA H200", 989, 4800, 3600, 125.8),
}
CHIPS = TPUS | GPUS
GPUS_PER_HOST = 8


def peak_tflops(device_kind: str) -> float | None:
  """bfloat16 TFLOP/s of a device by JAX's name of it, None if it is not in the table."""
  return next((chip.tflops for chip in CHIPS.values() if device_kind == chip.device_kind), None)


# With this environment a process can compile by libtpu on a machine without TPU.
TPU_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def is_gpu(topology: str) -> bool:
  """Whether a topology names GPUs, as 'h100:8' does."""
  return topology.partition(":")[0] in GPUS


def compiler_version(topology: str) -> str:
  """Name and version of the compiler for a topology.

  Raises:
    ValueError: the compiler is not installed.
  """
  names = ("jax-cuda13-plugin", "jax-cuda12-plugin") if is_gpu(topology) else ("libtpu",)
  for name in names:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      return f"{name} {importlib.metadata.version(name)}"
  if is_gpu(topology):
    version = importlib.metadata.version("jax")
    raise ValueError(
      "JAX's CUDA plugin, which compiles for GPUs, is not installed. In an environment of its own, pip install "
      f"--no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, with ptxas of CUDA on the PATH"
    )
  raise ValueError("libtpu, which compiles for TPUs, is not installed. Run: pip install -c constraints.txt libtpu")


def parse_topology(name: str) -> str:
  """Kind of chip, a key of CHIPS, of a topology such as 'v5e:16x16' or 'h100:8'.

  Raises:
    ValueError: no topology has this name.
  """
  match = re.fullmatch(r"(\w+):\d+x\d+(?:x\d+)?", name)
  if match and match[1] in TPUS:
    return match[1]
  match = re.fullmatch(r"(\w+):([1-9]\d*)", name)
  if match and match[1] in GPUS and (int(match[2]) in (1, 2, 4) or int(match[2]) % GPUS_PER_HOST == 0):
    return match[1]
  raise ValueError(
    f"--topology {name!r} is unknown. Give KIND:AxB or KIND:AxBxC, KIND one of {', '.join(TPUS)}, as in v5e:16x16. For GPUs "
    f"give --platform gpu --gpu KIND:COUNT, KIND one of {', '.join(GPUS)}, COUNT 1, 2, 4 or a multiple of {GPUS_PER_HOST}."
  )


def topology_chips(name: str) -> int:
  """Number of chips of a topology: 'v5p:4x8x8' has 256."""
  return math.prod(int(side) for side in name.partition(":")[2].split("x"))


# From NVIDIA's data sheets and the table of compute capabilities in the CUDA programming guide. Fields have the names of XLA's
# GpuDeviceInfoProto.
_COMMON = {
  "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048, "block_dim_limit_x": 2**31 - 1,
  "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
  "thread_dim_limit_z": 64, "shared_memory_per_block": 48 * 1024, "registers_per_core_limit": 65536,
  "registers_per_block_limit": 65536,
}  # fmt: skip
_HOPPER = {
  "core_count": 132, "fpus_per_core": 128, "l2_cache_size": 50 * 2**20, "clock_rate_ghz": 1.98,
  "shared_memory_per_core": 228 * 1024, "shared_memory_per_block_optin": 227 * 1024,
}  # fmt: skip
_AMPERE = {
  "core_count": 108, "fpus_per_core": 64, "l2_cache_size": 40 * 2**20, "clock_rate_ghz": 1.41,
  "shared_memory_per_core": 164 * 1024, "shared_memory_per_block_optin": 163 * 1024,
}  # fmt: skip
_GENERATIONS = {"a100": (8, _AMPERE), "h100": (9, _HOPPER), "h200": (9, _HOPPER)}


def target_config(kind: str) -> str:
  """XLA's description (GpuTargetConfigProto, as text) of a GPU of `GPUS`."""
  chip, (capability, fields) = GPUS[kind], _GENERATIONS[kind]
  memory = {"memory_bandwidth": int(chip.memory_gbs * 1e9), "device_memory_size": int(chip.memory_gib / 0.9 * 2**30)}
  lines = "\n".join(f"  {name}: {value}" for name, value in (_COMMON | fields | memory).items())
  return (
    f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ major: {capability} }}\n}}\n"
    f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\ndevice_description_str: "{chip.device_kind}"\n'
  )


def topology_devices(name: str, slices: int = 1) -> list:
  """Devices of a topology, one per chip.

  Raises:
    ValueError: the compiler does not know the topology, or is not installed.
  """
  from jax.experimental import topologies

  if is_gpu(name):
    chips = topology_chips(name)
    hosts = max(1, chips // GPUS_PER_HOST)
    options = {"target_config": target_config(parse_topology(name)), "topology": f"1x{hosts}x{chips // hosts}"}
    return topologies.get_topology_desc(platform="cuda", **options).devices
  options: dict[str, Any] = {"chip_config_name": "megacore"} if parse_topology(name) == "v4" else {}
  if slices > 1:
    options["num_slices"] = slices
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:  # libtpu raises several types
    text = " ".join(str(error).split())[:300]
    raise ValueError(
      f"--topology {name}: libtpu refused this topology ({text}). Install libtpu, or choose a size that it knows."
    ) from None
