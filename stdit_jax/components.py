"""The parts that a denoiser's configuration names: denoiser, conditioner, diffusion, autoencoder; their shapes and weights."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from data import paths
from data.aspect_ratios import max_tokens
from stdit_jax import fields
from stdit_jax.autoencoders.codec import Codec
from stdit_jax.autoencoders.registry import autoencoder_model, family_of, make_codec
from stdit_jax.conditioning import CONDITIONERS
from stdit_jax.config import Autoencoder, Config, TextEncoder
from stdit_jax.diffusion.iddpm import IDDPM
from stdit_jax.diffusion.rectified_flow import RectifiedFlow
from stdit_jax.interop import load_variables
from stdit_jax.models import t5
from stdit_jax.models.family import SCALARS, Family, find_model, token_grid, token_values
from stdit_jax.parallel.mesh import own_devices
from stdit_jax.parallel.shardings import ArraySpec, Tree, tree_shardings, with_shardings

DIFFUSIONS = {"rectified-flow": RectifiedFlow, "iddpm": IDDPM}
REPLICATED = (("", PartitionSpec()),)  # sharding rules


@dataclasses.dataclass(frozen=True)
class Components:
  """The parts of a stage's configuration, checked against each other."""

  config: Config  # of the stage
  family: Family  # of the denoiser
  model: nn.Module  # the denoiser
  conditioner: Any  # one of `conditioning`
  diffusion: Any  # the formulation
  autoencoder: Any  # the model whose latents are denoised

  @classmethod
  def of(cls, config: Config) -> "Components":
    """The parts of a configuration. Raises ValueError for unknown names or fields, and for parts that do not fit together."""
    family, model_config = find_model(config.model.name, config.model.fields)
    conditioner = CONDITIONERS[family.condition](config, family, model_config)
    default = fields.choose(DIFFUSIONS, config.diffusion.name, "diffusion.name")()
    diffusion = fields.replace(default, config.diffusion.fields, "config: diffusion.fields")
    autoencoder = autoencoder_model(config.autoencoder)
    parts = cls(config, family, family.build(model_config, None), conditioner, diffusion, autoencoder)
    if (latent := parts.autoencoder.config.latent_channels) != (taken := model_config.in_channels):
      raise ValueError(f"config: the autoencoder has {latent} channels, but model.fields.in_channels={taken}; make them equal")
    return parts

  @property
  def rules(self) -> tuple:
    """Sharding rules of all parameters."""
    return (*self.family.rules, *t5.RULES)

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """(params, frozen) with the original initialisation. Only `params` train. Callers jit it with sharded outputs."""
    denoiser_key, own_key = jax.random.split(key)
    variables = self.family.init(self.model.config, denoiser_key)
    params, frozen = self.conditioner.init(own_key)
    constants = {"denoiser": variables["constants"]} if "constants" in variables else {}
    return {"denoiser": variables["params"], **params}, constants | frozen

  def weights(self, params: Tree, frozen: Tree) -> tuple[Tree, Any]:
    """(variables of the denoiser, weights of the conditioner's encoder or None) from the results of `init`."""
    constants = {"constants": frozen["denoiser"]} if "denoiser" in frozen else {}
    return {"params": params["denoiser"], **constants}, params.get("text_encoder", frozen.get("text_encoder"))

  def batch(self, bucket: tuple[str, int], rows: int, token_parts: int = 1) -> Tree:
    """The arrays of one training batch of a bucket (resolution, frames) as a tree of `ArraySpec`.

    All aspect ratios share the largest number of tokens, padded to a multiple of `token_parts`.
    """
    config, autoencoder = self.model.config, self.autoencoder.config
    frames, _, _ = token_grid(config, (autoencoder.latent_frames(bucket[1]), 1, 1))
    space = max_tokens(bucket[0], autoencoder.downsampling, config.patch_size[1:])
    tokens = ArraySpec((rows, frames, space + -space % token_parts, token_values(config)), axes=("batch", None, "tokens"))
    moments = ("latents_mean", "latents_std")[: 2 if self.config.autoencoder.sample_posterior else 1]
    return {
      **dict.fromkeys(moments, tokens),
      "latent_size": ArraySpec((rows, 3), np.int32),
      "sizes": {"grid": ArraySpec((rows, 3), np.int32), **dict.fromkeys(SCALARS, ArraySpec((rows,)))},
      "cond": self.conditioner.specs(rows),
      "weight": ArraySpec((rows,)),
      "sample_id": ArraySpec((rows, 2), np.uint32),
    }


# ---------------------------------------------------------------------------------------------------------------- weights


def need_file(path: str | None, key: str) -> str:
  """Returns `path`. Raises ValueError if `path` is empty or does not exist. `key`: its key or flag, for the message."""
  what = key if key.startswith("--") else f"config: {key}"
  module = "interop.fetch hed-vgg16" if key.startswith("autoencoder.perceptual") else "convert"
  how = f"give a safetensors file or a folder of them (python -m stdit_jax.{module})"
  if not path:
    raise ValueError(f"{what} is empty; {how}")
  if not paths.exists(path):
    raise ValueError(f"{what}={path!r} does not exist; {how}")
  return path


def local_devices_mesh() -> Mesh | None:
  """The mesh of `own_devices`, over which a codec spreads its pieces. None for one device."""
  return Mesh(np.asarray(own_devices()), ("pieces",)) if len(own_devices()) > 1 else None


def codec_of_shapes(config: Autoencoder, mesh: Mesh | None = None) -> Codec:
  """The `Codec` of the group `autoencoder` with shapes as weights, to estimate memory. Replicated over `mesh` if given."""
  model = autoencoder_model(config)
  shapes = with_shardings(family_of(model.config).init_shapes(model.config), mesh, REPLICATED)
  return make_codec(model, shapes, config.micro_batch)


def load_codec(config: Autoencoder, mesh: Mesh | None = None) -> Codec:
  """The `Codec` of the group `autoencoder` with its weights."""
  model = autoencoder_model(config)
  path = need_file(config.weights, "autoencoder.weights")
  shapes = family_of(model.config).init_shapes(model.config)
  places = tree_shardings(shapes, mesh, REPLICATED) if mesh else None
  variables = load_variables(path, family_of(model.config).layouts, shapes, config=model.config, shardings=places)
  return make_codec(model, variables, config.micro_batch)


def load_text_encoder(config: TextEncoder, encoder: t5.T5Encoder, mesh: Mesh | None = None) -> Tree:
  """Parameters of the T5 encoder of the group `text_encoder` (names of Hugging Face), sharded over a mesh if one is given."""
  path = need_file(config.weights, "text_encoder.weights")
  shapes = t5.init_shapes(encoder.config)
  shardings = tree_shardings(shapes, mesh, t5.RULES) if mesh else None
  return load_variables(path, t5.LAYOUTS, shapes, config=encoder.config, shardings=shardings)["params"]


def load_denoiser(parts: Components, path: str, mesh: Mesh | None = None, **options: Any) -> Tree:
  """Variables of the denoiser of `parts` from a checkpoint in one of the family's layouts.

  `options`: arguments of `load_variables`, and `current`: the tree to load into (default: shapes).
  """
  config = parts.model.config
  shapes = options.pop("current", None) or parts.family.init_shapes(config)
  shardings = tree_shardings(shapes, mesh, parts.rules) if mesh else None
  return load_variables(path, parts.family.layouts, shapes, config=config, shardings=shardings, **options)
