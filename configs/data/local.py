"""A folder of videos on one machine: scenes, scores, filter, captions, report, training table. Nothing is cut: the table keeps
the range of each scene, and the loader reads it from the film.

  python -m data.prepare run --config configs/data/local.py --config.collect.sources="('videos',)" --config.output=runs/data/my

Captions are those of a list's column `text`, else those beside the videos (NAME.txt), else the words of the file's name. With a
vision-language model behind an OpenAI-compatible endpoint, as vLLM, SGLang or Ollama serve one:

  ... --config.caption.backend=endpoint --config.caption.url=http://localhost:8000/v1 --config.caption.model=NAME

On several machines over a shared folder: --shard 0/4 ... 3/4; on a Ray cluster: --ray auto.
"""

import ml_collections


def get_config():
  """Every step with the settings that matter; the class of a step (data/prepare/) lists all of them."""
  config = ml_collections.ConfigDict()
  config.output = "runs/data/local"  # folder of the run, or gs://BUCKET/NAME; belongs to one run
  config.workers = 0  # processes on this machine, 0: as many as cores
  config.limits = dict(seconds=120.0, memory_gb=4.0)  # of one file; longer files have more time (data/prepare/workers.py)
  config.steps = (
    "collect", "probe", "duplicates", "scenes", "scores", "filter", "caption", "clean", "split", "report", "export"
  )  # fmt: skip

  config.collect = dict(sources=("videos",), kinds=("video",))  # folders, patterns, tables; local or gs://
  config.probe = dict(decode=False)
  config.duplicates = dict(content=True, pictures=True)
  config.scenes = dict(detector="adaptive", threshold=3.0, min_seconds=2.0, max_seconds=15.0)
  # Further ones: text (needs rapidocr), aesthetic and matching (need a CLIP as ONNX), or any class by its import path.
  config.scores = dict(scorers=dict(motion=dict(), quality=dict(), camera=dict()))
  # The report shows what other thresholds would remove; these take black, still and empty clips only.
  config.filter = dict(where=dict(moves="flow >= 0.1", lit="black < 0.5", moving="frozen < 0.9"))
  config.caption = dict(backend="existing", column="text", sidecar=".txt", name=True)
  config.clean = dict(openings=True, tokenizer="byt5")  # `text_len` in bytes; in tokens with the folder of a T5's tokenizer
  config.split = dict(shares=dict(train=0.98, validation=0.02))
  config.export = dict(formats=("table",))  # also "tfds", "webdataset" (both need the step cut)
  config.report = dict(training="")  # a training config, whose buckets are shown
  return config
