"""What a text's pieces hash to: words, shingles, n-grams, MinHash signatures, all as NumPy arithmetic over the bytes; no loop sees a word.

A word's hash is a difference of prefix sums of a polynomial in an odd R, which has an inverse modulo 2^64: sum(value[byte] R^i) R^-start. Windows of
words are hashed the same way over the words' hashes. Signatures are those of Broder (1997), 112 permutations h -> (h ^ b) a of 32-bit hashes,
in 14 bands of 8 rows: two documents of Jaccard 0.8 share a band with probability 0.92, of 0.9 with 0.9996, of 0.5 with 0.05.
"""
from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

BANDS, ROWS = 14, 8
N_PERMUTATIONS = BANDS * ROWS
SHINGLE = 5
"""Words in a shingle; characters of documents that are mostly Hangul, Han and Kana."""
NGRAM, NGRAM_CHARACTERS = 13, 26
"""Words, and characters of such documents, that the two sides of a split should not have in common."""
SCRIPTS = ("Latin", "Hangul", "Han", "Kana", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Thai", "other")
PIECE = 1 << 17
"""Bytes that are hashed at a time: their prefix sums stay in the cache."""
BLOCK = 1 << 15
"""Shingles that are permuted at a time, for the same reason."""
_RANGES = ((0x41, 0x5B, "Latin"), (0x61, 0x7B, "Latin"), (0xC0, 0x250, "Latin"), (0x370, 0x400, "Greek"), (0x400, 0x530, "Cyrillic"),
           (0x530, 0x590, "other"), (0x590, 0x600, "Hebrew"), (0x600, 0x700, "Arabic"), (0x700, 0x750, "other"), (0x750, 0x780, "Arabic"),
           (0x780, 0x900, "other"), (0x900, 0x980, "Devanagari"), (0x980, 0xE00, "other"), (0xE00, 0xE80, "Thai"), (0xE80, 0x1100, "other"),
           (0x1100, 0x1200, "Hangul"), (0x1200, 0x1E00, "other"), (0x1E00, 0x1F00, "Latin"), (0x1F00, 0x2000, "Greek"), (0x3040, 0x3100, "Kana"),
           (0x3100, 0x3180, "Hangul"), (0x3400, 0x4DC0, "Han"), (0x4E00, 0xA000, "Han"), (0xA000, 0xAC00, "other"),
           (0xAC00, 0xD7C0, "Hangul"), (0xF900, 0xFB00, "Han"), (0xFB40, 0xFE00, "Arabic"), (0x20000, 0x40000, "Han"))
_RANDOM = np.random.Generator(np.random.PCG64(20220605))             # one seed for ever: hashes of one build meet those of another
_ODD = np.uint64(1)
_R, _Q = (int(value) for value in _RANDOM.integers(0, 2 ** 64, 2, np.uint64) | _ODD | np.uint64(2))
_A = _RANDOM.integers(0, 2 ** 32, N_PERMUTATIONS, np.uint32) | np.uint32(1)
_B = _RANDOM.integers(0, 2 ** 32, N_PERMUTATIONS, np.uint32)
_FOLD = _RANDOM.integers(0, 2 ** 64, (BANDS, ROWS), np.uint64) | _ODD


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each byte, its value and whether a word holds it: ASCII letters (without case) and digits, and all beyond ASCII. Of two bytes, a script."""
    values = _RANDOM.integers(0, 2 ** 64, 256, np.uint64)
    values[ord("A"):ord("Z") + 1] = values[ord("a"):ord("z") + 1]
    inside = np.array([byte >= 0x80 or chr(byte).isalnum() for byte in range(256)])
    scripts = np.zeros(1 << 16, np.uint8)                            # by a character's first two bytes: it, or the 64 or 4,096 around it
    for start, stop, name in _RANGES:
        for code in range(start, stop, 1 if start < 0x800 else 64 if start < 0x10000 else 4096):
            first = chr(code).encode()
            scripts[int.from_bytes(first[:2], "big") if code >= 0x80 else slice(code << 8, code + 1 << 8)] = SCRIPTS.index(name) + 1
    return values, inside, scripts


_VALUES, _INSIDE, _SCRIPTS = _tables()


def powers(base: int, n: int) -> np.ndarray:
    """base^0 ... base^(n-1) modulo 2^64."""
    found = np.full(n, base, np.uint64)
    found[:1] = 1
    return np.multiply.accumulate(found)


_R_POWERS, _R_INVERSES = powers(_R, PIECE), powers(pow(_R, -1, 1 << 64), PIECE)


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 whose every bit depends on all bits of the old ones (SplitMix64's last step)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The sum from each bound to the next, of bool or integers, (len(bounds) - 1,) int64."""
    totals = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=totals[1:])
    return np.diff(totals[bounds])


# ---- scripts ---------------------------------------------------------------------------------------------------
def script_counts(texts: Sequence[bytes]) -> np.ndarray:
    """Letters of each of SCRIPTS in each UTF-8 text, (documents, scripts) int64."""
    data, bounds = _joined(texts)
    counts = np.zeros((len(texts), len(SCRIPTS)), np.int64)
    for first in range(0, len(data), PIECE):
        part = data[first:first + PIECE + 1]
        pairs = part[:PIECE].astype(np.uint16) << 8
        pairs[:len(part) - 1] |= part[1:]
        found = _SCRIPTS[pairs]
        document = slice(max(0, np.searchsorted(bounds, first, "right") - 1), np.searchsorted(bounds, first + PIECE))
        inner = np.clip(np.append(bounds[document], len(data)) - first, 0, len(found))
        counts[document, 0] += sums(found == 1, inner)
        others = np.flatnonzero(found > 1)
        if len(others):
            where = np.repeat(np.arange(len(inner) - 1), np.diff(inner))[others]
            table = np.bincount(where * (len(SCRIPTS) + 1) + found[others], minlength=(len(inner) - 1) * (len(SCRIPTS) + 1))
            counts[document] += table.reshape(-1, len(SCRIPTS) + 1)[:, 1:]
    return counts


def by_character(counts: np.ndarray) -> np.ndarray:
    """Whether most of a document's letters are Hangul, Han or Kana: it has no words between spaces, or long ones. (documents,) bool."""
    return 2 * counts[:, 1:4].sum(1) > counts.sum(1)


# ---- words, shingles, n-grams ----------------------------------------------------------------------------------
def units(texts: Sequence[bytes], characters: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of all texts' words (or characters), and where each text's begin and the last's end, (documents + 1,)."""
    data, bounds = _joined(texts)
    places, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    start = 0
    while start < len(data):
        stop = _cut(data, start, characters)
        found, values = _units(data[start:stop], characters)
        places.append(found + start)
        hashes.append(values)
        start = stop
    return np.concatenate(hashes), np.searchsorted(np.concatenate(places), np.append(bounds, len(data)))


def windows(hashes: np.ndarray, bounds: np.ndarray, n: int, whole: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of every n neighbours in a text, and where each text's begin. `whole`: a text of fewer is one window, else none."""
    sizes = np.diff(bounds)
    last = np.repeat(bounds[1:], sizes)
    begins = np.arange(len(hashes))
    here = begins + n <= last
    if whole:
        here[bounds[:-1][sizes > 0]] = True
    begins = np.flatnonzero(here)
    totals = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * powers(_Q, len(hashes)), out=totals[1:])
    ends = np.minimum(begins + n, last[begins])
    counts = np.maximum(sizes - n + 1, (sizes > 0) if whole else 0)
    return mixed((totals[ends] - totals[begins]) * powers(pow(_Q, -1, 1 << 64), len(hashes))[begins]), np.concatenate([[0], np.cumsum(counts)])


def shingles(text: bytes, characters: bool) -> np.ndarray:
    """The set of a text's shingles as sorted hashes."""
    return np.unique(windows(*units([text], characters), SHINGLE)[0])


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """How many hashes two sorted sets share, and how many they have together: their ratio is Jaccard's."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared, len(a) + len(b) - shared


def composed(text: bytes) -> bytes:
    """The text in Unicode's form C where it has Hangul in parts (jamo, as macOS spells it) or combining accents; else as it is."""
    return unicodedata.normalize("NFC", text.decode()).encode() if b"\xe1\x84" in text or b"\xcc" in text else text


def _joined(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """All texts with a line end behind each, as bytes, and where each begins; letters that are spelled in parts count as if written in one."""
    texts = [composed(text) for text in texts]
    lengths = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    return np.frombuffer(b"\n".join([*texts, b""]), np.uint8), np.cumsum(lengths) - lengths


def _cut(data: np.ndarray, start: int, characters: bool) -> int:
    """Where a piece from `start` on ends: behind the last byte that no word holds, else between two characters."""
    stop = start + PIECE
    if stop >= len(data):
        return len(data)
    ends = np.flatnonzero(~_INSIDE[data[stop - 4096:stop]])
    if len(ends) and not characters:
        return stop - 4096 + int(ends[-1]) + 1
    while stop > start + PIECE - 4 and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


def _units(data: np.ndarray, characters: bool) -> tuple[np.ndarray, np.ndarray]:
    """Places and hashes of one piece's words or characters."""
    inside = _INSIDE[data]
    if characters:
        starts = np.flatnonzero(data & 0xC0 != 0x80)
        ends = np.append(starts[1:], len(data))
        chosen = inside[starts]
        starts, ends = starts[chosen], ends[chosen]
    else:
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
    totals = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_VALUES[data] * _R_POWERS[:len(data)], out=totals[1:])
    return starts, mixed((totals[ends] - totals[starts]) * _R_INVERSES[starts])


# ---- signatures ------------------------------------------------------------------------------------------------
def signatures(hashes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The least of each permutation of each text's hashes, (permutations, texts) uint32. Every text has one hash at least."""
    small = (hashes >> np.uint64(32)).astype(np.uint32)
    cuts = np.unique(np.concatenate([bounds[:-1], np.arange(0, len(small), BLOCK)]))
    least = np.empty((N_PERMUTATIONS, len(cuts)), np.uint32)
    scratch = np.empty(BLOCK, np.uint32)
    for first in range(0, len(small), BLOCK):
        block = small[first:first + BLOCK]
        some = slice(*np.searchsorted(cuts, [first, first + BLOCK]))
        local, room = cuts[some] - first, scratch[:len(block)]
        for row, (a, b) in enumerate(zip(_A, _B)):
            np.bitwise_xor(block, b, out=room)
            np.multiply(room, a, out=room)
            np.minimum.reduceat(room, local, out=least[row, some])
    return np.minimum.reduceat(least, np.searchsorted(cuts, bounds[:-1]), axis=1)


def bands(signature: np.ndarray) -> np.ndarray:
    """(permutations, texts) -> (texts, bands) uint64: equal where all rows of a band are."""
    rows = signature.reshape(BANDS, ROWS, -1).astype(np.uint64)
    return mixed((rows * _FOLD[:, :, None]).sum(1, dtype=np.uint64)).T
