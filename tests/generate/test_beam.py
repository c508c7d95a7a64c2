"""Beam search against `transformers` on the same weights, against a plain search that recomputes everything, and against all answers that exist."""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Remembering, Scripted, gathered
from test_run import counted, oracle, requests_for

from hanok.bundle.imports import import_folder
from hanok.contracts import Batch, Request, Sampling
from hanok.errors import RequestError
from hanok.generate.beam import search
from hanok.generate.run import check, run
from hanok.nn.lower import lower
from zoo import BY_NAME, CASES, V

some = pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5-1.1", "transformer"])


def beams_of(model, requests, **options):
    """(request, answer) -> (token ids, score, finish reason), in the order in which they were told."""
    return {(number, chunk.index): (chunk.token_ids, chunk.score, chunk.finish_reason) for number, chunk in run(model, requests, **options)}


def frequent(model, request, n):
    """Tokens that a model likes to write after a prompt: ends that beams will meet."""
    written = Counter(token_id for answer in search(model, replace(request, n_beams=4, n=4), 8) for token_id in answer.token_ids[1:])
    return tuple(token_id for token_id, _ in written.most_common(n))


# ---- the same as transformers

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Their model and ours with the same weights, made when they are asked for."""
    made = {}

    def pair(name):
        if name not in made:
            theirs, folder = BY_NAME[name].build_twin(), tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            theirs.generation_config.eos_token_id = theirs.generation_config.forced_eos_token_id = theirs.generation_config.bad_words_ids = None
            made[name] = theirs, import_folder(folder).model
        return made[name]
    return pair


def theirs_says(theirs, request):
    """What `generate` gives: (token ids, score) of each answer, best first."""
    read = torch.tensor([request.source_ids or request.token_ids])
    more = {"decoder_input_ids": torch.tensor([request.token_ids])} if request.source_ids else {}
    told = theirs.generate(
        read, attention_mask=torch.ones_like(read), num_beams=request.n_beams, num_return_sequences=request.n, length_penalty=request.length_penalty,
        max_new_tokens=request.max_new_tokens, min_new_tokens=request.min_new_tokens or None, do_sample=False, early_stopping=False,
        eos_token_id=list(request.stop_ids) or None, pad_token_id=V - 1, repetition_penalty=request.sampling.repetition_penalty,
        no_repeat_ngram_size=request.sampling.no_repeat_ngram_size, return_dict_in_generate=True, output_scores=True, **more)
    answers = []
    for row, score in zip(told.sequences.tolist(), told.sequences_scores.tolist()):
        written = row[len(request.token_ids):]
        end = next((i for i, token_id in enumerate(written) if token_id in request.stop_ids), len(written))
        answers.append((tuple(written[:end]), score))
    return answers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "t5-1.0", "t5-1.1", "transformer"])
@pytest.mark.parametrize(("options", "n_stops"), [
    ({"n_beams": 4, "n": 4}, 0), ({"n_beams": 3, "n": 2}, 2), ({"n_beams": 5, "n": 5, "length_penalty": 2.5}, 3),
    ({"n_beams": 4, "n": 4, "length_penalty": 0.0}, 3), ({"n_beams": 4, "n": 4, "length_penalty": -1.5, "min_new_tokens": 3}, 2),
    ({"n_beams": 3, "n": 3, "sampling": Sampling(no_repeat_ngram_size=2)}, 1),
    ({"n_beams": 3, "n": 3, "sampling": Sampling(repetition_penalty=1.4, no_repeat_ngram_size=1), "min_new_tokens": 2}, 2)], ids=str)
def test_beams_are_those_of_transformers(name, options, n_stops, pairs):
    theirs, ours = pairs(name)
    for request in requests_for(ours, 6, 1, max_new_tokens=10):
        request = replace(request, stop_ids=frequent(ours, request, n_stops), **options)
        expected, got = theirs_says(theirs, request), search(ours, request, 10)
        assert [answer.token_ids for answer in got] == [token_ids for token_ids, _ in expected]
        assert [answer.score for answer in got] == pytest.approx([score for _, score in expected], abs=1e-4, rel=1e-5)


# ---- the same as a search without a state

def plainly(model, request):
    """The same search in plain loops: every beginning is read anew at every step, and every token of the vocabulary is looked at."""
    sampling, n = request.sampling, request.sampling.no_repeat_ngram_size

    def log_probabilities(said):
        written = [*request.token_ids, *said]
        source = {"source_ids": torch.tensor([request.source_ids])} if request.source_ids else {}
        with torch.no_grad():
            scores = model(Batch(torch.tensor([written]), **source))[0, -1].log_softmax(-1).tolist()
        for token_id in set(written):
            scores[token_id] *= sampling.repetition_penalty                           # logarithms of probabilities are never above 0
        for token_id in set(said):
            scores[token_id] -= sampling.presence_penalty + sampling.frequency_penalty * said.count(token_id)
        for at in range(len(written) - n + 1 if n else 0):
            if written[at:at + n - 1] == written[len(written) - n + 1:]:
                scores[written[at + n - 1]] = -math.inf
        for token_id in request.stop_ids if len(said) < request.min_new_tokens else ():
            scores[token_id] = -math.inf
        return scores

    running, finished = [((), 0.0)], []
    for length in range(1, request.max_new_tokens + 1):
        grown = sorted((((*said, token_id), total + score) for said, total in running for token_id, score in enumerate(log_probabilities(said))),
                       key=lambda pair: -pair[1])
        ends = [said[-1] in request.stop_ids or length == request.max_new_tokens for said, _ in grown]
        finished += [(said, total / length ** request.length_penalty) for (said, total), end in zip(grown[:request.n_beams], ends) if end]
        finished = sorted(finished, key=lambda pair: -pair[1])[:request.n_beams]
        running = [pair for pair, end in zip(grown, ends) if not end][:request.n_beams]
        if not running or len(finished) == request.n_beams and running[0][1] / length ** request.length_penalty <= finished[-1][1]:
            break
    return [(said[:-1] if said[-1] in request.stop_ids else said, score) for said, score in finished[:request.n]]


@pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{"length_penalty": 1.5}, {"min_new_tokens": 3, "sampling": Sampling(
    repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, no_repeat_ngram_size=2)}], ids=["plain", "penalties"])
def test_beams_with_a_state_equal_full_recompute(case, options):
    model = case.build()
    request, = requests_for(model, 5, n_beams=3, n=3, max_new_tokens=6, **options)
    request = replace(request, stop_ids=frequent(model, request, 2))
    expected = plainly(model, request)
    for got in (search(model, request, 6), search(lower(model), request, 6)):
        assert [answer.token_ids for answer in got] == [said for said, _ in expected]
        assert [answer.score for answer in got] == pytest.approx([score for _, score in expected], abs=1e-4, rel=1e-5)


# ---- the best of all

def every_answer(model, request):
    """All answers that exist, with their scores, best first; two stop ids make two answers of the same words."""
    found = []
    for length in range(1, request.max_new_tokens + 1):
        for said in product(range(model.vocab_size), repeat=length):
            stopped = said[-1] in request.stop_ids
            if not set(said[:-1]) & set(request.stop_ids) and (stopped or length == request.max_new_tokens):
                total = sum(model.logits((*request.token_ids, *said[:i])).log_softmax(-1)[said[i]].item() for i in range(length))
                found.append((said[:-1] if stopped else said, "stop" if stopped else "length", total / length ** request.length_penalty))
    return sorted(found, key=lambda answer: -answer[2])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 2 ** 20), st.floats(-2, 3), st.integers(0, 2))
def test_as_many_beams_as_answers_find_the_best_of_all(vocab_size, length, seed, length_penalty, n_stops):
    model = Remembering(vocab_size, seed)
    n_beams = max(2, vocab_size ** length)
    request = Request([0, 1], n=n_beams, n_beams=n_beams, max_new_tokens=length, length_penalty=length_penalty, stop_ids=tuple(range(n_stops)))
    expected, got = every_answer(model, request), search(model, request, length)
    assert len(got) == len(expected) <= n_beams          # fewer than n only where fewer exist
    for answer, (_, _, score) in zip(got, expected):
        assert answer.score == pytest.approx(score, abs=1e-4, rel=1e-5)
        assert (answer.token_ids, answer.finish_reason) in {(said, why) for said, why, equal in expected if abs(equal - score) < 1e-4}


def test_beams_see_past_a_tempting_first_word():
    """Greedy takes 0.6 and then 0.34 at best; the better answer begins with 0.4 and goes on with certainty."""
    model = Remembering(3, table={(): [0.6, 0.4, 0.0], (0,): [0.33, 0.33, 0.34], (1,): [1.0, 0.0, 0.0]})
    request = Request([2], max_new_tokens=2)
    assert oracle_of(model, request) == (0, 2)
    best, second = search(model, replace(request, n_beams=2, n=2), 2)
    assert best.token_ids == (1, 0) and best.score == pytest.approx(math.log(0.4) / 2, abs=1e-5)
    assert second.token_ids == (0, 2) and second.score == pytest.approx(math.log(0.6 * 0.34) / 2, abs=1e-5)


def oracle_of(model, request):
    (_, ids, _), = gathered(run(model, [request])).values()
    return ids


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 2 ** 20), st.floats(-2, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
def test_one_beam_is_greedy(vocab_size, length, seed, length_penalty, n_stops, ngram, min_new_tokens):
    model = Remembering(vocab_size, seed)
    request = Request([0, 1, 0], max_new_tokens=length, length_penalty=length_penalty, min_new_tokens=min_new_tokens,
                      stop_ids=tuple(range(n_stops)), sampling=Sampling(no_repeat_ngram_size=ngram))
    (_, ids, reason), = gathered(run(model, [request])).values()
    answer, = search(model, request, length)
    assert (answer.token_ids, answer.finish_reason) == (ids, reason)


@some
def test_one_beam_of_a_real_model_is_the_oracles(name):
    model = BY_NAME[name].build()
    for request in requests_for(model, 5, 2, max_new_tokens=12):
        answer, = search(model, request, 12)
        assert answer.token_ids == oracle(model, request) and answer.finish_reason == "length"


# ---- as requests

@some
def test_neighbours_change_nothing_and_each_prompt_is_read_once(name):
    model = BY_NAME[name].build()
    requests = requests_for(model, 5, 2, 7, max_new_tokens=6)
    requests = [replace(requests[0], n_beams=3, n=2), replace(requests[1], n=2), replace(requests[2], n_beams=4)]
    with counted(model) as (read, _):
        together = beams_of(model, requests)
    assert list(together) == [(1, 0), (1, 1), (0, 0), (0, 1), (2, 0)]
    assert [shape for shape in read if shape[1] > 1] == [(1, n) for n in (2, 5, 7)]
    assert read.count((3, 1)) == 5 and read.count((4, 1)) == 5                        # all beams of a request in one batch, the last not read
    for number in (0, 2):
        alone = beams_of(model, [requests[number]])
        assert alone == {(0, index): together[number, index] for index in range(requests[number].n)}
        assert [score for _, score, _ in alone.values()] == sorted((score for _, score, _ in alone.values()), reverse=True)
    assert gathered(run(model, requests))[1, 0] == ("", oracle(model, requests[1]), "length")


def test_beams_ask_no_more_of_a_state_than_select():
    model = Scripted([[5, 6, 7, 8]], 12)
    answers = beams_of(model, [Request([0, 3], max_new_tokens=3, n_beams=2, n=2)])
    assert answers[0, 0][0] == (5, 6, 7) and answers[0, 0][1] == pytest.approx(0, abs=1e-6) and model.rows_read == [1, 2, 2]


def test_the_context_ends_beams_too():
    model = BY_NAME["llama"].build()
    request, = requests_for(model, 5, max_new_tokens=20, n_beams=2)
    (ids, score, reason), = beams_of(model, [request], max_seq_len=8).values()
    assert len(ids) == 3 and reason == "length"
    assert (ids, score) == beams_of(model, [replace(request, max_new_tokens=3)])[0, 0][:2]


def test_beams_that_have_nothing_else_to_say_say_it_again():
    """One word a sentence, and a vocabulary of two: what is barred is let in where nothing else is left."""
    model = Remembering(2, 3)
    answers = search(model, Request([0], max_new_tokens=4, n_beams=2, n=2, sampling=Sampling(no_repeat_ngram_size=1)), 4)
    assert [len(answer.token_ids) for answer in answers] == [4, 4] and all(math.isfinite(answer.score) for answer in answers)
    assert all(answer.token_ids[0] == 1 for answer in answers)


@pytest.mark.parametrize(("options", "told"), [
    ({"n_beams": 0}, "n_beams is 0; expected 1 (no beam search) or more"), ({"n_beams": -3}, "n_beams is -3"),
    ({"n_beams": 2.0}, "n_beams is 2.0; expected a whole number"), ({"n_beams": True}, "n_beams is True"),
    ({"n_beams": 2, "n": 3}, "n is 3 and n_beams 2; expected no more answers than beams"),
    ({"n_beams": 2, "sampling": Sampling(temperature=0.5)}, "temperature is 0.5 with 2 beams, and beams draw nothing; give one of them up"),
    ({"length_penalty": math.nan}, "length_penalty is nan; expected a number from -10 to 10 (0 = off)"), ({"length_penalty": math.inf}, "is inf"),
    ({"length_penalty": -math.inf}, "is -inf"), ({"length_penalty": 1e9}, "is 1000000000.0"), ({"length_penalty": "1"}, "is '1'; expected a number"),
    ({"sampling": Sampling(no_repeat_ngram_size=-1)}, "no_repeat_ngram_size is -1; expected 0 (off) or more"),
    ({"sampling": Sampling(no_repeat_ngram_size=2.5)}, "no_repeat_ngram_size is 2.5; expected a whole number"),
    ({"beyond_context": 1}, "beyond_context is 1; expected True or False")], ids=str)
def test_beams_that_cannot_be(options, told):
    with pytest.raises(RequestError) as refused:
        check(BY_NAME["llama"].build(), Request([1], **options), 64)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_beams_at_their_limits_are_taken():
    model = BY_NAME["llama"].build()
    huge = Sampling(1.0, no_repeat_ngram_size=10 ** 9)
    for options in ({"n_beams": 1, "n": 9}, {"n_beams": 9, "n": 9}, {"length_penalty": -10}, {"sampling": huge}):
        assert check(model, Request([1], **options), 64) == 63
    request, = requests_for(model, 3, n_beams=2 * V, n=2 * V, max_new_tokens=2, length_penalty=10)
    answers = search(model, request, 2)
    assert len({answer.token_ids for answer in answers}) == 2 * V                     # more beams than tokens
