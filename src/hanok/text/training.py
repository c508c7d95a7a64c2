"""How each kind of tokenizer is trained, and how byte-level BPE cuts text into words. `tokenizer.train` is the door to it.

The same text always gives the same tokenizer.json: what a trainer leaves to its hash table is put in order. Characters are learned without a trainer:
each one of the text is a token, numbered in Unicode's order as nanoGPT's prepare.py does, so that its checkpoints find their ids.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hanok.errors import DataError, HanokError, TokenizerError, nearest

QWEN2_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
T5_SPECIALS = ("<pad>", "</s>", "<unk>")
NOTHING = "there is no text to train on; at least one non-empty text was expected"


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), _byte_level(False)])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _byte_level(True),
    "qwen2": lambda: _split(QWEN2_REGEX),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]),
    "llama-bpe": lambda: _split(LLAMA3_REGEX),
}
"""How byte-level BPE cuts text into words, by llama.cpp's names."""


def one_by_one() -> pre_tokenizers.PreTokenizer:
    """Every character is a word, ends of lines too."""
    return pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")


def require_text(text: Any, where: str = "") -> None:
    """DataError if `text` is no Unicode text; the Rust side does not say where."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair"
        raise DataError(f"{where}got {half}; well-formed Unicode was expected") from None
    except AttributeError:
        raise DataError(f"{where}got a {type(text).__name__}, expected text") from None


class _Corpus:
    """Texts on their way to a trainer; remembers whether there were any and, where asked, their characters."""

    def __init__(self, texts: Iterable[str], collect: bool = False):
        self._texts, self._collect = texts, collect
        self.empty, self.alphabet = True, set[str]()

    def __iter__(self) -> Iterator[str]:
        for n, text in enumerate(self._texts):
            require_text(text, f"text {n} to train on: ")
            self.empty &= not text
            if self._collect:
                self.alphabet.update(text)
            yield text


def learned(kind: str, texts: Iterable[str], vocab_size: int, pre_tokenizer: str, specials: Sequence[str] | None, further: Sequence[str],
            progress: bool) -> tokenizers.Tokenizer:
    """What `tokenizer.train` says, as the Rust library's own tokenizer."""
    makers = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram, "characters": _train_characters}
    own = {"bpe": ("<|endoftext|>",) if specials is None else (), "wordpiece": BERT_SPECIALS, "unigram": T5_SPECIALS, "characters": ()}
    if kind not in makers:
        raise TokenizerError(f"unknown tokenizer kind '{kind}'; {nearest(kind, makers)}")
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise TokenizerError(f"unknown pre-tokenizer '{pre_tokenizer}'; {nearest(pre_tokenizer, PRE_TOKENIZERS)}")
    if isinstance(texts, str):
        raise TokenizerError("got one string to train on; an iterable of texts was expected")
    names = list(dict.fromkeys([*own[kind], *(specials or ())]))
    if "" in (*names, *further):
        raise TokenizerError("a special token may not be the empty string")
    rust = makers[kind](texts, vocab_size - len(further), names, pre_tokenizer, progress)
    rust.add_special_tokens(list(further))
    return rust


PIECE, SEAM = 4000, re.compile(r"(?<=[\w!-~])\n(?=[^\W_])")
"""Characters of a piece, about; and an end of a line across which no pre-tokenizer of byte-level BPE makes a word."""


def pieces(text: str) -> list[str]:
    """The same words in short texts: the trainer deals texts out to cores, and long ones leave some idle."""
    found, first = [], 0
    while len(text) - first > 2 * PIECE and (seam := SEAM.search(text, first + PIECE)):
        found.append(text[first:seam.end()])
        first = seam.end()
    return [*found, text[first:]]


def _feed(rust: tokenizers.Tokenizer, corpus: _Corpus, trainer: Any, cut: Callable[[str], list[str]] = lambda text: [text]) -> None:
    rust.train_from_iterator(map(cut, corpus), trainer)
    if corpus.empty:
        raise TokenizerError(NOTHING)


def _refuse_small(vocab_size: int, least: int, why: str) -> None:
    if vocab_size < least:
        raise TokenizerError(f"vocab_size {vocab_size} is too small: {least} is the least for this text ({why})")


def _train_bpe(texts: Iterable[str], vocab_size: int, specials: list[str], pre_tokenizer: str, progress: bool) -> tokenizers.Tokenizer:
    _refuse_small(vocab_size, 256 + len(specials), f"256 bytes and {len(specials)} special tokens")
    rust = tokenizers.Tokenizer(models.BPE(ignore_merges=pre_tokenizer == "llama-bpe"))
    rust.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=specials, show_progress=progress,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    _feed(rust, _Corpus(texts), trainer, pieces)
    return rust


def _train_wordpiece(texts: Iterable[str], vocab_size: int, specials: list[str], _: str, progress: bool) -> tokenizers.Tokenizer:
    texts = list(texts) if isinstance(texts, Iterator) else texts

    def learn(size: int, first: list[str]) -> dict[str, int]:
        rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer, rust.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        _feed(rust, _Corpus(texts), trainers.WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=first, show_progress=progress))
        return rust.get_vocab()

    # BERT's normaliser takes accents off by decomposing, which takes Hangul apart as well; NFC puts it together again
    normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.NFC()])
    alphabet = learn(0, specials)            # the trainer numbers ##x as its hash table has them, so they are given in order
    _refuse_small(vocab_size, len(alphabet), f"{len(specials)} special tokens and its characters")
    vocab = learn(vocab_size, specials + sorted(token for token in alphabet if token.startswith("##") and token not in specials))
    rust = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer, rust.decoder = normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    rust.add_special_tokens(specials)
    around = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    rust.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", around)
    return rust


def _train_unigram(texts: Iterable[str], vocab_size: int, specials: list[str], _: str, progress: bool) -> tokenizers.Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    spellers = set("".join(byte_tokens))     # always pieces, so that the text "<0x41>" is never the byte token
    corpus = _Corpus(texts, collect=True)
    rust = tokenizers.Tokenizer(models.Unigram())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=max(vocab_size - 256, 1), special_tokens=specials, unk_token="<unk>", show_progress=progress,
                                      initial_alphabet=sorted(spellers))
    try:
        _feed(rust, corpus, trainer)
    except HanokError:
        raise
    except Exception as error:               # bare; that the vocabulary is too small comes without the number that would do
        if "not large enough" not in str(error):
            raise TokenizerError(f"unigram training failed: {' '.join(str(error).split())}") from None
    least = len(specials) + 256 + len({"▁"} | spellers | corpus.alphabet - {" "})
    _refuse_small(vocab_size, least, f"{len(specials)} special tokens, 256 bytes and its characters")
    pieces = _settled([pair for pair in json.loads(rust.to_str())["model"]["vocab"] if pair[0] not in {*specials, *byte_tokens}])
    excess = set([piece for piece, _ in pieces if len(piece) > 1][vocab_size - least:])  # the trainer may overshoot
    vocab = [(token, 0.0) for token in specials] + [(token, -1000.0) for token in byte_tokens] + [pair for pair in pieces if pair[0] not in excess]
    rust.model = models.Unigram(vocab, specials.index("<unk>"), True)
    rust.add_special_tokens(specials)
    rust.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B:1 </s>:1", [("</s>", specials.index("</s>"))])
    return rust


def _train_characters(texts: Iterable[str], vocab_size: int, specials: list[str], _: str, __: bool) -> tokenizers.Tokenizer:
    seen = _Corpus(texts, collect=True)
    for _text in seen:
        pass
    if seen.empty:
        raise TokenizerError(NOTHING)
    _refuse_small(vocab_size, len(seen.alphabet) + len(specials), f"{len(specials)} special tokens and its characters")
    rust = tokenizers.Tokenizer(models.WordLevel({character: token_id for token_id, character in enumerate(sorted(seen.alphabet))}))
    rust.pre_tokenizer, rust.decoder = one_by_one(), decoders.Fuse()
    rust.add_special_tokens(specials)
    return rust


def _settled(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The pieces in a settled order, free of what the trainer leaves to its hash table: the last digits of sums, and the steps of 0.0001 by which
    it sets apart the characters that have no probability of their own."""
    lowest = min(score for _, score in pieces)

    def settle(piece: str, score: float) -> float:
        steps = (score - lowest) / 1e-4
        unseen = len(piece) == 1 and steps < len(pieces) and abs(steps - round(steps)) < 1e-5
        return round(lowest if unseen else score, 6)

    return sorted(((piece, settle(piece, score)) for piece, score in pieces), key=lambda pair: (-pair[1], pair[0]))
