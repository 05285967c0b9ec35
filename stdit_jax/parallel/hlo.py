"""What a compiled program moves: bytes of each kind of collective and of memory, read from its text (HLO).

Loops count as often as they run: XLA's own cost analysis counts the body of a scan once. Sizes are those of one device.
"""

import collections
import dataclasses
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8"), 1), **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4), **dict.fromkeys(("s64", "u64", "f64"), 8),
}  # fmt: skip
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# Instructions that move nothing, or whose parts are counted where they are computed.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
  "partition-id", "replica-id", "opt-barrier", "iota",
}  # fmt: skip


@dataclasses.dataclass
class Collective:
  """One collective: kind, bytes of its result (of its operand, for reduce-scatter), how often it runs."""

  kind: str
  bytes: int
  times: int
  in_loop: bool


def shape_bytes(text):
  """Bytes of all array shapes in a piece of HLO text, such as '(f32[8,4]{1,0}, bf16[2])'."""
  total = 0
  for dtype, sides in _SHAPE.findall(text):
    size = _BYTES[dtype]
    for side in filter(None, sides.split(",")):
      size *= int(side)
    total += size
  return total


def computations(text):
  """{name: [(instruction, result type, opcode, rest of the line)]} of a module, and the name of its entry."""
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
  """How often a `while` runs: as the compiler notes it, else the largest whole number its condition compares with."""
  if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
    return int(match[1])
  condition = re.search(r"condition=%?([\w.\-]+)", rest)
  numbers = [
    int(m[1])
    for _, kind, opcode, text in found.get(condition[1], [])
    if opcode == "constant" and (m := re.match(r"(\d+)\)", text))
  ]
  return max(numbers, default=1)


def multiplicities(found, entry):
  """{computation: how often it runs}: the entry and what it loops over or calls; of fusions those with a collective inside."""
  times = collections.Counter()

  def visit(name, n):
    times[name] += n
    for _, _, opcode, rest in found.get(name, []):
      if opcode == "while":
        visit(re.search(r"body=%?([\w.\-]+)", rest)[1], n * _trips(rest, found))
      elif opcode in ("call", "async-start", "fusion") and (called := re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", rest)):
        inside = found.get(called[1], [])
        if opcode != "fusion" or any(_kind(opcode) for _, _, opcode, _ in inside):
          visit(called[1], n)

  visit(entry, 1)
  return times


def _kind(opcode):
  """Which collective an instruction is or starts, or None."""
  opcode = opcode.removesuffix("-start")
  return opcode if opcode in COLLECTIVES else None


def collectives(text):
  """All `Collective`s of a module's text."""
  found, entry = computations(text)
  result, seen = [], set()
  for name, times in multiplicities(found, entry).items():
    sizes = {instruction: kind for instruction, kind, _, _ in found[name]}
    for _, kind, opcode, rest in found[name]:
      if not (base := _kind(opcode)):
        continue
      # One that overlaps with computation stands in several fusions, which start it, wait for it and end it.
      channel = re.search(r"channel_id=(\d+)", rest)
      if base == "all-gather" and channel:
        if channel[1] in seen:
          continue
        seen.add(channel[1])
      operands = [sizes[o] for o in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]) if o in sizes]
      moved = sum(map(shape_bytes, operands))
      if base == "all-gather":  # the result; a start gives operand and result
        moved = shape_bytes(kind) - (moved if opcode.endswith("-start") else 0)
      if name.startswith("all-reduce-scatter"):  # how the TPU's compiler writes it
        base = "reduce-scatter"
      result.append(Collective(base, moved, times, times > 1))
  return result


def memory_bytes(text):
  """Bytes that all instructions read and write: an estimate of memory traffic from above, since operands of a fusion that are
  read in part, or updated in place, count whole."""
  found, entry = computations(text)
  total = 0
  for name, times in multiplicities(found, entry).items():
    sizes = {instruction: shape_bytes(kind) for instruction, kind, _, _ in found[name]}
    for instruction, _, opcode, rest in found[name]:
      if opcode in _FREE or opcode.endswith(("-done", "-start")):
        continue
      operands = [sizes[o] for o in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]) if o in sizes]
      if "dynamic-update-slice" in instruction:  # in place: what is written is the smaller operands
        total += times * 2 * sum(b for b in operands if b < sizes[instruction])
      elif "dynamic-slice" in instruction or opcode == "dynamic-slice":
        total += times * 2 * sizes[instruction]
      else:
        total += times * (sizes[instruction] + sum(operands))
  return total
