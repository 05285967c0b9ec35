"""Where the weights of a run come from: a run folder of ours, or safetensors in the original layouts."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from data import paths
from stdit_jax.autoencoders import perceptual, registry
from stdit_jax.interop import load_variables
from stdit_jax.interop.models import FAMILIES
from stdit_jax.models import stdit, t5
from stdit_jax.parallel.shardings import path_name, tree_shardings
from stdit_jax.training.autoencoding import autoencoder_model
from stdit_jax.training.checkpoints import is_run_folder, load_weights


def need_file(path, key):
  """Raises ValueError when a file or folder that the configuration names is missing."""
  module = "interop.fetch makes one of hed-vgg16" if key.startswith("autoencoder.perceptual") else "convert"
  how = f"give a safetensors file or a folder of them (python -m stdit_jax.{module})"
  if not path:
    raise ValueError(f"config: {key} is empty; {how}")
  if not paths.exists(path):
    raise ValueError(f"config: {key}={path!r} does not exist; {how}")
  return path


def local_devices_mesh():
  """The mesh of all devices of this process, over which a codec spreads its pieces."""
  return Mesh(np.asarray(jax.local_devices()), ("pieces",))


def codec_of_shapes(config, mesh=None):
  """The `Codec` of `autoencoder` of a configuration with shapes for weights, whole on every device of `mesh`, or on one."""
  model = autoencoder_model(config)
  place = NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(jax.local_devices()[0])
  shapes = registry.family_of(model.config).init_shapes(model.config)
  placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
  return registry.make_codec(model, placed, config.micro_batch)


def load_codec(config, mesh=None):
  """The same with the weights."""
  model = autoencoder_model(config)
  path, family = need_file(config.weights, "autoencoder.weights"), registry.family_of(model.config)
  shapes = family.init_shapes(model.config)
  places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes) if mesh else None
  variables = load_variables(path, family.layouts, shapes, config=model.config, shardings=places)
  return registry.make_codec(model, variables, config.micro_batch)


def load_text_encoder(config, model, mesh=None):
  """Parameters of the T5 encoder from `text_encoder.weights` (names of Hugging Face), laid over the mesh if there is one."""
  path = need_file(config.text_encoder.weights, "text_encoder.weights")
  shapes = t5.init_shapes(model.config)
  shardings = tree_shardings(shapes, mesh) if mesh else None
  return load_variables(path, FAMILIES[t5.__name__], shapes, config=model.config, shardings=shardings)["params"]


FROM_FILES = ("text_encoder", "perceptual")  # what is frozen and read anew at every start, and in no checkpoint


def load_image_autoencoder(config, path, shardings):
  """{"image": parameters} of a video autoencoder's image autoencoder, from a file of it alone."""
  image = config.image_config
  place = {"params": shardings["autoencoder"]["image"]}
  path = need_file(path, "autoencoder.image_weights")
  family = registry.family_of(image)
  shapes = family.init_shapes(image)
  return {"image": load_variables(path, family.layouts, shapes, config=image, shardings=place)["params"]}


def load_perceptual(config):
  """The trunk that `autoencoder.perceptual` of a configuration names, NumPy. Raises ValueError as `perceptual.load`."""
  return perceptual.load(config.name, need_file(config.weights, "autoencoder.perceptual.weights"), config.sha256)


def read_frozen(objective, config, mesh):
  """{name of `FROM_FILES`: parameters}, those of which the objective's frozen part has zeros; laid over the mesh."""
  frozen = objective.shapes[1]
  values = {}
  if "text_encoder" in frozen and config.text_encoder.weights:
    values["text_encoder"] = load_text_encoder(config, objective.text, mesh)
  if "perceptual" in frozen:
    trunk = load_perceptual(config.autoencoder.perceptual)
    values["perceptual"] = jax.device_put(trunk, tree_shardings({"perceptual": trunk}, mesh)["perceptual"])
  return values


def initial_weights(objective, config, key, shardings, mesh):
  """(params, frozen) of step 0 with the given shardings: the original initialisation, then what `init`,
  `text_encoder.weights` and `autoencoder.image_weights` name.

  Raises CheckpointError or ValueError when a file is missing, broken or of another model.
  """
  params, frozen = jax.jit(objective.init, out_shardings=shardings)(key)
  frozen |= read_frozen(objective, config, mesh)
  if "text_encoder" in params and config.text_encoder.weights:
    params["text_encoder"] = load_text_encoder(config, objective.text, mesh)
  if config.task == "autoencoder" and config.autoencoder.image_weights:
    params["autoencoder"] |= load_image_autoencoder(objective.model.config, config.autoencoder.image_weights, shardings[0])
  if not config.init:
    return params, frozen
  path = need_file(config.init, "init")
  if is_run_folder(path):
    loaded, constants, _ = load_weights(path, mesh=mesh)
    found = {name: loaded[name] for name in params if name in loaded}
    if config.task not in found:
      raise ValueError(f"config: init={path!r} is a run of {', '.join(loaded)}, not of the {config.task} that is trained here")
    constants = {name: constants[name] for name in frozen if name in constants}
    check_same_shapes({name: params[name] for name in found}, found, path)
    check_same_shapes({name: frozen[name] for name in constants}, constants, path)
    return params | found, frozen | constants
  name, layouts = "denoiser", FAMILIES[stdit.__name__]
  if config.task == "autoencoder":
    name, layouts = "autoencoder", objective.family.layouts
  model, strict = objective.model.config, config.init_strict
  current = {"params": params[name]} | ({"constants": frozen[name]} if name in frozen else {})
  place = {"params": shardings[0][name]} | ({"constants": shardings[1][name]} if name in frozen else {})
  numbers = name != "autoencoder"  # which trains on raw latents, whatever the shift and scale with which they will be used
  loaded = load_variables(path, layouts, current, config=model, strict=strict, numbers=numbers, shardings=place)
  params[name] = loaded["params"]
  if name in frozen:
    frozen[name] = loaded["constants"]
  return params, frozen


def check_same_shapes(expected, found, where):
  """Raises ValueError naming the first parameters of `found` that differ from the model's."""
  ours, theirs = (
    {path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]} for tree in (expected, found)
  )
  wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
  if wrong:
    details = "; ".join(f"{n}: {theirs.get(n, 'missing')}, model has {ours.get(n, 'none')}" for n in wrong[:5])
    raise ValueError(f"{where} belongs to another model: {len(wrong)} parameters differ ({details})")
