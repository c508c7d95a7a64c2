"""The processes that build a corpus: they read, tokenise and hash, and know no torch; the parent gives orders by pipe and hears what was done.

Orders and replies are marshalled plain data behind their length. A worker does one order at a time, with one thread, and leaves when its orders end,
however the parent ended. What it makes is a file under its final name, so that who does an order twice does it once.
"""
from __future__ import annotations

import dataclasses
import hashlib
import marshal
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from hanok import disk, errors
from hanok.data import minhash
from hanok.data.corpus import cut_pieces, end_of_text_id
from hanok.data.formats import Counts, ReadOptions, Unit, read_unit
from hanok.data.sources import Document
from hanok.data.spool import DOCUMENT, Chunk, chunk_path, write_chunk
from hanok.errors import DataError, HanokError, TokenizerError
from hanok.text.tokenizer import Tokenizer

CHUNK_LENGTH = 1 << 21
"""Characters after which a chunk ends, each document counted 256 longer than it is."""
PIECE_LENGTH = 1 << 17
"""Characters of a document that are encoded at a time, at least; at most twice as many."""
SIGN_BYTES = 1 << 20
"""Text that is shingled at a time: the hashes of a chunk of Korean would be 200 MB."""
Order = tuple[Any, ...]
BEGIN = "import sys; sys.path[:] = {path!r}; from hanok.data.workers import main; main()"


def chunks_of(documents: Iterable[Document], chunk_length: int) -> Iterator[list[Document]]:
    """Documents in the groups that are one chunk each: the same groups whoever reads them."""
    chunk: list[Document] = []
    length = 0
    for document in documents:
        chunk.append(document)
        length += len(document.text) + 256
        if length >= chunk_length:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def is_written(path: Path) -> bool:
    """Whether a whole chunk stands there."""
    with suppress(DataError):
        Chunk(path)
        return True
    return False


# ---- a worker --------------------------------------------------------------------------------------------------
class Worker:
    """What the orders are done with. `told`: the settings that the parent sends first."""

    def __init__(self, told: dict[str, Any], reply: Any):
        self.reply, self.spool, self.parent = reply, Path(told["spool"]), os.getppid()
        self.options, self.dedup, self.chunk_length = ReadOptions(**told["read"]), told["dedup"], told["chunk_length"]
        self.tokenizer: Tokenizer | None = None
        if told["tokenizer"] is not None:
            self.tokenizer = Tokenizer.load(Path(told["tokenizer"]))
            self.end_id, self.unknown_id = end_of_text_id(self.tokenizer), told["unknown_id"]
            self.dtype = np.dtype(told["dtype"])
        self.ngrams = np.load(told["ngrams"]) if told["ngrams"] is not None else np.empty(0, np.uint64)
        self.sieve = sieve(self.ngrams)

    def read(self, segment: int, units: Sequence[dict[str, Any]]) -> None:
        """Reads a segment's units, and writes its chunks but those that are there."""
        counts, number = Counts(), -1
        some = [Unit(**{**unit, "path": None if unit["path"] is None else Path(unit["path"])}) for unit in units]
        texts = chain.from_iterable(read_unit(unit, self.options, counts) for unit in some)
        for number, documents in enumerate(chunks_of(texts, self.chunk_length)):
            self.write(segment, number, [document.name for document in documents], [document.text for document in documents])
        self.reply("segment", segment, number + 1, dataclasses.asdict(counts), [sha256_of(unit) for unit in some])

    def hash(self, segment: int, units: Sequence[dict[str, Any]]) -> None:
        """SHA-256 of the files of a segment that the parent reads."""
        self.reply("hashes", segment, [None if unit["path"] is None else disk.sha256(unit["path"]) for unit in units])

    def write(self, segment: int, number: int, names: Sequence[str], texts: Sequence[str]) -> None:
        """One chunk, unless it is there."""
        path = chunk_path(self.spool, segment, number)
        if not is_written(path):
            made = self.documents(texts, names)
            if os.getppid() != self.parent:              # which was killed; another build may stand in its folder by now
                raise BrokenPipeError
            write_chunk(path, *made[:2], names, made[2])
        documents = Chunk(path).documents
        self.reply("chunk", segment, number, len(documents), *(int(documents[name].sum()) for name in ("bytes", "tokens", "unknown")))

    def documents(self, texts: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
        """What a chunk holds: its table of documents, tokens, and texts in UTF-8."""
        plain = [text.encode("utf-8", "replace") for text in texts]
        found = np.zeros(len(texts), DOCUMENT)
        found["bytes"] = [len(text) for text in plain]
        digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in plain)
        found["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
        found["scripts"] = counts = minhash.script_counts(plain)
        found["characters"] = minhash.by_character(counts)
        if self.dedup:
            for characters in (False, True):
                sign(found, plain, np.flatnonzero(found["characters"] == characters), characters)
        tokens, found["tokens"] = self.encoded([text.decode() for text in plain], names)
        if self.unknown_id is not None:
            found["unknown"] = minhash.sums(tokens == self.unknown_id, np.concatenate([[0], np.cumsum(found["tokens"]).astype(np.int64)]))
        return found, tokens, plain

    def encoded(self, texts: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts in a row, an end-of-text one behind each that has any, and how many each has. TokenizerError names the text that it
        cannot spell."""
        assert self.tokenizer is not None
        line, counts = [], np.zeros(len(texts), np.int64)
        for batch in batches(texts):
            for (row, _, is_last), ids in zip(batch, self.ids_of(batch, names)):
                if is_last and self.end_id is not None and counts[row] + len(ids):
                    ids = [*ids, self.end_id]
                counts[row] += len(ids)
                line.append(np.array(ids, np.uint32))
        tokens = np.concatenate([np.empty(0, np.uint32), *line])
        if len(tokens) and tokens.max() >= self.tokenizer.vocab_size:
            raise TokenizerError(f"the tokenizer gave id {tokens.max()}, but its vocab_size is {self.tokenizer.vocab_size}; every id should be below")
        return tokens.astype(self.dtype), counts

    def ids_of(self, batch: Sequence[tuple[int, str, bool]], names: Sequence[str]) -> list[list[int]]:
        """Token ids of each piece of a batch."""
        assert self.tokenizer is not None
        try:
            return self.tokenizer.encode_batch([piece for _, piece, _ in batch])
        except TokenizerError:
            for row, piece, _ in batch:
                try:
                    self.tokenizer.encode(piece)
                except TokenizerError as error:
                    raise TokenizerError(f"{names[row]}: {error}") from None
            raise

    def compare(self, number: int, path: str, rows: bytes) -> None:
        """Which of the held-out n-grams stand in these documents of a chunk."""
        chunk, chosen = Chunk(Path(path)), np.frombuffer(rows, "<u4")
        found = [np.empty(0, np.int64)]
        for characters in (False, True):
            some = chosen[chunk.documents["characters"][chosen] == characters]
            for batch in np.array_split(some, max(1, int(chunk.documents["bytes"][some].sum()) >> 19)):
                found.append(known(ngrams(list(chunk.texts(batch)), characters)[0], self.ngrams, self.sieve))
        self.reply("compared", number, np.unique(np.concatenate(found)).astype("<u4").tobytes())


def sign(found: np.ndarray, texts: Sequence[bytes], rows: np.ndarray, characters: bool) -> None:
    """Fills in the bands of those documents that are shingled by words, or by characters."""
    groups = np.cumsum([0, *(len(texts[row]) for row in rows)])[:-1] // SIGN_BYTES
    for some in np.split(rows, np.flatnonzero(np.diff(groups)) + 1):
        hashes, bounds = minhash.windows(*minhash.units([texts[row] for row in some], characters), minhash.SHINGLE)
        filled = np.diff(bounds) > 0
        if filled.any():
            some = some[filled]
            found["bands"][some] = minhash.bands(minhash.signatures(hashes, np.append(bounds[:-1][filled], bounds[-1])))
            found["shingled"][some] = True


def batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str, bool]]]:
    """(row, piece of its text, whether it is the last), together about PIECE_LENGTH characters."""
    batch, length = [], 0
    for row, text in enumerate(texts):
        for piece, is_last in cut_pieces(text, PIECE_LENGTH):
            batch.append((row, piece, is_last))
            length += len(piece)
            if length >= PIECE_LENGTH:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch


def sha256_of(unit: Unit) -> str | None:
    return None if unit.path is None else disk.sha256(unit.path)


# ---- n-grams that both sides have ------------------------------------------------------------------------------
def ngrams(texts: Sequence[bytes], characters: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams by which documents are compared, and where each text's begin."""
    n = minhash.NGRAM_CHARACTERS if characters else minhash.NGRAM
    return minhash.windows(*minhash.units(texts, characters), n, whole=False)


def sieve(hashes: np.ndarray) -> np.ndarray:
    """A bit for each value of a hash's first 24 bits: whether any hash begins with them."""
    bits = np.zeros(1 << 24, bool)
    bits[(hashes >> np.uint64(40)).astype(np.int64)] = True
    return np.packbits(bits)


def known(hashes: np.ndarray, among: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Places in `among` (sorted) of those that are there."""
    first = (hashes >> np.uint64(40)).astype(np.int64)
    left = hashes[(bits[first >> 3] >> (7 - (first & 7)).astype(np.uint8)) & 1 == 1]
    places = np.searchsorted(among, left)
    return places[among[np.minimum(places, len(among) - 1)] == left] if len(among) else places


# ---- talking ---------------------------------------------------------------------------------------------------
def send(pipe: IO[bytes], message: Any) -> None:
    data = marshal.dumps(message)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """The next message; None where the other side is gone. Nothing stays in a buffer that a selector would not see."""
    head = _exactly(pipe.fileno(), 8)
    data = _exactly(pipe.fileno(), int.from_bytes(head or b"", "little"))
    return None if head is None or data is None else marshal.loads(data)


def _exactly(pipe: int, n: int) -> bytes | None:
    parts: list[bytes] = []
    while n:
        part = os.read(pipe, min(n, 1 << 20))
        if not part:
            return None
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def main() -> None:
    """A worker's life. What libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # the parent hears it too, and decides
    os.putenv("TOKENIZERS_PARALLELISM", "false")
    orders, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def reply(*message: Any) -> None:
        send(replies, message)

    with suppress(BrokenPipeError):
        worker: Worker | None = None
        while (order := receive(orders)) is not None:
            try:
                if worker is None:
                    worker = Worker(order, reply)
                else:
                    getattr(worker, order[0])(*order[1:])
            except HanokError as error:
                reply("error", type(error).__name__, str(error))
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                reply("error", "DataError", str(disk.disk_error(Path(error.filename or "a file of the build"), error)))
            except Exception:
                reply("fault", traceback.format_exc())
            reply("ready")


class Pool:
    """Workers, ended when the block ends."""

    def __init__(self, n: int, told: dict[str, Any]):
        command = [sys.executable, "-c", BEGIN.format(path=sys.path)]
        self.workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(n)]
        self.idle: list[subprocess.Popen[bytes]] = []
        self.selector = selectors.DefaultSelector()
        for worker in self.workers:
            self.selector.register(worker.stdout, selectors.EVENT_READ, worker)      # type: ignore[arg-type]
            self._send(worker, told)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.selector.close()
        for worker in self.workers:
            if any(error):
                worker.kill()
            with suppress(OSError):
                worker.stdin.close()                                                 # type: ignore[union-attr]
        for worker in self.workers:
            worker.wait()
            worker.stdout.close()                                                    # type: ignore[union-attr]

    def run(self, orders: Iterable[Order]) -> Iterator[Order]:
        """Gives orders to whoever is idle, and yields replies as they come. HanokError: what a worker could not do."""
        for order in orders:
            yield from self._replies(0)
            while not self.idle:
                yield from self._replies(None)
            self._send(self.idle.pop(), order)
        while len(self.idle) < len(self.workers):
            yield from self._replies(None)

    def _replies(self, patience: float | None) -> Iterator[Order]:
        for key, _ in self.selector.select(patience):
            message = receive(key.fileobj)                                           # type: ignore[arg-type]
            match message:
                case None:
                    raise self._lost(key.data)
                case ("ready",):
                    self.idle.append(key.data)
                case ("error", name, told):
                    raise getattr(errors, name)(told)
                case ("fault", told):
                    raise RuntimeError(f"a worker of the build failed:\n{told}")
                case _:
                    yield message

    def _send(self, worker: subprocess.Popen[bytes], message: Any) -> None:
        try:
            send(worker.stdin, message)                                              # type: ignore[arg-type]
        except BrokenPipeError:
            raise self._lost(worker) from None

    def _lost(self, worker: subprocess.Popen[bytes]) -> HanokError:
        status = worker.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return DataError(f"a worker of the build {how}; where memory was short, give fewer --workers: the same command goes on")
