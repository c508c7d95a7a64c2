"""Self-made text, tokenizers of a few hundred tokens, and bundles of a model that knows nothing: what the tests above the models share."""
from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from torch import nn

from hanok.bundle.bundle import Bundle, Generation
from hanok.models import catalog
from hanok.models.llama import LlamaConfig
from hanok.text.tokenizer import Tokenizer, train
from zoo import jitter

torch.set_num_threads(1)                     # tiny matrices: more threads only wait for each other
WORDS = "the house stands on a stone 한옥은 돌 위에 서 있다 and its roof looks at naïve clouds 🏠 while rain falls".split()
CONFIG = LlamaConfig(300, 32, 2, 4, 2, 64, 64, d_head=8)


def prose(n_words: int, seed: int = 0) -> str:
    """Sentences of a few words, some of several bytes a character, that a small model can learn something of."""
    draw, words, at = random.Random(seed), [], 0
    while len(words) < n_words:
        at = (at + 1) % len(WORDS) if draw.random() < 0.8 else draw.randrange(len(WORDS))
        words.append(WORDS[at] + (".\n" if draw.random() < 0.1 else ""))
    return " ".join(words)


def write_prose(folder: Path, n_files: int, n_words: int) -> Path:
    """Files of prose, each another."""
    for n in range(n_files):
        (folder / f"{n}.txt").write_text(prose(n_words, seed=n), encoding="utf-8")
    return folder


@cache
def tokenizer(kind: str = "bpe", vocab_size: int = 300) -> Tokenizer:
    return train(kind, [prose(400)], vocab_size)


def model(config=CONFIG, family: str = "llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return jitter(catalog.FAMILIES[family].build(config)).eval()


def bundle(config=CONFIG, family: str = "llama", *, words: Tokenizer | None = None, template: str | None = None, **generation) -> Bundle:
    """A model with random weights and a tokenizer of its size."""
    return Bundle(catalog.FAMILIES[family], config, model(config, family), words or tokenizer(), template, Generation(**generation))
