"""Vocabularies from GGUF metadata: the same ids as the tokenizers that the metadata was written from."""
from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.errors import TokenizerError
from hanok.text.gguf_vocab import tokenizer_from_gguf
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer, train

TEXTS = ["the quick brown fox jumps over the lazy dog, and the dog doesn't mind 1234 times",
         "한국의 집은 마루를 가운데 두고 방들이 둘러앉는다. 마루는 시원하고 방은 따뜻하다.",
         "She said: it's 1234 o'clock 😀 and the café isn't open!\n\n\tprint(x)"] * 3
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("the quick  한국의집은 마루😀1234\n'sé"))


def ggml(**values):
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def byte_level_metadata(tokenizer: Tokenizer, pre: str | None):
    """What a GGUF file says of a byte-level BPE."""
    model = json.loads(tokenizer.to_json())["model"]
    tokens = [tokenizer.token(token_id) for token_id in range(tokenizer.vocab_size)]
    types = [3 if token in tokenizer.specials else 1 for token in tokens]
    data = ggml(model="gpt2", tokens=tokens, token_type=types, merges=[" ".join(merge) for merge in model["merges"]])
    return data | (ggml(pre=pre) if pre else {})


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "gpt-2"), ("default", "gpt-2"), (None, "gpt-2"), ("qwen2", "qwen2"), ("smollm", "smollm"),
                                           ("llama-bpe", "llama-bpe"), ("llama3", "llama-bpe"), ("llama-v3", "llama-bpe")])
def test_byte_level_bpe_has_the_same_ids(pre, name):
    original = train("bpe", TEXTS, 400, pre_tokenizer=name, specials=["<|endoftext|>", "<|im_end|>"])
    read = tokenizer_from_gguf(byte_level_metadata(original, pre))
    assert read.pre_tokenizer == name and read.specials == original.specials and read.vocab_size == original.vocab_size
    for text in [*TEXTS, "I'LL pay 98765 <|im_end|> 😀", ""]:
        for parse_special in (False, True):
            assert read.encode(text, parse_special=parse_special) == original.encode(text, parse_special=parse_special)
        assert read.decode(read.encode(text)) == text


def sentencepiece_model(model_type: str = "bpe", **options) -> sentencepiece.SentencePieceProcessor:
    """A small model trained as Llama 2's was: identity normalisation, digits apart, byte fallback."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=written, vocab_size=400, model_type=model_type, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2, **options)
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor, **more):
    def kind(token_id):
        unused, byte, control, unknown = model.is_unused(token_id), model.is_byte(token_id), model.is_control(token_id), model.is_unknown(token_id)
        return 2 if unknown else 3 if control else 6 if byte else 5 if unused else 4 if model.id_to_piece(token_id).startswith("<user") else 1

    ids = range(model.get_piece_size())
    return ggml(model="llama", tokens=[model.id_to_piece(n) for n in ids], scores=[model.get_score(n) for n in ids],
                token_type=[kind(n) for n in ids], bos_token_id=model.bos_id(), eos_token_id=model.eos_id(), unknown_token_id=model.unk_id(), **more)


SPM = sentencepiece_model(user_defined_symbols=["<user>"])
READ = tokenizer_from_gguf(sentencepiece_metadata(SPM))


@settings(deadline=None)
@given(TEXT.filter(lambda text: "▁" not in text and "\0" not in text and "<user>" not in text))
def test_sentencepiece_bpe_has_the_same_ids(text):
    ids = READ.encode(text)
    assert ids == SPM.encode(text)
    assert READ.decode(ids) == SPM.decode(ids) == text


@pytest.mark.parametrize("text", [*TEXTS[:3], "the dog", "  two  spaces ", "집😀집", "문장 뒤에\n\n그리고 <s> </s> <0x41> <unk>", "a b c" * 50, ""])
def test_sentencepiece_bpe_on_chosen_text(text):
    assert READ.encode(text) == SPM.encode(text)
    stream = READ.stream()
    assert "".join(map(stream.push, READ.encode(text))) + stream.flush() == text


def test_sentencepiece_user_defined_tokens():
    text = "the dog<user>"
    assert READ.encode(text) == SPM.encode(text) and READ.id_of("<user>") in READ.encode(text)
    assert "<user>" in READ.added and "<user>" not in READ.specials
    assert list(READ.specials) == ["<unk>", "<s>", "</s>"]


def test_merges_follow_the_scores_and_not_the_ids():
    data = ggml(model="llama", tokens=["<unk>", "bc", "ab", "a", "b", "c", "▁"], scores=[0, -2, -1, -3, -4, -5, -6], token_type=[2] + [1] * 6)
    assert tokenizer_from_gguf(data).encode("abc") == [6, 2, 5]
    assert tokenizer_from_gguf(data | ggml(scores=[0, -1, -2, -3, -4, -5, -6])).encode("abc") == [6, 3, 1]


def test_no_merge_makes_a_byte_token():
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "<", "0", "x", "4", "1", ">", "<0", "x4", "<0x4", "1>"]
    types = [2] + [6] * 256 + [1] * 11
    read = tokenizer_from_gguf(ggml(model="llama", tokens=tokens, token_type=types, scores=[-float(n) for n in range(len(tokens))]))
    assert [read.token(token_id) for token_id in read.encode("<0x41>")] == ["▁", "<0x4", "1>"]
    assert read.decode(read.encode("<0x41>A")) == "<0x41>A"


def test_without_a_space_in_front():
    model = sentencepiece_model(add_dummy_prefix=False)
    read = tokenizer_from_gguf(sentencepiece_metadata(model, add_space_prefix=False))
    for text in [*TEXTS[:3], " the dog", "the dog"]:
        assert read.encode(text) == model.encode(text)
        assert read.decode(read.encode(text)) == text


def test_what_stands_around_a_text():
    begin, end = READ.id_of("<s>"), READ.id_of("</s>")
    assert READ.encode("the", add_special=True) == [begin, *READ.encode("the")]  # llama.cpp's habit for SentencePiece
    both = tokenizer_from_gguf(sentencepiece_metadata(SPM, add_bos_token=True, add_eos_token=True))
    assert both.encode("the", add_special=True) == [begin, *READ.encode("the"), end]
    none = tokenizer_from_gguf(sentencepiece_metadata(SPM, add_bos_token=False))
    assert none.encode("the", add_special=True) == READ.encode("the")


def test_types_that_the_file_does_not_tell():
    data = byte_level_metadata(train("bpe", TEXTS, 300), "gpt-2")
    del data["tokenizer.ggml.token_type"]
    assert tokenizer_from_gguf(data).specials == {}
    assert tokenizer_from_gguf(data | ggml(eos_token_id=0)).specials == {"<|endoftext|>": 0}
    data = sentencepiece_metadata(SPM)
    del data["tokenizer.ggml.token_type"]
    assert tokenizer_from_gguf(data).encode("집 <0x41> </s>") == SPM.encode("집 <0x41> </s>")


def test_user_defined_spaces_are_found_in_raw_text():
    data = sentencepiece_metadata(SPM)
    data["tokenizer.ggml.tokens"] = [*data["tokenizer.ggml.tokens"], "▁▁▁▁▁"]
    data["tokenizer.ggml.scores"] = [*data["tokenizer.ggml.scores"], 0.0]
    data["tokenizer.ggml.token_type"] = [*data["tokenizer.ggml.token_type"], 4]
    read = tokenizer_from_gguf(data)
    assert read.vocab_size - 1 in read.encode("a     b") and read.decode(read.encode("a     b")) == "a      b"  # as llama.cpp: a space after it


BROKEN = byte_level_metadata(train("bpe", TEXTS, 300), "gpt-2")


@pytest.mark.parametrize(("change", "says"), [
    ({"model": "bert"}, "model 'bert' is not supported; choose from gpt2, llama"),
    ({"model": "lama"}, "did you mean 'llama'"),
    ({"pre": "qwen3"}, "pre-tokenizer 'qwen3' is not supported; did you mean 'qwen2'"),
    ({"pre": "tekken"}, "choose from default, gpt-2"),
    ({"model": None}, "no 'tokenizer.ggml.model'"),
    ({"tokens": None}, "no 'tokenizer.ggml.tokens'"),
    ({"merges": None}, "no 'tokenizer.ggml.merges'"),
    ({"merges": ["no such"]}, "do not fit"),
    ({"model": "llama"}, "no 'tokenizer.ggml.scores'"),
    ({"model": "llama", "scores": [0.0]}, "300 tokens but 1 scores"),
    ({"token_type": [1]}, "300 tokens but 1 token types"),
    ({"tokens": ["a", "a"], "token_type": None}, "'a' has two ids, 0 and 1"),
    ({"eos_token_id": 300}, "eos_token_id is 300"),
])
def test_what_cannot_be_read_is_told_in_a_line(change, says):
    with pytest.raises(TokenizerError, match=says) as caught:
        tokenizer_from_gguf(BROKEN | ggml(**change))
    assert "\n" not in str(caught.value)


def test_llama_3_takes_a_whole_word_that_no_merges_make():
    data = BROKEN | ggml(tokens=[*BROKEN["tokenizer.ggml.tokens"], "zzzz"], token_type=None)
    assert tokenizer_from_gguf(data | ggml(pre="llama-bpe")).encode("zzzz") == [300]
    assert len(tokenizer_from_gguf(data | ggml(pre="gpt-2")).encode("zzzz")) == 4


def test_the_known_names_cover_the_pre_tokenizers():
    for name in PRE_TOKENIZERS:
        assert tokenizer_from_gguf(BROKEN | ggml(pre=name)).pre_tokenizer == name
