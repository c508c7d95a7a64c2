"""What is hidden, cut out or cut off, by the papers' numbers, and by each row's own chance alone."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.objectives import Rows, masked, prefix, seq2seq, span_corruption
from hanok.data.spans import noise_counts, noise_spans, segments, tokens_for
from hanok.errors import ConfigError

V, MASK, CLS, SEP, PAD = 60, 59, 58, 57, 56
ORDINARY = np.arange(V) < 50
SENTINELS = list(range(199, 99, -1))
ENDS = {"start_id": 90, "end_id": 91, "pad_id": 92}


def rows_of(*lines: list[int], seed: int = 0, documents: list[list[int]] | None = None) -> Rows:
    """Rows of these tokens, padded to the longest."""
    longest = max(map(len, lines))
    lengths = tuple(map(len, lines))
    ids = torch.tensor([line + [0] * (longest - len(line)) for line in lines])
    return Rows(ids, None if documents is None else torch.tensor(documents), tuple((seed, 0, place) for place in range(len(lines))),
                None if min(lengths) == longest else lengths)


def line_of(n: int, seed: int = 0, below: int = 50) -> list[int]:
    return np.random.default_rng(seed).integers(0, below, n).tolist()


def part(rows: Rows, row: int) -> Rows:
    """One row alone, as long as it is."""
    n = rows.token_ids.size(1) if rows.lengths is None else rows.lengths[row]
    return Rows(rows.token_ids[row:row + 1, :n], None if rows.document_ids is None else rows.document_ids[row:row + 1, :n], (rows.keys[row],))


def real(batch: Batch, row: int, *names: str) -> list[list[int]]:
    """A row's real tokens in these fields."""
    found = []
    for name in names:
        keep = batch.source_keep if name == "source_ids" else batch.keep
        values = getattr(batch, name)[row]
        found.append((values if keep is None else values[keep[row]]).tolist())
    return found


# ---- masked

def test_bert_chooses_15_percent_and_hides_80_of_them():
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (400, 100)))
    batch = masked(Rows(ids, keys=tuple((3, 0, n) for n in range(400))), mask_id=MASK, ordinary=ORDINARY)
    chosen = batch.targets != IGNORE_INDEX
    assert (chosen.sum(1) == 15).all() and torch.equal(batch.targets[chosen], ids[chosen]) and torch.equal(batch.token_ids[~chosen], ids[~chosen])
    seen, wanted = batch.token_ids[chosen], batch.targets[chosen]
    share = [(seen == MASK).float().mean().item(), (seen == wanted).float().mean().item()]
    assert share == pytest.approx([0.8, 0.1 + 0.1 / 50], abs=0.02)                       # another token may be the same by chance
    others = seen[(seen != MASK) & (seen != wanted)]
    assert len(others.unique()) == 50 and (others < 50).all() and chosen.float().mean(0).std() < 0.03      # every token and place, as likely


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=30), min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(0, 3))
def test_a_row_is_masked_as_if_it_were_alone(lines, whole_words, around, seed):
    rows = rows_of(*lines, seed=seed)
    told = {"mask_id": MASK, "ordinary": ORDINARY, "continues": np.arange(V) % 3 == 0 if whole_words else None,
            "around": (CLS, SEP) if around else None}
    batch = masked(rows, **told)
    for row, line in enumerate(lines):
        alone = masked(part(rows, row), **told)
        assert real(batch, row, "token_ids", "targets") == real(alone, 0, "token_ids", "targets")
        seen, targets = real(batch, row, "token_ids", "targets")
        if around:
            assert (seen[0], seen[-1], targets[0], targets[-1]) == (CLS, SEP, IGNORE_INDEX, IGNORE_INDEX)
            seen, targets = seen[1:-1], targets[1:-1]
        assert [token if target == IGNORE_INDEX else target for token, target in zip(seen, targets)] == line
        assert all(target == IGNORE_INDEX or target < 50 for target in targets), "a special token was asked for"
        n = sum(token < 50 for token in line)
        chosen = sum(target != IGNORE_INDEX for target in targets)
        assert chosen == (0 if not n else max(1, round(0.15 * n))) or (whole_words and chosen >= 1)
        if batch.keep is not None:
            assert (batch.targets[row][~batch.keep[row]] == IGNORE_INDEX).all()


def test_words_are_hidden_whole():
    continues = np.arange(V) >= 25                                                       # 0..24 begin a word, 25..49 go on with it
    ids = torch.tensor([[1, 30, 31, 2, 3, 40, 57, 41, 4, 5, 32, 6]] * 300)
    words = [[0, 1, 2], [3], [4, 5], [7], [8], [9, 10], [11]]                            # behind a special token a word begins anew
    batch = masked(Rows(ids, keys=tuple((0, 0, n) for n in range(300))), mask_id=MASK, ordinary=ORDINARY, continues=continues, rate=0.3)
    seen = set()
    for row in batch.targets:
        chosen = set((row != IGNORE_INDEX).nonzero().flatten().tolist())
        assert len(chosen) <= 3 and all(chosen >= set(word) or not chosen & set(word) for word in words)
        seen |= chosen
    assert seen == {place for word in words for place in word}


def test_a_word_ends_with_its_document():
    rows = Rows(torch.tensor([[1, 30, 31, 32]] * 100), torch.tensor([[0, 0, 1, 1]] * 100), tuple((0, 0, n) for n in range(100)))
    batch = masked(rows, mask_id=MASK, ordinary=ORDINARY, continues=np.arange(V) >= 25, rate=0.5)
    assert {tuple((row != IGNORE_INDEX).tolist()) for row in batch.targets} == {(True, True, False, False), (False, False, True, True)}


def test_a_word_longer_than_what_may_be_hidden_is_better_than_none():
    batch = masked(rows_of([1, 30, 31, 32, 2, 33, 34]), mask_id=MASK, ordinary=ORDINARY, continues=np.arange(V) >= 25)
    assert (batch.targets[0] != IGNORE_INDEX).tolist() == [False] * 4 + [True] * 3


def test_masks_follow_seed_epoch_and_place():
    line = torch.tensor([line_of(40)])
    hidden = {key: tuple(masked(Rows(line, keys=(key,)), mask_id=MASK, ordinary=ORDINARY).targets[0].tolist())
              for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 40))}
    assert len(set(hidden.values())) == len(hidden)


def test_documents_of_a_masked_row_are_separate():
    rows = rows_of(line_of(9), documents=[[4, 4, 4, 5, 5, 6, 6, 6, 6]])
    batch = masked(rows, mask_id=MASK, ordinary=ORDINARY, around=(CLS, SEP))
    assert batch.document_ids.tolist() == [[4, 4, 4, 4, 5, 5, 6, 6, 6, 6, 6]] and batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]]
    plain = masked(rows, mask_id=MASK, ordinary=ORDINARY, separate=False)
    assert plain.document_ids is None and plain.positions is None


# ---- span corruption

@pytest.mark.parametrize(("n_tokens", "rate", "mean", "counts"), [
    (568, 0.15, 3.0, (85, 28)), (512, 0.15, 3.0, (77, 26)), (100, 0.15, 3.0, (15, 5)), (10, 0.15, 3.0, (2, 1)), (30, 0.5, 3.0, (15, 5)),
    (2, 0.15, 3.0, (1, 1)), (3, 0.01, 3.0, (1, 1)), (10, 0.99, 3.0, (9, 1)), (10, 0.5, 1.0, (5, 5)), (50, 0.15, 3.0, (8, 3)),
])
def test_how_many_tokens_and_spans_t5_cuts_out(n_tokens, rate, mean, counts):
    """By its rules (round, half to even; one at least; one stays), worked out by hand."""
    assert noise_counts(n_tokens, rate, mean) == counts


def test_the_published_lengths_of_t5():
    """512 positions hold 568 tokens of text, and their targets take 114 (random_spans_helper in its code)."""
    assert tokens_for(512, 0.15, 3.0) == 568 and sum(noise_counts(568, 0.15, 3.0)) + 1 == 114


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=60), min_size=1, max_size=4), st.floats(0.05, 0.9), st.floats(1, 6),
       st.integers(0, 5), st.booleans())
def test_source_and_target_hold_the_whole_text(lines, rate, mean, seed, with_end):
    """Put each span back in its sentinel's place: nothing is lost, nothing comes twice; and a row is cut as if it were alone."""
    rows, end = rows_of(*lines, seed=seed), [91] if with_end else []
    told = {"sentinel_ids": SENTINELS, "rate": rate, "mean_span_length": mean, **ENDS, "source_end_id": 91 if with_end else None}
    batch = span_corruption(rows, **told)
    for row, line in enumerate(lines):
        (source, seen, target), alone = real(batch, row, "source_ids", "token_ids", "targets"), span_corruption(part(rows, row), **told)
        assert [source, seen, target] == real(alone, 0, "source_ids", "token_ids", "targets")
        assert seen == [90, *target[:-1]] and target[-1] == 91
        hidden: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 100:
                hidden[token] = []
            else:
                hidden[max(hidden, key=list(hidden).index)].append(token)
        assert list(hidden) == SENTINELS[:len(hidden)] == [token for token in source if token >= 100]
        rebuilt = [token for place in source for token in (hidden[place] if place >= 100 else [place])]
        assert rebuilt == line + end
        if len(line) > 1:
            assert (sum(map(len, hidden.values())), len(hidden)) == noise_counts(len(line), rate, mean)
        assert batch.keep is None or (batch.targets[row][~batch.keep[row]] == IGNORE_INDEX).all()


def test_every_way_to_cut_is_as_likely():
    random = np.random.default_rng(0)
    seen = [tuple(segments(5, 3, random).tolist()) for _ in range(6000)]
    ways = {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert set(seen) == ways and all(abs(seen.count(way) - 1000) < 120 for way in ways)
    spans = noise_spans(20, 0.3, 2.0, random)
    assert len(spans) == 3 and spans[0][0] > 0 and spans[-1][1] == 20 and all(a[1] < b[0] for a, b in zip(spans, spans[1:]))


def test_too_few_sentinels_are_told():
    with pytest.raises(ConfigError, match="100 tokens are cut at 5 places, and there are 4 sentinel tokens; give shorter rows"):
        span_corruption(rows_of(line_of(100)), sentinel_ids=SENTINELS[:4], **ENDS)


# ---- prefix and pairs

@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(0, 5))
def test_a_prefix_and_its_rest_are_the_row(lines, seed):
    rows = rows_of(*lines, seed=seed)
    batch = prefix(rows, **ENDS, source_end_id=91)
    for row, line in enumerate(lines):
        source, seen, target = real(batch, row, "source_ids", "token_ids", "targets")
        assert [source, seen, target] == real(prefix(part(rows, row), **ENDS, source_end_id=91), 0, "source_ids", "token_ids", "targets")
        assert source[:-1] + target[:-1] == line and source[-1] == target[-1] == 91 and seen == [90, *target[:-1]] and len(source) > 1
        assert len(target) > 1 or len(line) == 1


def test_every_prefix_comes_as_often():
    ids = torch.arange(6).repeat(3000, 1)
    batch = prefix(Rows(ids, keys=tuple((0, 0, n) for n in range(3000))), **ENDS)
    counts = np.bincount(batch.source_keep.sum(1).numpy())
    assert len(counts) == 6 and counts[0] == 0 and all(abs(n - 600) < 100 for n in counts[1:])


def test_a_decoder_begins_with_the_start_and_ends_with_the_end():
    batch = seq2seq([([1, 2, 3], [4]), (np.array([5]), np.array([6, 7], np.uint16))], **ENDS)
    assert batch.source_ids.tolist() == [[1, 2, 3], [5, 92, 92]] and batch.source_keep.tolist() == [[True] * 3, [True, False, False]]
    assert batch.token_ids.tolist() == [[90, 4, 92], [90, 6, 7]] and batch.targets.tolist() == [[4, 91, IGNORE_INDEX], [6, 7, 91]]
    assert batch.keep.tolist() == [[True, True, False], [True] * 3]
    even = seq2seq([([1], [2]), ([3], [4])], **ENDS, source_end_id=91)
    assert even.source_keep is None and even.keep is None and even.source_ids.tolist() == [[1, 91], [3, 91]]
