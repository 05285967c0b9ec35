"""The steps of Open-Sora 1.2's data pipeline, with clips of 2 to 15 s as files.

Filters remove clips with much text or low aesthetic scores. A vision-language model writes the captions, and a CLIP matches
them with the clips.
The threshold `aes >= 5` is from Open-Sora. It publishes none for motion, text and matching, so `flow >= 0.3`,
`text_area <= 0.05` and `match >= 20` are this project's, like those for black and still clips.

  python -m data.prepare run --config configs/data/open_sora.py --config.collect.sources="('gs://BUCKET/raw',)" \\
    --config.output=gs://BUCKET/prepared --config.caption.url=http://HOST:8000/v1 --config.caption.model=NAME --shard 0/64

You provide an endpoint, a CLIP ViT-L/14 in ONNX, its tokenizer, and LAION's aesthetic head as safetensors
(data/prepare/clip.py describes the files). The report shows the effect of other thresholds. `text_len` counts bytes (tokenizer
"byt5"). To count tokens of your T5, set `clean.tokenizer` to the folder of its tokenizer.
"""

from configs.data import local

CLIP = "weights/clip-vit-large-patch14"


def get_config():
  """Scores come before captions, because captions cost most."""
  config = local.get_config()
  config.output = "runs/data/open_sora"
  config.steps = (
    "collect", "probe", "duplicates", "scenes", "cut", "scores", "filter", "caption", "clean", "matching", "well_matched",
    "split", "report", "export",
  )  # fmt: skip
  config.cut = dict(short_side=1080)
  config.scores = dict(
    scorers=dict(
      motion=dict(), quality=dict(), camera=dict(), text=dict(),
      aesthetic=dict(model=f"{CLIP}/image.onnx", head="weights/aesthetic.safetensors"),
    )
  )  # fmt: skip
  config.filter = dict(
    where=dict(
      beautiful="aes >= 5.0", moves="flow >= 0.3", readable="text_area <= 0.05", lit="black < 0.5", moving="frozen < 0.9"
    )
  )
  config.caption = dict(
    backend="endpoint", url="http://localhost:8000/v1", model="", prompt="dense", frames=4, side=336, max_tokens=256
  )  # fmt: skip
  config.clean = dict(openings=True, t5=True, tokenizer="byt5")
  matching = dict(image_model=f"{CLIP}/image.onnx", text_model=f"{CLIP}/text.onnx", tokenizer=CLIP)
  config.matching = dict(step="scores", scorers=dict(matching=matching))
  config.well_matched = dict(step="filter", where=dict(matched="match >= 20"))
  return config
