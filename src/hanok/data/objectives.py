"""What a row of tokens is asked: `Rows` become a `Batch` with targets. An objective is a function of rows; its settings are keywords.

causal (the next token), masked (BERT, arXiv:1810.04805, 3.1), span_corruption and prefix (T5, arXiv:1910.10683, 3.1.4 and 3.2.3), and seq2seq, of
pairs. Chance is keyed by each row alone (see `Rows.keys`), so that neither batch size, neighbours, ranks nor a resumed run change it.
B rows, T positions, S source positions, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.spans import noise_spans
from hanok.errors import ConfigError


@dataclass(frozen=True)
class Rows:
    """Rows as they stand in a corpus, padded on the right."""
    token_ids: Tensor                                    # (B,T) int64; causal: (B,T+1), so that T of them can be asked for the next one
    document_ids: Tensor | None = None                   # as token_ids: the number of each token's document; None: one document a row
    keys: tuple[tuple[int, ...], ...] = ()               # one a row: (seed, epoch, the first token's place), what its random numbers follow from
    lengths: tuple[int, ...] | None = None               # real tokens of each row; None: all are

    def keep(self) -> Tensor | None:
        """(B,T) True = real token; None: all are."""
        return None if self.lengths is None else torch.arange(self.token_ids.size(1)) < torch.tensor(self.lengths)[:, None]

    def random(self, row: int) -> np.random.Generator:
        """The row's own random numbers (PCG64)."""
        return np.random.Generator(np.random.PCG64(self.keys[row]))

    def alone(self) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
        """Each row's real tokens, (T,) int64, and its random numbers."""
        for row, ids in enumerate(self.token_ids.numpy()):
            yield ids if self.lengths is None else ids[:self.lengths[row]], self.random(row)


Objective = Callable[[Rows], Batch]
Pair = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]
"""Source and target."""


def causal(rows: Rows, *, separate: bool = True) -> Batch:
    """Each position is asked for the next token: (B,T+1) -> (B,T). Padding is not marked: no real token stands behind a pad.

    `separate`: no document sees another. Positions restart with each, its number goes along for the mask, and nobody is asked for the first token of
    the next (the end-of-text token, a document's last, is asked for). Otherwise rows are packed plainly, and documents see those before them. Where
    no row holds two documents, neither numbers nor positions go along: they say nothing, and without them the kernel is the fast one.
    """
    inputs, targets, keep = rows.token_ids[:, :-1].contiguous(), rows.token_ids[:, 1:].contiguous(), rows.keep()
    if keep is not None:
        targets = targets.masked_fill(~keep[:, 1:], IGNORE_INDEX)
    if rows.document_ids is None or not separate:
        return Batch(inputs, targets=targets)
    documents = rows.document_ids[:, :-1].contiguous()
    targets = targets.masked_fill(documents != rows.document_ids[:, 1:], IGNORE_INDEX)
    return Batch(inputs, targets=targets, **apart(documents))


def apart(document_ids: Tensor | None) -> dict[str, Tensor]:
    """What a Batch tells of documents that share its rows; nothing where none do."""
    if document_ids is None or bool((document_ids == document_ids[:, :1]).all()):
        return {}
    return {"document_ids": document_ids, "positions": positions_in(document_ids)}


def positions_in(document_ids: Tensor) -> Tensor:
    """(B,T) -> (B,T): each token's place in its document, as far as the row holds it."""
    index = torch.arange(document_ids.size(1), device=document_ids.device).expand_as(document_ids)
    begins = torch.zeros_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


# ---- masked ------------------------------------------------------------------------------------------------
def masked(rows: Rows, *, mask_id: int, ordinary: np.ndarray, rate: float = 0.15, continues: np.ndarray | None = None,
           around: tuple[int, int] | None = None, separate: bool = True) -> Batch:
    """Some tokens are hidden and asked for: (B,T) -> (B,T), or (B,T+2) with `around`.

    Of a row's tokens `rate`, but at least one, are chosen; of these 80 % become `mask_id`, 10 % another token, 10 % stay. `ordinary` (V,): True =
    may be chosen, and drawn as another; special tokens are not. `continues` (V,): True = goes on with the word of the token before it; given, whole
    words are chosen. `around`: [CLS] and [SEP], which stand before and behind each row. `separate` as in `causal`.
    """
    keep = rows.keep()
    ids, targets = rows.token_ids.clone(), torch.full_like(rows.token_ids, IGNORE_INDEX)
    for row, (line, random) in enumerate(rows.alone()):
        starts = np.ones(len(line), bool)
        if continues is not None:
            starts[1:] = ~(continues[line[1:]] & ordinary[line[1:]] & ordinary[line[:-1]])
            if rows.document_ids is not None:
                document = rows.document_ids[row, :len(line)].numpy()
                starts[1:] |= document[1:] != document[:-1]
        chosen = torch.from_numpy(choose(starts.cumsum() - 1, ordinary[line], rate, random))
        lot = random.random(len(chosen))
        others = random.choice(np.flatnonzero(ordinary), len(chosen))
        targets[row, chosen] = ids[row, chosen]
        seen = np.where(lot < 0.8, mask_id, np.where(lot < 0.9, others, line[chosen]))
        ids[row, chosen] = torch.from_numpy(seen)
    documents = rows.document_ids if separate else None
    if around is not None:
        ids, targets, keep, documents = frame(ids, targets, keep, documents, around)
    return Batch(ids, keep=keep, targets=targets, **apart(documents))


def choose(word_of: np.ndarray, may: np.ndarray, rate: float, random: np.random.Generator) -> np.ndarray:
    """Places (n,) of `rate` of the tokens, rounded, at least one; words are taken whole, and left out where they would be too much."""
    n_words = int(word_of[-1]) + 1 if len(word_of) else 0
    sizes = np.bincount(word_of[may], minlength=n_words)
    left, taken = max(1, round(rate * int(may.sum()))), np.zeros(n_words, bool)
    for word in random.permutation(np.flatnonzero(sizes)):
        if sizes[word] <= left:
            taken[word] = True
            left -= sizes[word]
            if not left:
                break
    if not taken.any() and n_words and sizes.any():
        taken[np.where(sizes > 0, sizes, len(may) + 1).argmin()] = True               # every word is longer than what may be hidden
    return np.flatnonzero(taken[word_of] & may) if n_words else np.empty(0, np.int64)


def frame(ids: Tensor, targets: Tensor, keep: Tensor | None, documents: Tensor | None, around: tuple[int, int]):
    """[CLS] before each row and [SEP] behind its last real token; they belong to the documents beside them."""
    n_rows, n = ids.shape
    ends = torch.full((n_rows,), n) if keep is None else keep.sum(1)
    first, nothing = torch.full((n_rows, 1), around[0]), torch.full((n_rows, 1), IGNORE_INDEX)
    ids = torch.cat([first, ids, torch.zeros_like(first)], 1)
    ids[torch.arange(n_rows), ends + 1] = around[1]
    if documents is not None:
        documents = torch.cat([documents[:, :1], documents, documents[:, -1:]], 1)
    longer = None if keep is None else torch.arange(n + 2) < (ends + 2)[:, None]
    return ids, torch.cat([nothing, targets, nothing], 1), longer, documents


# ---- from a source to a target -----------------------------------------------------------------------------
def span_corruption(rows: Rows, *, sentinel_ids: Sequence[int], start_id: int, end_id: int, pad_id: int, source_end_id: int | None = None,
                    rate: float = 0.15, mean_span_length: float = 3.0) -> Batch:
    """Spans are cut out of each row, and the decoder writes them: (B,T) -> a source with sentinels in their places, a target with what they hide.

    The i-th span's sentinel is `sentinel_ids[i]` (T5's: from the highest id down). Counts are those of T5's random_spans_noise_mask; of a row of one
    token nothing is cut. ConfigError: more spans than sentinels.
    """
    pairs: list[Pair] = []
    for line, random in rows.alone():
        hidden = noise_spans(len(line), rate, mean_span_length, random)
        if len(hidden) > len(sentinel_ids):
            raise ConfigError(f"{len(line)} tokens are cut at {len(hidden)} places, and there are {len(sentinel_ids)} sentinel tokens; give shorter "
                              "rows (data.seq_len), a larger data.mean_span_length or a tokenizer with more of them")
        source: list[int] = []
        target: list[int] = []
        end = 0
        for sentinel, (start, stop) in zip(sentinel_ids, hidden):
            source += [*line[end:start].tolist(), sentinel]
            target += [sentinel, *line[start:stop].tolist()]
            end = stop
        pairs.append((source + line[end:].tolist(), target))
    return seq2seq(pairs, start_id=start_id, end_id=end_id, pad_id=pad_id, source_end_id=source_end_id)


def prefix(rows: Rows, *, start_id: int, end_id: int, pad_id: int, source_end_id: int | None = None) -> Batch:
    """Each row is cut at a random place; the decoder goes on from the source: (B,T) -> 1..T-1 tokens of it, and the rest."""
    pairs: list[Pair] = []
    for line, random in rows.alone():
        cut = int(random.integers(1, len(line))) if len(line) > 1 else 1
        pairs.append((line[:cut], line[cut:]))
    return seq2seq(pairs, start_id=start_id, end_id=end_id, pad_id=pad_id, source_end_id=source_end_id)


def seq2seq(pairs: Sequence[Pair], *, start_id: int, end_id: int, pad_id: int, source_end_id: int | None = None) -> Batch:
    """The decoder begins with `start_id`, is asked for the target and then for `end_id`: N pairs -> source (N,S), token_ids and targets (N,T).

    `source_end_id` stands behind each source, where it is given. All are padded on the right with `pad_id`, and nobody is asked for that.
    """
    behind = [] if source_end_id is None else [source_end_id]
    source_ids, source_keep = padded([[*source, *behind] for source, _ in pairs], pad_id)
    token_ids, keep = padded([[start_id, *target] for _, target in pairs], pad_id)
    targets, _ = padded([[*target, end_id] for _, target in pairs], IGNORE_INDEX)
    return Batch(token_ids, keep=keep, source_ids=source_ids, source_keep=source_keep, targets=targets)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """(B,T) int64, and which of them are real; None: all."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_id, np.int64)
    for row, values in enumerate(rows):
        ids[row, :len(values)] = values
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(ids), None if int(lengths.min()) == longest else torch.arange(longest) < lengths[:, None]
