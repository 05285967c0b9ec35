"""The weights of step 0: the original initialisation, replaced by the files of the configuration."""

from typing import Any

import jax
from jax.sharding import Mesh

from stdit_jax.components import need_file
from stdit_jax.config import Config
from stdit_jax.parallel.shardings import Tree, tree_shardings
from stdit_jax.training.checkpoints import is_run_folder, load_weights, stage_config
from stdit_jax.training.objectives import Objective, part_of
from stdit_jax.training.transition import by_name


def initial_weights(objective: Objective, config: Config, key: jax.Array, mesh: Mesh) -> tuple[Tree, Tree]:
  """(params, frozen) of step 0 over the mesh. Raises CheckpointError or ValueError for a missing, broken or foreign file."""
  params, frozen = jax.jit(objective.init, out_shardings=tree_shardings(objective.shapes, mesh, objective.rules))(key)
  frozen |= objective.read_frozen(mesh)
  params = objective.read_initial(params, mesh)
  if not config.init:
    return params, frozen
  path = need_file(config.init, "init")
  if is_run_folder(path):
    return from_run(objective, path, params, frozen, mesh)
  return objective.load_checkpoint(path, params, frozen, mesh)


def from_run(objective: Objective, path: str, params: Tree, frozen: Tree, mesh: Mesh) -> tuple[Tree, Tree]:
  """(params, frozen) with the averaged weights of another run's folder. Raises ValueError for another model."""
  config, step = stage_config(path)
  if (part := part_of(config)) != objective.part:
    own = objective.part
    raise ValueError(f"config: init={path!r} is a run that trains the {part}; this run trains the {own}; give another init")
  loaded, constants, _ = load_weights(path, step=step, mesh=mesh, rules=objective.rules)
  found = {name: loaded[name] for name in params if name in loaded}
  constants = {name: constants[name] for name in frozen if name in constants}
  check_same_shapes({name: params[name] for name in found}, found, path)
  check_same_shapes({name: frozen[name] for name in constants}, constants, path)
  return params | found, frozen | constants


def check_same_shapes(expected: Any, found: Any, where: str) -> None:
  """Raises ValueError if shapes differ. It names the first parameters that differ."""
  ours, theirs = ({name: tuple(x.shape) for name, x in by_name(tree).items()} for tree in (expected, found))
  if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
    details = "; ".join(f"{n}: {theirs.get(n, 'missing')}, model has {ours.get(n, 'none')}" for n in wrong[:5])
    raise ValueError(f"{where} belongs to another model: {len(wrong)} parameters differ ({details})")
