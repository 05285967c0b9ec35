"""Prompts for captioners, for the purposes of Open-Sora's `tools/caption` and of CogVideoX's dense captions.

Open-Sora asks for short and for detailed captions, of several frames in order, and with an existing text.
"""

from __future__ import annotations

import re

_CREATE = "Write so that someone who never saw it could film or draw it again."
_PLAIN = "Answer with the description alone: no introduction, no list, no guess about what is not visible."

PROMPTS = {
  "short": f"Describe this {{what}} in one sentence of at most 25 words. {_PLAIN}",
  "dense": (
    "Describe this {what} in detail, in at most six sentences: the subjects and what they look like, what they do and in which "
    f"order, the place, light and colours, the style of the picture. {_CREATE} {_PLAIN}"
  ),
  "camera": (
    "Describe this {what} in at most six sentences: subjects, what they do, place, light, style. End with one sentence about "
    f"the camera: distance, angle, and whether it stands still, pans, tilts, zooms or follows. {_CREATE} {_PLAIN}"
  ),
  "text": (
    "Describe this {what} in at most six sentences. It came with the text: \"{text}\". Use of that what the pictures confirm, "
    f"names above all. {_CREATE} {_PLAIN}"
  ),
  # CogVideoX's six negative tags, for a second step with into = "tags" and a filter such as "tags not like '%lecture%'".
  "tags": (
    "Which of these words fit this {what}? editing (heavily edited, with effects or collages), static (no coherent motion, "
    "like a slide show), lecture (one person talks, little moves), text (text is most of the picture), screenshot (a "
    "recorded screen), low quality (blurred, shaky, noisy). Answer with one line: 'These words fit:' and the words, or "
    "'These words fit: none'."
  ),
  "frame": f"Describe everything in this picture: subjects, actions, surroundings, colours, light. {_PLAIN}",
  "summary": (
    "A video was described as a whole: \"{short}\". Its pictures, in order of time, were described so:\n{frames}\n"
    "Write one description of the video as it goes on, in at most 100 English words, with what changes from picture to "
    f"picture. Do not speak of pictures or frames. {_PLAIN}"
  ),
}  # fmt: skip


def what(count: int, grid: bool) -> str:
  """The words for {what}, if a captioner gets `count` frames."""
  if count == 1:
    return "picture"
  return "video, of which you see pictures in order of time" + (", row by row in a grid," if grid else "")


def fill(template: str, **values: str) -> str:
  """The template with {name} replaced for the given names only: values and prompts may contain other braces."""
  return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)
