"""What each position is asked, written out token by token."""
from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.objectives import Rows, causal, masked
from hanok.nn.masks import Causal, Documents, frame_of, span_of
from hanok.nn.position import Position


def test_plain_packing_asks_for_the_next_token():
    ids = torch.arange(12).reshape(2, 6)
    for batch in (causal(Rows(ids)), causal(Rows(ids, None)), causal(Rows(ids, torch.zeros_like(ids)), separate=False)):
        assert batch.token_ids.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
        assert batch.targets.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]
        assert batch.positions is None and batch.document_ids is None and batch.keep is None


def test_separate_documents_by_hand():
    batch = causal(Rows(torch.tensor([[10, 11, 99, 20, 99, 30, 31]]), torch.tensor([[4, 4, 4, 5, 5, 6, 6]])))
    x = IGNORE_INDEX
    assert batch.token_ids.tolist() == [[10, 11, 99, 20, 99, 30]]
    assert batch.targets.tolist() == [[11, 99, x, 99, x, 31]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.document_ids.tolist() == [[4, 4, 4, 5, 5, 6]]
    values = (batch.token_ids, batch.targets, batch.positions, batch.document_ids)
    assert all(value.dtype == torch.int64 and value.is_contiguous() for value in values)


@given(st.lists(st.lists(st.integers(1, 4), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 8))
def test_no_target_crosses_a_boundary(lengths, n_positions):
    rows = [[number for number, length in enumerate(row) for _ in range(length)][:n_positions + 1] for row in lengths]
    documents = torch.tensor(rows)
    ids = torch.arange(documents.numel()).reshape(documents.shape)
    batch = causal(Rows(ids, documents))
    crosses = any(row[0] != row[n_positions - 1] for row in rows)
    assert (batch.document_ids is not None) == (batch.positions is not None) == crosses
    for b, row in enumerate(rows):
        for t in range(n_positions):
            assert batch.targets[b, t] == (ids[b, t + 1] if row[t] == row[t + 1] else IGNORE_INDEX)
            assert not crosses or batch.positions[b, t] == t - row.index(row[t])
    assert not crosses or torch.equal(batch.document_ids, documents[:, :-1])


def test_a_batch_without_borders_keeps_the_fast_kernel():
    """The next document's first token, which nobody is asked for, is no border; nor are other rows' documents."""
    position, span = Position(), span_of(Batch(torch.zeros(2, 4, dtype=torch.long)))
    ids, documents = torch.arange(10).reshape(2, 5), torch.tensor([[0] * 5, [1] * 4 + [2]])
    batch = causal(Rows(ids, documents))
    assert batch.document_ids is None and batch.positions is None and batch.targets[1].tolist() == [6, 7, 8, IGNORE_INDEX]
    rules = (Causal(), *([Documents(batch.document_ids)] if batch.document_ids is not None else []))
    assert frame_of(position, span, rules).is_causal
    keys = ((0, 0, 0), (0, 0, 5))
    hidden = masked(Rows(ids, torch.tensor([[0] * 5, [1] * 5]), keys), mask_id=11, ordinary=np.arange(12) < 10, around=(10, 11))
    assert hidden.document_ids is None and hidden.positions is None and hidden.keep is None
