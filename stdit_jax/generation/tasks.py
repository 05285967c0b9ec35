"""Named tasks: which frames the model is given in which loops, and how its clips become one video.

  animate IMAGE                   the image is the first frame
  extend-forward VIDEO            the clip starts with the last frames of the video; result: the video and its continuation
  extend-backward VIDEO           the clip ends with the first frames of the video; result: a new beginning and the video
  connect VIDEO VIDEO             the clip leads from the end of one video to the start of the other; result: video, clip, video
  interpolate IMAGE IMAGE ...     the images, evenly spaced from the first to the last frame
  loop [IMAGE]                    a clip (starting with the image), and a second clip from its end back to its beginning
  edit VIDEO                      the video again, denoised from the noise level --edit-strength
  endless [IMAGE or VIDEO]        --loops clips; each starts with the last frames of the previous clip
  image                           one frame

--condition-frames says how many frames of a video or clip are given. A task becomes rules of `conditions`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stdit_jax.generation.conditions import Rule

FILES = {
  "animate": (1, 1), "extend-forward": (1, 1), "extend-backward": (1, 1), "connect": (2, 2), "interpolate": (2, math.inf),
  "loop": (0, 1), "edit": (1, 1), "endless": (0, 1), "image": (0, 0),
}  # fmt: skip
ONE_FRAME = ("image",)  # tasks that make an image
WHOLE_FILE = ("edit",)  # tasks that make as many frames as their file has
GOES_ON = ("animate", "extend-forward", "endless")  # tasks that --loops makes longer


@dataclasses.dataclass(frozen=True)
class Job:
  """The recipe of one video. References are numbered: first the files, then the clip of each loop."""

  rules: tuple[Rule, ...]  # of all loops
  loops: int  # number of clips, made one after the other
  # (reference, first latent frame, latent frame after the last; None = to the end), joined in order to the video
  pieces: tuple[tuple[int, int, int | None], ...]


def check_files(task: str, count: int) -> None:
  """Raises ValueError if a task is unknown or does not take `count` files."""
  if task not in FILES:
    raise ValueError(f"--task {task!r} is none of {', '.join(FILES)}")
  least, most = FILES[task]
  if not least <= count <= most:
    allowed = f"{least}" if least == most else f"{least} or more" if most == math.inf else f"{least} or {most}"
    raise ValueError(f"--task {task} takes {allowed} files after its name; {count} are given")


def check_length(task: str | None, loops: int, num_frames: int, wanted: int | None, autoencoder: Any) -> None:
  """Raises ValueError unless the last latent frames of a clip cover the same numbers of frames as its first ones.

  Otherwise the last ones cannot start another clip, and the first ones cannot end one. An autoencoder that works in chunks
  (Open-Sora 1.2's) needs whole chunks. CogVideoX's autoencoder needs clips whose first frame has no latent frame of its own.

  Args:
    task: None without a task; wanted: --condition-frames, None for the default; autoencoder: its configuration.
  """
  # In other tasks no clip starts with the last latent frames of another clip, or ends with the first ones of a clip or video.
  if task not in ("extend-backward", "connect", "loop") and not (loops > 1 and task in (None, *GOES_ON)):
    return

  def joins(frames, wanted):  # whether clips of `frames` frames can share so many latent frames
    count, of_each = autoencoder.latent_frames(frames), np.diff(autoencoder.frame_starts(frames))
    length = default_length(count, autoencoder.group, task) if wanted is None else wanted
    given = length * (2 if task in ("connect", "loop") else 1)
    return autoencoder.keeps(frames) and length >= 1 and given < count and (of_each[:length] == of_each[-length:]).all()

  if len(set(np.diff(autoencoder.frame_starts(num_frames)))) == 1 or joins(num_frames, wanted):
    return
  what = f"--task {task}" if task and task not in GOES_ON else "--loops"
  if joins(num_frames, None):
    lengths = [str(n) for n in range(1, autoencoder.latent_frames(num_frames)) if joins(num_frames, n)]
    raise ValueError(
      f"--condition-frames is {wanted}; for {what} the given latent frames must be whole chunks, and some must be left to "
      f"generate. Allowed: {', '.join(lengths)}"
    )
  near = sorted(filter(lambda n: joins(n, None), range(1, 2 * num_frames + 100)), key=lambda n: abs(n - num_frames))[:2]
  raise ValueError(
    f"--num-frames is {num_frames}; for {what} the last latent frames of a clip must cover as many frames as its first ones, "
    f"and some must be left to generate. Give {' or '.join(map(str, sorted(near)))}"
  )


def default_length(frames: int, group: int = 1, name: str | None = None) -> int:
  """Default number of given latent frames in a clip of `frames` latent frames.

  The number is 4 as in Open-Sora 1.1, but at most a quarter of the clip, the largest share in training (`frame_masks`). It is
  rounded up to whole groups of the autoencoder, as in Open-Sora 1.2 (groups of 5). --task loop gets half as many, since both
  ends of its second clip are given.
  """
  return -(-max(1, min(4, frames // (8 if name == "loop" else 4))) // group) * group


def condition_length(wanted: int | None, frames: int, group: int = 1, task: str | None = None) -> int:
  """Number of given latent frames in a clip of `frames`: `wanted`, or the default. Raises ValueError if all are given."""
  length = default_length(frames, group, task) if wanted is None else wanted
  if wanted is None and length >= frames:
    raise ValueError(f"--num-frames is too small: {length} of the clip's {frames} latent frames are given. Give more frames")
  if not 1 <= length < frames:
    raise ValueError(f"--condition-frames is {length}; allowed: 1 to {frames - 1}, one less than the clip has")
  return length


def go_on(first: int, loops: int, files: int, length: int, edit: float = 0.0) -> tuple[Rule, ...]:
  """Rules that let every clip from loop `first` on start with the last `length` latent frames of the previous clip."""
  return tuple(Rule(loop, files + loop - 1, -length, 0, length, edit) for loop in range(first, loops))


def clips(files: int, loops: int, length: int) -> tuple[tuple[int, int, int | None], ...]:
  """Pieces: the whole first clip, and the later clips without their given frames."""
  return tuple((files + loop, length if loop else 0, None) for loop in range(loops))


def of_strategy(rules: Sequence[Rule], files: int, loops: int, length: int, edit: float = 0.0) -> Job:
  """The job of a mask strategy. Later clips continue the previous clip, as in the original code."""
  return Job((*rules, *go_on(1, loops, files, length, edit)), loops, clips(files, loops, length))


def make_job(
  name: str, frames: int, file_frames: Sequence[int], *, loops: int = 1, length: int | None = None, strength: float = 0.6,
  edit: float = 0.0, group: int = 1,
) -> Job:  # fmt: skip
  """The job of a named task.

  Args:
    frames: latent frames of a clip; file_frames: latent frames of each file.
    loops: clips to make, for tasks in GOES_ON; length: given latent frames (`condition_length`).
    strength: noise level of `edit`, above 0 and at most 1; edit: edit ratio of frames from the previous clip.
    group: latent frames that the autoencoder makes together.

  Raises ValueError if the task is unknown, takes another number of files, or leaves no frame to generate.
  """
  check_files(name, len(file_frames))
  if loops > 1 and name not in GOES_ON:
    raise ValueError(f"--loops is not for --task {name}; allowed: {', '.join(GOES_ON)}, or no task. Leave --loops out")
  files = len(file_frames)
  if name in ("animate", "image"):
    if name == "animate" and frames < 2:
      raise ValueError("--num-frames is too small for --task animate: the image is the whole clip. Give more frames")
    first = () if name == "image" else (Rule(0, 0, 0, 0, 1),)
    return of_strategy(first, files, loops, condition_length(length, frames, group) if loops > 1 else 0, edit)
  if name == "interpolate":
    places = np.linspace(0, frames - 1, files).round().astype(int).tolist()
    if len(set(places)) < files or files >= frames:
      raise ValueError(f"--task interpolate: {files} images leave nothing to generate of {frames} frames. Give fewer images")
    return Job(tuple(Rule(0, i, 0, place, 1) for i, place in enumerate(places)), 1, clips(files, 1, 0))
  if name == "edit":
    if not 0 < strength <= 1:
      raise ValueError(f"--edit-strength is {strength:g}; allowed: above 0, at most 1")
    return Job((Rule(0, 0, 0, 0, file_frames[0], strength),), 1, clips(files, 1, 0))

  length = condition_length(length, frames, group, name)
  given = [min(length, n) for n in file_frames]
  if name == "loop":
    if frames < 3:
      raise ValueError("--num-frames is too small for --task loop: a clip needs three latent frames. Give more frames")
    if 2 * length >= frames:
      raise ValueError(f"--condition-frames is {length}; allowed with --task loop: 1 to {(frames - 1) // 2}")
    first = (Rule(0, 0, 0, 0, 1),) if files else ()
    back = (Rule(1, files, -length, 0, length), Rule(1, files, 0, -length, length))
    return Job((*first, *back), 2, ((files, 0, None), (files + 1, length, frames - length)))
  if name == "extend-backward":
    return Job((Rule(0, 0, 0, -given[0], given[0]),), 1, ((1, 0, frames - given[0]), (0, 0, None)))
  if name == "connect":
    if sum(given) >= frames:
      raise ValueError(f"--condition-frames is {length}; two videos leave nothing to generate of {frames} frames. Give fewer")
    rules = Rule(0, 0, -given[0], 0, given[0]), Rule(0, 1, 0, -given[1], given[1])
    return Job(rules, 1, ((0, 0, None), (2, given[0], frames - given[1]), (1, 0, None)))
  # extend-forward, and endless
  if not files:
    return of_strategy((), 0, loops, length, edit)
  rules = Rule(0, 0, -given[0], 0, given[0]), *go_on(1, loops, files, length, edit)
  return Job(rules, loops, ((0, 0, None), *((files + loop, length if loop else given[0], None) for loop in range(loops))))
