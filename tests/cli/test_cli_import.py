"""What other tools wrote becomes a bundle that answers: nanoGPT's checkpoint, llama2.c's files, tiktoken's ranks."""
from __future__ import annotations

import base64
import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import Shell

from hanok.bundle.bundle import load_bundle
from hanok.text.tokenizer import Tokenizer

END = "<|endoftext|>"


@pytest.fixture
def ranks(shell: Shell) -> Path:
    """words.tiktoken: all bytes, and "he", "the"."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"the"]
    path = shell.cwd / "words.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


@pytest.fixture
def checkpoint(shell: Shell) -> Path:
    """ckpt.pt: a nanoGPT of one layer, all zeros."""
    shapes = {"transformer.wte.weight": (260, 8), "transformer.wpe.weight": (16, 8), "transformer.ln_f.weight": (8,)} | {
        f"transformer.h.0.{name}.weight": shape for name, shape in {"ln_1": (8,), "ln_2": (8,), "attn.c_attn": (24, 8), "attn.c_proj": (8, 8),
                                                                    "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}.items()}
    args = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": False, "vocab_size": 260, "dropout": 0.0}
    torch.save({"model": {name: torch.zeros(shape) for name, shape in shapes.items()}, "model_args": args, "iter_num": 1}, shell.cwd / "ckpt.pt")
    return shell.cwd / "ckpt.pt"


def test_a_rank_file_becomes_a_tokenizer(shell: Shell, ranks: Path):
    specials = ("--special", f"{END}=258", "--special", "<=>=259")
    told = shell("tokenizer", "import", ranks, "--out", "words", "--pre-tokenizer", "gpt-2", *specials, "--json")
    assert told.json() == {"tokenizer": "words/tokenizer.json", "kind": "bpe", "vocab_size": 260, "specials": {END: 258, "<=>": 259}}
    assert Tokenizer.load(shell.cwd / "words").encode(f"the he{END}", parse_special=True) == [257, 32, 256, 258]
    again = shell("tokenizer", "import", "words", "--out", "again")
    assert again.lines[0] == "bpe tokenizer of 260 tokens in again, 2 of them special"
    assert (shell.cwd / "again/tokenizer.json").read_bytes() == (shell.cwd / "words/tokenizer.json").read_bytes()
    assert "hanok import MODEL NEW --tokenizer again" in again.next_commands()


@pytest.mark.parametrize(("more", "told"), [
    ((), "say how it cuts words: --pre-tokenizer gpt-2|"),
    (("--pre-tokenizer", "cl100"), '"cl100k"'),
    (("--pre-tokenizer", "gpt-2", "--special", "<|x|>"), "--special <|x|>: expected NAME=ID, for example"),
    (("--pre-tokenizer", "gpt-2", "--special", "<|x|>=one"), "--special <|x|>=one: expected NAME=ID"),
    (("--pre-tokenizer", "gpt-2", "--special", "<|x|>=1"), "special token '<|x|>' has id 1, which is line 2's"),
])
def test_a_rank_file_that_is_not_understood_changes_nothing(shell: Shell, ranks: Path, more: tuple[str, ...], told: str):
    assert told in shell.refused("tokenizer", "import", ranks, "--out", "words", *more)


def test_a_damaged_rank_file_is_told_by_its_line(shell: Shell, ranks: Path):
    ranks.write_bytes(ranks.read_bytes().replace(b"BQ== 5", b"BQ= 5"))
    assert "words.tiktoken: line 6: b'BQ=' is not base64" in shell.refused("tokenizer", "import", ranks, "--out", "words", "--pre-tokenizer", "gpt-2")


def test_what_only_a_rank_file_is_told_is_refused_elsewhere(shell: Shell, model: Path):
    line = shell.refused("tokenizer", "import", model, "--out", "words", "--special", "<|x|>=1")
    assert "is no rank file of tiktoken's; only for one are --pre-tokenizer and --special told" in line


def test_what_is_not_there_is_told(shell: Shell):
    assert "nothing.tiktoken: there is no such file" in shell.refused("tokenizer", "import", "nothing.tiktoken", "--out", "words")
    assert "words" in shell("tokenizer", "import", "pypi:words==1.0#words/w.tiktoken", "--out", "words").refused()


def test_a_nanogpt_checkpoint_answers_once_it_has_a_tokenizer(shell: Shell, checkpoint: Path, ranks: Path):
    bare = shell("import", checkpoint, "bare")
    assert bare.lines[:2] == ["gpt2 bundle in bare",
                              "it has no tokenizer, so it cannot read text; `hanok import ckpt.pt NEW --tokenizer FILE` gives it one"]
    assert "bare has no tokenizer.json" in shell.refused("generate", "bare", "--prompt", "the")
    shell("tokenizer", "import", ranks, "--out", "words", "--pre-tokenizer", "gpt-2", "--special", f"{END}=258")
    whole = shell("import", checkpoint, "whole", "--tokenizer", "words")
    assert whole.lines == ["gpt2 bundle in whole", "next: hanok show whole"]
    assert load_bundle(shell.cwd / "whole").generation.stop_ids == (258,)
    assert shell("generate", "whole", "--prompt", "the", "--max-new-tokens", 3).status == 0
    assert shell("show", "whole").status == 0


def test_a_tokenizer_of_another_model_is_refused(shell: Shell, checkpoint: Path, ranks: Path):
    shell("tokenizer", "import", ranks, "--out", "words", "--pre-tokenizer", "gpt-2", "--special", f"{END}=260")
    assert "the tokenizer has 261 tokens, the model knows 260" in shell.refused("import", checkpoint, "new", "--tokenizer", "words")


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("verb", ["import {path} new", "pull {path} --to new", "pull file:{path} --to new"])
def test_a_pickle_that_holds_code_is_refused_and_never_run(shell: Shell, checkpoint: Path, tmp_path: Path, verb: str):
    torch.save({**torch.load(checkpoint), "config": Code(tmp_path / "it ran")}, checkpoint)
    line = shell.refused(*verb.format(path=checkpoint).split())
    assert "ckpt.pt is a pickle that holds code (posix.mkdir), and none of it was run" in line
    assert not (tmp_path / "it ran").exists()


def test_characters_become_a_tokenizer_that_a_model_of_them_takes(shell: Shell, text: Path, checkpoint: Path):
    ended = shell("tokenizer", "train", text, "--kind", "characters", "--out", "letters")
    n = len(set(text.read_text()))
    assert ended.status == 0 and ended.lines[0] == f"characters tokenizer of {n} tokens in letters: 1.00 bytes a token on its own text"
    assert ended.next_commands()[1] == "hanok import ckpt.pt NEW --tokenizer letters"
    assert shell("import", checkpoint, "new", "--tokenizer", "letters").status == 0
    assert "tokenizer: characters" in shell("show", "new").out
    assert shell("generate", "new", "--prompt", "The red", "--max-new-tokens", 2).status == 0
    assert "got '한' at character 4, which this tokenizer does not know" in shell.refused("generate", "new", "--prompt", "The 한옥")


def test_a_table_of_characters_is_refused_by_name(shell: Shell, checkpoint: Path):
    (shell.cwd / "meta.pkl").write_bytes(b"\x80\x04.")
    assert "meta.pkl is a pickle, which can run code and is not opened" in shell.refused("import", checkpoint, "new", "--tokenizer", "meta.pkl")


def test_a_llama2c_model_and_its_tokenizer_answer(shell: Shell):
    n_floats = 270 * 8 + 8 + 4 * 64 + 8 + 3 * 8 * 16 + 8 + 16 * 4
    (shell.cwd / "model.bin").write_bytes(struct.pack("<7i", 8, 16, 1, 2, 2, 270, 16) + bytes(4 * n_floats))
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256)), b" t", b"he", b" the", b" ", b"t", b"h", b"e"]
    entries = b"".join(struct.pack("<fi", -n, len(piece)) + piece for n, piece in enumerate(pieces))
    (shell.cwd / "tokenizer.bin").write_bytes(struct.pack("<i", 7) + entries)
    assert shell("import", "model.bin", "new", "--tokenizer", "tokenizer.bin").lines == ["llama bundle in new", "next: hanok show new"]
    bundle = load_bundle(shell.cwd / "new")
    assert bundle.tokenizer.encode("the", add_special=True) == [1, 261] and bundle.generation.stop_ids == (1, 2)
    assert shell("generate", "new", "--prompt", "the", "--max-new-tokens", 3).status == 0
    assert f"model.bin has {28 + 4 * n_floats - 1} bytes, expected {28 + 4 * n_floats}" in cut(shell)


def cut(shell: Shell) -> str:
    path = shell.cwd / "model.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return shell.refused("import", path, "other")
