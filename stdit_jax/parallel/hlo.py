"""Counts bytes from the text (HLO) of a compiled program: sent by each kind of collective, read and written in memory.

The body of a loop counts as often as it runs; XLA's own cost analysis counts it once. Sizes are those of one device.
"""

import collections
import dataclasses
import math
import re

COLLECTIVES: tuple[str, ...] = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8"), 1), **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4), **dict.fromkeys(("s64", "u64", "f64"), 8),
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# Instructions that move nothing, or that run computations whose instructions count separately.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
  "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective."""

  kind: str  # one of COLLECTIVES
  bytes: int  # size of the result. For a reduce-scatter: size of the operand
  times: int  # how often it runs
  in_loop: bool  # whether it is in the body of a loop


def shape_bytes(text: str, main_memory: bool = False) -> int:
  """Bytes of all array shapes in a piece of HLO text, such as '(f32[8,4]{1,0}, bf16[2])'.

  With `main_memory`, arrays in on-chip memory (memory spaces S(1) and up) do not count.
  """
  counted = ((dtype, sides) for dtype, sides, layout in _SHAPE.findall(text) if not (main_memory and "S(" in layout))
  return sum(_BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side) for dtype, sides in counted)


def computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str | None]:
  """Computations of HLO text: ({computation: [(instruction, result type, opcode, rest of the line)]}, name of the entry)."""
  found, entry, current = {}, None, None
  for line in text.splitlines():
    header = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line) if not line.startswith(" ") else None
    if header and "->" in line:
      current = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(match.groups())
  return found, entry


def _trips(rest, found):
  """How often a `while` runs: the compiler's note, or else the largest integer in its condition."""
  if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
    return int(match[1])
  constants = [text for _, _, opcode, text in found.get(_called(rest, "condition"), []) if opcode == "constant"]
  return max((int(match[1]) for text in constants if (match := re.match(r"(\d+)\)", text))), default=1)


def multiplicities(found: dict[str, list], entry: str | None) -> tuple[collections.Counter, set[str]]:
  """({computation: how often it runs}, set of the computations that are fusions).

  The computations are the entry, the bodies of its loops, the ones it calls, and fusions with a collective inside.
  """
  times, fused = collections.Counter(), set()

  def visit(name, n):
    times[name] += n
    for _, _, opcode, rest in found.get(name, []):
      if opcode == "while":
        visit(_called(rest, "body"), n * _trips(rest, found))
      elif opcode in ("call", "async-start", "fusion") and (called := _called(rest)):
        if opcode != "fusion":
          visit(called, n)
        elif any(_kind(opcode) for _, _, opcode, _ in found.get(called, [])):
          fused.add(called)
          visit(called, n)

  visit(entry, 1)
  return times, fused


def _called(rest, key="to_apply|calls"):
  """Name of the computation that an instruction calls (or uses as its body or condition), or ""."""
  match = re.search(rf"\b(?:{key})=%?([\w.\-]+)", rest)
  return match[1] if match else ""


def _operands(rest):
  """Names of an instruction's operands, in order."""
  return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _kind(opcode):
  """The kind of collective that an instruction is or starts, or None."""
  opcode = opcode.removesuffix("-start")
  return opcode if opcode in COLLECTIVES else None


def _instructions(text):
  """Yields (computation, how often it runs, its {instruction: result type}, result type, opcode, rest) of each instruction."""
  found, entry = computations(text)
  for name, times in multiplicities(found, entry)[0].items():
    types = {instruction: kind for instruction, kind, _, _ in found[name]}
    for _, kind, opcode, rest in found[name]:
      yield name, times, types, kind, opcode, rest


def collectives(text: str) -> list[Collective]:
  """The collectives in HLO text. Traffic between TPU slices is not among them (`slice_bytes`)."""
  result, seen = [], set()
  for name, times, types, kind, opcode, rest in _instructions(text):
    if not (base := _kind(opcode)):
      continue
    # A collective that overlaps with computation appears in several fusions: its start, its wait and its end.
    channel = re.search(r"channel_id=(\d+)", rest)
    if base == "all-gather" and channel:
      if channel[1] in seen:
        continue
      seen.add(channel[1])
    moved = sum(shape_bytes(types[o]) for o in _operands(rest) if o in types)
    if base == "all-gather":  # its result; a start has the operand in its result, too
      moved = shape_bytes(kind) - (moved if opcode.endswith("-start") else 0)
    if name.startswith("all-reduce-scatter"):  # the TPU compiler's name for a fused reduce-scatter
      base = "reduce-scatter"
    result.append(Collective(base, moved, times, times > 1))
  return result


def slice_bytes(text: str) -> int:
  """Bytes that a device sends to other slices.

  The TPU compiler reduces within a slice first. Hosts then exchange the rest by `send` instructions of type `megascale`.
  """
  return sum(
    times * shape_bytes(types[_operands(rest)[0]])
    for _, times, types, _, opcode, rest in _instructions(text)
    if opcode == "send" and "_xla_megascale_transfer_type" in rest
  )


def memory_bytes(text: str) -> int:
  """Bytes of main memory that all instructions read and write, if each reads its operands and writes its result once.

  An array in on-chip memory counts once, for the copy from main memory. A fusion that takes a slice of an operand reads only
  the slice, as each layer of a scan does with stacked parameters. A fusion that updates a slice in place writes the slice only.
  """
  found, entry = computations(text)
  times, fused = multiplicities(found, entry)
  total = 0
  for name in times.keys() - fused:
    types = {instruction: kind for instruction, kind, _, _ in found[name]}
    for _, kind, opcode, rest in found[name]:
      if opcode not in _FREE and (not opcode.endswith(("-done", "-start")) or opcode == "copy-start"):
        total += times[name] * _traffic(found, types, kind, opcode, rest)
  return total


def _traffic(found, types, kind, opcode, rest):
  """Bytes that one instruction reads and writes. `types` are the result types in its computation."""
  operands = [types.get(o, "") for o in _operands(rest)]
  sizes = [shape_bytes(o, main_memory=True) for o in operands]
  written = shape_bytes(kind, main_memory=True)
  if opcode == "copy-start":  # (target, source, context)
    return written
  if opcode in ("dynamic-slice", "slice", "gather"):
    return written + min(shape_bytes(kind), sizes[0])
  if opcode == "dynamic-update-slice":
    return 2 * shape_bytes(operands[1])
  if opcode == "fusion" and (body := found.get(_called(rest))):
    return min(written, _writes(found, body)) + sum(min(n, _reads(found, body, i)) for i, n in enumerate(sizes) if n)
  return written + sum(sizes)


def _reads(found, body, index):
  """Bytes that a fused computation reads of its parameter `index`."""
  name = next((n for n, _, opcode, rest in body if opcode == "parameter" and rest.startswith(f"{index})")), None)
  return _uses(found, body, name) if name else 0


def _uses(found, body, name):
  """Bytes that the instructions of a fused computation read of the value `name`."""
  whole = shape_bytes(next(kind for n, kind, _, _ in body if n == name))
  total = 0
  for user, kind, opcode, rest in body:
    for i, operand in enumerate(_operands(rest)):
      # A dynamic-update-slice changes its first operand in place, without reading it.
      if operand != name or opcode == "parameter" or (opcode == "dynamic-update-slice" and i == 0):
        continue
      if opcode in ("dynamic-slice", "slice"):
        total += shape_bytes(kind)
      elif opcode in ("bitcast", "get-tuple-element"):
        total += _uses(found, body, user)
      elif opcode == "fusion" and (inner := found.get(_called(rest))):
        total += _reads(found, inner, i)
      else:
        total += whole
  return min(total, whole)


def _writes(found, body, name=None):
  """Bytes that a fused computation writes for its value `name`, by default its result. An update in place writes the update."""
  types = {n: kind for n, kind, _, _ in body}
  name, kind, opcode, rest = next(i for i in body if i[0] == name) if name else body[-1]
  if opcode == "dynamic-update-slice":
    return shape_bytes(types[_operands(rest)[1]])
  if opcode in ("bitcast", "tuple"):
    return sum(_writes(found, body, operand) for operand in _operands(rest))
  if opcode == "fusion" and (inner := found.get(_called(rest))):
    return _writes(found, inner)
  return shape_bytes(kind)
