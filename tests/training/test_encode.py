"""Precomputed latents and embeddings: training from them equals training from videos, and every shard is complete."""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data import latents, loader
from data.shards import Share
from stdit_jax import encode
from stdit_jax.autoencoders import registry
from stdit_jax.interop import save_variables
from stdit_jax.run_samples import Sampler
from stdit_jax.training import encoding, transition
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import make_stages
from tests.data import files
from tests.runs import Run
from tests.tiny_run import frozen_text, tiny_config, write_config


@pytest.fixture(scope="module")
def table(assets):
  """The table of the tiny run with a second caption in one row, scores, and an image that can't be decoded."""
  lines = (assets / "table.csv").read_text().splitlines()
  names = lines[0].split(",")
  rows = [dict(zip(names, line.split(","))) for line in lines[1:]]
  rows[0]["text_2"] = "columns that move"
  rows[1]["aes"] = 5.5
  rows.append({**rows[8], "path": "broken.png"})
  return files.write_csv(assets / "encode.csv", rows)


def settings(assets, table, **changes):
  frozen, buckets = frozen_text(assets, "ahead"), (("144p", 1, 1.0, 2), ("144p", 4, 1.0, 2))  # enough data for several shards
  same = {"data__tables": (table,), "data__buckets": buckets, "data__drop_last": False, "data__windows_per_row": 2}
  return {**frozen, **same, **changes}


def run(config, output, *more, share=(0, 1)):
  """Runs `python -m stdit_jax.encode` in this process."""
  argv = ["--config", str(config), "--output", str(output), "--shard-mb", "0.2", *map(str, more)]
  settings = encode.parse(argv)
  encode.check(settings)
  encode.run(settings, encode.choose(settings), Share(*share))


@pytest.fixture(scope="module")
def config(assets, table, tmp_path_factory):
  """The configuration file of a training."""
  folder = tmp_path_factory.mktemp("encode")
  return write_config(folder / "config.py", assets, folder / "run", **settings(assets, table))


@pytest.fixture(scope="module")
def folder(config):
  """Folder with all latents and embeddings of two epochs."""
  run(config, config.parent / "out", "--epochs", 2)
  return config.parent / "out"


def shards(folder):
  return {p.relative_to(folder): p.read_bytes() for p in pathlib.Path(folder).glob("*/part-*/[!.]*array_record*")}


def steps_of(run, count, stage):
  """The first loaded steps of a run that does not train."""
  with run.parts[stage].data.loader(0) as steps:
    return [loaded for loaded, _ in zip(steps, range(count))]


def test_cached_batches_equal_those_from_videos(assets, table, folder, tmp_path):
  """They have the same order and masked rows, also after the last encoded epoch, since all windows are encoded.

  Epoch 2 draws a caption that epochs 0 and 1 lack. Its row keeps an encoded caption.
  """
  nothing = {"data__latents": str(folder), "autoencoder__weights": "", "text_encoder__weights": ""}
  videos, cached = (
    Run(tiny_config(assets, tmp_path / str(len(own)), **{**settings(assets, table), **own})) for own in ({}, nothing)
  )
  weights, kept = same_batches(videos, cached, cached.parts[0].data._plans.first_step(3), encoded=2)
  assert set(weights) == {0, 1}
  assert kept == {"columns that move": "clip 0 of columns"}
  assert cached.encoders.clip_encoder is None
  with pytest.raises(ValueError, match=r"autoencoder\.weights is empty"):  # at the start, not at the first samples
    Sampler(cached)


def test_cached_latents_of_a_video_autoencoder_equal_those_from_videos(assets, table, tmp_path):
  """The latents have fewer frames than the clips."""
  name, frames = "tiny-causal3d", 9
  module, weights = registry.find(name), tmp_path / "autoencoder.safetensors"
  config = module.get_config(name)
  variables = module.init(module.build(config), jax.random.key(0))
  save_variables(weights, module.layouts[0], variables, config=config)
  own = {
    "autoencoder__name": name, "autoencoder__weights": str(weights), "model__fields__in_channels": config.latent_channels,
    "data__buckets": (("64p", frames, 1.0, 2), ("64p", 1, 1.0, 2)),
  }  # fmt: skip
  file = write_config(tmp_path / "config.py", assets, tmp_path / "run", **settings(assets, table, **own))
  run(file, tmp_path / "out", "--epochs", 2)
  videos, cached = (
    Run(tiny_config(assets, tmp_path / str(len(more)), **settings(assets, table, **own, **more)))
    for more in ({}, {"data__latents": str(tmp_path / "out")})
  )
  _, kept = same_batches(videos, cached, 6, encoded=2)
  assert not kept


def test_stages_with_a_common_cache_have_their_own_orders(assets, table, tmp_path):
  """Each bucket refuses half of its rows, other ones in each stage. So the stages need different clips."""
  own = {"data__buckets": (("64p", 1, 0.5, 2), ("64p", 4, 0.5, 2)), "data__windows_per_row": 0}
  own |= {"stages": ({"name": "first", "steps": 2}, {"name": "second", "steps": 2})}
  changes, out = settings(assets, table, **own), tmp_path / "out"
  file = write_config(tmp_path / "config.py", assets, tmp_path / "run", **changes)
  videos = Run(tiny_config(assets, tmp_path / "videos", **changes))
  changes["data__latents"] = str(out)
  run(file, out, "--epochs", 1, "--stage", "first")
  with pytest.raises(
    ValueError, match=r"stage 'second': .* lacks clips that the plan of epoch 0 asks for \(stage: \"first\" -> "
  ):
    Run(tiny_config(assets, tmp_path / "refused", **changes))
  run(file, out, "--epochs", 1)
  cached = Run(tiny_config(assets, tmp_path / "cached", **changes))
  for stage, parts in enumerate(cached.parts):
    assert parts.data.cache.epochs == 1
    _, kept = same_batches(videos, cached, parts.data.report.steps, encoded=1, stage=stage)
    assert not kept


def same_batches(videos, cached, count, encoded, stage=0):
  """Asserts that the first batches of two runs are equal, except that rows may keep the caption of an encoded epoch.

  Returns the weights of all samples, and {caption that is not encoded: caption that its row kept}.
  """
  batches, captions, kept = [], {}, {}
  condition, make, make_cached = videos.parts[stage].data._condition, videos.maker(stage), cached.maker(stage)
  for ours, theirs in zip(steps_of(videos, count, stage), steps_of(cached, count, stage), strict=True):
    assert (ours.bucket, ours.epoch) == (theirs.bucket, theirs.epoch)
    for a, b in zip(ours.samples, theirs.samples, strict=True):
      if ours.epoch < encoded:
        captions.setdefault(a.row, set()).add(a.caption)
      if a.caption != b.caption:
        assert a.caption not in set().union(*captions.values())
        assert b.caption in captions[a.row]
        kept[a.caption] = b.caption
        a.caption, a.cond = b.caption, condition(b.caption, a.label)
    batches.append([jax.tree.map(np.asarray, batch) for batch in (make(ours), make_cached(theirs))])
  weights = []
  for a, b in batches:
    a, b = transition.by_name(a), transition.by_name(b)
    assert a.keys() == b.keys()
    weights += b["weight"].tolist()
    for name in a:
      # Masked text tokens differ: the encoder gives features, the cache zeros. The model ignores both.
      x, y = (v[name] * (v["cond/text_mask"][..., None] if name == "cond/text" else 1) for v in (a, b))
      atol, rtol = {"cond/text": (5e-6, 0), "latents_std": (0, 5e-7)}.get(name, (0, 0))  # NumPy and XLA round exp differently
      np.testing.assert_allclose(y, x, atol=atol, rtol=rtol, err_msg=name)
  return weights, kept


def test_training_from_a_cache_has_the_losses_of_videos(assets, table, folder, tmp_path):
  """It uses one of the encoded buckets, with another batch size."""
  losses = []
  changes = settings(assets, table, data__buckets=(("144p", 4, 1.0, 3),), stages=({"name": "tiny", "steps": 3},))
  for name, own in (("videos", {}), ("cache", {"data__latents": str(folder)})):
    Run(tiny_config(assets, tmp_path / name, checkpoint_every=3, **changes, **own)).train()
    losses.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
  for a, b in zip(*losses, strict=True):
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6)
    np.testing.assert_allclose(b["gradient_norm"], a["gradient_norm"], rtol=1e-5)


def test_tfds_reads_the_shards_without_tensorflow(folder):
  (part,) = folder.glob("latents-*/part-0")
  source = tfds.builder_from_directory(part).as_data_source("train")
  keys = np.load(part / "keys.npy")
  assert len(source) == len(keys) == len(set(keys.tolist()))
  errors = 0
  for key, record in zip(keys, source, strict=True):
    fields = latents.unpack(key)
    assert (record["row"], record["num_frames"], record["window"]) == tuple(fields[k] for k in ("row", "num_frames", "window"))
    shape = (record["num_frames"], record["height"] // 8, record["width"] // 8, 4)
    assert record["mean"].shape == record["log_variance"].shape == shape
    errors += bool(record["error"])
    assert (record["error"] == b"") == (b"broken" not in record["path"])
  assert errors == 1
  (part,) = folder.glob("text-*/part-0")
  captions = {r["caption"]: r["embedding"] for r in tfds.builder_from_directory(part).as_data_source("train")}
  assert {b"picture 0", b"clip 2 of columns"} <= set(captions)
  assert captions[b"picture 0"].shape == (10, 64)  # bytes and the end token
  assert "tensorflow" not in sys.modules


def test_interrupted_and_shared_encoding_writes_the_same_shards(config, folder, tmp_path, monkeypatch):
  want, serialize, count = shards(folder), tfds.features.FeaturesDict.serialize_example, [0]
  assert len(want) > 4

  def breaks(self, record):
    count[0] += 1
    if count[0] == 9:
      raise KeyboardInterrupt
    return serialize(self, record)

  monkeypatch.setattr(tfds.features.FeaturesDict, "serialize_example", breaks)
  with pytest.raises(KeyboardInterrupt):
    run(config, tmp_path, "--epochs", 2)
  there = shards(tmp_path)
  assert 0 < len(there) < len(want)
  (part,) = tmp_path.glob("latents-*/part-0")
  assert not list(part.glob(".*"))
  left = next(name for name in want if name.parts[0].startswith("latents") and name not in there)
  stem, ending = left.name.split(".")
  for name in (f".{left.name}.1.tmp", f".{stem}.tmp1-0123abcd.{ending}"):  # of an older version, and of this one
    (tmp_path / left.parent / name).write_text("what a kill leaves")
  monkeypatch.undo()
  with pytest.raises(ValueError, match=r"part-0 is unfinished. Finish it with --stage tiny --epochs 2, or"):
    run(config, tmp_path, "--epochs", 1, "--no-text")
  for share in ((1, 2), (0, 2)):
    assert not (part / "dataset_info.json").exists()
    run(config, tmp_path, "--epochs", 2, share=share)
  assert shards(tmp_path) == want
  assert (part / "dataset_info.json").exists()
  assert not list(part.glob(".*"))
  dates = {path: path.stat().st_mtime_ns for path in part.iterdir()}
  run(config, tmp_path, "--epochs", 2)
  assert dates == {path: path.stat().st_mtime_ns for path in part.iterdir()}


def test_epochs_repeat_until_more_are_encoded(assets, table, tmp_path, caplog):
  """Without `windows_per_row` every epoch has its own windows."""
  changes = settings(assets, table, data__windows_per_row=0, data__buckets=(("144p", 4, 1.0, 2),))
  changes |= {"text_encoder__where": "disk"}  # this test does not use the text
  config = write_config(tmp_path / "c.py", assets, tmp_path / "run", **changes)
  run(config, tmp_path / "out", "--epochs", 1, "--dtype", "float16")
  (stage,) = make_stages(tiny_config(assets, tmp_path, **changes, data__latents=str(tmp_path / "out")))

  def samples():
    source = encoding.Source.open(stage, str(tmp_path / "out" / "data"))
    cache = make_objective(stage.config).open_cache(stage.config.data, source.plans.table)
    with loader.make_loader(source.data, str(tmp_path / "out" / "data"), epochs=2, cache=cache) as steps:
      found = [s for step in steps for s in step.samples]
    return [[s for s in found if s.sample_id[0] == source.data.sample_epoch(epoch)] for epoch in range(2)]

  first, again = samples()
  assert [s.row for s in first] == [s.row for s in again]
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a.latents_mean, b.latents_mean)
  assert [m for m in caplog.messages if "repeats epoch" in m] == [
    f"epoch 1 repeats epoch 0: {tmp_path / 'out'} lacks its own clips"
  ]
  run(config, tmp_path / "out", "--epochs", 2, "--dtype", "float16")
  assert len(list(tmp_path.glob("out/latents-*/part-*/dataset_info.json"))) == 2
  first, more = samples()
  assert [s.row for s in first] != [s.row for s in more]
  assert len([m for m in caplog.messages if "repeats epoch" in m]) == 1
  # With another batch size, the cache finds the epochs whose clips it has. The window of epoch 2048 is too large for a key.
  changes["data__buckets"] = (("144p", 4, 1.0, 3),)
  (stage,) = make_stages(tiny_config(assets, tmp_path, **changes, data__latents=str(tmp_path / "out")))
  source = encoding.Source.open(stage, str(tmp_path / "out" / "data"))
  cache = make_objective(stage.config).open_cache(stage.config.data, source.plans.table)
  assert cache.epochs == 0
  assert [cache.source(epoch, source.plans.plan) for epoch in (0, 1, 2, 5, 2048)] == [0, 1, 0, 1, 0]
  with pytest.raises(ValueError, match=r"has latents with other settings .*dtype.*; give another folder"):
    run(config, tmp_path / "out", "--epochs", 2)


def test_a_resumed_training_keeps_its_order(assets, tmp_path):
  """It ignores epochs that were encoded meanwhile, so no row of its epoch repeats or is missing. A new training uses them."""
  own = {"data__tables": (str(assets / "features.csv"),), "data__windows_per_row": 0, "data__buckets": (("64p", 4, 1.0, 2),)}
  own |= {"text_encoder__where": "disk", "text_encoder__train": False}
  config, out = write_config(tmp_path / "c.py", assets, tmp_path / "run", **own), tmp_path / "out"

  def training(folder, steps):
    changes = {"stages": ({"name": "tiny", "steps": steps},), "data__latents": str(out)}
    return Run(tiny_config(assets, tmp_path / folder, **own, **changes))

  run(config, out, "--epochs", 1)
  first = training("run", 4)  # an epoch has three steps
  first.train()
  rows = [[s.row for s in step.samples] for step, _ in zip(first.parts[0].data.loader(3), range(3))]
  run(config, out, "--epochs", 2)
  resumed, anew = training("run", 6), training("other", 6)
  resumed.start()
  assert [data.sources(4) for data in (resumed.parts[0].data, anew.parts[0].data)] == [[0, 0], [0, 1]]
  assert [[s.row for s in step.samples] for step, _ in zip(resumed.parts[0].data.loader(3), range(3))] == rows
  assert [[s.row for s in step.samples] for step, _ in zip(anew.parts[0].data.loader(3), range(3))] != rows


def test_a_later_epoch_may_use_captions_of_an_earlier_one(assets, table, folder, tmp_path, caplog):
  """All windows are encoded. One warning says that some captions are not."""
  config = tiny_config(assets, tmp_path, **settings(assets, table, data__latents=str(folder)))
  data, at = Run(config).parts[0].data, 0
  while data._plans.locate(at)[0] < 3:
    at += 1
  assert data.sources(at) == [0, 1, 2, 3]
  with data.loader(at) as steps:
    next(steps), next(steps)
  assert [m for m in caplog.messages if "caption" in m] == [
    f"epoch 3: {folder} may lack captions of this epoch; rows then keep the caption of an earlier epoch"
  ]


def test_cached_rows_have_the_bytes_of_latents_and_embeddings(assets, table, folder, tmp_path):
  """The limit of the rows ahead counts what the loader reads, not the pixels of the videos."""
  config = tiny_config(assets, tmp_path, **settings(assets, table, data__latents=str(folder)))
  data, read = Run(config).parts[0].data, {}
  with data.loader(0) as steps:
    for step, _ in zip(steps, range(8)):
      for s in step.samples:
        read.setdefault(s.num_frames, []).append(s.latents_mean.nbytes + s.latents_std.nbytes + s.text_features.nbytes)
    for bucket, weight in zip(data.config.parsed_buckets(), steps.ahead.weights):
      assert 0.5 * min(read[bucket.num_frames]) < weight < 2 * max(read[bucket.num_frames])


def test_files_that_were_missing_are_encoded_later(assets, tmp_path):
  """If no file exists, `encode` stops before it writes. If files vanish while it works, no shard without them remains."""
  disk, out, away = tmp_path / "disk", tmp_path / "out", tmp_path / "away"
  shutil.copytree(assets, disk)
  away.mkdir()
  own = {"data__tables": (str(disk / "table.csv"),), "data__buckets": (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2))}
  config = write_config(tmp_path / "c.py", assets, tmp_path / "run", **own)
  arguments = ("--epochs", 1, "--no-text", "--shard-mb", 0.001)
  disk.rename(tmp_path / "elsewhere")
  disk.mkdir()
  shutil.copy(tmp_path / "elsewhere" / "table.csv", disk)
  with pytest.raises(ValueError, match="none of the first 12 files exists"):
    run(config, out, *arguments)
  assert not shards(out)
  shutil.copytree(tmp_path / "elsewhere", disk, dirs_exist_ok=True)

  run(config, tmp_path / "undisturbed", *arguments)
  whole = shards(tmp_path / "undisturbed")
  assert len(whole) == 12
  for name in ("0.png", "1.png", "5.mp4"):  # two bad files are allowed; the third is read after the first shards are written
    (disk / name).rename(away / name)
  with pytest.raises(ValueError, match=r"3 files cannot be decoded, more than data.max_bad_rows allows .2.; first: .*no such"):
    run(config, out, *arguments)
  assert 4 <= len(shards(out)) <= 9
  assert shards(out).items() <= whole.items()
  for name in ("0.png", "1.png", "5.mp4"):
    (away / name).rename(disk / name)
  run(config, out, *arguments)
  assert shards(out) == whole


def test_a_removed_part_is_encoded_under_another_name(assets, tmp_path):
  own = {"data__windows_per_row": 0, "data__buckets": (("64p", 4, 1.0, 2),)}
  config, out = write_config(tmp_path / "c.py", assets, tmp_path / "run", **own), tmp_path / "out"
  for epochs in (1, 2):
    run(config, out, "--epochs", epochs, "--no-text")
  (first,) = out.glob("latents-*/part-0")
  second = {path: path.read_bytes() for path in first.with_name("part-1").iterdir()}
  shutil.rmtree(first)
  run(config, out, "--epochs", 2, "--no-text")
  assert sorted(path.name for path in out.glob("latents-*/part-*")) == ["part-1", "part-2"]
  assert second == {path: path.read_bytes() for path in second}
  assert latents.Encoded(str(first.parent)).holds(latents.Part(str(first.with_name("part-2"))).keys).all()


WRONG = [
  ({"data__frame_interval": 1}, "have another provenance: frame_interval: 3 -> 1"),
  ({"data__seed": 1, "data__resize": "original"}, 'resize: "area" -> "original"; seed: 42 -> 1'),
  ({"autoencoder__fields": {"scale": 2.0}}, "autoencoder.fields.scale: 1.0 -> 2.0"),
  ({"autoencoder__dtype": "bfloat16"}, 'autoencoder.dtype: "float32" -> "bfloat16"'),
  ({"data__score_drop": 0.5}, "the text in data.latents=.*have another provenance: score_drop: 0.2 -> 0.5"),
  ({"autoencoder__weights": "t5.safetensors"}, "autoencoder.weights: "),
  ({"data__tables": "table.csv"}, "contents of the table"),
  ({"data__latents": "/no/folder"}, "data.latents='/no/folder' has no latents; python -m stdit_jax.encode writes them"),
  ({"data__latents": "gs://bucket/x"}, "data.latents = 'gs://bucket/x' is no folder of this machine"),
  ({"data__buckets": (("144p", 2, 1.0, 2),)}, r"lacks clips that the plan of epoch 0 asks for \(buckets: 144p x 4"),
  ({"task": "autoencoder", "autoencoder__weights": ""}, "is for denoisers. An autoencoder needs videos"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_cache_of_other_settings_is_refused_in_one_line(assets, table, folder, tmp_path, changes, words):
  for key in ("autoencoder__weights", "data__tables"):
    if changes.get(key):
      changes = {**changes, key: str(assets / changes[key])}
  with pytest.raises(ValueError, match=words) as error:
    Run(tiny_config(assets, tmp_path / "run", **{"data__latents": str(folder), **settings(assets, table), **changes}))
  assert "\n" not in str(error.value)


def test_wrong_arguments_are_refused(assets, table, config, tmp_path, capsys):
  for arguments, words in (
    (["--epochs", 0], "--epochs is 0; allowed: at least 1"),
    (["--epochs", 1, "--shard", "2/2"], "--shard 2/2: give I/N with I from 0 to N - 1"),
    (["--epochs", 1, "--stage", "second"], "--stage 'second' is none of tiny"),
    (["--epochs", 1, "--config.data.tabels=x"], "there is no key 'data.tabels'"),
    (["--epochs", 1, "--config.autoencoder.name=tiny-causal3d"], "frames for 'tiny-causal3d', but the autoencoder changes"),
    (["--epochs", 1, "--config.text_encoder.where=step", "--config.text_encoder.train=True", "--text"], "so embeddings"),
  ):
    with pytest.raises(SystemExit) as stop:
      encode.main(["--config", str(config), "--output", str(tmp_path), *map(str, arguments)])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
  strict = settings(assets, table, data__max_bad_rows=0, data__buckets=(("144p", 1, 1.0, 1),))
  strict = write_config(tmp_path / "c.py", assets, tmp_path / "run", **strict)
  with pytest.raises(ValueError, match=r"1 files cannot be decoded, more than data.max_bad_rows allows .0."):
    run(strict, tmp_path / "out", "--epochs", 1)
