"""A model is a folder: weights, config, tokenizer, chat template, how it generates, where it comes from, and a card written from them.

Train, evaluate, export and serve read nothing else, so what is served is what was trained. A bundle appears whole or not at all.
"""
from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import hanok
from hanok import report
from hanok.bundle.weights import assign, parameters, read_folder, write_safetensors
from hanok.config import from_dict, read_json, to_dict, write_json
from hanok.disk import new_dir, read_text, sha256, write_text
from hanok.errors import ConfigError, DataError
from hanok.models import catalog
from hanok.models.family import Family
from hanok.nn.attention import Attention
from hanok.nn.convolution import GatedConvolutions
from hanok.nn.layers import MLP, Embedding, GatedMLP
from hanok.nn.position import RelativeBias
from hanok.nn.recurrent import Alignment, GRUCell, LSTMCell
from hanok.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """How a model is asked: generation.json."""
    stop_ids: tuple[int, ...] = ()                       # tokens that end an answer
    start_ids: tuple[int, ...] = ()                      # what an encoder-decoder's decoder begins with
    pad_id: int = 0                                      # what fills short rows
    temperature: float = 0.0                             # 0: greedy
    top_k: int = 0                                       # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    add_special: bool = False                            # whether what is read gets [CLS], </s> or the like
    pooling: Literal["mean", "first", "last"] = "mean"   # which hidden vectors make a text's embedding


@dataclass
class Bundle:
    """A model with everything that it needs to be used."""
    family: Family
    config: Any
    model: nn.Module
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    generation: Generation = field(default_factory=Generation)
    manifest: dict[str, Any] = field(default_factory=dict)


def is_bundle(path: Path | str) -> bool:
    """Whether the folder's config.json names a family."""
    file = Path(path) / "config.json"
    return file.is_file() and '"family"' in file.read_text(errors="replace")


def read_bundle_config(path: Path | str) -> tuple[Family, Any]:
    """The family and sizes of a bundle. HanokError says what a folder is when it is no bundle."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such bundle; make one with `hanok pull`, `hanok import` or `hanok pretrain`")
    if path.is_file():
        raise DataError(f"{path} is a file; a bundle is a folder: `hanok import {path} OUT` makes one of a GGUF file")
    if not (path / "config.json").exists():
        raise DataError(f"{path} is no bundle: it has no config.json")
    data = read_json(path / "config.json")
    if "family" not in data:
        hint = f"`hanok import {path} OUT` makes a bundle of it" if "model_type" in data else "a bundle's config.json names one"
        raise DataError(f"{path}/config.json names no family; {hint}")
    family = catalog.family(str(data.pop("family")))
    return family, from_dict(family.config, data, f"{path}/config.json")


class _NothingToDraw(TorchFunctionMode):
    """In-place drawing of weights does nothing: on meta tensors it would only import half of torch's compiler (76 MB and a second)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(family: Family, config: Any) -> nn.Module:
    """The model's structure without memory for its weights. ConfigError where sizes don't divide, or cannot be."""
    try:
        with torch.device("meta"), _NothingToDraw():
            return family.build(config)
    except (RuntimeError, ValueError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"a {family.name} of these sizes cannot be built: {reason}") from None


def load_bundle(path: Path | str) -> Bundle:
    """Opens a bundle; its weights are memory-mapped in the precision that they are stored in. HanokError names what is wrong with it."""
    path = Path(path)
    family, config = read_bundle_config(path)
    model = empty_model(family, config)
    assign(model, read_folder(path), str(path))
    tokenizer = Tokenizer.load(path / "tokenizer.json") if (path / "tokenizer.json").exists() else None
    check_vocabulary(config, tokenizer, str(path))
    template = path / "chat_template.jinja"
    generation = path / "generation.json"
    manifest = path / "manifest.json"
    return Bundle(
        family, config, model.eval(), tokenizer, read_text(template) if template.exists() else None,
        from_dict(Generation, read_json(generation), str(generation)) if generation.exists() else Generation(),
        read_json(manifest) if manifest.exists() else {})


def save_bundle(bundle: Bundle, out: Path | str) -> Path:
    """Writes the bundle as a new folder `out`. DataError if it is not empty; nothing is left half-written."""
    out = Path(out)
    with new_dir(out) as folder:
        write_files(bundle, folder, name=out.name)
    return out


def write_files(bundle: Bundle, folder: Path, name: str) -> None:
    """The bundle's files, each in one piece, into an existing folder. config.json, which makes it a bundle, comes last."""
    write_safetensors(folder / "model.safetensors", parameters(bundle.model), {"family": bundle.family.name})
    write_json(folder / "generation.json", to_dict(bundle.generation))
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / "tokenizer.json")
    if bundle.chat_template is not None:
        write_text(folder / "chat_template.jinja", bundle.chat_template)
    bundle.manifest = {**bundle.manifest, "versions": versions(), "weights_sha256": sha256(folder / "model.safetensors")}
    write_json(folder / "manifest.json", bundle.manifest)
    write_text(folder / "README.md", card(bundle, name))
    write_json(folder / "config.json", {"family": bundle.family.name, **to_dict(bundle.config)})


def write_at_top(bundle: Bundle, folder: Path) -> None:
    """The bundle's files beside what a folder holds already: made apart, then renamed into it, config.json last; none stays if one cannot."""
    moved: list[Path] = []
    made = folder / "bundle.new"
    try:
        with new_dir(made) as scratch:
            write_files(bundle, scratch, name=folder.name)
        for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
            moved.append(file.rename(folder / file.name))
    except BaseException:
        for file in (*moved, *(made.iterdir() if made.exists() else ())):
            file.unlink()
        raise
    finally:
        if made.exists():
            made.rmdir()


def versions() -> dict[str, str]:
    """What made a bundle."""
    return {"hanok": hanok.__version__, "torch": torch.__version__, "python": platform.python_version()}


PARTS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("embedding", (Embedding,)), ("norms", (nn.LayerNorm, nn.RMSNorm)), ("attention", (Attention, Alignment, RelativeBias)),
    ("feed-forward", (MLP, GatedMLP)), ("recurrence", (nn.RNNBase, GRUCell, LSTMCell)), ("convolution", (GatedConvolutions,)))
"""What a parameter is part of: the first of these kinds of module that holds it."""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part; a tied matrix counts once, as embedding. What is in no part is `other`, or `head` where the model's head holds it."""
    parts, seen = {name: 0 for name, _ in PARTS} | {"head": 0, "other": 0}, set[int]()

    def claim(name: str, module: nn.Module) -> None:
        fresh = {id(parameter): parameter.numel() for parameter in module.parameters() if id(parameter) not in seen}
        seen.update(fresh)
        parts[name] += sum(fresh.values())

    for name, kinds in PARTS:
        for module in model.modules():
            if isinstance(module, kinds):
                claim(name, module)
    claim("head", getattr(model, "head", nn.Identity()))
    claim("other", model)
    return {part: n for part, n in parts.items() if n}


def card(bundle: Bundle, name: str) -> str:
    """The bundle's README.md, written from what it holds."""
    manifest = bundle.manifest
    n_parameters = sum(count_parameters(bundle.model).values())
    sizes = {"parameters": n_parameters, **{k: v for k, v in to_dict(bundle.config).items() if isinstance(v, int | float)}}
    usage = [f'hanok generate {name} --prompt "..."'] if bundle.family.kind != "encoder" else [f"hanok show {name}"]
    if bundle.chat_template is not None:
        usage.append(f"hanok chat {name}")
    if bundle.family.objective == "causal":
        usage.append(f"hanok score {name} --text FILE")
    lineage = {k: v for k, v in manifest.items() if k not in ("metrics", "licence", "plot")}
    return report.card(title=name, family=bundle.family.name, sizes=sizes, metrics=manifest.get("metrics", {}), lineage=lineage, usage=usage,
                       licence=manifest.get("licence", ""), plot=manifest.get("plot"))


def check_vocabulary(config: Any, tokenizer: Tokenizer | None, where: str) -> None:
    """ConfigError for a tokenizer with ids that the model has no row for."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}; they are not of one model")


def check_tokenizer(bundle: Bundle, where: str) -> Tokenizer:
    """The bundle's tokenizer. ConfigError where it has none."""
    if bundle.tokenizer is None:
        raise ConfigError(f"{where} has no tokenizer.json, and text is asked for; `hanok import {where} NEW --tokenizer FILE` gives it one")
    return bundle.tokenizer
