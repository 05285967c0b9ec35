"""Shared by the tests of `plan`."""

import pytest


@pytest.fixture(autouse=True)
def optimised(monkeypatch):
  """Its processes compile as for users: memory and time of a plan depend on it."""
  monkeypatch.delenv("XLA_FLAGS", raising=False)
