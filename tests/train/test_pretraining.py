"""From raw text to a bundle that loads and writes: what a run measures, leaves behind, repeats to the bit, and refuses before it begins."""
from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hanok
from hanok.bundle.bundle import is_bundle, load_bundle
from hanok.bundle.weights import parameters, read_safetensors
from hanok.cli.pretrain import pretrain
from hanok.config import from_dict, read_toml
from hanok.contracts import IGNORE_INDEX, Batch
from hanok.data.sources import Document
from hanok.disk import sha256
from hanok.errors import ConfigError, DataError, HanokError
from hanok.text.tokenizer import train
from hanok.train.data_of_run import RunData, tokenizer_of
from hanok.train.pretrain import Pretraining, prepare
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from tiny import prose, tokenizer, write_prose

SIZES = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "dropout": 0.1}
TRAIN = TrainRecipe(steps=30, micro_batch_size=8, learning_rate=2e-2, warmup_steps=5, eval_every=12, eval_tokens=300, checkpoint_every=10, seed=3)
N_TOKENS = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Four files of prose."""
    return write_prose(tmp_path_factory.mktemp("text"), 4, 700)


@pytest.fixture(scope="module")
def recipe(text) -> Recipe:
    return Recipe(ModelRecipe(sizes=SIZES), TokenizerRecipe(vocab_size=320), DataRecipe((str(text),), validation=0.2, seq_len=32), TRAIN)


@pytest.fixture(scope="module")
def prepared(recipe) -> RunData:
    return prepare(recipe)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """A run that went to its end, its folder and what a callback saw."""
    out, steps = tmp_path_factory.mktemp("runs") / "run", []
    made = Pretraining(prepared, out)
    made.run(steps.append)
    return made, out, steps


def refused(error: type[HanokError], act) -> str:
    with pytest.raises(error) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


def rows(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def unigram_nats(seen: list[int], held_out: list[int], vocab_size: int) -> float:
    """Nats a token of a model that knows how frequent each token is (add-one)."""
    counts = Counter(seen)
    return -sum(math.log((counts[token] + 1) / (len(seen) + vocab_size)) for token in held_out) / len(held_out)


# ---- a whole run

def test_the_model_learns_more_than_frequencies(finished):
    made, _, steps = finished
    seen, held_out = (corpus.slice(0, len(corpus)).tolist() for corpus in (made.prepared.train, made.prepared.validation))
    assert made.validation.loss < unigram_nats(seen, held_out[1:N_TOKENS + 1], 320) - 0.2
    assert steps[-1].loss < steps[0].loss - 2 and [step.step for step in steps] == list(range(1, 31))


def test_the_bundle_loads_and_writes(finished, recipe, text):
    made, out, _ = finished
    files = "README.md checkpoints config.json generation.json loss.png manifest.json metrics.csv model.safetensors recipe.toml tokenizer.json"
    assert is_bundle(out) and sorted(path.name for path in out.iterdir()) == files.split()
    loaded = hanok.load(out)
    assert loaded.family.name == "qwen3" and loaded.config.vocab_size == 320 and loaded.config.max_seq_len == 32 and loaded.config.d_model == 32
    answer = loaded.generate("the house", max_new_tokens=8)
    assert answer.token_ids and answer.finish_reason in ("stop", "length")
    words = loaded.tokenizer
    assert loaded.bundle.generation.stop_ids == (words.id_of("<|endoftext|>"),) == (loaded.bundle.generation.pad_id,)
    manifest = loaded.bundle.manifest
    assert from_dict(Recipe, manifest["recipe"]) == recipe and manifest["seed"] == 3
    assert manifest["data"]["files"] == 4 and manifest["data"]["bytes"] == sum(path.stat().st_size for path in text.iterdir())
    assert [source["sha256"] for source in manifest["data"]["first"]] == [sha256(text / f"{n}.txt") for n in range(4)]
    assert manifest["weights_sha256"] == sha256(out / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(parameters(made.model).values(), parameters(loaded.bundle.model).values(), strict=True))


def test_the_validation_numbers_equal_a_recomputation(finished):
    """Window by window from the bundle on disk, logits in full."""
    made, out, _ = finished
    bundle, asked = load_bundle(out), [pair for window in evaluated(made.prepared) for pair in window]
    nats = n_bytes = 0.0
    for window in evaluated(made.prepared):
        with torch.no_grad():
            likely = bundle.model(Batch(torch.tensor([[token for token, _ in window]])))[0].log_softmax(-1)
        nats -= sum(likely[i, target].item() for i, (_, target) in enumerate(window))
        n_bytes += sum(len(bundle.tokenizer.token_bytes(target)) for _, target in window)
    n_tokens = len(asked)
    loss, bits_per_byte = pytest.approx(nats / n_tokens, abs=1e-4), pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)
    metrics, last = bundle.manifest["metrics"], rows(out)[-1]
    assert (metrics["validation_loss"], metrics["validation_bits_per_byte"]) == (loss, bits_per_byte)
    assert (float(last["validation_loss"]), float(last["bits_per_byte"])) == (loss, bits_per_byte)
    assert float(last["perplexity"]) == pytest.approx(math.exp(nats / n_tokens), rel=1e-4)
    assert made.validation.tokens == n_tokens >= N_TOKENS and metrics["steps"] == 30
    assert metrics["tokens"] == int(last["tokens"]) == steps_tokens(made)


def evaluated(prepared: RunData) -> list[list[tuple[int, int]]]:
    """(token, what it is asked for), window by window."""
    return [[(token, target) for token, target in zip(tokens, targets) if target != IGNORE_INDEX] for batch in prepared.windows()
            for tokens, targets in zip(batch.token_ids.tolist(), batch.targets.tolist())]


def steps_tokens(made: Pretraining) -> int:
    """The targets of 30 steps, drawn once more; an epoch's first and last rows are shorter."""
    loader = made.prepared.loader()
    return sum(int((next(loader).targets != IGNORE_INDEX).sum()) for _ in range(30))


def test_an_evaluation_sees_all_of_the_held_out_text(finished):
    """Few windows, spread evenly, the same each time."""
    prepared = finished[0].prepared
    line, windows = prepared.validation.slice(0, len(prepared.validation)).tolist(), evaluated(prepared)
    places = [next(i for i in range(len(line) - 32) if line[i:i + 32] == [token for token, _ in window]) for window in windows]
    assert windows == evaluated(prepared) and len(windows) == -(-N_TOKENS // 32)
    assert places[0] < len(line) / 8 and places[-1] > 7 * len(line) / 8 - 64


def test_numbers_and_checkpoints_come_when_it_is_time(finished):
    _, out, steps = finished
    table = rows(out)
    assert [int(row["step"]) for row in table] == [*range(1, 11), 12, 20, 24, 30]
    assert [int(row["step"]) for row in table if row["validation_loss"]] == [12, 24, 30]
    for before, row in zip([{"step": 0}, *table], table):                             # the mean over the updates since the last row
        since = [step.loss for step in steps[int(before["step"]):int(row["step"])]]
        assert float(row["loss"]) == pytest.approx(sum(since) / len(since), rel=1e-5)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    last = out / "checkpoints" / "step-00000030"
    state = json.loads((last / "state.json").read_text())
    assert state["step"] == 30 and state["trainer"]["tokens"] == steps_tokens(finished[0]) and state["trainer"]["seconds"] > 0
    assert state["batches"]["loader"]["seq_len"] == 32 and state["batches"]["number"] == 30
    model, bundle = read_safetensors(last / "model.safetensors"), read_safetensors(out / "model.safetensors")
    assert model.keys() == bundle.keys() and all(torch.equal(model[name], bundle[name]) for name in model)


def test_the_recipe_reads_back(finished, recipe):
    told = read_toml(finished[1] / "recipe.toml")
    assert told.pop("begun") == {"folder": str(Path.cwd())}
    assert list(told.pop("sources").values()) == [sha256(Path(text) / f"{n}.txt") for text in recipe.data.sources for n in range(4)]
    assert from_dict(Recipe, told) == recipe


def test_the_same_seed_gives_the_same_weights_to_the_bit(prepared, tmp_path):
    def weights(seed: int, name: str) -> dict[str, torch.Tensor]:
        told = replace(TRAIN, steps=4, eval_every=2, checkpoint_every=0, seed=seed)
        Pretraining(replace(prepared, recipe=replace(prepared.recipe, train=told)), tmp_path / name).run()
        return read_safetensors(tmp_path / name / "model.safetensors")

    first, again, other = weights(5, "first"), weights(5, "again"), weights(6, "other")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.token.weight"], other["embed.token.weight"])
    assert sorted(path.name for path in (tmp_path / "first" / "checkpoints").iterdir()) == ["step-00000004"]


def test_text_and_tokenizer_are_encoded_once(prepared, recipe):
    again = prepare(recipe)
    assert again.train.path == prepared.train.path and again.tokenizer.to_json() == prepared.tokenizer.to_json()
    assert prepare(replace(recipe, tokenizer=TokenizerRecipe(vocab_size=300))).train.path != prepared.train.path


def test_an_interruption_leaves_a_checkpoint_and_no_bundle(prepared, tmp_path):
    def stop(step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    made = Pretraining(prepared, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        made.run(stop)
    out = tmp_path / "run"
    assert not is_bundle(out) and sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "metrics.csv", "recipe.toml", "tokenizer.json"]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000003" and json.loads((checkpoint / "state.json").read_text())["step"] == 3
    saved = read_safetensors(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in parameters(made.model).items())
    assert [row["step"] for row in rows(out)] == ["1", "2", "3"]


def test_time_that_is_up_ends_with_a_bundle_and_its_numbers(prepared, tmp_path):
    told = replace(TRAIN, steps=500, seconds=1e6, eval_every=500)
    made = Pretraining(replace(prepared, recipe=replace(prepared.recipe, train=told)), tmp_path / "run")

    def clock(step) -> None:
        if step.step == 2:
            made.trainer.seconds = 999_999.999                                            # the third step passes it

    bundle = made.run(clock)
    assert bundle.manifest["metrics"]["steps"] == 3 and "validation_loss" in bundle.manifest["metrics"] and is_bundle(tmp_path / "run")


# ---- other families, other tokenizers

@pytest.mark.parametrize(("kind", "end"), [("unigram", "</s>"), ("wordpiece", None)])
def test_what_ends_a_document_ends_an_answer(kind, end, recipe, tmp_path):
    tokenizer(kind, 400).save(tmp_path / "tokenizer.json")
    sizes = {name: size for name, size in SIZES.items() if name != "n_kv_heads"}
    made = prepare(replace(recipe, tokenizer=TokenizerRecipe(path=str(tmp_path)), model=ModelRecipe("gpt2", sizes=sizes)))
    generation = Pretraining(made, tmp_path / "run").bundle().generation
    assert generation.stop_ids == (() if end is None else (made.tokenizer.id_of(end),))
    if end is not None:
        assert made.train.slice(len(made.train) - 1, len(made.train)).tolist() == [made.tokenizer.id_of(end)]


def test_a_tokenizer_sees_no_more_bytes_than_it_is_told(text, recipe):
    seen = (text / "0.txt").read_bytes()[:2001].decode(errors="ignore")
    told = replace(recipe, tokenizer=TokenizerRecipe(vocab_size=320, train_bytes=2001))
    made = tokenizer_of(told, [Document("a", (text / "0.txt").read_text()), Document("b", "z" * 99)], lambda line: None)
    assert made.to_json() == train("bpe", [seen], 320).to_json()


def test_a_file_whose_name_is_no_unicode_can_be_learned_from(recipe, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"b.txt"):
        with open(os.path.join(os.fsencode(folder), name), "w", encoding="utf-8") as file:
            file.write(prose(300, seed=len(name)))
    told = replace(recipe, data=replace(recipe.data, sources=(str(folder),)), train=replace(TRAIN, steps=1))
    Pretraining(prepare(told), tmp_path / "run").run()
    assert "caf?.txt" in (tmp_path / "run" / "recipe.toml").read_text() and read_toml(tmp_path / "run" / "recipe.toml")
    assert [Path(source["path"]).name for source in load_bundle(tmp_path / "run").manifest["data"]["first"]] == ["b.txt", "caf?.txt"]


# ---- what is refused

@pytest.mark.parametrize(("family", "objective", "able"), [
    ("bert", "causal", "masked"), ("gpt2", "masked", "causal"), ("t5", "causal", "seq2seq, span_corruption, prefix")])
def test_what_a_family_cannot_learn_is_refused_before_anything_is_read(family, objective, able):
    told = Recipe(ModelRecipe(family), data=DataRecipe(("/nowhere",), objective=objective))
    assert refused(ConfigError, lambda: prepare(told)) == f"{family} cannot learn by data.objective {objective}; it can by {able}"


def test_a_tokenizer_that_is_not_there_is_refused_before_anything_is_read():
    told = Recipe(tokenizer=TokenizerRecipe(path="/no/tokenizer.json"), data=DataRecipe(("/nowhere",)))
    assert "/no/tokenizer.json: there is no such file" in refused(HanokError, lambda: prepare(told))


def test_a_peak_that_is_never_reached_is_told(recipe):
    told = []
    prepare(replace(recipe, train=replace(TRAIN, steps=3)), told.append)
    assert told[-1] == "train.warmup_steps is 5 and train.steps 3: the learning rate will not reach its peak"


def test_an_occupied_folder_is_refused_before_anything_is_read(prepared, tmp_path):
    (tmp_path / "mine").write_text("x")
    assert "is not empty; choose another folder" in refused(DataError, lambda: pretrain([Path("/nowhere")], out=tmp_path))
    assert "is not empty; choose another folder" in refused(DataError, lambda: Pretraining(prepared, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize(("part", "change", "told"), [
    ("model", {"family": "qwen"}, "did you mean 'qwen3'?"), ("model", {"preset": "tin"}, "qwen3 has no preset 'tin'; did you mean 'tiny'?"),
    ("model", {"sizes": {"d_modl": 3}}, "model.sizes: unknown setting 'd_modl'; did you mean 'd_model'?"),
    ("model", {"sizes": {"d_model": 33, "n_heads": 4}}, "d_model 33 is not divisible by n_heads 4"),
    ("model", {"sizes": {"d_model": -32}}, "d_model is -32"), ("model", {"sizes": {"qk_norm": False}}, "with false it is a llama"),
    ("model", {"sizes": {"vocab_size": 300}}, "model.sizes.vocab_size is 300, the tokenizer has 320 tokens; leave it out"),
    ("model", {"sizes": {"max_seq_len": 16}}, "data.seq_len is 32, model.sizes.max_seq_len 16; a row has to fit into the context"),
    ("data", {"sources": ()}, "no files or folders were given"), ("data", {"sources": ("/nowhere",)}, "/nowhere: there is no such file or folder"),
    ("data", {"encoding": "ascii"}, "not ascii: 0x"), ("data", {"validation": 0.0}, "validation fraction 0"),
    ("tokenizer", {"vocab_size": 100}, "vocab_size 100 is too small"), ("tokenizer", {"path": "/nowhere.json"}, "/nowhere.json: there is no"),
    ("data", {"seq_len": 100_000}, "the corpus has"),
])
def test_bad_input_is_refused_before_anything_is_written(recipe, tmp_path, part, change, told):
    def begin() -> None:
        Pretraining(prepare(replace(recipe, **{part: replace(getattr(recipe, part), **change)})), tmp_path / "run")

    assert told in refused(HanokError, begin)
    assert not list(tmp_path.iterdir())


def test_a_validation_text_of_one_token_is_refused_at_once(recipe, tmp_path):
    """A tokenizer without an end of text, and a single character held out."""
    tokenizer("wordpiece", 200).save(tmp_path / "tokenizer.json")
    texts = {"a.txt": prose(300), "b.txt": "a", "c.txt": prose(300, seed=2), "d.txt": prose(300, seed=3)}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    told = replace(recipe, tokenizer=TokenizerRecipe(path=str(tmp_path)),
                   data=replace(recipe.data, sources=tuple(str(tmp_path / name) for name in texts), validation=0.0005))
    assert "the validation text is a single token; give more text" in refused(DataError, lambda: prepare(told))


def test_a_diverged_run_keeps_what_it_learned(prepared, tmp_path):
    wild = replace(prepared, recipe=replace(prepared.recipe, train=replace(TRAIN, learning_rate=1e30, warmup_steps=0)))
    with pytest.raises(DataError, match=r"of step \d+ is (nan|inf); lower train.learning_rate .*; what was learned before it is in .*step-"):
        Pretraining(wild, tmp_path / "run").run()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors")) and not is_bundle(tmp_path / "run")


def test_a_damaged_corpus_cache_is_built_again(recipe, prepared):
    shard = next(prepared.train.path.glob("*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert next(prepare(recipe).train.path.glob("*.bin")).read_bytes() == whole
