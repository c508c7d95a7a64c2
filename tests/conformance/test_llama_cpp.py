"""llama.cpp on the GGUF file that our bundle was made from: the same tokens, and the same distribution within what its own arithmetic leaves.

llama.cpp rounds activations to 8 bits before a Q4_1 product; we multiply the dequantised weights in fp32. So logits differ a little, by design.
"""
from __future__ import annotations

import numpy as np
import pytest
import torch

import hanok
from hanok.bundle.hub import fetch
from hanok.bundle.pull import pull
from hanok.contracts import Batch

pytestmark = pytest.mark.conformance
TEXTS = ["The frame of a house stands before its walls do, and outlives them.", "기둥과 들보가 먼저 서고, 벽은 나중에 온다. 🏠",
         "def area(width: float, height: float) -> float:\n    return width * height\n"]


@pytest.fixture(scope="module")
def peer():
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make conformance` compiles it")
    file = fetch("smollm2-135m-instruct").folder_or_file
    return llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, verbose=False, n_threads=2)


@pytest.fixture(scope="module")
def ours():
    return hanok.load(pull("smollm2-135m-instruct"))


@pytest.mark.parametrize("text", TEXTS, ids=["English", "Korean", "code"])
def test_tokens_and_distributions_agree(peer, ours, text):
    ids = ours.tokenizer.encode(text)
    assert peer.tokenize(text.encode(), add_bos=False) == ids
    peer.reset()
    peer.eval(ids)
    theirs = torch.from_numpy(np.array(peer.scores[:len(ids)])).log_softmax(-1)
    with torch.no_grad():
        mine = ours.model(Batch(torch.tensor([ids])))[0].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    assert divergence.mean() < 0.02
    assert (theirs.argmax(-1) == mine.argmax(-1)).float().mean() > 0.85


def test_the_chat_prompt_is_the_same(peer, ours):
    text = ours.template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert peer.tokenize(text.encode(), add_bos=False, special=True) == ours.template.encode(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
