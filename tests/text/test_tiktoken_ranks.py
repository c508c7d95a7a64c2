"""Rank files read into the same ids as tiktoken gives: small ones trained or made up here, cut by every published pattern; broken ones refused."""
from __future__ import annotations

import base64
import json
import random

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hanok.errors import TokenizerError
from hanok.text.tiktoken_ranks import SPELLED, WORDS, is_rank_file, tokenizer_from_ranks
from hanok.text.tokenizer import train

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "llama-bpe": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": "|".join([rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?",
                       r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}
"""As tiktoken's own package, Llama 3 and Qwen publish them."""
PROSE = ["the quick brown fox jumps over the lazy dog, and the dog doesn't mind 1234 times\n\n\tif x == 0:\n        return [1, 22, 333]",
         "한국의 집은 마루를 가운데 두고 방들이 둘러앉는다. 마루는 시원하고 방은 따뜻하다.", "SHE'S HERE! naïve café 😀😀 👩‍👩‍👧 ...---...   end  "]
TEXT = st.one_of(st.text(), st.text("the Fox's 'LLl  \t\n\r\u00a0\u3000 12345 마루집😀é/.!-"), st.lists(st.sampled_from(PROSE)).map(" ".join))
BYTES = {bytes([byte]): byte for byte in range(256)}
END = {"<|end|>": 1000}


def trained_ranks(vocab_size: int = 600) -> dict[bytes, int]:
    """The ranks of a BPE that was trained here."""
    model = json.loads(train("bpe", PROSE * 3, vocab_size, pre_tokenizer="gpt-2", specials=[]).to_json())["model"]
    byte_of = {letter: byte for byte, letter in enumerate(SPELLED)}
    merged = [bytes(byte_of[letter] for letter in "".join(pair)) for pair in model["merges"]]
    return BYTES | {token: 256 + n for n, token in enumerate(dict.fromkeys(merged))}


def written(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def both(ranks: dict[bytes, int], words: str, specials: dict[str, int] = END):
    """Ours, and tiktoken's own."""
    theirs = tiktoken.Encoding("x", pat_str=PATTERNS[words], mergeable_ranks=ranks, special_tokens=specials)
    return tokenizer_from_ranks(written(ranks), words, specials), theirs


RANKS = trained_ranks()
RANKS |= {token: len(RANKS) + n for n, token in enumerate([b" \n", b"\n ", b"\n  ", b" \n ", b"\r\n", b"\t ", b"s H"])}   # so that cuts show
PAIRS = {words: both(RANKS, words) for words in PATTERNS}


@pytest.mark.parametrize("words", PATTERNS)
@settings(deadline=None)
@given(text=TEXT)
@example(text="a  \n  ")
@example(text="line\r\n\r\n   \n\t end")
@example(text="I'LL we'Re it'ſ 'S")
def test_the_ids_are_tiktokens(words, text):
    ours, theirs = PAIRS[words]
    ids = ours.encode(text)
    assert ids == theirs.encode_ordinary(text)
    assert ours.decode(ids) == text


def test_every_pattern_can_be_named():
    assert set(PATTERNS) < set(WORDS)
    assert PAIRS["gpt-2"][0].pre_tokenizer == "gpt-2" and PAIRS["o200k"][0].pre_tokenizer is None


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.text("abc", min_size=1, max_size=40))
def test_any_ranks_join_as_tiktoken_joins_them(seed, text):
    """Tokens in an order that no training gives: some cannot be made of others, some of several pairs."""
    draw = random.Random(seed)
    made = {bytes(draw.choice(b"abc") for _ in range(draw.randint(2, 5))) for _ in range(draw.randint(1, 30))}
    ranks = BYTES | {token: 256 + n for n, token in enumerate(draw.sample(sorted(made), len(made)))}
    ours, theirs = both(ranks, "gpt-2")
    assert ours.encode(text) == theirs.encode_ordinary(text)


def test_a_token_that_no_pair_makes_is_found_as_a_word():
    ours, theirs = both(BYTES | {b"abc": 256}, "gpt-2")
    assert ours.encode("abc") == theirs.encode_ordinary("abc") == [256]
    assert ours.encode("abcd") == theirs.encode_ordinary("abcd") == [*b"abcd"]


def test_special_tokens_are_found_where_they_are_asked_for():
    ours, theirs = PAIRS["gpt-2"]
    text = "the end<|end|>the dog"
    assert ours.specials == END
    assert ours.encode(text, parse_special=True) == theirs.encode(text, allowed_special="all")
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text, parse_special=True)) == "the endthe dog"


def test_a_saved_tokenizer_is_the_same(tmp_path):
    ours, theirs = PAIRS["cl100k"]
    ours.save(tmp_path / "tokenizer.json")
    assert type(ours).load(tmp_path).encode(PROSE[2]) == theirs.encode_ordinary(PROSE[2])


def test_lines_may_stand_in_any_order_and_end_in_any_way():
    shuffled = dict(random.Random(0).sample(sorted(RANKS.items()), len(RANKS)))
    data = written(shuffled).replace(b"\n", b"\r\n") + b"\r\n\n"
    assert tokenizer_from_ranks(data, "gpt-2").encode(PROSE[0]) == PAIRS["gpt-2"][0].encode(PROSE[0])


def test_a_special_token_may_fill_a_gap():
    ranks = BYTES | {b"ab": 257}
    ours, theirs = both(ranks, "gpt-2", {"<|end|>": 256})
    assert ours.encode("abab<|end|>", parse_special=True) == theirs.encode("abab<|end|>", allowed_special="all") == [257, 257, 256]


def test_a_published_file_is_known_by_its_number_of_ranks():
    tokens = BYTES | {b"%05d" % n: 256 + n for n in range(50_000)}
    ours = tokenizer_from_ranks(written(tokens))
    assert ours.pre_tokenizer == "gpt-2" and ours.specials == {"<|endoftext|>": 50256} and ours.vocab_size == 50257
    assert tokenizer_from_ranks(written(tokens), "qwen2", {}).specials == {}


def test_rank_files_are_known_by_their_first_line():
    assert is_rank_file(b"IQ== 0\nIg== 1\n") and is_rank_file(b"IQ== 0\r\n")
    assert not any(map(is_rank_file, (b"", b'{"model": 1}', b"PK\x03\x04", b"IQ==\n", b"a word 1\n")))


LINES = written(RANKS).splitlines()


def with_line(number: int, line: bytes) -> bytes:
    return b"\n".join([*LINES[:number - 1], line, *LINES[number:]])


@pytest.mark.parametrize(("data", "told"), [
    (with_line(7, b"Bg== six"), ["line 7: got b'Bg== six', expected a token in base64, a space and its rank"]),
    (with_line(7, b"Bg=="), ["line 7: got b'Bg=='"]),
    (with_line(7, b"Bg== 6 6"), ["line 7: got b'Bg== 6 6'"]),
    (with_line(7, b"Bg== -6"), ["line 7: got"]),
    (with_line(7, b"B~g== 6"), ["line 7: b'B~g==' is not base64"]),
    (with_line(7, b"Bg= 6"), ["line 7: b'Bg=' is not base64"]),
    (with_line(300, b"Bg== 299"), [r"line 300: token b'\x06' stands in line 7 already"]),
    (with_line(300, b"enp6enp6 6"), ["line 300: rank 6 stands in line 7 already"]),
    (with_line(300, b""), ["line 301: rank 300 stands there, and no line has rank 299"]),
    (with_line(300, b"enp6enp6 999999"), ["line 301: rank 300 stands there, and no line has rank 299"]),
    (with_line(7, b"enp6enp6 6"), ["byte 0x06 has no rank in its", "all 256 single bytes were expected"]),
    (b"", ["byte 0x00 has no rank in its 0 lines"]),
])
def test_a_broken_file_is_told_in_one_line(data, told):
    assert all(part in refused(data, "gpt-2") for part in told)


@pytest.mark.parametrize(("specials", "told"), [
    ({"<|x|>": 3}, "special token '<|x|>' has id 3, which is line 4's"),
    ({"<|x|>": 2000, "<|y|>": 2000}, "special token '<|y|>' has id 2000, which is another one's"),
    ({"<|x|>": -1}, "has id -1, which is below 0"),
    ({"a": 2000}, "special token 'a' is spelled as an ordinary one"),
    ({"": 2000}, "special token '' is spelled as an ordinary one"),
])
def test_special_tokens_that_do_not_fit_are_refused(specials, told):
    assert told in refused(written(RANKS), "gpt-2", specials)


def test_how_words_are_cut_must_be_told():
    assert f"this one {len(RANKS)}; say how it cuts words: --pre-tokenizer gpt-2|" in refused(written(RANKS))
    assert "unknown pre-tokenizer 'cl10k'; did you mean 'cl100k'?" in refused(written(RANKS), "cl10k")


def refused(data: bytes, *arguments) -> str:
    with pytest.raises(TokenizerError) as told:
        tokenizer_from_ranks(data, *arguments)
    assert "\n" not in str(told.value)
    return str(told.value)
