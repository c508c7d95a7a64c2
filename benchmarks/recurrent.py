"""Recurrent models on this CPU: training an LSTM and a GRU against a bare loop of torch.nn's parts, and Bahdanau's decoding at 16 rows against 1.

    python benchmarks/recurrent.py [--repeats 7] [--threads 2] [--d-model 512] [--preset rnnsearch-50]
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import nn

from common import alternate, seconds
from hanok.contracts import Batch, Request
from hanok.generate.run import run
from hanok.models import catalog
from hanok.models.rnn import RNNConfig
from hanok.nn.lower import lower
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer

VOCAB, N_LAYERS, N_ROWS, SEQ_LEN, N_STEPS = 8192, 2, 16, 64, 3
N_SOURCE, N_NEW = 20, 32
BARE = {"lstm": nn.LSTM, "gru": nn.GRU}


class Bare(nn.Module):
    """An embedding, torch's layers and a head."""

    def __init__(self, name: str, d_model: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, d_model), nn.Linear(d_model, VOCAB)
        self.layers = BARE[name](d_model, d_model, N_LAYERS, batch_first=True)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(token_ids))[0])


def bare_steps(name: str, d_model: int, batches: Iterator[Batch]) -> Callable[[], None]:
    """The loop that anybody would write."""
    model = Bare(name, d_model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def work() -> None:
        for _ in range(N_STEPS):
            batch = next(batches)
            loss = F.cross_entropy(model(batch.token_ids).flatten(0, 1), batch.targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return work


def our_steps(name: str, d_model: int, batches: Iterator[Batch]) -> Callable[[], None]:
    """hanok's trainer: its loss in chunks, its clipping, its schedule."""
    model = catalog.family(name).build(RNNConfig(VOCAB, d_model, N_LAYERS, SEQ_LEN)).train()
    recipe = TrainRecipe(steps=10 ** 6)
    trainer = Trainer(model, optimizers(model, recipe), batches, recipe, vocab_size=VOCAB)

    def work() -> None:
        for _ in range(N_STEPS):
            trainer.step()

    return work


def training(name: str, d_model: int, repeats: int) -> None:
    ids = torch.randint(VOCAB, (8, N_ROWS, SEQ_LEN + 1))
    batches = [Batch(rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous()) for rows in ids]
    ours, theirs = our_steps(name, d_model, cycle(batches)), bare_steps(name, d_model, cycle(batches))
    ours(), theirs()

    def rate(work: Callable[[], None]) -> float:
        return N_STEPS * N_ROWS * SEQ_LEN / seconds(work)

    print(alternate(f"train, {name} {N_LAYERS} x {d_model}", "tokens/s", lambda: rate(ours), lambda: rate(theirs), repeats).line(0.9), flush=True)


def decoding(preset: str, repeats: int) -> None:
    """Both sides are ours; the ratio is what a batch is worth."""
    config = catalog.preset("bahdanau", preset)
    plain = catalog.family("bahdanau").build(config)
    models = {n_rows: lower(plain, n_rows) for n_rows in (1, 16)}                     # each laid out for its rows

    def rate(n_rows: int) -> float:
        def time_of(n_new: int) -> float:
            sources = torch.randint(3, config.vocab_size, (n_rows, N_SOURCE)).tolist()
            requests = [Request([0], source, max_new_tokens=n_new) for source in sources]
            return seconds(lambda: list(run(models[n_rows], requests)))

        return n_rows * N_NEW / (time_of(N_NEW + 1) - time_of(1))

    rate(1), rate(16)
    print(alternate(f"decode, {preset}, 16 rows to 1", "tokens/s", lambda: rate(16), lambda: rate(1), repeats).line(8.0), flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--d-model", type=int, default=512)
    arguments.add_argument("--preset", default="rnnsearch-50")
    told = arguments.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    print(f"recurrent models in fp32, {told.threads} threads, torch {torch.__version__}", flush=True)
    for name in BARE:
        training(name, told.d_model, told.repeats)
    decoding(told.preset, told.repeats)


if __name__ == "__main__":
    main()
