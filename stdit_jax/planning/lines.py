"""The lines that `plan` prints for its results."""

from collections.abc import Sequence
from typing import Any

from stdit_jax.planning import budget
from stdit_jax.planning.programs import GIB

COLUMNS = (
  ("stage", 10), ("bucket", 12), ("batch", 7), ("each", 5), ("parts", 5), ("tokens", 8), ("compile", 8), ("GiB", 13),
  ("activations", 11), ("TFLOP", 9), ("GB moved", 9), ("compute", 8), ("memory", 8), ("links", 8), ("bound", 8), ("MFU", 5),
  ("rows/s", 7),
)  # fmt: skip


def line(values: Sequence[Any]) -> str:
  """A line of the table with the first columns."""
  return " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, COLUMNS))


def describe(result: dict[str, Any], bound: dict[str, Any] | None) -> str:
  """The line of the table for a result and its roofline, or the line for the program that encodes captions before the step."""
  if result["text"]:
    return _describe_text(result)
  values = [
    result["stage"], f"{result['resolution']} x {result['frames']}", result["batch"],
    f"{result['samples_per_part']}" + ("s" if result["split_tokens"] else ""), result["micro_batches"],
    result.get("tokens", ""), f"{result['compile_seconds']:.0f}s",
  ]  # fmt: skip
  if "oom" in result:
    return f"{line(values)}   does not fit: {result['oom']}"
  values.append(f"{result['peak'] / GIB:.1f} / {result['limit'] / GIB:.1f}" + ("" if result["fits"] else " !"))
  values.append(f"{result['activations'] / GIB:.1f}")
  if bound:
    seconds = [f"{bound[what]:.2f}s" for what in ("compute", "memory", "links")]
    moved = sum(result["collectives"].values()) / 1e9
    values += [f"{result['model_flops'] / 1e12:.0f}", f"{moved:.1f}", *seconds, bound["bound"], f"{bound['utilisation']:.0%}"]
    values.append(f"{(rate := budget.host_rate(result, bound['step'])):,.{int(rate < 10)}f}")
  return line(values)


def print_header() -> None:
  print("each: samples per device and micro batch, s: tokens are split; parts: micro batches; !: does not fit")
  print(line([name for name, _ in COLUMNS]), flush=True)


def _describe_text(result):
  bucket = f"{result['resolution']} x {result['frames']}, {result['batch']} rows"
  memory = f"does not fit: {result.get('oom')}"
  if "oom" not in result:
    memory = f"{result['peak'] / GIB:.1f} / {result['limit'] / GIB:.1f} GiB, {'fits' if result['fits'] else 'does not fit'}"
  return f"{result['stage']}: text encoder before the step ({bucket}): {memory}, compiled in {result['compile_seconds']:.0f}s"
