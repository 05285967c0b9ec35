"""The state of a run: parameters, their moving average and the optimizer's moments, all float32."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stdit_jax.parallel.shardings import path_name


def init_shapes(objective: Any) -> tuple[Any, Any]:
  """(params, frozen) of an objective's `init` as shapes. Allocates nothing."""
  return jax.eval_shape(objective.init, jax.random.key(0))


def learning_rate(config: Any, start: int, steps: int) -> Callable:
  """The learning rate of a stage (group `optimizer`) as a function of the run's optimizer step, from `start` for `steps` steps.

  The warm-up is linear as in Open-Sora 1.2: lr * (k + 1) / (W + 1) for k < W, with k counted from the start of the stage. Then
  the rate is constant or follows a cosine, which is 0 at the end of the stage.
  """
  peak, warmup = config.learning_rate, config.warmup_steps

  def schedule(step):
    k = jnp.asarray(step - start, jnp.float32)
    rate = peak * jnp.minimum(1.0, (k + 1) / (warmup + 1))
    if config.schedule == "cosine":
      progress = jnp.clip((k - warmup) / max(steps - warmup, 1), 0.0, 1.0)
      rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return rate

  return schedule


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """Adam (arXiv 1412.6980, algorithm 1) without its learning rate, like `optax.scale_by_adam`.

  Every parameter has its own step count. So a parameter that a later stage adds starts with the full bias correction. `update`
  also takes `scales`, a tree of learning rate scales. The moments and the count of a parameter with scale 0.0 do not change, as
  in PyTorch, which skips parameters without a gradient.
  """

  def init(params):
    count, mu, nu = (jax.tree.map(f, params) for f in (lambda p: jnp.zeros((), jnp.int32), jnp.zeros_like, jnp.zeros_like))
    return optax.ScaleByAdamState(count, mu, nu)

  def update(updates, state, params=None, **extra):
    scales = extra["scales"]
    count = jax.tree.map(lambda n, s: n + 1 if s else n, state.count, scales)
    mu = jax.tree.map(lambda m, g, s: b1 * m + (1 - b1) * g if s else m, state.mu, updates, scales)
    nu = jax.tree.map(lambda v, g, s: b2 * v + (1 - b2) * g**2 if s else v, state.nu, updates, scales)

    def step(m, v, n, s):
      return m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps) if s else jnp.zeros_like(m)

    return jax.tree.map(step, mu, nu, count, scales), optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(config: Any) -> optax.GradientTransformationExtraArgs:
  """AdamW (decoupled weight decay) without its learning rate, for the group `optimizer` of the configuration.

  The update program multiplies by the learning rate, so all stages share one optimizer state. Open-Sora 1.2 uses betas
  (0.9, 0.999), eps 1e-15, no decay, and clipping at norm 1.
  """
  return optax.chain(scale_by_adam(config.b1, config.b2, config.eps), optax.add_decayed_weights(config.weight_decay))


def learning_rate_scales(params: Any, train: str, scales: Sequence = ()) -> Any:
  """The factor of the learning rate for every parameter, as a tree of floats. Frozen parameters have 0.0.

  Args:
    train: regular expression; a parameter trains if the expression matches a part of its name.
    scales: (regular expression, factor) pairs. The first match counts. The factor is 1.0 without a match.

  Raises:
    ValueError: an expression matches no parameter.
  """

  def scale(path, _):
    name = path_name(path)
    if not re.search(train, name):
      return 0.0
    return next((float(factor) for pattern, factor in scales if re.search(pattern, name)), 1.0)

  names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  for key, pattern in (("train", train), *(("optimizer.scales", pattern) for pattern, _ in scales)):
    if not any(re.search(pattern, name) for name in names):
      known = sorted({"/".join(name.split("/")[:2]) for name in names})
      raise ValueError(f"config: {key}={pattern!r} matches no parameter; there are {', '.join(known)}")
  return jax.tree_util.tree_map_with_path(scale, params)


def new_state(params: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
  """The state at step 0. The average starts as a copy of the parameters, as in Open-Sora."""
  # Weakly typed initial values would make every program trace again after the first update.
  params = jax.tree.map(lambda p: jax.lax.convert_element_type(p, p.dtype), params)
  return {"params": params, "ema": jax.tree.map(jnp.copy, params), "opt": optimizer.init(params)}


def state_shapes(param_shapes: Any, optimizer: optax.GradientTransformation) -> dict[str, Any]:
  """The state as shapes without shardings. Allocates nothing."""
  return jax.eval_shape(lambda p: new_state(p, optimizer), param_shapes)
