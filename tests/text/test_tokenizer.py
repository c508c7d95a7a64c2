"""Tokenizers: exact round trips, streams that equal the whole, bytes that add up, and training that always gives the same file."""
from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from hanok.errors import DataError, HanokError, TokenizerError
from hanok.text import training
from hanok.text.tokenizer import PRE_TOKENIZERS, Tokenizer, train

TEXTS = ["the quick brown fox jumps over the lazy dog, and the dog doesn't mind",
         "한국의 집은 마루를 가운데 두고 방들이 둘러앉는다. 마루는 시원하고 방은 따뜻하다.",
         "She said: it's 1234 o'clock 😀 👩‍👩‍👧 and the café isn't open!\n\n\tprint(x)  # naïve"] * 3
BPE = train("bpe", TEXTS, 420, specials=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
UNIGRAM = train("unigram", TEXTS, 420)
WORDPIECE = train("wordpiece", TEXTS, 200)


def llama_like() -> Tokenizer:
    """SentencePiece BPE with byte tokens, as Llama 2's tokenizer.json has it."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello"]
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁h", "el"), ("▁hel", "lo")]
    rust = tokenizers.Tokenizer(models.BPE({token: n for n, token in enumerate(vocab)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    rust.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in vocab[:3]])
    return Tokenizer(rust)


def gpt1_like() -> Tokenizer:
    """BPE whose words end in </w>, as GPT-1's."""
    vocab = {token: n for n, token in enumerate(["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>"])}
    rust = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b</w>")], unk_token="<unk>", end_of_word_suffix="</w>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>")
    return Tokenizer(rust)


def words_alone() -> Tokenizer:
    rust = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<s>": 3}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens(["<s>"])
    return Tokenizer(rust)


LLAMA, GPT1, WORDS = llama_like(), gpt1_like(), words_alone()
EVERY = {"bpe": BPE, "unigram": UNIGRAM, "wordpiece": WORDPIECE, "llama": LLAMA, "gpt1": GPT1, "words": WORDS}
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.text("the quick한국의집은 마루😀👩‍👧\ufffd é<|im_end|>"))


@settings(deadline=None)
@given(TEXT)
def test_byte_level_bpe_gives_every_text_back(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert b"".join(map(BPE.token_bytes, ids)) == text.encode()
    assert not set(ids) & set(BPE.specials.values())


@settings(deadline=None)
@given(TEXT.filter(lambda text: "▁" not in text))
def test_unigram_with_byte_tokens_knows_every_text(text):
    ids = UNIGRAM.encode(text)
    assert UNIGRAM.decode(ids) == text.removeprefix(" ")  # Metaspace begins every text with a space
    spelled = b"".join(map(UNIGRAM.token_bytes, ids)).decode()
    assert spelled in (text, " " + text)
    assert not set(ids) & set(UNIGRAM.specials.values())


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_a_stream_equals_the_whole(name, data, skip_special):
    tokenizer = EVERY[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1)))
    stream = tokenizer.stream(skip_special)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip_special)
    if not tokenizer._has_byte_tokens:       # there, an invalid run of byte tokens is told apart further than in the library
        assert tokenizer.decode(ids, skip_special=skip_special) == tokenizer._rust.decode(ids, skip_special_tokens=skip_special)


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece", "llama"])
@settings(deadline=None)
@given(text=TEXT)
def test_text_decodes_as_the_library_decodes_it(name, text):
    tokenizer = EVERY[name]
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer._rust.decode(ids) == tokenizer.decode(ids)


def test_a_stream_never_gives_half_a_character():
    stream = BPE.stream()
    raw = "a😀\ufffd집".encode()
    by_byte = {BPE.token_bytes(token_id): token_id for token_id in range(BPE.vocab_size)}
    pieces = [stream.push(by_byte[bytes([byte])]) for byte in raw]
    assert [piece for piece in pieces if piece] == ["a", "😀", "\ufffd", "집"] and stream.flush() == ""
    assert stream.push(by_byte[b"\xf0"]) == "" and stream.flush() == "\ufffd"


def test_the_work_of_a_push_does_not_grow():
    stream = LLAMA.stream()
    syllable = [LLAMA.id_of(f"<0x{byte:02X}>") for byte in "집".encode()]
    sizes = set()
    for token_id in syllable * 1000:
        stream.push(token_id)
        sizes.add(len(pickle.dumps((stream._utf8.getstate(), stream._held))))
    assert len(sizes) <= 3                   # a stream holds what a character lacks, and nothing of what went before


def test_bytes_of_tokens():
    assert LLAMA.token_bytes(LLAMA.id_of("▁hello")) == b" hello"
    assert LLAMA.token_bytes(LLAMA.id_of("<0xAB>")) == b"\xab" and LLAMA.token_bytes(LLAMA.id_of("<0x20>")) == b" "
    assert LLAMA.token_bytes(LLAMA.id_of("</s>")) == b""
    assert [WORDPIECE.token_bytes(token_id) for token_id in WORDPIECE.encode("the dog")] == [b"the", b"dog"]
    continued = next(token_id for token_id in range(WORDPIECE.vocab_size) if WORDPIECE.token(token_id).startswith("##"))
    assert WORDPIECE.token_bytes(continued) == WORDPIECE.token(continued)[2:].encode()
    assert GPT1.token_bytes(GPT1.id_of("ab</w>")) == b"ab" and WORDS.token_bytes(1) == b"a"
    assert [GPT1.decode(GPT1.encode("ab a b"), skip_special=True), WORDS.decode([1, 3, 2])] == ["ab a b", "a b"]


def test_bytes_of_added_tokens_are_their_own():
    rust = tokenizers.Tokenizer.from_str(BPE.to_json())
    rust.add_tokens(["café", "심장"])
    tokenizer = Tokenizer(rust)
    ids = tokenizer.encode("un café, 심장!")
    assert tokenizer.id_of("café") in ids and tokenizer.id_of("심장") in ids
    assert tokenizer.decode(ids) == "un café, 심장!" and tokenizer.added["심장"] == tokenizer.vocab_size - 1


@pytest.mark.parametrize("name", ["bpe", "unigram", "wordpiece", "llama", "words"])
def test_special_tokens_in_text_count_only_when_asked(name):
    tokenizer = EVERY[name]
    for token, token_id in tokenizer.specials.items():
        text = f"a {token} b{token}"
        unknown = {tokenizer.id_of(token) for token in ("[UNK]", "<unk>")}
        assert token_id not in set(tokenizer.encode(text)) - unknown
        assert token_id in tokenizer.encode(text, parse_special=True)
        assert tokenizer.encode_batch([text, ""])[0] == tokenizer.encode(text)
        assert tokenizer.encode_batch([text], parse_special=True)[0] == tokenizer.encode(text, parse_special=True)
        assert tokenizer.decode(tokenizer.encode(token, parse_special=True)) == ""


def test_hidden_special_tokens_leave_other_ids_alone():
    vocab = [["<s>", 0.0], ["<unk>", 0.0], ["▁", -2.0], *([letter, -3.0] for letter in "<s>a")]
    rust = tokenizers.Tokenizer(models.Unigram([(piece, score) for piece, score in vocab], 1))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    rust.add_special_tokens(["<s>"])
    rust.add_tokens(["<word>"])
    word = rust.token_to_id("<word>")
    rust.post_processor = processors.TemplateProcessing(single="<s> $A <word>", special_tokens=[("<s>", 0), ("<word>", word)])
    tokenizer = Tokenizer(rust)
    assert tokenizer.encode("a<word><s>", add_special=True) == [0, 2, 6, word, 2, 3, 4, 5, word]
    assert tokenizer.encode("a<word><s>", parse_special=True) == [2, 6, word, 0]


def test_hidden_special_tokens_where_ids_have_gaps():
    rust = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "<unk>": 2, "b": 4}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens(["<s>"])
    assert Tokenizer(rust).encode("a b <s> c") == [1, 4, 2, 2]


def test_threads_do_not_meet():
    text = "a<|im_end|>b" * 50
    plain, parsed = BPE.encode(text), BPE.encode(text, parse_special=True)
    assert plain != parsed
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: BPE.encode(text, parse_special=bool(n % 2)), range(200)))
    assert all(ids == (parsed if n % 2 else plain) for n, ids in enumerate(found))


def test_offsets_tell_the_characters():
    text = "the 😀 fox"
    ids, offsets = BPE.encode_with_offsets(text)
    assert ids == BPE.encode(text)
    assert all(text[begin:end].encode().find(BPE.token_bytes(token_id)) >= 0 for token_id, (begin, end) in zip(ids, offsets))


def test_what_stands_around_a_text():
    bert, t5 = WORDPIECE.encode("the dog", add_special=True), UNIGRAM.encode("the dog", add_special=True)
    assert [WORDPIECE.token(bert[0]), WORDPIECE.token(bert[-1])] == ["[CLS]", "[SEP]"] and bert[1:-1] == WORDPIECE.encode("the dog")
    assert t5 == [*UNIGRAM.encode("the dog"), UNIGRAM.id_of("</s>")]
    assert [UNIGRAM.id_of(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


def test_wordpiece_keeps_hangul_together():
    assert WORDPIECE.decode(WORDPIECE.encode("Café 한국의 마루!")) == "cafe 한국의 마루!"


def test_kinds_and_pre_tokenizers_are_known_by_structure(tmp_path):
    assert [EVERY[name].kind for name in EVERY] == ["bpe", "unigram", "wordpiece", "bpe", "bpe", "wordlevel"]
    assert [EVERY[name].pre_tokenizer for name in EVERY] == ["qwen2", None, None, None, None, None]
    for name in PRE_TOKENIZERS:
        tokenizer = train("bpe", TEXTS, 300, pre_tokenizer=name)
        assert tokenizer.pre_tokenizer == Tokenizer.from_json(tokenizer.to_json()).pre_tokenizer == name
        assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]
    data = json.loads(BPE.to_json())
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert Tokenizer.from_json(json.dumps(data)).pre_tokenizer is None


def test_digits_and_words_are_cut_as_each_name_says():
    def words(name):
        return [text for text, _ in PRE_TOKENIZERS[name]().pre_tokenize_str("I'LL pay 1234")]

    assert words("gpt-2") == ["I", "'", "LL", "Ġpay", "Ġ1234"]
    assert words("qwen2") == ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4"]
    assert words("smollm") == ["I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4"]
    assert words("llama-bpe") == ["I", "'LL", "Ġpay", "Ġ", "123", "4"]


def test_files(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(path).to_json() == BPE.to_json()
    WORDPIECE.save(tmp_path)
    assert Tokenizer.load(str(tmp_path)).kind == "wordpiece"
    assert pickle.loads(pickle.dumps(BPE)).encode(TEXTS[1]) == BPE.encode(TEXTS[1])


def test_lengths_that_a_file_carries_are_ignored():
    rust = tokenizers.Tokenizer.from_str(BPE.to_json())
    rust.enable_truncation(3)
    rust.enable_padding(length=5)
    assert Tokenizer.from_json(rust.to_str()).encode(TEXTS[0]) == BPE.encode(TEXTS[0])


@pytest.mark.parametrize(("name", "content", "says"), [
    ("none.json", None, "no such file"), ("empty", "folder", "no such file"), ("bad.json", b"{", "not a tokenizer.json"),
    ("other.json", b'{"a": 1}', "not a tokenizer.json"), ("latin.json", b"\xff", "not utf-8"), ("spiece.model", b"x", "SentencePiece"),
    ("weights.bin", b"x", "run code"), ("tokenizer.pkl", b"x", "run code"),
])
def test_what_cannot_be_loaded_is_told_in_a_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=says) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(("arguments", "options", "says"), [
    (("bpee", TEXTS, 300), {}, "did you mean 'bpe'"), (("bpe", TEXTS, 300), {"pre_tokenizer": "qwen"}, "did you mean 'qwen2'"),
    (("bpe", TEXTS, 256), {}, "257 is the least"), (("bpe", [], 300), {}, "no text"), (("bpe", [""], 300), {}, "no text"),
    (("unigram", [], 900), {}, "no text"), (("wordpiece", iter([]), 900), {}, "no text"), (("bpe", "text", 300), {}, "one string"),
    (("characters", [""], 300), {}, "no text"), (("characters", ["abc"], 2), {}, "3 is the least"),
    (("bpe", ["a", 3], 300), {}, "text 1 to train on: got a int"), (("bpe", ["a"], 300), {"specials": [""]}, "empty string"),
    (("unigram", ["a \ud83d"], 300), {}, "text 0 to train on: .*U\\+D83D at character 2"),
])
def test_what_cannot_be_trained_is_told_in_a_line(arguments, options, says):
    with pytest.raises(HanokError, match=says) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "characters"])
def test_the_least_vocab_size_that_is_told_works(kind):
    with pytest.raises(TokenizerError) as caught:
        train(kind, TEXTS, 30)
    least = int(str(caught.value).split(" is the least")[0].split()[-1])
    assert train(kind, TEXTS, least).vocab_size == least
    with pytest.raises(TokenizerError):
        train(kind, TEXTS, least - 1)


@settings(deadline=None)
@given(TEXT, TEXT)
def test_characters_are_tokens_and_give_every_text_back(text, other):
    """Ids are the places in the sorted alphabet; a stream gives each character at once; what is not in the alphabet is refused by name."""
    alphabet = sorted(set(text + "a"))
    tokenizer = Tokenizer.from_json(train("characters", [text, "a"], 8192).to_json())
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.kind == "characters" and tokenizer.vocab_size == len(alphabet) and not tokenizer.specials
    assert ids == [alphabet.index(character) for character in text] == tokenizer.encode_batch([text])[0]
    assert offsets == [(i, i + 1) for i in range(len(text))]
    stream = tokenizer.stream()
    assert tokenizer.decode(ids) == text and [stream.push(token_id) for token_id in ids] == list(text)
    strange = next((i for i, character in enumerate(other) if character not in alphabet), None)
    for act in (lambda: tokenizer.encode(other), lambda: tokenizer.encode_batch([text, other])):
        if strange is None:
            act()
        else:
            with pytest.raises(TokenizerError) as caught:
                act()
            assert str(caught.value).startswith(f"got {other[strange]!r} at character {strange}, which this tokenizer does not know")


def test_special_tokens_stand_behind_the_characters():
    tokenizer = train("characters", ["a<|endoftext|>"], 20, further=["<|endoftext|>"])
    n = len(set("a<|endoftext|>"))
    assert tokenizer.specials == {"<|endoftext|>": n} and tokenizer.vocab_size == n + 1
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>" and tokenizer.encode("<|endoftext|>", parse_special=True) == [n]


def test_a_word_that_a_vocabulary_of_words_does_not_know_is_named():
    rust = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(TokenizerError, match="got 'houses' at character 2, which this tokenizer does not know"):
        Tokenizer(rust).encode("a houses b")


def test_specials_of_ones_own():
    tokenizer = train("unigram", iter(TEXTS), 430, specials=["<extra_id_0>", "</s>"])
    assert list(tokenizer.specials) == ["<pad>", "</s>", "<unk>", "<extra_id_0>"] and tokenizer.vocab_size <= 430
    assert list(train("bpe", iter(TEXTS), 300).specials) == ["<|endoftext|>"]
    assert train("wordpiece", iter(TEXTS), 300, specials=["[A]"]).encode("[A]", parse_special=True) == [5]


def test_text_that_spells_a_byte_token_stays_text():
    tokenizer = train("unigram", ["a <0x41> b"] * 20, 330)
    assert tokenizer.decode(tokenizer.encode("a <0x41> b")) == "a <0x41> b"


TRAIN = """
import hashlib, sys
from hanok.text.tokenizer import train
texts = [line for line in open(sys.argv[1], encoding="utf-8")]
for kind, size in (("bpe", 500), ("wordpiece", 400), ("unigram", 600), ("characters", 600)):
    print(hashlib.sha256(train(kind, texts, size).to_json().encode()).hexdigest())
"""


def test_the_same_text_gives_the_same_file(tmp_path):
    """In processes of their own: the trainers' hash tables are seeded anew in each."""
    stems, ends = ("집", "마루", "방", "walk", "talk", "jump", "quick", "stone"), ("", "은", "ing", "ed", "이다", "-s")
    words = [stem + end for stem in stems for end in ends]
    lines = [" ".join(words[(n * 7 + k * k) % len(words)] for k in range(12)) + chr(0x4E00 + n % 30) for n in range(300)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    runs = [subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path / "text.txt")], capture_output=True, text=True, check=True).stdout
            for _ in range(3)]
    assert len(runs[0].split()) == 4 and runs[0] == runs[1] == runs[2]


def test_ids_that_are_not_there():
    assert BPE.decode([BPE.vocab_size + 5, *BPE.encode("fox")]) == "fox"
    for wrong in (BPE.vocab_size, -100, 2 ** 40):
        with pytest.raises(TokenizerError, match=f"no token {wrong}"):
            BPE.token(wrong)
    with pytest.raises(TokenizerError):
        BPE.decode([-100])
    assert BPE.id_of("never") is None and BPE.token_bytes(BPE.vocab_size) == b""


def test_half_a_character_is_refused():
    with pytest.raises(DataError, match="U\\+D800 at character 1"):
        BPE.encode("a\ud800")
    with pytest.raises(DataError, match="U\\+D800 at character 1"):
        BPE.encode_batch(["fine", "a\ud800"])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab가9_ .!/'\t\n\r\u3000é", max_size=200), st.sampled_from(sorted(training.PRE_TOKENIZERS)), st.integers(1, 20))
def test_pieces_have_the_words_of_the_text(text: str, name: str, size: int):
    cut = training.PRE_TOKENIZERS[name]()

    def words(some: list[str]) -> list[str]:
        return [word for one in some for word, _ in cut.pre_tokenize_str(one)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PIECE", size)
        some = training.pieces(text)
    assert "".join(some) == text and words(some) == words([text])
    assert len(text) <= 2 * size or len(some) > 1 or not training.SEAM.search(text, size)
