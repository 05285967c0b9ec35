"""The compiled programs of a stage."""

from collections.abc import Callable, Iterable, Mapping

import jax

from data.buckets import Bucket
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.step import Program, Programs


class StagePrograms:
  """The compiled programs of one stage. Waits for a program inside `paused`, so that step times do not include the wait."""

  def __init__(self, programs: Programs, splits: Mapping, compiler: AheadOfTime, beat: Callable, paused: Callable):
    self._programs, self._splits, self._compiler, self._beat, self._paused = programs, splits, compiler, beat, paused
    self._lowered = {}  # {bucket, or None for the update: (Program, future)}

  def prepare(self, buckets: Iterable[Bucket]) -> None:
    """Lowers and starts to compile the programs of these buckets in order, with the update after the first bucket."""
    for bucket in buckets:
      self._lower((bucket.resolution, bucket.num_frames), bucket.batch_size)
      self._lower(None, 0)

  def _lower(self, bucket, rows):
    if bucket not in self._lowered:
      program = self._programs.gradient(bucket, rows, self._splits[bucket]) if bucket else self._programs.update
      self._beat(f"lowering {program.name}", slow=True)
      self._lowered[bucket] = program, self._compiler.add(program.name, program.lower())
    return self._lowered[bucket]

  def gradient(self, bucket: tuple[str, int], rows: int) -> tuple[Program, jax.stages.Compiled]:
    """(`step.Program`, its executable) of a bucket. Lowers the program if `prepare` did not."""
    return self._finished(*self._lower(bucket, rows))

  def update(self) -> jax.stages.Compiled:
    """The executable of the update program."""
    return self._finished(*self._lower(None, 0))[1]

  def _finished(self, program, compiled):
    if not compiled.done():
      self._beat(f"waiting for the program {program.name}", slow=True, waits=True)
      with self._paused():
        compiled.result()
    return program, compiled.result()
