"""Self-made pairs (every word in capitals is the answer) and recipes of tiny rungs, for the tests of the ladder."""
from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from hanok.data.pairs import TextPair
from hanok.lab.ladder import RUNGS
from hanok.train.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "ladder"
WORDS = "the house stands on a stone and its roof looks at old clouds while rain falls over blue doors".split()
SMALL = {"d_model": 32, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "d_ff": 64, "d_embed": 32, "d_hidden": 32}


def some_pairs(n: int, n_files: int = 30) -> list[TextPair]:
    """Sentences of 2 to 12 words from so many files."""
    draw = random.Random(0)
    sources = [" ".join(draw.choices(WORDS, k=draw.choice((2, 4, 7, 12)))) for _ in range(n)]
    return [TextPair(source, source.upper(), f"f{i % n_files}") for i, source in enumerate(sources)]


def small_recipes() -> dict[str, Recipe]:
    """The ladder's own recipes with tiny sizes."""
    found = {}
    for name in RUNGS:
        told = read_recipe(RECIPES / f"{name}.toml")
        found[name] = replace(told, model=replace(told.model, sizes={key: SMALL.get(key, size) for key, size in told.model.sizes.items()}),
                              tokenizer=replace(told.tokenizer, vocab_size=300), data=replace(told.data, batch_tokens=512),
                              train=replace(told.train, warmup_steps=2))
    return found
