"""A user's error is one clear line before anything compiles, and writes no file in a wrong folder."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from configs import base
from stdit_jax import train
from stdit_jax.interop import CheckpointError
from stdit_jax.run_samples import Sampler
from stdit_jax.training.stages import make_stages
from tests.runs import Run
from tests.tiny_run import run_module, tiny_config, write_config

# (dotted keys with __, expected words in this order)
WRONG = [
  ({"optimizer__learning_rat": 1.0}, "unknown key 'optimizer.learning_rat'; did you mean optimizer.learning_rate"),
  ({"optimiser": {"b1": 0.9}}, "unknown key 'optimiser'; did you mean optimizer"),
  ({"optimizer": 3}, "optimizer must be a group of keys"),
  ({"optimizer__learning_rate": "fast"}, "optimizer.learning_rate is 'fast'; it must be a number"),
  ({"optimizer__learning_rate": -1.0}, "optimizer.learning_rate is -1.0; allowed: a number of at least 0"),
  ({"optimizer__schedule": "linear"}, "optimizer.schedule is 'linear'; allowed: 'constant', 'cosine'"),
  ({"optimizer__accumulate": 0}, "optimizer.accumulate is 0; allowed: a whole number of at least 1"),
  ({"log_every": 0}, "log_every is 0"),
  ({"profile_steps": (3, 2)}, "profile_steps is (3, 2); allowed: (), or (first, last) optimizer steps"),
  ({"compile_threads": -1}, "compile_threads is -1; allowed: a whole number of at least 0"),
  ({"max_nonfinite": 0}, "max_nonfinite is 0; allowed: a whole number of at least 1"),
  ({"watchdog__timeout": -1.0}, "watchdog.timeout is -1.0; allowed: a number of at least 0"),
  ({"split_tokens": "some"}, "split_tokens is 'some'; allowed: 'auto', 'never', 'always', or buckets: '480p:204,720p:51'"),
  ({"split_tokens": "480p"}, "split_tokens is '480p'; allowed: 'auto', 'never', 'always', or buckets:"),
  ({"split_tokens": "144p:161"}, "split_tokens names 144p:161, which no stage has; buckets are 64p:1, 64p:4"),
  ({"compilation_cache": "s3://bucket/xla"}, "compilation_cache='s3://bucket/xla' is neither a local path nor gs://BUCKET/NAME"),
  ({"resume": "always"}, "resume is 'always'; allowed: 'auto', 'required', or a step such as '1200'"),
  ({"log_every": 1.5}, "log_every is 1.5; it must be a whole number"),
  ({"init_strict": "no"}, "init_strict is 'no'; it must be True or False"),
  ({"seed": True}, "seed is True; it must be a whole number"),
  ({"caption_dropout": 1.5}, "caption_dropout is 1.5; allowed: a number of at least 0, at most 1"),
  ({"task": "denoise"}, "task is 'denoise'; allowed: 'denoiser', 'autoencoder'"),
  ({"train": "("}, "train is '('; allowed: a regular expression"),
  ({"train": "^nothing$"}, "train='^nothing$' matches no parameter; there are"),
  ({"platform": "tpu"}, "platform is 'tpu', but JAX finds only 'cpu' devices"),
  ({"platform": "cuda"}, "platform is 'cuda'; allowed: '', 'cpu', 'gpu', 'tpu'"),
  ({"model__name": "STDiT3-tini/2"}, "unknown denoiser 'STDiT3-tini/2'; allowed: STDiT-XL/2"),
  ({"model__fields__dept": 3}, "unknown field 'dept'; allowed:"),
  ({"model__fields__depth": "two"}, "depth is 'two'; give a value like 2"),
  ({"model__fields__hidden_size": 50}, "hidden_size is 50; allowed: multiples of num_heads=4"),
  ({"model__fields__dtype": "float8"}, "dtype is 'float8'; allowed: float32, bfloat16"),
  ({"model__fields__caption_channels": 32}, "gives 64 features, but the denoiser takes caption_channels=32; set"),
  ({"model__fields__model_max_length": 9}, "text_encoder.max_length is 16, but the denoiser's null caption has model_max"),
  ({"model__fields__in_channels": 8}, "the autoencoder has 4 channels, but model.fields.in_channels=8"),
  ({"text_encoder__name": "xxxl"}, "unknown text encoder 'xxxl'; allowed: small"),
  ({"text_encoder__where": "here"}, "text_encoder.where is 'here'; allowed: 'step', 'ahead', 'disk'"),
  ({"text_encoder__where": "ahead"}, "text_encoder.train needs text_encoder.where='step'"),
  ({"text_encoder__train": False}, "text_encoder.weights is empty; give a safetensors file"),
  ({"text_encoder__tokenizer": "/no/folder"}, "tokenizer '/no/folder' is neither 'byt5' nor a folder"),
  ({"autoencoder__name": "kl-f9"}, "unknown autoencoder 'kl-f9'"),
  ({"autoencoder__dtype": "int8"}, "autoencoder.dtype is 'int8'; allowed: float32, bfloat16"),
  ({"autoencoder__weights": ""}, "autoencoder.weights is empty"),
  ({"autoencoder__weights": "/no/file.safetensors"}, "autoencoder.weights='/no/file.safetensors' does not exist"),
  ({"init": "/no/run"}, "init='/no/run' does not exist"),
  ({"diffusion__name": "ddpm"}, "unknown diffusion.name 'ddpm'; allowed: rectified-flow, iddpm"),
  ({"diffusion__fields": {"loca": 1.0}}, "diffusion.fields: unknown field 'loca'; allowed:"),
  ({"diffusion__fields": {"loc": "x"}}, "diffusion.fields: loc is 'x'; give a value like 0.0"),
  ({"mask_ratios": {"rendom": 0.1}}, "mask_ratios: unknown name rendom; allowed: identity, random"),
  ({"mask_ratios": {"random": 0.7, "image_head": 0.6}}, "mask_ratios sum to 1.3, more than 1"),
  ({"mesh": {"data": 3, "fsdp": 1}}, "mesh: {'data': 3, 'fsdp': 1, 'sequence': 1, 'tensor': 1} does not make 1 devices"),
  ({"mesh__model": 2}, "allowed: whole numbers for the axes data, fsdp, sequence, tensor"),
  ({"data__bucket": ()}, "unknown key 'data.bucket'; did you mean data.buckets"),
  ({"data__buckets": ()}, "the bucket table is empty"),
  ({"data__buckets": (("145p", 1, 1.0, 2),)}, "unknown resolution '145p' (did you mean '144p'?)"),
  ({"data__buckets": (("720p", 1, 1.0, 2),)}, "epoch 0 has no step"),
  ({"data__resize": "bicubic"}, "data.resize = 'bicubic' is none of"),
  ({"data__tables": ("/no/table.csv",)}, "table /no/table.csv does not exist"),
  ({"validation__every": 2}, "validation.tables is empty; give the tables to measure the loss on, or set validation.every=0"),
  ({"validation__timesteps": 0}, "validation.timesteps is 0; allowed: a whole number of at least 1"),
  (
    {"validation": {"every": 2, "tables": ("/no/table.csv",), "samples_per_bucket": 2, "timesteps": 2}},
    "stage 'tiny: validation': table /no/table.csv does not exist",
  ),
  ({"stages": ()}, "stages is empty"),
  ({"stages": ({"name": "a"},)}, "stage 0 has no 'steps'"),
  ({"stages": ({"name": 1, "steps": 1},)}, "stages[0]: name is 1; allowed: a text"),
  ({"stages": ({"name": "a", "steps": 0},)}, "stage 'a': steps is 0"),
  ({"stages": ({"name": "a", "steps": 1}, {"name": "a", "steps": 1})}, "two stages are called 'a'"),
  ({"stages": ({"name": "a", "steps": 1, "seed": 3},)}, "stage 'a' changes seed, which belongs to the whole run"),
  ({"stages": ({"name": "a", "steps": 1, "optimizer.warmup": 3},)}, "stage 'a': unknown key 'optimizer.warmup'; did you mean"),
  ({"stages": ({"name": "a", "steps": 1, "ema_decay": 2.0},)}, "ema_decay is 2.0"),
  ({"stages": ("first",)}, "stages[0] is 'first'; every stage is a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_wrong_values_are_one_line(assets, tmp_path, changes, words):
  with pytest.raises(ValueError, match=r".") as error:
    Run(tiny_config(assets, tmp_path / "run", **changes))
  text = str(error.value)
  assert words in text
  assert "\n" not in text
  assert not (tmp_path / "run" / "config.json").exists()
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_keys_tables_columns_and_files_are_refused(assets, tmp_path):
  config = tiny_config(assets, tmp_path / "a")
  del config.optimizer.b1
  with pytest.raises(ValueError, match=r"key optimizer.b1 is missing; configs/base.py has its default"):
    make_stages(config)
  for table, words in (("no_text", "has no column 'text'"), ("gone", "none of the first 12 files exists")):
    config = tiny_config(assets, tmp_path / table, data__tables=(str(assets / f"{table}.csv"),))
    with pytest.raises(ValueError, match=words):
      Run(config).parts[0].data.loader(0)
  with pytest.raises(ValueError, match=r"needs task='denoiser'|prompts is empty"):
    Sampler(Run(tiny_config(assets, tmp_path / "s", sample__prompts=())))
  make_stages(base.get_config())  # the defaults are valid


def test_a_folder_can_be_used_after_wrong_data_is_corrected(assets, tmp_path):
  """The refused run has already written its table to the folder."""
  with pytest.raises(ValueError, match="epoch 0 has no step"):
    Run(tiny_config(assets, tmp_path / "run", data__buckets=(("720p", 1, 1.0, 2),)))
  assert list((tmp_path / "run" / "data").iterdir())
  Run(tiny_config(assets, tmp_path / "run"))


def test_foreign_output_folders_are_refused(assets, tmp_path):
  foreign = tmp_path / "foreign"
  foreign.mkdir()
  (foreign / "thesis.tex").write_text("words")
  with pytest.raises(ValueError, match=r"holds thesis.tex and no config.json, so no training made it; give another folder"):
    Run(tiny_config(assets, foreign))
  assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
  other = tmp_path / "other"
  (other / "data").mkdir(parents=True)
  (other / "data" / "film.mp4").write_text("words")
  with pytest.raises(ValueError, match="holds data"):
    Run(tiny_config(assets, other))
  with pytest.raises(ValueError, match="can't be used: Not a directory"):
    Run(tiny_config(assets, foreign / "thesis.tex" / "run"))
  with pytest.raises(ValueError, match="can't be used"):
    Run(tiny_config(assets, "/proc/run"))
  if os.getuid():  # root may write anywhere
    foreign.chmod(0o500)
    with pytest.raises(ValueError, match="can't be used: Permission denied"):
      Run(tiny_config(assets, foreign / "run"))
  damaged = tmp_path / "damaged"
  damaged.mkdir()
  (damaged / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is damaged"):
    Run(tiny_config(assets, damaged))


def test_broken_safetensors_are_refused(assets, tmp_path):
  whole = (assets / "autoencoder.safetensors").read_bytes()
  nan = np.frombuffer(whole, np.uint8).copy()
  nan[-4:] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
  for name, content, words in (
    ("short", whole[: len(whole) // 2], "short.safetensors"),
    ("lying", b"\xff" * 8 + whole[8:], "lying.safetensors"),
    ("nan", nan.tobytes(), "nan.safetensors"),
  ):
    (tmp_path / f"{name}.safetensors").write_bytes(content)
    run = Run(tiny_config(assets, tmp_path / name, autoencoder__weights=str(tmp_path / f"{name}.safetensors")))
    with pytest.raises(CheckpointError, match=words):
      run.maker()


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
  """Folder of a run with one step."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  Run(tiny_config(assets, folder, **ONE)).train()
  return folder


ONE = {"stages": ({"name": "one", "steps": 1},), "data__buckets": (("64p", 1, 1.0, 2),)}


def test_the_folder_of_another_run_is_refused(assets, trained):
  before = sorted(p.name for p in trained.iterdir())
  for changes, key in (
    ({"model__fields__depth": 2}, "model.fields.depth"),
    ({"seed": 1}, "seed"),
    ({"text_encoder__train": False, "text_encoder__weights": str(assets / "t5.safetensors")}, "text_encoder.train"),
  ):
    with pytest.raises(ValueError, match=rf"belongs to another run: {key} differs in stage 'one'; give another output folder"):
      Run(tiny_config(assets, trained, **ONE, **changes))
  assert sorted(p.name for p in trained.iterdir()) == before


def test_init_from_another_model_is_refused(assets, trained, tmp_path):
  with pytest.raises(ValueError, match=r"belongs to another model: \d+ parameters differ"):
    Run(tiny_config(assets, tmp_path / "run", init=str(trained), **ONE, model__fields__depth=2)).start()
  longer = {"model__fields__model_max_length": 20, "text_encoder__max_length": 20}
  with pytest.raises(ValueError, match="denoiser/null_caption"):
    Run(tiny_config(assets, tmp_path / "run", init=str(trained), **ONE, **longer)).start()


def test_data_that_changed_since_the_checkpoint_is_refused(assets, trained, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(trained, folder)
  longer = {**ONE, "stages": ({"name": "one", "steps": 2},)}
  for changes, words in (
    ({"data__tables": (str(assets / "other.csv"),)}, "contents of the table"),
    ({"data__seed": 1, "data__frame_interval": 1}, r"frame_interval: 3 -> 1; seed: 42 -> 1"),
    ({"data__buckets": (("64p", 1, 1.0, 3),)}, "buckets: 64p x 1"),
  ):
    with pytest.raises(ValueError, match=rf"is not that of the checkpoint .*{words}.*restart_data=True"):
      Run(tiny_config(assets, folder, **{**longer, **changes})).start()
  changes = {**longer, "data__seed": 1}
  _, _, step = Run(tiny_config(assets, folder, restart_data=True, **changes)).start()
  assert step == 1


def test_a_new_stage_after_a_finished_run_may_have_other_data(assets, trained, tmp_path):
  """A stage that replaces another one before its end is refused: it would break the order of the data."""
  folder, other = tmp_path / "run", tmp_path / "other"
  shutil.copytree(trained, folder)
  shutil.copytree(trained, other)
  more = {"name": "two", "steps": 1, "data.buckets": (("64p", 1, 1.0, 3),), "data.seed": 1}
  longer = {**ONE, "stages": (*ONE["stages"], more)}
  Run(tiny_config(assets, folder, **longer)).train()
  _, _, step = Run(tiny_config(assets, folder, **longer)).start()
  assert step == 2
  for stage in ({**more, "steps": 2}, {"name": "two", "steps": 2}):
    with pytest.raises(ValueError, match="checkpoint 1 belongs to stage 'two', but stage 'one' made it"):
      Run(tiny_config(assets, other, **{**ONE, "stages": (stage,)})).start()


def test_a_changed_accumulation_within_a_stage_is_refused(assets, trained):
  """It would skip or repeat samples."""
  changes = {**ONE, "stages": ({"name": "one", "steps": 3},), "optimizer__accumulate": 2}
  with pytest.raises(ValueError, match=r"optimizer\.accumulate is 2 and was 1 up to step 1, in the midst of stage 'one'"):
    Run(tiny_config(assets, trained, **changes)).start()


# ------------------------------------------------------------------------------------------------- through the command line


def refused(result, *words):
  """Asserts one line 'error: ...' on stderr with these words and exit code 2."""
  lines = [line for line in result.stderr.splitlines() if line.strip()]
  assert result.returncode == 2, result.stderr[-2000:]
  assert len(lines) == 1, result.stderr[-2000:]
  assert lines[0].startswith("error: ")
  for word in words:
    assert word in lines[0]


def test_errors_of_flags_are_one_line(tmp_path, capsys):
  broken = tmp_path / "broken.py"
  broken.write_text("def get_config(:\n")
  quick = ("--config", "configs/quickstart.py")  # the error occurs before the file matters
  for arguments, *words in (
    (("--confg", "configs/quickstart.py"), "confg"),
    ((), "give a configuration: --config configs/quickstart.py"),
    ((*quick, "--config.optimizer.learning_rat=1"), "did you mean 'optimizer.learning_rate'"),
    ((*quick, "--config.model.fields.depht=1"), "model.fields.depht=1: there is no key"),
    ((*quick, "--config.log_every=often"), "log_every"),
    ((*quick, "more"), "unrecognized arguments: more"),
    (("--config", str(broken)), "broken.py", "SyntaxError"),
    (("--config", str(tmp_path / "none.py")), "none.py"),
  ):
    with pytest.raises(SystemExit) as exit:
      train.main(arguments)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_errors_of_the_command_are_one_line(assets, trained, store, tmp_path):
  """Errors that show late: values, devices, the checkpoint."""
  config, program = write_config(tmp_path / "config.py", assets, tmp_path / "run", **ONE), "stdit_jax.train"
  refused(run_module(program, "--confg", "configs/quickstart.py"), "confg")
  refused(run_module(program, "--config", config, "--config.caption_dropout=3"), "caption_dropout is 3")
  refused(run_module(program, "--config", config, "--config.platform=gpu", JAX_PLATFORMS="cuda"), "JAX finds no devices")
  elsewhere = "--config.output=gs://no-such-bucket/run"
  refused(run_module(program, "--config", config, elsewhere, JAX_COMPILATION_CACHE_DIR=""), "there is no such bucket")
  assert not (tmp_path / "run").exists()
  changed = write_config(tmp_path / "changed.py", assets, trained, **ONE, data__seed=5)
  refused(run_module(program, "--config", changed), "seed: 42 -> 5", "restart_data")
  assert json.loads((pathlib.Path(trained) / "config.json").read_text())["data"]["seed"] == 42
