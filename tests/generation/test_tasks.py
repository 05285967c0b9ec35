"""Named tasks: the frames that they give to the model, and the video that they make of its clips."""

import pytest

from stdit_jax.generation import conditions, tasks

FRAMES = 12


def masks(job, files):
  """One text per loop with one letter per frame: "." = generated, "A" = from reference 0, "a" = edited from reference 0."""
  lines, lengths = [], list(files)
  for loop in range(job.loops):
    placement = conditions.place(job.rules, loop, FRAMES, lengths)
    lines.append(
      "".join(
        "." if r == conditions.NOISE else ("ABCDEF"[r] if ratio == 0 else "abcdef"[r])
        for r, ratio in zip(placement.reference, placement.ratio)
      )
    )
    lengths.append(FRAMES)
  return lines


def length_of(job, files):
  """Frames of the video that a job makes."""
  lengths = [*files, *[FRAMES] * job.loops]
  return sum(len(range(lengths[r])[first:stop]) for r, first, stop in job.pieces)


@pytest.mark.parametrize(
  ("task", "files", "options", "expected", "frames"),
  [
    ("animate", [1], {}, ["A..........."], 12),
    ("animate", [1], {"loops": 2}, ["A...........", "BBB........."], 21),
    ("extend-forward", [30], {}, ["AAA........."], 39),
    ("extend-forward", [2], {"length": 4, "loops": 2}, ["AA..........", "BBBB........"], 2 + 10 + 8),
    ("extend-backward", [30], {"length": 4}, ["........AAAA"], 38),
    ("connect", [30, 20], {"length": 4}, ["AAAA....BBBB"], 54),
    ("connect", [1, 20], {"length": 4}, ["A.......BBBB"], 28),
    ("interpolate", [1, 1, 1], {}, ["A.....B....C"], 12),
    ("loop", [], {}, ["............", "A..........A"], 22),
    ("loop", [1], {"length": 2}, ["A...........", "BB........BB"], 20),
    ("edit", [12], {"strength": 0.4}, ["aaaaaaaaaaaa"], 12),
    ("edit", [5], {}, ["aaaaa......."], 12),
    ("endless", [], {"loops": 3}, ["............", "AAA.........", "BBB........."], 30),
    ("endless", [30], {"loops": 2, "edit": 0.2}, ["AAA.........", "bbb........."], 48),
    ("image", [], {}, ["............"], 12),
  ],
)
def test_given_frames_and_length_of_the_video(task, files, options, expected, frames):
  job = tasks.make_job(task, FRAMES, files, **options)
  assert masks(job, files) == expected
  assert length_of(job, files) == frames


@pytest.mark.parametrize(
  ("task", "files", "options", "words"),
  [
    ("anmate", [1], {}, "--task 'anmate' is none of animate, extend-forward"),
    ("animate", [], {}, "--task animate takes 1 files after its name; 0 are given"),
    ("interpolate", [1], {}, "takes 2 or more files"),
    ("loop", [1, 1], {}, "takes 0 or 1 files"),
    ("edit", [9], {"strength": 0.0}, "--edit-strength is 0; allowed: above 0"),
    ("edit", [9], {"loops": 2}, "--loops is not for --task edit; allowed: animate, extend-forward, endless, or no task"),
    ("extend-forward", [30], {"length": 12}, "--condition-frames is 12; allowed: 1 to 11"),
    ("loop", [], {"length": 6}, "allowed with --task loop: 1 to 5"),
    ("connect", [30, 30], {"length": 6}, "leave nothing to generate"),
    ("interpolate", [1] * 12, {}, "12 images leave nothing to generate of 12 frames"),
  ],
)
def test_wrong_jobs_are_refused(task, files, options, words):
  with pytest.raises(ValueError, match=r"^--") as error:
    tasks.make_job(task, FRAMES, files, **options)
  assert words in str(error.value)
