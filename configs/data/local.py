"""Makes a training table from a folder of videos on one machine: scenes, scores, filter, captions, report.

  python -m data.prepare run --config configs/data/local.py --config.collect.sources="('videos',)" --config.output=runs/data/my

No clips are cut: the table keeps the range of each scene, and the loader reads it from the video. A caption comes from the
column `text` of a source table, or else from NAME.txt beside the video, or else from the words of the file name. To use a
vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, Ollama):

  ... --config.caption.backend=endpoint --config.caption.url=http://localhost:8000/v1 --config.caption.model=NAME

Several machines share the work through a common folder with --shard 0/4 ... 3/4, or on a Ray cluster with --ray auto.
"""

import ml_collections


def get_config():
  """The steps with their most used settings. `python -m data.prepare STEP --help` lists all settings of a step."""
  config = ml_collections.ConfigDict()
  config.output = "runs/data/local"  # folder of this run, or gs://BUCKET/NAME
  config.workers = 0  # processes on this machine, 0: as many as cores
  config.limits = dict(seconds=120.0, memory_gb=4.0)  # per file; larger files get more time (data/prepare/workers.py)
  config.steps = (
    "collect", "probe", "duplicates", "scenes", "scores", "filter", "caption", "clean", "split", "report", "export"
  )  # fmt: skip

  config.collect = dict(sources=("videos",), kinds=("video",))  # folders, patterns, tables; local or gs://
  config.probe = dict(decode=False)
  config.duplicates = dict(content=True, pictures=True)
  config.scenes = dict(detector="adaptive", threshold=3.0, min_seconds=2.0, max_seconds=15.0)
  # More scorers: text (needs rapidocr), aesthetic and matching (need a CLIP in ONNX), or a class by its import path.
  config.scores = dict(scorers=dict(motion=dict(), quality=dict(), camera=dict()))
  # These thresholds remove only black, still and empty clips. The report shows the effect of others.
  config.filter = dict(where=dict(moves="flow >= 0.1", lit="black < 0.5", moving="frozen < 0.9"))
  config.caption = dict(backend="existing", column="text", sidecar=".txt", name=True)
  config.clean = dict(openings=True, tokenizer="byt5")  # `text_len` in bytes; the folder of a T5's tokenizer counts tokens
  config.split = dict(shares=dict(train=0.98, validation=0.02))
  config.export = dict(formats=("table",))  # also "tfds" and "webdataset" (both need the step cut)
  config.report = dict(training="")  # training config whose buckets the report shows
  return config
