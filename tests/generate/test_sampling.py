"""Choosing a token: against the logits processors of transformers, the OpenAI API's formula, and the law of large numbers. V vocabulary."""
from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hanok.contracts import Sampling
from hanok.errors import RequestError
from hanok.generate.sampling import FEW, Ngrams, bar, candidates, check, choose, generator_of, is_plain_greedy, penalise

sizes = st.one_of(st.integers(2, 40), st.integers(FEW - 2, FEW + 3), st.integers(FEW + 4, 1500))
widths = st.sampled_from([0.02, 0.5, 2.0, 6.0, 20.0])
"""How far logits spread: from a distribution so flat that every token counts to one that is nearly certain."""


def logits_of(size, width, seed):
    return width * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def by_transformers(logits, sampling, margin=0.0):
    """The distribution in fp64 after transformers' warpers. Cases that rounding decides are thrown away, where there is a margin."""
    scores, no_ids = logits.double()[None], torch.zeros(1, 0, dtype=torch.long)
    scores = transformers.TemperatureLogitsWarper(sampling.temperature)(no_ids, scores)
    if sampling.top_k:
        scores = transformers.TopKLogitsWarper(sampling.top_k)(no_ids, scores)
    if sampling.top_p < 1:
        ordered = scores.softmax(-1)[0].sort(descending=True).values
        if margin:
            assume(((ordered.cumsum(0) - ordered - sampling.top_p).abs() > margin).all())
        scores = transformers.TopPLogitsWarper(sampling.top_p)(no_ids, scores)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)[0]
        if margin:
            assume(((probabilities / probabilities.max() - sampling.min_p).abs() > margin * sampling.min_p).all())
        scores = transformers.MinPLogitsWarper(sampling.min_p)(no_ids, scores)
    return scores.softmax(-1)[0]


def dense(probabilities, ids, size):
    assert len(set(ids.tolist())) == len(ids)
    return torch.zeros(size, dtype=torch.float64).scatter(0, ids, probabilities.double())


@settings(max_examples=200, deadline=None)
@given(sizes, widths, st.integers(0, 2 ** 20), st.sampled_from([0.1, 0.7, 1.0, 1.8]), st.one_of(st.just(0), st.integers(1, 600)),
       st.one_of(st.just(1.0), st.floats(0.02, 0.98)), st.one_of(st.just(0.0), st.floats(0.001, 1.0)))
def test_candidates_are_those_of_transformers(size, width, seed, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = logits_of(size, width, seed)
    assume(logits.unique().numel() == size)                                           # transformers keeps all equals of the k-th
    expected = by_transformers(logits, sampling, 2e-5)
    probabilities, ids = candidates(logits, sampling)
    got = dense(probabilities, ids, size)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
    assert set(expected.nonzero().flatten().tolist()) >= set(ids[probabilities > 0].tolist())
    assert (expected[got == 0] < 1e-30).all()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
    if top_k or top_p < 1 or min_p > 0:
        assert (probabilities.diff() <= 0).all() or len(ids) == size                  # likeliest first


@pytest.mark.parametrize(("width", "sampling"), [
    (20.0, Sampling(1.0, top_p=0.9)), (0.02, Sampling(1.0, top_p=0.9)),               # the first FEW are enough; they are not
    (20.0, Sampling(1.0, min_p=0.2)), (0.02, Sampling(1.0, min_p=0.2)), (0.02, Sampling(1.0, top_k=700, top_p=0.5)),
    (3.0, Sampling(1.0, top_k=700, min_p=0.1)), (0.02, Sampling(1.0, top_k=FEW, top_p=0.5)), (0.02, Sampling(1.0, top_k=FEW + 1, top_p=0.99)),
], ids=str)
def test_the_shortcut_for_large_vocabularies_changes_nothing(width, sampling):
    logits = logits_of(2000, width, 1)
    probabilities, ids = candidates(logits, sampling)
    torch.testing.assert_close(dense(probabilities, ids, 2000), by_transformers(logits, sampling), atol=1e-5, rtol=1e-3)


def test_top_k_keeps_k_even_among_equals():
    probabilities, ids = candidates(torch.zeros(10), Sampling(1.0, top_k=3))
    assert len(ids) == 3 and torch.allclose(probabilities, torch.full((3,), 1 / 3))


def test_the_likeliest_token_always_stays():
    logits = torch.tensor([0.0, 3.0, 1.0])
    for sampling in (Sampling(1.0, top_p=1e-9), Sampling(1.0, min_p=1.0), Sampling(1.0, top_k=1)):
        probabilities, ids = candidates(logits, sampling)
        assert ids.tolist() == [1] and probabilities.tolist() == [1.0]


def test_a_forbidden_token_is_never_a_choice():
    logits = torch.full((300,), float("-inf"))
    logits[[5, 299]] = torch.tensor([0.0, 1.0])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=9), Sampling(0.5, top_p=0.999), Sampling(2.0, min_p=0.01)):
        generator = generator_of(0, 0)
        assert {choose(logits, sampling, generator, [1], {}) for _ in range(60)} == {5, 299}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), widths, st.integers(0, 2 ** 20), st.floats(0.3, 3.0), st.data())
def test_repetition_penalty_is_transformers(size, width, seed, penalty, data):
    tokens = st.lists(st.integers(0, size - 1), max_size=20)
    prompt, answer = data.draw(tokens), data.draw(tokens)
    logits = logits_of(size, width, seed)
    before = logits.clone()
    got = penalise(logits, Sampling(repetition_penalty=penalty), prompt, Counter(answer))
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer], dtype=torch.long), logits[None].clone())[0]
    torch.testing.assert_close(got, expected)
    assert torch.equal(logits, before)                                                # the model's logits are not written to


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2 ** 20), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0), st.data())
def test_presence_and_frequency_follow_the_api(size, seed, presence, frequency, data):
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence, and the prompt does not count."""
    counts = Counter(data.draw(st.lists(st.integers(0, size - 1), max_size=30)))
    logits = logits_of(size, 2.0, seed)
    got = penalise(logits, Sampling(presence_penalty=presence, frequency_penalty=frequency), list(range(size)), counts)
    for token_id, (mu, value) in enumerate(zip(logits.tolist(), got.tolist())):
        assert value == pytest.approx(mu - counts[token_id] * frequency - (counts[token_id] > 0) * presence, abs=1e-4)


def test_penalties_act_under_greedy_too():
    logits = torch.tensor([1.0, 3.0, 2.9, -5.0])
    assert choose(logits, Sampling(), generator_of(0, 0), [0], {}) == 1
    assert choose(logits, Sampling(repetition_penalty=1.5), generator_of(0, 0), [1], {}) == 2
    assert choose(logits, Sampling(presence_penalty=0.5), generator_of(0, 0), [1], {}) == 1
    assert choose(logits, Sampling(presence_penalty=0.5), generator_of(0, 0), [0], {1: 1}) == 2
    assert choose(logits, Sampling(frequency_penalty=0.5), generator_of(0, 0), [0], {1: 9, 2: 1}) == 2
    assert choose(logits, Sampling(frequency_penalty=-9.0), generator_of(0, 0), [0], {3: 1}) == 3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.data())
def test_what_would_repeat_is_what_transformers_bars(n, size, data):
    """After every token of a row, and whether a token stood in the prompt makes no difference. A copy goes its own way."""
    tokens = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=30))
    at = data.draw(st.integers(0, len(tokens)))
    ngrams = Ngrams(n, tokens[:at])
    copy, before = ngrams.copy(), set(ngrams.barred())
    for end in range(at, len(tokens) + 1):
        read = torch.tensor([tokens[:end]], dtype=torch.long)
        scores = transformers.NoRepeatNGramLogitsProcessor(n)(read, torch.zeros(1, size))[0]
        assert set(ngrams.barred()) == set(scores.isinf().nonzero().flatten().tolist())
        if end < len(tokens):
            ngrams.push(tokens[end])
    assert set(copy.barred()) == before


def test_a_token_costs_the_same_however_long_the_row_is():
    """Looking up reads one list of followers, and pushing keeps n-1 tokens."""
    ngrams = Ngrams(3, [i % 7 for i in range(5000)])
    assert len(ngrams.tail) == 2 and len(ngrams.followers) == 7 and len(ngrams.barred()) == 1
    off = Ngrams(0, range(100))
    off.push(3)
    assert (off.tail, off.followers, list(off.barred())) == ((), {}, [])


def test_barred_tokens_are_no_choice_until_nothing_else_is_left():
    logits = torch.tensor([3.0, 2.0, float("-inf"), 1.0])
    assert bar(logits, {0, 99, -1}).tolist() == [float("-inf"), 2.0, float("-inf"), 1.0]
    assert logits[0] == 3.0                                                           # the model's logits are not written to
    assert bar(logits, {0, 1, 3}) is logits and bar(logits, ()) is logits
    generator = generator_of(0, 0)
    for sampling in (Sampling(), Sampling(1.0)):
        assert {choose(logits, sampling, generator, [1], {}, [0, 3]) for _ in range(20)} == {1}
        assert choose(logits, sampling, generator, [1], {}, range(4)) in (0, 1, 3)
    assert choose(logits, Sampling(repetition_penalty=9.0), generator, [0], {}, [1]) == 3     # penalties first, then what is barred


@pytest.mark.parametrize(("setting", "plain"), [
    ({}, True), ({"temperature": 0.1}, False), ({"top_k": 5, "top_p": 0.5, "min_p": 0.3}, True), ({"repetition_penalty": 1.1}, False),
    ({"presence_penalty": -0.1}, False), ({"frequency_penalty": 1.0}, False), ({"no_repeat_ngram_size": 9}, False)], ids=str)
def test_what_is_plain_greedy(setting, plain):
    assert is_plain_greedy(Sampling(**setting)) == plain


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 300, "top_p": 0.9}], ids=str)
def test_a_vanishing_temperature_is_greedy(temperature, rest):
    logits = logits_of(400, 8.0, 3)
    likeliest = int(logits.argmax())
    logits[likeliest] += 1.0
    probabilities, ids = candidates(logits, Sampling(temperature, **rest))
    assert probabilities.isfinite().all()
    for seed in range(5):
        assert choose(logits, Sampling(temperature, **rest), generator_of(seed, 0), [0], {}) == likeliest


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=6), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1),
                                      Sampling(1.0, repetition_penalty=1.5, frequency_penalty=0.3)], ids=str)
def test_choices_follow_the_probabilities(sampling):
    """Pearson's chi-square over 4,000 draws stays within five standard deviations of its mean, and a wrong distribution would not."""
    logits, counts, n_draws = logits_of(14, 1.0, 7), {3: 2, 8: 1}, 4000
    probabilities, ids = candidates(penalise(logits, sampling, [1, 3], counts), sampling)
    expected = dense(probabilities, ids, 14)
    generator = generator_of(11, 0)
    seen = Counter(choose(logits, sampling, generator, [1, 3], counts) for _ in range(n_draws))
    assert set(seen) <= set(ids.tolist())

    def chi_square(distribution):
        return sum((seen[i] - n_draws * p) ** 2 / (n_draws * p) for i, p in enumerate(distribution.tolist()) if p > 0)

    freedom = int((expected > 0).sum()) - 1
    limit = freedom + 5 * math.sqrt(2 * freedom)
    assert chi_square(expected) < limit
    skewed = expected ** 1.25
    assert chi_square(skewed / skewed.sum()) > limit


def test_streams_of_random_numbers_do_not_meet():
    """Seeds far apart, seeds that agree in their low 32 bits, and answers of one request all draw different numbers."""
    pairs = [(seed, index) for seed in (0, 1, 2, -1, 7 + 2 ** 32, 7, 7 + 2 ** 40, 2 ** 63, 2 ** 64 + 1) for index in range(4)]
    draws = {pair: tuple(torch.rand(4, generator=generator_of(*pair)).tolist()) for pair in pairs}
    assert len(set(draws.values())) == len(pairs)
    assert all(tuple(torch.rand(4, generator=generator_of(*pair)).tolist()) == numbers for pair, numbers in draws.items())


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", nan), ("temperature", inf), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("top_p", nan),
    ("min_p", -0.1), ("min_p", 1.5), ("min_p", nan), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", nan),
    ("repetition_penalty", inf), ("presence_penalty", nan), ("presence_penalty", inf), ("frequency_penalty", nan), ("frequency_penalty", -inf)])
def test_settings_that_no_distribution_can_follow(name, value):
    with pytest.raises(RequestError) as refused:
        check(Sampling(**{name: value}))
    message = str(refused.value)
    assert name in message and str(value) in message and "expected" in message and "\n" not in message


def test_settings_at_their_limits_are_taken():
    for sampling in (Sampling(), Sampling(0.0, 0, 1.0, 0.0), Sampling(2.0, 10 ** 9, 1e-6, 1.0, 0.01, -2.0, 2.0, 10 ** 9, seed=-3)):
        check(sampling)
