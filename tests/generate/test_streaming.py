"""The text of answers: Hangul and emoji in pieces of bytes, stop strings across tokens, and chunks that add up to the whole."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted, gathered

from hanok.contracts import Request
from hanok.generate.run import run
from hanok.text.tokenizer import train

TEXTS = ["한옥은 마루를 가운데 두고 방을 둘러 놓은 집이다.",
         "기둥과 보, 그리고 마루. 🏠", "a house of posts and beams, the end.\n\n", "끝. 끝났다. END 🙂"]
TOKENIZER = train("bpe", TEXTS * 3, 330)
SIZE = TOKENIZER.vocab_size + 3                          # a model's matrix often has more rows than there are tokens
EOS = TOKENIZER.id_of("<|endoftext|>")
sentences = st.text(alphabet="한옥마루집끝🏠🙂👩‍👩‍👧é ab\nEND.", max_size=24)


def answer(ids, **options):
    """(chunks, text, token ids, finish reason) of a model that writes `ids`."""
    model = Scripted([list(ids) or [EOS]], SIZE)
    options = {"max_new_tokens": max(1, len(ids)), **options}
    chunks = list(run(model, [Request([0], **options)], TOKENIZER))
    (text, written, reason), = gathered(chunks).values()
    return [chunk for _, chunk in chunks], text, written, reason


def naive(ids, stops):
    """The answer, told from the whole: text, tokens, reason."""
    whole = TOKENIZER.decode(ids)
    for n in range(1, len(ids) + 1):
        decoder = TOKENIZER.stream()
        text = "".join(map(decoder.push, ids[:n]))
        places = [text.find(stop) for stop in stops if stop in text]
        if places:
            return text[:min(places)], tuple(ids[:n]), "stop"
    places = [whole.find(stop) for stop in stops if stop in whole]                    # a character that never became whole
    return (whole[:min(places)], tuple(ids), "stop") if places else (whole, tuple(ids), "length")


def test_the_tokenizer_splits_characters():
    """Else the tests below would show nothing."""
    ids = TOKENIZER.encode("뷁🏠👩‍👩‍👧")
    assert len(ids) > 12 and "\ufffd" in TOKENIZER.decode(ids[:1])
    assert len(TOKENIZER.encode("마루")) < len("마루".encode())


@settings(max_examples=120, deadline=None)
@given(sentences)
def test_streamed_text_is_the_text(text):
    ids = TOKENIZER.encode(text)
    if not ids:
        return
    chunks, got, written, reason = answer(ids)
    assert (got, written, reason) == (text, tuple(ids), "length")
    assert all("\ufffd" not in chunk.text for chunk in chunks)                        # whole characters only
    assert all(chunk.text for chunk in chunks[:-1])                                   # no chunk says nothing
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=20))
def test_any_tokens_stream_as_they_decode(ids):
    """Bytes that are no UTF-8, special tokens and rows without a token included."""
    _, got, written, reason = answer(ids)
    assert (got, written, reason) == (TOKENIZER.decode(ids), tuple(ids), "length")


@settings(max_examples=150, deadline=None)
@given(sentences, st.data())
def test_stop_strings_are_found_wherever_tokens_end(text, data):
    ids = TOKENIZER.encode(text)
    if not ids:
        return
    pieces = st.integers(0, len(text)).flatmap(lambda a: st.integers(a, min(len(text), a + 6)).map(lambda b: text[a:b]))
    stops = data.draw(st.lists(st.one_of(pieces, sentences.map(lambda s: s[:3])), max_size=3))
    expected = naive(ids, [stop for stop in stops if stop])
    chunks, *got = answer(ids, stop=stops)
    assert tuple(got) == expected
    so_far = ""
    for chunk in chunks:
        so_far += chunk.text
        assert expected[0].startswith(so_far)


def test_a_stop_string_may_cross_tokens_and_characters():
    ids = TOKENIZER.encode("마루 끝🏠 집")
    _, text, written, reason = answer(ids, stop=["끝🏠"])
    assert (text, reason) == ("마루 ", "stop")
    assert written == tuple(ids[:len(written)]) and len(written) < len(ids)


def test_what_was_held_for_a_stop_that_never_came_is_given_at_the_end():
    ids = TOKENIZER.encode("the E")
    assert answer(ids, stop=["END"])[1:] == ("the E", tuple(ids), "length")
    assert answer([*ids, EOS], stop=["END"], stop_ids=(EOS,), max_new_tokens=9)[1:] == ("the E", tuple(ids), "stop")


def test_a_character_that_never_became_whole_is_told_at_the_end():
    ids = TOKENIZER.encode("뷁")[:-1]
    chunks, text, written, reason = answer(ids)
    assert (text, written, reason) == ("\ufffd", tuple(ids), "length") and len(chunks) == 1
    assert answer([*ids, EOS], stop_ids=(EOS,), max_new_tokens=9)[1:] == ("\ufffd", tuple(ids), "stop")
    assert answer(ids, stop=["\ufffd"])[1:] == ("", tuple(ids), "stop")


def test_a_stop_id_adds_nothing_and_an_answer_may_be_empty():
    ids = TOKENIZER.encode("집이다.")
    assert answer([*ids, EOS, *ids], stop_ids=(EOS,), max_new_tokens=50)[1:] == ("집이다.", tuple(ids), "stop")
    assert answer([EOS], stop_ids=(EOS,))[1:] == ("", (), "stop")
    assert answer([EOS, *ids], max_new_tokens=1 + len(ids))[1:] == ("집이다.", (EOS, *ids), "length")   # special tokens are not text


def test_a_stop_string_with_the_last_token_that_is_allowed_is_a_stop():
    ids = TOKENIZER.encode("the end.")
    assert answer(ids, stop=["end."])[1:] == ("the ", tuple(ids), "stop")
    shorter = answer(ids, stop=["end."], max_new_tokens=len(ids) - 1)
    assert shorter[1:] == (TOKENIZER.decode(ids[:-1]), tuple(ids[:-1]), "length")


def test_a_stop_string_may_come_before_the_least_number_of_tokens():
    """`min_new_tokens` speaks of stop ids alone."""
    ids = TOKENIZER.encode("a b a b a b")
    assert answer(ids, stop=["b"], min_new_tokens=len(ids))[1] == "a "


@pytest.mark.parametrize("n", [1, 3])
def test_answers_that_end_at_different_times_keep_their_own_text(n):
    scripts = [TOKENIZER.encode(text) + [EOS] for text in ("마루 🏠", "끝", "a house of posts and beams, the end.")]
    model = Scripted(scripts, SIZE)
    requests = [Request([i, *range(i)], n=n, max_new_tokens=40, stop_ids=(EOS,), stop=[" beams"] if i == 2 else []) for i in range(3)]
    answers = gathered(run(model, requests, TOKENIZER))
    assert set(answers) == {(i, index) for i in range(3) for index in range(n)}
    for index in range(n):
        assert answers[0, index] == ("마루 🏠", tuple(scripts[0][:-1]), "stop")
        assert answers[1, index] == ("끝", tuple(scripts[1][:-1]), "stop")
        assert answers[2, index][0] == "a house of posts and" and answers[2, index][2] == "stop"


def test_a_chunk_comes_as_soon_as_it_is_certain():
    """Text is not kept until the end: after each token all whole characters that no stop string can begin with are out."""
    ids = TOKENIZER.encode("마루 끝 the house")
    stream = run(Scripted([ids], SIZE), [Request([0], max_new_tokens=len(ids), stop=["house!"])], TOKENIZER)
    seen, n_read = "", 0
    for _, chunk in stream:
        seen, n_read = seen + chunk.text, n_read + len(chunk.token_ids)
        decoder = TOKENIZER.stream()
        certain = "".join(map(decoder.push, ids[:n_read]))
        if chunk.finish_reason is None:
            assert seen == certain or "house!".startswith(certain[len(seen):])
    assert seen == "마루 끝 the house"


@settings(max_examples=100, deadline=None)
@given(sentences, st.lists(sentences.map(lambda text: text[:3]), max_size=2), st.booleans())
def test_a_beam_is_told_whole_and_cut_where_a_stream_would_have_stopped(text, stops, ends):
    ids = TOKENIZER.encode(text) + [EOS] * ends
    options = {"stop": stops, "stop_ids": (EOS,)}
    (chunk,), *told = answer(ids, n_beams=2, **options)
    _, *streamed = answer(ids, **options)
    assert told == streamed
    assert chunk.index == 0 and chunk.score == pytest.approx(0, abs=1e-4) and chunk.finish_reason


def test_all_beams_come_with_their_text_and_score():
    ids = TOKENIZER.encode("a house.")
    chunks, *_ = answers = list(run(Scripted([ids], SIZE), [Request([0], max_new_tokens=len(ids), n_beams=3, n=3)], TOKENIZER))
    assert chunks[1].text == "a house." and [chunk.index for _, chunk in answers] == [0, 1, 2]
    assert all(chunk.text == TOKENIZER.decode(chunk.token_ids) and chunk.finish_reason == "length" for _, chunk in answers)
    assert answers[1][1].score == pytest.approx(-100 / len(ids), abs=1e-3)            # one wrong word
