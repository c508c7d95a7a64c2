"""Runs a family's table in both directions: a Hugging Face folder in, a Hugging Face folder out. What the table does not explain is refused by name.

The tables are the families' (`models/*.py`); nothing here knows one of them.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanok.bundle import tables
from hanok.bundle.weights import parameters
from hanok.config import from_dict, to_dict
from hanok.errors import ConfigError, WeightsError
from hanok.models import catalog
from hanok.models.family import REQUIRED, Family, HFTable

COMMON = frozenset("""
    architectures auto_map chunk_size_feed_forward dtype torch_dtype id2label label2id model_type problem_type return_dict transformers_version
    use_cache _name_or_path name_or_path bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids num_beams max_length length_penalty no_repeat_ngram_size early_stopping do_sample temperature top_k top_p
    repetition_penalty output_hidden_states output_attentions gradient_checkpointing _num_labels num_labels prefix unk_token_id
    transformers.js_config""".split())
"""Attributes of any class that do not touch the logits."""


def find_table(data: Mapping[str, Any], where: str) -> tuple[Family, HFTable]:
    """The table for a config.json. ConfigError names the classes that can be read."""
    model_type, architectures = data.get("model_type"), data.get("architectures") or []
    found = [(family, table) for family, table in catalog.hf_tables() if table.model_type == model_type]
    exact = [pair for pair in found if pair[1].architecture in architectures]
    if not found:
        known = sorted({table.model_type for _, table in catalog.hf_tables()})
        raise ConfigError(f"{where}: model_type '{model_type}' has no family here; known are {', '.join(known)}")
    return (exact or found)[0]


def read_config(table: HFTable, family: Family, data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Any:
    """Their config.json as our config. ConfigError names an attribute that is neither handled nor at its default."""
    told = table.read(dict(data))
    values = dict(table.from_weights(set(tensors)))
    for theirs, (ours, default) in table.settings.items():
        if theirs in told:
            values[ours] = told.pop(theirs)
        elif default is REQUIRED:
            raise ConfigError(f"{where}: '{theirs}' is missing; every {table.model_type} has one")
        else:
            values.setdefault(ours, default)
    for name, value in told.items():
        if name in COMMON or name in table.neutral or value is None:
            continue
        if name not in table.fixed:
            raise ConfigError(f"{where}: '{name}' = {value!r} is not known for {table.model_type}; hanok would not compute the same logits")
        if value != table.fixed[name]:
            raise ConfigError(f"{where}: '{name}' = {value!r} is not supported for {table.model_type}; only {table.fixed[name]!r} is")
    return from_dict(family.config, {**table.requires, **values}, where)


def read_weights(table: HFTable, config: Any, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Their tensors as ours. WeightsError names the first that is missing or left over."""
    found = _normalised(table, config, tensors)
    ours: dict[str, Tensor] = {}
    for weight in table.weights(config):
        if weight.theirs not in found:
            raise WeightsError(f"{where}: tensor '{weight.theirs}' is missing; is the file complete?")
        ours.update(zip(weight.ours, weight.layout.unpack(found.pop(weight.theirs)), strict=True))
    for name, twin in table.repeats(config).items():
        repeated = found.pop(name, None)
        if repeated is not None and not torch.equal(repeated, ours[twin]):
            raise WeightsError(f"{where}: '{name}' differs from the tensor that the config says it is tied to; set tie_word_embeddings to false")
    left = next((name for name in found if not any(re.fullmatch(pattern, name) for pattern in table.buffers)), None)
    if left is not None:
        raise WeightsError(f"{where}: tensor '{left}' {tuple(found[left].shape)} has no place in {table.architecture}; hanok would drop it")
    return ours


def _normalised(table: HFTable, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Older spellings of tensor names, and files that leave out the prefix, as the table spells them."""
    names = {weight.theirs for weight in table.weights(config)}
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table.renamed:
            name = re.sub(pattern, replacement, name)
        if table.optional_prefix and name not in names and not name.startswith(table.optional_prefix):
            prefixed = table.optional_prefix + name
            if prefixed in names or any(re.fullmatch(pattern, prefixed) for pattern in table.buffers):
                name = prefixed
        found[name] = tensor
    return found


def writable(family: Family, config: Any) -> HFTable:
    """The class that can express this config. ConfigError says what stands in the way."""
    return tables.writable(family, lambda f: f.hf, config, "Hugging Face", "class", "export")


def write_config(table: HFTable, config: Any) -> dict[str, Any]:
    """Our config as their config.json."""
    ours = to_dict(config)
    settings = {theirs: ours.get(name) for theirs, (name, _) in table.settings.items()}
    return {"architectures": [table.architecture], "model_type": table.model_type, **table.fixed, **settings, **table.write(config)}


def write_weights(table: HFTable, config: Any, model: nn.Module) -> dict[str, Tensor]:
    """Our tensors as theirs."""
    ours = parameters(model)
    return {weight.theirs: weight.layout.pack([ours[name].detach() for name in weight.ours]).contiguous() for weight in table.weights(config)}


def folder_of(path: Path) -> bool:
    """Whether a folder is Hugging Face's (its config.json has a model_type)."""
    file = path / "config.json"
    return file.exists() and '"model_type"' in file.read_text(errors="replace")
