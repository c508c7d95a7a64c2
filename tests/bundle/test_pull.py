"""What a name means after a pull: one source, always the same, and never another model under a known name."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hanok.bundle.bundle import save_bundle, write_at_top
from hanok.bundle.hub import CATALOGUE
from hanok.bundle.imports import export_folder, import_folder
from hanok.bundle.pull import canonical, find, name_of, pull
from hanok.errors import ConfigError, DataError
from tiny import bundle
from zoo import BY_NAME


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANOK_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_folder_that_bears_a_known_name_does_not_take_it(home: Path):
    alias = next(iter(CATALOGUE))
    save_bundle(bundle(), home / alias)
    assert pull(str(home / alias)).name == f"{alias}-local"
    assert name_of(alias) == alias == name_of(CATALOGUE[alias].source) and canonical(alias) == CATALOGUE[alias].source
    with pytest.raises(DataError, match="there is no such bundle"):
        find(alias)


def test_a_name_is_taken_by_its_first_source_alone(home: Path):
    for place in ("a", "b"):
        save_bundle(bundle(), home / place / "mine")
    first = pull(str(home / "a" / "mine"))
    assert pull(str(home / "a" / "mine")) == first == find("mine")
    with pytest.raises(DataError, match="the name mine is taken.*--to"):
        pull(str(home / "b" / "mine"))


def test_files_at_the_top_of_a_folder_come_together_or_not_at_all(home: Path, monkeypatch: pytest.MonkeyPatch):
    run = home / "run"
    run.mkdir()
    (run / "metrics.csv").write_text("step\n")
    (run / "config.json").mkdir()                                                     # the last file cannot take its place
    (run / "config.json" / "x").touch()
    with pytest.raises(OSError):
        write_at_top(bundle(), run)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.csv"]


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_travels(pooling: str, home: Path):
    config = replace(BY_NAME["bert"].config, vocab_size=300)
    export_folder(bundle(config, "bert", pooling=pooling), home / "out")
    assert import_folder(home / "out").generation.pooling == pooling
    (home / "out" / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens is not supported"):
        import_folder(home / "out")
