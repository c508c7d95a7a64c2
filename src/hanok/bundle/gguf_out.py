"""GGUF out: a bundle as one file that llama.cpp, Ollama and their kin run. The tables of `models/` are read from right to left.

The `gguf` package writes the head and makes the blocks of Q8_0; tensors follow one at a time, so that no more than one is held twice. Types are
llama.cpp's own choice: vectors stay fp32, and a matrix whose rows do not divide into blocks of 32 stays F16 under Q8_0.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hanok.bundle import tables
from hanok.bundle.bundle import Bundle
from hanok.bundle.weights import parameters
from hanok.config import to_dict
from hanok.disk import new_file
from hanok.errors import DataError, WeightsError
from hanok.models.family import Family, GGUFTable, Weight
from hanok.text.gguf_vocab_out import end_without_stops, gguf_from_tokenizer, kept_stop_ids

Kind = Literal["f32", "f16", "q8_0"]
FILE_TYPES: dict[Kind, int] = {"f32": 0, "f16": 1, "q8_0": 7}
"""llama.cpp's number for a file whose matrices mostly have this type."""
BLOCK = 32
"""Numbers that share a scale in Q8_0."""
LARGEST: dict[Kind, float] = {"f32": torch.finfo(torch.float32).max, "f16": 65504.0, "q8_0": 127 * 65504.0}


def writable(family: Family, config: Any) -> GGUFTable:
    """The architecture that can express this config. ConfigError says what stands in the way."""
    return tables.writable(family, lambda f: f.gguf, config, "GGUF", "architecture", "it has one for")


@dataclass(frozen=True)
class Planned:
    """One tensor of the file."""
    name: str
    kind: Kind
    shape: tuple[int, ...]                               # outermost first
    make: Callable[[], Tensor]


def export_gguf(bundle: Bundle, out: Path | str, kind: Kind = "f16") -> list[str]:
    """Writes the bundle as the GGUF file `out`, and returns what the format could not keep, a line each.

    HanokError where the architecture, the tokenizer or a weight cannot be expressed, and where `out` is taken; then nothing is written.
    """
    out = Path(out)
    if out.suffix.lower() != ".gguf":
        raise DataError(f"{out}: a GGUF file was asked for; give it a name that ends in .gguf")
    if out.exists():
        raise DataError(f"{out} is there already; choose another name, or remove it first")
    table = writable(bundle.family, bundle.config)
    metadata, plan = metadata_of(bundle, table, out.stem, kind), plan_of(bundle, table, kind)
    with new_file(out) as handle:
        write_head(Path(handle.name), table.architecture, metadata, plan)
        handle.seek(0, 2)
        pad(handle)
        for planned in plan:
            handle.write(encoded(planned).data)
            pad(handle)
    return losses(bundle, table)


def losses(bundle: Bundle, table: GGUFTable) -> list[str]:
    """What GGUF does not keep of the bundle, for people."""
    told = [table.told_at_export(bundle.config)]
    if bundle.tokenizer is not None:
        kept = kept_stop_ids(bundle.tokenizer, bundle.generation.stop_ids)
        lost = [bundle.tokenizer.token(token_id) for token_id in bundle.generation.stop_ids if token_id not in kept]
        told += [f"GGUF has a place for three special tokens that end an answer; {', '.join(map(repr, lost))} will not"] if lost else []
        if not kept:
            end = end_without_stops(bundle.tokenizer)
            named = "one of its own choice" if end is None else f"here {bundle.tokenizer.token(end)!r}, as the file names it"
            told.append(f"no special token ends this model's answers, but llama.cpp always has one that does: {named}")
    return [line for line in told if line]


def metadata_of(bundle: Bundle, table: GGUFTable, name: str, kind: Kind) -> dict[str, Any]:
    """The file's metadata, but for its architecture, which the writer adds."""
    manifest, ours = bundle.manifest, to_dict(bundle.config)
    told: dict[str, Any] = {"general.type": "model", "general.name": manifest.get("parent", {}).get("name", name),
                            "general.license": manifest.get("licence"), "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    sizes = {theirs: ours.get(setting) for theirs, (setting, _) in table.settings.items()}
    sizes |= {"vocab_size": bundle.config.vocab_size, **table.write(bundle.config)}
    told |= {f"{table.architecture}.{theirs}": value for theirs, value in sizes.items()}
    if bundle.tokenizer is not None:
        told |= gguf_from_tokenizer(bundle.tokenizer, bundle.config.vocab_size, bundle.generation.stop_ids, bundle.generation.pad_id)
    told["tokenizer.chat_template"] = bundle.chat_template
    return {key: value for key, value in told.items() if value is not None}


def plan_of(bundle: Bundle, table: GGUFTable, kind: Kind) -> list[Planned]:
    """The file's tensors in order; none is made before it is written."""
    ours = parameters(bundle.model)

    def planned(weight: Weight) -> Planned:
        def packed(device: str) -> Tensor:
            return weight.layout.pack([ours[name].detach().to(device) for name in weight.ours])

        shape = tuple(packed("meta").shape)
        plain = len(shape) < 2 or weight.theirs in table.precise
        fitting: Kind = "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind
        return Planned(weight.theirs, "f32" if plain else fitting, shape, lambda: packed("cpu"))

    derived = table.derived(bundle.config).items()
    return [Planned(name, "f32", tuple(tensor.shape), tensor.float) for name, tensor in derived] + [
        planned(weight) for weight in table.weights(bundle.config)]


def write_head(path: Path, architecture: str, metadata: Mapping[str, Any], plan: Sequence[Planned]) -> None:
    """Everything before the tensors' bytes."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape
    writer = GGUFWriter(path, architecture)
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    items = {**types, int: GGUFValueType.INT32}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, items[type(value[0]) if value else str])
        else:
            writer.add_key_value(key, value, types[type(value)])
    for planned in plan:
        raw = GGMLQuantizationType[planned.kind.upper()]
        dtype = np.dtype({"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[planned.kind])
        shape = quant_shape_to_byte_shape(planned.shape, raw) if planned.kind == "q8_0" else planned.shape
        writer.add_tensor_info(planned.name, shape, dtype, math.prod(shape) * dtype.itemsize, raw)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def encoded(planned: Planned) -> np.ndarray:
    """The tensor in its type. WeightsError for a number that the type cannot hold."""
    from gguf import GGMLQuantizationType, quantize
    values = planned.make().float().contiguous()
    if not values.abs().max() <= LARGEST[planned.kind]:
        raise WeightsError(f"{planned.name} holds a number that {planned.kind.upper()} cannot (above {LARGEST[planned.kind]:g}, or not a number); "
                           "--type f32 holds more, and training again may be needed")
    return np.ascontiguousarray(quantize(values.numpy(), GGMLQuantizationType[planned.kind.upper()]))


def pad(handle: IO[bytes]) -> None:
    """Zeros up to where the next tensor may begin."""
    from gguf import GGUF_DEFAULT_ALIGNMENT
    handle.write(b"\0" * (-handle.tell() % GGUF_DEFAULT_ALIGNMENT))
