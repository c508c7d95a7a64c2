"""GGUF in: metadata to a config, tensors dequantised by the `gguf` package (every type that it knows) and put where the family's table says.

Shapes in the file are written innermost first; `gguf` turns them round. The file is memory-mapped; a cut-short one is told before anything is read.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanok.config import from_dict
from hanok.disk import disk_error
from hanok.errors import ConfigError, WeightsError
from hanok.models import catalog
from hanok.models.family import REQUIRED, Family, GGUFTable
from hanok.text.gguf_vocab import tokenizer_from_gguf
from hanok.text.tokenizer import Tokenizer

IGNORED = ("general.", "tokenizer.", "quantize.", "split.", "GGUF.")


class Tensors(Mapping[str, Tensor]):
    """The file's tensors by name, in fp32; each is dequantised when it is asked for."""

    def __init__(self, reader: Any, path: Path):
        self.entries, self.path = {tensor.name: tensor for tensor in reader.tensors}, path

    def __getitem__(self, name: str) -> Tensor:
        from gguf import dequantize
        entry = self.entries[name]
        try:
            values = dequantize(entry.data, entry.tensor_type)
        except NotImplementedError:
            raise WeightsError(f"{self.path}: '{name}' has type {entry.tensor_type.name}, which the gguf package cannot dequantise; "
                               "fetch another quantisation, for example Q8_0") from None
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).reshape(tuple(int(n) for n in reversed(entry.shape)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The metadata as plain values, and the tensors. WeightsError for what is no GGUF, is cut short, or has its bytes in another order."""
    from gguf import GGUFEndian, GGUFReader
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise disk_error(path, error) from None
    if magic != b"GGUF":
        raise WeightsError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:               # the package trusts the file, and stumbles in many ways
        raise WeightsError(f"{path} is cut short or damaged ({type(error).__name__}: {' '.join(str(error).split())}); fetch it again") from None
    if reader.endianess != GGUFEndian.LITTLE:
        raise WeightsError(f"{path} was made for machines with the other byte order (big-endian); fetch the usual file, without -be in its name")
    size = path.stat().st_size
    for tensor in reader.tensors:
        end = tensor.data_offset + tensor.n_bytes
        if end > size:
            raise WeightsError(f"{path} is cut short: '{tensor.name}' ends at byte {end}, the file at {size}; fetch it again")
    return metadata, Tensors(reader, path)


def read_gguf(path: Path | str) -> tuple[Family, Any, dict[str, Tensor], Tokenizer | None, dict[str, Any]]:
    """Family, config, our tensors in fp32, tokenizer and metadata of a GGUF file. HanokError names what is not understood."""
    path = Path(path)
    metadata, tensors = open_gguf(path)
    architecture = metadata.get("general.architecture")
    pairs = {table.architecture: (family, table) for family, table in catalog.gguf_tables()}
    if architecture not in pairs:
        raise ConfigError(f"{path}: architecture '{architecture}' has no family here; known are {', '.join(sorted(pairs))}")
    family, table = pairs[architecture]
    config = read_config(family, table, metadata, tensors, str(path))
    ours = read_weights(table, config, tensors, str(path))
    tokenizer = tokenizer_from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    return family, config, ours, tokenizer, metadata


def read_config(family: Family, table: GGUFTable, metadata: Mapping[str, Any], tensors: Tensors, where: str) -> Any:
    """The metadata as our config. ConfigError names what is missing or unknown."""
    prefix = table.architecture + "."
    told = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    values: dict[str, Any] = {"vocab_size": int(tensors.entries["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 0}
    for theirs, (ours, default) in table.settings.items():
        if theirs in told:
            values[ours] = told[theirs]
        elif default is REQUIRED:
            raise ConfigError(f"{where}: '{prefix}{theirs}' is missing; every {table.architecture} has one")
        elif default is not None:
            values[ours] = default
    for name in told:
        if name not in table.settings and name not in table.known:
            raise ConfigError(f"{where}: '{prefix}{name}' = {told[name]!r} is not known for {table.architecture}; "
                              "hanok would not compute the same logits")
    for name in metadata:
        if not name.startswith((prefix, *IGNORED)):
            raise ConfigError(f"{where}: '{name}' is not known; hanok would not compute the same logits")
    try:
        values |= table.read(told, tensors)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{where}: its {table.architecture} metadata does not fit together ({type(error).__name__}: {error}); fetch it again") from None
    return from_dict(family.config, values, where)


def read_weights(table: GGUFTable, config: Any, tensors: Tensors, where: str) -> dict[str, Tensor]:
    """Their tensors as ours. WeightsError names the first that is missing or left over."""
    left = dict.fromkeys(tensors)
    ours: dict[str, Tensor] = {}
    for weight in table.weights(config):
        if weight.theirs not in left:
            raise WeightsError(f"{where}: tensor '{weight.theirs}' is missing; is the file complete?")
        del left[weight.theirs]
        theirs = tensors[weight.theirs]
        try:
            ours.update(zip(weight.ours, weight.layout.unpack(theirs), strict=True))
        except RuntimeError:
            raise WeightsError(f"{where}: tensor '{weight.theirs}' {tuple(theirs.shape)} does not fit the file's sizes; fetch it again") from None
    extra = next((name for name in left if not any(re.fullmatch(pattern, name) for pattern in table.buffers)), None)
    if extra is not None:
        raise WeightsError(f"{where}: tensor {extra!r} has no place in {table.architecture}; hanok would drop it")
    return ours
