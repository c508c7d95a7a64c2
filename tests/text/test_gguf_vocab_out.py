"""Vocabularies to GGUF and back: the same ids for any text, and what llama.cpp would cut otherwise is refused."""
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf_vocab import SPM, TEXTS, sentencepiece_metadata, sentencepiece_model

from hanok.errors import TokenizerError
from hanok.text.gguf_vocab import tokenizer_from_gguf
from hanok.text.gguf_vocab_out import gguf_from_tokenizer, kept_stop_ids
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer, train

TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("the quick  한국의집은 마루😀1234\n'sé<|endoftext|>"))
WORDS = {name: train("bpe", TEXTS, 400, pre_tokenizer=name, specials=["<|endoftext|>", "<|im_end|>"]) for name in PRE_TOKENIZERS}
PIECES = tokenizer_from_gguf(sentencepiece_metadata(SPM))


def edited(words: Tokenizer, **changes) -> Tokenizer:
    """The tokenizer with parts of its tokenizer.json changed; `model` and the like are merged into what is there."""
    data = json.loads(words.to_json())
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(data[name], dict) and isinstance(value, dict) else value
    return Tokenizer.from_json(json.dumps(data))


def again(words: Tokenizer, **options) -> Tokenizer:
    return tokenizer_from_gguf(gguf_from_tokenizer(words, words.vocab_size, **options))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe_keeps_its_ids_and_its_name(name):
    words, back = WORDS[name], again(WORDS[name])
    assert gguf_from_tokenizer(words, 400)["tokenizer.ggml.pre"] == name == back.pre_tokenizer
    for text in [*TEXTS, "I'LL pay 98765 <|im_end|> 😀", ""]:
        for parse_special in (False, True):
            assert back.encode(text, parse_special=parse_special) == words.encode(text, parse_special=parse_special)


BACK = again(WORDS["qwen2"])
PIECES_BACK = again(PIECES)


@settings(deadline=None)
@given(TEXT)
def test_any_text_has_the_same_ids_in_byte_level_bpe(text):
    ids = WORDS["qwen2"].encode(text, parse_special=True)
    assert BACK.encode(text, parse_special=True) == ids and BACK.decode(ids, skip_special=False) == text


@settings(deadline=None)
@given(TEXT)
def test_any_text_has_the_same_ids_in_sentencepiece_bpe(text):
    for parse_special in (False, True):
        assert PIECES_BACK.encode(text, parse_special=parse_special) == PIECES.encode(text, parse_special=parse_special)


def test_sentencepiece_pieces_keep_their_types_and_their_order():
    told, came = gguf_from_tokenizer(PIECES, PIECES.vocab_size), sentencepiece_metadata(SPM)
    for name in ("model", "tokens", "token_type", "bos_token_id", "unknown_token_id"):
        assert told[f"tokenizer.ggml.{name}"] == came[f"tokenizer.ggml.{name}"], name
    scores, theirs = told["tokenizer.ggml.scores"], came["tokenizer.ggml.scores"]
    merged = [token_id for token_id, token in enumerate(told["tokenizer.ggml.tokens"]) if scores[token_id] > min(scores)]
    assert sorted(merged, key=lambda i: -scores[i]) == sorted(merged, key=lambda i: -theirs[i]) and len(merged) > 50
    assert told["tokenizer.ggml.add_bos_token"] is True and told["tokenizer.ggml.add_eos_token"] is False


def test_a_sentencepiece_without_a_space_in_front_stays_one():
    words = tokenizer_from_gguf(sentencepiece_metadata(sentencepiece_model(add_dummy_prefix=False), add_space_prefix=False))
    for text in [*TEXTS, " the dog", "the dog"]:
        assert again(words).encode(text) == words.encode(text)


def test_spaces_in_user_defined_pieces_go_out_as_sentencepiece_spells_them():
    data = sentencepiece_metadata(SPM)
    for name, value in (("tokens", "▁▁▁▁▁"), ("scores", 0.0), ("token_type", 4)):
        data[f"tokenizer.ggml.{name}"] = [*data[f"tokenizer.ggml.{name}"], value]
    words = tokenizer_from_gguf(data)
    assert gguf_from_tokenizer(words, words.vocab_size)["tokenizer.ggml.tokens"][-1] == "▁▁▁▁▁"
    assert again(words).encode("a     b") == words.encode("a     b")


def test_rows_that_no_token_uses_are_written_and_read_away():
    told = gguf_from_tokenizer(WORDS["gpt-2"], 403)
    assert told["tokenizer.ggml.tokens"][400:] == ["[PAD400]", "[PAD401]", "[PAD402]"] and told["tokenizer.ggml.token_type"][400:] == [5, 5, 5]
    assert tokenizer_from_gguf(told).vocab_size == 400
    pieces = gguf_from_tokenizer(PIECES, PIECES.vocab_size + 2)
    assert tokenizer_from_gguf(pieces).encode(TEXTS[0]) == PIECES.encode(TEXTS[0])


# ---- ends

def around(before: list[str], after: list[str]) -> dict:
    part = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before] + [{"Sequence": {"id": "A", "type_id": 0}}] + [
        {"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    ids = {token: {"id": token, "ids": [WORDS["qwen2"].id_of(token)], "tokens": [token]} for token in (*before, *after)}
    return {"type": "TemplateProcessing", "single": part, "pair": part, "special_tokens": ids}


@pytest.mark.parametrize(("before", "after"), [(["<|im_end|>"], []), ([], ["<|im_end|>"]), (["<|endoftext|>"], ["<|im_end|>"]), ([], [])])
def test_what_stands_around_a_text_stays(before, after):
    words = edited(WORDS["qwen2"], post_processor=around(before, after))
    told = gguf_from_tokenizer(words, 400)
    assert told["tokenizer.ggml.add_bos_token"] is bool(before) and told["tokenizer.ggml.add_eos_token"] is bool(after)
    back = tokenizer_from_gguf(told)
    assert back.encode("the", add_special=True) == words.encode("the", add_special=True)
    assert back.encode("the") == words.encode("the")


def test_more_than_one_token_on_a_side_is_refused():
    words = edited(WORDS["qwen2"], post_processor=around(["<|endoftext|>", "<|im_end|>"], []))
    with pytest.raises(TokenizerError, match="puts 2 tokens before a text and 0 behind it; GGUF has a place for one each"):
        gguf_from_tokenizer(words, 400)


def test_an_end_is_always_told():
    """Where a file says nothing, llama.cpp takes token 11 for it, an ordinary one."""
    told = gguf_from_tokenizer(WORDS["qwen2"], 400)
    assert told["tokenizer.ggml.eos_token_id"] == told["tokenizer.ggml.bos_token_id"] == WORDS["qwen2"].id_of("<|endoftext|>")
    assert "tokenizer.ggml.padding_token_id" not in told and "tokenizer.ggml.eot_token_id" not in told


def test_stop_ids_take_the_places_that_there_are():
    words = train("bpe", TEXTS, 400, specials=["<a>", "<b>", "<c>", "<d>"])
    told = gguf_from_tokenizer(words, 400, stop_ids=(2, 300, 0, 3, 1), pad_id=1)
    assert [told[f"tokenizer.ggml.{place}_token_id"] for place in ("eos", "eot", "eom", "padding")] == [2, 0, 3, 1]
    assert kept_stop_ids(words, (2, 300, 0, 3, 1)) == [2, 0, 3]
    assert "tokenizer.ggml.padding_token_id" not in gguf_from_tokenizer(words, 400, pad_id=300)
    assert tokenizer_from_gguf(told).encode(TEXTS[0]) == words.encode(TEXTS[0])


# ---- what is refused

NFKC = {"type": "NFKC"}
PLAIN_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
UNFIT = {
    "a wordpiece tokenizer is not written to GGUF; byte-level BPE and SentencePiece BPE are": lambda: train("wordpiece", TEXTS, 300),
    "a unigram tokenizer is not written": lambda: train("unigram", TEXTS, 400),
    "not known; known are gpt-2, qwen2, smollm, llama-bpe": lambda: edited(WORDS["gpt-2"], pre_tokenizer={"add_prefix_space": True}),
    r"normalises text \(NFKC\), which llama.cpp would not do for byte-level": lambda: edited(WORDS["gpt-2"], normalizer=NFKC),
    "ignore_merges is True, which llama.cpp takes otherwise for 'gpt-2'": lambda: edited(WORDS["gpt-2"], model={"ignore_merges": True}),
    "ignore_merges is False, which llama.cpp takes otherwise for 'llama-bpe'": lambda: edited(WORDS["llama-bpe"], model={"ignore_merges": False}),
    r"normalises text \(NFKC\), which llama.cpp would not do for SentencePiece": lambda: edited(
        PIECES, normalizer={"type": "Sequence", "normalizers": [NFKC, PLAIN_SPACES]}),
    "its merges do not follow from scores of its pieces": lambda: edited(PIECES, model={"merges": merges()[:-3]}),
}


def merges() -> list:
    return json.loads(PIECES.to_json())["model"]["merges"]


@pytest.mark.parametrize("told", UNFIT)
def test_what_llama_cpp_would_cut_otherwise_is_refused(told):
    words = UNFIT[told]()
    with pytest.raises(TokenizerError, match=told) as refused:
        gguf_from_tokenizer(words, words.vocab_size)
    assert "\n" not in str(refused.value)


def test_nfc_is_left_out_as_the_converter_leaves_it_out():
    words = edited(WORDS["qwen2"], normalizer={"type": "NFC"})
    for text in TEXTS:
        assert again(words).encode(text) == words.encode(text)
