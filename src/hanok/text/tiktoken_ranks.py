"""tiktoken's rank files as a Tokenizer: lines of a token in base64 and its rank, which is its id.

tiktoken joins any two neighbours that together are a token, the lowest rank first; `tokenizers` joins the pairs that it is told. One pair a token is
enough: while a token comes to be, nothing joins across its borders, so that its bytes join as they would alone, and doing so shows its last pair.
Sources: tiktoken's src/lib.rs and tiktoken_ext/openai_public.py.
"""
from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from math import inf

import tokenizers
from tokenizers import AddedToken, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from hanok.errors import TokenizerError, nearest
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer

CL100K_REGEX = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_AROUND = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_REGEX = "|".join([f"{_UPPER}*{_LOWER}+".join(_AROUND), f"{_UPPER}+{_LOWER}*".join(_AROUND),
                        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"])
WORDS = PRE_TOKENIZERS | {
    name: lambda regex=regex: Sequence([Split(tokenizers.Regex(regex), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    for name, regex in (("cl100k", CL100K_REGEX), ("o200k", O200K_REGEX))}
"""How text is cut into words, by name."""
_END = "<|endoftext|>"
PUBLISHED: dict[int, tuple[str, dict[str, int]]] = {
    50256: ("gpt-2", {_END: 50256}),
    50280: ("gpt-2", {_END: 50256}),
    100256: ("cl100k", {_END: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    199998: ("o200k", {_END: 199999, "<|endofprompt|>": 200018}),
}
"""The published files (GPT-2's, p50k, cl100k, o200k) by their number of ranks: how they cut words, and the special tokens that they do not hold."""
_LETTERS = sorted(ByteLevel.alphabet())
_BEYOND = iter([letter for letter in _LETTERS if ord(letter) > 0xFF])
SPELLED = [chr(byte) if chr(byte) in _LETTERS else next(_BEYOND) for byte in range(256)]
"""The letter that stands for each byte in a byte-level vocabulary."""


def is_rank_file(data: bytes) -> bool:
    """Whether the first line is a token in base64 and a rank, as in files that bear another name than .tiktoken (Llama 3's tokenizer.model)."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data) is not None


def tokenizer_from_ranks(data: bytes, pre_tokenizer: str | None = None, specials: Mapping[str, int] | None = None,
                         name: str = "the rank file") -> Tokenizer:
    """A tokenizer with tiktoken's ids for the same text.

    `pre_tokenizer` is one of WORDS, `specials` are names and ids; where they are not given, a published file is known by its number of ranks.
    TokenizerError names the line that is no token and rank, repeats one, or leaves a gap, and what is missing or does not fit.
    """
    ranks, lines = _read(data, name)
    known = PUBLISHED.get(len(ranks))
    if pre_tokenizer is None and known is None:
        raise TokenizerError(f"{name}: a published file has {', '.join(map(str, PUBLISHED))} ranks, this one {len(ranks)}; say how it cuts words: "
                             f"--pre-tokenizer {'|'.join(WORDS)}")
    words, told = known or ("", {})
    words, told = pre_tokenizer or words, told if specials is None else dict(specials)
    if words not in WORDS:
        raise TokenizerError(f"unknown pre-tokenizer '{words}'; {nearest(words, WORDS)}")
    _check(ranks, lines, told, name)
    vocab = {_spell(token): rank for token, rank in ranks.items()} | told
    pairs = {token: _last_pair(token, ranks) for token in sorted(ranks, key=lambda token: ranks[token]) if len(token) > 1}
    merges = [(_spell(pair[0]), _spell(pair[1])) for pair in pairs.values() if pair]
    whole = words == "llama-bpe" or len(merges) < len(pairs)             # a token that no pair makes is still found where it is a word
    rust = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole))
    rust.pre_tokenizer, rust.decoder = WORDS[words](), decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in told])
    return Tokenizer(rust)


def _read(data: bytes, name: str) -> tuple[dict[bytes, int], dict[int, int]]:
    """Rank by token, and line by rank. TokenizerError for a line that is none, or repeats what stands above it."""
    ranks: dict[bytes, int] = {}
    lines: dict[int, int] = {}
    for n, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        spelled, _, digits = line.strip().partition(b" ")
        if not re.fullmatch(rb"\d{1,9}", digits):
            raise TokenizerError(f"{name}: line {n}: got {line[:40]!r}, expected a token in base64, a space and its rank")
        try:
            token, rank = base64.b64decode(spelled, validate=True), int(digits)
        except binascii.Error:
            raise TokenizerError(f"{name}: line {n}: {spelled[:40]!r} is not base64; the file is damaged, fetch it again") from None
        if rank in lines or token in ranks:
            what = f"rank {rank}" if rank in lines else f"token {token!r}"
            raise TokenizerError(f"{name}: line {n}: {what} stands in line {lines[rank if rank in lines else ranks[token]]} already; "
                                 "each should stand once")
        ranks[token], lines[rank] = rank, n
    return ranks, lines


def _check(ranks: Mapping[bytes, int], lines: Mapping[int, int], specials: Mapping[str, int], name: str) -> None:
    """TokenizerError for a byte without a rank, a rank that is left out, or a special token whose id or spelling is taken."""
    byte = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if byte is not None:
        raise TokenizerError(f"{name}: byte 0x{byte:02x} has no rank in its {len(ranks)} lines; all 256 single bytes were expected")
    taken = {**lines, **dict.fromkeys(specials.values(), 0)}
    gap = next((rank for rank in range(max(lines)) if rank not in taken), None)
    if gap is not None:
        after = min(rank for rank in lines if rank > gap)
        raise TokenizerError(f"{name}: line {lines[after]}: rank {after} stands there, and no line has rank {gap}; ranks without a gap were expected")
    spelled = {_spell(token) for token in ranks}
    ids: set[int] = set()
    for special, token_id in specials.items():
        if token_id in lines or token_id in ids or token_id < 0:
            whose = f"line {lines[token_id]}'s" if token_id in lines else "another one's" if token_id in ids else "below 0"
            raise TokenizerError(f"{name}: special token {special!r} has id {token_id}, which is {whose}; a free one was expected")
        if not special or special in spelled:
            raise TokenizerError(f"{name}: special token {special!r} is spelled as an ordinary one; another name was expected")
        ids.add(token_id)


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes] | None:
    """The two tokens that this one is made of, or None where its bytes never come down to two."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], inf), i) for i in range(len(parts) - 1))
        if rank == inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _spell(token: bytes) -> str:
    return "".join([SPELLED[byte] for byte in token])
