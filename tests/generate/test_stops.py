"""Stop strings against a naive reading of the whole text: what was given out is never taken back, and no more is held than could become a stop."""
from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.generate.run import StopMatcher

letters = st.text(alphabet="ab끝", max_size=5)


def naive(pieces: list[str], stops: list[str]) -> tuple[str, int | None]:
    """The text up to the first stop string of what had come when one was first there, and the piece that completed it."""
    text = ""
    for n, piece in enumerate(pieces):
        text += piece
        places = [text.find(stop) for stop in stops if stop and stop in text]
        if places:
            return text[:min(places)], n
    return text, None


@settings(max_examples=500, deadline=None)
@given(st.lists(letters, max_size=12), st.lists(st.text(alphabet="ab끝", max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop(pieces, stops):
    expected, at = naive(pieces, stops)
    matcher, given_out = StopMatcher(stops), ""
    for n, piece in enumerate(pieces):
        text, stopped = matcher.push(piece)
        given_out += text
        assert expected.startswith(given_out)                                         # nothing will have to be taken back
        assert stopped == (n == at)
        if stopped:
            assert given_out == expected and matcher.flush() == ""
            return
        held = "".join(pieces[:n + 1])[len(given_out):]
        assert held == matcher.held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)      # no more is held than may become a stop
    assert given_out + matcher.flush() == expected
    assert matcher.flush() == ""


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab", max_size=30), st.text(alphabet="ab", min_size=1, max_size=4), st.data())
def test_one_stop_string_is_found_however_the_text_is_cut(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    matcher, given_out, met = StopMatcher([stop]), "", False
    for piece in pieces:
        certain, met = matcher.push(piece)
        given_out += certain
        if met:
            break
    place = text.find(stop)
    assert met == (place >= 0)
    assert given_out + matcher.flush() == (text[:place] if met else text)


def test_cases_worth_reading():
    matcher = StopMatcher(["###", "\n\n"])
    assert matcher.push("a#") == ("a", False)
    assert matcher.push("#b") == ("##b", False)                                       # a false start is given back whole
    assert matcher.push("\n") == ("", False)
    assert matcher.push("#") == ("\n", False)
    assert matcher.push("##") == ("", True)
    assert StopMatcher([""]).push("a") == ("a", False)
    assert StopMatcher([]).push("a") == ("a", False)
    both = StopMatcher(["ab", "abc"])
    assert both.push("xabcd") == ("x", True)
