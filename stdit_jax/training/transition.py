"""Turns the state of a model into a state of the next stage's model. Arrays of equal shape stay, new arrays are initialised."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stdit_jax.parallel.shardings import path_name, tree_shardings


def by_name(*trees: Any) -> dict[str, Any]:
  """All leaves by name, such as {"denoiser/patch_embed/kernel": leaf}. Parameters and frozen arrays share no name."""
  return {path_name(path): leaf for tree in trees for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fates(before: Mapping[str, Any], after: Mapping[str, Any], resizable: Sequence[str] = ()) -> dict[str, set[str]]:
  """Sorts the names of arrays by their fate: {"kept", "resized", "new" or "dropped": set of names}.

  Args:
    before, after: arrays or shapes, from `by_name`.
    resizable: parts of names. An array whose name contains one of them may change the length of its first axis.
  """
  both = before.keys() & after.keys()
  kept = {name for name in both if before[name].shape == after[name].shape}
  may = {name for name in both - kept if any(part in f"/{name}" for part in resizable)}
  resized = {name for name in may if before[name].shape[1:] == after[name].shape[1:]}
  used = kept | resized
  return {"kept": kept, "resized": resized, "new": after.keys() - used, "dropped": before.keys() - used}


def describe(before: Mapping[str, Any], after: Mapping[str, Any], resizable: Sequence[str] = ()) -> str:
  """One line about `fates`, "" if all arrays are kept. A group whose arrays share their fate is written `group/*`."""
  everything = before.keys() | after.keys()

  def compact(names):
    lines = {}
    for name in sorted(names):
      groups = (name[: i + 1] for i, letter in enumerate(name) if letter == "/")
      # The largest group all of whose arrays are in `names`.
      whole = next((g for g in groups if all(n in names for n in everything if n.startswith(g))), None)
      lines[f"{whole}*" if whole else name] = None
    return ", ".join(lines) or "nothing"

  fate = fates(before, after, resizable)
  if fate["kept"] == everything:
    return ""
  return "; ".join(f"{what}: {compact(names)}" for what, names in fate.items() if names or what != "resized")


def resize(array: Array, fresh: Array, repeat: bool) -> Array:
  """Cuts `array` to the number of rows of `fresh`, or extends it.

  New rows come from `fresh`: a stack that grows gets fresh layers. With `repeat` they repeat the last row of `array`, as
  Open-Sora loads a null caption of another length (`ckpt_utils.py`).
  """
  both = min(len(array), len(fresh))
  rest = jnp.broadcast_to(array[-1:], fresh.shape) if repeat else fresh
  return jnp.concatenate([array[:both], rest[both:]])


def change_model(
  objective: Any, optimizer: Any, mesh: jax.sharding.Mesh, key: Any, state: Mapping[str, Any], frozen: Any
) -> tuple[dict[str, Any], Any]:
  """Turns the (state, frozen) of another model into a (state, frozen) of the model of `objective`.

  Parameters of equal name and shape stay, with their averages and moments. A new parameter gets its original initialisation
  from `key`, an average that starts at this value, and fresh moments. A resized parameter gets fresh moments as well.
  """
  params, constants = shapes = objective.shapes
  places = by_name(*tree_shardings(shapes, mesh, objective.rules))
  values, averages = by_name(state["params"], frozen), by_name(state["ema"])
  fate = fates(values, by_name(*shapes), objective.resizable)
  changed, trained = fate["new"] | fate["resized"], by_name(params).keys()
  names = changed, changed & trained  # the changed names in `values` and in `averages`; all pairs below have this order

  def make(key, *before):  # `before`: the arrays to resize
    # Weakly typed values would make every program trace again after the first update.
    fresh = {n: jax.lax.convert_element_type(x, x.dtype) for n, x in by_name(*objective.init(key)).items()}
    return [
      {n: resize(old[n], fresh[n], n not in trained) if n in old else jnp.copy(fresh[n]) for n in these}
      for these, old in zip(names, before)
    ]

  resized = [{n: old[n] for n in these & fate["resized"]} for these, old in zip(names, (values, averages))]
  made = jax.jit(make, out_shardings=[{n: places[n] for n in these} for these in names])(key, *resized)
  values, averages = values | made[0], averages | made[1]

  def tree(shapes, leaves):
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], shapes)

  new = {"params": tree(params, values), "ema": tree(params, averages)}
  shardings = tree_shardings(jax.eval_shape(optimizer.init, params), mesh, objective.rules)
  fresh_moments = jax.jit(optimizer.init, out_shardings=shardings)(new["params"])
  old_moments = by_name(state["opt"])

  def moment(path, fresh):
    name = path_name(path)  # such as 0/mu/denoiser/...: the name of the parameter follows two keys
    return old_moments[name] if name.split("/", 2)[2] in fate["kept"] else fresh

  new["opt"] = jax.tree_util.tree_map_with_path(moment, fresh_moments)
  return new, tree(constants, values)
