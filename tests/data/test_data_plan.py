"""The plan is a function of (seed, table, config), names what changed, and reports where rows went."""

import json

import numpy as np
import pytest

from data import buckets, plan, sources
from data.config import DataConfig
from data.shards import digest
from tests.data import files

BUCKETS = (("144p", 17, (0.8, 0.5), 3), ("144p", 9, 1.0, 4), ("240p", 9, 0.5, 2), ("144p", 1, 1.0, 5))
BASE = {"path": "a.mp4", "text": "x", "num_frames": 30, "height": 144, "width": 256}


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
  rng = np.random.default_rng(0)
  rows = []
  for i in range(300):
    h, w = [(144, 256), (256, 144), (240, 426), (60, 60)][rng.integers(4)]
    frames = int(rng.choice([1, 5, 12, 30]))
    rows.append({"path": f"{i}.mp4", "text": "x" if i % 50 else "", "num_frames": frames, "height": h, "width": w})
  return files.write_csv(tmp_path_factory.mktemp("plan") / "t.csv", rows)


def sequence_of(folder, path, **settings):
  config = DataConfig(**{"tables": (path,), "buckets": BUCKETS, **settings})
  config.validate()
  return plan.PlanSequence(sources.open_table(config, str(folder)), config, str(folder))


def test_a_plan_uses_only_the_chosen_aspect_ratios(tmp_path, table_path):
  found = {}
  for number in (None, 1):
    current = sequence_of(tmp_path, table_path, aspect_ratios=number).plan(0)
    slots = [current.slot(slot) for slot in range(current.num_slots)]
    found[number] = {(bucket.resolution, key) for _, key, bucket, _ in slots}
  assert found[None] == {("144p", "0.56"), ("144p", "1.78"), ("240p", "0.56")}
  assert found[1] == {("144p", "0.56"), ("240p", "0.56")}  # landscape alone


def test_every_row_is_in_its_bucket_once(tmp_path, table_path):
  sequence = sequence_of(tmp_path, table_path)
  table, config, parsed = sequence.table, sequence.config, sequence.config.parsed_buckets()
  for epoch in (0, 1):
    current, report = sequence.plan(epoch), sequence.report(epoch)
    columns = [table.column(k) for k in ("num_frames", "height", "width")]
    bucket, ratio, _, _ = buckets.assign(*columns, seed=(config.seed, epoch, 0), buckets=parsed, interval=1)
    bucket[table.column("problem") > 0] = -1
    seen = []
    for step in range(current.num_steps):
      begin, end = current.slots(step)
      assert end - begin == current.bucket(step).batch_size
      for slot in range(begin, end):
        row, key, b, at = current.slot(slot)
        assert at == step
        assert parsed.index(b) == bucket[row]
        assert key == list(plan.aspect_ratios.SIZES[b.resolution])[ratio[row]]
        seen.append(row)
      np.testing.assert_array_equal(current.rows(step), seen[-(end - begin) :])
    assert len(set(seen)) == len(seen) == current.num_slots
    # Every row is somewhere: in a step or among the dropped ones.
    assert len(seen) + sum(report.dropped.values()) == report.rows == 300
    assert report.dropped["caption is empty"] == 6
    assert report.steps == current.num_steps
    for line, b in zip(report.buckets, parsed):
      assert line["steps"] == (bucket == parsed.index(b)).sum() // b.batch_size
  assert [sequence.plan(0).bucket(s) for s in range(20)] != [sequence.plan(1).bucket(s) for s in range(20)]


def test_the_plan_is_a_function_of_seed_table_and_config(tmp_path, table_path):
  same = [sequence_of(tmp_path / n, table_path, workers=w).plan(2) for n, w in (("a", 0), ("b", 2))]
  slots = [np.asarray(p._slots) for p in same]
  np.testing.assert_array_equal(slots[0], slots[1])
  other = np.asarray(sequence_of(tmp_path / "a", table_path, seed=1).plan(2)._slots)
  assert len(other) != len(slots[0]) or (other != slots[0]).any()


def test_a_fixed_set_does_not_depend_on_batches_probabilities_and_other_buckets(tmp_path, table_path):
  def rows_of(buckets):
    plan_of = sequence_of(tmp_path, table_path, buckets=buckets, rows_per_bucket=20, drop_last=False).plan(0)
    steps = [s for s in range(plan_of.num_steps) if plan_of.bucket(s).num_frames == 9]
    slots = [plan_of.slot(slot)[:2] for s in steps for slot in range(*plan_of.slots(s))]
    return slots, set(slots)

  slots, rows = rows_of(BUCKETS[:2])
  assert len(slots) == len(rows) == 20  # five whole batches
  slots, again = rows_of((("240p", 1, 1.0, 4), ("144p", 9, 0.1, 7)))
  assert len(slots) == 21
  assert again == rows
  longer = rows_of((("144p", 17, 1.0, 4), ("144p", 9, 1.0, 4)))[1]
  assert longer == rows  # clips of 30 frames are in both


def test_locate_counts_over_epochs(tmp_path, table_path):
  sequence = sequence_of(tmp_path, table_path)
  steps = [sequence.plan(e).num_steps for e in range(4)]
  assert len(set(steps)) > 1  # keep probabilities make epochs differ
  want = [(e, i) for e in range(4) for i in range(steps[e])]
  assert [sequence.locate(s) for s in range(len(want))] == want
  fresh = sequence_of(tmp_path / "fresh", table_path)
  assert fresh.locate(len(want) - 1) == want[-1]
  sequence.prepare(6)
  assert sequence.plan(6).num_steps == fresh.plan(6).num_steps


def test_drop_last_false_repeats_rows(tmp_path, table_path):
  report = sequence_of(tmp_path, table_path, drop_last=False).report(0)
  for line in report.buckets:
    assert line["steps"] == -(-line["rows"] // line["batch_size"])
  assert "incomplete batch" not in report.dropped


def test_reference_devices_multiply(tmp_path, table_path):
  sequence = sequence_of(tmp_path, table_path, reference_devices=2)
  assert {b.batch_size for b in sequence.config.parsed_buckets()} == {6, 8, 4, 10}


def test_changed_keys(tmp_path, table_path):
  old = sequence_of(tmp_path, table_path).description
  assert plan.changed_keys(old, json.loads(json.dumps(old))) == []
  new = sequence_of(tmp_path, table_path, seed=7, frame_interval=2).description
  assert plan.changed_keys(old, new) == ["frame_interval: 1 -> 2", "seed: 42 -> 7"]
  assert digest(old) != digest(new)
  assert "num_classes" not in old  # so that runs without classes have the same digest as before
  labelled = files.write_csv(tmp_path / "labels.csv", [{**BASE, "label": 1}])
  two, three = (sequence_of(tmp_path, labelled, num_classes=n).description for n in (2, 3))
  assert plan.changed_keys(two, three) == ["num_classes: 2 -> 3", "tables[0].fingerprint (contents of the table)"]
  assert plan.changed_keys({**old, "version": 1}, old) == [
    "version: 1 -> 2 (another release, which assigns rows to buckets differently)"
  ]
  assert "stage" not in old  # a validation has one order in all releases
  one, two = (sequence_of(tmp_path, table_path, stage=name).description for name in ("one", "two"))
  assert plan.changed_keys(one, two) == ['stage: "one" -> "two"']
  assert plan.changed_keys(old, one) == ['stage: null -> "one" (an earlier release gave all stages one order)']
  fewer = tuple(b for b in BUCKETS if b[:2] != ("240p", 9))
  assert plan.changed_keys(old, sequence_of(tmp_path, table_path, buckets=fewer).description) == ["buckets: 240p x 9"]
  # Settings without influence on the plan do not change the description.
  assert sequence_of(tmp_path, table_path, workers=0, resize="original").description == old
  with open(table_path) as f:
    other = tmp_path / "other.csv"
    other.write_text(f.read() + "new.mp4,x,30,144,256\n")
  (change,) = plan.changed_keys(old, sequence_of(tmp_path, str(other)).description)
  assert change == "tables[0].fingerprint (contents of the table)"
  (change,) = plan.changed_keys(old, sequence_of(tmp_path, table_path, tables=((table_path, 2),)).description)
  assert change == "tables[0].weight"


def test_report_prints_a_table(tmp_path, table_path):
  text = str(sequence_of(tmp_path, table_path).report(0))
  assert "bucket" in text.splitlines()[0]
  assert any(line.split()[:3] == ["144p", "x", "9"] for line in text.splitlines())
  assert "too small" in text
  assert "keep probability" in text
  assert "caption is empty: first" in text


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (("1080p", 17, 1.0, 1), "294 too small.*; 1080p needs 1,658,880 pixels, the largest row has 102,240"),
    (("144p", 99, 1.0, 1), "too short.*shortest bucket has 99 frames, the longest row 30"),
    (("144p", 9, 1.0, 999), "6 caption is empty, 124 incomplete batch; lower batch_size"),
    (("144p", 9, 0.0, 1), "keep probability"),
  ],
)
def test_an_epoch_without_steps_is_an_error(tmp_path, table_path, rows, message):
  with pytest.raises(ValueError, match=message) as error:
    sequence_of(tmp_path, table_path, buckets=(rows,)).plan(0)
  assert "epoch 0 has no step" in str(error.value)
  assert "\n" not in str(error.value)
