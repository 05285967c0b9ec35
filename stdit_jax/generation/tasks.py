"""Named tasks: which frames the model is given, in which loops, and how its clips become one video.

  animate IMAGE                   the image is the first frame
  extend-forward VIDEO            the clip begins with the video's last frames; the result is the video and what follows it
  extend-backward VIDEO           the clip ends with its first frames; the result is what comes before, and the video
  connect VIDEO VIDEO             the clip leads from the last frames of the one to the first of the other; all three are joined
  interpolate IMAGE IMAGE ...     the images, evenly spaced from the first to the last frame
  loop [IMAGE]                    a clip (that begins with the image), and a second one from its end back to its beginning
  edit VIDEO                      the video again, from the noise level --edit-strength on
  endless [IMAGE or VIDEO]        clip after clip (--loops), each from the last frames of the one before
  image                           one frame

Of videos and clips --condition-frames frames are given. All of it is made of the rules of `conditions.py`.
"""

import dataclasses
import math

import numpy as np

from stdit_jax.generation.conditions import Rule

FILES = {
  "animate": (1, 1), "extend-forward": (1, 1), "extend-backward": (1, 1), "connect": (2, 2), "interpolate": (2, math.inf),
  "loop": (0, 1), "edit": (1, 1), "endless": (0, 1), "image": (0, 0),
}  # fmt: skip
ONE_FRAME, WHOLE_FILE = ("image",), ("edit",)  # tasks that make an image, and as many frames as their file has
GOES_ON = ("animate", "extend-forward", "endless")  # tasks that --loops makes longer


@dataclasses.dataclass(frozen=True)
class Job:
  """What makes one video. References are numbered: first the files, then the clip of each loop.

  Attributes: rules: of all loops; loops: clips to make, one after the other; pieces: (reference, first frame, frame after the
  last, None = to its end) that make the video, in order.
  """

  rules: tuple
  loops: int
  pieces: tuple


def check_files(task, count):
  """Raises ValueError when a task is unknown or does not take so many files."""
  if task not in FILES:
    raise ValueError(f"--task {task!r} is none of {', '.join(FILES)}")
  least, most = FILES[task]
  if not least <= count <= most:
    allowed = f"{least}" if least == most else f"{least} or more" if most == math.inf else f"{least} or {most}"
    raise ValueError(f"--task {task} takes {allowed} files after its name; {count} are given")


def check_length(task, loops, num_frames, wanted, autoencoder):
  """Raises ValueError where the last latents of a clip are to be the first ones of another, or the other way round, and do not
  hold as many frames: of an autoencoder that makes chunks, Open-Sora 1.2's, only whole chunks do, and of CogVideoX's those of a
  clip whose first frame does not stand alone.

  Args:
    task: None without one; wanted: --condition-frames, None for the default; autoencoder: its configuration.
  """
  if task not in ("extend-backward", "connect", "loop") and not (loops > 1 and task in (None, *GOES_ON)):
    return

  def held(frames):
    return np.diff(autoencoder.frame_starts(frames))

  def joins(frames, wanted):
    count, of_each = autoencoder.latent_frames(frames), held(frames)
    length = default_length(count, autoencoder.group, task) if wanted is None else wanted
    given = length * (2 if task in ("connect", "loop") else 1)
    return autoencoder.keeps(frames) and length >= 1 and given < count and (of_each[:length] == of_each[-length:]).all()

  if len(set(held(num_frames))) == 1 or joins(num_frames, wanted):
    return
  what = f"--task {task}" if task and task not in GOES_ON else "--loops"
  if joins(num_frames, None):
    lengths = [str(n) for n in range(1, autoencoder.latent_frames(num_frames)) if joins(num_frames, n)]
    raise ValueError(f"--condition-frames is {wanted}; allowed for {what}, so that whole chunks meet: {', '.join(lengths)}")
  near = sorted(filter(lambda n: joins(n, None), range(1, 2 * num_frames + 100)), key=lambda n: abs(n - num_frames))[:2]
  raise ValueError(
    f"--num-frames is {num_frames}; for {what} the last latents of a clip must hold as many frames as its first ones, and some "
    f"be left to generate: {' or '.join(map(str, sorted(near)))}"
  )


def default_length(frames, group=1, name=None):
  """Latent frames of a clip of `frames` that are given of another one by default: 4 as in Open-Sora 1.1, of short clips a
  quarter, the most that training shows (`frame_masks`), and whole groups of the autoencoder, as in 1.2 (5). For a loop half as
  many: both ends are given, and all the way back has to fit between them."""
  return -(-max(1, min(4, frames // (8 if name == "loop" else 4))) // group) * group


def condition_length(wanted, frames, group=1, task=None):
  """Latent frames of a clip of `frames` that are given of another one: those wanted, or the default. ValueError when nothing is
  left to generate."""
  length = default_length(frames, group, task) if wanted is None else wanted
  if wanted is None and length >= frames:
    raise ValueError(f"--num-frames is too small: {length} of the clip's {frames} latent frames are given; more are needed")
  if not 1 <= length < frames:
    raise ValueError(f"--condition-frames is {length}; allowed: 1 to {frames - 1}, one less than the clip has")
  return length


def go_on(first, loops, files, length, edit=0.0):
  """Rules by which each clip from loop `first` on begins with the last `length` frames of the one before, as Open-Sora's."""
  return tuple(Rule(loop, files + loop - 1, -length, 0, length, edit) for loop in range(first, loops))


def clips(files, loops, length):
  """Pieces: the first clip, and the others without the frames that they were given."""
  return tuple((files + loop, length if loop else 0, None) for loop in range(loops))


def of_strategy(rules, files, loops, length, edit=0.0):
  """The job of a mask strategy, over loops as the original makes them."""
  return Job((*rules, *go_on(1, loops, files, length, edit)), loops, clips(files, loops, length))


def make_job(name, frames, file_frames, *, loops=1, length=None, strength=0.6, edit=0.0, group=1):
  """The job of a named task.

  Args:
    frames: latent frames of a clip; file_frames: those of each file.
    loops: clips, of tasks that go on; length: latent frames that clips are given of others (`condition_length`).
    group: latent frames that the autoencoder makes together.
    strength: of `edit`, the noise level to which the video is brought, above 0 to 1; edit: edit ratio of carried frames.

  Raises:
    ValueError: an unknown task, too many or too few files, values that leave nothing to generate.
  """
  check_files(name, len(file_frames))
  if loops > 1 and name not in GOES_ON:
    raise ValueError(f"--loops makes {', '.join(GOES_ON)} longer, or a prompt without a task; not {name}")
  files = len(file_frames)
  if name in ("animate", "image"):
    if name == "animate" and frames < 2:
      raise ValueError("--num-frames is too small for --task animate: the image is all of the clip")
    first = () if name == "image" else (Rule(0, 0, 0, 0, 1),)
    return of_strategy(first, files, loops, condition_length(length, frames, group) if loops > 1 else 0, edit)
  if name == "interpolate":
    places = np.linspace(0, frames - 1, files).round().astype(int).tolist()
    if len(set(places)) < files or files >= frames:
      raise ValueError(f"--task interpolate: {files} images leave nothing to generate of {frames} frames")
    return Job(tuple(Rule(0, i, 0, place, 1) for i, place in enumerate(places)), 1, clips(files, 1, 0))
  if name == "edit":
    if not 0 < strength <= 1:
      raise ValueError(f"--edit-strength is {strength:g}; allowed: above 0, at most 1")
    return Job((Rule(0, 0, 0, 0, file_frames[0], strength),), 1, clips(files, 1, 0))

  length = condition_length(length, frames, group, name)
  given = [min(length, n) for n in file_frames]
  if name == "loop":
    if frames < 3:
      raise ValueError("--num-frames is too small for --task loop: a clip needs three latent frames")
    if 2 * length >= frames:
      raise ValueError(f"--condition-frames is {length}; allowed with --task loop: 1 to {(frames - 1) // 2}")
    first = (Rule(0, 0, 0, 0, 1),) if files else ()
    back = (Rule(1, files, -length, 0, length), Rule(1, files, 0, -length, length))
    return Job((*first, *back), 2, ((files, 0, None), (files + 1, length, frames - length)))
  if name == "extend-backward":
    return Job((Rule(0, 0, 0, -given[0], given[0]),), 1, ((1, 0, frames - given[0]), (0, 0, None)))
  if name == "connect":
    if sum(given) >= frames:
      raise ValueError(f"--condition-frames is {length}; with two videos {frames} frames leave nothing to generate")
    rules = Rule(0, 0, -given[0], 0, given[0]), Rule(0, 1, 0, -given[1], given[1])
    return Job(rules, 1, ((0, 0, None), (2, given[0], frames - given[1]), (1, 0, None)))
  # extend-forward, and endless
  if not files:
    return of_strategy((), 0, loops, length, edit)
  rules = Rule(0, 0, -given[0], 0, given[0]), *go_on(1, loops, files, length, edit)
  return Job(rules, loops, ((0, 0, None), *((files + loop, length if loop else given[0], None) for loop in range(loops))))
