"""`run` against the oracle, one request at a time: what shares a batch, a prefill or a seed changes nothing of an answer's tokens.

The hooks count what is really computed: a model's embedding runs once a step, and its head sees what it is asked for. B rows, T positions.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scripted import Scripted, gathered

from hanok.contracts import Batch, Request, Sampling
from hanok.errors import RequestError
from hanok.generate.run import check, may_pass, run
from hanok.generate.search import greedy
from hanok.nn.lower import lower
from zoo import BY_NAME, CASES, C, V

generators = pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=lambda case: case.name)
some = pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5-1.1"])
WARM = Sampling(temperature=2.0, top_p=0.95, seed=5)


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(3, V - 2, (n - 1,), generator=generator).tolist()] for n in lengths]


def requests_for(model, *lengths, **options):
    """Ragged prompts, and ragged sources where the model reads one."""
    sources = prompts(*range(3, 3 + 2 * len(lengths), 2), seed=1) if model.reads_source else [None] * len(lengths)
    return [Request(ids, source, **{"max_new_tokens": 6, **options}) for ids, source in zip(prompts(*lengths), sources)]


def ids_of(model, requests, **options):
    """(request, answer) -> token ids."""
    return {key: ids for key, (_, ids, _) in gathered(run(model, requests, **options)).items()}


def oracle(model, request, n_tokens=None):
    """The likeliest continuation, alone."""
    source = Batch(torch.tensor([request.source_ids])) if request.source_ids else None
    with torch.no_grad():
        return tuple(greedy(model, [request.token_ids], n_tokens or request.max_new_tokens, source)[0][len(request.token_ids):])


@contextmanager
def counted(model):
    """Shapes of what the embedding reads (one a step, and one of the source) and of what the head sees."""
    read, asked = [], []
    handles = [model.embed.register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape))),
               model.head.register_forward_hook(lambda module, args, out: asked.append(tuple(args[0].shape)))]
    try:
        yield read, asked
    finally:
        for handle in handles:
            handle.remove()


@generators
def test_ragged_requests_in_one_run_are_each_the_oracles(case):
    model = case.build()
    requests = [replace(request, max_new_tokens=n) for request, n in zip(requests_for(model, 5, 1, 9, 3), (6, 1, 9, 4))]
    answers = gathered(run(model, requests))
    assert set(answers) == {(i, 0) for i in range(4)}
    for i, request in enumerate(requests):
        assert answers[i, 0] == ("", oracle(model, request), "length")


@some
def test_a_lowered_model_writes_the_same(name):
    model = BY_NAME[name].build()
    requests = requests_for(model, 4, 7, sampling=WARM, n=2)
    assert ids_of(lower(model), requests) == ids_of(model, requests)


@some
def test_a_seed_is_a_text(name):
    model = BY_NAME[name].build()
    request, = requests_for(model, 4, sampling=WARM, max_new_tokens=12)
    first = ids_of(model, [request])
    assert ids_of(model, [request]) == first
    others = [ids_of(model, [replace(request, sampling=replace(WARM, seed=seed))]) for seed in (6, 5 + 2 ** 32, -5)]
    assert all(other != first for other in others)
    torch.manual_seed(99)
    torch.rand(7)
    assert ids_of(model, [request]) == first                                          # torch's own generator has no say
    assert torch.equal(torch.rand(3), (torch.manual_seed(99), torch.rand(7), torch.rand(3))[2])     # and is left alone


@some
def test_neighbours_and_n_change_nothing(name):
    model = BY_NAME[name].build()
    requests = requests_for(model, 5, 2, 8, sampling=WARM, max_new_tokens=10)
    requests = [replace(requests[0], n=3), requests[1], replace(requests[2], n=2, sampling=Sampling(), max_new_tokens=3)]
    together = ids_of(model, requests)
    assert set(together) == {(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)}
    assert len({together[0, i] for i in range(3)}) == 3                               # answers of one request differ
    for i, request in enumerate(requests):
        for n in range(1, request.n + 1):
            alone = ids_of(model, [replace(request, n=n)])
            assert alone == {(0, index): together[i, index] for index in range(n)}
    assert together[2, 0] == together[2, 1] == oracle(model, requests[2])
    backwards = ids_of(model, requests[::-1])
    assert all(backwards[2 - i, index] == ids for (i, index), ids in together.items())


@some
def test_a_prompt_is_read_once_for_all_its_answers(name):
    model = BY_NAME[name].build()
    requests = [replace(request, n=n, sampling=WARM) for request, n in zip(requests_for(model, 5, 9, max_new_tokens=4), (3, 2))]
    with counted(model) as (read, asked):
        answers = ids_of(model, requests)
    assert len(answers) == 5 and all(len(ids) == 4 for ids in answers.values())
    assert read == [(2, 9)] + [(5, 1)] * 3                                            # the last token is not read: nothing follows it
    assert [shape[:-1] for shape in asked] == [(5,)] * 4                              # one position a row, in prefill too


def test_a_source_is_read_once_for_all_its_answers():
    model = BY_NAME["transformer"].build()
    read = []
    model.encoder.embed.register_forward_hook(lambda module, args, out: read.append(tuple(args[0].shape)))
    ids_of(model, [replace(request, n=3, sampling=WARM) for request in requests_for(model, 2, 1)])
    assert read == [(2, 5)]


def test_a_row_that_ends_leaves_the_batch():
    model = BY_NAME["llama"].build()
    requests = [replace(request, max_new_tokens=n) for request, n in zip(requests_for(model, 4, 4, 4), (1, 5, 3))]
    with counted(model) as (read, asked):
        ids_of(model, requests)
    assert read == [(3, 4), (2, 1), (2, 1), (1, 1), (1, 1)]
    assert [shape[0] for shape in asked] == [3, 2, 2, 1, 1]


@some
def test_a_stop_id_ends_an_answer_and_is_no_part_of_it(name):
    model = BY_NAME[name].build()
    requests = requests_for(model, 5, 2, max_new_tokens=20)
    for i, request in enumerate(requests):
        text = oracle(model, request)
        stop = text[4]
        first = text.index(stop)
        stopped = [replace(r, stop_ids=(V - 1, stop)) if j == i else r for j, r in enumerate(requests)]
        answers = gathered(run(model, stopped))
        assert answers[i, 0] == ("", text[:first], "stop")
        assert answers[1 - i, 0] == ("", oracle(model, requests[1 - i]), "length")
        at_once = gathered(run(model, [replace(request, stop_ids=(text[0],))]))
        assert at_once == {(0, 0): ("", (), "stop")}                                  # an answer may be empty


@some
@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_no_stop_id_is_chosen_too_early(name, sampling):
    model = BY_NAME[name].build()
    request, = requests_for(model, 5, max_new_tokens=12, sampling=sampling)
    stop_ids = tuple(set(ids_of(model, [request])[0, 0]))                             # all that it would like to say
    (_, ids, reason), = gathered(run(model, [replace(request, min_new_tokens=7, stop_ids=stop_ids)])).values()
    assert len(ids) >= 7 and not set(ids) & set(stop_ids)
    assert (reason == "length") == (len(ids) == 12)
    (_, ids, reason), = gathered(run(model, [replace(request, min_new_tokens=99, stop_ids=stop_ids)])).values()
    assert len(ids) == 12 and reason == "length" and not set(ids) & set(stop_ids)
    if sampling == Sampling():
        written = list(request.token_ids)
        for _ in range(7):                                                            # the oracle: all logits anew, stop ids struck out
            with torch.no_grad():
                source = {"source_ids": torch.tensor([request.source_ids])} if request.source_ids else {}
                logits = model(Batch(torch.tensor([written]), **source))[0, -1]
            logits[list(stop_ids)] = float("-inf")
            written.append(int(logits.argmax()))
        assert list(ids[:7]) == written[-7:]


def test_stop_ids_that_the_model_does_not_have_do_no_harm():
    """A tokenizer may know more tokens than a model has rows; -1 is nobody's last token."""
    model = BY_NAME["llama"].build()
    request, = requests_for(model, 4)
    text = oracle(model, request)
    answers = gathered(run(model, [replace(request, stop_ids=(V + 5, -1), min_new_tokens=3)]))
    assert answers == {(0, 0): ("", text, "length")}
    final = Scripted([[V - 1, V - 1, 1]], V)
    assert ids_of(final, [Request([0], max_new_tokens=3, min_new_tokens=3, stop_ids=(-1,))]) == {(0, 0): (V - 1, V - 1, 1)}


@some
def test_the_context_ends_an_answer(name):
    model = BY_NAME[name].build()
    requests = requests_for(model, 5, 7, max_new_tokens=6)
    answers = gathered(run(model, requests, max_seq_len=8))
    for i, n_left in ((0, 3), (1, 1)):
        assert answers[i, 0] == ("", oracle(model, requests[i], n_left), "length")
    assert gathered(run(model, requests, max_seq_len=100)) == gathered(run(model, requests))


@some
def test_penalties_follow_each_answers_own_words(name):
    """Under greedy, against a full recompute of each token with the penalties written out."""
    model = BY_NAME[name].build()
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)
    requests = requests_for(model, 6, 3, sampling=sampling, max_new_tokens=8)
    answers = ids_of(model, requests)
    for i, request in enumerate(requests):
        written = list(request.token_ids)
        source = {"source_ids": torch.tensor([request.source_ids])} if request.source_ids else {}
        for _ in range(8):
            with torch.no_grad():
                logits = model(Batch(torch.tensor([written]), **source))[0, -1]
            said = written[len(request.token_ids):]
            for token_id in set(written):
                logits[token_id] *= 1.3 if logits[token_id] < 0 else 1 / 1.3
            for token_id in set(said):
                logits[token_id] -= 0.4 + 0.7 * said.count(token_id)
            written.append(int(logits.argmax()))
        assert list(answers[i, 0]) == written[-8:]


@generators
@pytest.mark.parametrize(("n", "sampling"), [(1, Sampling()), (2, Sampling()), (2, Sampling(repetition_penalty=1.3)), (3, WARM)], ids=str)
def test_no_ngram_comes_twice(case, n, sampling):
    """In prompt and answer together; under greedy, against a full recompute of each token that looks at all windows."""
    model, sampling = case.build(), replace(sampling, no_repeat_ngram_size=n)
    requests = requests_for(model, 6, 3, sampling=sampling, max_new_tokens=12, n=2)
    answers = ids_of(model, requests)
    for (i, _), ids in answers.items():
        written = [*requests[i].token_ids, *ids]
        begin = max(len(requests[i].token_ids) - n + 1, 0)
        grams = [tuple(written[at:at + n]) for at in range(len(written) - n + 1)]
        assert not [gram for at, gram in enumerate(grams) if at >= begin and gram in grams[:at]]
    if sampling.temperature == 0:
        request, written = requests[0], list(requests[0].token_ids)
        source = {"source_ids": torch.tensor([request.source_ids])} if request.source_ids else {}
        for _ in range(12):
            with torch.no_grad():
                logits = model(Batch(torch.tensor([written]), **source))[0, -1]
            for token_id in set(written) if sampling.repetition_penalty != 1 else ():
                logits[token_id] *= 1.3 if logits[token_id] < 0 else 1 / 1.3
            for at in range(len(written) - n + 1):
                if written[at:at + n - 1] == written[len(written) - n + 1:]:
                    logits[written[at + n - 1]] = float("-inf")
            written.append(int(logits.argmax()))
        assert list(answers[0, 0]) == list(answers[0, 1]) == written[-12:]


@pytest.mark.parametrize("case", [case for case in CASES if case.generates and case.build().max_positions is None], ids=lambda case: case.name)
def test_an_answer_may_go_beyond_the_context(case):
    """Positions that follow from a formula, or that nobody counts, do not end: what is written there is the oracle's."""
    model = case.build()
    requests = requests_for(model, 5, 3, max_new_tokens=C + 6)
    inside = gathered(run(model, requests, max_seq_len=8))
    beyond = gathered(run(model, [replace(requests[0], beyond_context=True), requests[1]], max_seq_len=8))
    assert beyond[0, 0] == ("", oracle(model, requests[0]), "length") and len(beyond[0, 0][1]) == C + 6
    assert beyond[1, 0] == inside[1, 0] and len(inside[1, 0][1]) == 5                 # its neighbour did not ask for it
    assert check(model, replace(requests[0], beyond_context=True), 4) == C + 6        # nor need the prompt end there
    if model.reads_source:
        long = replace(requests[0], source_ids=[3, 4, 5] * 9, max_new_tokens=4)
        with pytest.raises(RequestError, match="the source has 27 tokens, the model's context 8"):
            check(model, long, 8)
        assert ids_of(model, [replace(long, beyond_context=True)], max_seq_len=8) == {(0, 0): oracle(model, long)}
    beams = replace(requests[0], beyond_context=True, n_beams=2, max_new_tokens=9)
    assert len(ids_of(model, [beams], max_seq_len=8)[0, 0]) == 9


def test_learned_positions_are_all_there_are():
    model = BY_NAME["gpt2"].build()
    request, = requests_for(model, 5, max_new_tokens=C, beyond_context=True)
    with pytest.raises(RequestError) as refused:
        check(model, request, C)
    assert str(refused.value) == ("the prompt's 5 and 64 new tokens are beyond the 64 positions that this model learned, and no more exist; ask for "
                                  "fewer, or leave beyond_context out")
    assert refused.value.kind == "too_long"
    fits = replace(request, max_new_tokens=C - 5)
    assert ids_of(model, [fits], max_seq_len=C) == {(0, 0): oracle(model, fits)}


def test_whether_an_answer_may_pass_the_context():
    short = Request([1] * 5, max_new_tokens=3)
    assert not may_pass(short, 7) and not may_pass(replace(short, beyond_context=True), None)
    assert [may_pass(replace(short, beyond_context=True), n) for n in (7, 8)] == [True, False]
    assert may_pass(Request([1], [2] * 9, max_new_tokens=1, beyond_context=True), 8)


@pytest.mark.parametrize("max_new_tokens", [10 ** 14, 10 ** 17, 10 ** 20])
def test_more_than_memory_holds_is_told(max_new_tokens):
    model = BY_NAME["llama"].build()
    with pytest.raises(RequestError) as refused:
        next(run(model, [Request([1], max_new_tokens=max_new_tokens, beyond_context=True)], max_seq_len=C))
    assert str(refused.value) == f"a state of 1 x {max_new_tokens + 1} tokens does not fit into memory; ask for fewer new tokens"


def test_nothing_asked_nothing_said():
    model = BY_NAME["llama"].build()
    assert list(run(model, [])) == []


LLAMA, T5 = BY_NAME["llama"], BY_NAME["t5-1.0"]


@pytest.mark.parametrize(("case", "request_", "words"), [
    (LLAMA, Request([]), ["prompt is empty"]),
    (T5, Request([0]), ["source"]),
    (T5, Request([0], []), ["source"]),
    (T5, Request([], [1, 2]), ["prompt is empty"]),
    (LLAMA, Request([1] * 16), ["prompt", "16 tokens", "context 16", "at least 1"]),
    (LLAMA, Request([1] * 30), ["prompt", "30 tokens", "context 16", "at least 15"]),
    (T5, Request([0], [1] * 17), ["source", "17 tokens", "context 16", "at least 1"]),
    (T5, Request([0], [1] * 40), ["source", "40 tokens", "context 16", "at least 24"]),
    (LLAMA, Request([1], n=0), ["n is 0"]),
    (LLAMA, Request([1], max_new_tokens=0), ["max_new_tokens 0"]),
    (LLAMA, Request([1], sampling=Sampling(temperature=-1.0)), ["temperature is -1.0"]),
    (LLAMA, Request([1], sampling=Sampling(1.0, top_p=0.0)), ["top_p is 0.0"]),
    (LLAMA, Request([1], sampling=Sampling(1.0, presence_penalty=float("nan"))), ["presence_penalty is nan"]),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_what_cannot_be_served_is_refused_before_anything_is_computed(case, request_, words):
    model = case.build()
    good = requests_for(model, 3)[0]
    with counted(model) as (read, asked), pytest.raises(RequestError) as refused:
        next(run(model, [good, request_], max_seq_len=16))
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message
    assert refused.value.kind == ("too_long" if "context 16" in words else "invalid")
    assert not read and not asked


def test_the_shortening_that_a_message_asks_for_is_enough():
    llama, t5 = LLAMA.build(), T5.build()
    assert check(llama, Request([1] * 15), 16) == 1
    assert check(t5, Request([0], [1] * 16, max_new_tokens=4), 16) == 4
    assert check(llama, Request([1] * 10 ** 5, max_new_tokens=4), None) == 4


def test_inference_mode_does_not_leak_to_who_listens():
    """Between chunks the caller may train, and what it makes is no inference tensor."""
    model, learner = BY_NAME["qwen3"].build(), torch.nn.Linear(2, 1)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    n_chunks = 0
    for _ in run(model, requests_for(model, 3, 5, sampling=WARM, n=2)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        learner(torch.ones(1, 2)).sum().backward()
        n_chunks += 1
    assert n_chunks == 4 * 6 and not torch.is_inference_mode_enabled()
    with torch.no_grad():
        for _ in run(model, requests_for(model, 3)):
            assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_who_leaves_early_stops_the_work():
    model = BY_NAME["llama"].build()
    with counted(model) as (read, _):
        answers = run(model, requests_for(model, 3, max_new_tokens=50))
        assert not read                                                               # nothing is done before it is asked for
        next(answers), next(answers)
        assert len(read) == 2
        answers.close()
        assert len(read) == 2 and not torch.is_inference_mode_enabled()
        assert list(answers) == []
    assert not model.embed._forward_hooks


def test_two_runs_may_take_turns():
    """Nothing is kept on the model, so that one answer can be written while another is."""
    model = BY_NAME["qwen3"].build()
    first, second = requests_for(model, 5, 3, max_new_tokens=8)
    streams = [run(model, [first]), run(model, [second])]
    written = [[], []]
    for _ in range(8):
        for stream, ids in zip(streams, written):
            ids += next(stream)[1].token_ids
    assert [tuple(ids) for ids in written] == [oracle(model, first), oracle(model, second)]


def test_run_asks_no_more_of_a_model_than_the_contract():
    model = Scripted([[5, 6, 7, 8], [9, 9]], 12)
    requests = [Request([0, 3], max_new_tokens=4, n=2), Request([1], max_new_tokens=9, stop_ids=(0,))]
    twice = ("", (5, 6, 7, 8), "length")
    assert gathered(run(model, requests)) == {(0, 0): twice, (0, 1): twice, (1, 0): ("", (9, 9), "stop")}
    assert model.rows_read == [2, 3, 3, 2]
    assert model.tokens_read == 3 + 3 + 3 + 2
