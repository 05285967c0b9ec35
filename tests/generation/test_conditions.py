"""Mask strategies and the syntax of prompts, compared with the original code."""

import json

import numpy as np
import pytest

from data.captions import append_scores, clean_caption
from stdit_jax.generation import conditions
from stdit_jax.generation.prompts import read_prompt_file, split_json, split_loops
from tests.helpers import load_json

TABLES = {"open-sora-1.1": "masks_v11.json", "open-sora-1.2": "masks_v12.json"}


def cases(compat):
  table = load_json(TABLES[compat])["mask_strategy"]
  for row in table["rows"]:
    for case in row.get("applied") or [{"loop": 0, "error": "parse"}]:
      yield row["strategy"], case, table


def drawn(placement):
  """The placement in the form of the tables."""
  pairs = zip(placement.reference.tolist(), placement.frame.tolist())
  return placement.ratio.tolist(), [None if r == conditions.NOISE else [r, f] for r, f in pairs]


@pytest.mark.parametrize("compat", TABLES)
def test_placements_match_the_original(compat, monkeypatch):
  """A strategy that fails in the original for one loop is refused here for all loops."""
  count = refused = 0
  for strategy, case, table in cases(compat):
    count += 1
    monkeypatch.setattr(conditions, "GROUP", 5 if case.get("align") else 1)  # the original moves positions only with `align`
    try:
      rules = conditions.parse_mask_strategy(strategy)
      made = conditions.place(rules, case["loop"], table["z_frames"], table["reference_frames"], compat)
    except ValueError:
      errors = [c for s, c, _ in cases(compat) if s == strategy and "error" in c]
      assert errors, strategy
      refused += 1
    else:
      if strategy == "" and "error" in case:
        continue  # in 1.1 only None means "no strategy"; here "" does, too
      assert drawn(made) == (case["mask"], case["frame_from_reference"]), (strategy, case)
  assert count > 80
  assert refused > 10


def test_default_placements_do_not_move_positions():
  rules = conditions.parse_mask_strategy("0;0,1,0,-1,4;0,1,1,2,3,1.0;0,1,-2,5,2,0.3")
  made = conditions.place(rules, 0, 15, [1, 6])
  assert made.ratio[14] == 0  # the last frame; Open-Sora 1.2 moves it to frame 10
  assert drawn(made)[1] == [[0, 0], *[None] * 4, [1, 4], [1, 5], *[None] * 7, [1, 0]]
  np.testing.assert_allclose(made.ratio, [0, *[1] * 4, 0.3, 0.3, *[1] * 7, 0])
  assert conditions.explain(made, 2) == [
    "frame       0  reference 0, frame 0: kept",
    "frames     1-4  generated from noise",
    "frames     5-6  reference 1, frames 4-5: denoised from noise level 0.3",
    "frames    7-13  generated from noise",
    "frame      14  reference 1, frame 0: kept",
  ]
  assert conditions.explain(made, 1)[-1] == "frame      14  clip of loop 0, frame 0: kept"


@pytest.mark.parametrize(
  ("strategy", "words"),
  [
    ("0,2", "there are 2 references"),
    ("0,0,-10,0,2", "reference 0 has 6 frames, -6 to 5"),
    ("0,0,0,8", "the clip has 8 frames"),
    ("0,0,0,0,1,1.5", "an edit ratio from 0 to 1"),
    ("0,,1", "'0,,1' is not LOOP"),
    ("0,0,0,0,1,0,0", "is not LOOP"),
    ("0;", "'' is not LOOP"),
    ("0,0,0,0,-1", "negative ones only for frame positions"),
  ],
)
def test_wrong_strategies_are_refused(strategy, words):
  with pytest.raises(ValueError, match="mask strategy") as error:
    conditions.place(conditions.parse_mask_strategy(strategy), 0, 8, [6, 5])
  assert words in str(error.value)


def test_prompts_with_json_match_the_original():
  for row in load_json("prompt_helpers.json")["extract_json_from_prompts"]:
    if "error" in row:
      with pytest.raises(ValueError, match="prompt"):
        split_json(row["prompt"])
    else:
      text, values = split_json(row["prompt"])
      found = text, values.get("reference_path", ""), values.get("mask_strategy", "")
      assert found == (row["text"], row["reference_path"], row["mask_strategy"])


def test_prompt_files_keep_files_and_strategies(tmp_path):
  """Lines, tables and JSON lines: `split_json` reads the files and the strategy from each prompt."""
  given = {"reference_path": "a.png;b.mp4", "mask_strategy": "0;0,1,-1,-1"}
  (tmp_path / "a.txt").write_text("one\n\n two \n")
  assert read_prompt_file(tmp_path / "a.txt") == ["one", "two"]
  # Excel's byte order mark, and U+2028, which does not end a line here.
  (tmp_path / "bom.txt").write_text("\ufeff|0|one\u2028two|1|three\r\n", encoding="utf-8")
  assert read_prompt_file(tmp_path / "bom.txt") == ["|0|one\u2028two|1|three"]
  (tmp_path / "bom.csv").write_text("\ufeffprompt\r\ncolumns\r\n", encoding="utf-8")
  assert read_prompt_file(tmp_path / "bom.csv") == ["columns"]
  (tmp_path / "line.jsonl").write_text('{"prompt": "one\u2028two"}\n', encoding="utf-8")
  assert read_prompt_file(tmp_path / "line.jsonl") == ["one\u2028two"]
  (tmp_path / "a.csv").write_text('text,reference_path,mask_strategy\ncolumns,a.png;b.mp4,"0;0,1,-1,-1"\n"a, b",,\n')
  (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "columns", **given}) + "\n\n" + json.dumps({"text": "a, b"}))
  for name in ("a.csv", "a.jsonl"):
    assert [split_json(prompt) for prompt in read_prompt_file(tmp_path / name)] == [("columns", given), ("a, b", {})]
  for name, text, words in (
    ("b.csv", "caption\nx\n", "row 1 has no text under `prompt`"),
    ("b.jsonl", '{"prompt": "x"}\n{', "line 2 is no JSON"),
    ("c.jsonl", "[1]", "row 1 has no text"),
  ):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="--prompt-file") as error:
      read_prompt_file(tmp_path / name)
    assert words in str(error.value)


def test_prompts_of_loops_match_the_original():
  helpers = load_json("prompt_helpers.json")
  for row in helpers["extract_prompts_loop"]:
    assert split_loops(row["prompt"], row["loop"] + 1)[-1] == row["result"]
  for row in load_json("masks_v11.json")["process_prompts"]:
    for prompt, result in zip(row["prompts"], row["result"]):
      assert [clean_caption(text) for text in split_loops(prompt, row["num_loop"])] == result
  with pytest.raises(ValueError, match="must ascend"):
    split_loops("|0|a|2|b|1|c", 3)
  for row in helpers["append_score_to_prompts"]:
    assert [append_scores(prompt, **row["args"]) for prompt in row["prompts"]] == row["result"]
