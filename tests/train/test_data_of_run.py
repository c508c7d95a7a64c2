"""Every family of the catalog finds its data, learns from it and is evaluated on it; what does not fit is told before anything is encoded."""
from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hanok.contracts import IGNORE_INDEX
from hanok.data.loader import Loader
from hanok.data.pair_loader import PairLoader
from hanok.data.pairs import find_pairs
from hanok.data.streams import Streams
from hanok.errors import ConfigError, DataError, HanokError, TokenizerError
from hanok.evaluate.score import byte_lengths, score_batches
from hanok.models import catalog
from hanok.nn.loss import token_cross_entropy
from hanok.train.data_of_run import continues_word, data_of, roles
from hanok.train.optim import optimizers
from hanok.train.pretrain import Pretraining, prepare
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.resume import resume
from hanok.train.trainer import Trainer
from tiny import prose, tokenizer, write_prose

SMALL = {"d_model": 32, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_head": 16, "d_ff": 64}
DECODERS = [name for name, family in catalog.FAMILIES.items() if family.objective == "causal"]
BOTH = [name for name, family in catalog.FAMILIES.items() if family.objective == "seq2seq"]
WORDS = [line.split() for line in prose(2000).splitlines() if len(line.split()) > 2]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return str(write_prose(tmp_path_factory.mktemp("text"), 3, 300))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A target is its source backwards."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("".join(f"{n // 9}\t{' '.join(words)}\t{' '.join(words[::-1])}\n" for n, words in enumerate(WORDS)), encoding="utf-8")
    return str(path)


def test_characters_are_those_of_all_text(tmp_path):
    """A character that only held-out text has would be refused there; documents still end."""
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(f"the house {n}\n" * 20, encoding="utf-8")
    made = data_of(recipe("llama", str(tmp_path), kind="characters"))
    assert made.tokenizer.kind == "characters" and list(made.tokenizer.specials) == ["<|endoftext|>"] and len(made.held_out) > 0
    assert made.config.vocab_size == made.tokenizer.vocab_size == len(set("the house 0123456789\n")) + 1
    assert made.validation.slice(len(made.validation) - 1, len(made.validation)).tolist() == [made.tokenizer.vocab_size - 1]
    lines = "".join(f"{letter} one\tone {letter}\n" for letter in "abcdefghij" * 3)
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + lines)
    paired = data_of(replace(recipe("transformer", str(tmp_path / "pairs.tsv"), kind="characters"),
                             data=DataRecipe((str(tmp_path / "pairs.tsv"),), validation=0.3, seq_len=24)))
    assert paired.tokenizer.vocab_size == len(set("abcdefghij one")) + 1


def recipe(family: str, source: str, *, kind: str = "bpe", sentinels: int = 8, steps: int = 2, **data) -> Recipe:
    preset = catalog.FAMILIES[family].presets["tiny"]
    sizes = {name: size for name, size in SMALL.items() if hasattr(preset, name)}
    told = {"validation": 0.1, "seq_len": 24, **({"columns": ("file", "source", "target"), "group_column": "file"} if source.endswith("tsv") else {})}
    return Recipe(ModelRecipe(family, sizes=sizes), TokenizerRecipe(kind=kind, vocab_size=420, n_sentinels=sentinels),
                  DataRecipe((source,), **{**told, **data}), TrainRecipe(steps=steps, micro_batch_size=4, eval_tokens=200))


def learn(data, steps: int = 3) -> tuple[float, float]:
    """The validation loss of fresh weights and after a few updates."""
    torch.manual_seed(0)
    model = data.family.build(data.config)
    optimizer, loader = torch.optim.AdamW(model.parameters(), 1e-2), data.loader()
    read, lengths = data.hidden_of(model) or model.hidden, byte_lengths(data.tokenizer)

    def score() -> float:
        model.eval()
        found = score_batches(data.reader_of(model), data.windows(), lengths)
        model.train()
        return found.loss

    before = score()
    for batch in itertools.islice(loader, steps):
        loss, n = token_cross_entropy(read(batch), batch.targets, model.head)
        (loss / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert max(batch.token_ids.size(1), batch.source_ids.size(1) if batch.source_ids is not None else 0) <= data.seq_len
    return before, score()


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_learn_from_the_next_token(family, text):
    data = data_of(recipe(family, text))
    assert data.objective == "causal" and isinstance(data.loader(), Streams if family in ("rnn", "lstm", "gru") else Loader)
    before, after = learn(data)
    assert after < before
    end = data.tokenizer.id_of("<|endoftext|>")
    assert data.generation.stop_ids == (end,) and data.generation.start_ids == () and not data.generation.add_special


@pytest.mark.parametrize("family", BOTH)
def test_encoder_decoders_learn_pairs(family, pairs):
    data = data_of(recipe(family, pairs))
    assert data.objective == "seq2seq" and isinstance(data.loader(), PairLoader) and data.documents == []
    before, after = learn(data)
    assert after < before
    batch, end = next(data.windows()), data.tokenizer.id_of("<|endoftext|>")
    assert (batch.token_ids[:, 0] == end).all() and data.generation.start_ids == data.generation.stop_ids == (end,)
    source, target = (values[0][values[0] >= 0].tolist() for values in (batch.source_ids, batch.targets))
    assert data.tokenizer.decode(source).split() == data.tokenizer.decode(target).split()[::-1]


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("objective", [None, "prefix"])
def test_encoder_decoders_learn_from_plain_text(family, objective, text):
    data = data_of(recipe(family, text, objective=objective))
    assert data.objective == objective or (objective is None and data.objective == "span_corruption")
    before, after = learn(data)
    assert after < before


def test_t5_reads_its_own_tokens(text):
    """Unigram with T5's specials: sentinels from the highest id down, <pad> begins, </s> ends both sides."""
    data = data_of(recipe("t5", text, kind="unigram"))
    words, batch = data.tokenizer, next(data.loader())
    last = words.vocab_size - 1
    assert [words.id_of(f"<extra_id_{n}>") for n in range(8)] == list(range(last, last - 8, -1)) and words.vocab_size <= 420
    assert words.specials["<extra_id_7>"] == last - 7 and last in words.encode("<extra_id_0>", parse_special=True)
    assert last not in words.encode("<extra_id_0>") and words.token_bytes(last) == b""
    assert words.decode(words.encode("the house")).strip() == "the house"
    assert (batch.token_ids[:, 0] == words.id_of("<pad>")).all() and batch.source_ids.size(1) <= 24
    for row in range(4):
        source = batch.source_ids[row][batch.source_ids[row] != 0].tolist()
        assert source[-1] == words.id_of("</s>") and last in source and batch.targets[row][0] == last
    assert data.generation.start_ids == (0,) and data.generation.stop_ids == (words.id_of("</s>"),) and data.generation.add_special


@pytest.mark.parametrize(("kind", "whole_words", "separate"), [("wordpiece", True, False), ("bpe", False, True), ("unigram", True, True)])
def test_bert_fills_in(kind, whole_words, separate, text):
    data = data_of(recipe("bert", text, kind=kind, whole_words=whole_words, separate=separate))
    batch, words = next(data.loader()), data.tokenizer
    mask = words.id_of("[MASK]")
    assert data.objective == "masked" and (batch.token_ids == mask).any() and mask not in batch.targets
    several = [one for one in itertools.islice(data.loader(), 40) if one.document_ids is not None]
    assert bool(several) == separate and len(several) < 40 and batch.token_ids.size(1) == 24
    if kind == "wordpiece":
        assert (batch.token_ids[:, 0] == words.id_of("[CLS]")).all() and data.generation.pad_id == words.id_of("[PAD]")
    before, after = learn(data)
    assert after < before
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(data.windows(), data.windows(), strict=True)), "evaluation is always the same"


def test_which_tokens_go_on_with_a_word():
    for kind in ("bpe", "wordpiece", "unigram"):
        words = tokenizer(kind, 420)
        table = continues_word(words)
        ids = words.encode("the house stands")
        begins = [words.decode(ids[:n + 1]).count(" ") != words.decode(ids[:n]).count(" ") for n in range(1, len(ids))]
        assert [not table[token] for token in ids[1:]] == begins and table.any() and not table.all()


def test_a_state_of_the_loader_is_plain_and_goes_on(text, pairs):
    for family, source in (("qwen3", text), ("lstm", text), ("t5", text), ("bert", text), ("transformer", pairs)):
        data = data_of(recipe(family, source))
        loader, resumed = data.loader(), data.loader()
        for _ in range(7):
            next(loader)
        resumed.restore(json.loads(json.dumps(loader.state())))
        for one, other in itertools.islice(zip(loader, resumed), 5):
            assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.targets, other.targets)


def test_a_loader_does_not_care_how_an_update_is_split(text, pairs):
    for family, source in (("bert", text), ("t5", text), ("transformer", pairs)):
        told = recipe(family, source)
        whole = data_of(told).loader()
        parts = data_of(replace(told, train=replace(told.train, micro_batch_size=2, grad_accum_steps=2))).loader()
        for batch in itertools.islice(whole, 12):
            asked = [sorted(batch.targets[row][batch.targets[row] != IGNORE_INDEX].tolist()) for row in range(4)]
            halves = [next(parts), next(parts)]
            assert asked == [sorted(half.targets[row][half.targets[row] != IGNORE_INDEX].tolist()) for half in halves for row in range(2)]


def test_tokens_may_bound_a_batch_of_pairs(pairs):
    data = data_of(recipe("transformer", pairs, batch_tokens=90))
    sizes = [(len(batch.token_ids), batch.token_ids.size(1) + batch.source_ids.size(1)) for batch in itertools.islice(data.loader(), 20)]
    assert all(rows * width <= 90 for rows, width in sizes) and len({rows for rows, _ in sizes}) > 2


# ---- what is refused

def refused(told: Recipe, error: type[HanokError]) -> str:
    with pytest.raises(error) as caught:
        data_of(told)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("family", "objective", "told"), [
    ("qwen3", "masked", "qwen3 cannot learn by data.objective masked; it can by causal"),
    ("bert", "causal", "bert cannot learn by data.objective causal; it can by masked"),
    ("t5", "causal", "t5 cannot learn by data.objective causal; it can by seq2seq, span_corruption, prefix"),
])
def test_an_objective_of_another_family_is_refused_at_once(family, objective, told):
    assert told in refused(recipe(family, "/nowhere", objective=objective), ConfigError)


def test_a_token_that_the_tokenizer_lacks_is_named(text, pairs, tmp_path):
    def by(kind: str, family: str, source: str, **data) -> str:
        tokenizer(kind, 420).save(tmp_path / "tokenizer.json")
        return refused(replace(recipe(family, source, **data), tokenizer=TokenizerRecipe(path=str(tmp_path))), TokenizerError)

    assert "the tokenizer has none ([MASK], <mask>, <|mask|>); train one with it" in by("bpe", "bert", text)
    assert "span corruption puts <extra_id_0>, <extra_id_1>, ... in place of" in by("unigram", "t5", text)
    assert "rows of 28 tokens are cut at 1 places" not in by("unigram", "t5", text)
    bare = json.loads(tokenizer().to_json())
    bare["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    told = replace(recipe("transformer", pairs), tokenizer=TokenizerRecipe(path=str(tmp_path)))
    assert "learns where to stop, and the tokenizer has no special token for it (<|endoftext|>, " in refused(told, TokenizerError)


def test_what_does_not_fit_is_told(text, pairs, tmp_path):
    few = recipe("t5", text, sentinels=1, seq_len=60)
    assert "are cut at 3 places, and the tokenizer has 1 sentinels; give a smaller data.seq_len, or train one with tokenizer.n_sentinels=3" in (
        refused(few, ConfigError))
    assert "data.seq_len is 2; [CLS], [SEP] and a token between them need 3 at least" in (
        refused(recipe("bert", text, kind="wordpiece", seq_len=2), ConfigError))
    assert "has no column 'english', it has file, source, target" in refused(recipe("transformer", pairs, source_column="english"), DataError)
    assert "257 is the least for this text (256 bytes and 1 special tokens), beside 400 for span_corruption" in (
        refused(recipe("t5", text, sentinels=400), TokenizerError))
    (tmp_path / "one.jsonl").write_text('{"source": "a", "target": "b"}')
    assert "so none can be held out for validation" in refused(recipe("luong", str(tmp_path)), DataError)
    for change, told in (({"rate": 1.0}, "data.rate is 1.0; expected a number between 0 and 1"), ({"seq_len": 0}, "data.seq_len is 0; expected 1"),
                         ({"mean_span_length": 0.5}, "data.mean_span_length is 0.5"), ({"batch_tokens": -1}, "data.batch_tokens is -1")):
        with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
            recipe("t5", text, **change)


def test_roles_of_known_tokenizers():
    for kind, expected in (("bpe", ("<|endoftext|>",) * 3), ("unigram", ("<pad>", "</s>", "<pad>")), ("wordpiece", ("[CLS]", "[SEP]", "[PAD]"))):
        words = tokenizer(kind, 420)
        known = roles(words)
        assert (known.start_id, known.end_id, known.pad_id) == tuple(map(words.id_of, expected))
        assert known.source_end_id == (None if kind == "bpe" else known.end_id)


@pytest.mark.parametrize("family", ["lstm", "gru", "gpt2", "bert", "bahdanau"])
def test_how_an_update_is_split_changes_no_loss(family, text, pairs):
    """From text to loss: the batches of the loaders, 8 rows at once, 2 x 4 and 8 x 1; validation reads the same windows."""
    still = {"bert": {"dropout": 0.0, "attention_dropout": 0.0}}.get(family, {"dropout": 0.0})

    def curve(rows: int) -> tuple[list[float], float]:
        told = recipe(family, pairs if family == "bahdanau" else text, steps=12)
        told = replace(told, model=replace(told.model, sizes=told.model.sizes | still),
                       train=replace(told.train, micro_batch_size=rows, grad_accum_steps=8 // rows, learning_rate=1e-2, warmup_steps=2))
        data = data_of(told)
        torch.manual_seed(0)
        model = data.family.build(data.config)
        made = Trainer(model, optimizers(model, told.train), data.loader(), told.train, vocab_size=data.config.vocab_size,
                       hidden=data.hidden_of(model))
        losses = [made.step().loss for _ in range(12)]
        model.eval()
        return losses, score_batches(data.reader_of(model), data.windows(), byte_lengths(data.tokenizer)).loss

    (whole, validated), *others = [curve(rows) for rows in (8, 4, 1)]
    assert whole[-1] < whole[0] - 0.1
    for losses, other in others:
        assert losses == pytest.approx(whole, rel=1e-5) and other == pytest.approx(validated, rel=1e-5)


def test_a_run_inside_its_folder_of_pairs_is_not_learned_from(pairs, tmp_path):
    (tmp_path / "pairs.tsv").write_text(Path(pairs).read_text())
    told = recipe("luong", str(tmp_path), columns=("file", "source", "target"))
    Pretraining(prepare(told), tmp_path / "run").run()
    (tmp_path / "run" / "config.json").unlink()
    resume(tmp_path / "run").run()                                                    # metrics.csv is no new pairs
    again = data_of(told)
    assert [Path(source["path"]).name for source in again.sources] == ["pairs.tsv"]
    (tmp_path / "pairs.tsv").unlink()
    with pytest.raises(DataError, match="no files of pairs in this folder"):
        find_pairs([tmp_path])
    (tmp_path / "a.txt").write_text(prose(300))
    assert data_of(recipe("luong", str(tmp_path))).objective == "span_corruption"


def test_pairs_that_are_too_long_are_told(pairs):
    said: list[str] = []
    data = data_of(recipe("transformer", pairs, seq_len=14), said.append)
    lengths = [length for side in (data.train, data.validation) for length in side.lengths.tolist()]
    long = sum(source > 14 or target + 1 > 14 for source, target in lengths)
    assert 0 < long < len(lengths) and said[-1] == (f"left out {long:,} of {len(lengths):,} pairs: their source, or their target with its end, has "
                                                    "more than data.seq_len = 14 tokens")
    data_of(recipe("transformer", pairs, seq_len=300), said.append)
    assert "left out" not in said[-1]


def test_documents_are_separate_unless_told_otherwise(text):
    assert DataRecipe().separate
    assert any(batch.document_ids is not None for batch in itertools.islice(data_of(recipe("gpt2", text)).loader(), 30))
    assert all(batch.document_ids is None for batch in itertools.islice(data_of(recipe("gpt2", text, separate=False)).loader(), 30))


def test_a_folder_of_pairs_is_known(pairs):
    assert data_of(recipe("luong", str(Path(pairs).parent), columns=("file", "source", "target"))).objective == "seq2seq"
