import pytest

from tests.launch.stand_ins import StandIns


@pytest.fixture
def stand_ins(tmp_path):
  programs = StandIns(tmp_path)
  yield programs
  programs.close()
