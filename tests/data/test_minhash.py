"""Hashes against plain sets of words, signatures against Jaccard itself, scripts against Unicode's own names."""
from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.data import minhash, workers
from hanok.data.spool import DOCUMENT

WORDS = st.lists(st.sampled_from("one two three Four five 6 sieben acht".split()), max_size=30)


def words_of(text: str) -> list[str]:
    """What a word is, said otherwise."""
    return re.findall("[a-z0-9\x80-\U0010ffff]+", text.lower())


def sets(texts: list[str], characters: bool = False) -> list[np.ndarray]:
    return [minhash.shingles(text.encode(), characters) for text in texts]


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), st.sampled_from([" ", "\n", ", ", " -- "]))
def test_windows_are_equal_where_their_words_are(documents, between):
    """Shingles of all texts at once: as many, and equal in the same places, as tuples of words are."""
    texts = [between.join(words) for words in documents]
    hashes, bounds = minhash.windows(*minhash.units([text.encode() for text in texts], False), 5)
    plain = []
    for number, text in enumerate(texts):
        words = words_of(text)
        mine = [tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))] if words else []
        assert bounds[number + 1] - bounds[number] == len(mine)
        plain += mine
    assert len(set(hashes.tolist())) == len(set(plain))
    for one, other in zip(hashes[1:], hashes):
        assert (one == other) == (plain[list(hashes).index(one)] == plain[list(hashes).index(other)])


def test_a_word_has_one_hash_wherever_it_stands():
    long = "word " * (minhash.PIECE // 4) + "another"
    hashes, bounds = minhash.units([b"word", long.encode(), b"the WORD"], False)
    assert bounds.tolist() == [0, 1, 2 + minhash.PIECE // 4, 4 + minhash.PIECE // 4]
    assert len(np.unique(hashes)) == 3                    # word, another, the
    assert minhash.units([b"listen"], False)[0] != minhash.units([b"silent"], False)[0]


def test_characters_of_korean_are_units_whatever_the_spaces():
    one, other = sets(["한국어는 조사가 많다", "한국어 는조사가\n많다"], True)
    assert np.array_equal(one, other) and len(one) == 5      # nine syllables
    assert minhash.overlap(*sets(["가나다라마바", "가나다라마사"], True)) == (1, 3)
    long = "가" * minhash.PIECE
    hashes, _ = minhash.units([long.encode()], True)
    assert len(hashes) == minhash.PIECE and len(np.unique(hashes)) == 1


def test_korean_in_parts_is_the_same_korean():
    for text, characters in (("한국어는 조사가 많다", True), ("한국어는 조사가 많은 말 이다", False), ("déjà vu à la carte über", False)):
        parts = unicodedata.normalize("NFD", text)
        assert parts != text and np.array_equal(*sets([text, parts], characters))
        assert np.array_equal(*minhash.script_counts([text.encode(), parts.encode()]))


def test_a_chunk_is_signed_a_part_at_a_time(monkeypatch):
    texts = [f"{'한국어는 조사가 많다 ' * (i % 5)}{i * i}".encode() if i % 7 else b"..." for i in range(60)]

    def signed(most: int) -> tuple[np.ndarray, int]:
        found, sizes, units = np.zeros(60, DOCUMENT), [], minhash.units
        monkeypatch.setattr(workers, "SIGN_BYTES", most)
        with monkeypatch.context() as patch:
            patch.setattr(minhash, "units", lambda some, characters: (sizes.append(sum(map(len, some))), units(some, characters))[1])
            for rows in (np.arange(0, 60, 2), np.arange(1, 60, 2), np.arange(0)):
                workers.sign(found, texts, rows, True)
        return found, max(sizes)

    (at_once, large), (in_parts, small) = signed(1 << 20), signed(300)
    assert np.array_equal(at_once, in_parts) and at_once["shingled"].sum() == 51
    assert large > 1000 and small < 300 + max(map(len, texts))


def test_short_and_empty_texts():
    hashes, bounds = minhash.windows(*minhash.units([b"", b"two words", b"...", b"a b c d e f"], False), 5)
    assert np.diff(bounds).tolist() == [0, 1, 0, 2] and len(hashes) == 3
    _, bounds = minhash.windows(*minhash.units([b"", b"two words", b"a b c d e f"], False), 5, whole=False)
    assert np.diff(bounds).tolist() == [0, 0, 2]


def test_signatures_tell_jaccard_and_depend_on_nobody_else(monkeypatch):
    random = np.random.Generator(np.random.PCG64(0))
    texts = []
    for share in np.linspace(0, 1, 21):
        common = [f"w{n}" for n in random.integers(10 ** 6, size=400)]
        cut = round(400 * share)
        texts += [" ".join(common), " ".join(common[:cut] + [f"x{n}" for n in random.integers(10 ** 6, size=400 - cut)])]
    hashes, bounds = minhash.windows(*minhash.units([text.encode() for text in texts], False), 5)
    signature = minhash.signatures(hashes, bounds)
    for number in range(0, len(texts), 2):
        shared, together = minhash.overlap(*sets(texts[number:number + 2]))
        estimate = (signature[:, number] == signature[:, number + 1]).mean()
        assert abs(estimate - shared / together) < 0.16           # 3.4 standard deviations at the worst
    monkeypatch.setattr(minhash, "BLOCK", 64)                     # documents are cut into many blocks, and many stand in one
    assert np.array_equal(minhash.signatures(hashes, bounds), signature)
    assert np.array_equal(minhash.signatures(hashes[bounds[3]:bounds[4]], bounds[3:5] - bounds[3])[:, 0], signature[:, 3])


def test_bands_find_what_is_near():
    """Of pairs of Jaccard 0.8, 0.92 share a band; of 0.5 one in twenty."""
    random = np.random.Generator(np.random.PCG64(1))
    for jaccard, low, high in ((0.8, 0.85, 0.98), (0.5, 0.01, 0.11), (1.0, 1.0, 1.0)):
        n = 400
        shared = round(2 * n * jaccard / (1 + jaccard))
        rows = []
        for _ in range(300):
            common, *others = np.split(minhash.mixed(random.integers(0, 2 ** 63, 2 * n - shared, np.uint64)), [shared, n])
            rows += [np.concatenate([common, other]) for other in others]
        bounds = np.cumsum([0, *map(len, rows)])
        bands = minhash.bands(minhash.signatures(np.concatenate(rows), bounds))
        assert low <= (bands[::2] == bands[1::2]).any(1).mean() <= high


@pytest.mark.parametrize("letters, name, unicode", [
    ("abcXYZéüß", "Latin", "LATIN"), ("한국어ㄱㅏ", "Hangul", "HANGUL"), ("漢字", "Han", "CJK"), ("ひらカタ", "Kana", "KATAKANA HIRAGANA"),
    ("Дружба", "Cyrillic", "CYRILLIC"), ("Ωμέγα", "Greek", "GREEK"), ("سلام", "Arabic", "ARABIC"), ("שלום", "Hebrew", "HEBREW"),
    ("हिन्दी", "Devanagari", "DEVANAGARI"), ("ไทย", "Thai", "THAI"), ("თბ", "other", "GEORGIAN")])
def test_letters_are_counted_by_script(letters, name, unicode):
    assert all(any(word in unicodedata.name(letter) for word in unicode.split()) for letter in letters)
    counts = minhash.script_counts([b"123 ,.", f"{letters} 12。 {letters}".encode(), b"abc"])
    assert counts[1, minhash.SCRIPTS.index(name)] == 2 * len(letters)
    assert counts.sum() == 2 * len(letters) + 3
    assert minhash.by_character(counts)[1] == (name in ("Hangul", "Han", "Kana"))


def test_counts_do_not_depend_on_where_pieces_are_cut(monkeypatch):
    texts = ["한a국 ".encode() * 50, b"", "Дa".encode() * 30, b"abc" * 40]
    whole = minhash.script_counts(texts)
    for piece in (7, 64, 100):
        monkeypatch.setattr(minhash, "PIECE", piece)
        assert np.array_equal(minhash.script_counts(texts), whole)
