"""Fixtures for the tests of `plan`."""

import pytest


@pytest.fixture(autouse=True)
def optimised(monkeypatch):
  """Processes of `plan` compile with the usual optimisation, on which memory and time depend."""
  monkeypatch.delenv("XLA_FLAGS", raising=False)
