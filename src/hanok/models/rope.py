"""How Llama and its relatives reach beyond their trained context, and the two ways in which files tell it.

Hugging Face names a rule and its numbers (`rope_scaling`, or `rope_parameters` since transformers 5). GGUF names linear scaling; Llama 3's it keeps
as `rope_freqs.weight`, the divisor of each frequency, which llama.cpp applies as it is. Sources: arXiv:2306.15595, 2407.21783; llama.cpp's converter.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hanok.config import to_dict
from hanok.errors import ConfigError
from hanok.nn.position import inverse_frequencies, linear_scaling, llama3_scaling


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained context are reached."""
    kind: Literal["linear", "llama3"]
    factor: float                                        # how many times longer
    low_freq_factor: float = 1.0                         # llama3: waves longer than original/low slow down fully
    high_freq_factor: float = 4.0                        # llama3: waves shorter than original/high stay
    original_max_seq_len: int = 8192                     # llama3: positions before scaling


class Rotates(Protocol):
    """What a config says of its rotary positions."""

    @property
    def d_model(self) -> int: ...

    @property
    def n_heads(self) -> int: ...

    @property
    def d_head(self) -> int | None: ...

    @property
    def rope_theta(self) -> float: ...

    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def head_width(config: Rotates) -> int:
    """K."""
    return config.d_head or config.d_model // config.n_heads


def frequencies(config: Rotates) -> tuple[float, ...]:
    """The rotary angles a position, K/2 of them."""
    return scaled(inverse_frequencies(head_width(config), config.rope_theta), config.rope_scaling)


def scaled(plain: tuple[float, ...], scaling: RopeScaling | None) -> tuple[float, ...]:
    match scaling:
        case None:
            return plain
        case RopeScaling("linear", factor):
            return linear_scaling(plain, factor)
        case RopeScaling(_, factor, low, high, original):
            return llama3_scaling(plain, factor, low, high, original)


# ---- Hugging Face ------------------------------------------------------------------------------------------
HF_NAMES = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_seq_len"}


def read_hf(data: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both, as our two settings."""
    data = dict(data)
    newer, scaling = data.pop("rope_parameters", None) or {}, data.pop("rope_scaling", None) or {}
    told = {**newer, **scaling}
    theta = told.pop("rope_theta", None) or data.pop("rope_theta", None) or 10_000.0
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    unknown = [name for name, value in told.items() if name not in HF_NAMES and value is not None]
    if kind not in ("default", "linear", "llama3") or unknown:
        what = f"setting '{unknown[0]}'" if unknown else f"type '{kind}'"
        raise ConfigError(f"rope_scaling: {what} is not supported; choose from default, linear, llama3")
    data["rope_theta"] = theta
    numbers = {HF_NAMES[name]: value for name, value in told.items() if value is not None}
    data["rope_scaling"] = None if kind == "default" else {"kind": kind, **numbers}
    return data


def write_hf(config: Rotates) -> dict[str, Any]:
    """Both spellings, so that older and newer readers find theirs."""
    scaling = config.rope_scaling
    told: dict[str, Any] = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        told |= {theirs: getattr(scaling, ours) for theirs, ours in HF_NAMES.items()}
    return {"rope_theta": config.rope_theta, "rope_scaling": None if scaling is None else told,
            "rope_parameters": {"rope_theta": config.rope_theta, **told}, "head_dim": head_width(config)}


# ---- GGUF ----------------------------------------------------------------------------------------------------
FACTORS = "rope_freqs.weight"
RULE = "rope.scaling.llama3"
"""Llama 3's rule in full (factor, low, high), beside the factors that it makes: from those alone it cannot always be found again."""
GGUF_KNOWN = frozenset({"rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", RULE})


def read_gguf(architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """Our `rope_scaling` where the file tells one. ConfigError for a rule that is not known."""
    kind = metadata.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConfigError(f"{architecture}: rope.scaling.type '{kind}' is not supported; choose from none, linear")
    if FACTORS in tensors:
        return {"rope_scaling": _llama3(tensors[FACTORS].tolist(), width, metadata)}
    return {} if kind == "none" else {"rope_scaling": {"kind": "linear", "factor": metadata["rope.scaling.factor"]}}


def _llama3(factors: list[float], width: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The rule that made the divisors, as the file tells it or as Llama 3 has it; checked against them."""
    plain = inverse_frequencies(width, metadata.get("rope.freq_base", 10_000.0))
    original = metadata.get("rope.scaling.original_context_length", 8192)
    rule = dict(zip(("factor", "low_freq_factor", "high_freq_factor"), metadata.get(RULE, [max(factors)])))
    scaling = RopeScaling("llama3", original_max_seq_len=original, **rule)
    if any(abs(f / divisor - made) > 1e-4 * made for f, divisor, made in zip(plain, factors, scaled(plain, scaling), strict=True)):
        raise ConfigError(f"{FACTORS} follows no rule known here (Llama 3's, with an original context of {original}, was expected)")
    return to_dict(scaling)


def write_gguf(config: Rotates) -> dict[str, Any]:
    """What GGUF's metadata says of the rotary positions."""
    width, scaling = head_width(config), config.rope_scaling
    told: dict[str, Any] = {"rope.dimension_count": width}
    if config.d_head is not None:
        told["attention.value_length"] = width
    if scaling is not None and scaling.kind == "linear":
        told |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        told |= {RULE: [scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor],
                 "rope.scaling.original_context_length": scaling.original_max_seq_len}
    return told


def gguf_factors(config: Rotates) -> dict[str, Tensor]:
    """The divisor of each frequency, where Llama 3's rule makes them differ."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return {}
    plain = inverse_frequencies(head_width(config), config.rope_theta)
    return {FACTORS: torch.tensor([f / made for f, made in zip(plain, frequencies(config))], dtype=torch.float32)}
