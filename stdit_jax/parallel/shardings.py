"""Where things lie on the mesh: rules for parameters, one layout per program for activations.

The optimizer state and the average follow the rules of the parameters by their paths.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

AnyMesh = Mesh | AbstractMesh
SMALL = 2**14  # values. `channels` does not split smaller arrays: together they have less than 0.3 % of an autoencoder's values
Tree = dict[str, Any]  # of arrays or shapes, such as parameters or a batch


def _parts(mesh, axes):
  """Parts into which mesh axes (one, several or None) split a dimension."""
  return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one program lays activations over the mesh. All programs have the same parameter shardings.

  With `split_tokens`, each device computes whole attentions, and XLA moves tokens between devices by all-to-all:

    * Attention over space or time: tokens are split over the other of the two (DSP, arXiv 2403.10266).
    * Joint attention over all tokens: heads are split, tokens are whole (Ulysses, arXiv 2309.14509).

  Attributes:
    mesh: of `mesh.make_mesh`.
    split_tokens: True: the `sequence` axis splits tokens (long clips). False: it also splits the batch (short clips).
    cudnn: a function to call instead of `attention.cudnn_kernel`, to compile programs on a machine without cuDNN.
  """

  mesh: Mesh
  split_tokens: bool = False
  cudnn: Callable | None = None

  @property
  def axes(self) -> dict:
    """{name of a dimension, as `constrain` takes it: mesh axes that split it}."""
    if self.split_tokens:
      axes = {"batch": ("data", "fsdp"), "tokens": "sequence", "heads": ("sequence", "tensor")}
    else:
      axes = {"batch": ("data", "fsdp", "sequence"), "tokens": None, "heads": "tensor"}
    return {None: None, "tensor": "tensor"} | axes

  def spec(self, *names: str | None) -> P:
    """PartitionSpec of dimensions named "batch", "tokens", "heads", "tensor" or None (not split)."""
    return P(*(self.axes[name] for name in names))

  def parts(self, name: str | None) -> int:
    """Parts into which a dimension of this name is split."""
    return _parts(self.mesh, self.axes[name])

  def sharding(self, *names: str | None) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(*names))

  @property
  def batch_parts(self) -> int:
    """Parts of a batch."""
    return self.parts("batch")

  def process_parts(self) -> tuple[int, ...]:
    """Indices, 0 to `batch_parts` - 1, of the parts of a batch that lie on devices of this process."""
    sizes = [n if axis in self.axes["batch"] else 1 for axis, n in self.mesh.shape.items()]
    numbers = np.broadcast_to(np.arange(self.batch_parts).reshape(sizes), self.mesh.devices.shape)
    own = [d.process_index == jax.process_index() for d in self.mesh.devices.flat]
    return tuple(int(n) for n in np.unique(numbers.reshape(-1)[own]))

  @property
  def token_parts(self) -> int:
    """Number of parts into which tokens or frames are split. Both are padded to a multiple of it."""
    return self.parts("tokens")


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """Description of an array: shape, dtype, and the names (of `Layout.axes`) of its leading dimensions."""

  shape: tuple[int, ...]
  dtype: DTypeLike = jnp.float32
  axes: tuple[str | None, ...] = ("batch",)

  @property
  def struct(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype as a ShapeDtypeStruct, without a sharding."""
    return jax.ShapeDtypeStruct(self.shape, self.dtype)


def constrain(x: Any, layout: Layout | None, *names: str | None) -> jax.Array:
  """Asks XLA to lay `x` out as `layout.spec(*names)`. Without a layout, returns `x`.

  The sharding carries its mesh: a constraint by names alone vanishes silently outside `jax.set_mesh`.
  """
  return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*names))


def gather_layer(params: Any, prefix: str, layout: Layout | None, dtype: DTypeLike, rules: Sequence) -> Any:
  """Casts to `dtype` the parameters of one layer that `fsdp` splits, then gathers them for the layer's matrix products.

  Called inside the loop over depth. Without this function XLA gathers float32, gathers all layers before the loop, or reduces
  gradients over all devices before it splits them.

  Args:
    params: tree of one layer, without the depth in front.
    prefix: name of the stack, for the `rules` of its parameters.
  """
  if layout is None:
    return params
  mesh = layout.mesh

  def gather(path, x):
    spec = spec_for(f"{prefix}/{path_name(path)}", (1, *x.shape), mesh, rules)[1:]
    whole = ["tensor" if axes in ("tensor", ("tensor", "fsdp")) else None for axes in spec]
    if P(*whole) == P(*spec):
      return x
    return _gather(x, NamedSharding(mesh, P(*spec)), NamedSharding(mesh, P(*whole)), dtype)

  return jax.tree_util.tree_map_with_path(gather, params)


def gather_whole(params: Any, layout: Layout | None, dtype: DTypeLike, rules: Sequence) -> Any:
  """Casts to `dtype` the parameters that `fsdp` splits, and gathers them. Each gradient is scattered as soon as it is computed.

  Without this function XLA may gather activations instead of the kernels of convolutions.
  """
  if layout is None or layout.mesh.shape["fsdp"] == 1:
    return params
  mesh = layout.mesh

  def gather(path, x):
    spec = spec_for(path_name(path), x.shape, mesh, rules)
    return _gather(x, NamedSharding(mesh, spec), NamedSharding(mesh, P()), dtype) if any(spec) else x

  return jax.tree_util.tree_map_with_path(gather, params)


def channels(dim: int) -> Callable[[tuple[int, ...]], P]:
  """For rules: `fsdp` splits the dimension `dim`, counted from the end, of arrays of `SMALL` or more values and any rank."""
  return lambda shape: P(*[None] * (len(shape) + dim), "fsdp") if math.prod(shape) >= SMALL else P()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x, split, whole, dtype):
  x = jax.lax.with_sharding_constraint(x.astype(dtype), split)
  return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(x, split, whole, dtype):
  return _gather(x, split, whole, dtype), jnp.zeros((0,), x.dtype)  # an empty array that carries the dtype


def _gather_backward(split, _whole, _dtype, like, gradient):
  return (jax.lax.with_sharding_constraint(gradient, split).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def path_name(path: tuple) -> str:
  """'params/spatial_blocks/mlp/fc1/kernel' of a jax key path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


# A rule is a pattern for the path and PartitionSpecs, or functions of the shape that return them (`channels`). The first spec
# that divides the shape counts.
# Every model file has its rules; these are for blocks as in layers.py and t5.py.
# Stacked blocks carry the depth in front. `fsdp` splits every large matrix along the rows, the feature side of its input, which
# is a multiple of 16 in all published sizes. A TPU scatters a bfloat16 gradient only in whole tiles of 16 rows or 128 columns.
# Otherwise it sums the gradient on all devices, at twice the bytes. Width 1152 makes whole tiles with fsdp=8, but not with 16.
# If `tensor` does not divide the heads, `layers.Linear` pads the heads, and their parameters are split along the features.
BLOCK_RULES = (
  (r"blocks/.*(qkv|key_value)/kernel$", P(None, "fsdp", None, "tensor"), P(None, ("fsdp", "tensor"))),
  (r"blocks/.*(query|key|value)/kernel$", P(None, "fsdp", "tensor"), P(None, ("fsdp", "tensor"))),
  (r"blocks/.*attention/out/kernel$", P(None, ("tensor", "fsdp")), P(None, None, None, ("fsdp", "tensor"))),
  (r"blocks/mlp/(fc1|gate|up)/kernel$", P(None, "fsdp", "tensor")),
  (r"blocks/mlp/(fc2|down)/kernel$", P(None, ("tensor", "fsdp"))),
  (r"blocks/.*(bias|norm/scale|modulation)$", P()),
)


def spec_for(name: str, shape: tuple[int, ...], mesh: AnyMesh, rules: Sequence) -> P:
  """PartitionSpec of the parameter `name` by the first rule that matches.

  Raises:
    ValueError: no rule matches, or a dimension does not divide.
  """
  specs = next((specs for pattern, *specs in rules if re.search(pattern, name)), None)
  if specs is None:
    raise ValueError(f"no sharding rule matches the parameter {name!r} of shape {shape}; add one to the rules of its model")
  choices: list[Any] = [spec(shape) if callable(spec) else spec for spec in specs]
  divides = lambda spec: all(shape[dim] % _parts(mesh, axes) == 0 for dim, axes in enumerate(spec))  # noqa: E731
  spec = next(filter(divides, choices), choices[-1])
  for dim, axes in enumerate(spec):
    if shape[dim] % (size := _parts(mesh, axes)):
      raise ValueError(
        f"parameter {name!r}: dimension {dim} of {shape} does not divide by the {size} devices of mesh axis {axes!r}; "
        f"choose sizes that divide {shape[dim]}"
      )
  return spec


def tree_shardings(tree: Any, mesh: AnyMesh, rules: Sequence) -> Any:
  """NamedSharding for every leaf of `tree` (arrays or shapes). Scalars are replicated.

  Paths of optimizer moments and of the average contain the parameter's own path, so one table serves the whole state.
  """

  def sharding(path, leaf):
    return NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules) if leaf.shape else P())

  return jax.tree_util.tree_map_with_path(sharding, tree)


def with_shardings(shapes: Any, mesh: AnyMesh | None, rules: Sequence) -> Any:
  """ShapeDtypeStructs with the shardings of `tree_shardings`. Without a mesh they lie on the first device of this process."""
  device = SingleDeviceSharding(jax.local_devices()[0])
  places = tree_shardings(shapes, mesh, rules) if mesh else jax.tree.map(lambda _: device, shapes)
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
