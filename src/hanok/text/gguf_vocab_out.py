"""A Tokenizer as GGUF's vocabulary: what `gguf_vocab` reads, written. Only what llama.cpp would cut the same way goes out.

Byte-level BPE keeps its merges, and the name of its word cutter. SentencePiece BPE becomes pieces with scores, the rank of each piece's first merge,
from which llama.cpp and `gguf_vocab` find the merges again. Source: the GGUF specification (tokenizer.ggml.*), llama.cpp's src/llama-vocab.cpp.
"""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hanok.errors import TokenizerError
from hanok.text.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, merges_from_scores
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer

ENDS = ("eos", "eot", "eom")
"""The places that GGUF has for tokens that end an answer."""


def gguf_from_tokenizer(tokenizer: Tokenizer, n_rows: int, stop_ids: Sequence[int] = (), pad_id: int | None = None) -> dict[str, Any]:
    """The metadata of a vocabulary of `n_rows` rows, as plain Python values. TokenizerError for a tokenizer that llama.cpp would cut differently.

    Of `stop_ids` the first three special ones are kept (see `kept_stop_ids`), of `pad_id` a special one: GGUF lets no ordinary token be either.
    """
    data = json.loads(tokenizer.to_json())
    if tokenizer.kind != "bpe":
        raise TokenizerError(f"a {tokenizer.kind} tokenizer is not written to GGUF; byte-level BPE and SentencePiece BPE are")
    spelled = {token_id: token for token, token_id in data["model"]["vocab"].items()} | {i: token for token, i in tokenizer.added.items()}
    tokens = [spelled.get(token_id, f"[PAD{token_id}]") for token_id in range(n_rows)]
    types = [UNUSED if token_id not in spelled else CONTROL if token in tokenizer.specials else USER_DEFINED if token in tokenizer.added else NORMAL
             for token_id, token in enumerate(tokens)]
    told = _sentencepiece(data, tokens, types) if _is_sentencepiece(data) else _byte_level(tokenizer, data)
    begin, end = _ends(tokenizer)
    kept = kept_stop_ids(tokenizer, stop_ids)
    last = kept[0] if kept else end_without_stops(tokenizer)
    first = begin if begin is not None else last             # where it is asked for without being added, GPT-2's habit: its only special token
    told |= {"tokens": tokens, "token_type": types, "bos_token_id": first, "eos_token_id": last, "add_bos_token": begin is not None,
             "add_eos_token": end is not None, "padding_token_id": pad_id if pad_id in tokenizer.specials.values() else None}
    told |= {f"{place}_token_id": token_id for place, token_id in zip(ENDS[1:], kept[1:])}
    return {f"tokenizer.ggml.{name}": value for name, value in told.items() if value is not None}


def kept_stop_ids(tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[int]:
    """Those of a model's stop ids that GGUF has a place for."""
    special = set(tokenizer.specials.values())
    return [token_id for token_id in stop_ids if token_id in special][:len(ENDS)]


def end_without_stops(tokenizer: Tokenizer) -> int | None:
    """What a file of a model without stop ids names as the end: what stands behind a text, else the first special token, as GPT-2's.

    Where a file names none, llama.cpp takes token 11 of a byte-level vocabulary and token 2 of a SentencePiece one, whatever these are.
    """
    end = _ends(tokenizer)[1]
    return end if end is not None else min(tokenizer.specials.values(), default=None)


def _ends(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The tokens that are put around a text. TokenizerError for more than one on a side."""
    plain, framed = tokenizer.encode("a"), tokenizer.encode("a", add_special=True)
    at = next((i for i in range(len(framed)) if framed[i:i + len(plain)] == plain), 0)
    before, after = framed[:at], framed[at + len(plain):]
    if len(before) > 1 or len(after) > 1:
        raise TokenizerError(f"its tokenizer puts {len(before)} tokens before a text and {len(after)} behind it; GGUF has a place for one each")
    return next(iter(before), None), next(iter(after), None)


def _byte_level(tokenizer: Tokenizer, data: dict[str, Any]) -> dict[str, Any]:
    name, model = tokenizer.pre_tokenizer, data["model"]
    if name is None:
        raise TokenizerError("llama.cpp's name for how this tokenizer cuts text into words is not known; known are " + ", ".join(PRE_TOKENIZERS))
    normalizer = (data["normalizer"] or {"type": "NFC"})["type"]                      # llama.cpp leaves NFC out, as it does for Qwen
    if normalizer != "NFC":
        raise TokenizerError(f"its tokenizer normalises text ({normalizer}), which llama.cpp would not do for byte-level BPE")
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise TokenizerError(f"ignore_merges is {model.get('ignore_merges')}, which llama.cpp takes otherwise for '{name}'")
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in model["merges"]]}


def _is_sentencepiece(data: dict[str, Any]) -> bool:
    """Whether it is BPE over text whose spaces are ▁, as SentencePiece has it: no word cutter, one normaliser that replaces spaces."""
    return data["pre_tokenizer"] is None and {"type": "Replace", "pattern": {"String": " "}, "content": "▁"} in _normalizers(data)


def _normalizers(data: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = data["normalizer"] or {"normalizers": []}
    return normalizer.get("normalizers", [normalizer])


def _sentencepiece(data: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Pieces with scores; changes spellings and types in place. TokenizerError where the merges do not follow from scores."""
    model, merges = data["model"], [tuple(merge) for merge in data["model"]["merges"]]
    first_parts = [part for part in _normalizers(data) if part["type"] != "Replace"]
    if first_parts not in ([], [{"type": "Prepend", "prepend": "▁"}]):
        raise TokenizerError(f"its tokenizer normalises text ({first_parts[0]['type']}), which llama.cpp would not do for SentencePiece BPE")
    unknown = tokens.index(model["unk_token"]) if model.get("unk_token") in tokens else None
    for token_id, token in enumerate(tokens):
        if token_id == unknown:
            types[token_id] = UNKNOWN
        elif types[token_id] == NORMAL and model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[token_id] = BYTE
        elif types[token_id] == USER_DEFINED:
            tokens[token_id] = token.replace(" ", "▁")
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    found = merges_from_scores(tokens, types, scores)
    if sorted(found) != sorted(merges) or list(dict.fromkeys(left + right for left, right in found)) != list(ranks):
        raise TokenizerError("its merges do not follow from scores of its pieces, which is all that GGUF keeps of SentencePiece BPE")
    return {"model": "llama", "pre": "default", "scores": scores, "unknown_token_id": unknown, "add_space_prefix": bool(first_parts)}
