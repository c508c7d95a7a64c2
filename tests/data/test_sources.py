"""Folders as documents in a fixed order, every refusal in one line, and a split that leaks nothing."""
from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.data.sources import SUFFIXES, Document, find_files, hash_sources, read_documents, split, standard_library
from hanok.errors import ConfigError, DataError


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def refusal(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_files([root])]


def test_a_file_is_one_document_as_it_stands(tmp_path):
    write(tmp_path, {"a.xyz": "one\r\ntwo\n\n 한옥"})
    assert list(read_documents([tmp_path / "a.xyz"])) == [Document(str(tmp_path / "a.xyz"), "one\r\ntwo\n\n 한옥")]


def test_a_folder_gives_its_text_files_in_relative_order(tmp_path):
    write(tmp_path, {"b.txt": "b", "a/z.md": "z", "a/b/c.PY": "c", "a.txt": "a", "B.rs": "B", "x.bin": "no", "y.pyc": "no",
                     "node_modules/m.js": "no", "d/pic.png": "no"})
    (tmp_path / "d" / "__pycache__").mkdir()
    (tmp_path / "d" / "__pycache__" / "c.py").write_text("no")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "h.txt").write_text("no")
    (tmp_path / "d" / ".h.txt").write_text("no")
    (tmp_path / "d" / "folder.txt").mkdir()
    assert names(tmp_path) == ["B.rs", "a.txt", "a/b/c.PY", "a/z.md", "b.txt"]
    assert [document.text for document in read_documents([tmp_path / "b.txt", tmp_path / "a"])] == ["b", "c", "z"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_suffix_counts(tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_text("text")
    assert names(tmp_path) == [f"x{suffix}"]


def test_links_stay_in_their_folder(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    write(inside, {"ab.txt": "mine"})
    (inside / ".store").mkdir()
    (inside / ".store" / "1").write_text("stored")
    write(outside, {"o.txt": "theirs"})
    (inside / "aa.txt").symlink_to(inside / "ab.txt")
    (inside / "leaves.txt").symlink_to(outside / "o.txt")
    (inside / "leaves").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "broken.txt").symlink_to(inside / "nowhere.txt")
    (inside / "stored.txt").symlink_to(inside / ".store" / "1")
    assert names(inside) == ["ab.txt", "stored.txt"]
    (tmp_path / "door").symlink_to(inside)
    assert names(tmp_path / "door") == ["ab.txt", "stored.txt"]


def test_what_cannot_be_read_is_refused_at_once(tmp_path):
    write(tmp_path, {"good.txt": "good", "only/x.bin": "?"})
    with pytest.raises(DataError) as error:
        read_documents([tmp_path / "good.txt", tmp_path / "gone.txt"])
    assert "gone.txt: there is no such file or folder" in refusal(error)
    with pytest.raises(DataError) as error:
        read_documents([tmp_path / "only"])
    assert all(suffix in refusal(error) for suffix in SUFFIXES)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError) as error:
        read_documents([tmp_path / "pipe.txt"])
    assert "not a regular file" in refusal(error)
    with pytest.raises(DataError, match="no files or folders"):
        read_documents([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_or_folder_is_refused(tmp_path):
    write(tmp_path, {"f/a.txt": "a"})
    (tmp_path / "f" / "a.txt").chmod(0)
    with pytest.raises(DataError, match="a.txt: permission denied"):
        list(read_documents([tmp_path]))
    (tmp_path / "f").chmod(0)
    with pytest.raises(DataError, match="f: permission denied"):
        read_documents([tmp_path])
    (tmp_path / "f").chmod(0o700)


def test_empty_files_are_passed_over_but_not_when_there_are_no_others(tmp_path):
    write(tmp_path, {"a.txt": "", "b.txt": " \n\t\n", "c.txt": "text"})
    assert [document.text for document in read_documents([tmp_path])] == ["text"]
    (tmp_path / "c.txt").unlink()
    with pytest.raises(DataError) as error:
        list(read_documents([tmp_path]))
    assert "a.txt and 1 more: nothing but white space" in refusal(error)


def test_a_file_of_another_encoding_is_named_with_its_byte(tmp_path):
    (tmp_path / "korean.txt").write_bytes("abc 한옥".encode("cp949"))
    with pytest.raises(DataError) as error:
        list(read_documents([tmp_path]))
    assert "korean.txt" in refusal(error) and "at byte 4" in refusal(error)
    assert [document.text for document in read_documents([tmp_path], encoding="cp949")] == ["abc 한옥"]


def test_sources_are_hashed_file_by_file(tmp_path):
    write(tmp_path, {"b.txt": "한옥", "a.txt": "one"})
    assert hash_sources([tmp_path]) == [
        {"path": str(tmp_path / "a.txt"), "bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()},
        {"path": str(tmp_path / "b.txt"), "bytes": 6, "sha256": hashlib.sha256("한옥".encode()).hexdigest()}]


def test_the_standard_library_is_text_that_every_machine_has(tmp_path):
    files = standard_library()
    assert len(files) > 300 and files == sorted(files, key=lambda path: path.as_posix())
    parts = {part for path in files for part in path.parts[len(Path(os.__file__).parent.parts):]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert "argparse.py" in parts and {path.suffix for path in files} == {".py"}
    assert sum(len(document.text) for document in read_documents(files)) > 5_000_000
    write(tmp_path, {"lib/test/x.py": "x", "lib/site-packages/y.py": "y", "lib/z.txt": "z"})
    (tmp_path / "lib" / "latin.py").write_bytes(b"# caf\xe9")
    with pytest.raises(DataError, match="no .py files"):
        standard_library(tmp_path / "lib")
    write(tmp_path, {"lib/m.py": "m"})
    assert standard_library(tmp_path / "lib") == [tmp_path / "lib" / "m.py"]


texts = st.lists(st.text(alphabet="ab \n", min_size=1, max_size=30).filter(str.strip), min_size=2, max_size=20)


@given(texts, st.floats(0.05, 0.95), st.integers(0, 99), st.randoms())
def test_a_split_keeps_everything_and_does_not_depend_on_order(given_texts, fraction, seed, random):
    documents = [Document(str(number), text) for number, text in enumerate(given_texts)]
    try:
        train, validation = split(documents, fraction, seed)
    except DataError as error:
        assert "too few" in str(error)
        return
    assert all(document.text.strip() for document in train + validation) and train and validation
    pieces: dict[str, str] = {}
    for document in train + validation:
        pieces[document.name] = pieces.get(document.name, "") + document.text
    assert pieces == {document.name: document.text for document in documents}
    shuffled = documents[:]
    random.shuffle(shuffled)
    again = split(shuffled, fraction, seed)
    assert [sorted(part, key=lambda document: int(document.name)) for part in again] == [train, validation]
    for text in set(given_texts):
        sides = [[(d.text == text) for d in side if given_texts[int(d.name)] == text] for side in (train, validation)]
        assert not (any(sides[0]) and any(sides[1])), "copies of a whole text stand on both sides"


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_validation_holds_its_fraction_of_the_characters(fraction):
    documents = [Document(str(number), f"{number} " * (1 + number % 37)) for number in range(400)]
    _, validation = split(documents, fraction, seed=1)
    total = sum(len(document.text) for document in documents)
    assert sum(len(document.text) for document in validation) / total == pytest.approx(fraction, rel=0.05)
    assert [int(document.name) for document in validation] == sorted(int(document.name) for document in validation)
    assert split(documents, fraction, seed=2)[1] != validation


def test_a_document_that_outweighs_all_others_is_cut_at_a_line_end():
    lines = [f"line {number}\n" for number in range(100)]
    large, small = Document("large", "".join(lines)), Document("small", "a small one\n")
    (head,), (tail,) = split([large], 0.1, seed=0)
    assert head.text == "".join(lines[:90]) and tail.text == "".join(lines[90:]) and head.name == tail.name == "large"
    train, validation = split([small, large], 0.1, seed=0)
    assert train == [small, head] and validation == [tail]
    copies = split([large, large], 0.1, seed=0)
    assert copies == ([head, head], [tail, tail])


def test_text_without_lines_is_cut_between_words_or_characters():
    (head,), (tail,) = split([Document("words", "title\n" + "word " * 1000)], 0.2, seed=0)
    assert head.text.endswith("word ") and tail.text.startswith("word ") and 990 <= len(tail.text) <= 1010
    (head,), (tail,) = split([Document("characters", "한" * 100)], 0.2, seed=0)
    assert len(tail.text) == 20


def test_too_little_to_split():
    with pytest.raises(DataError) as error:
        split([Document("tiny", "ab\n")], 0.1, seed=0)
    assert "tiny: 3 characters are too few" in refusal(error)
    for documents in ([], [Document("blank", " \n")]):
        with pytest.raises(DataError, match="no text to split"):
            split(documents, 0.1, seed=0)
    for fraction in (0.0, 1.0, -1.0, 5.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split([Document("a", "a\nb\n")], fraction, seed=0)


def test_a_run_inside_the_folder_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    for folder, names in (("run", ("recipe.toml", "metrics.csv", "README.md")), ("bundle", ("config.json", "manifest.json", "model.safetensors")),
                          ("c.building", ("build.json", "tokenizer.json", "t.txt"))):
        for name in names:
            (tmp_path / folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("{}")
            (tmp_path / folder / "checkpoints" / "state.json").write_text("{}")
    assert find_files([tmp_path]) == [tmp_path / "a.txt"]
