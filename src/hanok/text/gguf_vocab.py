"""GGUF's vocabulary as a Tokenizer. GGUF keeps tokens, types, merges or scores, and names the word cutter instead of describing it.

"gpt2" is byte-level BPE. "llama" is SentencePiece BPE: its merges are found again from the scores, and text is given to it as llama.cpp does,
with a space before each stretch of plain text. Sources: the GGUF specification (tokenizer.ggml.*), llama.cpp's src/llama-vocab.cpp.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from hanok.errors import TokenizerError, nearest
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PRE_NAMES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"} | {name: name for name in PRE_TOKENIZERS}
PAD = re.compile(r"\[PAD\d+\]")
"""What llama.cpp's converter calls rows of the embedding that no token uses."""
_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")  # "seperator" is the key's own spelling


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes, from plain Python values. TokenizerError names what is missing or unknown."""
    makers = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    model = str(_need(metadata, "model"))
    if model not in makers:
        raise TokenizerError(f"GGUF tokenizer model '{model}' is not supported; {nearest(model, makers)}")
    tokens = [str(token) for token in _need(metadata, "tokens")]
    types = _types(metadata, tokens)
    while tokens and types[-1] == UNUSED and PAD.fullmatch(tokens[-1]):               # rows that no token uses
        tokens.pop(), types.pop()
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocab[token] != token_id)
        raise TokenizerError(f"GGUF token {twice!r} has two ids, {tokens.index(twice)} and {vocab[twice]}; every token should be unique")
    rust = makers[model](metadata, tokens, types, vocab)
    rust.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)
                     for token, kind in zip(tokens, types) if kind in (CONTROL, UNKNOWN, USER_DEFINED)])
    _add_ends(rust, metadata, tokens, model)
    return Tokenizer(rust)


def _get(metadata: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def _need(metadata: Mapping[str, Any], name: str) -> Any:
    value = _get(metadata, name)
    if value is None:
        raise TokenizerError(f"the GGUF metadata has no 'tokenizer.ggml.{name}'; a file with a vocabulary was expected")
    return value


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    """Each token's type; where the file tells none, byte tokens are known by their form and control tokens by the special ids."""
    given = _get(metadata, "token_type")
    types = [int(kind) for kind in given] if given is not None else [BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    if len(types) != len(tokens):
        raise TokenizerError(f"the GGUF metadata has {len(tokens)} tokens but {len(types)} token types; one for each was expected")
    for name in _SPECIAL_IDS:
        token_id = _id(metadata, name, tokens)
        if token_id is not None and types[token_id] in (NORMAL, USER_DEFINED):
            types[token_id] = CONTROL
    return types


def _id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    token_id = _get(metadata, f"{name}_token_id")
    if token_id is None:
        return None
    if not 0 <= int(token_id) < len(tokens):
        raise TokenizerError(f"tokenizer.ggml.{name}_token_id is {token_id}, but the GGUF metadata has {len(tokens)} tokens")
    return int(token_id)


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    name = str(_get(metadata, "pre", "default"))
    if name not in PRE_NAMES:
        raise TokenizerError(f"GGUF pre-tokenizer '{name}' is not supported; {nearest(name, PRE_NAMES)}")
    merges = [(left, right) for left, _, right in (str(merge).partition(" ") for merge in _need(metadata, "merges"))]
    rust = _bpe(vocab, merges, ignore_merges=PRE_NAMES[name] == "llama-bpe")
    rust.pre_tokenizer = PRE_TOKENIZERS[PRE_NAMES[name]]()
    rust.decoder = decoders.ByteLevel()
    return rust


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    scores = [float(score) for score in _need(metadata, "scores")]
    if len(scores) != (n_tokens := len(_need(metadata, "tokens"))):
        raise TokenizerError(f"the GGUF metadata has {n_tokens} tokens but {len(scores)} scores; one for each was expected")
    merges = merges_from_scores(tokens, types, scores)
    for token_id, token in enumerate(tokens):
        if types[token_id] == USER_DEFINED and "▁" in token:  # it is looked for in raw text, where a space is a space
            del vocab[token]
            tokens[token_id] = token.replace("▁", " ")
            vocab[tokens[token_id]] = token_id
    unknown = _id(metadata, "unknown", tokens)
    if unknown is None and UNKNOWN in types:
        unknown = types.index(UNKNOWN)
    rust = _bpe(vocab, merges, unk_token=None if unknown is None else tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types)
    space_first = bool(_get(metadata, "add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if space_first else [spaces])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if space_first else parts)
    return rust


def merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, likeliest piece first; SentencePiece joins the pair whose piece scores highest."""
    known = set(tokens)
    ways = [(-score, -cut, token) for token, kind, score in zip(tokens, types, scores) if kind in (NORMAL, UNUSED)
            for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known]
    return [(token[:-cut], token[-cut:]) for _, cut, token in sorted(ways)]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:               # the Rust side raises bare Exceptions
        raise TokenizerError(f"the GGUF metadata's vocabulary and merges do not fit: {' '.join(str(error).split())}") from None


def _add_ends(rust: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str], model: str) -> None:
    """What `add_special` puts around a text. Where the file does not say, llama.cpp's habit: a beginning for SentencePiece and Llama 3."""
    by_default = model == "llama" or PRE_NAMES.get(str(_get(metadata, "pre"))) == "llama-bpe"
    begin, end = _id(metadata, "bos", tokens), _id(metadata, "eos", tokens)
    begin = begin if _get(metadata, "add_bos_token", by_default) else None
    end = end if _get(metadata, "add_eos_token", False) else None
    if begin is None and end is None:
        return
    before, after = ([tokens[token_id]] if token_id is not None else [] for token_id in (begin, end))
    named = [(tokens[token_id], token_id) for token_id in {begin, end} if token_id is not None]
    rust.post_processor = processors.TemplateProcessing([*before, "$A", *after], [*before, "$A", *after, *before, "$B:1", *after], named)
