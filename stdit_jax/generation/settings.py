"""The flags of sampling, as frozen dataclasses: the model, how its sampler runs, and what `sample` makes."""

import dataclasses
import functools
from collections.abc import Sequence

from data.command_line import flag
from stdit_jax.generation.conditions import COMPAT
from stdit_jax.generation.media import FRAMES, VIDEO_FORMATS

_model = functools.partial(flag, group="model")
_sampler = functools.partial(flag, group="sampler")
_wanted = functools.partial(flag, group="what to make")
_given = functools.partial(flag, group="given frames")
_output = functools.partial(flag, group="output")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The flags that name a trained model and its files."""

  run: str | None = _model("folder of a training run (its `output`)")
  item: str = _model("which weights of the run (default: %(default)s)", "ema", choices=("ema", "params"))
  step: int | None = _model("which checkpoint of the run (default: the newest)")
  config: str | None = _model("configuration file of the model, instead of --run", metavar="FILE")
  changes: Sequence[str] = _model("replaces one key of --config", (), "--config.KEY", metavar="VALUE")
  weights: str | None = _model("for --config: safetensors of the denoiser, with original or native names")
  text_encoder: str | None = _model("safetensors file or folder of the T5 encoder (default: that of the configuration)")
  autoencoder: str | None = _model("safetensors of the autoencoder (default: that of the configuration)")
  mesh: Sequence[str] | None = _model(
    "mesh of all devices, e.g. data=-1 fsdp=4; sequence=4 splits each video (default: one device; several processes: data=-1)",
    nargs="+", metavar="AXIS=DEVICES",
  )  # fmt: skip
  autoencoder_memory: float | None = _model(
    "memory of a device; the autoencoder works in tiles if it needs more (default: the free memory)", metavar="GIB"
  )


@dataclasses.dataclass(frozen=True)
class PipelineSettings(ModelSettings):
  """A model, and how its sampler runs. None stands for the value of the configuration."""

  steps: int | None = _sampler("sampler steps (default: the configuration's)")
  guidance_scale: float | None = _sampler("classifier-free guidance, 1 for none (default: the configuration's)")
  sampler: str | None = _sampler("rectified flow: euler (default), adams-bashforth; iddpm: ancestral (default), ddim, dpm++")
  timestep_shift: float | None = _sampler("rectified flow: above 1 moves timesteps towards noise (default: 1)", metavar="A")
  guidance_interval: Sequence[float] | None = _sampler("guided timesteps (default: all)", nargs=2, metavar=("LOW", "HIGH"))
  guidance_rescale: float = _sampler("0 to 1: lowers the contrast at large guidance scales (default: %(default)s)", 0.0)
  guidance_in_turn: bool = _sampler("prompt and null caption one after the other, which needs less memory", False)
  step_cache: str | None = _sampler(
    "caches outputs of earlier steps (models/step_cache.py). Sampling is faster, and the result differs a little. "
    "pyramid:2,4,6 (the default of pyramid) computes attention over space in every 2nd step, over time in every 4th, to text "
    "in every 6th. residual:0.1 skips layers while the first layer changes by less than 10 %%", metavar="NAME",
  )  # fmt: skip
  guidance_channels: int | None = _sampler("guide the first N latent channels (default: all; Open-Sora 1.1: 3)", metavar="N")
  compat: str | None = _sampler("do what the original does where this project corrects it (README)", choices=COMPAT[1:])


@dataclasses.dataclass(frozen=True)
class SampleSettings(PipelineSettings):
  """A model, what `sample` makes with it, and where it writes. None stands for the value of the configuration."""

  prompt: Sequence[str] | None = _wanted("a prompt; may be given several times", action="append")
  prompt_file: str | None = _wanted(
    "one prompt per line; .csv and .jsonl: `prompt` (or `text`), and if wanted `reference_path` and `mask_strategy`"
  )
  num_samples: int = _wanted("videos per prompt, with seeds SEED, SEED + 1, ... (default: %(default)s)", 1)
  seed: int = _wanted("the same seed gives the same noise in any batch (default: %(default)s)", 0)
  resolution: str | None = _wanted("name of a pixel count: 144p, 240p, 360p, 480p, 720p, ...")
  aspect_ratio: str | None = _wanted("height:width, e.g. 9:16 (landscape), 1:1, 16:9")
  image_size: Sequence[int] | None = _wanted("pixels, instead of --resolution and --aspect-ratio", nargs=2, metavar=("H", "W"))
  num_frames: str | None = _wanted("frames, or seconds at 24 fps as 2s, 4s, 8s, 16s; 1 makes an image")
  fps: float | None = _wanted("frames per second")
  aesthetic_score: float | None = _wanted("appended to the prompt, 4.5 to 6.5")
  motion_score: float | None = _wanted("appended to the prompt, 0 to 100")
  camera_motion: str | None = _wanted("appended to the prompt: pan left, zoom in, ...")
  negative_prompt: str | None = _wanted("text that guidance leads away from (default: the null caption)")

  task: Sequence[str] | None = _given("a task and its files, see above", nargs="+", metavar=("NAME", "FILE"))
  reference: Sequence[str] | None = _given("image or video for --mask-strategy", action="append", metavar="FILE")
  mask_strategy: str | None = _given("Open-Sora: LOOP,REFERENCE,ITS FRAME,CLIP FRAME,FRAMES,EDIT RATIO;...", metavar="TEXT")
  loops: int = _given("clips; each continues from the last frames of the previous clip (default: %(default)s)", 1)
  condition_frames: int | None = _given("latent frames given from a video or the previous clip (default: up to 4, or a chunk)")
  condition_edit: float = _given("edit ratio of the frames from the previous clip (default: %(default)s)", 0.0)
  edit_strength: float = _given("noise level for --task edit, above 0, at most 1 (default: %(default)s)", 0.6)
  explain: bool = _given("print where each frame comes from, and make nothing", False)

  batch_size: int | None = _output("videos per batch (default: one per group of devices that share a video)")
  output: str = _output("folder for the files, or one .mp4, .gif, .webp, .png (default: %(default)s)", "samples")
  format: str = _output(
    "of videos (default: mp4); frames: a folder of png. Images are png", "mp4", choices=(*VIDEO_FORMATS, FRAMES)
  )
  overwrite: bool = _output("replace existing files", False)

  @property
  def task_name(self) -> str | None:
    return self.task[0] if self.task else None
