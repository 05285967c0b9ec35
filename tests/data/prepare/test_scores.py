"""Scores of frames with known motion, light and text, and against `transformers` with tiny random weights."""

import collections
import dataclasses
import warnings
from typing import ClassVar

import cv2
import numpy as np
import polars as pl
import pytest

from data.prepare import __main__ as main
from data.prepare import clip, measures, scores, steps, workers
from data.prepare import config as configs
from tests.data.prepare.videos import write_video


def scenery(height=480, width=640, seed=0):
  """An image with trackable structure at many scales."""
  rng = np.random.default_rng(seed)
  image = sum(
    cv2.resize(rng.uniform(-1, 1, (height // s + 2, width // s + 2, 3)).astype(np.float32), (width, height)) * s**0.5
    for s in (4, 16, 64)
  )
  return ((image - image.min()) / np.ptp(image) * 220 + 20).astype(np.uint8)


def camera(moves, size=(120, 160), zoom=None):
  """Frames of a window that moves over scenery; zoom: its side in the first and the last frame."""
  picture, out = scenery(), []
  for i, (x, y) in enumerate(moves):
    scale = 1.0 if zoom is None else zoom[0] + (zoom[1] - zoom[0]) * i / (len(moves) - 1)
    w, h = size[1] * scale, size[0] * scale
    corners = np.float32(
      [[300 + x - w / 2, 220 + y - h / 2], [300 + x + w / 2, 220 + y - h / 2], [300 + x - w / 2, 220 + y + h / 2]]
    )
    to = np.float32([[0, 0], [size[1], 0], [0, size[0]]])
    out.append(cv2.warpAffine(picture, cv2.getAffineTransform(corners, to), size[::-1], flags=cv2.INTER_AREA))
  return np.stack(out)


still = [(0, 0)] * 20


@pytest.mark.parametrize(
  ("images", "label"),
  [
    (camera(still), "static"),
    (camera([(4 * i, 0) for i in range(20)]), "pan_right"),
    (camera([(-4 * i, 0) for i in range(20)]), "pan_left"),
    (camera([(0, -4 * i) for i in range(20)]), "tilt_up"),
    (camera([(0, 4 * i) for i in range(20)]), "tilt_down"),
    (camera(still, zoom=(1.0, 0.5)), "zoom_in"),
    (camera(still, zoom=(0.6, 1.4)), "zoom_out"),
    (camera([(4 * i, 4 * i) for i in range(20)]), "pan_right+tilt_down"),
    (np.zeros((5, 120, 160, 3), np.uint8), "static"),
    (np.random.default_rng(0).integers(0, 255, (5, 120, 160, 3), np.uint8), "undetermined"),
  ],
)
def test_camera(images, label):
  row = {"num_frames": len(images)}
  found = measures.Camera()(images, row)["cmotion"]
  assert found == label or (label == "undetermined" and found in ("undetermined", "static"))


def test_motion_is_that_of_the_original_in_its_units():
  motion = measures.Motion()
  assert motion.frames(100, 24.0).tolist() == [0, 10, 20, 30]
  assert motion.frames(16, 24.0).tolist() == [0, 5, 10, 15]
  assert [motion.frames(n, 24.0).tolist() for n in (2, 3)] == [[0, 1], [0, 1, 2]]
  assert len(motion.frames(1, 120.0)) == 0
  # 6 pixels of 160 are 6 * 576 / 160 of 576; the mean over both components halves them.
  images = camera([(6 * i, 0) for i in range(4)])
  assert motion(images, {})["flow"] == pytest.approx(6 * 576 / 160 / 2, rel=0.15)
  assert motion(images[:1].repeat(4, 0), {})["flow"] < 0.05
  # A portrait is turned: the same motion along its long side.
  turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
  assert motion(turned, {})["flow"] == pytest.approx(6 * 576 / 160 / 2, rel=0.15)


def test_quality():
  quality = measures.Quality(count=4)
  images = camera([(3 * i, 0) for i in range(7)])
  row = {"num_frames": 8, "height": 120, "width": 160}
  sharp = quality(images, row)
  soft = quality(np.stack([cv2.GaussianBlur(i, (0, 0), 3) for i in images]), row)
  assert sharp["sharpness"] > 3 * soft["sharpness"]
  assert sharp["brightness"] == pytest.approx(images.mean(), rel=0.05)
  assert (sharp["black"], sharp["frozen"], sharp["letterbox"], sharp["content"]) == (0, 0, 0, None)
  assert quality.frames(8, 24.0).tolist() == [1, 2, 3, 4, 5, 6, 7]
  assert quality(images[[0, 1, 1, 2, 2, 3, 3]], row)["frozen"] == 0.5
  assert quality(images * 0, row)["black"] == 1
  barred = images.copy()
  barred[:, :15] = barred[:, 105:] = 0
  found = quality(barred, {"num_frames": 8, "height": 240, "width": 320})
  assert found["letterbox"] == pytest.approx(0.25)
  assert found["content"] == "0,30,320,180"


def test_text_counts_only_what_can_be_read():
  text = measures.Text()
  page = np.full((360, 640, 3), 240, np.uint8)
  assert text(page[None], {}) == {"text_area": 0.0, "ocr": 0}
  assert text(scenery(360, 640, 3)[None], {})["ocr"] == 0
  for i, line in enumerate(("THE OPEN MOVIE", "DIRECTED BY SOMEBODY")):
    cv2.putText(page, line, (40, 120 + 120 * i), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (10, 10, 10), 3)
  found = text(page[None], {})
  assert found["ocr"] >= 2
  assert 0.05 < found["text_area"] < 0.5


# ------------------------------------------------------------------------------------------------------------------ clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A CLIP of random weights in `transformers`, the same as ONNX, its tokenizer, an aesthetic head."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  from safetensors.numpy import save_file
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  folder = tmp_path_factory.mktemp("clip")
  torch.manual_seed(0)
  common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
  words = ["a", "big", "gray", "rabbit", "bird", "sings", "."]
  vocabulary = {w: i for i, w in enumerate([*words, "[unk]", "<s>", "</s>"])}
  text = dict(common, vocab_size=10, max_position_embeddings=8, bos_token_id=8, eos_token_id=9, pad_token_id=9)
  config = transformers.CLIPConfig(
    text_config=text, vision_config=dict(common, image_size=30, patch_size=15), projection_dim=16
  )
  model = transformers.CLIPModel(config).eval().requires_grad_(False)

  class Part(torch.nn.Module):
    def __init__(self, part):
      super().__init__()
      self.part = part

    def forward(self, x):
      if self.part == "image":
        return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
      return model.text_projection(model.text_model(input_ids=x).pooler_output)

  # The old exporter, since the new one needs another package.
  warnings.simplefilter("ignore", DeprecationWarning)
  for part, name, output, example in (
    ("image", "pixel_values", "image_embeds", torch.zeros(2, 3, 30, 30)),
    ("text", "input_ids", "text_embeds", torch.tensor([[8, 0, 1, 9, 9, 9, 9, 9]])),
  ):
    torch.onnx.export(
      Part(part), (example,), str(folder / f"{part}.onnx"), input_names=[name], output_names=[output],
      dynamic_axes={name: {0: "n"}, output: {0: "n"}}, dynamo=False,
    )  # fmt: skip

  class Whole(torch.nn.Module):
    def forward(self, input_ids, pixel_values, attention_mask):
      out = model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
      return out.logits_per_image, out.logits_per_text, out.text_embeds, out.image_embeds

  names = ["input_ids", "pixel_values", "attention_mask"]
  examples = torch.tensor([[8, 0, 1, 9, 9, 9, 9, 9]]), torch.zeros(2, 3, 30, 30), torch.ones(1, 8, dtype=torch.int64)
  torch.onnx.export(
    Whole(), examples, str(folder / "whole.onnx"), input_names=names, dynamo=False,
    output_names=["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
    dynamic_axes={"input_ids": {0: "text"}, "pixel_values": {0: "image"}, "attention_mask": {0: "text"}},
  )  # fmt: skip
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 8), ("</s>", 9)])
  tokenizer.save(str(folder / "tokenizer.json"))
  head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)).eval()
  save_file({f"layers.{k}": v.detach().numpy() for k, v in head.state_dict().items()}, folder / "head.safetensors")
  processor = transformers.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
  return folder, model, head, processor


def test_clip_scores_equal_those_of_transformers(tiny):
  import torch

  folder, model, head, processor = tiny
  images = camera([(5 * i, 0) for i in range(3)])
  with torch.no_grad():
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    ours = np.stack([clip.preprocess(image, 30) for image in images])
    assert np.abs(ours - pixels.numpy()).max() < 0.03  # a level of 8 bits: transformers may round while it resizes
    out = model(pixel_values=pixels, input_ids=torch.tensor([[8, 0, 1, 2, 3, 9]]))
    wanted = head(out.image_embeds).mean()
  aesthetic = clip.Aesthetic(str(folder / "image.onnx"), str(folder / "head.safetensors"))
  assert aesthetic(images, {})["aes"] == pytest.approx(float(wanted), abs=2e-3)
  scale = float(model.logit_scale.exp())
  matching = clip.Matching(str(folder / "image.onnx"), str(folder / "text.onnx"), str(folder), scale=scale)
  found = matching(images[1:2], {"text": "a big gray rabbit"})["match"]
  assert found == pytest.approx(float(out.logits_per_image[1, 0]), abs=0.02)
  # A caption that is too long is cut so that the end token stays.
  cut = clip.embed_text(str(folder / "text.onnx"), str(folder), "a big gray rabbit a big gray rabbit a big", length=8)
  with torch.no_grad():
    wanted = model.text_projection(model.text_model(input_ids=torch.tensor([[8, 0, 1, 2, 3, 0, 1, 9]])).pooler_output)[
      0
    ].numpy()
  assert np.abs(cut - wanted / np.linalg.norm(wanted)).max() < 1e-5
  assert matching(images[:1], {"text": None}) == {"match": None}
  # `optimum-cli` writes the image and the text model into one file, which needs a text with every image.
  whole = clip.Matching(*[str(folder / "whole.onnx")] * 2, str(folder), scale=scale)
  assert whole(images[1:2], {"text": "a big gray rabbit"})["match"] == pytest.approx(found, abs=0.02)


def test_pickled_heads_are_refused(tiny, tmp_path):
  folder = tiny[0]
  with pytest.raises(ValueError, match="pickled files"):
    configs.create(clip.Aesthetic, {"model": str(folder / "image.onnx"), "head": str(tmp_path / "a.pth")}, "aesthetic")
  with pytest.raises(ValueError, match="there is no model file"):
    configs.create(clip.Aesthetic, {"model": "/nowhere.onnx"}, "aesthetic")


# ------------------------------------------------------------------------------------------------------------------ step


def test_all_scorers_of_a_step_share_the_frames(tmp_path, tiny):
  """The numbers of the command equal those of each scorer alone, on the frames of the row."""
  folder = tiny[0]
  path = write_video(tmp_path / "v.mp4", list(camera([(max(0, 3 * (i - 30)), 0) for i in range(70)], size=(240, 320))))
  rows = [{"path": str(path), "num_frames": n, "height": 240, "width": 320, "fps": 24.0, "start": s, "end": s + n}
          for s, n in ((0, 30), (30, 40))]  # fmt: skip
  pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
  settings = {"motion": {}, "quality": {}, "camera": {},
              "aesthetic": {"model": str(folder / "image.onnx"), "head": str(folder / "head.safetensors")}}  # fmt: skip
  command = [
    "scores",
    str(tmp_path / "t.parquet"),
    "-o",
    str(tmp_path / "s.parquet"),
    f"--scorers={settings}",
    "--workers",
    "1",
  ]
  assert main.main(command) == 0
  first, second = pl.read_parquet(tmp_path / "s.parquet").to_dicts()
  assert first["error"] is None
  assert (first["cmotion"], second["cmotion"]) == ("static", "pan_right")
  assert first["flow"] < 0.5 < second["flow"]
  assert first["frozen"] > 0.9 > second["frozen"]
  alone = scores.Scores(scorers={"motion": {}})
  context = steps.Context("", "", limits=workers.Limits())
  assert alone.rows([rows[1]], context, lambda share: None)[0]["flow"] == pytest.approx(second["flow"], rel=0.05)


class Mine:
  """A scorer of a user: the mean of red."""

  columns = {"red": pl.Float64}  # noqa: RUF012
  side = 64

  def frames(self, num_frames, fps):
    return [0]

  def __call__(self, images, row):
    return {"red": float(images[..., 0].mean())}


def test_a_scorer_of_the_user(tmp_path):
  path = write_video(tmp_path / "v.mp4", [np.full((64, 64, 3), (200, 20, 20), np.uint8)] * 5)
  pl.DataFrame({"path": [str(path)], "num_frames": [5], "height": [64], "width": [64]}).write_csv(tmp_path / "t.csv")
  scorers = '{"mine": {"scorer": "tests.data.prepare.test_scores:Mine"}}'
  assert main.main(["scores", str(tmp_path / "t.csv"), "-o", str(tmp_path / "s.csv"), f"--scorers={scorers}"]) == 0
  assert pl.read_csv(tmp_path / "s.csv")["red"][0] == pytest.approx(200, abs=4)
  assert main.main(["scores", str(tmp_path / "t.csv"), "-o", str(tmp_path / "s.csv"), "--scorers=('beauty',)"]) == 2


@dataclasses.dataclass(frozen=True)
class Settable:
  """A scorer with settings, whose annotations are types."""

  at: float = 0.5
  names: tuple[str, ...] = ()
  hint: collections.OrderedDict | None = None

  columns: ClassVar[dict] = {"mine": pl.Float64}
  side: ClassVar[int] = 64

  def frames(self, num_frames, fps):
    return [0]

  def __call__(self, images, row):
    return {"mine": self.at}


def test_settings_of_a_scorer_of_the_user_are_checked():
  path = "tests.data.prepare.test_scores:"
  make = lambda name, **settings: configs.create(  # noqa: E731
    scores.Scores, {"scorers": {"mine": {"scorer": path + name, **settings}}}, "scores"
  )
  (made,) = make("Settable", at=0.3, names=["a"])._made()
  assert (made.at, made.names) == (0.3, ("a",))
  with pytest.raises(ValueError, match=r"scorers.mine.at = 'x' is no float"):
    make("Settable", at="x")
  with pytest.raises(ValueError, match=r"scorers.mine.names = \(1,\) is no tuple\[str, ...\]"):
    make("Settable", names=[1])


def test_labels_come_from_edges_that_agree():
  moved = lambda *x: np.array([(v, 0.0) for v in x])  # noqa: E731
  assert measures.camera_class(moved(9, 0, -9, -9), 1.0) == "pan_right"  # top and bottom disagree, left and right don't
  assert measures.camera_class(moved(9, 9, 0, 0), 1.0) == "pan_left"
  turned = moved(0, 9, 9, 9)[:, ::-1]
  assert measures.camera_class(turned, 1.0) == "tilt_up"
  assert measures.camera_class(moved(0, -9, 9, 9)[:, ::-1] * (1, -1), 1.0) == "tilt_down"


def test_scores_are_of_the_crop(tmp_path):
  image = np.full((64, 128, 3), 40, np.uint8)
  image[:, 64:] = 200
  image[:16, 64:] = 0
  path = write_video(tmp_path / "v.mp4", [image] * 4)
  row = {"path": str(path), "num_frames": 4, "height": 64, "width": 128, "fps": 24.0}
  quality = scores.Scores(scorers={"quality": {}})
  found = [quality.rows([{**row, "crop": crop}], steps.Context("", ""), None)[0] for crop in (None, "0,0,64,64", "64,0,64,64")]
  assert [round(f["brightness"] / 10) for f in found] == [10, 4, 15]
  assert [f["content"] for f in found] == [None, None, "64,16,64,48"]
