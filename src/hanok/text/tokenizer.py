"""Tokenizers: train, load, encode, decode whole or as a stream. The Rust library `tokenizers` does the work; three things are special here.

Decoding is each token's bytes in a row, read as UTF-8, so a stream equals the whole by construction. Ordinary text never becomes a special
token, not even where a model could spell one (Unigram holds `</s>` in its vocabulary). The same text always trains the same tokenizer.json.
"""
from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hanok.disk import read_text, write_text
from hanok.errors import DataError, TokenizerError
from hanok.text.training import PRE_TOKENIZERS, learned, one_by_one, require_text

_KINDS = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram", "WordLevel": "wordlevel"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEVER = secrets.token_hex(16)               # names for what no text may spell: nobody can guess them


def _parts(component: Any) -> list[dict[str, Any]]:
    """A pre-tokenizer's or decoder's parts as plain data; what only moves offsets is left out."""
    data = json.loads(component.__getstate__()) if component else {"decoders": []}
    parts = data.get("pretokenizers", data.get("decoders", [data]))
    return [{name: value for name, value in part.items() if name != "trim_offsets"} for part in parts]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Encoder:
    """One Rust tokenizer, and the model's own ids where its added tokens are numbered otherwise."""

    def __init__(self, rust: tokenizers.Tokenizer, own_ids: dict[int, int]):
        self._rust, self._own_ids = rust, own_ids

    def encode(self, text: str, add_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters of `text` that it covers, (start, end). DataError if `text` is no Unicode text."""
        try:
            encoding = self._rust.encode(text, add_special_tokens=add_special)
        except Exception as error:
            self._explain(error, [text])
            raise
        return self._ids(encoding), encoding.offsets

    def encode_batch(self, texts: Sequence[str], add_special: bool = False) -> list[list[int]]:
        """Ids of each text, on all cores."""
        try:
            return [self._ids(encoding) for encoding in self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special)]
        except Exception as error:
            self._explain(error, texts)
            raise

    def _explain(self, error: Exception, texts: Iterable[str]) -> None:
        """The Rust side raises bare Exceptions. TokenizerError names the piece that a vocabulary without a token for unknown ones does not have."""
        cutter = self._rust.pre_tokenizer
        for text in texts:
            require_text(text)
            pieces = [] if "Missing [UNK]" not in str(error) else cutter.pre_tokenize_str(text) if cutter else [(text, (0, len(text)))]
            for piece, (start, _) in pieces:
                if self._rust.token_to_id(piece) is None:
                    raise TokenizerError(f"got {piece!r} at character {start}, which this tokenizer does not know, and it has no token for what is "
                                         "unknown; leave it out, or train a tokenizer on text that has it") from None

    def _ids(self, encoding: tokenizers.Encoding) -> list[int]:
        if not self._own_ids:
            return encoding.ids
        pairs = zip(encoding.ids, encoding.special_tokens_mask)  # what the post-processor adds bears the model's own ids already
        return [token_id if added else self._own_ids.get(token_id, token_id) for token_id, added in pairs]


class StreamDecoder:
    """Turns token ids into text as they come: whole characters only, and a bounded amount of work a token."""

    def __init__(self, first: _Memo, later: _Memo, skipped: frozenset[int], holds_space: bool):
        self._pieces, self._later, self._skipped = first, later, skipped
        self._holds_space, self._held = holds_space, b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain now; it may be empty while a character is incomplete."""
        return self._utf8.decode(self.take(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character never became whole."""
        return self._utf8.decode(b"", True)

    def take(self, token_id: int) -> bytes:
        """The bytes that this token adds. An id that the tokenizer does not have adds nothing, as a model's padded rows may be sampled."""
        piece = None if token_id in self._skipped else self._pieces[token_id]
        if piece is None:
            return b""
        self._pieces = self._later
        if self._holds_space:                # a word's end is a space only if another token follows
            piece, self._held = self._held + piece, b""
            if piece.endswith(b" "):
                piece, self._held = piece[:-1], b" "
        return piece


class _Memo(dict):
    """A table filled as it is asked."""

    def __init__(self, make: Callable[[int], bytes | None]):
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> bytes | None:
        value = self[token_id] = self._make(token_id)
        return value


class Tokenizer:
    """Text to token ids and back. Safe to share between threads; pickles as its tokenizer.json."""

    def __init__(self, rust: tokenizers.Tokenizer):
        rust.no_truncation()                 # files carry the lengths that their last user wanted
        rust.no_padding()
        rust.encode_special_tokens = False
        self._rust = rust
        parts = {part["type"]: part for part in _parts(rust.decoder)}
        self._is_byte_level, self._has_byte_tokens = "ByteLevel" in parts, "ByteFallback" in parts
        self._word_suffix = parts.get("BPEDecoder", {}).get("suffix")
        self._glues_words = not parts or "WordPiece" in parts  # decoding puts spaces between words that no token holds
        self._first, self._later = _Memo(lambda token_id: self._piece(token_id, True)), _Memo(lambda token_id: self._piece(token_id, False))
        self._added = frozenset(rust.get_added_tokens_decoder())
        self._parsing = Encoder(rust, {})

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads a tokenizer.json, or the one in the folder `path`. TokenizerError says what the file is instead."""
        path = Path(path)
        if path.suffix == ".model":
            raise TokenizerError(f"{path}: a SentencePiece model; a tokenizer.json was expected (the model's Hugging Face or GGUF form holds one)")
        if path.suffix in (".bin", ".pkl", ".pickle", ".pt", ".pth"):
            raise TokenizerError(f"{path}: pickled files can run code and are not opened; a tokenizer.json was expected")
        try:
            text = read_text(path / "tokenizer.json" if path.is_dir() else path)
        except DataError as error:
            raise TokenizerError(str(error)) from None
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> Tokenizer:
        """A tokenizer from the text of a tokenizer.json; `name` is what errors call it."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:           # the Rust side raises bare Exceptions
            raise TokenizerError(f"{name}: not a tokenizer.json: {' '.join(str(error).split())}") from None

    def to_json(self) -> str:
        """The text of its tokenizer.json, in the form that the `tokenizers` and `transformers` libraries read."""
        return self._rust.to_str(pretty=True)

    def save(self, path: Path | str) -> None:
        """Writes `path`, or tokenizer.json in the folder `path`."""
        path = Path(path)
        write_text(path / "tokenizer.json" if path.is_dir() else path, self.to_json())

    def __reduce__(self):
        return Tokenizer.from_json, (self.to_json(),)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1: the rows that an embedding needs at least."""
        return max(self._rust.get_vocab().values(), default=-1) + 1

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are found in text before the model sees it, special or not, and their ids, by id."""
        return {token.content: token_id for token_id, token in sorted(self._rust.get_added_tokens_decoder().items())}

    @cached_property
    def specials(self) -> dict[str, int]:
        """Special tokens and their ids, by id."""
        return {token.content: token_id for token_id, token in sorted(self._rust.get_added_tokens_decoder().items()) if token.special}

    @property
    def kind(self) -> str:
        """bpe, wordpiece, unigram, characters or wordlevel."""
        kind = _KINDS[type(self._rust.model).__name__]
        return "characters" if kind == "wordlevel" and _parts(self._rust.pre_tokenizer) == _parts(one_by_one()) else kind

    @property
    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name for how this byte-level BPE cuts words, known by its structure; None if it is none of PRE_TOKENIZERS."""
        parts = _parts(self._rust.pre_tokenizer)
        return next((name for name, make in PRE_TOKENIZERS.items() if self.kind == "bpe" and _parts(make()) == parts), None)

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids. `parse_special`: special tokens spelled in `text` count as such, not as ordinary text. `add_special`: with [CLS], [SEP]..."""
        return (self._parsing if parse_special else self._plain).encode(text, add_special)[0]

    def encode_with_offsets(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters of `text` that it covers, (start, end)."""
        return (self._parsing if parse_special else self._plain).encode(text, add_special)

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = False, add_special: bool = False) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        return (self._parsing if parse_special else self._plain).encode_batch(texts, add_special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text. Bytes that are no UTF-8 become U+FFFD; an id that the tokenizer does not have becomes nothing."""
        return b"".join(map(self.stream(skip_special).take, ids)).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one: its pieces in a row are `decode` of all ids."""
        return StreamDecoder(self._first, self._later, self._special_ids if skip_special else frozenset(), bool(self._word_suffix))

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it. TokenizerError if there is no such id."""
        found = self._spelling(token_id)
        if found is None:
            raise TokenizerError(f"there is no token {token_id}; ids go from 0 to {self.vocab_size - 1}")
        return found

    def id_of(self, token: str) -> int | None:
        """The token's id, or None."""
        return self._rust.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of running text that this token stands for, without a space that only decoding would invent; b'' for a special token, or none."""
        token = self._spelling(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if self._glues_words or self._word_suffix:
            prefix = getattr(self._rust.model, "continuing_subword_prefix", None) if token_id not in self._added else None
            return token.removeprefix(prefix or "").removesuffix(self._word_suffix or "").encode()
        return self._later[token_id] or b""

    def variant(self, hidden: frozenset[str], edit: Callable[[dict[str, Any]], None] | None = None) -> Encoder:
        """An encoder of its own whose model cannot spell the tokens `hidden`; `edit` may change its tokenizer.json, as plain data, in place."""
        data = json.loads(self._rust.to_str())
        _hide(data["model"], hidden)
        if edit:
            edit(data)
        rust = tokenizers.Tokenizer.from_str(json.dumps(data))
        pairs = [(rust.token_to_id(token), token_id) for token, token_id in self.added.items()]
        return Encoder(rust, {theirs: ours for theirs, ours in pairs if theirs is not None and theirs != ours})

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())

    @cached_property
    def _plain(self) -> Encoder:
        encoder = self.variant(frozenset(self.specials))
        encoder._rust.encode_special_tokens = True
        return encoder

    def _spelling(self, token_id: int) -> str | None:
        if not 0 <= token_id < 2 ** 32:
            raise TokenizerError(f"there is no token {token_id}; ids go from 0 to {self.vocab_size - 1}")
        return self._rust.id_to_token(token_id)

    def _piece(self, token_id: int, first: bool) -> bytes | None:
        """What the token adds to decoded text; some decoders treat the first one apart."""
        token = self._spelling(token_id)
        if token is None:
            return None
        if self._is_byte_level:
            ours = token_id not in self._added and all(character in _BYTES for character in token)
            return bytes(_BYTES[character] for character in token) if ours else token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte and not (first and int(byte[1], 16) < 0x80):
            return bytes([int(byte[1], 16)])
        before, after = [] if first else ["a"], ["a"] if self._word_suffix else []  # the neighbours decide on spaces
        tokens = [*before, token, *after]
        text = self._rust.decoder.decode(tokens) if self._rust.decoder else " ".join(tokens)
        return text[len(before):len(text) - len(after)].encode()


def _hide(model: dict[str, Any], hidden: frozenset[str]) -> None:
    """Renames vocabulary entries, in place, so that no text can become one of `hidden`. Ids stay."""
    hidden = hidden.intersection(piece if isinstance(piece, str) else piece[0] for piece in model["vocab"])
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        spelled = [left + right.removeprefix(prefix) for left, right in model["merges"]]
        if not model.get("ignore_merges"):
            hidden = hidden.intersection(spelled) | {token for token in hidden if len(token) == 1}
        model["merges"] = [merge for merge, token in zip(model["merges"], spelled) if token not in hidden]
    if not hidden:
        return
    alias = {token: f"{_NEVER}{n}" for n, token in enumerate(sorted(hidden))}
    if model["type"] == "Unigram":
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    vocab = {alias.get(token, token): token_id for token, token_id in model["vocab"].items()}
    gaps = set(range(max(vocab.values()) + 1)).difference(vocab.values())  # filled, or the added tokens would be numbered into them
    model["vocab"] = vocab | {f"{_NEVER}-{token_id}": token_id for token_id in gaps}
    model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])


def train(kind: str, texts: Iterable[str], vocab_size: int, *, pre_tokenizer: str = "qwen2", specials: Sequence[str] | None = None,
          further: Sequence[str] = (), progress: bool = False) -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` tokens; the same texts give the same tokenizer.json.

    kind: "bpe" (byte-level: no text is unknown), "wordpiece" (as BERT's; reads the texts twice, so an iterator is held in memory), "unigram" (as
    T5's, with byte tokens for what it has not seen) or "characters" (each one of the texts, in Unicode's order, as nanoGPT's; a text with another
    is refused). `pre_tokenizer`, of PRE_TOKENIZERS, concerns "bpe" alone. `specials`: for "bpe" all of them, by default <|endoftext|>; wordpiece and
    unigram begin with their own, characters have none; `further` ones get the highest ids. TokenizerError tells the least possible `vocab_size`.
    """
    return Tokenizer(learned(kind, texts, vocab_size, pre_tokenizer, specials, further, progress))
