"""Mistakes of the one who types: each is one line on stderr and status 2, names what would have been right, and changes nothing."""
from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import CONTEXT, Shell, settings
from terminal import tree

GENERATE = ("generate", "{model}", "--prompt", "The red")
PRETRAIN = ("pretrain", "{text}", "--out", "new", *settings("train.steps=1"))
SCORE = ("score", "{model}", "--text")

USAGE = {
    "verb": (("pretrian",), ["unknown command 'pretrian'", "did you mean 'pretrain'?", "`hanok --help`"]),
    "verb below": (("tokenizer", "trian"), ["unknown command 'trian'", "did you mean 'train'?", "`hanok tokenizer --help`"]),
    "verb with help": (("pretrian", "--help"), ["unknown command 'pretrian'", "'pretrain'"]),
    "option": ((*GENERATE, "--max-new-token", "3"), ["--max-new-token.", "Did you mean --max-new-tokens?", "`hanok generate --help`"]),
    "option of nothing": (("show", "{model}", "--frobnicate"), ["--frobnicate", "`hanok show --help`"]),
    "option with a line break": (("show", "{model}", "--a\nb\r\nc\x1b[31m"), ["--a b c\\x1b[31m"]),
    "name with a line break": (("show", "no\nsuch\x07"), ["no such\\x07: there is no such bundle"]),
    "missing": (("show",), ["BUNDLE is missing", "`hanok show --help`"]),
    "missing texts": (("tokenizer", "train", "--out", "new"), ["TEXT is missing"]),
    "missing option": (("generate", "{model}"), ["--prompt", "`hanok generate --help`"]),
    "value of an option": (("pretrain", "{text}", "--out"), ["--out requires an argument"]),
    "one too many": (("show", "{model}", "{model}"), ["is one argument too many", "`hanok show --help`"]),
    "no number": ((*GENERATE, "--seed", "seven"), ["--seed", '"seven"', "int"]),
    "choice": (("tokenizer", "train", "{text}", "--out", "new", "--kind", "bep"), ["bep", '"bpe", "wordpiece", "unigram"', 'Did you mean "bpe"?']),
    "format": (("export", "{model}", "new", "--to", "onnx"), ["onnx", '"hf"']),
    "family": ((*PRETRAIN, "--family", "qwen"), ["unknown family 'qwen'", "did you mean 'qwen3'?"]),
    "family that fills in": (("pretrain", "{text}", "--out", "new", "--family", "bert", "--set", "data.objective=causal"),
                             ["bert cannot learn by data.objective causal; it can by masked"]),
    "no text to train": (("pretrain", "--out", "new"), ["TEXT is missing", "`hanok pretrain --help`"]),
    "no folder to train in": (("pretrain", "{text}"), ["--out is missing", "`hanok pretrain --help`"]),
    "a new run by force": ((*PRETRAIN, "--force"), ["--force belongs to --resume"]),
    "no recipe": ((*PRETRAIN, "--recipe", "none.toml"), ["none.toml: there is no such file"]),
    "resume and text": (("pretrain", "{text}", "--resume", "."), ["TEXT and --resume were both given", "leave TEXT out"]),
    "resume and the seed 0": (("pretrain", "--resume", ".", "--seed", "0"), ["--seed and --resume were both given"]),
    "resume and a recipe": (("pretrain", "--resume", ".", "--recipe", "a.toml"), ["--recipe and --resume were both given"]),
    "preset": ((*PRETRAIN, "--preset", "smal"), ["qwen3 has no preset 'smal'", "did you mean 'small'?"]),
    "set a table": ((*PRETRAIN, "--set", "trian.steps=3"), ["unknown setting 'trian'", "did you mean 'train'?"]),
    "set a name": ((*PRETRAIN, "--set", "train.step=3"), ["unknown setting 'step'", "did you mean 'steps'?"]),
    "set a size": ((*PRETRAIN, "--set", "model.sizes.n_head=3"), ["unknown setting 'n_head'", "did you mean 'n_heads'?"]),
    "set no value": ((*PRETRAIN, "--set", "train.steps"), ["--set train.steps: expected name=value"]),
    "set a word": ((*PRETRAIN, "--set", "train.steps=many"), ["train.steps", "'many'", "a whole number"]),
    "set what is no number": ((*PRETRAIN, "--set", "train.steps=nan"), ["train.steps", "'nan'", "a whole number"]),
    "set below a value": ((*PRETRAIN, "--set", "train.steps.x=1"), ["'steps' is a value, not a table"]),
    "sizes that do not divide": ((*PRETRAIN, "--set", "model.sizes.n_heads=5"), ["d_model 32 is not divisible by n_heads 5", "try "]),
    "heads that do not divide": ((*PRETRAIN, "--set", "model.sizes.n_kv_heads=3"), ["n_heads 2 is not divisible by n_kv_heads 3"]),
    "no steps": (("pretrain", "{text}", "--out", "new", "--steps", "0"), ["train.steps is 0", "1 or more"]),
    "no rate": ((*PRETRAIN, "--set", "train.learning_rate=nan"), ["train.learning_rate is nan"]),
    "vocabulary": (("tokenizer", "train", "{text}", "--out", "new", "--vocab-size", "3"), ["vocab_size 3 is too small", "257"]),
    "temperature": ((*GENERATE, "--temperature", "-1"), ["temperature is -1.0", "0 (greedy) or more"]),
    "nucleus": ((*GENERATE, "--top-p", "1.5"), ["top_p is 1.5", "at most 1"]),
    "twice": ((*GENERATE, "--seed", "1", "--seed", "2"), ["--seed", "multiple times"]),
    "no tokens": ((*GENERATE, "--max-new-tokens", "0"), ["max_new_tokens 0", "1 or more"]),
    "empty prompt": (("generate", "{model}", "--prompt", ""), ["the prompt is empty"]),
    "long prompt": (("generate", "{model}", "--prompt", "x y " * 100), ["the prompt has 400 tokens", f"the model's context {CONTEXT}", "shorten it"]),
    "source": (("pull", "smollm2-135m"), ["'smollm2-135m'", "smollm2-135m-instruct"]),
}
INPUT = {
    "no run": (("pretrain", "--resume", "nothing"), ["nothing is no run: there is nothing of that name"]),
    "a run that is a bundle": (("pretrain", "--resume", "."), [". is no run: it has no recipe.toml"]),
    "no bundle": (("show", "nothing"), ["nothing: there is no such bundle", "hanok pull"]),
    "a bundle that is a file": (("show", "{text}"), ["is a file", "a bundle is a folder"]),
    "a bundle that is a folder": (("show", "."), ["is no bundle", "config.json"]),
    "a name too long": (("show", "n" * 3000), ["File name too long"]),
    "missing text": ((*SCORE, "nothing.txt"), ["nothing.txt: there is no such file"]),
    "missing text to train": (("pretrain", "{text}", "nothing.txt", "--out", "new"), ["nothing.txt: there is no such file"]),
    "missing text for words": (("tokenizer", "train", "nothing.txt", "--out", "new"), ["nothing.txt: there is no such file"]),
    "text that is a folder": ((*SCORE, "."), ["this is a folder; a file was expected"]),
    "folder without text": (("pretrain", ".", "--out", "../new"), ["no text files in this folder", ".txt"]),
    "empty text": ((*SCORE, "{tmp}/empty.txt"), ["empty.txt is empty"]),
    "empty text to train": (("pretrain", "{tmp}/empty.txt", "--out", "new"), ["empty.txt: nothing but white space"]),
    "empty text for words": (("tokenizer", "train", "{tmp}/empty.txt", "--out", "new"), ["empty.txt: nothing but white space"]),
    "no UTF-8": ((*SCORE, "{tmp}/latin.txt"), ["latin.txt: not utf-8: 0xe9 at byte 907", "--encoding"]),
    "no UTF-8 to train": (("pretrain", "{tmp}/latin.txt", "--out", "new"), ["latin.txt: not utf-8: 0xe9 at byte 907", "--encoding"]),
    "no UTF-8 for words": (("tokenizer", "train", "{tmp}/latin.txt", "--out", "new"), ["latin.txt: not utf-8: 0xe9 at byte 907", "--encoding"]),
    "encoding": ((*SCORE, "{tmp}/latin.txt", "--encoding", "latin-77"), ["unknown encoding 'latin-77'", "cp949"]),
    "one token": ((*SCORE, "{tmp}/short.txt"), ["1 token;", "at least 2"]),
    "missing model": (("import", "nothing", "new"), ["nothing: there is no such file or folder", ".gguf"]),
    "text as a model": (("import", "{text}", "new"), ["is not a model", ".gguf"]),
    "missing path": (("pull", "file:nothing", "--to", "new"), ["nothing is not there"]),
}


@pytest.fixture
def places(model: Path, text: Path, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"The house is red.\n" * 50 + b"The caf\xe9 is red.\n" * 20)
    return {"model": model, "text": text, "tmp": tmp_path}


@pytest.mark.parametrize("name", [*USAGE, *INPUT])
def test_a_mistake_is_one_line(name: str, shell: Shell, places: dict[str, object]):
    arguments, expected = {**USAGE, **INPUT}[name]
    line = shell.refused(*(argument.format(**places) for argument in arguments))
    assert not [part for part in expected if part not in line], line


def test_no_name_is_in_both_tables():
    assert not USAGE.keys() & INPUT.keys()


def test_the_encoding_that_is_named_is_used(shell: Shell, places: dict[str, object]):
    latin, how = places["tmp"] / "latin.txt", ("--encoding", "latin-1", "--json")
    assert shell("score", places["model"], "--text", latin, *how).json()["tokens"] > 100
    assert shell("tokenizer", "train", latin, "--out", "tok", "--vocab-size", 290, *how).status == 0
    assert shell("pretrain", latin, "--out", "run", "--steps", 1, *settings(), *how).status == 0
    assert "café" in shell("generate", "run", "--prompt", "café", "--max-new-tokens", 1, "--json").json()["prompt"]


@pytest.mark.parametrize("verb", ["pretrain {text} --out old --steps 1", "tokenizer train {text} --out old", "export {model} old",
                                  "import {model} old", "pull {model} --to old"])
@pytest.mark.parametrize("kind", ["folder", "file", "below a file"])
def test_an_out_that_is_taken_stays_as_it_is(verb: str, kind: str, shell: Shell, model: Path, text: Path):
    old = shell.cwd / "old"
    if kind == "folder":
        (old / ".hidden").mkdir(parents=True)
    else:
        old.write_text("mine")
    arguments = [argument.format(model=model, text=text) for argument in verb.split()]
    if kind == "below a file":
        arguments[arguments.index("old")] = "old/new"
    before = tree(shell.cwd)
    ended = shell(*arguments)
    told = {"folder": "old is not empty; choose another folder", "file": "old is a file; a new folder was expected",
            "below a file": "a part of this path is a file, not a folder"}[kind]
    assert ended.status == 2 and told in ended.lines[-1] and ended.out == "", ended
    assert tree(shell.cwd) == before
    assert len(ended.lines) == 1 or kind == "below a file"


def test_an_empty_out_is_taken(shell: Shell, model: Path):
    (shell.cwd / "new").mkdir()
    assert shell("import", model, "new").status == 0 and (shell.cwd / "new/config.json").exists()


@pytest.mark.parametrize("verb", ["score {model} --text {secret}", "pretrain {secret} --out new", "tokenizer train {secret} --out new"])
def test_what_may_not_be_read_is_told(verb: str, shell: Shell, model: Path):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        secret = Path(name) / "secret.txt"
        secret.write_text("The red house.\n" * 20)
        secret.chmod(0)
        nobody = {"uid": 65534} if os.geteuid() == 0 else {}
        if not nobody and os.access(secret, os.R_OK):
            pytest.skip("this user may read everything")
        ended = shell(*verb.format(model=model, secret=secret).split(), **nobody)
        assert ended.refused() == f"hanok: {secret}: permission denied; choose another place or change its rights"


@pytest.mark.parametrize("verb", ["pretrain {text} --out {locked}/new --steps 1", "tokenizer train {text} --out {locked}/new"])
def test_where_nothing_may_be_written_is_told(verb: str, shell: Shell, text: Path):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        readable = Path(shutil.copy(text, name))
        locked = Path(name) / "locked"
        locked.mkdir()
        locked.chmod(0o555)
        nobody = {"uid": 65534} if os.geteuid() == 0 else {}
        (Path(name) / "hanok").mkdir()
        (Path(name) / "hanok").chmod(0o777)
        if not nobody and os.access(locked, os.W_OK):
            pytest.skip("this user may write everywhere")
        ended = shell(*verb.format(text=readable, locked=locked).split(), *(settings() if verb.startswith("pretrain") else ()), **nobody,
                      env={"HANOK_HOME": f"{name}/hanok"})
        assert ended.status == 2 and ended.lines[-1].startswith(f"hanok: {locked}/new: permission denied"), ended
        assert not list(locked.iterdir())
