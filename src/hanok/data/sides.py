"""Which documents are held out, and how much of what is held out stands in the training text as well.

A document's side follows from a hash of its text and from nothing else. For contamination, n-grams of the held-out documents (13 words, or 26
characters of Hangul, Han and Kana) are looked up in all training text; where more is held out than SAMPLE_BYTES, those of a sample: the documents
with the lowest hashes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hanok import disk
from hanok.data.dedup import KEPT
from hanok.data.minhash import NGRAM, NGRAM_CHARACTERS
from hanok.data.spool import Spool
from hanok.data.workers import Order, Pool, ngrams
from hanok.errors import DataError

HELD_OUT = 4
"""The state (see dedup) of a document that is kept, for validation."""
SAMPLE_BYTES = 8 << 20
"""Held-out text whose n-grams are looked up: their hashes are 8 bytes a word, in every worker."""
SAVE_EVERY = 64
"""Chunks between two notes of what was compared."""


def divide(spool: Spool, states: np.ndarray, share: float) -> str:
    """Holds out about `share` of the kept documents, in place; both sides have one at least. In words, where that took a document of the other side.

    DataError: fewer than two documents are kept.
    """
    limit = np.uint64(min(2 ** 64 - 1, int(share * 2 ** 64)))
    least, most = (2 ** 64, -1), (-1, -1)        # (hash, document) at the ends
    for start, chunk in spool.chunks():
        rows = np.flatnonzero(states[start:start + chunk.n_documents] == KEPT)
        if len(rows):
            hashes = chunk.documents["digest"][rows, 0]
            states[start + rows[hashes < limit]] = HELD_OUT
            least = min(least, (int(hashes.min()), start + int(rows[hashes.argmin()])))
            most = max(most, (int(hashes.max()), start + int(rows[hashes.argmax()])))
    n_held, n_kept = int((states == HELD_OUT).sum()), int(np.isin(states, (KEPT, HELD_OUT)).sum())
    if n_kept == 0:
        raise DataError("there is no text to build a corpus from; every document was empty" if len(spool) else
                        "there is no text to build a corpus from; give files with text in them")
    if n_kept == 1:
        others = ", the others are copies of it or empty" if len(spool) > 1 else ""
        raise DataError(f"a corpus of one document ({spool.name(least[1])}{others}) cannot be divided into training and validation; give more text, "
                        "or cut it with a smaller --max-document")
    if n_held == 0:
        states[least[1]] = HELD_OUT
        return f"none of {n_kept:,} documents fell to validation by its hash: the one of lowest hash is held out"
    if n_held == n_kept:
        states[most[1]] = KEPT
        return f"all of {n_kept:,} documents fell to validation by their hashes: the one of highest hash is trained on"
    return ""


def contamination(spool: Spool, states: np.ndarray, work: Path, n_workers: int, told: dict[str, Any],
                  progress: Callable[[str, float, float | None], Any]) -> dict[str, Any]:
    """How many of the held-out documents (or of a sample of them) have an n-gram that stands in the training text."""
    sample, n_held = sampled(spool, states)
    hashes, owners = ngrams_of(spool, sample)
    unique, inverse = np.unique(hashes, return_inverse=True)
    found, done = np.zeros(len(unique), bool), np.zeros(len(spool.paths), bool)
    if len(unique):
        notes = work / "compared.npz"
        if notes.is_file():
            with np.load(notes) as saved:
                found, done = saved["found"], saved["done"]
        with disk.new_file(work / "ngrams.npy") as handle:
            np.save(handle, unique)
        with Pool(min(n_workers, max(1, int((~done).sum()))), {**told, "ngrams": str(work / "ngrams.npy")}) as pool:
            for _, number, places in pool.run(orders(spool, states, done)):
                found[np.frombuffer(places, "<u4")] = True
                done[number] = True
                n_done = int(done.sum())
                if n_done % SAVE_EVERY == 0:
                    with disk.new_file(notes) as handle:
                        np.savez(handle, found=found, done=done)
                progress("looking for held-out text", n_done, len(done))
    return {"ngram_words": NGRAM, "ngram_characters": NGRAM_CHARACTERS, "documents": len(np.unique(owners[found[inverse]])), "of": len(sample),
            "held_out": n_held}


def sampled(spool: Spool, states: np.ndarray) -> tuple[np.ndarray, int]:
    """Held-out documents to look at, in order, and how many there are."""
    found = []
    for start, chunk in spool.chunks():
        rows = np.flatnonzero(states[start:start + chunk.n_documents] == HELD_OUT)
        found.append(np.stack([chunk.documents["digest"][rows, 0], (rows + start).astype(np.uint64), chunk.documents["bytes"][rows]]))
    digests, documents, sizes = np.concatenate(found, axis=1)
    order = np.argsort(digests, kind="stable")
    few = order[:max(1, int(np.searchsorted(np.cumsum(sizes[order]), SAMPLE_BYTES, "right")))]
    return np.sort(documents[few]).astype(np.int64), len(documents)


def ngrams_of(spool: Spool, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of some documents' n-grams, and which document each is of."""
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for document in documents.tolist():
        hashes.append(ngrams([spool.text(document)], bool(spool.row(document)["characters"]))[0])
        owners.append(np.full(len(hashes[-1]), document))
    return np.concatenate(hashes), np.concatenate(owners)


def orders(spool: Spool, states: np.ndarray, done: np.ndarray) -> Iterator[Order]:
    """What workers look through."""
    for number in np.flatnonzero(~done).tolist():
        rows = np.flatnonzero(states[spool.starts[number]:spool.starts[number + 1]] == KEPT)
        yield "compare", number, str(spool.paths[number]), rows.astype("<u4").tobytes()
