"""From prompts to pixels: conditioner, sampler, autoencoder. For `sample.py`, `evaluate.py` and `run_samples.py`."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from data.tokens import patchify, unpatchify
from data.video import IMAGE_FPS
from stdit_jax.autoencoders.codec import bytes_on_device, memory_beside, shape_of
from stdit_jax.diffusion.elements import Noises, StepState, no_previous, start_edit
from stdit_jax.diffusion.guidance import Guidance, guided
from stdit_jax.diffusion.noise import Purpose, fold_in, sample_keys, token_noise
from stdit_jax.models import step_cache
from stdit_jax.models.family import SCALARS, token_grid
from stdit_jax.models.layers import OVER_TIME
from stdit_jax.parallel.shardings import Layout

CACHED_PROMPTS = 4  # batches whose conditions are cached


@dataclasses.dataclass(frozen=True)
class Request:
  """One clip to make. Its noise depends on seed, loop and size only, not on the batch or the mesh."""

  prompt: str
  height: int  # in pixels
  width: int
  num_frames: int  # 1 = image
  fps: float = 24.0
  seed: int = 0  # 0 to 2^32 - 1
  loop: int = 0  # number of the clip in a video of several clips


class Pipeline:
  """Everything that sampling needs. Programs are compiled once per size and batch.

  With a mesh, all its processes call the pipeline together. Conditioner and denoiser run over the mesh: its `data` and `fsdp`
  axes split the videos of a batch, and `sequence` splits the tokens of each video. Each process decodes for itself.

  Args:
    components: `Components`: the models and the diffusion that were trained.
    weights: as `Components.weights` returns them.
    codec: the autoencoder with its weights (`autoencoders.codec`).
    guidance: `diffusion.guidance.Guidance`. `sample_latents` replaces its scale.
    mesh: shards the parameters of the denoiser and the text encoder. None: one device holds them.
    cache: of `models.step_cache`. None: every step computes everything.
  """

  def __init__(self, components, weights, codec, guidance=None, mesh=None, cache=None):
    self.components, self.guidance, self.cache, self.codec = components, guidance or Guidance(), cache, codec
    self.layout = layout = None if mesh is None else Layout(mesh, split_tokens=mesh.shape["sequence"] > 1)
    self.batch_parts, self.token_parts = (layout.batch_parts, layout.token_parts) if layout else (1, 1)
    self.model, self.diffusion = components.model.clone(layout=layout), components.diffusion
    if cache is not None and not components.family.supports.step_cache:
      raise ValueError(f"--step-cache: {components.family.name} has none; leave it out")
    # Open-Sora 1.1 trains on every third frame, but tells the model the file's frame rate, which is three times as high.
    data = components.config.data
    self._told_fps = data.frame_interval if data.fps_rule == "1.1" else 1
    channels = self.model.config.in_channels
    if (count := self.guidance.channels) is not None and not 1 <= count <= channels:
      raise ValueError(f"--guidance-channels is {count}; allowed: 1 to {channels} (latent channels). Leave it out for all")
    self._encoded: dict[tuple[str, ...], Any] = {}  # {prompts: their `cond`}
    self.set_weights(weights)
    self._encode = jax.jit(lambda weights, arrays: components.conditioner.encode(weights, arrays, layout))
    # The results of a step have the shardings of its arguments. Otherwise the second step would be another program.
    tokens, rows = self._sharding(OVER_TIME), self._sharding(("batch",))
    cached = jax.tree.map(lambda spec: self._sharding(spec.axes), self._cache_specs(1, 1, 1))
    places = StepState(tokens, rows, (tokens, rows, rows) if self.diffusion.multistep else None), cached
    self._step = jax.jit(self._sampler_step, static_argnames="how", out_shardings=places, donate_argnames=("state", "cached"))

  def set_weights(self, weights: tuple[Any, Any]) -> None:
    """Replaces the weights by others of the same models. Nothing is compiled again.

    Without weights of the encoder (None) the pipeline samples only prompts that it has encoded (`encode_prompts`).
    """
    self.variables, self.encoder_weights = weights
    if self.encoder_weights is not None:
      self._encoded = {}

  def _cache_specs(self, batch, frames, space):
    """What the step cache holds for each call of the model in a step, a tuple of trees of `shardings.ArraySpec`."""
    if self.cache is None:
      return ()
    rows = [batch, batch] if self.guidance.sequential else [2 * batch]
    return tuple(self.model.cache_specs(self.cache, n, frames, space) for n in rows)

  def needed_memory(
    self, request: Request, batch: int, steps: int = 30, guidance_scale: float = 7.0, *, given: bool = False,
    encoded: Iterable[int] = (), negative: bool = False,
  ) -> dict[str, float]:  # fmt: skip
    """Bytes on one device for `batch` requests like this one, as the compiler counts them.

    The weights may be shapes (ShapeDtypeStruct with shardings): nothing is allocated. `sample_latents` finds the compiled
    programs in the compilation cache.

    Args:
      given, negative: whether there are given frames, and a negative prompt; encoded: lengths of the clips to encode.

    Returns:
      {"weights", "text", "encode" if a clip is encoded, "denoise", "decode"}. The peak is the weights and the largest other
      value.
    """
    size, diffusion = self.latent_size(request), self.diffusion.for_sampling(steps)
    batch += -batch % self.batch_parts

    def shape(*sizes, dtype: Any = np.float32, axes=("batch",)) -> Any:
      return jax.ShapeDtypeStruct(sizes, dtype, sharding=self._sharding(axes))

    prompts = self.components.conditioner.prompts([request.prompt] * batch)
    arrays = {name: shape(*array.shape, dtype=array.dtype) for name, array in prompts.items()}
    encode = self._encode.lower(self.encoder_weights, arrays).compile()
    cond = jax.tree.map(shape_of, encode.out_info, encode.output_shardings)
    sizes = {"grid": shape(batch, 3, dtype=np.int32), **dict.fromkeys(SCALARS, shape(batch))}
    x = shape(batch, *image_valid(self.model.config, size, self.token_parts).shape, axes=OVER_TIME)
    specs = self._cache_specs(*x.shape[:3])
    cached = jax.tree.map(lambda spec: shape(*spec.shape, dtype=spec.dtype, axes=spec.axes), specs)
    t = diffusion.sampling_timesteps(steps, *[np.ones((batch,), np.float32)] * 4)[0]
    masks = shape(*x.shape[:2]), shape(*x.shape[:2], dtype=bool)
    previous = (x, shape(batch), masks[1]) if diffusion.multistep else None
    step = self._step.lower(
      self.variables, StepState(x, masks if given else None, previous), cached, self._computes(diffusion, 0, t),
      ((cond, cond if negative else None), sizes), (t, t), Noises(x if diffusion.stochastic else None, x if given else None),
      how=(diffusion, self._guidance_of(guidance_scale), size),
    ).compile()  # fmt: skip
    return {
      "weights": bytes_on_device((self.variables, self.encoder_weights, self.codec.variables)),
      "text": memory_beside(encode, self.encoder_weights),
      **({"encode": max(self.codec.memory("encode", size[1:], n) for n in encoded)} if encoded else {}),
      "denoise": memory_beside(step, self.variables),
      "decode": self.codec.memory("decode", size[1:], request.num_frames),
    }  # fmt: skip

  def _guidance_of(self, scale):
    """Guidance of this scale. With scale 1 it is sequential, because `guided` then skips the unconditional branch.

    A step cache holds both branches, so neither is skipped.
    """
    sequential = self.guidance.sequential or (scale == 1 and self.cache is None)
    return dataclasses.replace(self.guidance, scale=float(scale), sequential=sequential)

  def latent_size(self, request: Request) -> tuple[int, ...]:
    """(T, H, W) of the latents of a request."""
    config = self.codec.config
    return (config.latent_frames(request.num_frames), *config.latent_size(request.height, request.width))

  def cond(self, prompts: Sequence[str]) -> Any:
    """The model's `cond` of prompts. A cache serves the other clips and seeds of the same prompts."""
    key = tuple(prompts)
    if key not in self._encoded:
      while len(self._encoded) >= CACHED_PROMPTS:
        self._encoded.pop(next(iter(self._encoded)))  # the oldest
      arrays = {name: self._place(array) for name, array in self.components.conditioner.prompts(prompts).items()}
      self._encoded[key] = jax.block_until_ready(self._encode(self.encoder_weights, arrays))
    return self._encoded[key]

  def encode_prompts(self, requests: Sequence[Request]) -> None:
    """Encodes the prompts of a batch, so that `sample_latents` of these requests needs no encoder."""
    self.cond([r.prompt for r in self._filled(requests)])

  def _filled(self, items):
    """A batch that the mesh divides: the last item is repeated."""
    return [*items, *[items[-1]] * (-len(items) % self.batch_parts)]

  def encode(self, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 `[T, 8h, 8w, 3]` -> normalised latents `[T', h, w, C]`: means (the originals draw a sample)."""
    return self.codec.encode(frames)[0]

  def decode(self, latents: Iterable[np.ndarray], num_frames: int, done: Callable = lambda frames: None) -> list[np.ndarray]:
    """Latents of `sample_latents` -> videos, uint8 `[num_frames, 8h, 8w, 3]`. `done(n)` is called after each `n` frames."""
    return [self.codec.decode(z, num_frames, done) for z in latents]

  def _place(self, values, axes=("batch",)) -> Any:
    """An array that all processes have -> an array over the mesh. `axes`: names of its dimensions (`Layout.axes`)."""
    if self.layout is None:
      return jax.device_put(values, self._sharding(axes))
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, self._sharding(axes), lambda index: values[index])

  def _sharding(self, axes) -> Any:
    """The sharding of an array. Without a mesh it is the first device, to equal the sharding of program outputs."""
    return self.layout.sharding(*axes) if self.layout else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def sample_latents(
    self, requests: Sequence[Request], steps: int = 30, guidance_scale: float = 7.0,
    progress: Callable = lambda items, stage: items, given: Sequence | None = None, negative_prompt: str | None = None,
  ) -> np.ndarray:  # fmt: skip
    """Normalised latents, NumPy `[B, T, h, w, C]`, the same on all processes.

    Args:
      progress: `(items, stage) -> items`, wraps the items of the stages "text" and "denoise", for example in a tqdm bar.
      given: per request None, or its given latent frames: (edit ratio `[T]`, 1 = generate, 0 = keep (`conditions.Placement`);
        latents `[T, h, w, C]`; bool `[T]`, True for frames that start from these latents and not from noise).
      negative_prompt: text that guidance leads away from, instead of the null caption.

    Raises ValueError if the requests differ in size, frames or fps, or if the model can't be given frames.
    """
    count, requests = len(requests), self._filled(requests)
    given = self._filled(given) if given and any(given) else None
    first, batch = requests[0], len(requests)
    if any(dataclasses.replace(r, prompt=first.prompt, seed=first.seed) != first for r in requests):
      raise ValueError("requests of one batch must have the same size, frames and fps; sample them in several batches")
    if given and not self.components.family.supports.frame_masks:
      raise ValueError(f"{self.components.family.name} can't be given frames: it makes videos from text alone; leave them out")
    size, config = self.latent_size(first), self.model.config
    prompts = [[r.prompt for r in requests], *([] if negative_prompt is None else [[negative_prompt] * batch])]
    conds = [self.cond(of_batch) for of_batch in progress(prompts, "text")]
    fps = IMAGE_FPS if first.num_frames == 1 else first.fps * self._told_fps
    numbers = {"height": first.height, "width": first.width, "num_frames": first.num_frames, "fps": fps}
    sizes = {name: self._place(np.full((batch,), value, np.float32)) for name, value in numbers.items()}
    sizes["grid"] = self._place(np.tile(np.asarray(token_grid(config, size), np.int32), (batch, 1)))
    conditions = (conds[0], conds[1] if negative_prompt is not None else None), sizes

    diffusion = self.diffusion.for_sampling(steps)
    extents = (np.full((batch,), n, np.float32) for n in (first.height, first.width, first.num_frames, size[0]))
    timesteps = diffusion.sampling_timesteps(steps, *extents)
    # `sample_keys` takes one seed for all samples, so the seeds of the requests take the place of the sample numbers.
    seeds = np.asarray([(r.loop, r.seed) for r in requests], np.uint32)

    def noise_of(keys):
      return self._place(latent_noise(config, keys, size, self.token_parts), OVER_TIME)

    x = noise_of(sample_keys(0, seeds, Purpose.SAMPLING_START))
    x, edit = (x, None) if given is None else self._start_from(x, given, size)
    step_keys = sample_keys(0, seeds, Purpose.SAMPLING_STEP)
    # Every frame is noised at most once, so one draw serves all steps.
    frame_noise = None if edit is None else noise_of(sample_keys(0, seeds, Purpose.FRAME_NOISE))
    value, gap, took_part = no_previous(x)
    previous = (self._place(value, OVER_TIME), self._place(gap), self._place(took_part)) if diffusion.multistep else None
    specs = self._cache_specs(*x.shape[:3])
    cached = jax.tree.map(lambda spec: self._place(np.zeros(spec.shape, spec.dtype), spec.axes), specs)
    state, how = StepState(x, edit, previous), (diffusion, self._guidance_of(guidance_scale), size)
    for i in progress(range(steps), "denoise"):
      noises = Noises(noise_of(fold_in(step_keys, i)) if diffusion.stochastic else None, frame_noise)
      computes, times = self._computes(diffusion, i, timesteps[i]), (timesteps[i], timesteps[i + 1])
      state, cached = self._step(self.variables, state, cached, computes, conditions, times, noises, how=how)
      state.x.block_until_ready()
    return unpatchify(multihost_utils.process_allgather(state.x, tiled=True)[:count], size, config.patch_size)

  def _computes(self, diffusion, step, t):
    """`Reuse.computes` of a step at timesteps `t` `[B]`. The values of `t` are equal: all requests of a batch have one size."""
    if self.cache is None:
      return {}
    return {kind: np.bool_(value) for kind, value in self.cache.computes(step, diffusion.model_timesteps(t[0])).items()}

  def _start_from(self, x, given, size) -> Any:
    """Replaces noise by the given latents -> (x, state of `elements.start_edit`)."""
    config = self.model.config
    nothing = np.ones(size[0]), np.zeros((*size, config.in_channels)), np.zeros(size[0], bool)
    ratio, latents, taken = (np.stack(part) for part in zip(*(parts or nothing for parts in given)))
    tokens = patchify(latents.astype(np.float32), config.patch_size)
    tokens = np.pad(tokens, ((0, 0), (0, 0), (0, x.shape[2] - tokens.shape[2]), (0, 0)))
    x = jnp.where(self._place(taken)[..., None, None], self._place(tokens, OVER_TIME), x)
    return x, tuple(self._place(part) for part in start_edit(ratio))

  def _sampler_step(self, variables, state, cached, computes, conditions, times, noises, *, how):
    """(state, cached outputs) after a step.

    Args:
      cached, computes: of the step cache (`_cache_specs`, `_computes`).
      conditions: ((cond of the prompts, cond of the negative prompts or None), sizes).
      times: timesteps `[B]` from and to.
      how: (diffusion for a number of steps, guidance, (T, H, W) of the latents). Equal in all steps, which share one program.
    """
    diffusion, guidance, latent_size = how
    config, family = self.model.config, self.components.family
    (cond, other), sizes = conditions
    if other is None:
      other = family.null(config, variables.get("constants", {}), cond)
    # Elements past an odd border are no latents. They stay zero, as in the original's padding (`PatchEmbed3D`).
    inside = image_valid(config, latent_size, self.token_parts)
    valid = jnp.broadcast_to(inside, state.x.shape)
    # The model needs a mask only if there are padding tokens, which make the number of tokens divisible by the devices.
    shown = None if inside.any(-1).all() else valid
    before, cached = cached, list(cached)

    def denoiser(cond, sizes, shown, number):
      def denoise(x, t, x_mask):
        model = functools.partial(self.model.apply, variables, x, t, cond, sizes, x_mask=x_mask, valid=shown)
        if self.cache is None:
          return model()
        y, cached[number] = model(reuse=step_cache.Reuse(self.cache, cached[number], computes))
        return y

      return denoise

    if not guidance.sequential:
      twice = functools.partial(jax.tree.map, lambda *parts: jnp.concatenate(parts))
      both = None if shown is None else twice(shown, shown)
      denoise = denoiser(twice(cond, other), twice(sizes, sizes), both, 0)
    else:
      denoise = tuple(denoiser(branch, sizes, shown, number) for number, branch in enumerate((cond, other)))
    step_model = guided(
      denoise, guidance.scale, num_channels=config.in_channels, guided_channels=guidance.channels, interval=guidance.interval,
      rescale=guidance.rescale, valid=valid,
    )  # fmt: skip
    after = diffusion.step(step_model, state, *times, num_channels=config.in_channels, noises=noises, valid=valid)
    result = after, tuple(cached)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, (state, before))  # else the next step would be another program
    return result


def image_valid(config: Any, latent_size: Sequence[int], token_parts: int = 1) -> np.ndarray:
  """bool `[T, S, P]`: True for the elements of tokens that are latents of this size.

  The other elements are padding, at an odd border or in tokens that fill the number up to a multiple of `token_parts`.
  `config` is the denoiser's.
  """
  valid = patchify(np.ones((*latent_size, config.in_channels), bool), config.patch_size)
  return np.pad(valid, ((0, 0), (0, -valid.shape[1] % token_parts), (0, 0)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def latent_noise(config: Any, keys: jax.Array, size: tuple[int, ...], token_parts: int = 1) -> jax.Array:
  """Standard normal tokens `[B, T, S, P]` (`image_valid`) for latents of one size, from one key per sample."""
  latent_size, grid = (jnp.tile(jnp.asarray(n, jnp.int32), (keys.shape[0], 1)) for n in (size, token_grid(config, size)))
  shape = image_valid(config, size, token_parts).shape
  return token_noise(keys, latent_size, shape, grid, config.patch_size, config.in_channels)
