"""A home of its own for each file's corpora."""
from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HANOK_HOME", str(tmp_path_factory.mktemp("home")))
        yield
