"""llama.cpp on the GGUF files that we write: its logits are ours under the same tokens, its tokens are ours, its chat prompt too.

Its memory of keys and values is kept in fp32 and flash attention is off, so that nothing but the order of sums differs. GPT-2 differs by more:
llama.cpp looks its GELU up in a table of half precision.
"""
from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from hanok.bundle.bundle import Bundle, Generation, load_bundle
from hanok.bundle.gguf_out import export_gguf
from hanok.bundle.imports import import_gguf
from hanok.bundle.pull import pull
from hanok.contracts import Batch
from hanok.models import catalog
from hanok.models.gpt import GPTConfig
from hanok.models.llama import LlamaConfig, RopeScaling
from hanok.models.mistral import MistralConfig
from hanok.text.gguf_vocab import tokenizer_from_gguf
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer, train
from tiny import prose
from zoo import jitter

pytestmark = pytest.mark.conformance
TEXTS = {"English": "The frame of a house stands before its walls do, and outlives them. I'll say it's 1234 times so!\n\n  Twice.",
         "Korean": "기둥과 들보가 먼저 서고, 벽은 나중에 온다. 집은 사람보다 오래 산다.",
         "code": "def area(width: float, height: float) -> float:\n    return width * height  # m²\n\tif x[10] == {'a': 1}: pass\r\n",
         "emoji": "🏠🏡 naïve café 👩‍👩‍👧‍👦 ☂️ — 1️⃣2️⃣3️⃣ <|endoftext|> ½ ﷽ 　 end"}
SIZES = (320, 64, 2, 4)                                                              # widths are multiples of 32, so that Q8_0 takes them all
HEADS, D_FF, CONTEXT = 2, 128, 256
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
LINEAR = RopeScaling("linear", 4.0)


@dataclass(frozen=True)
class Case:
    family: str
    config: Any
    pre: str = "qwen2"
    n_tokens: int = 200
    tolerance: float = 1e-3


CASES = {
    "llama": Case("llama", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT, tie_embeddings=False), "smollm"),
    "llama-tied": Case("llama", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT, d_head=32), "llama-bpe"),
    "llama-llama3-rope": Case("llama", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT, d_head=32, rope_scaling=LLAMA3), "llama-bpe"),
    "llama-linear-rope": Case("llama", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT, rope_scaling=LINEAR)),
    "qwen3": Case("qwen3", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT, d_head=32, qk_norm=True)),
    "qwen2": Case("qwen2", LlamaConfig(*SIZES, HEADS, D_FF, CONTEXT)),
    "mistral": Case("mistral", MistralConfig(*SIZES, HEADS, D_FF, CONTEXT, window=64), n_tokens=64),
    "gpt2": Case("gpt2", GPTConfig(*SIZES, 256, CONTEXT), "gpt-2", tolerance=1e-2),
    "gpt2-untied": Case("gpt2", GPTConfig(*SIZES, 256, CONTEXT, tie_embeddings=False), "gpt-2", tolerance=1e-2),
}
WORDS = {name: train("bpe", [prose(400), *TEXTS.values()], 300, pre_tokenizer=name) for name in PRE_TOKENIZERS}


def made(case: Case) -> Bundle:
    """A model of this kind with weights that all matter."""
    torch.manual_seed(0)
    family = catalog.family(case.family)
    return Bundle(family, case.config, jitter(family.build(case.config)).eval(), WORDS[case.pre], None, Generation(stop_ids=(0,)))


def peer(path: Path, n_context: int = CONTEXT):
    llama_cpp = pytest.importorskip("llama_cpp", reason="`make conformance` compiles it")
    return llama_cpp.Llama(str(path), n_ctx=n_context, n_batch=n_context, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0,
                           flash_attn=False)


def theirs(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[:len(ids)]))


def ours(bundle: Bundle, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return bundle.model(Batch(torch.tensor([ids])))[0]


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """The mean of KL(p, q) over positions, in nats."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def ids_of(n: int) -> list[int]:
    return torch.randint(1, 300, (n,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("name", CASES)
def test_its_logits_on_our_file_are_ours(name, tmp_path):
    case = CASES[name]
    bundle, ids = made(case), ids_of(case.n_tokens)
    export_gguf(bundle, tmp_path / "x.gguf", "f32")
    expected = ours(bundle, ids)
    assert (theirs(peer(tmp_path / "x.gguf"), ids) - expected).abs().max() <= case.tolerance
    for kind, most in (("f16", 1e-4), ("q8_0", 1e-2)):
        export_gguf(bundle, tmp_path / f"{kind}.gguf", kind)
        assert divergence(expected, theirs(peer(tmp_path / f"{kind}.gguf"), ids)) <= most


@pytest.mark.parametrize("name", ["llama-llama3-rope", "llama-linear-rope"])
def test_scaling_matters_at_these_lengths(name, tmp_path):
    """The same weights without scaling are another model: what was compared above was not blind to it."""
    case = CASES[name]
    plain = Case(case.family, LlamaConfig(**{**vars(case.config), "rope_scaling": None}), case.pre)
    export_gguf(made(plain), tmp_path / "x.gguf", "f32")
    assert (theirs(peer(tmp_path / "x.gguf"), ids_of(200)) - ours(made(case), ids_of(200))).abs().max() > 0.05


def test_it_ignores_a_mistrals_window(tmp_path):
    """Why the file's context ends with the window: behind it llama.cpp computes a model without one."""
    case = CASES["mistral"]
    free = MistralConfig(**{**vars(case.config), "window": None})
    export_gguf(made(case), tmp_path / "x.gguf", "f32")
    llama, ids = peer(tmp_path / "x.gguf"), ids_of(200)
    assert llama.metadata["llama.context_length"] == "64"
    got = theirs(llama, ids)
    assert (got - ours(made(Case("mistral", free)), ids)).abs().max() <= 1e-3
    assert (got - ours(made(case), ids)).abs()[64:].max() > 0.05


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_its_tokens_are_ours(pre, text, tmp_path_factory):
    llama = peer(vocabulary(pre, tmp_path_factory))
    for special in (False, True):
        assert llama.tokenize(TEXTS[text].encode(), add_bos=False, special=special) == WORDS[pre].encode(TEXTS[text], parse_special=special)


def vocabulary(pre: str, tmp_path_factory) -> Path:
    folder = Path(tmp_path_factory.getbasetemp()) / "vocabularies"
    path = folder / f"{pre}.gguf"
    if not path.exists():
        export_gguf(made(Case("llama", LlamaConfig(320, 32, 1, 2, 1, 32, CONTEXT), pre)), path)
    return path


def pieces() -> Tokenizer:
    """A SentencePiece BPE as Llama 2's, read as from a GGUF file."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(400), *TEXTS.values()] * 2), model_writer=written, vocab_size=500, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(model.get_piece_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    told = {"model": "llama", "tokens": [model.id_to_piece(i) for i in ids], "scores": [model.get_score(i) for i in ids], "token_type": types,
            "bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "unknown_token_id": model.unk_id()}
    return tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in told.items()})


def test_its_sentencepiece_tokens_are_ours(tmp_path):
    words = pieces()
    bundle = made(Case("llama", LlamaConfig(512, 32, 1, 2, 1, 32, CONTEXT)))
    bundle.tokenizer = words
    export_gguf(bundle, tmp_path / "x.gguf")
    llama = peer(tmp_path / "x.gguf")
    for text in (*TEXTS.values(), " two  spaces ", "the house"):
        for ends in (False, True):
            assert llama.tokenize(text.encode(), add_bos=ends, special=False) == words.encode(text, add_special=ends)


# ---- a model that the world uses, exported again from what was pulled
@pytest.fixture(scope="module")
def smollm2() -> Bundle:
    return load_bundle(pull("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def smollm2_peer(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "f32.gguf"
    export_gguf(smollm2, path, "f32")
    return peer(path)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_has_our_tokens_and_logits(smollm2, smollm2_peer, text):
    ids = smollm2.tokenizer.encode(TEXTS[text])
    assert smollm2_peer.tokenize(TEXTS[text].encode(), add_bos=False) == ids
    assert (theirs(smollm2_peer, ids) - ours(smollm2, ids)).abs().max() <= 1e-3


def test_smollm2_in_8_bits_stays_near(smollm2, tmp_path):
    """Over all positions; most of it is llama.cpp's, which rounds activations to 8 bits too: the file's own rounding is told apart."""
    export_gguf(smollm2, tmp_path / "x.gguf", "q8_0")
    llama, rounded = peer(tmp_path / "x.gguf"), import_gguf(tmp_path / "x.gguf")
    rows = [smollm2.tokenizer.encode(text) for text in TEXTS.values()]
    expected = torch.cat([ours(smollm2, ids) for ids in rows])
    assert divergence(expected, torch.cat([theirs(llama, ids) for ids in rows])) <= 1e-2
    assert divergence(expected, torch.cat([ours(rounded, ids) for ids in rows])) <= 4e-3


def test_smollm2_keeps_its_end_and_its_template(smollm2, smollm2_peer):
    assert smollm2_peer.metadata["tokenizer.chat_template"] == smollm2.chat_template
    assert smollm2_peer.token_eos() == smollm2.generation.stop_ids[0]
