"""The baselines against plain loops that count in dictionaries, and against the compressors called twice."""
from __future__ import annotations

import gzip
import lzma
import math
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.errors import ConfigError, DataError
from hanok.evaluate.baselines import ByteNgram, gzip_bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte

BASELINES = {
    "gzip -9": gzip_bits_per_byte,
    "xz -9e": lambda train, held_out: xz_bits_per_byte(b"", held_out),
    "xz -9e given the training text": xz_bits_per_byte,
    "byte 5-gram": ngram_bits_per_byte,
}

few_letters = st.text(alphabet="abc", max_size=60).map(str.encode)


def prose(n_words: int, seed: int) -> bytes:
    """Words that follow each other with some habit."""
    draw = random.Random(seed)
    words = ["the", "house", "stands", "between", "post", "and", "beam", "an", "open", "floor", "of", "wood", "그", "집", "마루"]
    return " ".join(words[min(draw.randrange(len(words)), draw.randrange(len(words)))] for _ in range(n_words)).encode()


class Loops:
    """Interpolated modified Kneser-Ney, as the equations say it."""

    def __init__(self, train: bytes, order: int):
        longest = min(order, len(train))
        self.counts: list[Counter[bytes]] = [Counter()]
        for n in range(1, longest + 1):
            if n == longest:
                self.counts.append(Counter(train[i:i + n] for i in range(len(train) - n + 1)))
            else:
                before: dict[bytes, set[int | None]] = defaultdict(set)
                for i in range(len(train) - n + 1):
                    before[train[i:i + n]].add(train[i - 1] if i else None)
                self.counts.append(Counter({ngram: len(found) for ngram, found in before.items()}))
        self.discounts = [self.discount(counts) for counts in self.counts]

    @staticmethod
    def discount(counts: Counter[bytes]) -> list[float]:
        n1, n2, n3, n4 = (sum(count == c for count in counts.values()) for c in (1, 2, 3, 4))
        if min(n1, n2, n3, n4) > 0:
            y = n1 / (n1 + 2 * n2)
            d = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            if all(0 < d[c] <= c for c in (1, 2, 3)):
                return d
        return [0, 0.5, 1.0, 1.5]

    def probability(self, context: bytes, byte: int, n: int) -> float:
        if n == 0:
            return 1 / 256
        context = context[len(context) - (n - 1):]
        lower = self.probability(context[1:], byte, n - 1)
        if n >= len(self.counts):
            return lower
        followers = {ngram: count for ngram, count in self.counts[n].items() if ngram[:-1] == context}
        if not followers:
            return lower
        taken = {ngram: self.discounts[n][min(count, 3)] for ngram, count in followers.items()}
        here = context + bytes([byte])
        return (followers.get(here, 0) - taken.get(here, 0) + sum(taken.values()) * lower) / sum(followers.values())

    def bits_per_byte(self, held_out: bytes, order: int) -> float:
        bits = 0.0
        for i, byte in enumerate(held_out):
            context = held_out[max(0, i - order + 1):i]
            bits -= math.log2(self.probability(context, byte, len(context) + 1))
        return bits / len(held_out)


def test_bigram_by_hand():
    """abab: bigrams ab 2, ba 1; before a stand the beginning and b, before b stands a; discounts 0.5, 1, 1.5."""
    model = ByteNgram(2).fit(b"abab")
    a = (2 - 1) / 3 + (1 + 0.5) / 3 / 256
    b = (1 - 0.5) / 3 + (1 + 0.5) / 3 / 256
    assert model.probability(b"", ord("a")) == pytest.approx(a)
    assert model.probability(b"", ord("b")) == pytest.approx(b)
    assert model.probability(b"a", ord("b")) == pytest.approx((2 - 1) / 2 + 1 / 2 * b)
    assert model.probability(b"zza", ord("b")) == model.probability(b"a", ord("b"))
    assert model.probability(b"b", ord("b")) == pytest.approx(0.5 * b)
    assert model.probability(b"z", ord("a")) == pytest.approx(a)
    assert model.bits_per_byte(b"ab") == pytest.approx(-(math.log2(a) + math.log2((1 + b) / 2)) / 2)


@settings(max_examples=60, deadline=None)
@given(train=few_letters, held_out=few_letters.filter(len), order=st.integers(1, 6))
def test_equals_plain_loops(train: bytes, held_out: bytes, order: int):
    assert ngram_bits_per_byte(train, held_out, order) == pytest.approx(Loops(train, order).bits_per_byte(held_out, order), rel=1e-9)


def test_equals_plain_loops_where_the_discounts_are_estimated():
    draw = random.Random(0)
    train, held_out = (bytes(draw.choices(range(97, 109), weights=[1 / k for k in range(1, 13)], k=n)) for n in (6000, 100))
    loops = Loops(train, 5)
    assert all(discounts != [0, 0.5, 1.0, 1.5] for discounts in loops.discounts[4:]) and len(loops.discounts) == 6
    assert ngram_bits_per_byte(train, held_out) == pytest.approx(loops.bits_per_byte(held_out, 5), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(train=st.one_of(st.binary(max_size=80), few_letters), context=st.one_of(st.binary(max_size=9), few_letters), order=st.integers(1, 8))
def test_every_context_sums_to_one(train: bytes, context: bytes, order: int):
    model = ByteNgram(order).fit(train)
    p = [model.probability(context, byte) for byte in range(256)]
    assert math.fsum(p) == pytest.approx(1, abs=1e-12)
    assert min(p) > 0


def test_a_trained_context_sums_to_one():
    model = ByteNgram().fit(prose(2000, 0))
    for context in (b"", b"t", b" house", "마".encode(), b"\xff\xff\xff\xff", b"stand"):
        assert math.fsum(model.probability(context, byte) for byte in range(256)) == pytest.approx(1, abs=1e-12)


def test_the_longest_order_packs_all_eight_bytes():
    model = ByteNgram(8).fit(bytes(range(248, 256)) * 3)
    assert model.probability(bytes(range(248, 255)), 255) > 0.6 > model.probability(bytes(range(248, 255)), 254)


def test_untrained_is_uniform_and_fit_forgets():
    model = ByteNgram(3)
    assert model.bits_per_byte(b"anything") == 8
    model.fit(prose(500, 0)).fit(b"")
    assert model.bits_per_byte(b"anything") == 8


@pytest.mark.parametrize("order", [0, 9])
def test_an_order_that_cannot_be_packed_is_refused(order: int):
    with pytest.raises(ConfigError, match="choose 1 to 8"):
        ByteNgram(order)


def test_gzip_is_the_command_at_level_9():
    held_out = prose(3000, 0)
    assert gzip_bits_per_byte(b"ignored", held_out) == 8 * len(gzip.compress(held_out, 9)) / len(held_out)


def test_xz_alone_is_the_plain_file():
    held_out = prose(3000, 0)
    assert xz_bits_per_byte(b"", held_out) == 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)


@pytest.mark.parametrize("n_train, n_held_out", [(1, 300), (300, 30), (40_000, 8_000), (90_000, 200)])
def test_xz_given_the_training_text_is_the_difference_of_two_files(n_train: int, n_held_out: int):
    train, held_out = prose(n_train, 0), prose(n_held_out, 1)
    raw = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 20}]}
    twice = len(lzma.compress(train + held_out, **raw)) - len(lzma.compress(train, **raw))
    assert abs(xz_bits_per_byte(train, held_out) * len(held_out) / 8 - twice) <= 12


def test_xz_remembers_the_first_training_byte():
    """What is held out stood at the very beginning, a megabyte ago, among noise that no smaller window would cover."""
    draw = random.Random(0)
    held_out, noise = draw.randbytes(5000), draw.randbytes(1_000_000)
    assert xz_bits_per_byte(held_out + noise, held_out) < 0.2
    assert xz_bits_per_byte(noise, held_out) > 7.9


@pytest.mark.parametrize("name", ["xz -9e given the training text", "byte 5-gram"])
def test_training_text_helps(name: str):
    held_out = prose(400, 1)
    figures = [BASELINES[name](train, held_out) for train in (b"", prose(200, 0), prose(5000, 0))]
    assert figures[0] > figures[1] > figures[2] > 0


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_held_out_is_refused(name: str):
    with pytest.raises(DataError, match="held-out"):
        BASELINES[name](b"some text", b"")
