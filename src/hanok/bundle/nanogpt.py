"""nanoGPT's checkpoints as GPT-2 bundles. They are pickles: torch reads them as data alone (weights_only), and one that holds code is refused unrun.

This is the one room that opens a pickle. nanoGPT keeps linear layers as torch does, uses the exact GELU, and trains without biases by default, which
are zeros here. Source: github.com/karpathy/nanoGPT, model.py and train.py.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanok.bundle import huggingface as hf
from hanok.bundle.bundle import Bundle, empty_model
from hanok.bundle.weights import assign, converted, refuse_pickle
from hanok.disk import disk_error, sha256
from hanok.errors import WeightsError
from hanok.models import catalog
from hanok.models.family import REQUIRED, HFTable, Layout, Weight, dense, same
from hanok.models.gpt import GPTConfig

SUFFIXES = (".pt", ".pth", ".ckpt")
ZIP = b"PK\x03\x04"
THIRDS = Layout(lambda theirs: theirs.chunk(3), lambda ours: torch.cat(list(ours)))


def weights_of(config: GPTConfig) -> list[Weight]:
    """nanoGPT's names, with all biases."""
    weights = same(("transformer.wte.weight", "embed.token.weight"), ("transformer.wpe.weight", "embed.position.table.weight"))
    weights += dense("transformer.ln_f", "stack.final_norm")
    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}.", f"stack.blocks.{i}."
        weights += [Weight(f"{theirs}attn.c_attn.{part}", tuple(f"{ours}attention.{p}_proj.{part}" for p in "qkv"), THIRDS)
                    for part in ("weight", "bias")]
        weights += dense(f"{theirs}attn.c_proj", f"{ours}attention.out_proj")
        weights += dense(f"{theirs}mlp.c_fc", f"{ours}ffn.up") + dense(f"{theirs}mlp.c_proj", f"{ours}ffn.down")
        weights += dense(f"{theirs}ln_1", f"{ours}residual.0.norm") + dense(f"{theirs}ln_2", f"{ours}residual.1.norm")
    return weights


def read_args(data: dict[str, Any]) -> dict[str, Any]:
    """What nanoGPT's model_args leave unsaid: the feed-forward net is 4 times as wide, and attention weights are dropped as all else."""
    return {"n_inner": 4 * data["n_embd"] if "n_embd" in data else None, "attn_dropout": data.get("dropout", 0.0), **data}


TABLE = HFTable(
    "nanoGPT", "nanoGPT",
    {"vocab_size": ("vocab_size", REQUIRED), "n_embd": ("d_model", REQUIRED), "n_layer": ("n_layers", REQUIRED), "n_head": ("n_heads", REQUIRED),
     "block_size": ("max_seq_len", REQUIRED), "n_inner": ("d_ff", REQUIRED), "dropout": ("dropout", 0.0), "attn_dropout": ("attention_dropout", 0.0)},
    weights_of, neutral=frozenset({"bias"}), requires={"activation": "gelu"}, buffers=(r"transformer\.h\.\d+\.attn\.bias",), read=read_args)


def import_nanogpt(path: Path) -> Bundle:
    """A nanoGPT checkpoint as a bundle without a tokenizer, in fp32. HanokError for a pickle that holds code, and for whatever is no nanoGPT."""
    data = read_checkpoint(path)
    tensors, args = {name.removeprefix("_orig_mod."): tensor for name, tensor in data["model"].items()}, data["model_args"]
    family = catalog.family("gpt2")
    config = hf.read_config(TABLE, family, args, tensors, f"{path}: model_args")
    if config.n_layers > len(tensors):
        raise WeightsError(f"{path}: model_args tells of {config.n_layers} layers, the model holds {len(tensors)} tensors; they are not of one model")
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("transformer.wte.weight", head)):
        raise WeightsError(f"{path}: 'lm_head.weight' differs from 'transformer.wte.weight', which nanoGPT ties to it; it is another model's")
    model = empty_model(family, config)
    ours = hf.read_weights(TABLE, config, tensors if args.get("bias") else with_zeros(config, tensors), str(path))
    assign(model, dict(converted(ours.items(), torch.float32)), str(path))
    told = {"steps": data.get("iter_num"), "validation_loss": data.get("best_val_loss")}
    numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in told.items()}
    return Bundle(family, config, model.eval(), manifest={"parent": {
        "format": "nanogpt", "sha256": sha256(path), **{name: value for name, value in numbers.items() if isinstance(value, int | float)}}})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint's dict. WeightsError for a pickle that holds code (it is not run), that is damaged, or that is of something else."""
    try:
        with open(path, "rb") as handle:
            begin = handle.read(len(ZIP))
    except OSError as error:
        raise disk_error(path, error) from None
    if not begin:
        raise WeightsError(f"{path} is empty; fetch it again")
    if begin != ZIP:
        refuse_pickle(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:               # a damaged file raises whatever the part that meets the damage raises
        if type(error).__name__ == "UnpicklingError":
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise WeightsError(f"{path} is a pickle that holds {f'code ({found[1]})' if found else 'more than data'}, and none of it was run; "
                               "convert it to safetensors where you trust it, and bring that") from None
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path} is cut short or damaged ({type(error).__name__}: {reason:.80}); fetch it again") from None
    told = data if isinstance(data, dict) else {}
    weights, args = told.get("model"), told.get("model_args")
    if not (isinstance(weights, dict) and isinstance(args, dict)
            and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items())):
        keys = ", ".join(map(str, list(told)[:4])) if told else type(data).__name__
        raise WeightsError(f"{path} is a pickle, which can run code when it is read, and is not nanoGPT's: it holds {keys}, 'model' and 'model_args' "
                           "were expected; convert it to safetensors where you trust it, and bring that")
    return told


def with_zeros(config: GPTConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and zeros for each bias that is not there."""
    missing = [weight.theirs for weight in weights_of(config) if weight.theirs.endswith(".bias") and weight.theirs not in tensors]
    rows = {name: tensors.get(name.removesuffix("bias") + "weight") for name in missing}
    return {**tensors, **{name: weight.new_zeros(len(weight)) for name, weight in rows.items() if weight is not None}}
