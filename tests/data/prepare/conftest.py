"""Videos and an undisturbed run over them, made once."""

import pytest

from data.prepare import __main__ as main
from tests.data.prepare.runs import config_file
from tests.data.prepare.videos import two_scenes, write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
  """Five videos of two scenes each."""
  folder = tmp_path_factory.mktemp("videos")
  for i in range(5):
    write_video(folder / f"{i}.mp4", two_scenes(30 + i, 40))
  return folder


@pytest.fixture(scope="session")
def undisturbed(videos, tmp_path_factory):
  folder = tmp_path_factory.mktemp("undisturbed")
  assert main.main(["run", "--config", config_file(folder, videos)]) == 0
  return folder / "out"
