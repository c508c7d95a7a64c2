"""One of several ranks, for the tests of training: `python ranks.py JOBS.json` does one job after the other, and rank 0 writes what came of them."""
from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hanok.config import from_dict, override, to_dict
from hanok.errors import HanokError
from hanok.train.distributed import Ranks, join
from hanok.train.pretrain import Pretraining, begin
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.resume import resume
from tiny import prose, write_prose

TRAIN = TrainRecipe(steps=20, micro_batch_size=8, optimizer="adamw", learning_rate=1e-2, warmup_steps=4, eval_every=9, eval_tokens=300,
                    checkpoint_every=5, seed=3)
SIZES = {"d_model": 32, "n_layers": 1, "dropout": 0.0}
HEADS = {**SIZES, "n_heads": 2, "d_ff": 64}
KINDS = {
    "qwen3": Recipe(ModelRecipe(sizes={**HEADS, "n_kv_heads": 1})),
    "gpt2": Recipe(ModelRecipe("gpt2", sizes=HEADS)),
    "lstm": Recipe(ModelRecipe("lstm", sizes=SIZES)),
    "bert": Recipe(ModelRecipe("bert", sizes=HEADS), TokenizerRecipe(kind="wordpiece")),
    "t5": Recipe(ModelRecipe("t5", sizes={**HEADS, "n_decoder_layers": 1}), TokenizerRecipe(n_sentinels=9)),
    "bahdanau": Recipe(ModelRecipe("bahdanau", sizes={**SIZES, "d_embed": 32, "d_hidden": 32}), data=DataRecipe(("pairs.tsv",))),
}


def write_text(folder: Path) -> Path:
    write_prose(folder, 3, 300)
    lines = prose(900, seed=9).replace(".\n", " ").split()
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(
        f"{' '.join(lines[i:i + 4 + i % 3])}\t{' '.join(reversed(lines[i:i + 4]))}\n" for i in range(0, 800, 4)), encoding="utf-8")
    return folder


def recipe_of(kind: str, text: Path, settings: list[str]) -> Recipe:
    told = KINDS[kind]
    source = str(text / "pairs.tsv" if told.data.sources else text)
    recipe = replace(told, tokenizer=replace(told.tokenizer, vocab_size=300), data=replace(told.data, sources=(source,), validation=0.2, seq_len=24),
                     train=TRAIN)
    return from_dict(Recipe, override(to_dict(recipe), settings))


class Poison:
    """A model whose hidden vectors are no numbers for one batch."""

    def __init__(self, made: Pretraining, number: int):
        self.made, self.hidden, self.number = made, made.trainer.hidden, number

    def __call__(self, batch) -> torch.Tensor:
        return self.hidden(batch) * (torch.nan if self.made.batches.latest[-1] == self.number else 1.0)


def do(job: dict[str, Any], text: Path, ranks: Ranks) -> dict[str, Any]:
    """A run, or a part of one: kind, out, settings; `resume` an old one; `stop` behind an update; a `die` behind one; `poison` a batch of a rank."""
    out, settings = Path(job["out"]), job.get("settings", [])
    made = resume(out, settings, ranks=ranks) if job.get("resume") else begin(recipe_of(job["kind"], text, settings), out, ranks=ranks)
    if job.get("poison", [None])[0] == ranks.rank:
        made.trainer.hidden = Poison(made, job["poison"][1])
    losses: list[float] = []

    def after(step) -> None:
        losses.append(step.loss)
        if job.get("die") == [ranks.rank, step.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.get("stop") == step.step:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        made.run(after)
    return {"losses": losses, "validation": made.validation and made.validation.loss, "rollbacks": ranks.gather(made.n_rollbacks),
            "parts": ranks.gather([made.part.micro_batch_size, made.part.grad_accum_steps]), "step": made.trainer.n_steps}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    told = json.loads(path.read_text())
    ranks = join()
    with ranks.together():
        results = {}
        for job in told["jobs"]:
            try:
                results[job["name"]] = do(job, Path(told["text"]), ranks)
            except HanokError as error:                                               # all ranks refuse alike
                results[job["name"]] = {"error": str(error)}
        if ranks.first:
            path.with_suffix(".results").write_text(json.dumps(results))
        ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
