"""Bits per byte of held-out text by things that are no neural networks: gzip, xz, and a byte n-gram. The honest lines of a table.

xz with the training text in its window costs one compression: the decoder tells where in the stream the held-out text begins. The n-gram is
interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3): on Python's own library 1.81 bits per byte, where Witten-Bell has 1.92.
"""
from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanok.errors import ConfigError, DataError

MAX_ORDER = 8
"""An n-gram is packed into one unsigned integer of 64 bits."""


def gzip_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Bits per byte of `held_out` alone under gzip -9; its window of 32 KiB has no use for `train`. DataError if nothing is held out."""
    _refuse_empty(held_out)
    return 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)


def xz_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Bits per byte of `held_out` under xz -9e that has just read `train`; with an empty `train`, of the plain .xz file.

    The window holds both texts (up to xz's own limit of 1.5 GiB); memory is about 11 times that. DataError if nothing is held out.
    """
    _refuse_empty(held_out)
    window = min(max(len(train) + len(held_out), 4096), 1536 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    if not train:
        return 8 * len(lzma.compress(held_out, lzma.FORMAT_XZ, filters=filters)) / len(held_out)
    stream = lzma.compress(train + held_out, lzma.FORMAT_RAW, filters=filters)
    return 8 * (len(stream) - _prefix_of(stream, len(train), filters)) / len(held_out)


def _prefix_of(stream: bytes, n_bytes: int, filters: list[dict]) -> int:
    """How many bytes of a raw LZMA stream suffice to decode its first `n_bytes`."""
    cut = 0
    for stride in (1 << 16, 1 << 8, 1):
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        known = len(decoder.decompress(stream[:cut]))
        while (known := known + len(decoder.decompress(stream[cut:cut + stride]))) < n_bytes:
            cut += stride
    return cut + 1


@dataclass(frozen=True)
class _Level:
    """What one length of n-gram adds: p(byte | context) = share(context, byte) + rest(context) * p(byte | shorter context)."""
    ngrams: NDArray[np.uint64]       # the distinct ones, sorted; the last byte is the lowest
    shares: NDArray[np.float64]      # (count - discount) / total of the context
    contexts: NDArray[np.uint64]     # the distinct n-grams without their last byte, sorted
    rests: NDArray[np.float64]       # what the discounts left over

    @classmethod
    def of(cls, ngrams: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Level:
        contexts, starts = np.unique(ngrams >> np.uint64(8), return_index=True)
        discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
        totals = np.add.reduceat(counts, starts)
        followers = np.diff(np.append(starts, len(ngrams)))
        shares = (counts - discounts) / np.repeat(totals, followers)
        return cls(ngrams, shares, contexts, np.add.reduceat(discounts, starts) / totals)


class ByteNgram:
    """A language model of bytes that counts: contexts of 0 to order - 1 bytes, interpolated modified Kneser-Ney, uniform below.

    Untrained it gives every byte 1/256. ConfigError if `order` is not 1 to 8.
    """

    def __init__(self, order: int = 5):
        if not 1 <= order <= MAX_ORDER:
            raise ConfigError(f"a byte n-gram of order {order} cannot be packed; choose 1 to {MAX_ORDER}")
        self.order = order
        self._levels: list[_Level] = []  # of n-grams of 1, 2, ... bytes

    def fit(self, train: bytes) -> ByteNgram:
        """Counts `train`, forgetting what was counted before. The longest n-grams count their occurrences, shorter ones the distinct bytes
        that stand before them (the beginning of the text is one)."""
        longest = min(self.order, len(train))
        self._levels = []
        if longest:
            ngrams, counts = np.unique(_pack(train, longest), return_counts=True)
            self._levels.append(_Level.of(ngrams, counts))
            for n in range(longest - 1, 0, -1):
                ngrams, counts = np.unique(np.append(_last(ngrams, n), _pack(train[:n], n)), return_counts=True)
                self._levels.insert(0, _Level.of(ngrams, counts))
        return self

    def probability(self, context: bytes, byte: int) -> float:
        """p(byte | the last order - 1 bytes of context); a shorter context is used as it is."""
        ngram = (context[-(self.order - 1):] if self.order > 1 else b"") + bytes([byte])
        return float(self._probabilities(_pack(ngram, len(ngram)), len(ngram))[0])

    def bits_per_byte(self, held_out: bytes) -> float:
        """The mean of -log2 p over all bytes of `held_out`, exactly; its first bytes have shorter contexts. DataError if it is empty."""
        _refuse_empty(held_out)
        bits = 0.0
        for n in range(1, min(self.order - 1, len(held_out)) + 1):
            bits -= float(np.log2(self._probabilities(_pack(held_out[:n], n), n)).sum())
        if len(held_out) >= self.order:
            ngrams, counts = np.unique(_pack(held_out, self.order), return_counts=True)
            bits -= float(counts @ np.log2(self._probabilities(ngrams, self.order)))
        return bits / len(held_out)

    def _probabilities(self, ngrams: NDArray[np.uint64], n: int) -> NDArray[np.float64]:
        """p(last byte | the bytes before it) of packed n-grams of n bytes."""
        p = np.full(len(ngrams), 1 / 256)
        for length, level in enumerate(self._levels[:n], start=1):
            asked = _last(ngrams, length)
            p = _find(level.ngrams, level.shares, asked, 0.0) + _find(level.contexts, level.rests, asked >> np.uint64(8), 1.0) * p
        return p


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int = 5) -> float:
    """Bits per byte of `held_out` under a byte n-gram that counted `train`. DataError if nothing is held out."""
    return ByteNgram(order).fit(train).bits_per_byte(held_out)


def _discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """What is taken from n-grams seen once, twice, and more often (equation 26 of Chen & Goodman; KenLM's 0.5, 1, 1.5 where the counts of
    counts are too thin to say)."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        d1, d2, d3 = y, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        if 0 < d2 <= 2 and 0 < d3 <= 3:
            return d1, d2, d3
    return 0.5, 1.0, 1.5


def _pack(text: bytes, n: int) -> NDArray[np.uint64]:
    """All n-grams of `text` as integers, in order; the last byte is the lowest."""
    symbols = np.frombuffer(text, np.uint8)
    packed = np.zeros(len(text) - n + 1, np.uint64)
    for i in range(n):
        packed <<= np.uint64(8)
        packed |= symbols[i:i + len(packed)]
    return packed


def _last(ngrams: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    return ngrams & np.uint64((1 << 8 * n) - 1)


def _find(known: NDArray[np.uint64], values: NDArray[np.float64], asked: NDArray[np.uint64], otherwise: float) -> NDArray[np.float64]:
    """`values` of those of the sorted `known` that are asked for, `otherwise` of those that are not among them."""
    places = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[places] == asked, values[places], otherwise)


def _refuse_empty(held_out: bytes) -> None:
    if not held_out:
        raise DataError("got no held-out bytes; bits per byte need at least one, so hold out some text")
