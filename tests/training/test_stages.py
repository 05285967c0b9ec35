"""Stages that change the model: kept and new arrays, resuming at any step, and the recipes of Open-Sora."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import open_sora_1_1, open_sora_1_2
from stdit_jax import convert, loading, plan, sample
from stdit_jax.diffusion.iddpm import IDDPM
from stdit_jax.diffusion.rectified_flow import RectifiedFlow
from stdit_jax.interop.safetensors_io import open_checkpoint
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.run_samples import Sampler
from stdit_jax.training import transition
from stdit_jax.training.checkpoints import from_plain, plain
from stdit_jax.training.objectives import DenoiserObjective
from stdit_jax.training.stages import make_stages
from stdit_jax.training.state import make_optimizer, new_state
from tests import denoisers
from tests.runs import Run
from tests.tiny_run import frozen_text, run_module, small_autoencoder, tiny_config
from tests.training.test_resume import assert_same_bits, metrics

IMAGES = {"data.buckets": (("64p", 1, 1.0, 2),)}
STAGES = (
  {"name": "images", "steps": 2, "model.fields.temporal_blocks": False, "model.fields.qk_norm": False,
   "diffusion": {"name": "iddpm", "fields": {}}, **IMAGES},
  {"name": "norms", "steps": 2, "keep_optimizer": False, "model.fields.temporal_blocks": False, **IMAGES},
  {"name": "clips", "steps": 2, "autoencoder.fields": {"scale": 2.0}, "data.buckets": (("64p", 4, 1.0, 2),)},
)  # fmt: skip
SETTINGS = {
  "checkpoint_every": 1, "keep_checkpoints": 9, "sample_every": 4, "sample__resolution": "64p", "sample__num_frames": 1,
  "sample__steps": 1,
}  # fmt: skip


def make_run(assets, output, stages=STAGES):
  return Run(tiny_config(assets, output, stages=stages, **SETTINGS, **frozen_text(assets, "step")))


@pytest.fixture(scope="module")
def alone(assets, tmp_path_factory):
  """(folder, run) of an undisturbed run of the three stages."""
  run = make_run(assets, tmp_path_factory.mktemp("stages") / "alone")
  run.beat = lambda what, **_: run.activities.append(what)
  run.activities = []
  run.train(Sampler(run))
  return pathlib.Path(run.config.output), run


def resumed(assets, alone, folder, step):
  """A run in a copy of `alone` with the checkpoints up to `step`."""
  shutil.copytree(alone, folder)
  for path in (folder / "checkpoints").iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  return make_run(assets, folder)


def test_each_stage_has_its_programs_and_samples(alone):
  folder, run = alone
  counts = {name: n for name, n in run.counter.counts.items() if "encode" not in name}
  assert counts == {"update": 3, "gradient 64p x 1": 2, "gradient 64p x 4": 1}
  assert {name.partition(" ")[0] for name in run.counter.counts if "encode" in name} == {"images:", "clips:"}
  assert sorted(p.stem for p in (folder / "samples").glob("*.json")) == ["step0000004-0", "step0000006-0"]


def test_stages_with_the_same_data_have_their_own_order_and_noise(assets, tmp_path):
  """Order and noise depend on the name of the stage, not on earlier stages. All stages have the same validation."""

  def samples(run, number):
    with run.parts[number].data.loader(0) as rows:
      return [(s.sample_id, s.path) for step in (next(rows) for _ in range(6)) for s in step.samples]

  validation = {"tables": (str(assets / "table.csv"),), "every": 4, "samples_per_bucket": 2, "timesteps": 2}
  first, second = {"name": "first", "steps": 4}, {"name": "second", "steps": 4}
  settings = {**small_autoencoder(), "validation": validation}
  both, alone = (Run(tiny_config(assets, tmp_path / name, stages=stages, **settings))
                 for name, stages in (("both", (first, second)), ("alone", (second,))))  # fmt: skip
  a, b = samples(both, 0), samples(both, 1)
  assert samples(alone, 0) == b
  assert not {sample_id for sample_id, _ in a} & {sample_id for sample_id, _ in b}  # keys of all noise
  assert [path for _, path in a] != [path for _, path in b]
  assert {path for _, path in a} == {path for _, path in b}
  fixed = [parts.validation.data.identity for parts in both.parts]
  assert fixed[0] == fixed[1]


def test_the_next_stage_is_lowered_during_the_last_part_of_a_stage(alone):
  """The loop lowers the next stage's programs before the last checkpoint of a stage, so that they compile during training."""
  _, run = alone
  for stage, last in (("norms", 2), ("clips", 4)):
    assert run.activities.index(f"lowering {stage}: update") < run.activities.index(f"step {last}: saving"), run.activities


def test_ends_of_stages_and_every_nth_step_stay(assets, tmp_path):
  """Stage "rare" saves at step 2 for `keep_every`, and at its end. Stage "often" saves every step and keeps the newest."""
  stages = tuple({"name": name, "steps": steps, "checkpoint_every": every}
                 for name, steps, every in (("rare", 3, 100), ("often", 4, 1)))  # fmt: skip
  run = Run(tiny_config(assets, tmp_path / "run", stages=stages, keep_checkpoints=1, keep_every=2, **small_autoencoder()))
  run.train()
  assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [2, 3, 4, 6, 7]


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_resumes_within_a_stage_and_at_a_model_change(assets, alone, tmp_path, step):
  folder, _ = alone
  resumed(assets, folder, tmp_path / "run", step).train()
  assert_same_bits(folder, tmp_path / "run", 6)
  assert metrics(tmp_path / "run") == metrics(folder)


def entered(run):
  """Resumes a run at the start of a stage: (stage, state and frozen before it, state and frozen in it), all NumPy."""
  state, frozen, step = run.start()
  parts = next(p for p in run.parts if p.stage.start == step)
  before = jax.tree.map(np.asarray, (state, frozen))
  return parts.stage, *before, *jax.tree.map(np.asarray, run.restarts.enter(parts, state, frozen, step))


def test_new_norms_leave_all_other_arrays_unchanged(assets, alone, tmp_path, capsys):
  stage, state, frozen, new, new_frozen = entered(resumed(assets, alone[0], tmp_path / "run", 2))
  assert stage.name == "norms"
  said = capsys.readouterr().out
  assert "stage 'norms' changes the model; kept: " in said
  norms = [f"denoiser/spatial_blocks/attention/{name}/*" for name in ("key_norm", "query_norm")]
  assert f"; new: {', '.join(norms)}; dropped: nothing" in said
  before, after = transition.by_name(state["params"]), transition.by_name(new["params"])
  assert all(np.array_equal(after[name], value) for name, value in before.items())
  assert sorted(after.keys() - before.keys()) == [name.replace("*", "scale") for name in norms]
  assert all((after[name] == 1).all() for name in after.keys() - before.keys())
  # The optimizer and the average are fresh, since keep_optimizer=False.
  assert not any(leaf.any() for leaf in jax.tree.leaves(new["opt"]))
  jax.tree.map(np.testing.assert_array_equal, new["ema"], new["params"])
  assert not all(map(np.array_equal, *map(jax.tree.leaves, (state["ema"], state["params"]))))
  jax.tree.map(np.testing.assert_array_equal, new_frozen, frozen)


def test_new_temporal_blocks_change_no_image_and_keep_old_moments(assets, alone, tmp_path):
  run = resumed(assets, alone[0], tmp_path / "run", 4)
  stage, state, frozen, new, new_frozen = entered(run)
  assert stage.name == "clips"
  before, after = transition.by_name(state["opt"]), transition.by_name(new["opt"])
  assert all(np.array_equal(after[name], value) for name, value in before.items())
  assert {int(after[name]) for name in before if name.startswith("0/count/")} == {2}
  assert all("/temporal_blocks/" in name and not after[name].any() for name in after.keys() - before.keys())
  fresh, average = (transition.by_name(new[item]["denoiser"]["temporal_blocks"]) for item in ("params", "ema"))
  assert all(np.array_equal(fresh[name], average[name]) for name in fresh)
  assert fresh["attention/qkv/kernel"].std() > 0
  assert not fresh["attention/out/kernel"].any()

  with run.parts[1].data.loader(0) as rows:
    batch = run.maker(1)(next(iter(rows)))
  old_loss, _ = jax.jit(run.parts[1].objective.loss)(state["params"], frozen, batch)
  new_loss, _ = jax.jit(run.parts[2].objective.loss)(new["params"], new_frozen, batch)
  np.testing.assert_allclose(new_loss, old_loss, rtol=1e-6)


def test_a_checkpoint_is_read_with_the_model_of_its_stage(assets, alone, tmp_path):
  folder, _ = alone
  for step, temporal, diffusion in ((2, False, IDDPM), (4, False, RectifiedFlow), (5, True, RectifiedFlow)):
    arguments = ["--run", str(folder), "--step", str(step), "--prompt", "x"]
    settings = sample.parse(arguments)
    pipeline = loading.load_pipeline(settings, *loading.read_model(settings))
    assert pipeline.model.config.temporal_blocks == temporal
    assert isinstance(pipeline.diffusion, diffusion)
    shapes = denoisers.init_shapes(pipeline.model.config)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), dict(pipeline.variables), shapes)
  run = resumed(assets, folder, tmp_path / "run", 4)
  for output, temporal in ((folder, True), (run.config.output, False)):
    convert.main(["--input", str(output), "--output", str(tmp_path / f"{temporal}.safetensors")])
    names = open_checkpoint(tmp_path / f"{temporal}.safetensors").tensors
    assert any(name.startswith("temporal_blocks.") for name in names) == temporal
    assert any(name.startswith("spatial_blocks.0.attn.q_norm") for name in names)


def test_changed_stages_before_the_checkpoint_are_refused(assets, alone, tmp_path):
  folder = tmp_path / "run"
  resumed(assets, alone[0], folder, 3)

  def started(*stages):
    return make_run(assets, folder, stages).start()[2]

  images, norms, clips = STAGES
  with pytest.raises(ValueError, match=r"another run: model.fields.qk_norm differs in stage 'norms'; give another output"):
    started(images, {**norms, "model.fields.qk_norm": False}, clips)
  with pytest.raises(ValueError, match=r"checkpoint 3 belongs to stage 'images', but another model made it"):
    started({**images, "steps": 4}, norms, clips)
  assert not (folder / "set-aside").exists()
  assert started(images, norms, {**clips, "name": "others", "model.fields.depth": 2}) == 3
  with pytest.raises(ValueError, match=r"config: stage 'norms': unknown field 'dept'|config: stage 'norms': denoiser .*'dept'"):
    started(images, {**norms, "model.fields.dept": 2}, clips)
  with pytest.raises(ValueError, match="stage 'norms' changes autoencoder, which belongs to the whole run"):
    started(images, {**norms, "autoencoder": {"dtype": "bfloat16"}}, clips)


def test_stacks_and_null_captions_change_their_length(assets, tmp_path):
  """One stage adds a layer and four text tokens, the next one removes them."""
  longer = {"model.fields.depth": 2, "model.fields.model_max_length": 20, "text_encoder.max_length": 20}
  short, long = make_stages(
    tiny_config(assets, tmp_path, stages=({"name": "short", "steps": 1}, {"name": "long", "steps": 1, **longer}))
  )
  mesh, optimizer = make_mesh({"data": 1}), make_optimizer(short.config.optimizer)
  objectives = [DenoiserObjective(stage.config) for stage in (short, long)]
  params, frozen = jax.jit(objectives[0].init)(jax.random.key(0))
  state = new_state(params, optimizer)
  state["opt"] = jax.tree.map(lambda x: x + 1, state["opt"])
  grown, frozen_grown = transition.change_model(objectives[1], optimizer, mesh, jax.random.key(1), state, frozen)
  said = transition.describe(
    *(transition.by_name(*trees) for trees in ((params, frozen), (grown["params"], frozen_grown))), objectives[0].resizable
  )
  assert "; resized: denoiser/null_caption, denoiser/spatial_blocks/*, denoiser/temporal_blocks/*; new: nothing" in said

  name = "denoiser/spatial_blocks/mlp/fc1/kernel"
  before, after = transition.by_name(params)[name], transition.by_name(grown["params"])[name]
  np.testing.assert_array_equal(after[:1], before)
  assert 0.5 < after[1].std() / before[0].std() < 2
  moments = transition.by_name(grown["opt"])
  assert not moments[f"0/mu/{name}"].any()
  assert moments[f"0/count/{name}"] == 0
  assert moments["0/count/denoiser/patch_embed/kernel"] == 1
  caption = frozen_grown["denoiser"]["null_caption"]
  np.testing.assert_array_equal(caption[:16], frozen["denoiser"]["null_caption"])
  np.testing.assert_array_equal(caption[16:], np.repeat(caption[15:16], 4, axis=0))
  back, frozen_back = transition.change_model(objectives[0], optimizer, mesh, jax.random.key(2), grown, frozen_grown)
  jax.tree.map(np.testing.assert_array_equal, (back["params"], back["ema"], frozen_back), (params, params, frozen))


# ---------------------------------------------------------------------------------------------------------------- recipes

# Name of a stage: (steps, programs, what is new in its model)
RECIPES = {
  open_sora_1_1: {
    "images": (6_000, 5, None),
    "stage1a": (24_000, 25, None),
    "stage1b": (40_000, 11, "denoiser/fps_embed/*"),
    "stage1c": (17_000, 11, "query_norm"),
    "stage2": (22_000, 25, None),
    "stage3": (4_000, 33, None),
  },
  open_sora_1_2: {
    "images": (20_000, 10, None),
    "qk_norm": (18_000, 10, "query_norm"),
    "rectified_flow": (10_000, 10, None),
    "timesteps": (33_000, 10, None),
    "epsilon": (8_000, 10, None),
    "autoencoder": (25_000, 10, "denoiser/fps_embed/*"),
    "temporal_blocks": (3_000, 10, "denoiser/temporal_blocks/*"),
    "videos": (38_000, 22, None),
    "stage1": (30_000, 26, None),
    "stage2": (23_000, 35, None),
    "stage3": (15_000, 37, None),
  },
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda module: module.__name__)
def test_recipes_of_open_sora_have_their_settings(recipe):
  path = pathlib.Path(recipe.__file__)
  settings = plan.Settings(config=str(path), topology="v5e:8x8")
  jobs = [job.stage for job in plan.make_jobs(settings)[1]]
  written = plain(recipe.get_config())
  assert plain(from_plain(written)) == written  # the form in checkpoints and in `plan`
  older = written | {"autoencoder": written["autoencoder"] | {"temporal": ""}}
  assert plain(from_plain(older)) == written  # a config of an older version, which had this key
  before, stages = None, make_stages(recipe.get_config())
  assert [s.name for s in stages] == list(RECIPES[recipe])
  for stage in stages:
    steps, programs, new = RECIPES[recipe][stage.name]
    assert (stage.steps, jobs.count(stage.name)) == (steps, programs)
    objective = DenoiserObjective(stage.config)
    shapes = transition.by_name(*objective.shapes)
    change = transition.describe(before or shapes, shapes, objective.resizable)
    assert new in change.split("new: ")[1] if new else not change
    before = shapes
  assert stages[-1].config.model.fields == {"dtype": "bfloat16", "remat": "full"}  # the published model


def test_a_recipe_can_start_at_a_later_stage():
  assert [s.name for s in make_stages(open_sora_1_2.get_config("stage2"))] == ["stage2", "stage3"]
  refused = run_module("stdit_jax.train", "--config", "configs/open_sora_1_2.py:stage4")
  assert refused.returncode == 2
  (line,) = refused.stderr.splitlines()
  assert line.startswith("error: --config configs/open_sora_1_2.py:stage4: there is no stage 'stage4' to begin with; there are")
