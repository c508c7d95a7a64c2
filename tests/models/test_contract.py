"""The contract suite: every family of the catalog, on tiny random models. The oracle is one row, unpadded, without a state.

B batch, T positions, V vocabulary. fp32: logits within 1e-4 of the oracle.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hanok.contracts import IGNORE_INDEX, Batch, Generator, State
from hanok.errors import RequestError
from hanok.generate.search import greedy, last, pad_rows
from hanok.models import catalog
from hanok.nn.loss import token_cross_entropy
from zoo import CASES, V

TOLERANCE = 1e-4
LENGTHS, CAPACITY = (5, 9, 2), 24
everyone = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
generators = pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=lambda case: case.name)
decoders = pytest.mark.parametrize("case", [case for case in CASES if case.generates and not case.reads_source], ids=lambda case: case.name)


def close(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    assert (got - expected).abs().max().item() <= tolerance


class Setting:
    """A model, three ragged rows with tails, their sources, and what the oracle says of them."""

    def __init__(self, case):
        self.model, self.case = case.build(), case
        torch.manual_seed(7)
        self.rows, tails = self.random_rows(*LENGTHS), self.random_rows(6, 6, 6)
        self.tails = torch.tensor(tails)
        self.sources, self.single = self.random_sources(7, 4, 11)
        self.token_ids, _ = pad_rows(self.rows)
        self.expected = [self.alone(row, source) for row, source in zip(self.rows, self.single)]
        self.longer = [self.alone(row + tail, source) for row, tail, source in zip(self.rows, tails, self.single)]

    def random_rows(self, *lengths):
        return [[0, *torch.randint(3, V - 2, (n - 1,)).tolist()] for n in lengths]

    def random_sources(self, *lengths):
        if not self.case.reads_source:
            return None, [None] * len(lengths)
        rows = self.random_rows(*lengths)
        token_ids, _ = pad_rows(rows)
        keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return Batch(token_ids, keep=keep), [Batch(torch.tensor([row])) for row in rows]

    def alone(self, row, source=None):                                                # (T,V)
        return self.model(batch_of(torch.tensor([row]), source))[0]

    def prefill(self):
        state = self.model.start(self.sources, 3, CAPACITY)
        self.model.step(self.token_ids, state, LENGTHS)
        return state

    def expect(self, state, token_ids, counts, done, which=(0, 1, 2)):
        """Steps `token_ids` and compares with the full recompute, row by row."""
        logits = self.model.head(self.model.step(token_ids, state, counts))
        for place, i in enumerate(which):
            n = token_ids.size(1) if counts is None else counts[place]
            at = LENGTHS[i] + done[place]
            if n:
                close(logits[place, :n], self.longer[i][at:at + n])


def batch_of(token_ids, source=None, **more):
    return Batch(token_ids, **more) if source is None else Batch(token_ids, source_ids=source.token_ids, source_keep=source.keep, **more)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@everyone
def test_forward_is_head_of_hidden(case):
    model = case.build()
    batch = batch_of(torch.randint(V, (2, 6)), Batch(torch.randint(V, (2, 5))) if case.reads_source else None)
    assert torch.equal(model(batch), model.head(model.hidden(batch)))
    assert model.hidden(batch).shape == (2, 6, case.config.d_model)
    assert isinstance(model, Generator) == case.generates


@everyone
def test_a_padded_row_equals_the_row_alone(case):
    setting = Setting(case)
    keep = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    batched = setting.model(batch_of(setting.token_ids, setting.sources, keep=keep))
    for i, n in enumerate(LENGTHS):
        close(batched[i, :n], setting.expected[i])


@generators
def test_a_ragged_prefill_equals_the_row_alone(case):
    setting = Setting(case)
    state = setting.model.start(setting.sources, 3, CAPACITY)
    assert isinstance(state, State)
    prefilled = setting.model.head(setting.model.step(setting.token_ids, state, LENGTHS))
    for i, n in enumerate(LENGTHS):
        close(prefilled[i, :n], setting.expected[i])
    assert state.lengths == list(LENGTHS)


@generators
def test_decoding_equals_full_recompute(case):
    setting = Setting(case)
    state = setting.prefill()
    for t in range(6):
        setting.expect(state, setting.tails[:, t:t + 1], None, [t] * 3)
    state = setting.prefill()
    setting.expect(state, setting.tails[:, :4], None, [0] * 3)
    setting.expect(state, setting.tails[:, 4:6], [2, 0, 1], [4] * 3)                  # a ragged chunk; one row waits


@generators
def test_even_decoding_equals_full_recompute(case):
    setting = Setting(case)
    state = setting.model.start(setting.sources, 3, CAPACITY)
    for t in range(2):
        logits = setting.model.head(setting.model.step(setting.token_ids[:, t:t + 1], state))
        for i in range(3):
            close(logits[i], setting.expected[i][t:t + 1])


@generators
def test_selected_rows_go_on_as_if_alone(case):
    setting = Setting(case)
    state = setting.prefill()
    setting.expect(state, setting.tails[:, :1], None, [0] * 3)
    picked = state.select([2, 0, 0])
    setting.expect(picked, setting.tails[[2, 0, 0], 1:3], None, [1] * 3, (2, 0, 0))
    setting.expect(state, setting.tails[:, 1:2], None, [1] * 3)                       # the old state did not move


@generators
def test_joined_rows_go_on_as_if_alone(case):
    setting = Setting(case)
    state = setting.prefill()
    setting.expect(state, setting.tails[:, :2], None, [0] * 3)
    new_rows = setting.random_rows(4, 3)
    new_sources, new_single = setting.random_sources(3, 13)
    ids, new_lengths = pad_rows(new_rows)
    arrival = setting.model.start(new_sources[:2] if isinstance(new_sources, list) else new_sources, 2, 16)
    setting.model.step(ids, arrival, new_lengths)
    joined = state.select([1]).join(arrival)
    logits = setting.model.head(setting.model.step(torch.cat([setting.tails[1:2, 2:4], setting.tails[:2, :2]]), joined))
    close(logits[0], setting.longer[1][LENGTHS[1] + 2:LENGTHS[1] + 4])
    for i in range(2):
        close(logits[1 + i], setting.alone(new_rows[i] + setting.tails[i, :2].tolist(), new_single[i])[-2:])


@pytest.mark.parametrize("case", [case for case in CASES if case.reads_source], ids=lambda case: case.name)
def test_a_source_without_pads_joins_one_with_pads(case):
    setting = Setting(case)
    first = setting.model.start(setting.single[0], 1, CAPACITY)
    setting.model.step(torch.tensor([setting.rows[0]]), first)
    joined = first.join(setting.prefill().select([1]))
    setting.expect(joined, setting.tails[[0, 1], :1], None, [0, 0], (0, 1))


@generators
def test_back_in_time(case):
    setting = Setting(case)
    state = setting.prefill()
    mark = state.snapshot()
    setting.model.step(torch.randint(3, V - 2, (3, 5)), state)
    state.restore(mark)
    setting.expect(state, setting.tails[:, :2], None, [0] * 3)
    before_draft, lengths = state.snapshot(), [n + 2 for n in LENGTHS]
    setting.model.step(torch.randint(3, V - 2, (3, 3)), state)                        # a draft; all of it is refused
    if case.forgets:
        state.truncate(lengths)
    else:
        state.restore(before_draft)
    state.truncate(lengths)                                                           # nothing more to forget
    setting.expect(state, setting.tails[:, 2:4], None, [2] * 3)
    state.restore(mark)
    assert state.lengths == list(LENGTHS)
    setting.expect(state, setting.tails[:, :6], None, [0] * 3)


@generators
def test_a_mark_of_another_state_is_stale(case):
    setting = Setting(case)
    state = setting.prefill()
    mark = state.snapshot()
    for other in (state.select([0, 1, 2]), setting.prefill()):
        with pytest.raises(RequestError) as stale:
            other.restore(mark)
        assert stale.value.kind == "stale"
        setting.expect(other, setting.tails[:, :1], None, [0] * 3)


@generators
def test_no_state_becomes_longer_by_truncation(case):
    state = Setting(case).prefill()
    with pytest.raises(RequestError):
        state.truncate([99, 1, 1])
    assert state.lengths == list(LENGTHS)


@pytest.mark.parametrize("case", [case for case in CASES if case.generates and case.forgets], ids=lambda case: case.name)
def test_what_was_truncated_away_cannot_be_restored(case):
    setting = Setting(case)
    state = setting.prefill()
    setting.model.step(setting.tails, state)
    mark = state.snapshot()
    state.truncate(list(LENGTHS))
    setting.model.step(setting.tails, state)
    with pytest.raises(RequestError) as stale:
        state.restore(mark)
    assert stale.value.kind == "stale"


@pytest.mark.parametrize("case", [case for case in CASES if case.generates and not case.forgets], ids=lambda case: case.name)
def test_what_is_mixed_into_a_cell_is_not_truncated(case):
    setting = Setting(case)
    state = setting.prefill()
    with pytest.raises(RequestError, match="take a snapshot before and restore it") as refused:
        state.truncate([n - 1 for n in LENGTHS])
    assert refused.value.kind == "unsupported" and "\n" not in str(refused.value)
    setting.expect(state, setting.tails[:, :2], None, [0] * 3)


@pytest.mark.parametrize("case", [case for case in CASES if case.generates and case.has_capacity], ids=lambda case: case.name)
def test_a_full_state_refuses_and_has_not_moved(case):
    setting = Setting(case)
    state = setting.prefill()
    setting.model.step(setting.tails, state)
    with pytest.raises(RequestError) as full:
        setting.model.step(torch.zeros(3, 10, dtype=torch.long), state)
    assert full.value.kind == "too_long" and "24" in str(full.value)
    assert state.lengths == [n + 6 for n in LENGTHS]                                  # a refused step has not happened


@generators
def test_a_step_that_raises_has_not_happened(case):
    setting = Setting(case)
    state = setting.prefill()
    with pytest.raises((IndexError, RuntimeError)):
        setting.model.step(torch.full((3, 2), V), state)                              # there is no such token
    assert state.lengths == list(LENGTHS)
    setting.expect(state, setting.tails[:, :2], None, [0] * 3)


@pytest.mark.parametrize("case", [case for case in CASES if not case.has_capacity], ids=lambda case: case.name)
def test_a_state_without_capacity_reads_on(case):
    setting = Setting(case)
    state = setting.model.start(setting.sources, 3, 1)
    setting.model.step(setting.token_ids, state, LENGTHS)
    setting.expect(state, setting.tails, None, [0] * 3)
    assert setting.model.max_positions is None


@generators
def test_greedy_in_a_ragged_batch_equals_one_row_at_a_time(case):
    setting = Setting(case)
    together = greedy(setting.model, setting.rows, 12, setting.sources)
    for row, source, written in zip(setting.rows, setting.single, together):
        assert greedy(setting.model, [row], 12, source)[0] == written


@decoders
def test_packed_documents_equal_each_alone(case):
    setting = Setting(case)
    positions = torch.tensor([[*range(5), *range(9), *range(2)]])
    document_ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2])
    packed = setting.model(Batch(torch.tensor([sum(setting.rows, [])]), positions=positions, document_ids=document_ids))
    close(packed[0], torch.cat(setting.expected))


@generators
def test_no_position_sees_the_future(case):
    """The gradient of position t's logits with respect to every later embedding is exactly zero, and to its own is not."""
    model, source = case.build(), Batch(torch.randint(V, (1, 5))) if case.reads_source else None
    seen = []
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    with torch.enable_grad():
        logits = model(batch_of(torch.randint(V, (1, 8)), source))
        handle.remove()
        for t in range(8):
            gradient, = torch.autograd.grad(logits[0, t].square().sum(), seen[-1], retain_graph=True)
            assert (gradient[0, t + 1:] == 0).all()
            assert (gradient[0, t] != 0).any()


@everyone
def test_the_loss_in_chunks_equals_the_loss(case):
    setting = Setting(case)
    keep = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    batch = batch_of(setting.token_ids, setting.sources, keep=keep)
    n_out = setting.model(batch).size(-1)
    targets = torch.where(keep, torch.randint(n_out, setting.token_ids.shape), IGNORE_INDEX)
    with torch.enable_grad():
        weights = [p for p in setting.model.parameters() if p.requires_grad]
        full = F.cross_entropy(setting.model(batch).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
        total, n_targets = token_cross_entropy(setting.model.hidden(batch), targets, setting.model.head, chunk_size=7)
        pairs = zip(torch.autograd.grad(full, weights, allow_unused=True), torch.autograd.grad(total / n_targets, weights, allow_unused=True))
    assert n_targets == sum(LENGTHS)
    close(total / n_targets, full, 1e-5)
    for expected, got in pairs:
        if expected is not None:
            close(got, expected, 2e-5)
    close(token_cross_entropy(setting.model.hidden(batch), targets, setting.model.head, chunk_size=4)[0], total, 1e-3)


@everyone
def test_overfits_one_batch(case):
    if case.name == "bert":
        pytest.skip("a BERT without heads says nothing that could be learned")
    torch.manual_seed(0)
    model = catalog.FAMILIES[case.family].build(case.config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    # All tokens differ: rotary attention over two equal tokens cannot tell the first from the second.
    batch = batch_of(torch.randperm(V)[:16].view(2, 8), Batch(torch.randint(3, V, (2, 6))) if case.reads_source else None)
    targets = torch.randint(3, V, (2, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(400):
            total, n_targets = token_cross_entropy(model.hidden(batch), targets, model.head)
            optimizer.zero_grad()
            (total / n_targets).backward()
            optimizer.step()
            if total / n_targets < 0.05:
                break
    assert total / n_targets < 0.1
    assert torch.equal(model(batch).argmax(-1), targets)


def test_every_family_of_the_catalog_is_here():
    assert {case.family for case in CASES} == set(catalog.FAMILIES)


def test_last_picks_each_rows_last_real_vector():
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(last(hidden, [2, 4]), torch.stack([hidden[0, 1], hidden[1, 3]]))


def test_learned_positions_end_where_the_table_ends():
    model = next(case for case in CASES if case.name == "gpt2").build()
    for ask in (lambda: model(Batch(torch.zeros(1, 65, dtype=torch.long))), lambda: model.start(None, 1, 65)):
        with pytest.raises(RequestError, match="65 tokens.* 64 positions") as refused:
            ask()
        assert refused.value.kind == "too_long"
