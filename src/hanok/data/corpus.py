"""A corpus: documents as one long line of token ids in memory-mapped shards, as large as the disk, opened in no time.

    corpus.json       CorpusInfo: counts, dtype, vocabulary, what it was made from
    shard-00000.bin   token ids, little endian, uint16 where the vocabulary has at most 65,536 entries, else uint32; documents may cross shards
    documents.npy     int64, the place in the line of each document's first token
"""
from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from hanok import disk
from hanok.config import from_dict, read_json, to_dict, write_json
from hanok.data.sources import Document
from hanok.errors import ConfigError, DataError, TokenizerError

C = TypeVar("C")
PIECE_LENGTH = 1 << 20
"""Characters in a piece of a document that is too long to encode at once: at least this many, at most twice as many."""
BATCH_LENGTH = 4 << 20
"""Characters that are encoded at a time."""
SHARD_TOKENS = 1 << 26
"""Tokens in each shard but the last."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Special tokens that say "the document ends here": GPT-2 and Qwen, Llama 3, T5 and Mistral, Gemma."""
_LINE = re.compile(r"(?<=\S)\n(?=\S)")
_WORD = re.compile(r"(?<=\S)(?= \S)")


class Tokenizer(Protocol):
    """What a corpus asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def specials(self) -> Mapping[str, int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class CorpusInfo:
    """What stands in corpus.json."""
    documents: int                           # documents with at least one token
    tokens: int                              # in all shards, end-of-text tokens included
    bytes: int                               # of the text, in UTF-8
    dtype: str                               # uint16 or uint32
    vocab_size: int                          # of the tokenizer; every id is below it
    shards: tuple[int, ...]                  # tokens in each shard
    end_id: int | None = None                # the token behind each document; None: the tokenizer has none
    tokenizer_sha256: str = ""               # of tokenizer.json; empty: not told
    sources: tuple[dict[str, Any], ...] = ()  # path, bytes and sha256 of each file it was made from


class Corpus:
    """A corpus folder, memory-mapped: tokens and documents by their place in the line."""

    def __init__(self, path: Path, info: CorpusInfo, shards: Sequence[np.ndarray], document_starts: np.ndarray):
        self.path, self.info, self._shards, self._document_starts = path, info, shards, document_starts
        self._shard_starts = np.cumsum([0, *info.shards])

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Opens a folder that `build_corpus` made. DataError if it is none, or a file of it is missing or cut short."""
        path = Path(path)
        if not (path / "corpus.json").is_file():
            raise DataError(f"{path}: not a corpus, it has no corpus.json; build one there from text")
        info = from_dict(CorpusInfo, read_json(path / "corpus.json"), str(path / "corpus.json"))
        if info.dtype not in ("uint16", "uint32") or sum(info.shards) != info.tokens:
            raise DataError(f"{path / 'corpus.json'}: dtype and counts do not fit together; build the corpus again")
        dtype = np.dtype(info.dtype).newbyteorder("<")
        return cls(path, info, [_map_shard(shard_path(path, number), dtype, n) for number, n in enumerate(info.shards)], _map_documents(path, info))

    def __len__(self) -> int:
        return self.info.tokens

    @property
    def n_documents(self) -> int:
        return self.info.documents

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Token ids (stop - start,) in the dtype of the shards; within one shard they are a view of the disk, not to be written to."""
        self._check_range(start, stop)
        first, last = np.searchsorted(self._shard_starts, [start, max(start, stop - 1)], "right") - 1
        parts = []
        for number in range(first, min(last + 1, len(self._shards))):
            begin = int(self._shard_starts[number])
            parts.append(self._shards[number][max(start - begin, 0):stop - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.info.dtype)])

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """The number (0..n_documents-1) of the document of each token, (stop - start,) int64."""
        self._check_range(start, stop)
        first = int(np.searchsorted(self._document_starts, start, "right")) - 1
        last = int(np.searchsorted(self._document_starts, stop, "left"))
        bounds = np.clip(np.append(self._document_starts[first:last], stop), start, stop)
        return np.repeat(np.arange(first, last), np.diff(bounds))

    def check(self, tokenizer: Tokenizer, sha256: str = "") -> None:
        """DataError unless the corpus was made with this tokenizer, as far as vocabulary, end-of-text id and (where both are told) SHA-256 say."""
        mine: list[tuple[str, Any, Any]] = [("vocab_size", self.info.vocab_size, tokenizer.vocab_size),
                                            ("end-of-text id", self.info.end_id, end_of_text_id(tokenizer))]
        if sha256 and self.info.tokenizer_sha256:
            mine.append(("tokenizer SHA-256", self.info.tokenizer_sha256, sha256))
        for name, made, given in mine:
            if made != given:
                raise DataError(f"{self.path}: made with {name} {made}, but the tokenizer has {given}; build the corpus again with this tokenizer")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a corpus of {len(self)}")


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """The id of the first of END_OF_TEXT that the tokenizer has."""
    return next((tokenizer.specials[name] for name in END_OF_TEXT if name in tokenizer.specials), None)


def cached_corpus(documents: Iterable[Document], tokenizer: Tokenizer, path: Path) -> Corpus:
    """The corpus that stands at `path`, or a new one where there is none or where it is damaged."""
    return cached(Corpus.open, lambda: build_corpus(documents, tokenizer, path), path)


def cached(open_folder: Callable[[Path], C], build: Callable[[], C], path: Path) -> C:
    """What stands at `path`, or else what is built there: by this process, or by another one that was faster."""
    there = opened(open_folder, path)
    if there is not None:
        return there
    try:
        return build()
    except DataError:
        there = opened(open_folder, path)
        if there is None:
            raise
        return there


def opened(open_folder: Callable[[Path], C], path: Path) -> C | None:
    """What stands at `path`, or None; what is damaged there is removed."""
    if path.exists():
        try:
            return open_folder(path)
        except (DataError, ConfigError):
            shutil.rmtree(path)
    return None


def build_corpus(documents: Iterable[Document], tokenizer: Tokenizer, out: str | Path, *, shard_tokens: int = SHARD_TOKENS,
                 tokenizer_sha256: str = "", sources: Sequence[Mapping[str, Any]] = (), progress: Callable[[int], None] | None = None) -> Corpus:
    """Encodes documents into the new folder `out`, whole or not at all, and opens it. Memory holds one batch of documents at a time.

    Each document is followed by the end-of-text id where the tokenizer has one; a document without tokens is left out. Documents of more than two
    million characters are encoded in pieces. `tokenizer_sha256` and `sources` (from `hash_sources`) are kept in corpus.json; `progress` hears the
    bytes of text done so far. DataError: `out` is not empty, or there is no text. TokenizerError: an id that is not below vocab_size.
    """
    vocab_size, end_id = tokenizer.vocab_size, end_of_text_id(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    end = [] if end_id is None else [end_id]
    out = Path(out)
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens {shard_tokens}: expected 1 or more")
    with disk.new_dir(out) as folder:
        shards, n_documents, n_bytes, n_tokens, document_length = [0], 0, 0, 0, 0
        write_npy_header(folder / "documents.npy", 0)
        for pieces in _batches(documents):
            line: list[int] = []
            starts: list[int] = []
            for (text, is_last), ids in zip(pieces, tokenizer.encode_batch([text for text, _ in pieces])):
                n_bytes += len(text.encode())
                line += ids
                document_length += len(ids)
                if is_last and document_length:
                    line += end
                    starts.append(n_tokens)
                    n_tokens += document_length + len(end)
                    document_length = 0
            token_ids = np.array(line, np.int64)
            if len(line) and token_ids.max() >= vocab_size:
                raise TokenizerError(f"the tokenizer gave id {token_ids.max()}, but its vocab_size is {vocab_size}; every id should be below it")
            append_tokens(folder, shards, token_ids.astype(dtype), shard_tokens)
            append(folder / "documents.npy", np.array(starts, "<i8"))
            n_documents += len(starts)
            if progress:
                progress(n_bytes)
        if not n_documents:
            raise DataError("there is no text to build a corpus from; every document was empty")
        write_npy_header(folder / "documents.npy", n_documents)
        info = CorpusInfo(n_documents, n_tokens, n_bytes, dtype.name, vocab_size, tuple(shards), end_id, tokenizer_sha256,
                          tuple(dict(source) for source in sources))
        write_json(folder / "corpus.json", to_dict(info))
    return Corpus.open(out)


def cut_pieces(text: str, length: int = PIECE_LENGTH) -> Iterator[tuple[str, bool]]:
    """The text in pieces of at most twice `length` characters, and whether each is the last; all others have `length` or more.

    Cuts stand where byte-level tokenizers cut as well, so that the ids are those of the whole: behind a line end between two other characters; where
    there is none, before a single space; else anywhere.
    """
    start = 0
    while len(text) - start > 2 * length:
        low, high = start + length, start + 2 * length
        place = _LINE.search(text, low, high) or _WORD.search(text, low, high)
        stop = place.end() if place else high
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[str, bool]]]:
    """(piece, whether it ends its document), together about BATCH_LENGTH characters."""
    batch: list[tuple[str, bool]] = []
    length = 0
    for document in documents:
        for piece in cut_pieces(document.text):
            batch.append(piece)
            length += len(piece[0]) + 256    # many short documents are a batch too
            if length >= BATCH_LENGTH:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch


def append_tokens(folder: Path, shards: list[int], token_ids: np.ndarray, shard_tokens: int = SHARD_TOKENS) -> None:
    """Writes behind the last shard's end, beginning a new one whenever it is full."""
    while len(token_ids):
        if shards[-1] == shard_tokens:
            shards.append(0)
        part = token_ids[:shard_tokens - shards[-1]]
        append(shard_path(folder, len(shards) - 1), part)
        shards[-1] += len(part)
        token_ids = token_ids[len(part):]


def append(path: Path, values: np.ndarray) -> None:
    with open(path, "ab") as handle:
        handle.write(values.tobytes())


def write_npy_header(path: Path, n: int) -> None:
    """The head of an int64 .npy file of n values. NumPy pads it, so that n may grow in place."""
    with open(path, "r+b" if path.exists() else "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<i8", "fortran_order": False, "shape": (n,)})


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.bin"


def _map_shard(path: Path, dtype: np.dtype, n: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != n * dtype.itemsize:
            raise DataError(f"{path}: {size} bytes, expected {n * dtype.itemsize}; it was cut short or changed, so build the corpus again")
        return np.asarray(np.memmap(path, dtype, "r", shape=(n,)))
    except OSError as error:
        raise disk.disk_error(path, error) from None


def _map_documents(folder: Path, info: CorpusInfo) -> np.ndarray:
    path = folder / "documents.npy"
    try:
        starts = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise disk.disk_error(path, error) from None
    except (ValueError, EOFError):
        raise DataError(f"{path}: not a whole .npy file; build the corpus again") from None
    if starts.dtype != np.int64 or starts.shape != (info.documents,):
        raise DataError(f"{path}: {starts.dtype} {starts.shape}, expected int64 ({info.documents},); build the corpus again")
    return np.asarray(starts)
