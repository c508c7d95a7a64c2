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
    reads_source = False

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
