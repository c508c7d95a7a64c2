"""From a recipe to what a run reads: tokenizer, corpora, sizes, and for each objective the loader that trains and the windows that evaluate.

What a model learns follows from its family, from the files, and from `data.objective`: decoders go on, encoders fill in; an encoder-decoder writes
targets where the files hold pairs, and what was cut out where they hold text. Recurrent language models read parallel streams with a carried state.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hanok import runtime
from hanok.bundle.bundle import Generation, empty_model
from hanok.config import from_dict, to_dict
from hanok.contracts import Batch
from hanok.data.corpus import END_OF_TEXT, Corpus, cached_corpus
from hanok.data.loader import Loader, windows
from hanok.data.objectives import Objective, causal, masked, prefix, seq2seq, span_corruption
from hanok.data.pair_loader import PairLoader, fitting, pair_windows
from hanok.data.pairs import PAIR_SUFFIXES, Columns, PairCorpus, TextPair, cached_pairs, find_pairs, read_pairs, split_pairs
from hanok.data.sources import Document, hash_sources, read_documents, split, walk
from hanok.data.spans import noise_counts, tokens_for
from hanok.data.streams import Streams, stream_windows
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.models import catalog
from hanok.models.family import Family
from hanok.text.tokenizer import Tokenizer
from hanok.text.tokenizer import train as train_tokenizer
from hanok.train.carry import Carry, carries
from hanok.train.recipe import Recipe

Say = Callable[[str], None]
ABLE = {"causal": ("causal",), "masked": ("masked",), "seq2seq": ("seq2seq", "span_corruption", "prefix")}
"""What a family of each objective can learn; the first is its own."""
END = (*END_OF_TEXT, "[SEP]")
START = ("[CLS]", "<s>", "<bos>", "<pad>")
PAD = ("<pad>", "[PAD]", "<|pad|>")
MASK = ("[MASK]", "<mask>", "<|mask|>")
"""Special tokens by their use, the first that is there counts. T5's decoder begins with <pad>; what has none of START begins with its end."""
VALIDATION_STREAMS = 16
"""Rows side by side in which recurrent models are evaluated, however they are trained: where streams begin, nothing was read before."""


@dataclass
class RunData:
    """Everything that a run reads."""
    recipe: Recipe
    family: Family
    config: Any                                          # the model's sizes
    tokenizer: Tokenizer
    objective: str
    seq_len: int                                         # positions a row at most
    train: Any                                           # Corpus; of pairs PairCorpus
    validation: Any
    sources: list[dict[str, Any]]                        # path, bytes and sha256 of each file
    documents: list[Document]                            # training text; of pairs and of a built corpus none
    held_out: list[Document]
    recurrent: bool                                      # whether a state is carried from batch to batch

    @property
    def generation(self) -> Generation:
        """How a model that learned this is asked."""
        if self.objective == "causal":
            end = self.train.info.end_id
            return Generation(stop_ids=() if end is None else (end,), pad_id=end or 0)
        known = roles(self.tokenizer)
        if self.objective == "masked":
            return Generation(pad_id=known.pad_id, add_special=True)
        return Generation((known.end_id,), (known.start_id,), known.pad_id, add_special=True)

    def loader(self, rank: int = 0, n_ranks: int = 1) -> Loader | Streams | PairLoader:
        """The endless batches of train.micro_batch_size rows that are trained on, with state() and restore()."""
        told, rows = self.recipe.train, self.recipe.train.micro_batch_size
        common: dict[str, Any] = {"batch_size": rows, "seed": told.seed, "rank": rank, "n_ranks": n_ranks}
        if self.objective == "seq2seq":
            return PairLoader(self.train, objective=self._of_pairs(), batch_tokens=self.recipe.data.batch_tokens, max_len=self.seq_len,
                              rows_per_update=rows * told.grad_accum_steps * n_ranks, **common)
        if self.recurrent:
            return Streams(self.train, seq_len=self.seq_len, n_parts=told.grad_accum_steps, **common)
        objective, n_tokens = self._of_rows()
        return Loader(self.train, seq_len=n_tokens, objective=objective, ahead=int(self.objective == "causal"), **common)

    def windows(self) -> Iterator[Batch]:
        """About train.eval_tokens tokens from all over the validation data, always the same ones; read them with `reader_of`."""
        told: dict[str, Any] = {"batch_size": self.recipe.train.micro_batch_size}
        most = self.recipe.train.eval_tokens
        if self.objective == "seq2seq":
            return pair_windows(self.validation, most, objective=self._of_pairs(), max_len=self.seq_len, **told)
        if self.recurrent:
            return stream_windows(self.validation, self.seq_len, most, batch_size=VALIDATION_STREAMS)
        objective, n_tokens = self._of_rows()
        return windows(self.validation, n_tokens, most, objective=objective, ahead=int(self.objective == "causal"), **told)

    def hidden_of(self, model: Any) -> Any:
        """What a trainer reads with: for recurrent language models what carries their state, for encoder-decoders model.hidden as it is; None: as it
        chooses.

        Pairs differ in length. Once a compiler has seen that lengths vary, it makes other kernels than for one length, with which a run that goes on
        would begin. Who sets train.compile = "on" takes that.
        """
        if self.recurrent:
            return Carry(model, self.recipe.train.grad_accum_steps)
        return model.hidden if self.family.kind == "encoder-decoder" and self.recipe.train.compile == "auto" else None

    def reader_of(self, model: nn.Module) -> Any:
        """What the windows are read with: the model, or one that carries a new state."""
        return Carry(model) if self.recurrent else model

    def _of_pairs(self) -> partial[Batch]:
        known = roles(self.tokenizer)
        return partial(seq2seq, start_id=known.start_id, end_id=known.end_id, pad_id=known.pad_id)

    def _of_rows(self) -> tuple[Objective, int]:
        return objective_of(self.recipe, self.objective, self.tokenizer, self.seq_len)


def data_of(recipe: Recipe, say: Say = lambda line: None) -> RunData:
    """Reads, splits and tokenises the recipe's data, and works out the model's sizes. HanokError on bad input; nothing but caches is written."""
    family = catalog.family(recipe.model.family)
    preset = catalog.preset(family.name, recipe.model.preset)
    model = empty_model(family, from_dict(family.config, {**to_dict(preset), **recipe.model.sizes}, "model.sizes"))     # before any text is read
    objective, built = chosen_objective(recipe, family), built_corpus(recipe)
    paired = objective == "seq2seq"
    documents: list[Document]
    held_out: list[Document]
    pairs: tuple[list[TextPair], list[TextPair]] | None
    if built is not None:
        documents, held_out, pairs, tokenizer = [], [], None, tokenizer_of_built(recipe, built, objective)
    else:
        documents, held_out, pairs = pair_texts(recipe, say) if paired else (*plain_texts(recipe, say), None)
        others = [Document("", text) for pair in pairs[1] for text in (pair.source, pair.target)] if pairs else held_out
        tokenizer = tokenizer_of(recipe, documents, say, objective, others)
    sizes = {**to_dict(preset), "vocab_size": tokenizer.vocab_size, "max_seq_len": recipe.data.seq_len or preset.max_seq_len, **recipe.model.sizes}
    config: Any = from_dict(family.config, sizes, "model.sizes")
    if recipe.data.seq_len and recipe.data.seq_len > config.max_seq_len:
        raise ConfigError(f"data.seq_len is {recipe.data.seq_len}, model.sizes.max_seq_len {config.max_seq_len}; a row has to fit into the context")
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"model.sizes.vocab_size is {config.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens; leave it out")
    seq_len = recipe.data.seq_len or config.max_seq_len
    check_objective(recipe, objective, tokenizer, seq_len)
    paths = find_pairs(recipe.data.sources) if paired else [Path(source) for source in recipe.data.sources]
    sources = hash_sources(paths)
    if pairs is not None:
        folder = runtime.cache_dir("pairs")
        train, validation = (cached_pairs(side, tokenizer, folder) for side in pairs)
        tell_of_long_pairs((train, validation), seq_len, say)
        return RunData(recipe, family, config, tokenizer, objective, seq_len, train, validation, sources, [], [], False)
    corpora = (corpus_of(documents, tokenizer, sources), corpus_of(held_out, tokenizer, sources)) if built is None else opened_sides(built, tokenizer)
    if len(corpora[1]) < 2:
        larger = "data.validation" if built is None else "--validation to `hanok corpus build`"
        raise DataError(f"the validation text is a single token; give more text or a larger {larger}")
    return RunData(recipe, family, config, tokenizer, objective, seq_len, *corpora, sources, documents, held_out,
                   objective == "causal" and carries(model))


def tell_of_long_pairs(sides: Sequence[PairCorpus], seq_len: int, say: Say) -> None:
    """One line where pairs are left out. DataError where a side has none left."""
    n_pairs, n_fitting = sum(map(len, sides)), sum(len(fitting(side, seq_len)) for side in sides)
    if n_fitting < n_pairs:
        say(f"left out {n_pairs - n_fitting:,} of {n_pairs:,} pairs: their source, or their target with its end, has more than data.seq_len = "
            f"{seq_len} tokens")


def chosen_objective(recipe: Recipe, family: Family) -> str:
    """What is learned. ConfigError for what the family cannot."""
    able, told = ABLE[family.objective], recipe.data.objective
    if told is not None and told not in able:
        raise ConfigError(f"{family.name} cannot learn by data.objective {told}; it can by {', '.join(able)}")
    if told is None and family.objective == "seq2seq" and not all(map(holds_pairs, recipe.data.sources)):
        return "span_corruption"
    return told or able[0]


def holds_pairs(source: str) -> bool:
    """Whether it is a file of pairs, or a folder with some."""
    path = Path(source)
    return not is_built(path) and bool(walk(path, PAIR_SUFFIXES)) if path.is_dir() else path.suffix.lower() in PAIR_SUFFIXES


# ---- built corpora -------------------------------------------------------------------------------------------
def is_built(path: Path) -> bool:
    """Whether `hanok corpus build` made this folder."""
    return (path / "card.json").is_file() and (path / "train" / "corpus.json").is_file()


def built_corpus(recipe: Recipe) -> Path | None:
    """The built corpus that is the recipe's text; None where it is read from files. DataError where one, or a part of one, is among the sources."""
    sources = [Path(source) for source in recipe.data.sources]
    part = next((source for source in sources if (source / "corpus.json").is_file() and is_built(source.resolve().parent)), None)
    if part is not None:
        raise DataError(f"{part} is a part of a built corpus; give the whole of it, {part.parent}")
    found = next(filter(is_built, sources), None)
    if found is not None and len(sources) > 1:
        raise DataError(f"{found} is a built corpus, and more sources stand beside it; build one corpus of all, or give it alone")
    return found


def tokenizer_of_built(recipe: Recipe, built: Path, objective: str) -> Tokenizer:
    """The tokenizer that the corpus was built with. ConfigError for another one, or for pairs."""
    if objective == "seq2seq":
        raise ConfigError(f"{built} is a built corpus: it holds texts, and seq2seq learns from pairs; leave data.objective out, or give pairs")
    tokenizer, path = Tokenizer.load(built), recipe.tokenizer.path
    if path is not None and Tokenizer.load(Path(path)).to_json() != tokenizer.to_json():
        raise ConfigError(f"tokenizer.path {path} is not the tokenizer that {built} was built with; leave it out, or build the corpus again with it")
    return tokenizer


def opened_sides(built: Path, tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """Its training and validation tokens, memory-mapped. DataError where they are damaged, or of another tokenizer."""
    train, validation = (Corpus.open(built / side) for side in ("train", "validation"))
    for side in (train, validation):
        side.check(tokenizer, hashlib.sha256(tokenizer.to_json().encode()).hexdigest())
    return train, validation


# ---- texts, tokenizer, corpora -------------------------------------------------------------------------------
def plain_texts(recipe: Recipe, say: Say) -> tuple[list[Document], list[Document]]:
    """Training and validation documents."""
    documents = list(read_documents(recipe.data.sources, encoding=recipe.data.encoding))
    train, held_out = split(documents, recipe.data.validation, recipe.train.seed)
    n_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in (document.text for document in documents))
    say(f"read {len(documents):,} documents, {n_bytes / 1e6:.1f} MB; held out {len(held_out):,} for validation")
    return train, held_out


def pair_texts(recipe: Recipe, say: Say) -> tuple[list[Document], list[Document], tuple[list[TextPair], list[TextPair]]]:
    """Training and validation pairs, and the training pairs' texts as documents that a tokenizer may learn from."""
    told = recipe.data
    columns = Columns(told.source_column, told.target_column, told.group_column, told.columns)
    pairs = list(read_pairs(told.sources, columns, told.encoding))
    train, held_out = split_pairs(pairs, told.validation, recipe.train.seed)
    say(f"read {len(pairs):,} pairs; held out {len(held_out):,} for validation" + (
        f", left out {n:,} whose source training has too" if (n := len(pairs) - len(train) - len(held_out)) else ""))
    return [Document("", text) for pair in train for text in (pair.source, pair.target)], [], (train, held_out)


def tokenizer_of(recipe: Recipe, documents: Iterable[Document], say: Say, objective: str = "causal",
                 held_out: Iterable[Document] = ()) -> Tokenizer:
    """The recipe's tokenizer: its file, or a new one trained on the beginning of the training text, with the special tokens that are needed.

    Characters are those of the text that is held out too: one that the vocabulary has not could not be read.
    """
    told = recipe.tokenizer
    if told.path is not None:
        return Tokenizer.load(Path(told.path))
    characters = told.kind == "characters"
    texts, budget = [document.text for document in (*documents, *held_out)] if characters else [], told.train_bytes
    for document in () if characters else documents:
        text = document.text.encode()[:budget]
        if not text:
            break
        texts.append(text.decode(errors="ignore"))
        budget -= len(text)
    further = [sentinel(i) for i in reversed(range(told.n_sentinels))] if objective == "span_corruption" else []
    if objective == "masked" and told.kind != "wordpiece":
        further = [MASK[0]]
    if characters:
        further = [END_OF_TEXT[0], *further]
    try:
        tokenizer = train_tokenizer(told.kind, texts, told.vocab_size, further=further)
    except TokenizerError as error:
        raise TokenizerError(f"{error}, beside {len(further)} for {objective}" if further else str(error)) from None
    say(f"trained a {told.kind} tokenizer of {tokenizer.vocab_size:,} tokens")
    return tokenizer


def corpus_of(documents: list[Document], tokenizer: Tokenizer, sources: list[dict[str, Any]]) -> Corpus:
    """The documents as token shards below HANOK_HOME; the same text and tokenizer are encoded once."""
    digest = hashlib.sha256(json.dumps([tokenizer.to_json(), [hashlib.sha256(d.text.encode()).hexdigest() for d in documents]]).encode()).hexdigest()
    return cached_corpus(documents, tokenizer, runtime.cache_dir("corpora") / digest[:32])


# ---- objectives ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Roles:
    """Which tokens an encoder-decoder begins with, ends with, and is padded with; `source_end_id` where the tokenizer puts it behind a text."""
    start_id: int
    end_id: int
    pad_id: int
    source_end_id: int | None


def first_of(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    """The id of the first of these special tokens that the tokenizer has."""
    return next((tokenizer.specials[name] for name in names if name in tokenizer.specials), None)


def roles(tokenizer: Tokenizer) -> Roles:
    """TokenizerError where nothing says that a text ends."""
    end_id = first_of(tokenizer, END)
    if end_id is None:
        raise TokenizerError(f"an encoder-decoder learns where to stop, and the tokenizer has no special token for it ({', '.join(END)}); train one "
                             "with it (leave tokenizer.path out)")
    pad_id, start_id = first_of(tokenizer, PAD), first_of(tokenizer, START)
    return Roles(end_id if start_id is None else start_id, end_id, end_id if pad_id is None else pad_id,
                 end_id if tokenizer.encode("", add_special=True)[-1:] == [end_id] else None)


def check_objective(recipe: Recipe, objective: str, tokenizer: Tokenizer, seq_len: int) -> None:
    """HanokError where the tokenizer lacks a token that the objective needs, or rows are too short or too long for it."""
    if objective == "seq2seq":
        roles(tokenizer)
    else:
        objective_of(recipe, objective, tokenizer, seq_len)


def objective_of(recipe: Recipe, objective: str, tokenizer: Tokenizer, seq_len: int) -> tuple[Objective, int]:
    """An objective of rows with its settings, and the tokens of the corpus that make a row which fits `seq_len`."""
    told = recipe.data
    if objective == "causal":
        return partial(causal, separate=told.separate), seq_len
    if objective == "masked":
        return masking(recipe, tokenizer, seq_len)
    known = roles(tokenizer)
    ends: dict[str, Any] = {"start_id": known.start_id, "end_id": known.end_id, "pad_id": known.pad_id, "source_end_id": known.source_end_id}
    if objective == "prefix":
        return partial(prefix, **ends), seq_len
    sentinel_ids = sentinels(tokenizer)
    n_tokens = tokens_for(seq_len, told.rate, told.mean_span_length, n_ends=int(known.source_end_id is not None))
    n_spans = noise_counts(n_tokens, told.rate, told.mean_span_length)[1]
    if n_spans > len(sentinel_ids):
        raise ConfigError(f"rows of {n_tokens} tokens are cut at {n_spans} places, and the tokenizer has {len(sentinel_ids)} sentinels; give a "
                          f"smaller data.seq_len, or train one with tokenizer.n_sentinels={n_spans}")
    return partial(span_corruption, sentinel_ids=sentinel_ids, rate=told.rate, mean_span_length=told.mean_span_length, **ends), n_tokens


def masking(recipe: Recipe, tokenizer: Tokenizer, seq_len: int) -> tuple[Objective, int]:
    """`masked` for this tokenizer; [CLS] and [SEP] stand around a row where both are there."""
    mask_id = first_of(tokenizer, MASK)
    if mask_id is None:
        raise TokenizerError(f"the masked objective hides tokens behind a special one, and the tokenizer has none ({', '.join(MASK)}); train one "
                             "with it (leave tokenizer.path out)")
    first, last = first_of(tokenizer, ("[CLS]",)), first_of(tokenizer, ("[SEP]",))
    around = None if first is None or last is None else (first, last)
    n_tokens = seq_len - (2 if around else 0)
    if n_tokens < 1:
        raise ConfigError(f"data.seq_len is {seq_len}; [CLS], [SEP] and a token between them need 3 at least")
    ordinary = np.ones(tokenizer.vocab_size, bool)
    ordinary[list(tokenizer.specials.values())] = False
    return partial(masked, mask_id=mask_id, ordinary=ordinary, rate=recipe.data.rate, around=around, separate=recipe.data.separate,
                   continues=continues_word(tokenizer) if recipe.data.whole_words else None), n_tokens


def continues_word(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) True = goes on with a word: BERT's ##pieces, or of other kinds what does not begin with white space."""
    if tokenizer.kind == "wordpiece":
        return np.array([(tokenizer.token(i) or "").startswith("##") for i in range(tokenizer.vocab_size)])
    return np.array([not tokenizer.token_bytes(i)[:1].isspace() for i in range(tokenizer.vocab_size)])


def sentinel(i: int) -> str:
    """T5's spelling."""
    return f"<extra_id_{i}>"


def sentinels(tokenizer: Tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... TokenizerError where there is none."""
    found: list[int] = []
    while (token_id := tokenizer.id_of(sentinel(len(found)))) is not None:
        found.append(token_id)
    if not found:
        raise TokenizerError("span corruption puts <extra_id_0>, <extra_id_1>, ... in place of what it cuts out, and the tokenizer has no such "
                             "tokens; train one with them (leave tokenizer.path out), or choose data.objective=prefix")
    return found
