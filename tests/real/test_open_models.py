"""Real weights from the package index, against `transformers` on the same weights: SmolLM2 scores text alike, MiniLM embeds alike, GGUF reads right.

Skipped, and said, where no package index is reached and nothing was fetched before.
"""
from __future__ import annotations

import base64
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers

import hanok
from hanok import runtime
from hanok.api import LoadedModel
from hanok.bundle.hub import fetch
from hanok.bundle.imports import export_folder, read_tokenizer
from hanok.bundle.pull import pull
from hanok.errors import HubError

pytestmark = pytest.mark.index
TEXTS = {
    "English": "The first house had no walls. Posts stood on stones, beams lay on posts, and between them the wind went where it liked, "
               "until somebody hung paper in the frames and called what was inside a room. Which of them is the house?",
    "Korean": "처음의 집에는 벽이 없었다. 돌 위에 기둥이 서고 기둥 위에 들보가 놓였으며, 그 사이로 바람이 마음대로 드나들었다. "
              "누군가 문틀에 종이를 바르고 나서야 사람들은 그 안을 방이라고 불렀다.",
    "code": "def rotate(x, cos, sin):\n    half = x.shape[-1] // 2\n    a, b = x[..., :half], x[..., half:]\n"
            "    return concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)\n\n\nassert rotate(zeros(4), 1, 0).sum() == 0\n",
}


def fetched(name: str, take: Callable[[str], Path] = pull) -> Path:
    try:
        return take(name)
    except HubError as error:
        if "reach" in str(error) or "offline" in str(error):
            pytest.skip(f"{name}: {error}")
        raise


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return hanok.load(fetched("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def smollm2_twin(smollm2, tmp_path_factory):
    """The same weights in `transformers`, through our export."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    export_folder(smollm2.bundle, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", TEXTS)
def test_smollm2_scores_text_as_transformers_does(smollm2, smollm2_twin, kind):
    model, tokenizer = smollm2_twin
    ids = tokenizer(TEXTS[kind], add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    score = smollm2.score(TEXTS[kind])
    assert ids[0].tolist() == smollm2.tokenizer.encode(TEXTS[kind])
    assert score.tokens == ids.size(1) - 1
    assert abs(score.loss - loss) <= 1e-4 * loss


def test_smollm2_answers_and_writes_the_same_greedy_text(smollm2, smollm2_twin):
    model, tokenizer = smollm2_twin
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ours = smollm2.chat(messages, max_new_tokens=24)
    assert "Paris" in ours.text and ours.finish_reason == "stop"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        theirs = model.generate(**ids, max_new_tokens=24, do_sample=False, temperature=None, top_p=None, top_k=None)[0, ids["input_ids"].size(1):]
    assert list(ours.token_ids) == [i for i in theirs.tolist() if i not in smollm2.bundle.generation.stop_ids]


def test_minilm_embeds_as_transformers_does():
    path = fetched("all-minilm-l6-v2")
    ours = hanok.load(path)
    texts = ["A cat sleeps on the warm roof.", "On the roof a kitten naps.", "Interest rates rose by a quarter point.", "집 " * 40, "x",
             "beam and post " * 300]
    vectors = ours.embed(texts)
    folder = fetch("all-minilm-l6-v2").folder_or_file
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosine = (vectors * expected).sum(-1)
    assert (1 - cosine).abs().max() <= 1e-5
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > unlike


@pytest.fixture(scope="module")
def gpt2_words():
    """GPT-2's rank file, read here and by tiktoken."""
    path = fetched("pypi:openai-whisper==20250625#whisper/assets/gpt2.tiktoken", lambda source: fetch(source).folder_or_file)
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in path.read_bytes().splitlines())}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)
    return read_tokenizer(path), theirs


MORE_TEXTS = {"emoji": "👩‍👩‍👧‍👦 🏠🏽 :-) 🇰🇷🇰", "whitespace": "  a \t\n\n   b\r\n\u00a0\u3000 c   ", "numbers": "3.14159 1,000,000 ²½ ١٢٣",
              "end": "one<|endoftext|>two"}


@pytest.mark.parametrize("kind", TEXTS | MORE_TEXTS)
def test_gpt2s_rank_file_gives_tiktokens_ids(gpt2_words, kind):
    ours, theirs = gpt2_words
    text = (TEXTS | MORE_TEXTS)[kind]
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.encode(text, parse_special=True) == theirs.encode(text, allowed_special="all")
    assert ours.decode(ours.encode(text)) == text


def test_gpt2s_rank_file_gives_tiktokens_ids_for_any_unicode(gpt2_words):
    ours, theirs = gpt2_words
    draw = random.Random(0)
    planes = [range(0x20, 0x7F), range(0x20), range(0x80, 0x250), range(0x300, 0xD800), range(0xAC00, 0xD7A4), range(0xE000, 0x110000)]
    for _ in range(2000):
        text = "".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randrange(40)))
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_gpt2s_rank_file_is_gpt2(gpt2_words):
    ours, _ = gpt2_words
    assert (ours.vocab_size, ours.pre_tokenizer, ours.specials) == (50257, "gpt-2", {"<|endoftext|>": 50256})
    assert ours.encode("Hello world") == [15496, 995]


def test_pulled_again_it_needs_no_network():
    path = fetched("smollm2-135m-instruct")
    assert pull("smollm2-135m-instruct", offline=True) == path
    assert runtime.home() in path.parents
