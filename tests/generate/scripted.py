"""A Generator that answers by rote: the smallest thing that `run` can drive, for tests of what happens around the model."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hanok.contracts import Chunk


class ScriptState:
    """What each row has read, and how many tokens its prompt had."""

    def __init__(self, rows: list[list[int]], prompts: list[int], capacity: int):
        self.rows, self.prompts, self.capacity = rows, prompts, capacity

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def select(self, rows: Sequence[int]) -> ScriptState:
        return ScriptState([list(self.rows[i]) for i in rows], [self.prompts[i] for i in rows], self.capacity)


class Scripted(nn.Module):
    """A prompt that begins with i is answered with `scripts[i]`, and then with token 0 for ever. Its hidden vectors are one-hot."""
    reads_source, max_positions = False, None

    def __init__(self, scripts: Sequence[Sequence[int]], vocab_size: int):
        super().__init__()
        self.scripts, self.vocab_size, self.anchor = scripts, vocab_size, nn.Parameter(torch.zeros(1))
        self.rows_read: list[int] = []                   # rows of each step
        self.tokens_read = 0

    def start(self, source, batch_size: int, capacity: int) -> ScriptState:
        return ScriptState([[] for _ in range(batch_size)], [0] * batch_size, capacity)

    def step(self, token_ids: Tensor, state: ScriptState, lengths: Sequence[int] | None = None) -> Tensor:
        lengths = lengths or [token_ids.size(1)] * token_ids.size(0)
        hidden = torch.zeros(*token_ids.shape, self.vocab_size)
        self.rows_read.append(token_ids.size(0))
        for b, (row, n) in enumerate(zip(token_ids.tolist(), lengths)):
            assert len(state.rows[b]) + n <= state.capacity
            state.prompts[b] = state.prompts[b] or n
            state.rows[b] += row[:n]
            self.tokens_read += n
            script, done = self.scripts[state.rows[b][0]], len(state.rows[b]) - state.prompts[b]
            hidden[b, n - 1, script[done] if done < len(script) else 0] = 1.0
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return 100.0 * hidden


def gathered(chunks: Iterable[tuple[int, Chunk]]) -> dict[tuple[int, int], tuple[str, tuple[int, ...], str | None]]:
    """(request, answer) -> (text, token ids, finish reason); nothing may follow an answer's last chunk."""
    answers: dict[tuple[int, int], tuple[str, tuple[int, ...], str | None]] = {}
    for number, chunk in chunks:
        text, ids, reason = answers.get((number, chunk.index), ("", (), None))
        assert reason is None
        answers[number, chunk.index] = text + chunk.text, ids + chunk.token_ids, chunk.finish_reason
    return answers


class Remembering(nn.Module):
    """Every beginning has a distribution of its own, drawn from the seed, or the one in `table` (answer so far -> probabilities; prompts of one
    token). Its hidden vectors are its logits, and its states only know `select`.
    """
    reads_source, max_positions = False, None

    def __init__(self, vocab_size: int, seed: int = 0, table: dict[tuple[int, ...], list[float]] | None = None):
        super().__init__()
        self.vocab_size, self.seed, self.table, self.anchor = vocab_size, seed, table, nn.Parameter(torch.zeros(1))

    def logits(self, token_ids: Sequence[int]) -> Tensor:                             # -> (V,)
        if self.table is not None:
            return torch.tensor(self.table[tuple(token_ids[1:])]).log()
        generator = torch.Generator().manual_seed(hash((self.seed, *token_ids)) % 2 ** 31)
        return 2 * torch.randn(self.vocab_size, generator=generator)

    def start(self, source, batch_size: int, capacity: int) -> ScriptState:
        return ScriptState([[] for _ in range(batch_size)], [0] * batch_size, capacity)

    def step(self, token_ids: Tensor, state: ScriptState, lengths: Sequence[int] | None = None) -> Tensor:
        lengths = lengths or [token_ids.size(1)] * token_ids.size(0)
        hidden = torch.zeros(*token_ids.shape, self.vocab_size)
        for b, (row, n) in enumerate(zip(token_ids.tolist(), lengths)):
            assert len(state.rows[b]) + n <= state.capacity
            state.rows[b] += row[:n]
            hidden[b, n - 1] = self.logits(state.rows[b])
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return hidden
