"""The time dial: what a count, a fit, a plan and a refusal promise."""
from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import zoo
from hanok.bundle.bundle import empty_model
from hanok.config import from_dict, override, to_dict
from hanok.contracts import Batch
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.models.bert import BertConfig
from hanok.models.gpt import GPTConfig
from hanok.models.llama import LlamaConfig
from hanok.nn.loss import chunk_tokens, token_cross_entropy
from hanok.train.data_of_run import data_of
from hanok.train.dial import Choice
from hanok.train.expected import LAW, LIBRARY, PAIRED, Text, expected_bits, is_recurrent, new_bytes, survey, unread
from hanok.train.measure import Cost, Machine, Shape, Tally, count, count_one, fit, probe, run_on_meta
from hanok.train.optim import optimizers
from hanok.train.plan import CONTEXT, DoesNotFit, check, config_of, loss_bytes, memory, needs, plan_of, sizes_of, weights_of
from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainRecipe
from hanok.train.trainer import Trainer
from tiny import write_prose

MACHINE = Machine(1e11, 0.9, 10.0, 4e5, 16 << 30, resident=250 << 20)
"""A machine of which nothing has to be measured."""
QWEN3 = LlamaConfig(512, 64, 2, 2, 1, 176, 64, qk_norm=True)


# ---- counting
@pytest.mark.parametrize("case", zoo.CASES, ids=lambda case: case.name)
def test_parameters_are_those_of_the_model(case):
    n, inner = weights_of(case.family, case.config)
    assert n == sum(p.numel() for p in catalog.FAMILIES[case.family].build(case.config).parameters())
    assert 0 < inner < n


@pytest.mark.parametrize(("name", "config"), [("qwen3", QWEN3), ("gpt", GPTConfig(512, 64, 2, 2, 256, 64)),
                                              ("bert", BertConfig(512, 64, 2, 2, 256, 64, dropout=0.0, attention_dropout=0.0))])
def test_what_is_alive_on_the_meta_device_is_what_is_alive_on_a_cpu(name, config):
    family, told = catalog.family(name), TrainRecipe(optimizer="adamw")
    counted = count_one(family, config, told, Shape(4, 64), mixed=False)
    model = family.build(config)
    n_weights = sum(p.numel() for p in model.parameters())
    n_asked = round(0.15 * 256) if name == "bert" else 256
    with Tally() as real:
        rows = torch.zeros(4, 64, dtype=torch.long)
        loss, _ = token_cross_entropy(model.hidden(Batch(rows)), rows, nn.Sequential(model.head), chunk_size=chunk_tokens(512), n_targets=n_asked)
        loss.backward()
    assert counted.peak - 3 * 4 * n_weights == pytest.approx(real.peak, rel=0.03)


def test_products_are_counted_once_forward_and_twice_backward():
    rows = 4 * 64
    cost = count_one(catalog.family("gpt"), GPTConfig(512, 64, 2, 2, 256, 64), TrainRecipe(optimizer="adamw"), Shape(4, 64), mixed=False)
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 512 * 64
    attention = 2 * 4 * 64 * 64 * (1 + 2.5)                                           # two products forward, five backward
    assert cost.flops == 6 * linear * rows + attention * rows


def test_a_count_grows_with_what_is_counted():
    family, told = catalog.family("qwen3"), TrainRecipe()
    small, deep, many, twice = (count(family, config, recipe, Shape(rows, 64)) for config, recipe, rows in (
        (QWEN3, told, 4), (replace(QWEN3, n_layers=4), told, 4), (QWEN3, told, 8), (QWEN3, replace(told, grad_accum_steps=2), 4)))
    for other in (deep, many, twice):
        assert other.flops > small.flops and other.moved > small.moved and other.peak >= small.peak
    assert twice.peak < many.peak and deep.kernels > 1.5 * small.kernels


def test_many_layers_are_told_by_a_few():
    family, config, told = catalog.family("qwen3"), replace(QWEN3, n_layers=7), TrainRecipe()
    whole = run_on_meta(empty_model(family, config), family, config, told, Shape(4, 64), mixed=False)
    found = count_one(family, config, told, Shape(4, 64), mixed=False)
    assert found.flops == whole.flops and found.peak == whole.peak
    assert found.moved == pytest.approx(whole.moved, rel=1e-3) and found.kernels == pytest.approx(whole.kernels, rel=0.01)


def test_a_recurrence_by_steps_starts_kernels_for_each():
    family = catalog.family("gru")
    config = family.config(512, 64, 1, 64)
    short, long = (count_one(family, config, TrainRecipe(optimizer="adamw"), Shape(4, t), mixed=False) for t in (32, 64))
    assert long.kernels > 1.8 * short.kernels and long.flops == pytest.approx(2 * short.flops, rel=0.05)
    assert count_one(family, config, TrainRecipe(optimizer="adamw"), Shape(4, 32), mixed=True).kernels == short.kernels
    lstm = catalog.family("lstm")
    assert count_one(lstm, config, TrainRecipe(optimizer="adamw"), Shape(4, 64), mixed=False).kernels < long.kernels / 4     # one kernel of all steps


def test_batches_that_mix_documents_are_as_many_as_documents_are_short():
    assert Shape(8, 64).mixed == 0 and Shape(8, 64, 64.0).mixed == 1 and Shape(8, 64, 64.0, separate=False).mixed == 0
    assert Shape(8, 64, 6400.0).mixed == pytest.approx(1 - 0.99 ** 8)


# ---- a GPU's memory
GPU = replace(MACHINE, device="cuda", memory=80 << 30)


@pytest.mark.parametrize(("width", "layers", "rows", "vocab_size", "held"), [(256, 4, 32, 4096, 711e6), (768, 12, 32, 4096, 4442e6),
                                                                            (512, 8, 64, 16384, 3563e6)])
def test_an_h100_held_about_what_a_plan_says(width, layers, rows, vocab_size, held):
    """Reserved for tensors, measured on 2026-11-28 (docs/log.md); in bf16, compiled, with Muon."""
    family = catalog.family("qwen3")
    sizes = {**to_dict(family.presets["tiny"]), **sizes_of(family, width, layers), "vocab_size": vocab_size, "max_seq_len": 256}
    shape, config = Shape(rows, 256), from_dict(family.config, sizes)
    cost = count(family, config, TrainRecipe(), shape)
    told = memory(GPU, cost, 0, LIBRARY, loss_bytes(shape, vocab_size, compiled=True, in_bf16=True), in_bf16=True) - CONTEXT
    assert told == pytest.approx(held, rel=0.2)


def test_what_changes_a_gpus_memory():
    def bytes_of(*settings: str, family: str = "gpt2") -> float:
        return plan_of(from_dict(Recipe, override(to_dict(Recipe(ModelRecipe(family))), settings), "recipe"), GPU, LIBRARY).memory - CONTEXT

    plain = bytes_of("train.precision=bf16")
    assert bytes_of("train.precision=fp32") > 1.3 * plain and bytes_of("train.precision=bf16", "train.compile=off") > plain
    n = weights_of("gpt2", config_of(Recipe(ModelRecipe("gpt2")), LIBRARY.vocab_size))[0]
    averaged = bytes_of("train.precision=bf16", "train.ema_decay=0.9") - plain
    assert averaged == pytest.approx(1.06 * 4 * n, rel=0.01)                          # in fp32, whatever products are made in


# ---- fitting
@settings(max_examples=25, deadline=None)
@given(st.floats(0.7, 1.5), st.floats(5, 15))
def test_a_fit_predicts_what_it_has_not_seen(product, byte):
    machine = replace(MACHINE, product=product, byte=byte, kernel=4e5)
    seen = [Cost(2e9, 3e8, 300), Cost(6e10, 3e9, 600)]
    product, byte, kernel = fit(seen, [machine.seconds(cost) * machine.sgemm for cost in seen])
    other = Cost(3e11, 8e9, 1000)
    assert replace(machine, product=product, byte=byte, kernel=kernel).seconds(other) == pytest.approx(machine.seconds(other), rel=0.15)


@pytest.mark.parametrize("name", ["qwen3", "lstm", "bert"])
def test_a_probe_of_real_updates_gives_a_machine(name):
    family = catalog.family(name)
    sizes = [replace(family.presets["tiny"], vocab_size=256, d_model=d, max_seq_len=16) for d in (32, 64)]
    machine = probe(family, [(config, Shape(2, 16, 20.0)) for config in sizes], TrainRecipe(), memory=1 << 30, n_steps=1)
    assert machine.memory == 1 << 30 and machine.sgemm > 1e8 and machine.resident > 1 << 20
    assert all(0 < x < math.inf for x in (machine.product, machine.byte, machine.kernel))


# ---- the law
@given(st.floats(1, 1e12), st.floats(1e3, 1e9))
def test_read_again_a_text_is_worth_less(n_bytes, unique):
    worth = new_bytes(n_bytes, unique)
    assert worth <= n_bytes * (1 + 1e-9) and worth <= unique * 16.4 * (1 + 1e-9) and new_bytes(2 * n_bytes, unique) >= worth
    assert worth == n_bytes or n_bytes > unique


def test_more_is_expected_of_more():
    base = {"n_inner": 1e6, "n_bytes": 1e7, "unique": 1e8, "tokens_per_update": 1024, "vocab_size": 4096, "text_zlib": LAW.zlib}
    bits = expected_bits(LAW, **base)
    for name, value in (("n_inner", 1e7), ("n_bytes", 1e8), ("tokens_per_update", 256), ("vocab_size", 8192)):
        assert expected_bits(LAW, **{**base, name: value}) < bits
    assert expected_bits(LAW, **{**base, "text_zlib": 2 * LAW.zlib}) == pytest.approx(2 * bits)


# ---- the text
def test_a_text_is_told_by_its_files(tmp_path):
    folder = write_prose(tmp_path, 3, 4000)
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    told = survey({"data": {"sources": (str(folder),), "validation": 0.1}})
    assert told.n_bytes == pytest.approx(0.9 * n_bytes) and told.n_documents == 3 and 0.5 < told.zlib < 8
    assert told.bytes_per_token(1024) > 1 and told.vocab_size is None
    assert unread([str(folder)]).n_bytes == n_bytes == unread([str(path) for path in folder.iterdir()]).held
    (folder / "0.txt").write_text(8 * (folder / "1.txt").read_text())                 # more than half of all is there twice while it is cut
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert unread([str(folder)]).held == sum(sizes) + max(sizes)
    texts = [sys.getsizeof(path.read_text()) for path in folder.iterdir()]
    assert survey({"data": {"sources": (str(folder),)}}).held == pytest.approx(sum(texts) + max(texts), rel=0.05)
    n_bytes = sum(sizes)
    (folder / "film.mp4").write_bytes(b"\0" * 10 ** 6)                                # what a run would not read counts for nothing
    (folder / "pairs.tsv").write_bytes(b"a\tb\n" * 10 ** 6)
    assert unread([str(folder)]).n_bytes == n_bytes
    assert unread([str(folder)], paired=True).n_bytes == 4e6 == unread([str(folder)], paired=True).held / PAIRED


@pytest.mark.parametrize(("encoding", "text"), [("utf-16", "the house stands on a stone\n"), ("cp949", "한옥은 돌 위에 서 있다\n")])
def test_the_same_text_is_as_much_to_learn_in_any_encoding(encoding, text, tmp_path):
    told = []
    for name in ("utf-8", encoding):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} {text}" for i in range(3000)), encoding=name)
        told.append(survey({"data": {"sources": (str(tmp_path / f"{name}.txt"),), "encoding": name}}))
    assert told[1].n_bytes == pytest.approx(told[0].n_bytes, rel=1e-3) and told[1].held == pytest.approx(told[0].held, rel=1e-3)


def test_recurrent_families_are_known_by_what_they_carry():
    assert {name for name in catalog.FAMILIES if is_recurrent(name)} == {"rnn", "lstm", "gru"}


# ---- the choice
@pytest.fixture(scope="module")
def choice():
    return Choice({}, LIBRARY, MACHINE)


def test_a_plan_fills_its_time_and_more_time_is_never_worse(choice):
    found = [choice.best(seconds) for seconds in (10, 30, 120, 300)]
    for plan, seconds in zip(found, (10, 30, 120, 300)):
        assert 0.98 * seconds < plan.steps * plan.step_seconds <= seconds
        assert plan.recipe.train.seconds == seconds and plan.steps < plan.recipe.train.steps <= 1.25 * plan.steps + 1
        assert plan.memory < MACHINE.memory and 0 < plan.spread < plan.bits
    assert all(later.bits <= sooner.bits * 1.001 for sooner, later in zip(found, found[1:]))
    assert found[-1].tokens > found[0].tokens


def test_what_compiling_takes_is_taken_from_the_updates(choice):
    slow = Choice({}, LIBRARY, replace(MACHINE, begin=60.0)).best(120)
    assert 118 < slow.seconds <= 120 and 0.95 * 60 < slow.steps * slow.step_seconds <= 60
    assert "the first 1 min 0 s for torch.compile" in dict(slow.rows(MACHINE, 1e12))["time"]
    assert slow.to_dict()["compile_seconds"] == 60 and choice.best(60).to_dict()["compile_seconds"] == 0
    assert slow.bits == pytest.approx(choice.best(60).bits, rel=1e-2) and slow.recipe.train.seconds == 120
    assert Choice({}, LIBRARY, replace(MACHINE, begin=200.0)).best(120).steps >= 1    # it takes what it takes; the clock ends the run


def test_a_faster_machine_is_given_more_to_do(choice):
    fast = Choice({}, LIBRARY, replace(MACHINE, sgemm=4 * MACHINE.sgemm)).best(30)
    assert fast.bits < choice.best(30).bits and fast.tokens * fast.parameters > choice.best(30).tokens * choice.best(30).parameters


@pytest.mark.parametrize("family", ["qwen3", "gpt", "lstm", "bert"])
def test_what_is_chosen_is_a_recipe_that_runs(family, tmp_path):
    source = str(write_prose(tmp_path, 4, 6000))
    given = {"model": {"family": family}, "data": {"sources": (source,)}, "tokenizer": {"vocab_size": 300}}
    plan = Choice(given, survey(given), MACHINE).best(1.0)
    prepared = data_of(plan.recipe)
    model = prepared.family.build(prepared.config)
    assert replace(config_of(plan.recipe), vocab_size=prepared.config.vocab_size) == prepared.config       # this text has fewer WordPieces
    assert sum(p.numel() for p in model.parameters()) == plan.parameters or family == "bert"
    recipe = replace(plan.recipe.train, steps=2, seconds=None)
    trainer = Trainer(model, optimizers(model, recipe), prepared.loader(), recipe, vocab_size=prepared.config.vocab_size,
                      hidden=prepared.hidden_of(model))
    trainer.run()
    assert trainer.n_steps == 2


def test_what_a_person_settled_stays():
    given = {"model": {"preset": "tiny"}, "tokenizer": {"vocab_size": 2000}, "data": {"seq_len": 128},
             "train": {"micro_batch_size": 6, "learning_rate": 1e-3, "seed": 7}}
    recipe = Choice(given, LIBRARY, MACHINE).best(60).recipe
    for table, values in given.items():
        for name, value in values.items():
            assert getattr(getattr(recipe, table), name) == value
    assert recipe.model.sizes == {} and recipe.train.seconds == 60
    wide = Choice({"model": {"sizes": {"d_model": 96, "n_heads": 3, "n_kv_heads": 3}}}, LIBRARY, MACHINE).best(60).recipe
    assert wide.model.sizes["d_model"] == 96 and wide.model.sizes["n_kv_heads"] == 3


def test_a_size_is_met_and_tokens_follow_it(choice):
    plan = choice.of_size(3e6, None)
    assert 2e6 < plan.parameters < 4.5e6 and plan.tokens == pytest.approx(20 * plan.parameters, rel=0.01)
    assert choice.of_size(3e6, 5e6).tokens == pytest.approx(5e6, rel=0.01)
    assert choice.of_size(None, 6e7).parameters == plan.parameters
    for params in (1, 1e13):
        with pytest.raises(ConfigError, match="there is no plan: sizes go from .* to .*; choose one between"):
            choice.of_size(params, 1e6)
    with pytest.raises(DoesNotFit, match="this run needs at least 7"):                # GiB, twelve bytes for each of 7 milliards
        choice.of_size(7e9, 1e6)
    assert choice.parameters(128)(3, 2048) == weights_of("qwen3", config_of(choice.recipe(128, 3, 2048, 4, 100, None)))[0]


def test_tokens_alone_leave_sizes_that_were_given():
    given = {"model": {"sizes": {"d_model": 128, "n_layers": 2}}}
    assert Choice(given, LIBRARY, MACHINE).of_size(None, 1e10).tokens == pytest.approx(1e10, rel=0.01)


@pytest.mark.parametrize("given", [{"train": {"grad_accum_steps": 3}}, {"data": {"seq_len": 384}}, {"train": {"micro_batch_size": 5}}])
def test_tokens_are_met_whatever_was_settled(given):
    plan = Choice(given, LIBRARY, MACHINE).of_size(3e6, 6e7)
    assert plan.tokens == pytest.approx(6e7, rel=0.01)


def test_the_largest_that_a_memory_holds():
    plans = [Choice({}, LIBRARY, replace(MACHINE, memory=memory)).of_size(None, None) for memory in (500 << 20, 600 << 20)]
    assert plans[0].memory <= 500 << 20 and plans[1].memory <= 600 << 20 and plans[0].parameters < plans[1].parameters


@pytest.mark.parametrize("family", ["t5", "transformer", "bahdanau"])
def test_families_whose_sizes_no_plan_knows_are_named(family):
    with pytest.raises(ConfigError, match=f"no plan chooses the sizes of a {family}; it knows those of .*qwen3"):
        Choice({"model": {"family": family}}, LIBRARY, MACHINE)


# ---- refusals
RECIPE = Recipe(ModelRecipe(sizes={"d_model": 256, "d_ff": 704}), TokenizerRecipe(vocab_size=4096), DataRecipe(("x",), seq_len=256),
                TrainRecipe(steps=10_000, micro_batch_size=64))
TEXT = Text(1e6, 10, LAW.zlib, LIBRARY.lengths)


@pytest.mark.parametrize(("memory", "free", "first"), [
    (1000 << 20, 1e12, "train.micro_batch_size="), (450 << 20, 1e12, "model.sizes.d_model="), (16 << 30, 140e6, "train.keep_checkpoints=1"),
    (16 << 30, 30e6, "model.sizes.d_model=")])
def test_what_is_refused_is_told_what_would_fit_and_that_fits(memory, free, first):
    machine = replace(MACHINE, memory=memory)
    with pytest.raises(DoesNotFit) as refused:
        check(RECIPE, machine, TEXT, free)
    assert first in " ".join(refused.value.settings) and str(refused.value).count("\n") == 0
    assert all(f"--set {setting}" in str(refused.value) for setting in refused.value.settings)
    smaller = from_dict(Recipe, override(to_dict(RECIPE), refused.value.settings), "recipe")
    check(smaller, machine, TEXT, free)
    need, disk = needs(smaller, machine, TEXT)
    assert need <= memory and disk <= free


@pytest.mark.parametrize("rows", [15, 12, 7])
def test_one_row_at_a_time_is_thought_of(rows):
    one, many = (replace(RECIPE, train=replace(RECIPE.train, micro_batch_size=n, grad_accum_steps=64)) for n in (1, rows))
    with pytest.raises(DoesNotFit) as refused:
        check(many, replace(MACHINE, memory=int(1.01 * needs(one, MACHINE, TEXT)[0])), TEXT, 1e12)
    assert refused.value.settings == ("train.micro_batch_size=1", f"train.grad_accum_steps={64 * rows}")


def test_what_fits_is_let_through_and_what_never_will_is_said():
    check(RECIPE, MACHINE, TEXT, 1e12)
    with pytest.raises(DoesNotFit, match="nothing smaller fits"):
        check(RECIPE, replace(MACHINE, memory=1 << 20), TEXT, 1e12)


def test_an_encoder_decoder_is_checked_too():
    recipe = Recipe(ModelRecipe("transformer", "base"), data=DataRecipe(("x",), seq_len=32), train=TrainRecipe(micro_batch_size=8))
    with pytest.raises(DoesNotFit) as refused:
        check(recipe, replace(MACHINE, memory=600 << 20), TEXT, 1e12)
    assert refused.value.settings
    assert plan_of(recipe, MACHINE, TEXT).memory > 600 << 20
