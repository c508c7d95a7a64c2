"""What a run may expect: its loss by a scaling law, the rates that it should learn with, and what of a text both depend on.

The law is that of Hoffmann et al. (arXiv:2203.15556, eq. 10), in bits a byte so that vocabularies compare. Text that is read again is worth less
(Muennighoff et al., arXiv:2305.16264, eq. 5), and so is a byte in an update of many tokens (McCandlish et al., arXiv:1812.06162, eq. 2.11).
"""
from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hanok.bundle.bundle import empty_model
from hanok.data.corpus import Corpus
from hanok.data.pairs import PAIR_SUFFIXES
from hanok.data.sources import SUFFIXES, find_files, read_documents, walk
from hanok.errors import HanokError
from hanok.models import catalog
from hanok.models.family import Family
from hanok.text.tokenizer import Tokenizer
from hanok.text.tokenizer import train as train_tokenizer
from hanok.train.carry import carries
from hanok.train.data_of_run import is_built
from hanok.train.optim import BESIDE_MUON
from hanok.train.recipe import TrainRecipe

VOCABULARIES = (1024, 2048, 4096, 8192, 16384)
"""Tokens that a new tokenizer may have."""
SAMPLE = 1 << 20
"""Bytes of the text from which its difficulty and its tokens' length are told."""


# ---- the loss ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Law:
    """L = least + size / N^alpha + data / D^beta, in bits a byte. N: parameters that are no embedding, D: bytes of text that are new."""
    least: float
    size: float
    alpha: float
    data: float
    beta: float
    vocabulary: float                        # of 4096 / V, a factor of the data's term: fewer tokens learn more slowly from as many bytes
    critical: float                          # tokens an update at which a byte is worth half of what it is in small updates
    zlib: float                              # bits a byte that zlib needs for the text that it was fitted to; other texts are scaled by theirs
    spread: float                            # of the residuals' logarithms, one standard deviation
    source: str


LAW = Law(0.554, 10.6, 0.3076, 60.0, 0.3015, 0.089, 10500.0, 1.889, 0.03, "10 runs of qwen3 on the Python standard library, 0.1M to 3.2M inner "
          "parameters, 0.4M to 4.9M tokens (docs/log.md; benchmarks/law.py)")
"""The constants, and where they come from. Residuals have a standard deviation of 0.8 %, and with seven later runs, up to ten minutes of a core,
2.1 % (3 x 128 after 3,600 updates beat it by 7.9 %); the spread is larger for other texts."""
PAIRED = 5
"""Bytes of memory for each byte of a file of pairs: short texts are Python's objects for the most part."""
MOST_MEASURED = 8192
"""Tokens of vocabulary beyond which nothing more is expected of it."""
HALF_LIFE = 15.4
"""R* of Muennighoff et al.: after so many repetitions a text has given 63 % of all that repeating gives."""


def new_bytes(n_bytes: float, unique: float) -> float:
    """What reading `n_bytes` of a text of `unique` bytes is worth, in bytes never read before."""
    if n_bytes <= unique:
        return n_bytes
    return unique + unique * HALF_LIFE * (1 - math.exp(-(n_bytes / unique - 1) / HALF_LIFE))


def expected_bits(law: Law, n_inner: float, n_bytes: float, unique: float, tokens_per_update: float, vocab_size: int, text_zlib: float) -> float:
    """The validation loss of a run, in bits a byte."""
    worth = new_bytes(n_bytes, unique) / (1 + tokens_per_update / law.critical)
    of_data = law.data * worth ** -law.beta * (4096 / min(vocab_size, MOST_MEASURED)) ** law.vocabulary
    return (law.least + law.size * n_inner ** -law.alpha + of_data) * text_zlib / law.zlib


# ---- rates ---------------------------------------------------------------------------------------------------
@cache
def is_recurrent(name: str) -> bool:
    """Whether a family's language model carries a state: its matrices are AdamW's, with short rows and many of them."""
    family = catalog.family(name)
    return carries(empty_model(family, next(iter(family.presets.values()))))


def peak_rate(family: Family, d_model: int) -> float:
    """The peak of a model of this width: the recipes', tuned at 128 (AdamW's, of recurrences, at 256), with the root of the width below and above."""
    rate, width = (3e-3, 256) if is_recurrent(family.name) else (TrainRecipe().learning_rate, 128)
    return float(f"{rate * (width / d_model) ** 0.5:.3g}")


def warmup(steps: int) -> int:
    """Updates until the peak: a twentieth of the run, 10 to 100."""
    return max(10, min(100, steps // 20))


def learning(family: Family, d_model: int, steps: int) -> dict[str, Any]:
    """What of a recipe's defaults is another for a family, a width and a number of updates."""
    rate = peak_rate(family, d_model)
    told = {"learning_rate": rate, "warmup_steps": warmup(steps)}
    if not is_recurrent(family.name):
        return told
    return {**told, "optimizer": "adamw", "weight_decay": 0.0, "embedding_learning_rate": float(f"{BESIDE_MUON * rate:.3g}")}


# ---- the text ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Text:
    """What of a text a plan depends on."""
    n_bytes: float                           # that are trained on
    n_documents: int
    zlib: float                              # bits a byte that zlib needs for it
    lengths: tuple[tuple[int, float], ...]   # tokens of a vocabulary -> bytes a token; in between they grow with the vocabulary's logarithm
    vocab_size: int | None = None            # of a tokenizer that is given
    held: float = 0.0                        # bytes of text in the memory of the run's process; none of a built corpus

    def bytes_per_token(self, vocab_size: int) -> float:
        (small, short), (large, long) = self.lengths[0], self.lengths[-1]
        if small == large:
            return short
        return short + (long - short) * math.log(vocab_size / small) / math.log(large / small)


LIBRARY = Text(13e6, 800, LAW.zlib, ((1024, 2.6), (16384, 3.9)), held=13e6)
"""A text like the Python standard library: what a plan without a text is made for."""


def survey(settings: Mapping[str, Mapping[str, Any]]) -> Text:
    """The text that the settings name, from its files' sizes and a sample. HanokError as its readers'."""
    data, told = settings.get("data", {}), settings.get("tokenizer", {})
    built = corpus_at(data["sources"])
    if built is not None:
        folder, corpus = built
        tokenizer = Tokenizer.load(folder)
        raw = tokenizer.decode(corpus.slice(0, min(len(corpus), SAMPLE // 4)).tolist()).encode()
        return of_corpus(corpus, 8 * len(zlib.compress(raw, 9)) / max(1, len(raw)))
    files = find_files(data["sources"])
    sizes = [path.stat().st_size for path in files]
    n_bytes = sum(sizes)
    sample, room, step = [], SAMPLE, max(1, min(len(files), n_bytes // SAMPLE))       # files from all over the text
    for document in read_documents([path for first in range(step) for path in files[first::step]], encoding=data.get("encoding", "utf-8")):
        sample.append(document.text[:max(1, room)])
        room -= len(sample[-1])
        if room <= 0:
            break
    plain = "\n".join(sample)
    raw = plain.encode()
    bits = 8 * len(zlib.compress(raw, 9)) / len(raw)
    wider = len(raw) / max(1, len(plain.encode(data.get("encoding", "utf-8"), "replace")))                  # in UTF-8 than in the files
    kept = n_bytes * wider * (1 - float(data.get("validation", 0.02)))
    held = held_by(sizes) * wider * sum(map(sys.getsizeof, sample)) / len(raw)
    if told.get("path"):
        tokenizer = Tokenizer.load(Path(told["path"]))
        return Text(kept, len(files), bits, ((tokenizer.vocab_size, length_of(tokenizer, plain)),), tokenizer.vocab_size, held)
    learned, seen = plain[:len(plain) * 3 // 4], plain[len(plain) * 3 // 4:]
    lengths = []
    for vocab_size in (VOCABULARIES[0], VOCABULARIES[-1]):
        with suppress(HanokError):                                                    # too little text for so many
            tokenizer = train_tokenizer(told.get("kind", "bpe"), [learned], vocab_size)
            lengths.append((tokenizer.vocab_size, length_of(tokenizer, seen)))
    return Text(kept, len(files), bits, tuple(lengths) or ((VOCABULARIES[0], 2.0),), held=held)


def held_by(sizes: Sequence[float]) -> float:
    """Bytes in memory of files of such sizes: one that is more than half of all is there a second time, while it is cut into two sides."""
    return sum(sizes) + max(x if 2 * x > sum(sizes) else 0.0 for x in sizes)


def unread(sources: Sequence[str], paired: bool = False) -> Text:
    """The text, or the pairs, as their files' sizes alone tell it: enough for memory and disk."""
    built = corpus_at(sources)
    if built is not None:
        return of_corpus(built[1], LAW.zlib)
    files = [path for source in map(Path, sources) for path in (walk(source, PAIR_SUFFIXES if paired else SUFFIXES) if source.is_dir() else [source])]
    sizes = [path.stat().st_size for path in files if path.is_file()] or [1]
    return Text(float(max(1, sum(sizes))), len(sizes), LAW.zlib, LIBRARY.lengths, held=PAIRED * sum(sizes) if paired else held_by(sizes))


def corpus_at(sources: Sequence[str]) -> tuple[Path, Corpus] | None:
    """The built corpus that the one source is, if it is one."""
    folder = Path(sources[0])
    if len(sources) != 1 or not is_built(folder):
        return None
    return folder, Corpus.open(folder / "train")


def of_corpus(corpus: Corpus, bits: float) -> Text:
    """A text that stands as tokens already."""
    info = corpus.info
    return Text(info.bytes, info.documents, bits, ((info.vocab_size, info.bytes / max(1, info.tokens)),), info.vocab_size)


def length_of(tokenizer: Tokenizer, text: str) -> float:
    """Bytes a token."""
    return len(text.encode()) / max(1, len(tokenizer.encode(text)))
