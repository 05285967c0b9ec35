"""A run: shards, keys, resumption after kills and a full disk; several machines; errors."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import ClassVar

import polars as pl
import pytest

from data import paths
from data.prepare import __main__ as main
from data.prepare import chain, collect, selection, steps, workers
from data.prepare import config as configs
from tests.data.prepare.runs import CONFIG, config_file, pictures, table, times, unopened


def test_a_second_run_changes_nothing(videos, undisturbed, capsys):
  rows = table(undisturbed)
  assert rows.height == 10
  assert rows["error"].null_count() == 10
  assert sorted(rows["num_frames"]) == [30, 31, 32, 33, 34, *[40] * 5]
  assert rows["id"].n_unique() == 10
  before = times(undisturbed)
  command = ["--config", config_file(undisturbed.parent, videos)]
  assert main.main(["run", *command]) == 0
  assert times(undisturbed) == before
  assert main.main(["status", *command]) == 0
  assert re.search(r"cut +3/3 +10 +0 +0", capsys.readouterr().out)


def test_two_machines_make_the_same_table_as_one(videos, tmp_path, undisturbed):
  config = config_file(tmp_path, videos)
  command = [sys.executable, "-m", "data.prepare", "run", "--config", config, "--workers", "1"]
  other = subprocess.Popen([*command, "--shard", "1/2"], stdout=subprocess.PIPE, text=True)
  assert main.main([*command[3:], "--shard", "0/2"]) == 0
  assert other.wait(60) == 0
  assert table(tmp_path / "out").equals(table(undisturbed))


def test_machines_use_one_list(tmp_path):
  """Files that appear or change between their starts wait for the next run."""
  folder = unopened(tmp_path / "pictures")
  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "sample"), patience=0.0,
    collect=dict(sources=(str(folder),), rows_per_shard=1), sample=dict(rows=9),
  )  # fmt: skip
  run = lambda index: configs.chain(values, shard=(index, 2)).run()  # noqa: E731
  found = lambda step: [p[0] for p in table(tmp_path / "out", step).select("path").rows()]  # noqa: E731
  run(0)
  before = times(tmp_path / "out")
  (folder / "b.png").write_text("changed")
  (folder / "c.png").write_text("c")
  run(1)
  assert found("collect") == found("sample") == ["a.png", "b.png"]
  assert before.items() <= times(tmp_path / "out").items()
  run(1)
  assert found("collect") == ["a.png", "b.png", "c.png"]
  assert found("sample") == ["a.png", "b.png"]
  before = times(tmp_path / "out" / "collect")
  (folder / "d.png").write_text("d")
  run(0)
  assert found("collect") == found("sample") == ["a.png", "b.png", "c.png"]
  assert {name for name, when in times(tmp_path / "out" / "collect").items() if before[name] != when} == {"listed-0.json"}
  run(0)
  assert found("collect") == ["a.png", "b.png", "c.png", "d.png"]
  os.rename(folder, tmp_path / "not mounted")
  with pytest.raises(ValueError, match="is no folder"):
    run(1)


@dataclasses.dataclass(frozen=True)
class Meanwhile(steps.Step):
  """Changes nothing. `events` happen while it works."""

  title: ClassVar[str] = "meanwhile"
  events: ClassVar[list] = []

  def transform(self, table, context):
    while self.events:
      self.events.pop()()
    return table


def test_a_machine_repeats_its_shards_after_another_machine_listed_changes(tmp_path, capsys):
  """While machine 0 works, machine 1 lists a changed and a new file in shards of machine 0."""
  folder = unopened(tmp_path / "pictures")
  made = {"collect": collect.Collect(sources=(str(folder),), rows_per_shard=1), "meanwhile": Meanwhile()}
  machine = lambda index: chain.Chain(  # noqa: E731
    str(tmp_path / "out"), {**made, "sample": selection.Sample(rows=9)}, shard=(index, 2), patience=1.0
  )
  machine(1).run("meanwhile")

  def other():
    (folder / "a.png").write_text("changed")
    (folder / "c.png").write_text("c")
    machine(1).run("meanwhile")

  Meanwhile.events.append(other)
  machine(0).run()
  said = "meanwhile: 2 shards of this machine are missing or out of date: meanwhile another machine listed"
  assert said in capsys.readouterr().out
  machine(1).run()
  assert table(tmp_path / "out", "sample").select("path", "bytes").rows() == [("a.png", 7), ("b.png", 1), ("c.png", 1)]


def test_ray_makes_the_same_table_as_one_machine(videos, tmp_path, undisturbed):
  """Two nodes of a real Ray cluster on this machine."""
  cluster_utils = pytest.importorskip("ray.cluster_utils")
  import ray

  cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
  try:
    cluster.add_node(num_cpus=1)
    command = ["run", "--config", config_file(tmp_path, videos), "--workers", "1", "--ray", cluster.address]
    command += ["--config.steps=('collect','probe','duplicates','scenes','cut','caption')"]
    command += ["--config.caption={'backend':'existing','name':True}"]
    assert main.main([*command, "--config.collect.rows_per_shard=3"]) == 0  # two shards: one for each node
    assert len([n for n in ray.nodes() if n["Alive"]]) == 2
  finally:
    ray.shutdown()
    cluster.shutdown()
  assert table(tmp_path / "out").equals(table(undisturbed))
  assert table(tmp_path / "out", "caption")["text"].to_list() == [str(i) for i in range(5) for _ in range(2)]


def test_the_cluster_makes_steps_that_read_files_or_send_requests(tmp_path):
  asked = []

  def cluster(jobs, workers_each):
    for job in jobs:
      asked.append(job[0].title)
      with workers.Pool(workers_each) as job[-1].pool:
        yield job[-1].part, steps.run_shard(*job)

  values = dict(
    output=str(tmp_path / "out"), steps=("collect", "probe", "caption", "clean", "split"), workers=1,
    collect=dict(sources=(str(pictures(tmp_path / "pictures", "a")),)), caption=dict(backend="existing", name=True),
  )  # fmt: skip
  made = configs.chain(values)
  made.cluster = cluster
  made.run()
  assert asked == ["probe", "caption"]
  assert table(tmp_path / "out", "split")["text"].to_list() == ["A"]


def test_a_run_that_is_killed_three_times_finishes(videos, tmp_path, undisturbed):
  """In three steps and three ways. The workers end with the run, and the last run finishes."""
  command = [sys.executable, "-m", "data.prepare", "run", "--config", config_file(tmp_path, videos)]
  kills = ("probe/part-*", signal.SIGKILL), ("scenes/part-*", signal.SIGINT), ("cut/clips-*/*/*.mp4", signal.SIGTERM)
  for made, how in kills:
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list((tmp_path / "out").glob(made)):
      time.sleep(0.01)
    os.kill(run.pid, how)
    assert "Traceback" not in run.communicate()[1]
    assert run.returncode in (-how, 130)
    while time.monotonic() < deadline and _group(run.pid):
      time.sleep(0.05)
    assert not _group(run.pid)
  assert main.main(command[3:]) == 0
  assert table(tmp_path / "out").equals(table(undisturbed))


def _group(leader):
  """Living processes of a process group."""
  found = []
  for name in os.listdir("/proc"):
    if name.isdecimal():
      try:
        with open(f"/proc/{name}/stat") as f:
          fields = f.read().rpartition(")")[2].split()
      except OSError:
        continue
      if int(fields[2]) == leader and fields[0] not in "ZX":
        found.append(int(name))
  return found


def test_full_disk_ends_the_run_and_the_next_one_finishes(videos, tmp_path, undisturbed):
  """A limit on file sizes simulates the full disk: the kernel refuses the write in the same way."""
  command = [sys.executable, "-m", "data.prepare", "run", "--config", config_file(tmp_path, videos)]
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # noqa: E731
  run = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
  assert run.returncode == 2
  assert run.stderr.startswith("error: ")
  assert "File too large" in run.stderr
  assert not list((tmp_path / "out").rglob("*.tmp*"))
  assert main.main(command[3:]) == 0
  assert table(tmp_path / "out").equals(table(undisturbed))


@dataclasses.dataclass(frozen=True)
class Fussy(steps.RowStep):
  """Fails, once or for ever, for some of the files."""

  title: ClassVar[str] = "fussy"
  needs: ClassVar[tuple[str, ...]] = ("path",)

  bad: str = ""

  def rows(self, group, context, report):
    if group[0]["path"][-5] in self.bad:
      raise workers.Passing("not now")
    return [{}]


def test_two_steps_with_one_title_count_their_own_failures(tmp_path, capsys):
  folder = pictures(tmp_path / "pictures", "abc")
  made = {"collect": collect.Collect(sources=(str(folder),)), "one": Fussy(bad="a"), "two": Fussy(bad="bc")}
  chained = chain.Chain(str(tmp_path / "out"), made, workers=1)
  chained.run()
  printed = capsys.readouterr().out
  for line in ("one: 3 rows, .*1 failed, 1 of them are tried again", "two: 3 rows, .*2 failed, 2 of them are tried again"):
    assert re.search(line, printed)
  assert [chained.counts(name).retry for name in made] == [0, 1, 2]
  assert table(tmp_path / "out", "two")["error"].to_list() == ["fussy: not now"] * 3


def test_unreadable_folders_are_named(tmp_path, monkeypatch, capsys):
  folder = pictures(tmp_path / "pictures", "a")
  pictures(folder / "mine", "b")
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("mine"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(paths.os, "scandir", refusing)
  collect.Collect(sources=(str(folder),)).list(str(tmp_path / "out"))
  assert f"collect: 1 folders below {folder} can't be read (no permission), such as {folder}/mine" in capsys.readouterr().out
  assert table(tmp_path, "out").height == 1


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--config.scenes.min_second=1", "scenes: there is no setting 'min_second', did you mean 'min_seconds'?"),
    ("--config.scenes.min_seconds=long", "scenes.min_seconds = 'long' is no float"),
    ("--config.scenes.detector=best", "scenes: detector = 'best'; allowed: adaptive, content, none"),
    ("--config.steps=('collect','scene')", "there is no step 'scene', did you mean 'scenes'?"),
    ("--config.steps=('probe',)", "steps = ('probe',) must begin with collect"),
    ("--config.collect.sources=('/nowhere',)", "'/nowhere' is no folder, pattern or table"),
    ("--config.limits={'second':1}", "limits: there is no setting 'second', did you mean 'seconds'?"),
    ("--config.limits.seconds=2m", "limits.seconds = '2m' is no float"),
    ("--config.workers=two", "workers = 'two' is no number from 0 up"),
    ("--config.scenes=3", "scenes = 3 is no dict of settings"),
    ("--config.limits=3", "limits = 3 is no dict of settings"),
    ("--config.ouput=x", "there is no key 'ouput', did you mean 'output'?"),
    ("--config.steps=(1,2)", "steps = (1, 2) is no tuple of names"),
    ("--config.steps=5", "steps = 5 is no tuple of names"),
    ("--config.output=5", "output = 5 is no folder"),
    ("--config.collect.sources=(1,)", "collect.sources = (1,) is no tuple[str, ...]"),
    ("--config.limits.seconds=-5", "limits: seconds, bytes_per_second, memory_gb and max_pixels must be more than 0"),
    ("--config.cut.max_fps=-1", "cut: max_fps = -1 must be at least 0"),
    ("--shard=2/2", "--shard 2/2: give I/N"),
    ("stray", "unexpected argument 'stray'"),
  ],
)
def test_errors_are_one_line(videos, tmp_path, capsys, argument, message):
  assert main.main(["run", "--config", config_file(tmp_path, videos), argument]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("error: ")
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  ("step", "settings", "message"),
  [
    ("caption", dict(backend="local", model="/nowhere"), "mine: model = '/nowhere' is no folder with a transformers model"),
    ("caption", dict(backend="no.such:Module"), "mine: backend 'no.such:Module': no.such:Module can't be imported"),
    ("caption", dict(backend="existing", sidecar="txt"), "mine: sidecar = 'txt' is no ending"),
    (
      "caption",
      dict(url="http://x/v1", model="m", prompt="dens"),
      "mine: prompt = 'dens' is neither a text nor one of short, dense",
    ),
    ("scores", dict(scorers={"motion": None}), "mine: scorers.motion = None is no dict"),
    (
      "scores",
      dict(scorers={"a": {"scorer": "tests.data.prepare.test_scores:Mine", "b": 1}}),
      "mine: scorers.a: Mine() takes no",
    ),
    ("scores", dict(scorers={"a": {"scorer": "collections:Counter"}}), "mine: scorers.a: collections:Counter is no scorer"),
    ("split", dict(shares={"a/b": 1}), "mine: shares has 'a/b': only letters"),
    ("split", dict(shares={"a": "much"}), "mine: shares must be"),
    ("report", dict(training="/nowhere.py"), "no such file"),
    ("report", dict(training=__file__), "get_config"),
    ("export", dict(samples=0), "mine: samples = 0 must be at least 1"),
    ({}, {}, "there is no step {}"),
  ],
)
def test_errors_are_found_before_anything_runs(tmp_path, step, settings, message):
  values = dict(
    output=str(tmp_path), steps=("collect", "mine"), collect=dict(sources=("/v",)), mine=dict(step=step, **settings)
  )
  with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
    configs.chain(values)
  assert message in str(error.value)


def test_wrong_inputs_of_commands_are_refused(videos, tmp_path, capsys):
  pl.DataFrame({"path": ["a.mp4"], "error": ["x: y"]}).write_parquet(tmp_path / "t.parquet")
  (tmp_path / "other.py").write_text("def get_config():\n  return dict(model=dict(), autoencoder=dict())\n")
  mistakes = (
    (["run", "--config", str(tmp_path / "other.py")], "steps is missing: this is no config of data.prepare"),
    (["collect", str(videos), "-o", str(tmp_path / "o")], "collect begins a chain: use it in a config; `table FOLDER"),
    (["export", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "x.parquet")], "export may write several files: give"),
  )  # fmt: skip
  for command, message in mistakes:
    assert main.main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
  assert not (tmp_path / "x.parquet").exists()
  text = config_file(tmp_path, videos)
  command = ["run", "--config", text, "--config.steps=('collect','probe','scenes','export')", "--config.scenes.detector=none"]
  assert main.main([*command, "--config.scenes.min_seconds=5.0"]) == 2
  assert "export: no row without an error is left: scenes removed the last one, look at its settings" in capsys.readouterr().err
  for step, setting in (("scenes", "--min_seconds=2.0\n"), ("collect", "--rows_per_shard=200\n")):
    with pytest.raises(SystemExit):
      main.main([step, "--help"])
    assert setting in capsys.readouterr().out


@pytest.mark.parametrize("command", [["run", "--config=c.py", "--shrad=0/2"], ["table", "a", "-o", "b.csv", "--foo"], ["runn"]])
def test_a_mistyped_flag_or_command_is_one_line(tmp_path, capsys, monkeypatch, command):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "c.py").write_text("def get_config():\n  return dict(output='o', steps=('collect',))\n")
  try:
    code = main.main(command)
  except SystemExit as stop:  # of argparse
    code = stop.code
  error = capsys.readouterr().err
  assert code == 2
  assert command[-1] in error
  assert error.startswith("error: ")
  assert error.count("\n") == 1


def test_one_step_alone(videos, tmp_path, undisturbed, capsys):
  source, target = undisturbed / "duplicates", tmp_path / "scenes"
  assert main.main(["scenes", str(source), "-o", str(target), "--min_seconds=1.0", "--workers", "1"]) == 0
  assert "scenes: 10 rows of 5" in capsys.readouterr().out
  made = pl.concat([pl.read_parquet(p) for p in sorted(target.glob("*.parquet"))])
  assert made.equals(pl.concat([pl.read_parquet(p) for p in sorted((undisturbed / "scenes").glob("*.parquet"))]))
  (tmp_path / "mine.parquet").write_bytes((videos / "0.mp4").read_bytes())
  pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "mine.parquet")
  assert main.main(["scenes", str(source / "part-00000.parquet"), "-o", str(tmp_path / "mine.parquet")]) == 2
  assert "was not written by this program" in capsys.readouterr().err


def test_steps_are_found_by_name():
  for title in configs.STEPS:
    if title in ("collect", "probe", "duplicates", "scenes", "cut", "crops"):
      assert issubclass(configs.step_class(title), steps.Step)


def test_a_bucket_is_a_folder(videos, tmp_path, undisturbed, store):
  """Sources, steps and clips in gs://, over a stand-in for Cloud Storage."""
  for name in ("0.mp4", "1.mp4"):
    with paths.whole(f"gs://clips/raw/{name}") as temporary:
      shutil.copy(videos / name, temporary)
  file = config_file(tmp_path, "gs://clips/raw")
  assert main.main(["run", "--config", file, "--config.output=gs://clips/run"]) == 0
  parts = [f"gs://clips/run/cut/{name}" for name in paths.names("gs://clips/run/cut") if name.startswith("part-")]
  tables = []
  for part in parts:
    with paths.local_copy(part) as copy:
      tables.append(pl.read_parquet(copy))
  found = pl.concat(tables)
  columns = ["start", "num_frames", "height", "id", "bytes", "error"]
  assert found.select(columns).equals(table(undisturbed).select(columns).head(4))
  assert all(path.startswith("gs://clips/run/cut/clips-") and paths.exists(path) for path in found["path"])


def test_clips_of_a_relative_output_are_found_from_any_folder(videos, tmp_path, monkeypatch):
  """A later export with fewer rows also deletes the archives that it does not write again."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  text = CONFIG.format(output="runs/my", sources=str(videos)).replace(
    '"duplicates", "scenes", "cut"', '"scenes", "cut", "filter", "export"'
  )
  text = text.replace("duplicates=dict(pictures=False)", 'filter={}, export=dict(formats=("table", "webdataset"), samples=4)')
  (tmp_path / "config.py").write_text(text)
  command = ["run", "--config", str(tmp_path / "config.py")]
  assert main.main([*command, "--config.filter.where=('num_frames > 0',)"]) == 0
  folder = tmp_path / "here" / "runs" / "my"
  assert sorted(p.name for p in (folder / "webdataset").iterdir()) == [f"train-00000{i}.tar" for i in range(3)]
  found = pl.read_parquet(folder / "table.parquet")["path"].to_list()
  assert len(found) == 10
  assert all((folder / path).is_file() for path in found)  # paths are relative to the table's folder, as the loader reads them
  assert main.main([*command, "--config.filter.where=('num_frames == 40',)"]) == 0
  assert sorted(p.name for p in (folder / "webdataset").iterdir()) == [f"train-00000{i}.tar" for i in range(2)]


def test_rows_with_different_crops_of_one_file_are_kept(videos, tmp_path, capsys):
  rows = [{"path": str(videos / "0.mp4"), "text": "a", "crop": crop} for crop in (None, "0,0,36,36", "8,0,36,36", "8,0,36,36")]
  pl.DataFrame(rows).write_parquet(tmp_path / "crops.parquet")
  assert main.main(["table", str(tmp_path / "crops.parquet"), "-o", str(tmp_path / "t.parquet"), "--workers", "1"]) == 0
  assert pl.read_parquet(tmp_path / "t.parquet")["crop"].to_list() == [None, "0,0,36,36", "8,0,36,36"]
  assert "collect: 1 rows are skipped: the same path, crop as an earlier row" in capsys.readouterr().out


def test_a_step_alone_prints_its_failures(tmp_path, capsys):
  rows = [{"path": f"/nowhere/{i}.mp4", "num_frames": 9, "height": 48, "width": 64} for i in range(4)]
  pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
  alone = lambda step: main.main([step, str(tmp_path / "t.parquet"), "-o", str(tmp_path / "o.parquet"), "--workers=1"])  # noqa: E731
  assert alone("scores") == 0
  printed = capsys.readouterr().out
  assert "scores: 4 rows of 4" in printed
  assert ", 4 failed, 4 of them are tried again by the next run\n  /nowhere/0.mp4: scores: no such file\n" in printed
  assert printed.count("/nowhere/") == 3
  for step, column in (("scenes", "fps"), ("crops", "id")):
    assert alone(step) == 2
    assert f"{step} needs the column {column}, which" in capsys.readouterr().err


def test_a_folder_in_a_bucket_costs_one_request(tmp_path, store, monkeypatch):
  for name in ("a", "b"):
    paths.write_text(f"gs://clips/listed/{name}.mp4", name)
  step = collect.Collect(sources=("gs://clips/listed",))
  monkeypatch.setattr(paths, "state_of", None)  # would fail if called for each file
  step.list(str(tmp_path / "out"))
  found = pl.read_parquet(tmp_path / "out" / "part-00000.parquet")
  assert found.select("path", "bytes").rows() == [("gs://clips/listed/a.mp4", 1), ("gs://clips/listed/b.mp4", 1)]
  assert found["changed"].to_list() == [int(paths.stat(path)[1]) for path in found["path"]]
