"""hanok export to GGUF: the file, what is told on the terminal, and mistakes that leave nothing behind."""
from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from conftest import Shell, edit

from hanok.bundle.weights import read_safetensors, write_safetensors


def test_there_and_back_through_gguf(shell: Shell, model: Path):
    told = shell("export", model, "x.gguf", "--to", "gguf", "--type", "f32", "--json").json()
    assert told == {"file": "x.gguf", "format": "gguf", "type": "f32", "family": "qwen3", "lost": []}
    assert shell("import", "x.gguf", "back", "--json").json() == {"bundle": "back", "family": "qwen3"}
    ask = ("--prompt", "The red", "--max-new-tokens", 12, "--json")
    assert shell("generate", "back", *ask).json()["answers"] == shell("generate", model, *ask).json()["answers"]
    assert (shell.cwd / "back/chat_template.jinja").read_text() == (model / "chat_template.jinja").read_text()
    assert (shell.cwd / "back/model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size


def test_half_precision_is_what_is_written_unless_told(shell: Shell, model: Path):
    ended = shell("export", model, "it's x.gguf", "--to", "gguf")
    assert ended.status == 0 and "GGUF file (F16) in it's x.gguf" in ended.err
    assert ended.next_commands() == [shlex.join(["llama-cli", "-m", "it's x.gguf"]), shlex.join(["hanok", "import", "it's x.gguf", "NEW"])]
    sizes = {"f16": (shell.cwd / "it's x.gguf").stat().st_size}
    for kind in ("f32", "q8_0"):
        shell("export", model, f"{kind}.gguf", "--to", "gguf", "--type", kind)
        sizes[kind] = (shell.cwd / f"{kind}.gguf").stat().st_size
    assert sizes["q8_0"] < sizes["f16"] < sizes["f32"]


def test_what_the_format_cannot_keep_is_said(shell: Shell, copy: Path):
    edit(copy / "config.json", family="mistral", qk_norm=False, window=16)
    without_head_norms(copy / "model.safetensors")
    ended = shell("export", copy, "x.gguf", "--to", "gguf")
    assert ended.status == 0 and "llama.cpp ignores a Mistral's window: the file's context is 16 tokens, not 64" in ended.lines
    assert shell("show", copy, "--json").json()["family"] == shell("import", "x.gguf", "back", "--json").json()["family"] == "mistral"


def without_head_norms(weights: Path) -> None:
    """A Qwen3's weights as a Llama's."""
    kept = {name: tensor.clone() for name, tensor in read_safetensors(weights).items() if "q_norm" not in name and "k_norm" not in name}
    write_safetensors(weights, kept)


@pytest.mark.parametrize(("arguments", "told"), [
    (("x.gguf",), "x.gguf is for GGUF files, and a Hugging Face folder was asked for; add --to gguf, or leave it out"),
    (("hf", "--type", "f16"), "--type f16 is for GGUF files"), (("hf", "--to", "gguf"), "hf: a GGUF file was asked for; give it a name that ends"),
    (("x.gguf", "--to", "gguf", "--type", "q4"), '"q4"'), (("old.gguf", "--to", "gguf"), "old.gguf is there already; choose another name"),
])
def test_mistakes_are_told_in_a_line(arguments: tuple[str, ...], told: str, shell: Shell, model: Path):
    (shell.cwd / "old.gguf").write_text("mine")
    assert told in shell.refused("export", model, *arguments)


def test_a_family_without_architecture_is_told(shell: Shell, text: Path):
    tiny = [part for setting in ("tokenizer.vocab_size=300", "data.seq_len=32", "train.micro_batch_size=4", "model.sizes.d_model=32",
                                 "model.sizes.n_layers=1", "model.sizes.n_heads=2", "model.sizes.d_ff=64") for part in ("--set", setting)]
    assert shell("pretrain", text, "--family", "gpt", "--out", "run", "--steps", 1, *tiny).status == 0
    for out, to, told in (("x.gguf", "gguf", "GGUF has no architecture for gpt; families that it has one for are gpt2, llama"),
                          ("hf", "hf", "Hugging Face has no class for gpt; families that export are")):
        assert told in shell.refused("export", "run", out, "--to", to)


@pytest.mark.parametrize("n_bytes", [600, 6000, 30_000])
def test_a_file_that_does_not_fit_is_not_begun(n_bytes: int, shell: Shell, model: Path):
    """In its first bytes, in its vocabulary, in its tensors."""
    ended = shell("export", model, "x.gguf", "--to", "gguf", file_bytes=n_bytes)
    assert "the file would be larger than this place allows" in ended.refused() and not list(shell.cwd.iterdir())
