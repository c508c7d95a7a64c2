"""Embeddings of pairs and triples: which rows they read, where rows and documents begin, and what decoding remembers."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from hanok.nn.masks import span_after
from hanok.nn.ngram import NGramEmbedding, TokenCache, earlier_tokens
from hanok.nn.position import Position

V, D = 5, 3


def embedding(*rows):
    torch.manual_seed(0)
    return NGramEmbedding(nn.Embedding(V, D), Position(), rows)


def test_what_stands_before_ends_where_a_row_or_a_document_begins():
    ids, documents = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[7, 7, 8, 8]])
    assert [found.tolist() for found in earlier_tokens(ids, 2, V)] == [[[V, 1, 2, 3]], [[V, V, 1, 2]]]
    assert [found.tolist() for found in earlier_tokens(ids, 2, V, documents)] == [[[V, 1, V, 3]], [[V, V, V, V]]]


def test_a_table_with_room_gives_each_pair_a_row_of_its_own():
    embed = embedding(V * (V + 1))
    pairs = [(before, token) for before in range(V + 1) for token in range(V)]
    token_ids, before = (torch.tensor([[pair[i] for pair in pairs]]) for i in (1, 0))
    read = embed.with_grams(token_ids, [before], torch.arange(len(pairs))[None]) - embed.token(token_ids)
    rows = {tuple(row.tolist()) for row in embed.grams[0].weight.detach()}
    got = [tuple(round(x, 4) for x in row.tolist()) for row in read[0].detach()]
    assert len(set(got)) == len(pairs) == len(rows)


def test_hashed_grams_spread_over_their_table_and_stay_in_it():
    torch.manual_seed(0)
    embed = NGramEmbedding(nn.Embedding(300, 1), Position(), (400, 400))
    seen: list[torch.Tensor] = []
    embed.grams[1].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    embed(torch.randint(300, (40, 100)), torch.arange(100)[None])
    assert seen[0].min() >= 0 and seen[0].max() < 400
    counts = torch.bincount(seen[0].flatten(), minlength=400)
    assert (counts > 0).float().mean() > 0.98 and counts.max() < 40            # 10 a row on average


def test_every_gram_changes_the_vector():
    embed, ids = embedding(V * (V + 1), V * (V + 1) ** 2), torch.tensor([[0, 1, 2, 3]])
    base = embed(ids, torch.arange(4)[None])
    for place in range(4):
        other = ids.clone()
        other[0, place] = 4
        changed = (embed(other, torch.arange(4)[None]) != base).any(-1)[0].tolist()
        assert changed == [place <= i <= place + 2 for i in range(4)]


def cache(batch_size, capacity=6):
    return TokenCache(torch.zeros(1, 2, batch_size, 1, capacity, 2), [0] * batch_size, torch.zeros(batch_size, capacity, dtype=torch.long))


def put(state, token_ids, lengths=None):
    ids = torch.tensor(token_ids)
    span = span_after(state.lengths, ids.size(1), lengths, ids.device)
    state.write(span, ids)
    state.lengths = list(span.ends)
    return state.before(span, 2, V)


@pytest.mark.parametrize("counts", [None, [2, 1]])
def test_a_state_knows_the_tokens_before_a_step(counts):
    state = cache(2)
    put(state, [[1, 2], [3, 4]], counts)
    one, two = put(state, [[0], [0]])
    assert one.tolist() == [[2], [4 if counts is None else 3]] and two.tolist() == [[1], [3 if counts is None else V]]


def test_rows_are_chosen_joined_and_cut_with_their_tokens():
    state = cache(2)
    put(state, [[1, 2], [3, 4]])
    both = state.select([1, 1]).join(state.select([0]))
    both.truncate([1, 2, 2])
    one, _ = put(both, [[0], [0], [0]])
    assert one.tolist() == [[3], [4], [2]]
