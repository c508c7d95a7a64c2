"""Weights on disk: safetensors, written in the model's own order and memory-mapped when read.

The order matters: q, k and v (and gate and up) lie side by side, so that an inference model can view them as one matrix without a copy. The file is
plain safetensors that any reader opens. Pickles are refused: reading one can run code.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanok.config import read_json
from hanok.disk import disk_error, new_file
from hanok.errors import HanokError, WeightsError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64
"""Bytes to which the first tensor is aligned: a cache line."""
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def refuse_pickle(path: Path) -> None:
    """WeightsError for a file name that promises a pickle."""
    if path.suffix.lower() in PICKLES:
        raise WeightsError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors where you trust it, and bring that")


def write_safetensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors in the order of the mapping, one at a time; the file appears whole or not at all. WeightsError for a type it cannot hold."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise WeightsError(f"tensor {name!r} has type {tensor.dtype}, which is not written here; convert it to one of {', '.join(DTYPES)}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with new_file(path) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            handle.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of the file as views of one private memory map: nothing is read before it is used, and writing does not reach the disk.

    WeightsError for a file that is missing, cut short, or not safetensors.
    """
    path = Path(path)
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            n_header = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(n_header)) if 0 < n_header <= size - 8 else None
    except OSError as error:
        raise WeightsError(str(disk_error(path, error))) from None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is not a safetensors file, or is cut short ({size} bytes); fetch it again")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    start, last = 8 + n_header, ""
    end = start
    for name, (_, _, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start + begin != end:
            raise WeightsError(f"{path}: {name!r} begins at byte {start + begin}, expected {end}, right behind {last!r}; the file is damaged, "
                               "fetch it again")
        end, last = start + stop, name
    if end > size:
        raise WeightsError(f"{path} is cut short: {last!r} ends at byte {end}, the file at {size}; fetch it again")
    if end < size:
        raise WeightsError(f"{path} has {size - end} bytes behind its last tensor {last!r}, expected none; the file is damaged, fetch it again")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {name: _view(data, start + begin, start + stop, dtype, shape) for name, (dtype, shape, begin, stop) in places.items()}


def _place(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape, first byte and end of a tensor, as its entry in the header tells them."""
    try:
        spelled, shape, (begin, end) = entry["dtype"], list(entry["shape"]), entry["data_offsets"]
        whole = isinstance(spelled, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise WeightsError(f"{path}: the header's entry for {name!r} is no type, shape and place; the file is damaged, fetch it again")
    dtype = DTYPES.get(spelled)
    if dtype is None:
        raise WeightsError(f"{path}: {name!r} has type {spelled!r}, which is not read here; known are {', '.join(DTYPES)}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"{path}: {name!r} claims shape {tuple(shape)} in {end - begin} bytes; the file is damaged, fetch it again")
    return dtype, shape, begin, end


def _view(data: Tensor, begin: int, end: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    raw = data[begin:end]
    if begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that model.safetensors.index.json names.

    WeightsError for a missing shard, and for a folder that only holds pickles.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if index.exists():
        try:
            shards = sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
        except (HanokError, KeyError, AttributeError):
            raise WeightsError(f"{index} is not a safetensors index; fetch it again") from None
        missing = [shard for shard in shards if not (folder / Path(shard).name).exists()]
        if missing:
            raise WeightsError(f"{folder}: {missing[0]} is missing ({len(missing)} of {len(shards)} shards); fetch it again")
        return {name: tensor for shard in shards for name, tensor in read_safetensors(folder / Path(shard).name).items()}
    for file in sorted(folder.glob("*")):
        refuse_pickle(file)
    raise WeightsError(f"{folder} holds no model.safetensors; it should be a bundle or a Hugging Face folder")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name; a tied one stands once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assign(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Puts the tensors into the model in place of its own, ties included. WeightsError names the first that is missing, left over or misshapen."""
    wanted = parameters(model)
    for name, own in wanted.items():
        if name not in tensors:
            raise WeightsError(f"{where}: tensor '{name}' {tuple(own.shape)} is missing; is it the right config?")
        if own.shape != tensors[name].shape:
            raise WeightsError(f"{where}: tensor '{name}' has shape {tuple(tensors[name].shape)}, the config wants {tuple(own.shape)}")
        if own.is_floating_point() != tensors[name].is_floating_point():
            raise WeightsError(f"{where}: tensor '{name}' has type {tensors[name].dtype}, the model wants {own.dtype}; is it the right file?")
    left = next((name for name in tensors if name not in wanted), None)
    if left is not None:
        raise WeightsError(f"{where}: tensor {left!r} {tuple(tensors[left].shape)} has no place in this model; is it the right config?")
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, held in table.items():
                places.setdefault(id(held), []).append((table, key))
    for name, own in wanted.items():
        new = nn.Parameter(tensors[name], requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else tensors[name]
        for table, key in places[id(own)]:
            table[key] = new


def converted(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in `dtype`, others as they are."""
    return ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in tensors)
