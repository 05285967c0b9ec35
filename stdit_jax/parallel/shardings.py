"""One table of rules: where each parameter lies on the mesh. Optimizer state and EMA follow by their paths."""

import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def constrain(x, mesh, *axes):
  """Asks XLA to lay `x` out over the mesh axes named per dimension (None: not split). Without a mesh, `x` itself.

  The sharding carries its mesh, so that the constraint can't vanish with a missing context (jax-practice, section 3).
  """
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


def path_name(path):
  """'params/spatial_blocks/mlp/fc1/kernel' of a jax key path."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


# (regex searched in the path, mesh axis of every dimension from the first). Stacked blocks carry the depth in front; every
# large matrix is split over `fsdp` along one of its feature sides, which are multiples of 16 in all published sizes.
RULES = (
  # blocks of the STDiTs and of T5
  (r"blocks/.*(qkv|key_value|query|key|value)/kernel$", P(None, "fsdp")),
  (r"blocks/.*attention/out/kernel$", P(None, None, None, "fsdp")),
  (r"blocks/mlp/(fc1|gate|up)/kernel$", P(None, "fsdp")),
  (r"blocks/mlp/(fc2|down)/kernel$", P(None, None, "fsdp")),
  (r"blocks/.*(bias|norm/scale|modulation)$", P()),
  # outside the blocks of the STDiTs
  (r"(timestep|temporal)_modulation/kernel$", P("fsdp")),
  (r"(caption|timestep|fps|frames)_embed/fc[12]/kernel$", P(None, "fsdp")),
  (r"(size|aspect)_embed/fc[12]/kernel$", P()),
  (r"(patch_embed|_embed/fc[12]|_modulation)/bias$", P()),
  (r"patch_embed/kernel$", P()),
  (r"final_layer/(modulation|linear/kernel|linear/bias)$", P()),
  (r"(null_caption|rope_frequencies)$", P()),
  # outside the blocks of T5
  (r"token_embedding$", P(None, "fsdp")),
  (r"(relative_bias|final_norm/scale)$", P()),
  # autoencoders are small: whole on every device
  (r"(^|/)(encoder|decoder|quant_conv|post_quant_conv)/", P()),
)


def spec_for(name, shape, mesh, rules=RULES):
  """PartitionSpec of the parameter `name`; raises ValueError when no rule matches or a dimension does not divide."""
  spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
  if spec is None:
    raise ValueError(f"no sharding rule matches the parameter {name!r} of shape {shape}; add one to parallel/shardings.py")
  for dim, axis in enumerate(spec):
    size = mesh.shape[axis] if axis else 1
    if shape[dim] % size:
      raise ValueError(
        f"parameter {name!r}: dimension {dim} of {shape} does not divide by the {size} devices of mesh axis {axis!r}; "
        f"choose a mesh.{axis} that divides {shape[dim]}"
      )
  return spec


def tree_shardings(tree, mesh, rules=RULES):
  """NamedSharding for every leaf of `tree` (arrays or shapes). Scalars are replicated.

  Optimizer moments and the EMA hold the parameter's own path inside theirs, so one table serves the whole state.
  """

  def sharding(path, leaf):
    if not leaf.shape:
      return NamedSharding(mesh, P())
    return NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules))

  return jax.tree_util.tree_map_with_path(sharding, tree)
