"""GGUF in: metadata to a config, tensors dequantised by the `gguf` package (every type that it knows) and put where the family's table says.

The head is read here and not by the package, which believes every count and would fill the memory at a damaged one. Shapes in the file are written
innermost first. The file is memory-mapped; a cut-short one is told before anything is read. Source: GGUF's specification (ggml, docs/gguf.md).
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

IGNORED = ("general.", "tokenizer.", "quantize.", "split.")
SCALARS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, LIST = 8, 9
"""The numbers that the specification gives to the types of metadata."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""
    kind: int                                            # GGML's number of its type
    shape: tuple[int, ...]                               # outermost first
    begin: int                                           # its first byte
    n_rows: int
    row_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.n_rows * self.row_bytes


class Tensors(Mapping[str, Tensor]):
    """The file's tensors by name, in fp32; each is dequantised when it is asked for."""

    def __init__(self, data: np.ndarray, entries: dict[str, Entry], path: Path):
        self.data, self.entries, self.path = data, entries, path

    def __getitem__(self, name: str) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize
        entry = self.entries[name]
        kind = GGMLQuantizationType(entry.kind)
        try:
            values = dequantize(self.data[entry.begin:entry.end].reshape(entry.n_rows, entry.row_bytes), kind)
        except NotImplementedError:
            raise WeightsError(f"{self.path}: {name!r} has type {kind.name}, which the gguf package cannot dequantise; "
                               "fetch another quantisation, for example Q8_0") from None
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Head:
    """Reads a GGUF file's head from the left. ValueError where it promises more than the file holds, before any of that is read."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, n_bytes: int) -> np.ndarray:
        """The next bytes."""
        if n_bytes > len(self.data) - self.at:
            raise ValueError(f"{n_bytes} bytes are promised at byte {self.at}, the file ends at {len(self.data)}")
        self.at += n_bytes
        return self.data[self.at - n_bytes:self.at]

    def number(self, kind: str) -> int:
        return self.take(np.dtype(kind).itemsize).view(kind)[0].item()

    def text(self) -> str:
        return self.take(self.number("<u8")).tobytes().decode()

    def value(self, kind: int) -> Any:
        """A value of the type with this number: a scalar, text, or a list of one of them."""
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(SCALARS[kind])
        item, n = self.number("<u4"), self.number("<u8")
        if item in SCALARS:
            return self.take(n * np.dtype(SCALARS[item]).itemsize).view(SCALARS[item]).tolist()
        if item not in (TEXT, LIST) or n > len(self.data) - self.at:
            raise ValueError(f"a list of {n} values of type {item} at byte {self.at}")
        return [self.value(item) for _ in range(n)]

    def unique(self, known: Mapping[str, Any]) -> str:
        """A name that is not there yet."""
        name = self.text()
        if name in known:
            raise ValueError(f"{name!r} stands there twice")
        return name


def open_gguf(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The metadata as plain values, and the tensors. WeightsError for what is no GGUF, is cut short, or has its bytes in another order."""
    try:
        with open(path, "rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise disk_error(path, error) from None
    if magic != b"GGUF":
        raise WeightsError(f"{path} is not a GGUF file: it begins with {magic!r}, expected b'GGUF'")
    data = np.memmap(path, np.uint8, "r")
    head, metadata = Head(data), {}  # type: tuple[Head, dict[str, Any]]
    try:
        head.take(4)
        version = head.number("<u4")
        if version not in (2, 3):
            order = " for machines with the other byte order (big-endian)" if version and version & 0xFFFF == 0 else ""
            raise WeightsError(f"{path} is a GGUF of version {version}{order}, expected 2 or 3; fetch a usual one")
        n_tensors, n_values = head.number("<u8"), head.number("<u8")
        for _ in range(n_values):
            name = head.unique(metadata)
            metadata[name] = head.value(head.number("<u4"))
        entries = read_entries(head, n_tensors, metadata.get("general.alignment", 32), path)
    except (ValueError, KeyError, RecursionError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({type(error).__name__}: {' '.join(str(error).split())}); fetch it again") from None
    for name, entry in entries.items():
        if entry.end > len(data):
            raise WeightsError(f"{path} is cut short: {name!r} ends at byte {entry.end}, the file at {len(data)}; fetch it again")
    return metadata, Tensors(data, entries, path)


def read_entries(head: Head, n_tensors: int, alignment: int, path: Path) -> dict[str, Entry]:
    """Where the tensors lie. WeightsError for a type that the gguf package does not know."""
    from gguf import GGML_QUANT_SIZES
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = head.unique(found)
        dims = tuple(head.take(8 * head.number("<u4")).view("<u8").tolist())          # innermost first
        found[name] = dims, head.number("<u4"), head.number("<u8")
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-head.at // alignment) * alignment
    entries = {}
    for name, (dims, kind, offset) in found.items():
        if kind not in sizes:
            raise WeightsError(f"{path}: {name!r} has type number {kind}, which the gguf package does not know; fetch another quantisation")
        block, block_bytes = sizes[kind]
        if not dims or 0 in dims or dims[0] % block:
            raise ValueError(f"{name!r} has the sizes {dims} in blocks of {block}")
        entries[name] = Entry(kind, dims[::-1], start + offset, math.prod(dims[1:]), dims[0] // block * block_bytes)
    return entries


def read_gguf(path: Path | str) -> tuple[Family, Any, dict[str, Tensor], Tokenizer | None, dict[str, Any]]:
    """Family, config, our tensors in fp32, tokenizer and metadata of a GGUF file. HanokError names what is not understood."""
    path = Path(path)
    metadata, tensors = open_gguf(path)
    architecture = metadata.get("general.architecture")
    family, table = find_table(architecture, metadata, str(path))
    config = read_config(family, table, metadata, tensors, str(path))
    ours = read_weights(table, config, tensors, str(path))
    tokenizer = tokenizer_from_gguf(metadata) if "tokenizer.ggml.model" in metadata else None
    return family, config, ours, tokenizer, metadata


def find_table(architecture: Any, metadata: Mapping[str, Any], where: str) -> tuple[Family, GGUFTable]:
    """The table for a file: of those of its architecture the one whose marker it bears, else the one without. ConfigError names what is known."""
    found = [pair for pair in catalog.gguf_tables() if pair[1].architecture == architecture]
    if not found:
        known = sorted({table.architecture for _, table in catalog.gguf_tables()})
        raise ConfigError(f"{where}: architecture {architecture!r} has no family here; known are {', '.join(known)}")
    marked = [pair for pair in found if pair[1].marker and f"{architecture}.{pair[1].marker}" in metadata]
    return (marked or [pair for pair in found if not pair[1].marker])[0]


def read_config(family: Family, table: GGUFTable, metadata: Mapping[str, Any], tensors: Tensors, where: str) -> Any:
    """The metadata as our config. ConfigError names what is missing or unknown."""
    prefix = table.architecture + "."
    told = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    if "token_embd.weight" not in tensors:
        raise WeightsError(f"{where}: tensor 'token_embd.weight' is missing; is the file complete?")
    values: dict[str, Any] = {"vocab_size": tensors.entries["token_embd.weight"].shape[0]}
    for theirs, (ours, default) in table.settings.items():
        if theirs in told:
            values[ours] = told[theirs]
        elif default is REQUIRED:
            raise ConfigError(f"{where}: '{prefix}{theirs}' is missing; every {table.architecture} has one")
        elif default is not None:
            values[ours] = default
    for name in told:
        if name not in table.settings and name not in table.known:
            raise ConfigError(f"{where}: {prefix + name!r} = {told[name]!r:.80} is not known for {table.architecture}; "
                              "hanok would not compute the same logits")
    for name in metadata:
        if not name.startswith((prefix, *IGNORED)):
            raise ConfigError(f"{where}: {name!r} is not known; hanok would not compute the same logits")
    try:
        values |= table.read(told, tensors)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: its {table.architecture} metadata does not fit together ({reason}); fetch it again") from None
    return from_dict(family.config, values, where)


def read_weights(table: GGUFTable, config: Any, tensors: Tensors, where: str) -> dict[str, Tensor]:
    """Their tensors as ours. WeightsError names the first that is missing or left over."""
    if config.n_layers > len(tensors):
        raise WeightsError(f"{where}: it tells of {config.n_layers} layers and holds {len(tensors)} tensors; fetch it again")
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
