"""Training autoencoders of images and videos: each term of the loss, the discriminator, and whole runs."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from configs import base, cogvideox_vae, open_sora_1_2_vae
from stdit_jax.autoencoders import discriminator, perceptual, temporal
from stdit_jax.autoencoders.latents import to_float
from stdit_jax.components import load_codec
from stdit_jax.convert import main as convert
from stdit_jax.diffusion.noise import Purpose
from stdit_jax.interop import CheckpointError, save_variables
from stdit_jax.parallel.mesh import AXES
from stdit_jax.training import checkpoints
from stdit_jax.training.autoencoding import AutoencoderObjective
from stdit_jax.training.stage_data import choose_splits
from stdit_jax.training.stages import make_stages
from tests.helpers import REFERENCE, relative_error, to_theirs
from tests.runs import Run
from tests.tiny_run import tiny_config

SMALL = {"features": 8, "layers": 2, "groups": 4}


def objective(name, **changes):
  config = base.get_config()
  config.task = "autoencoder"
  config.data.buckets = (("144p", 1, 1.0, 2),)
  config.autoencoder.update(name=name, crop=16, reconstruction="l2", kl_weight=0.5, discriminator=SMALL, **changes)
  return AutoencoderObjective(config)


def batch(frames, side=16):
  pixels = np.random.default_rng(frames).integers(0, 256, (2, frames, side, side, 3), np.uint8)
  return {
    "pixels": jnp.asarray(pixels), "weight": jnp.asarray([1.0, 3.0]), "sample_id": jnp.asarray([[0, 0], [0, 1]], jnp.uint32),
  }  # fmt: skip


def variables(one):
  """(params, frozen) with all parameters random, because parameters of 0 or 1 could hide an error."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(one.init, jax.random.key(0))
  return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.2), shapes)


def run_loss(one, params, frozen, data):
  return jax.jit(one.loss)(params, frozen, data)


@pytest.mark.parametrize(("name", "frames"), [("tiny-kl-f8", 2), ("tiny-temporal", 1), ("tiny-causal3d", 9)])
def test_terms_match_the_model(name, frames):
  """The expected reconstruction, KL, latent and identity terms come from the model's own call, with means instead of draws."""
  extra = {"latent_weight": 2.0, "identity_weight": 3.0} if name == "tiny-temporal" else {}
  one = objective(name, sample_posterior=False, **extra)
  data = batch(frames)
  params, frozen = variables(one)
  loss, values = run_loss(one, params, frozen, data)

  clips = to_float(data["pixels"])
  x = clips.reshape(-1, *clips.shape[2:]) if name == "tiny-kl-f8" else clips
  model = {"params": params["autoencoder"]}
  made, mean, logvar = jax.jit(one.model.apply)(model, x)
  made, mean, logvar = (
    np.asarray(m, np.float64).reshape(2, frames if m is made else -1, *m.shape[-3:]) for m in (made, mean, logvar)
  )
  kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2, 3, 4))
  error = np.square(made - np.asarray(clips)).mean((1, 2, 3, 4))
  np.testing.assert_allclose(values["reconstruction"], error, rtol=2e-5)
  np.testing.assert_allclose(values["kl"], kl / mean[0].size, rtol=2e-5)
  expected = error + 0.5 * kl / clips[0].size
  if extra:
    image = one.model.apply(model, clips, method="image_latents")
    again = one.model.apply(model, mean.astype(np.float32), 1, method="decode_latents")
    latent, identity = (np.abs(np.asarray(a) - np.asarray(image)).mean((1, 2, 3, 4)) for a in (again, mean))
    expected = expected + 2 * latent + 3 * identity
  np.testing.assert_allclose(loss, expected, rtol=2e-5)


def test_terms_of_latents_decode_no_pixels():
  """In Open-Sora's first stages the image decoder gets no gradient."""
  one = objective("tiny-temporal", latent_weight=1.0, reconstruction_weight=0.0)
  one.weights["kl"] = 0.0
  params, frozen = variables(one)
  gradients = jax.jit(jax.grad(lambda p: one.loss(p, frozen, batch(17))[0].sum()))(params)["autoencoder"]
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients["image"]["decoder"]))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients["temporal"]))
  assert "squared_error" not in one.loss(params, frozen, batch(1))[1]


def test_noise_belongs_to_the_sample():
  """Noise of a sample does not depend on the batch. The noise of image latents is different noise."""
  one = objective("tiny-temporal", latent_weight=1.0)
  params, frozen = variables(one)
  data = batch(1)
  loss, _ = run_loss(one, params, frozen, data)
  turned, _ = run_loss(one, params, frozen, {name: value[::-1] for name, value in data.items()})
  np.testing.assert_allclose(loss, turned[::-1], rtol=1e-5)
  first, second = (one._noise(data, number, 1) for number in (0, 1))
  assert np.abs(first - second).max() > 0.1


class TorchDiscriminator(torch.nn.Module):
  """The discriminator in PyTorch with the same parameters."""

  def __init__(self, params, layers):
    super().__init__()
    self.params, self.layers = params, layers

  def forward(self, x):
    def conv(name, x, stride):
      kernel = torch.from_numpy(np.asarray(self.params[name]["kernel"]).transpose(4, 3, 0, 1, 2).copy())
      bias = torch.from_numpy(np.array(self.params[name]["bias"])) if "bias" in self.params[name] else None
      x = torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1) if stride == 2 else (1, 2, 1, 2, 1, 1))
      return torch.nn.functional.conv3d(x, kernel, bias, stride)

    x = torch.nn.functional.leaky_relu(conv("conv_0", x, 2), 0.2)
    for i in range(1, self.layers + 1):
      norm = {k: torch.from_numpy(np.array(v)) for k, v in self.params[f"norm_{i}"].items()}
      x = conv(f"conv_{i}", x, 2 if i < self.layers else 1)
      x = torch.nn.functional.group_norm(x, SMALL["groups"], norm["scale"], norm["bias"], 1e-5)
      x = torch.nn.functional.leaky_relu(x, 0.2)
    return conv("conv_out", x, 1)[:, 0]


def test_perceptual_distance_draws_the_same_frames_of_both_clips():
  """Each sample draws its own frames."""
  one, purpose = objective("tiny-kl-f8"), Purpose.PERCEPTUAL_FRAMES
  numbers = jnp.broadcast_to(jnp.arange(9.0)[None, :, None, None, None], (4, 9, 1, 1, 1))
  batch = {"sample_id": np.asarray([[0, i] for i in range(4)], np.uint32)}
  a, b = (np.asarray(part)[..., 0, 0, 0] for part in one._some_frames(3, purpose, batch, numbers, 10 * numbers))
  np.testing.assert_array_equal(b, 10 * a)
  assert all(len(set(row)) == 3 for row in a.tolist())
  assert len({tuple(row) for row in a.tolist()}) > 1
  for count in (0, 9):
    assert one._some_frames(count, purpose, batch, numbers)[0] is numbers


def test_pixel_frames_are_random_frames_of_the_clip():
  """Decoded frames equal those of the whole clip, latent terms use the whole clip, and every frame is drawn sometimes."""
  every, some = (objective("tiny-temporal", sample_posterior=False, pixel_frames=count) for count in (0, 2))
  every.weights["kl"] = some.weights["kl"] = 0.0
  params, frozen = variables(every)
  clips = to_float(batch(5)["pixels"])
  made, _, _ = jax.jit(every.model.apply)({"params": params["autoencoder"]}, clips)
  of_frames = np.square(np.asarray(made) - np.asarray(clips)).mean((2, 3, 4))
  seen = []
  run = jax.jit(some.loss)
  for i in range(20):
    loss, values = run(params, frozen, batch(5) | {"sample_id": jnp.asarray([[i, 0], [i, 1]], jnp.uint32)})
    for sample in range(2):
      pairs = {pair: of_frames[sample, list(pair)].mean() for pair in itertools.combinations(range(5), 2)}
      pair = min(pairs, key=lambda pair: abs(pairs[pair] - loss[sample]))
      np.testing.assert_allclose(loss[sample], pairs[pair], rtol=2e-5)
      seen += pair
  assert set(seen) == set(range(5))
  np.testing.assert_allclose(values["latent"], run_loss(every, params, frozen, batch(5))[1]["latent"], rtol=2e-5)


@pytest.mark.parametrize("frames", [1, 5])
def test_discriminator_matches_pytorch(frames):
  one = objective("tiny-kl-f8", adversarial_weight=1.0)
  params = variables(one)[0]["discriminator"]
  x = np.random.default_rng(1).standard_normal((2, frames, 24, 16, 3), np.float32)
  ours = jax.jit(one.discriminator.apply)({"params": params}, x)
  with torch.no_grad():
    theirs = TorchDiscriminator(params, SMALL["layers"])(torch.from_numpy(to_theirs(x).copy()))
  assert relative_error(ours, theirs.numpy()) < 1e-5
  real, fake = np.asarray([[0.5, 2.0]]), np.asarray([[-3.0, 0.5]])
  np.testing.assert_allclose(discriminator.hinge_loss(real, fake), [0.5 * (0.25 + 0.75)])
  np.testing.assert_allclose(discriminator.generator_loss(fake), [1.25])


def test_each_network_gets_the_gradient_of_its_terms():
  """The autoencoder gets the gradients of reconstruction and adversarial term, weighted to equal length at its last layer. The
  discriminator gets the gradient of the hinge loss alone."""
  one = objective("tiny-kl-f8", adversarial_weight=0.7)
  params, frozen = variables(one)
  data = batch(1)
  share = np.asarray(data["weight"]) / 4
  clips = to_float(data["pixels"])

  def terms(params):
    rest, _, made = one._terms(params["autoencoder"], frozen, data, None)
    pixels = one._pixel_terms(frozen, made["pixels"], clips, data, None)[0]
    score = lambda x: one._score(params["discriminator"], x, None)  # noqa: E731
    adversarial = discriminator.generator_loss(score(made["pixels"]))
    hinge = discriminator.hinge_loss(score(clips), score(made["pixels"]))
    return [jnp.sum(share * term) for term in (rest, pixels, adversarial, hinge)]

  whole = jax.jit(jax.grad(lambda p: jnp.sum(share * one.loss(p, frozen, data)[0])))(params)
  rest, pixels, adversarial, hinge = jax.jit(jax.jacrev(terms))(params)
  last = lambda tree: jax.tree.leaves(tree["autoencoder"]["decoder"]["conv_out"])  # noqa: E731
  norm = lambda leaves: np.sqrt(sum(np.square(leaf).sum() for leaf in leaves))  # noqa: E731
  weight = 0.7 * norm(last(pixels)) / (norm(last(adversarial)) + 1e-4)
  assert weight > 0
  for path, got in jax.tree_util.tree_leaves_with_path(whole["autoencoder"]):
    of = lambda tree, path=path: np.asarray(at(tree["autoencoder"], path))  # noqa: E731
    expected = of(rest) + weight * of(adversarial)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-5 * max(np.abs(expected).max(), 1e-2))
  for got, expected in zip(jax.tree.leaves(whole["discriminator"]), jax.tree.leaves(hinge["discriminator"])):
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())


def at(tree, path):
  for part in path:
    tree = tree[part.key]
  return tree


@pytest.fixture
def trunk(tmp_path_factory, monkeypatch):
  """A file of random weights with torchvision's names, for a VGG16 with four channels in each layer."""
  monkeypatch.setattr(perceptual, "BLOCKS", tuple((count, 4) for count, _ in perceptual.BLOCKS))
  rng, tensors = np.random.default_rng(0), {}
  for number, (_, _, before, after) in zip(perceptual.NUMBERS, perceptual._convolutions()):
    tensors[f"features.{number}.weight"] = rng.standard_normal((after, before, 3, 3), np.float32) * (2 / before / 9) ** 0.5
    tensors[f"features.{number}.bias"] = np.zeros(after, np.float32)
  path = tmp_path_factory.mktemp("trunk") / "vgg16.safetensors"
  save_file(tensors, path)
  return path


A_FILE = str(REFERENCE / "vae_temporal_tiny.safetensors")


def run_config(assets, output, **changes):
  settings = {
    "task": "autoencoder", "autoencoder__crop": 16, "data__captions": "optional", "autoencoder__discriminator": SMALL,
    "autoencoder__weights": "",
  }  # fmt: skip
  return tiny_config(assets, output, **{**settings, **changes})


def test_video_autoencoder_trains_in_stages(assets, trunk, tmp_path, capsys):
  """The first stage trains the temporal part on image latents, with given weights of the image autoencoder. The second stage
  trains all on pixels, with the perceptual and the adversarial term. The checkpoint is read again, and is exported
  with the original's names.
  """
  stages = (
    {"name": "latents", "steps": 1, "train": "^autoencoder/temporal", "autoencoder.latent_weight": 1.0,
     "autoencoder.reconstruction_weight": 0.0, "autoencoder.kl_weight": 0.0},
    {"name": "pixels", "steps": 2, "autoencoder.perceptual_weight": 0.1, "autoencoder.adversarial_weight": 0.5},
  )  # fmt: skip
  changes = {
    "autoencoder__name": "tiny-temporal",
    "autoencoder__fields": {"channel_multipliers": (1, 1), "temporal_downsample": (True,)},
    "autoencoder__image_weights": str(assets / "autoencoder.safetensors"),
    "autoencoder__perceptual": {"name": "hed-vgg16", "weights": str(trunk), "sha256": "", "frames": 2},
    "data__buckets": (("64p", 5, 1.0, 2),), "checkpoint_every": 1, "stages": stages,
  }  # fmt: skip
  whole = Run(run_config(assets, tmp_path / "run", **changes))
  begun, _, _ = started = whole.start()
  image = jax.tree.map(np.asarray, begun["params"]["autoencoder"]["image"])
  whole.train(started=started)
  said = capsys.readouterr().out
  assert "stage 'pixels' changes the model; kept: autoencoder/*; new: discriminator/*, perceptual/*" in said
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  always, pixels = {"latent", "kl"}, {"reconstruction", "squared_error", "perceptual", "adversarial", "discriminator"}
  for line, own, not_yet in zip(lines, (always, always | pixels), (pixels, set())):
    assert own <= line.keys()
    assert not not_yet & line.keys()
    assert all(np.isfinite(line[name]) and line[name] != 0 for name in own)

  of_stage, _, _ = checkpoints.load_weights(str(tmp_path / "run"), "params", 1)
  for a, b in zip(jax.tree.leaves(of_stage["autoencoder"]["image"]), jax.tree.leaves(image)):
    assert np.array_equal(a, b)  # not trained in the first stage
  loaded = load_file(assets / "autoencoder.safetensors")
  kernel = loaded["encoder.conv_in.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(image["encoder"]["conv_in"]["kernel"], kernel)

  final, constants, _ = checkpoints.load_weights(str(tmp_path / "run"), "params")
  assert not constants  # the trunk is in no checkpoint
  resumed, _, step = Run(run_config(assets, tmp_path / "run", **changes)).start()  # tests.long.kills resumes such runs
  assert step == 3
  jax.tree.map(np.testing.assert_array_equal, resumed["params"], final)

  convert(["--input", str(tmp_path / "run"), "--item", "params", "--output", str(tmp_path / "vae.safetensors")])
  exported = load_file(tmp_path / "vae.safetensors")
  assert any(name.startswith("spatial_vae.module.decoder") for name in exported)
  kernel = final["autoencoder"]["temporal"]["decoder"]["conv_out"]["conv"]["kernel"]
  np.testing.assert_array_equal(exported["temporal_vae.decoder.conv_out.conv.weight"], np.transpose(kernel, (4, 3, 0, 1, 2)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"autoencoder__latent_weight": 1.0}, "latent_weight is 1.0, but 'tiny-kl-f8' has no image autoencoder"),
    ({"autoencoder__perceptual_weight": -1.0}, "perceptual_weight is -1.0; allowed: a number of at least 0"),
    ({"autoencoder__perceptual_weight": 1.0}, "perceptual.weights is empty; .*stdit_jax.interop.fetch hed-vgg16"),
    ({"autoencoder__discriminator": {"feature": 3}}, "discriminator: unknown field 'feature'; allowed: features"),
    ({"autoencoder__name": "tiny-causal3d", "data__buckets": (("144p", 4, 1.0, 2),)}, "clips of 4 frames for .tiny-causal3d"),
    ({"autoencoder__reconstruction_weight": 0.0, "autoencoder__kl_weight": 0.0}, "all weights of the autoencoder's loss are 0"),
    ({"autoencoder__pixel_frames": 2}, "pixel_frames is 2, but 'tiny-kl-f8' decodes all frames together"),
    ({"autoencoder__pixel_frames": -1}, "pixel_frames is -1; allowed"),
    ({"autoencoder__perceptual__frames": -3}, "perceptual.frames is -3; allowed"),
    ({"autoencoder__name": "tiny-temporal", "autoencoder__pixel_frames": 2, "autoencoder__adversarial_weight": 1.0},
     "discriminator needs whole clips"),
    ({"autoencoder__image_weights": "/no/file"}, "image_weights is '/no/file', but"),
    ({"autoencoder__name": "tiny-temporal", "autoencoder__latent_weight": 1.0}, "autoencoder, whose weights would be random"),
    ({"autoencoder__name": "tiny-temporal", "autoencoder__identity_weight": 1.0}, "identity_weight compares with latents"),
    ({"autoencoder__name": "tiny-temporal", "autoencoder__image_weights": "a", "init": A_FILE}, "set only one of the two"),
    ({"autoencoder__perceptual_weight": 1.0, "autoencoder__crop": 8}, "autoencoder.crop is 8; the perceptual distance needs"),
    ({"autoencoder__adversarial_weight": 1.0, "autoencoder__reconstruction_weight": 0.0}, "so the term would be 0"),
    ({"autoencoder__adversarial_weight": 1.0, "autoencoder__discriminator": {"layers": 7}}, "7 layers of the discriminator"),
    ({"autoencoder__adversarial_weight": 1.0, "train": "^autoencoder/"}, "excludes the discriminator, so it would stay"),
    ({"max_tokens_per_device": 100}, "'tiny': max_tokens_per_device is 100, but autoencoders train on pixels"),
  ],
)  # fmt: skip
def test_wrong_configurations_are_refused(assets, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    Run(run_config(assets, tmp_path / "run", **changes))
  assert not pathlib.Path(tmp_path / "run").exists()


def test_wrong_trunk_of_a_later_stage_is_refused_at_the_start(assets, trunk, tmp_path):
  stages = ({"name": "first", "steps": 1}, {"name": "second", "steps": 1, "autoencoder.perceptual_weight": 1.0})
  for own, message in (({"sha256": "0" * 64}, "has the SHA-256 .*, not 000"), ({"name": "vgg16"}, "unknown trunk 'vgg16'")):
    own = {"name": "hed-vgg16", "weights": str(trunk), "frames": 0, "sha256": "", **own}
    with pytest.raises(ValueError, match=message):
      Run(run_config(assets, tmp_path / "run", stages=stages, autoencoder__perceptual=own))


@pytest.mark.parametrize("layout", temporal.FAMILY.layouts)
def test_weights_load_from_every_layout_with_another_shift(assets, tmp_path, layout):
  """Training may start from weights with another shift. A codec must be configured with the shift of the weights."""
  config = temporal.get_config("tiny-temporal", shift=(1.0, 2.0, 3.0, 4.0))
  variables = temporal.init(temporal.build(config), jax.random.key(3))
  path = str(tmp_path / "some.safetensors")
  save_variables(path, layout, variables, config=config)
  run = Run(run_config(assets, tmp_path / "run", autoencoder__name="tiny-temporal", init=path))
  (state, _, _) = run.start()
  jax.tree.map(np.testing.assert_array_equal, state["params"]["autoencoder"], variables["params"])
  own = base.get_config().autoencoder
  own.update(name="tiny-temporal", weights=path)
  if layout == "open-sora-vae":  # our own layout does not store shift and scale
    with pytest.raises(CheckpointError, match=r"'shift' \(1, 2, 3, 4\) differs from .*fields\.shift"):
      load_codec(own)
  own.fields = {"shift": (1.0, 2.0, 3.0, 4.0)}
  jax.tree.map(np.testing.assert_array_equal, load_codec(own).variables, variables)


@pytest.mark.parametrize(("name", "frames"), [("tiny-kl-f8", 2)])
def test_remat_stores_less_and_keeps_the_gradients(name, frames):
  """`python -m tests.long.remat` also tests the video autoencoders."""
  kept, gradients, data = [], [], batch(frames)
  for remat in (False, True):
    one = objective(name, fields={"remat": remat})
    params, frozen = variables(one)
    _, pull = jax.jit(lambda p, one=one, frozen=frozen: jax.vjp(lambda p: one.loss(p, frozen, data)[0].sum(), p))(params)
    kept.append(sum(x.nbytes for x in jax.tree.leaves(pull)))
    gradients.append(jax.tree.leaves(jax.jit(lambda pull: pull(jnp.float32(1))[0])(pull)))
  assert kept[1] < 0.6 * kept[0]
  largest = max(np.abs(g).max() for g in gradients[0])
  for ours, theirs in zip(*gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * largest)


def test_clip_smaller_than_the_crop_is_masked_out(assets, tmp_path, caplog):
  """It does not end the run, and it does not change the other samples. One warning names it."""
  run = Run(run_config(assets, tmp_path / "run"))
  make_batch = run.maker()
  with run.parts[0].data.loader(0) as steps:
    loaded = next(steps)
  whole = make_batch(loaded)
  small = dataclasses.replace(loaded.samples[0], pixels=loaded.samples[0].pixels[:, :12])
  for _ in range(2):
    batch = make_batch(dataclasses.replace(loaded, samples=[small, *loaded.samples[1:]]))
  assert batch["weight"].tolist() == [0.0, *whole["weight"].tolist()[1:]]
  assert not np.asarray(batch["pixels"])[0].any()
  np.testing.assert_array_equal(batch["pixels"][1:], whole["pixels"][1:])
  assert [m for m in caplog.messages if "crop" in m] == [
    f"skipped {small.path}: autoencoder.crop=16 does not fit into its 12 x {small.pixels.shape[2]} pixels"
  ]


def test_crop_larger_than_a_bucket_is_refused_at_the_start(assets, tmp_path):
  with pytest.raises(ValueError, match="crop is 152, but there are clips of 144 x 256 pixels in 144p; take at most 144"):
    Run(run_config(assets, tmp_path / "run", autoencoder__crop=152, data__buckets=(("144p", 1, 1.0, 2),)))


@pytest.mark.parametrize("module", [open_sora_1_2_vae, cogvideox_vae])
def test_recipes_can_be_trained(module):
  """The objective accepts every stage of the recipes. Nothing is allocated."""
  config = module.get_config()
  config.data.tables = (("videos.parquet", 1),)
  for stage in make_stages(config):
    one = AutoencoderObjective(stage.config)
    params, frozen = jax.eval_shape(one.init, jax.random.key(0))
    assert ("discriminator" in params) == (stage.name in ("adversary", "long"))
    assert ("perceptual" in frozen) == (stage.config.autoencoder.perceptual_weight > 0)
  if module is cogvideox_vae:  # long clips of the last stage are split over the `sequence` axis, short clips over the batch
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 1), AXES)
    splits = choose_splits(stage, stage.config.data.parsed_buckets(), mesh, one)
    assert {frames: split.layout.split_tokens for (_, frames), split in splits.items()} == {161: True, 17: False, 1: False}
