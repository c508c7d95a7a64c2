"""nanoGPT checkpoints, written here as nanoGPT writes them: the same logits as its equations, and pickles that hold code, never run."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hanok.bundle.bundle import load_bundle, save_bundle
from hanok.bundle.imports import load_any, read_tokenizer
from hanok.bundle.nanogpt import import_nanogpt
from hanok.contracts import Batch
from hanok.disk import sha256
from hanok.errors import ConfigError, HanokError, TokenizerError, WeightsError
from hanok.text.tokenizer import train
from tiny import WORDS, tokenizer

ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "bias": False, "vocab_size": 304, "dropout": 0.1}
IDS = torch.arange(2, 26).view(2, 12)


class NanoGPT(nn.Module):
    """nanoGPT's equations, under its names."""

    def __init__(self, args: dict):
        super().__init__()
        width, bias = args["n_embd"], args.get("bias", True)

        def layer() -> nn.ModuleDict:
            return nn.ModuleDict({
                "ln_1": nn.LayerNorm(width, bias=bias), "ln_2": nn.LayerNorm(width, bias=bias),
                "attn": nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width, bias), "c_proj": nn.Linear(width, width, bias)}),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width, bias), "c_proj": nn.Linear(4 * width, width, bias)})})

        self.n_heads = args["n_head"]
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(args["vocab_size"], width), "wpe": nn.Embedding(args["block_size"], width),
            "h": nn.ModuleList([layer() for _ in range(args["n_layer"])]), "ln_f": nn.LayerNorm(width, bias=bias)})
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.size(1)))
        for layer in parts["h"]:
            x = x + self.attend(layer["attn"], layer["ln_1"](x))
            x = x + layer["mlp"]["c_proj"](F.gelu(layer["mlp"]["c_fc"](layer["ln_2"](x))))
        return self.lm_head(parts["ln_f"](x))

    def attend(self, attn: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in attn["c_attn"](x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
        return attn["c_proj"]((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


def made(**changes) -> tuple[NanoGPT, dict]:
    """A model, and what train.py saves of it."""
    args = {name: value for name, value in {**ARGS, **changes}.items() if value is not None}
    torch.manual_seed(0)
    net = NanoGPT(args)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(net.parameters())
    net(IDS).sum().backward()
    optimizer.step()
    return net.eval(), {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 250,
                        "best_val_loss": torch.tensor(3.5), "config": {"dataset": "made", "device": "cpu", "learning_rate": 6e-4}}


def saved(path: Path, data: object) -> Path:
    torch.save(data, path)
    return path


def assert_same_logits(ours: nn.Module, theirs: NanoGPT) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(Batch(IDS)), theirs(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_nanogpts(tmp_path, bias):
    theirs, data = made(bias=bias)
    bundle = import_nanogpt(saved(tmp_path / "ckpt.pt", data))
    assert_same_logits(bundle.model, theirs)
    assert bundle.family.name == "gpt2" and bundle.tokenizer is None
    assert (bundle.config.activation, bundle.config.d_ff, bundle.config.max_seq_len) == ("gelu", 128, 16)
    assert (bundle.config.dropout, bundle.config.attention_dropout) == (0.1, 0.1)
    assert bundle.manifest["parent"] == {"format": "nanogpt", "sha256": sha256(tmp_path / "ckpt.pt"), "steps": 250, "validation_loss": 3.5}


def test_a_saved_bundle_is_safetensors_with_the_same_logits(tmp_path):
    theirs, data = made()
    save_bundle(load_any(saved(tmp_path / "ckpt.pt", data)), tmp_path / "out")
    (tmp_path / "ckpt.pt").unlink()
    assert_same_logits(load_bundle(tmp_path / "out").model, theirs)


def test_a_compiled_models_names_and_the_causal_buffer_are_understood(tmp_path):
    theirs, data = made(bias=None)                       # the oldest checkpoints do not tell: then the weights do
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    data["model"] = {f"_orig_mod.{name}": tensor for name, tensor in {**data["model"], **mask}.items()}
    assert_same_logits(import_nanogpt(saved(tmp_path / "ckpt.pt", data)).model, theirs)


def test_half_precision_becomes_fp32(tmp_path):
    theirs, data = made()
    data["model"] = {name: tensor.bfloat16() for name, tensor in data["model"].items()}
    bundle = import_nanogpt(saved(tmp_path / "ckpt.pt", data))
    assert_same_logits(bundle.model, theirs.bfloat16().float())


def test_a_tokenizer_is_taken_with_it(tmp_path):
    _, data = made()
    words = tokenizer()
    bundle = load_any(saved(tmp_path / "ckpt.pt", data), words)
    save_bundle(bundle, tmp_path / "out")
    again = load_bundle(tmp_path / "out")
    assert again.tokenizer.encode(WORDS[4]) == words.encode(WORDS[4]) and again.config.vocab_size == 304 > words.vocab_size
    assert again.generation.stop_ids == (words.id_of("<|endoftext|>"),) and not again.generation.add_special
    _, small = made(vocab_size=65)
    with pytest.raises(ConfigError, match="the tokenizer has 300 tokens, the model knows 65; they are not of one model"):
        load_any(saved(tmp_path / "small.pt", small), words)


# ---- what is refused

class Code:
    """Leaves a file where it is unpickled."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def refused(path: Path, error: type[HanokError] = WeightsError) -> str:
    with pytest.raises(error) as told:
        load_any(path)
    assert "\n" not in str(told.value) and str(told.value).startswith(str(path))
    return str(told.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("place", ["optimizer", "model", "config"])
def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path, suffix, place):
    witness = tmp_path / "it ran"
    for call, name in ((Code(os.mkdir, str(witness)), os.mkdir.__module__ + ".mkdir"), (Code(eval, f"open({str(witness)!r}, 'w').close()"), "eval")):
        _, data = made()
        data[place] = {**data[place], "extra": call}
        path = saved(tmp_path / f"ckpt{suffix}", data)
        assert f"is a pickle that holds code ({name}" in (told := refused(path)) and "none of it was run" in told
        assert not witness.exists()
    torch.load(path, weights_only=False)                 # it would have run
    assert witness.exists()


def test_a_class_of_somebodys_own_is_code(tmp_path):
    _, data = made()
    data["config"]["shape"] = nn.Linear(2, 2)
    assert "holds code (torch.nn.modules.linear.Linear)" in refused(saved(tmp_path / "ckpt.pt", data))


@pytest.mark.parametrize("data", [{"state_dict": {}}, {"model": nn.Linear(2, 2).state_dict()}, {"model": {"x": 1}, "model_args": ARGS},
                                  {"model": {1: torch.ones(1)}, "model_args": ARGS}, [1], {}])
def test_other_pickles_are_refused(tmp_path, data):
    told = refused(saved(tmp_path / "model.pt", data))
    assert "is a pickle, which can run code when it is read, and is not nanoGPT's" in told
    assert "'model' and 'model_args' were expected; convert it to safetensors" in told


def test_what_is_no_archive_of_torch_is_refused_unread(tmp_path):
    torch.save(made()[1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "is a pickle, which can run code when it is read; convert it to safetensors" in refused(tmp_path / "old.pt")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_cut_short_file_is_told(tmp_path, share):
    whole = saved(tmp_path / "whole.pt", made()[1]).read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[:int(len(whole) * share)])
    assert "is cut short or damaged" in refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(("change", "error", "told"), [
    (lambda data: data["model_args"].update(use_rmsnorm=True), ConfigError, "'use_rmsnorm' = True is not known for nanoGPT"),
    (lambda data: data["model_args"].pop("n_head"), ConfigError, "'n_head' is missing"),
    (lambda data: data["model_args"].pop("n_embd"), ConfigError, "'n_embd' is missing"),
    (lambda data: data["model_args"].update(n_head=5), ConfigError, "d_model 32"),
    (lambda data: data["model_args"].update(n_layer=10**9), WeightsError, "model_args tells of 1000000000 layers"),
    (lambda data: data["model_args"].update(n_layer=1), WeightsError, "'transformer.h.1.ln_1.weight' (32,) has no place in nanoGPT"),
    (lambda data: data["model_args"].update(bias=True), WeightsError, "tensor 'transformer.ln_f.bias' is missing"),
    (lambda data: data["model_args"].update(block_size=8), WeightsError, "has shape (16, 32), the config wants (8, 32)"),
    (lambda data: data["model"].pop("transformer.h.0.mlp.c_fc.weight"), WeightsError, "tensor 'transformer.h.0.mlp.c_fc.weight' is missing"),
    (lambda data: data["model"].update({"lm_head.weight": torch.zeros(304, 32)}), WeightsError, "'lm_head.weight' differs from"),
    (lambda data: data["model"].update({"transformer.extra": torch.zeros(3)}), WeightsError, "'transformer.extra' (3,) has no place in nanoGPT"),
])
def test_what_would_not_compute_the_same_is_refused(tmp_path, change, error, told):
    _, data = made()
    change(data)
    path = saved(tmp_path / "ckpt.pt", data)
    with pytest.raises(error) as raised:
        load_any(path)
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt"])
def test_an_empty_file_is_no_pickle(suffix, tmp_path):
    (tmp_path / f"x.{suffix}").write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"x\.{suffix} is empty; fetch it again$"):
        load_any(tmp_path / f"x.{suffix}")


def test_a_model_of_characters_gets_the_characters_of_its_text(tmp_path):
    """nanoGPT's prepare.py numbers them as sorted(set(text)) and saves no more rows than that."""
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\r\n\tnaïve 한옥 🏠"
    characters = sorted(set(text))
    made_up = saved(tmp_path / "ckpt.pt", made(vocab_size=len(characters))[1])
    loaded = load_any(made_up, train("characters", [text], 8192))
    assert loaded.config.vocab_size == loaded.tokenizer.vocab_size == len(characters)
    assert loaded.tokenizer.encode(text) == [characters.index(character) for character in text] and loaded.generation.stop_ids == ()


def test_a_table_of_characters_that_is_a_pickle_is_refused(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(TokenizerError, match=r"meta\.pkl is a pickle, which can run code.*hanok tokenizer train input.txt --kind characters"):
        read_tokenizer(tmp_path / "meta.pkl")
