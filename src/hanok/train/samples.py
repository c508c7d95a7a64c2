"""What a model says while it learns: a decoder goes on from the prompt, an encoder-decoder answers it, an encoder fills its masks.

The same prompt and seed each time, so that two samples differ by what was learned between them; no random state of the training is touched.
"""
from __future__ import annotations

from typing import Any

import torch

from hanok.api import LoadedModel
from hanok.bundle.bundle import Bundle, check_tokenizer
from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.text.tokenizer import Tokenizer
from hanok.train.data_of_run import MASK, first_of


def sample(bundle: Bundle, prompt: str, max_new_tokens: int, *, temperature: float = 0.7, top_p: float = 0.9) -> str:
    """The model's answer to a prompt. For an encoder: the prompt, with the likeliest token in place of each mask."""
    if bundle.family.kind == "encoder":
        return filled(bundle, prompt)
    return LoadedModel(bundle).generate(prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p).text


@torch.no_grad()
def filled(bundle: Bundle, prompt: str) -> str:
    """The prompt with its masks filled, each by itself, whatever their spelling (MASK)."""
    words, model = check_tokenizer(bundle, "this run"), bundle.model
    ids = words.encode(prompt, parse_special=True, add_special=bundle.generation.add_special)
    mask = first_of(words, MASK)
    device = next(model.parameters()).device
    logits: Any = model(Batch(torch.tensor([ids], device=device)))[0]                  # (T,V)
    best = logits[:, :words.vocab_size].argmax(-1).tolist()
    return words.decode([guess if token == mask else token for token, guess in zip(ids, best)])


def check(prompt: str, tokenizer: Tokenizer, kind: str, max_seq_len: int) -> None:
    """ConfigError for a prompt that this model cannot be asked."""
    n = len(tokenizer.encode(prompt, parse_special=True))
    if not n:
        raise ConfigError("train.sample_every asks for samples, and train.sample_prompt is empty; give a prompt, or train.sample_every=0")
    mask = next((name for name in MASK if name in tokenizer.specials), MASK[0])
    if kind == "encoder" and mask not in prompt:
        raise ConfigError(f"train.sample_prompt {prompt!r} has no {mask}, which an encoder would fill; write one into it")
    if n >= max_seq_len:
        raise ConfigError(f"train.sample_prompt has {n} tokens, the model's context {max_seq_len}; shorten it")
