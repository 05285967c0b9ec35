"""What a second run makes again: changed settings, files, captions and tables; damaged files."""

import os
import shutil

import polars as pl
import pytest
from PIL import Image

from data import video
from data.prepare import __main__ as main
from data.prepare import config as configs
from data.prepare import shards
from tests.data.prepare.runs import config_file, pictures, table, times, unopened
from tests.data.prepare.videos import picture, two_scenes, write_video


def test_changed_settings_repeat_the_step_and_the_later_steps(videos, tmp_path, undisturbed, capsys):
  shutil.copytree(undisturbed, tmp_path / "out")
  before = times(tmp_path / "out")
  assert main.main(["run", "--config", config_file(tmp_path, videos), "--config.scenes.min_seconds=1.5"]) == 0
  changed = {name for name, when in times(tmp_path / "out").items() if before.get(name) != when}
  assert {name.split("/")[0] for name in changed} == {"scenes", "cut"}
  assert "scenes: 3 shards are made again (min_seconds: 1.0 -> 1.5)" in capsys.readouterr().out
  assert table(tmp_path / "out")["num_frames"].to_list() == [40] * 5


def test_status_shows_outdated_steps(tmp_path):
  """A step with changed settings or files is outdated, with all later steps."""
  folder = unopened(tmp_path / "pictures")
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "filter", "sample", "split", "export"),
    collect=dict(sources=(str(folder),), rows_per_shard=1), filter=dict(where=("bytes > 0",)), sample=dict(rows=9),
  )  # fmt: skip

  def status(values):
    lines = [line.split() for line in configs.chain(values).status().splitlines()]
    assert lines[0] == ["step", "shards", "rows", "failed", "to", "retry", "again", "left"]
    return {name: (shards, *(rest[3:4])) for name, shards, *rest in lines[1:-1]}

  nothing = dict.fromkeys(("collect", "filter", "sample", "split"), ("0/0", "0"))
  assert status(values) == {**nothing, "export": ("waiting",)}
  configs.chain(values).run()
  done = dict.fromkeys(nothing, ("2/2", "0"))
  assert status(values) == {**done, "export": ("done",)}
  again = dict.fromkeys(("filter", "sample", "split"), ("0/2", "2"))
  assert status({**values, "filter": dict(where=("bytes > 1",))}) == {**done, **again, "export": ("again",)}
  assert status({**values, "sample": dict(rows=8)}) == {**done, **again, "filter": ("2/2", "0"), "export": ("again",)}
  assert status({**values, "export": dict(name="mine.parquet")}) == {**done, "export": ("again",)}
  assert status({**values, "collect": dict(sources=(str(folder), str(tmp_path)))})["collect"] == ("0/2", "2")
  (folder / "b.png").write_text("changed")
  (folder / "c.png").write_text("c")
  configs.chain(values).run("collect")
  listed = {"collect": ("3/3", "0"), "filter": ("1/3", "1"), "sample": ("0/3", "2"), "split": ("0/3", "2")}
  assert status(values) == {**listed, "export": ("again",)}
  configs.chain(values).run()
  assert status(values) == {**dict.fromkeys(nothing, ("3/3", "0")), "export": ("done",)}


def test_new_files_make_new_shards(videos, tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in (1, 2, 3):
    os.link(videos / f"{i}.mp4", folder / f"{i}.mp4")
  command = ["run", "--config", config_file(tmp_path, folder)]
  assert main.main(command) == 0
  before = times(tmp_path / "out")
  os.link(videos / "0.mp4", folder / "0.mp4")
  assert main.main(command) == 0
  after = times(tmp_path / "out")
  assert all(
    after[name] == when for name, when in before.items() if name.split("/")[0] in ("collect", "probe", "scenes", "cut")
  )
  assert sorted(table(tmp_path / "out")["num_frames"]) == [30, 31, 32, 33, *[40] * 4]


def test_a_vanished_file_is_tried_again(videos, tmp_path, undisturbed, capsys):
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(5):
    os.link(videos / f"{i}.mp4", folder / f"{i}.mp4")
  command = ["run", "--config", config_file(tmp_path, folder)]
  assert main.main([*command, "--until", "collect"]) == 0
  os.rename(folder / "3.mp4", tmp_path / "away")
  assert main.main(command) == 0
  assert "1 failed, 1 of them are tried again by the next run" in capsys.readouterr().out
  failed = table(tmp_path / "out").filter(pl.col("error").is_not_null())
  assert failed["path"].to_list() == ["3.mp4"]
  assert "No such file" in failed["error"][0]
  os.rename(tmp_path / "away", folder / "3.mp4")
  assert main.main(command) == 0
  assert table(tmp_path / "out").drop("video").equals(table(undisturbed).drop("video"))


def test_changed_captions_beside_videos_are_read_again(tmp_path, capsys):
  """The later steps also run again, for the changed shards only."""
  folder = tmp_path / "pictures"
  folder.mkdir()
  for name in ("a", "b", "c"):
    Image.fromarray(picture(ord(name), 0)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"This is {name}.")
  (folder / "c.txt").unlink()
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "probe", "caption", "clean"), workers=1,
    collect=dict(sources=(str(folder),), rows_per_shard=1), probe=dict(picture_hash=False),
    caption=dict(backend="existing", sidecar=".txt", name=True),
  )  # fmt: skip
  configs.chain(values).run()
  assert table(tmp_path / "out", "clean")["text"].to_list() == ["This is a.", "This is b.", "C"]
  before = times(tmp_path / "out")
  (folder / "b.txt").write_text("This is another text.")
  (folder / "c.txt").write_text("This came later.")
  configs.chain(values).run()
  changed = {name for name, when in times(tmp_path / "out").items() if before.get(name) != when}
  assert changed == {f"{step}/part-0000{i}.parquet" for step in ("caption", "clean") for i in (1, 2)}
  assert table(tmp_path / "out", "clean")["text"].to_list() == ["This is a.", "This is another text.", "This came later."]
  alone = ["caption", str(tmp_path / "out" / "probe"), "-o", str(tmp_path / "alone"), "--backend=existing", "--sidecar=.txt"]
  for text in ("Once.", "Twice."):
    (folder / "a.txt").write_text(text)
    assert main.main([*alone, "--workers=1"]) == 0
    assert table(tmp_path, "alone")["text"][0] == text


@pytest.mark.parametrize("listed", [False, True])
def test_changed_sources_are_made_again(tmp_path, listed):
  """The source is a folder or a table. A file that was missing for a while repeats no work."""
  folder = tmp_path / "videos"
  folder.mkdir()
  for name in ("a", "b"):
    write_video(folder / f"{name}.mp4", two_scenes(20, 0, seeds=(ord(name),) * 2))
  pl.DataFrame({"path": ["videos/a.mp4", "videos/b.mp4"]}).write_csv(tmp_path / "list.csv")
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "probe", "scenes", "cut"), workers=1,
    collect=dict(sources=(str(tmp_path / "list.csv" if listed else folder),), rows_per_shard=1),
    probe=dict(picture_hash=False, content_hash=False), scenes=dict(detector="none", min_seconds=0.5), cut=dict(short_side=36),
  )  # fmt: skip
  configs.chain(values).run()
  before = times(tmp_path / "out")
  os.rename(folder / "a.mp4", tmp_path / "away")
  configs.chain(values).run()
  os.rename(tmp_path / "away", folder / "a.mp4")
  assert times(tmp_path / "out") == before
  write_video(folder / "b.mp4", two_scenes(25, 0, seeds=(9, 9)))
  configs.chain(values).run()
  parts = [name for name, when in times(tmp_path / "out").items() if before.get(name) != when and name.endswith("parquet")]
  assert sorted(parts) == [f"{step}/part-00001.parquet" for step in ("collect", "cut", "probe", "scenes")]
  cut = pl.concat([pl.read_parquet(p) for p in sorted((tmp_path / "out" / "cut").glob("part-*.parquet"))])
  assert [video.probe(path).num_frames for path in cut["path"]] == cut["num_frames"].to_list() == [20, 25]


def test_files_that_the_run_made_are_no_sources(tmp_path, capsys):
  """This also holds behind a symbolic link, and after the config drops the step that made the files.

  A source that the run did not make may lie in the output folder.
  """
  folder = tmp_path / "videos"
  folder.mkdir()
  write_video(folder / "a.mp4", two_scenes(20, 0))
  (tmp_path / "link").symlink_to(folder)
  values = dict(
    output=str(tmp_path / "link" / "out"), steps=("collect", "probe", "scenes", "cut"), workers=1,
    collect=dict(sources=(str(folder),)), scenes=dict(detector="none", min_seconds=0.5), cut=dict(pictures=True),
  )  # fmt: skip
  configs.chain(values).run()
  before = times(folder)
  assert len([name for name in before if name.endswith((".mp4", ".png"))]) == 3
  for steps_then in (values["steps"], ("collect", "probe")):
    capsys.readouterr()
    configs.chain({**values, "steps": steps_then}).run()
    assert f"collect: 2 files below {folder} are skipped: this run made them" in capsys.readouterr().out
    assert times(folder) == before
  shutil.rmtree(folder / "out")
  for output in (tmp_path, folder):  # the output contains the folder of sources, or is this folder
    configs.chain(dict(output=str(output), steps=("collect",), collect=dict(sources=(str(folder),)))).run()
    assert pl.read_parquet(output / "collect" / "part-00000.parquet")["path"].to_list() == [str(folder / "a.mp4")]


def test_a_damaged_shard_is_made_again(videos, tmp_path, undisturbed):
  shutil.copytree(undisturbed, tmp_path / "out")
  part = tmp_path / "out" / "scenes" / "part-00001.parquet"
  whole = part.read_bytes()
  part.write_bytes(whole[:200])
  assert main.main(["run", "--config", config_file(tmp_path, videos)]) == 0
  assert len(part.read_bytes()) > 200
  assert table(tmp_path / "out").equals(table(undisturbed))


def test_shards_stay_in_order_when_there_are_many(tmp_path):
  names = [shards.part_name(i) for i in (2, 99_999, 100_000)]
  for name in (*names, "part-x.parquet", ".part-00001.tmp1.parquet"):
    (tmp_path / name).touch()
  assert shards.parts(str(tmp_path)) == names
  assert [shards.part_number(name) for name in names] == [2, 99_999, 100_000]


def test_a_new_copy_does_not_repeat_other_shards(tmp_path):
  """A new copy changes the keys of all shards of `duplicates`. Later steps skip the shards whose rows stay the same."""
  folder = pictures(tmp_path / "pictures", "abc")
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "probe", "duplicates", "split", "filter"), workers=1,
    collect=dict(sources=(str(folder),), rows_per_shard=1), probe=dict(picture_hash=False),
  )  # fmt: skip
  configs.chain(values).run()
  before = times(tmp_path / "out")
  shutil.copy(folder / "b.png", folder / "z.png")
  configs.chain(values).run()
  assert table(tmp_path / "out", "split")["error"].is_not_null().to_list() == [False, False, False, True]
  after = times(tmp_path / "out")
  assert {name for name in before if after[name] != before[name]} == {f"duplicates/part-0000{i}.parquet" for i in range(3)}
  os.unlink(folder / "b.png")  # only the copy, z.png, is left
  values["collect"]["forget"] = True
  configs.chain(values).run()
  assert table(tmp_path / "out", "filter")["path"].to_list() == ["a.png", "c.png", "z.png"]


def test_machines_resume_after_a_folder_was_deleted(tmp_path):
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "probe", "split", "sample"), patience=0.0, workers=1,
    collect=dict(sources=(str(pictures(tmp_path / "pictures", "abcd")),), rows_per_shard=1), sample=dict(rows=9),
  )  # fmt: skip
  run = lambda index, until="split": configs.chain(values, shard=(index, 2)).run(until)  # noqa: E731
  run(0)
  run(1)
  shutil.rmtree(tmp_path / "out" / "probe")
  run(0)  # the other machine has its shards of `split`, but not those of `probe`
  run(1)
  run(0, None)
  run(1, None)
  assert table(tmp_path / "out", "sample").height == 4


def test_a_damaged_clip_is_made_again(videos, tmp_path, undisturbed):
  shutil.copytree(undisturbed, tmp_path / "out")
  damaged = sorted((tmp_path / "out" / "cut").rglob("*.mp4"))[0]
  damaged.write_bytes(b"")
  shutil.rmtree(tmp_path / "out" / "collect")  # the shards are made again, and existing clips are kept
  for path in (tmp_path / "out" / "cut").glob("part-*.parquet"):
    path.unlink()
  assert main.main(["run", "--config", config_file(tmp_path, videos)]) == 0
  assert damaged.stat().st_size > 100
  assert table(tmp_path / "out").equals(table(undisturbed))
