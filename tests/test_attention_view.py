"""Tokens become words, and weights with them: nothing is lost on the way, whatever the text and the tokenizer."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.attention_view import Attention, word_spans, words_of, words_of_ids
from hanok.errors import RequestError
from tiny import prose, tokenizer

KINDS = ["bpe", "wordpiece", "unigram"]


def view(text: str, kind: str = "bpe", n_layers: int = 2, n_heads: int = 3, **more) -> Attention:
    """A text's words under random weights."""
    words = tokenizer(kind, 400 if kind == "unigram" else 300)
    ids, offsets = words.encode_with_offsets(text, add_special=True)
    torch.manual_seed(0)
    gathered = words_of(text, ids, offsets, words)
    t = len(ids)
    return Attention(gathered, gathered, torch.randn(n_layers, n_heads, t, t).softmax(-1), torch.randn(n_layers + 1, t, 8), **more)


def test_who_looks_at_a_word_is_a_column():
    seen = view("the house stands on a stone", "bpe")
    told = seen.onto("stone", 2, 1)
    at = seen.words.index("stone")
    assert dict(told) == {name: pytest.approx(seen.by_word[1, 0, i, at].item()) for i, name in enumerate(seen.words)}
    assert [weight for _, weight in told] == sorted((weight for _, weight in told), reverse=True)
    with pytest.raises(RequestError, match="'roof' is not a word of the text"):
        seen.onto("roof")


def test_what_a_decoder_begins_with_is_special():
    words = tokenizer("unigram", 400)
    text = "the house </s> (2)"
    ids, offsets = words.encode_with_offsets(text, add_special=True)
    plain = words_of(text, ids, offsets, words, "answer")
    begun = plain.begun_with([words.id_of("</s>")], words)
    assert begun.words[0] == "</s>" and begun.words[-1] == "</s> (2)" and len(set(begun.words)) == len(begun.words) and begun.real == plain.real
    assert begun.special[0] and begun.tokens == ("</s>", *plain.tokens) and begun.name == "answer"
    assert begun.positions == ((0,), *(tuple(i + 1 for i in at) for at in plain.positions)) and begun.spans[1:] == plain.spans


# ---- words
@pytest.mark.parametrize("text, words", [
    ("Attention is a novel idea", ["Attention", "is", "a", "novel", "idea"]), ("it isn't, is it?", ["it", "isn't", ",", "is", "it", "?"]),
    ("한옥은 돌 위에", ["한옥은", "돌", "위에"]), ("한국 漢字のみ", ["한국", "漢", "字", "の", "み"]), ("a 👨‍👩‍👧 ❤️!", ["a", "👨‍👩‍👧", "❤️!"]),
    ("naïve cafe\u0301 'tis", ["naïve", "cafe\u0301", "'", "tis"]), ("snake_case 3.5", ["snake_case", "3", ".", "5"]), (" \n", []), ("", []),
])
def test_words(text, words):
    assert [text[start:end] for start, end in word_spans(text)] == words


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_words_cover_everything_but_space(text):
    spans = list(word_spans(text))
    assert all(start < end for start, end in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    covered = {i for start, end in spans for i in range(start, end)}
    assert all(character.isspace() for i, character in enumerate(text) if i not in covered)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="the hous한옥은🏠 .,\n'é", min_size=1, max_size=40))
def test_every_token_belongs_to_one_word(kind, text):
    words = view(text, kind, 1, 1).rows if text.strip() else None
    if words is not None:
        assert [t for at in words.positions for t in at] == list(range(len(words.tokens)))
        assert len(words.words) == len(set(words.words)) == len(words.positions) == len(words.special) == len(words.spans)
        assert all(text[start:end].strip() for (start, end), special in zip(words.spans, words.special) if not special)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_gathered_and_specials_stand_alone(kind):
    words = view("the stonehouse roof", kind).rows
    assert [word for word, special in zip(words.words, words.special) if not special] == words.real == ["the", "stonehouse", "roof"]
    assert len(words.positions[words.index("stonehouse")]) > 1
    assert "".join(words.tokens[t] for t in words.positions[words.index("stonehouse")]).strip("␣") == "stonehouse"
    framed = {"bpe": [], "wordpiece": ["[CLS]", "[SEP]"], "unigram": ["</s>"]}[kind]
    assert [word for word, special in zip(words.words, words.special) if special] == framed


def test_words_that_come_again_are_numbered_and_found():
    words = view("the house and the House").rows
    assert words.words == ("the", "house", "and", "the (2)", "House")
    assert [words.index(word) for word in ("the", "the (2)", "THE", "House", "HOUSE")] == [0, 3, 0, 4, 1]
    with pytest.raises(RequestError, match=r"^'roof' is not a word of the text; its words are the, house, and, the \(2\), House$"):
        words.index("roof")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the house stands", "한옥은 돌 위에", "naïve clouds 🏠 rain", prose(20, seed=3)])
def test_what_was_written_has_the_same_words(kind, text):
    words = tokenizer(kind, 400 if kind == "unigram" else 300)
    ids = words.encode(text)
    said = words.decode(ids)
    expected = [said[start:end] for start, end in word_spans(said)]
    got = words_of_ids(ids, words)
    assert [said[start:end] for start, end in got.spans if end] == expected
    assert [t for at in got.positions for t in at] == list(range(len(ids)))


# ---- weights
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_words_are_means_of_sums(kind):
    seen = view("the stonehouse roof stands", kind)
    for i, rows in enumerate(seen.rows.positions):
        for j, columns in enumerate(seen.columns.positions):
            by_hand = sum(seen.weights[1, 2, t, s].item() for t in rows for s in columns) / len(rows)
            assert seen.by_word[1, 2, i, j].item() == pytest.approx(by_hand, abs=1e-6)
    assert torch.allclose(seen.by_word.sum(-1), torch.ones(seen.by_word.shape[:-1]), atol=1e-5)


@pytest.mark.parametrize("layer, head", [(None, None), (2, None), (1, 3)])
def test_a_word_is_ranked_and_what_is_missing_is_on_special_tokens(layer, head):
    seen = view("the stonehouse roof stands", "wordpiece")
    ranked = seen.of_word("roof", layer, head)
    assert [name for name, _ in ranked] != seen.rows.real and {name for name, _ in ranked} == set(seen.rows.real)
    assert [w for _, w in ranked] == sorted((w for _, w in ranked), reverse=True)
    rest = seen.to_specials("roof", layer, head)
    assert rest > 0 and sum(w for _, w in ranked) + rest == pytest.approx(1, abs=1e-5)
    chosen = seen.by_word[slice(None) if layer is None else slice(layer - 1, layer), slice(None) if head is None else slice(head - 1, head)]
    assert dict(ranked)["stands"] == pytest.approx(chosen.mean((0, 1))[seen.rows.index("roof"), seen.rows.index("stands")].item(), abs=1e-6)


def test_between_two_words_and_the_heads_that_tie_them():
    seen = view("the house stands", n_layers=3, n_heads=2)
    tie = seen.between("house", "stands")
    assert tie.shape == (3, 2) and torch.equal(tie, seen.by_word[:, :, 1, 2])
    best = seen.heads_between("house", "stands", 99)
    assert len(best) == 6 and [w for *_, w in best] == sorted(tie.flatten().tolist(), reverse=True)
    assert all(tie[layer - 1, head - 1].item() == w for layer, head, w in best)


def test_a_words_vectors_are_its_tokens_mean():
    seen = view("the stonehouse roof")
    at = list(seen.rows.positions[1])
    assert len(at) > 1 and torch.allclose(seen.vectors("stonehouse"), seen.hidden[:, at].mean(1)) and seen.vectors("roof").shape == (3, 8)


def test_layers_and_heads_that_are_not_there():
    seen = view("the house")
    for layer, head, told in ((3, None, "there is no layer 3; this model has 2, counted from 1"), (0, None, "there is no layer 0"),
                              (1, 4, "there is no head 4; this model has 3, counted from 1"), (1, -1, "there is no head -1")):
        with pytest.raises(RequestError, match=told):
            seen.of_word("house", layer, head)
