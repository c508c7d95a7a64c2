"""Batches that go on from each other equal one long forward; the gradient stops between them, a document that begins, begins from nothing."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.train.carry import Carry, carries
from zoo import CASES, V

RECURRENT = [case for case in CASES if case.family in ("rnn", "lstm", "gru")]
everyone = pytest.mark.parametrize("case", RECURRENT, ids=lambda case: case.name)
IDS = torch.randint(V, (3, 23), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0] * 23, [0] * 5 + [1] * 3 + [2] * 15, [4] * 9 + [5] * 14])
CUTS = ((0, 5), (5, 6), (6, 8), (8, 9), (9, 20), (20, 23))


def read(carry: Carry, documents: torch.Tensor | None = None, cuts=CUTS, ids: torch.Tensor = IDS) -> torch.Tensor:
    return torch.cat([carry.hidden(Batch(ids[:, a:b], document_ids=None if documents is None else documents[:, a:b])) for a, b in cuts], 1)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and (got - expected).abs().max().item() < 1e-5


def test_the_zoo_has_all_three():
    assert {case.family for case in RECURRENT} == {"rnn", "lstm", "gru"}
    assert {case.family for case in CASES if carries(case.build())} == {"rnn", "lstm", "gru"}


@everyone
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "documents"])
def test_batch_after_batch_equals_one_long_forward(case, documents):
    model = case.build()
    close(read(Carry(model), documents), model.hidden(Batch(IDS, document_ids=documents)))
    fresh = torch.cat([model.hidden(Batch(IDS[:, a:b])) for a, b in CUTS], 1)
    assert (read(Carry(model)) - fresh).abs().max().item() > 0.05, "a state matters, or this tests nothing"


@everyone
def test_a_document_that_begins_knows_nothing(case):
    """Within a row, and at a batch's first token; a row whose document goes on remembers."""
    model = case.build()
    for documents in (DOCUMENTS, torch.arange(3)[:, None] * 9 + (torch.arange(23) >= 9)):
        hidden = read(Carry(model), documents)
        for row in range(3):
            for document in documents[row].unique():
                here = documents[row] == document
                close(hidden[row, here][None], model.hidden(Batch(IDS[row, here][None])))


@everyone
def test_the_gradient_stops_at_the_batch_border(case):
    """Only the second half's own tokens get any; with the first half's state given as a constant it is the same."""
    model = case.build()
    carry, embedding = Carry(model), model.embed.token.weight
    carry.hidden(Batch(torch.tensor([[3, 4, 5]])))
    carry.hidden(Batch(torch.tensor([[6, 7]]))).sum().backward()
    assert embedding.grad.abs().sum(1).nonzero().flatten().tolist() == [6, 7]
    assert all(not cell.requires_grad for cell in carry.cells)
    model.zero_grad()
    model.hidden(Batch(torch.tensor([[3, 4, 5, 6, 7]])))[:, 3:].sum().backward()
    assert embedding.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@everyone
def test_pads_leave_no_trace(case):
    """Rows of 4, 0 and 2 real tokens, in two documents, then on."""
    model = case.build()
    keep = torch.arange(4) < torch.tensor([4, 0, 2])[:, None]
    documents = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]])
    for known in (None, documents):
        carry = Carry(model)
        close(carry.hidden(Batch(IDS[:, :3], document_ids=None if known is None else known[:, :1].expand(3, 3))), model.hidden(Batch(IDS[:, :3])))
        carry.hidden(Batch(IDS[:, 3:7], keep=keep, document_ids=known))
        after = carry.hidden(Batch(IDS[:, 7:9], document_ids=None if known is None else known[:, -1:].expand(3, 2)))
        first = IDS[0, 5:9] if known is not None else IDS[0, :9]
        expected = [first, torch.cat([IDS[1, :3], IDS[1, 7:9]]), torch.cat([IDS[2, :5], IDS[2, 7:9]])]
        for row, tokens in enumerate(expected):
            close(after[row:row + 1], model.hidden(Batch(tokens[None]))[:, -2:])


@everyone
def test_a_saved_state_goes_on_to_the_bit(case):
    model = case.build()
    carry, resumed = Carry(model), Carry(model)
    assert carry.state() == {}
    read(carry, DOCUMENTS, CUTS[:3])
    saved = {name: tensor.clone() for name, tensor in carry.state().items()}
    resumed.restore(saved)
    assert torch.equal(read(carry, DOCUMENTS, CUTS[3:]), read(resumed, DOCUMENTS, CUTS[3:]))
    carry.restore({})
    close(read(carry, DOCUMENTS), read(Carry(model), DOCUMENTS))


@everyone
def test_each_part_of_an_update_has_a_memory_of_its_own(case):
    """Rows in 3 parts read as rows side by side, and are saved so: a saved state goes on however it is split."""
    model = case.build()
    whole, parts = Carry(model), Carry(model, 3)
    for a, b in CUTS:
        one = whole.hidden(Batch(IDS[:, a:b], document_ids=DOCUMENTS[:, a:b]))
        close(torch.cat([parts.hidden(Batch(IDS[row:row + 1, a:b], document_ids=DOCUMENTS[row:row + 1, a:b])) for row in range(3)]), one)
    assert parts.state().keys() == whole.state().keys()
    for name, tensor in parts.state().items():
        close(tensor.float(), whole.state()[name].float())
    again = Carry(model, 3)
    again.restore(whole.state())
    close(torch.cat([again.hidden(Batch(IDS[row:row + 1, :4], document_ids=DOCUMENTS[row:row + 1, -1:].expand(1, 4))) for row in range(3)]),
          whole.hidden(Batch(IDS[:, :4], document_ids=DOCUMENTS[:, -1:].expand(3, 4))))
    with pytest.raises(ConfigError, match=r"has 3 rows, which train.grad_accum_steps \(2\) does not divide"):
        Carry(model, 2).restore(whole.state())


def test_what_a_carry_refuses():
    case = RECURRENT[0]
    model = case.build()
    carry = Carry(model)
    read(carry)
    with pytest.raises(ConfigError, match="a batch of 2 rows cannot go on from a state of 3; keep train.micro_batch_size"):
        carry.hidden(Batch(IDS[:2]))
    other = catalog.FAMILIES[case.family].build(replace(case.config, d_model=case.config.d_model * 2))
    with pytest.raises(ConfigError, match=r"the saved recurrent state's cells/0 is \(\d+, 3, 32\); expected \(\d+, rows, 64\)"):
        Carry(other).restore(carry.state())
    with pytest.raises(ConfigError, match="cells/0 is missing"):
        carry.restore({"documents": torch.zeros(3)})
