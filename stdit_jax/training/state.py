"""What a run carries from step to step: parameters, their moving average, the optimizer's moments. All float32."""

import re

import jax
import jax.numpy as jnp
import optax

from stdit_jax.parallel.shardings import path_name, tree_shardings


def init_shapes(objective):
  """(params, frozen) of an objective's `init` as shapes; nothing is allocated."""
  return jax.eval_shape(objective.init, jax.random.key(0))


def learning_rate(config, start, steps):
  """Learning rate as a function of the optimizer step of the whole run, for a stage of `steps` steps from `start`.

  Linear warm-up as in Open-Sora 1.2, lr * (k + 1) / (W + 1) while k < W, counted from the start of the stage; then
  constant, or a cosine down to 0 at its end.
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


def scale_by_adam(b1, b2, eps):
  """Adam (arXiv 1412.6980, algorithm 1) without its learning rate, as `optax.scale_by_adam`, with a count of steps for every
  parameter: the bias correction of one that comes in a later stage begins with it."""

  def init(params):
    count, mu, nu = (jax.tree.map(f, params) for f in (lambda p: jnp.zeros((), jnp.int32), jnp.zeros_like, jnp.zeros_like))
    return optax.ScaleByAdamState(count, mu, nu)

  def update(gradients, state, params=None):
    del params
    count = jax.tree.map(lambda n: n + 1, state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, gradients)
    steps = jax.tree.map(lambda m, v, n: m / (1 - b1**n) / (jnp.sqrt(v / (1 - b2**n)) + eps), mu, nu, count)
    return steps, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def make_optimizer(config):
  """AdamW without its learning rate: the update program multiplies by it, so that stages share one state.

  Adam with decoupled weight decay; Open-Sora 1.2 uses betas (0.9, 0.999), eps 1e-15, no decay, clipping at norm 1.
  """
  return optax.chain(scale_by_adam(config.b1, config.b2, config.eps), optax.add_decayed_weights(config.weight_decay))


def learning_rate_scales(params, train, scales=()):
  """Tree of floats: what the learning rate is multiplied by for every parameter, 0.0 for those that do not train.

  Args:
    train: regular expression, searched in parameter names: which parameters train.
    scales: (regular expression, factor) pairs; the first that matches counts, 1.0 without any.

  Raises:
    ValueError: an expression that matches no parameter.
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


def new_state(params, optimizer):
  """State of step 0: the average starts at the parameters, as Open-Sora copies them."""
  # Weakly typed initial values would make every program trace again after the first update.
  params = jax.tree.map(lambda p: jax.lax.convert_element_type(p, p.dtype), params)
  return {"params": params, "ema": jax.tree.map(jnp.copy, params), "opt": optimizer.init(params)}


def state_shapes(param_shapes, optimizer):
  """The state as shapes with shardings left out; nothing is allocated."""
  return jax.eval_shape(lambda p: new_state(p, optimizer), param_shapes)


def with_shardings(shapes, mesh, rules):
  """ShapeDtypeStructs that carry their NamedSharding: what checkpoints restore into."""
  shardings = tree_shardings(shapes, mesh, rules)
  return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
