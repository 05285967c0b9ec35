"""Accelerators: their published peaks, and TPU devices to compile against without having one."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one TPU chip.

  Attributes: device_kind: how JAX calls it; tflops: bfloat16 TFLOP/s; memory_gbs: GB/s; interconnect_gbits: Gbit/s of all links
  together; memory_gib: what the compiler (libtpu 0.0.52) lets a program use.
  """

  device_kind: str
  tflops: float
  memory_gbs: float
  interconnect_gbits: float
  memory_gib: float


CHIPS = {
  "v4": Chip("TPU v4", 275, 1228, 2400, 30.75),
  "v5e": Chip("TPU v5 lite", 197, 819, 1600, 15.75),
  "v5p": Chip("TPU v5", 459, 2765, 4800, 95.73),
  "v6e": Chip("TPU v6 lite", 918, 1640, 3584, 31.24),
}


def peak_tflops(device_kind):
  """bfloat16 TFLOP/s of a device by JAX's name for it, None where it is not known."""
  if "H100" in device_kind:
    return 989  # published, without sparsity
  return next((chip.tflops for chip in CHIPS.values() if device_kind == chip.device_kind), None)


# With these in its environment a process can compile by libtpu where there is no TPU.
TPU_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def parse_topology(name):
  """'v5e:16x16' -> kind; ValueError with what is allowed."""
  match = re.fullmatch(r"(\w+):\d+x\d+(?:x\d+)?", name)
  if not match or match[1] not in CHIPS:
    raise ValueError(
      f"--topology {name!r} is none: give KIND:AxB or KIND:AxBxC, KIND one of {', '.join(CHIPS)}, as in v5e:16x16"
    )
  return match[1]


def topology_devices(name, slices=1):
  """Devices of a TPU topology, one per chip; ValueError when the compiler does not know it or is not installed."""
  from jax.experimental import topologies

  options = {"chip_config_name": "megacore"} if parse_topology(name) == "v4" else {}
  if slices > 1:
    options["num_slices"] = slices
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:  # whatever libtpu raises
    text = " ".join(str(error).split())[:300]
    raise ValueError(
      f"--topology {name}: libtpu can't make it ({text}); pip install libtpu, and see its list of sizes"
    ) from None
