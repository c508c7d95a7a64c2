"""Files and folders appear whole or not at all, whatever stops them; text says where it is broken.

A child process that may only write so many bytes (RLIMIT_FSIZE) meets a real refusal of the operating system, in every part of a write.
"""
from __future__ import annotations

import codecs
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.disk import below, decode, new_dir, new_file, read_bytes, read_text, refuse_occupied, sha256, write_text
from hanok.errors import DataError

LIMITED = """
import resource, sys
from hanok.disk import new_dir, new_file, write_text
from hanok.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    exec(sys.argv[3], {"path": sys.argv[1], "new_dir": new_dir, "new_file": new_file, "write_text": write_text})
except DataError as error:
    print(error)
"""
OUTSIDER = """
import os, sys
from hanok import disk
from hanok.errors import DataError
os.chmod(sys.argv[1], 0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    exec(sys.argv[2], {"path": sys.argv[1], **vars(disk)})
except DataError as error:
    print(error)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def told(script: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


# ---- whole or not at all

@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, DataError, SystemExit])
def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(error), new_file(path) as handle:
        handle.write(b"n" * 100_000)
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_new_file_takes_its_name_at_the_end_and_the_rights_of_any_file(tmp_path):
    path, plain = tmp_path / "a" / "b" / "file", tmp_path / "plain"
    with new_file(path) as handle:
        handle.write(b"new")
        assert not path.exists()
    plain.touch()
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("write", [
    "with new_file(path) as f: f.write(b'n' * 3000)",                                  # all of it waits in the buffer until the end
    "with new_file(path) as f: f.write(b'n' * 3_000_000)",                             # none of it does
    "with new_file(path) as f: f.write(b'n' * 10); f.write(memoryview(b'n' * 3_000_000)); f.write(b'n')",
    "with new_file(path) as f: [f.write(b'n' * 700) for _ in range(4000)]",
    "write_text(path, 'n' * 3000)",
])
@pytest.mark.parametrize("limit", [0, 1000])
def test_a_disk_that_takes_no_more_is_told_and_leaves_the_old_file(tmp_path, write, limit):
    path = tmp_path / "file"
    path.write_text("old")
    message = told(LIMITED, path, limit, write)
    assert message == f"{path}: the file would be larger than this place allows; choose another (nothing was left half-written)\n"
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_disk_that_takes_no_more_leaves_no_folder(tmp_path):
    message = told(LIMITED, tmp_path / "out", 1000, "with new_dir(path) as d:\n write_text(d / 'small', 'x')\n with new_file(d / 'large') as f:"
                                                    " f.write(b'n' * 1500)")
    assert "larger than this place allows" in message and message.count("\n") == 1
    assert not names(tmp_path)


def interrupted_everywhere(act, check) -> int:
    """Runs `act` with a Ctrl-C at the first moment when Python looks for one (a call, or the end of a call into C), at the second, and so on,
    until it is through; `check` looks after each."""
    n, came = 0, True
    while came:
        came, left = False, n

        def profile(frame, event, argument) -> None:
            nonlocal came, left
            if event in ("call", "c_return") and frame.f_code.co_name != "interrupted_everywhere":
                left -= 1
                if left < 0:
                    came = True
                    raise KeyboardInterrupt

        try:
            sys.setprofile(profile)
            act()
        except KeyboardInterrupt:
            assert came
        finally:
            sys.setprofile(None)
        check(came)
        n += 1
    return n


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")        # a file that was opened and never got its name in Python
def test_a_file_is_whole_or_not_at_all_wherever_the_interruption_comes(tmp_path):
    path = tmp_path / "file"

    def act() -> None:
        with new_file(path) as handle:
            handle.write(b"new" * 10_000)

    def check(came: bool) -> None:
        assert path.read_bytes() in ((b"old", b"new" * 10_000) if came else (b"new" * 10_000,)) and names(tmp_path) == ["file"]
        path.write_bytes(b"old")

    path.write_bytes(b"old")
    assert interrupted_everywhere(act, check) > 20


def test_a_folder_is_whole_or_not_at_all_wherever_the_interruption_comes(tmp_path):
    out = tmp_path / "out"

    def act() -> None:
        with new_dir(out) as folder:
            (folder / "a").touch()
            (folder / "b").touch()

    def check(came: bool) -> None:
        assert names(tmp_path) in (([], ["a", "b", "out"]) if came else (["a", "b", "out"],))
        shutil.rmtree(out, ignore_errors=True)

    assert interrupted_everywhere(act, check) > 50


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_a_folder_that_was_not_finished_is_not_there(tmp_path, error):
    with pytest.raises(DataError if isinstance(error, OSError) else error), new_dir(tmp_path / "a" / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        assert not (tmp_path / "a" / "out").exists()
        raise error
    assert names(tmp_path) == ["a"]


def test_a_new_folder_replaces_an_empty_one_with_the_rights_of_any_folder(tmp_path):
    for out in (tmp_path / "empty", tmp_path / "new"):
        if out.name == "empty":
            out.mkdir(mode=0o700)
        with new_dir(out) as folder:
            (folder / "file").touch()
        (tmp_path / "plain").mkdir(exist_ok=True)
        assert names(out) == ["file"]
        assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "plain"]


def test_an_occupied_folder_is_refused_before_the_block_runs(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".hidden").write_text("mine")
    with pytest.raises(DataError, match="out is not empty; choose another folder"), new_dir(out):
        raise AssertionError("the block ran")
    with pytest.raises(DataError, match="hidden is a file; a new folder was expected"), new_dir(out / ".hidden"):
        raise AssertionError("the block ran")
    assert names(tmp_path) == [".hidden", "out"] and (out / ".hidden").read_text() == "mine"


def test_a_folder_that_was_filled_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="out: .*not empty"), new_dir(out) as folder:
        (folder / "file").touch()
        out.mkdir()
        (out / "other").touch()
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("place", ["file/new", "file/sub/new"])
def test_a_path_through_a_file_is_told(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    for act in (lambda: write_text(tmp_path / place, "x"), lambda: new_dir(tmp_path / place).__enter__()):
        with pytest.raises(DataError, match="new: a part of this path is a file, not a folder"):
            act()
    assert names(tmp_path) == ["file"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: this is a folder; a file was expected"):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(DataError, match="folder: this is a folder; a file was expected"):
        read_bytes(tmp_path / "folder")
    with pytest.raises(DataError, match="none: there is no such file or folder; check the path"):
        read_bytes(tmp_path / "none")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("act", ["refuse_occupied(path)", "write_text(path + '/file', 'x')", "new_dir(path + '/new').__enter__()",
                                 "read_text(path + '/file')", "sha256(path + '/file')", "new_dir(path).__enter__()"])
def test_what_belongs_to_another_is_told(tmp_path, act):
    mine = tmp_path / "mine"
    mine.mkdir()
    try:
        message = told(OUTSIDER, mine, act)
    finally:
        mine.chmod(0o700)
    assert "mine" in message and message.endswith(": permission denied; choose another place or change its rights\n")


# ---- text

def test_text_is_read_as_it_stands(tmp_path):
    for text in ("", "a\r\nb\rc\n", "누가 \N{GRINNING FACE}\x00"):
        write_text(tmp_path / "text", text)
        assert read_text(tmp_path / "text") == text
        assert read_text(tmp_path / "text", "UTF_8") == text
    (tmp_path / "text").write_bytes(codecs.BOM_UTF8 + "한".encode())
    assert read_text(tmp_path / "text") == "한"
    (tmp_path / "text").write_bytes("한글".encode("cp949"))
    assert read_text(tmp_path / "text", "cp949") == "한글"


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    """A file name that is no UTF-8 has such characters in Python, and stands in recipes and manifests."""
    write_text(tmp_path / "text", os.fsdecode(b"caf\xe9.txt"))
    assert read_text(tmp_path / "text") == "caf?.txt"


@given(st.text(max_size=20), st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf0\x9f\x98"]), st.text("ab\n", max_size=9), st.booleans())
def test_the_first_bad_byte_is_named(before, bad, after, mark):
    good = (codecs.BOM_UTF8 if mark else b"") + before.encode()
    with pytest.raises(DataError) as told:
        decode(good + bad + after.encode(), "name")
    assert str(told.value) == (f"name: not utf-8: 0x{bad[0]:02x} at byte {len(good)}; "
                               "name its encoding with --encoding, for example latin-1 or cp949")


@pytest.mark.parametrize(("encoding", "message"), [
    ("latin-x", "unknown encoding 'latin-x'"), ("hex", "unknown encoding 'hex'"), ("undefined", "unknown encoding 'undefined'"),
    ("a\0b", "unknown encoding"), ("ascii", "name: not ascii: 0xed at byte 2"), ("utf-16", "name: not utf-16: 0x.. at byte"),
])
def test_what_is_no_encoding_or_another_is_told(encoding, message):
    with pytest.raises(DataError, match=message) as told:
        decode("ab한".encode()[:5] * 3, "name", encoding)
    assert "\n" not in str(told.value)


def test_sha256_is_sha256(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match="none: there is no such file"):
        sha256(tmp_path / "none")


# ---- names below a folder

@pytest.mark.parametrize("name", ["a", "a/b.txt", "./a", "a/../b", "sub/../../root/x", "", "..."])
def test_names_below_stay_below(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    path = below(root, name)
    assert path == Path(os.path.normpath(root / name)) and path.is_relative_to(root)


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd", "link/x", "link", "../root-beside/x", "\0", "a\0b", "loop", "loop/x"])
def test_names_that_leave_are_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "root-beside").mkdir()
    (root / "link").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(DataError, match="a name below it was expected") as told:
        below(root, name)
    assert "\n" not in str(told.value)


def test_a_link_that_stays_inside_may_be_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert below(tmp_path, "link/x") == tmp_path.resolve() / "real" / "x"


def test_refuse_occupied_lets_new_and_empty_places_pass(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse_occupied(tmp_path / "empty")
    refuse_occupied(tmp_path / "none" / "at" / "all")
