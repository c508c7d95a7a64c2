"""The time dial: of a grid of sizes, vocabularies and batches the one whose expected loss is least after so many seconds on this machine.

A grid's costs are linear in layers and nearly so in the vocabulary, so that three counts tell them for a width and a batch; the best few are then
counted exactly.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from hanok import report
from hanok.config import from_dict, to_dict
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.train.expected import LAW, VOCABULARIES, Law, Text, expected_bits, is_recurrent, learning
from hanok.train.measure import Cost, Machine, Shape, probe
from hanok.train.plan import (
    LEAST_BYTES,
    WIDTHS,
    Plan,
    check,
    check_family,
    config_of,
    cost_of,
    counted,
    depths,
    fits,
    last_that,
    plan_of,
    shape_of,
    sizes_of,
    weights_of,
)
from hanok.train.recipe import Recipe

Settings = Mapping[str, Mapping[str, Any]]
"""A recipe's tables, of which what is not there has its default."""
ROWS = (4, 8, 16, 32, 64)
"""Rows an update; on a CPU no forward has more than MOST_TOKENS of them."""
MOST_TOKENS = 8192
LEAST_STEPS, FEW_STEPS = 60, 400
"""Fewer are no training; a width that would make fewer than the second is not looked at: a smaller one has learned more by then."""
FINALISTS = 4
"""Candidates that are counted exactly."""
SPARE = 1.25
"""Updates that a run by time may do, over those that are planned: a machine faster than its probe uses its time."""
TOKENS_A_PARAMETER = 20
"""What is compute-optimal for large models (arXiv:2203.15556): where neither time nor tokens are told."""


def merged(below: Settings, above: Settings) -> dict[str, dict[str, Any]]:
    """Settings over others; sizes one by one."""
    told = {name: {**below.get(name, {}), **above.get(name, {})} for name in {**below, **above}}
    sizes = {**below.get("model", {}).get("sizes", {}), **above.get("model", {}).get("sizes", {})}
    if sizes:
        told["model"]["sizes"] = sizes
    return told


class Choice:
    """All that a plan may choose from, for a family, a text, and what a person has settled (`given`)."""

    def __init__(self, given: Settings, text: Text, machine: Machine, law: Law = LAW):
        self.given, self.text, self.machine, self.law = given, text, machine, law
        self.family = catalog.family(given.get("model", {}).get("family", catalog.DEFAULT))
        check_family(self.family)
        self.recurrent = is_recurrent(self.family.name)
        self.seq_len = given.get("data", {}).get("seq_len") or (64 if self.recurrent else 256)

    def recipe(self, d_model: int, n_layers: int, vocab_size: int, rows: int, steps: int, seconds: float | None) -> Recipe:
        """The settings of a candidate, under those that were given."""
        at_once = max(1, min(rows, MOST_TOKENS // int(self.seq_len)))
        per_step = rows * int(self.seq_len)
        chosen: dict[str, dict[str, Any]] = {
            "model": {"preset": "tiny", "sizes": {} if "preset" in self.given.get("model", {}) else sizes_of(self.family, d_model, n_layers)},
            "tokenizer": {} if self.text.vocab_size else {"vocab_size": vocab_size, **({"kind": "wordpiece"} if self.family.name == "bert" else {})},
            "data": {"seq_len": self.seq_len},
            "train": {"steps": max(1, math.ceil(steps * (SPARE if seconds else 1))), **({"seconds": seconds} if seconds else {}),
                      "micro_batch_size": at_once, "grad_accum_steps": rows // at_once, **learning(self.family, d_model, steps),
                      "eval_every": max(1, steps // 5), "eval_tokens": min(131_072, max(16_384, steps * per_step // 50 // 1024 * 1024)),
                      "checkpoint_every": max(1, steps // 3)}}
        return from_dict(Recipe, merged(chosen, self.given), "recipe")

    def vocabularies(self) -> list[int]:
        """Those that the text is long enough for."""
        told = self.text.vocab_size or self.given.get("tokenizer", {}).get("vocab_size")
        if told:
            return [int(told)]
        return [v for v in VOCABULARIES if 200 * v <= self.text.n_bytes and v <= self.text.lengths[-1][0]] or [VOCABULARIES[0]]

    def shapes(self) -> list[tuple[int, int]]:
        """(d_model, n_layers) that may be chosen: one, where they were given."""
        told = self.given.get("model", {})
        if "preset" in told or {"d_model", "n_layers"} & set(told.get("sizes", {})):
            config = config_of(self.recipe(128, 2, self.vocabularies()[0], 4, 100, None))
            return [(config.d_model, config.n_layers)]
        return [(d, n) for d in WIDTHS for n in depths(self.family, d)]

    def rows(self) -> list[int]:
        told = self.given.get("train", {})
        if "micro_batch_size" in told:
            return [int(told["micro_batch_size"]) * int(told.get("grad_accum_steps", 1))]
        return [rows * (4 if self.recurrent else 1) for rows in ROWS]

    def costs(self, d_model: int) -> Callable[[int, int, int], Cost]:
        """The cost of an update of (layers, vocabulary, rows) at a width: linear in layers and nearly so in the vocabulary, so that three counts tell
        it for a number of rows. In rows it bends where tensors outgrow a core's cache: the fewest, the most and one between are counted."""
        few, most = self.vocabularies()[0], self.vocabularies()[-1]
        wide = most if most > few else 2 * few

        def at(layers: int, vocab: int, rows: int) -> tuple[float, ...]:
            recipe = self.recipe(d_model, layers, vocab, rows, 100, None)
            config = config_of(recipe, self.text.vocab_size and vocab)
            shape, told = Shape(rows, shape_of(recipe, config, self.text).seq_len), counted(replace(recipe.train, grad_accum_steps=1))
            return astuple(cost_of(self.family.name, replace(config, vocab_size=vocab), told, shape, plain=True))

        known = sorted({self.rows()[i] for i in (0, len(self.rows()) // 2, -1)})
        corners = np.array([[at(n, v, rows) for n, v in ((1, few), (2, few), (1, wide))] for rows in known])         # rows, corner, field of the cost

        def cost(layers: int, vocab: int, rows: int) -> Cost:
            base, deep, broad = ([np.interp(rows, known, column) for column in corner.T] for corner in corners.transpose(1, 0, 2))
            share = (vocab - few) / (wide - few)
            return Cost(*(float(b + (layers - 1) * (d - b) + share * (w - b)) for b, d, w in zip(base, deep, broad)))

        return cost

    def ranked(self, seconds: float) -> Iterator[tuple[float, tuple[int, int, int, int], int]]:
        """Expected bits, (width, layers, vocabulary, rows) and steps of every candidate that learns for long enough, the best first."""
        told = []
        for d_model in sorted({d for d, _ in self.shapes()}):
            if len(self.shapes()) > 1 and self.too_large(d_model, seconds):
                break
            cost = self.costs(d_model)
            for layers in (n for d, n in self.shapes() if d == d_model):
                for vocab in self.vocabularies():
                    config = config_of(self.recipe(d_model, layers, vocab, 4, 100, None), vocab)
                    inner = weights_of(self.family.name, config)[1]
                    for rows in self.rows():
                        steps = int((seconds - self.machine.begin) / self.machine.seconds(cost(layers, vocab, rows)))
                        if steps >= LEAST_STEPS:
                            n = rows * int(self.seq_len)
                            read, text = steps * n * self.text.bytes_per_token(vocab), self.text
                            bits = expected_bits(self.law, inner, read, text.n_bytes, n, vocab, text.zlib)
                            told.append((bits, (d_model, layers, vocab, rows), steps))
        if not told:
            d_model, layers = min(self.shapes())
            told = [(math.inf, (d_model, layers, self.vocabularies()[0], min(self.rows())), LEAST_STEPS)]
        return iter(sorted(told))

    def too_large(self, d_model: int, seconds: float) -> bool:
        """Whether not even FEW_STEPS of the smallest batch fit in: from the FLOPs of the inner products alone."""
        flops = 6 * 8 * d_model ** 2 * depths(self.family, d_model)[0] * ROWS[0] * int(self.seq_len) * FEW_STEPS
        return d_model > WIDTHS[0] and self.machine.product * flops > seconds * self.machine.sgemm

    def best(self, seconds: float, free_disk: float = math.inf) -> Plan:
        """The plan with the least expected loss that fits into memory and disk. ConfigError where none does, or the time is too short for any."""
        finalists: list[Plan] = []
        for _, (d_model, layers, vocab, rows), steps in self.ranked(seconds):
            plan = plan_of(self.recipe(d_model, layers, vocab, rows, steps, seconds), self.machine, self.text, self.law)
            plan = plan_of(self.recipe(d_model, layers, vocab, rows, plan.steps, seconds), self.machine, self.text, self.law, plan.steps)
            if fits(plan, self.machine, free_disk):
                finalists.append(plan)
                if len(finalists) == FINALISTS:
                    break
        if not finalists:
            raise ConfigError(f"no {self.family.name} fits into {report.size(self.machine.memory)} of memory and {report.size(free_disk)} of disk; "
                              "free some, or choose another machine")
        return min(finalists, key=lambda plan: plan.bits)

    def of_size(self, params: float | None, tokens: float | None, free_disk: float = math.inf) -> Plan:
        """The plan of a model of about so many parameters that learns from so many tokens; each is told by the other where it is not given, at 20
        tokens a parameter, and where neither is, the largest model that fits is taken. ConfigError where no size is near; DoesNotFit as `check`."""
        asked, params = params, params or (tokens / TOKENS_A_PARAMETER if tokens else None)
        counts = {d: self.parameters(d) for d in {d for d, _ in self.shapes()}}
        sized = sorted((counts[d](n, v), (d, n, v)) for d, n in self.shapes() for v in self.vocabularies())
        if params is None:
            able = [told for told in sized if LEAST_BYTES * told[0] < self.machine.memory]
            found = last_that(able, lambda told: fits(self.sized_plan(told[1], TOKENS_A_PARAMETER * told[0]), self.machine, free_disk))
            sized = [found or sized[0]]
        n, shape = min(sized, key=lambda told: abs(math.log(told[0] / (params or told[0]))))
        if asked and not 0.5 < n / asked < 2:
            raise ConfigError(f"of {report.count(asked)} parameters there is no plan: sizes go from {report.count(sized[0][0])} to "
                              f"{report.count(sized[-1][0])}; choose one between, or all sizes with --set model.sizes.NAME=NUMBER")
        plan = self.sized_plan(shape, tokens or TOKENS_A_PARAMETER * n)
        check(plan.recipe, self.machine, self.text, free_disk)
        return plan

    def parameters(self, d_model: int) -> Callable[[int, int], int]:
        """Those of (layers, vocabulary) at a width: linear in both, so that three small models tell them all."""
        few = self.vocabularies()[0]
        base, deep, wide = (weights_of(self.family.name, config_of(self.recipe(d_model, n, v, ROWS[0], 1000, None), v))[0]
                            for n, v in ((1, few), (2, few), (1, 2 * few)))
        return lambda layers, vocab: base + (layers - 1) * (deep - base) + (vocab - few) * (wide - base) // few

    def sized_plan(self, shape: tuple[int, int, int], tokens: float) -> Plan:
        """In batches that leave it 2,000 updates or more, where the tokens are enough for that."""
        rows = max([r for r in self.rows() if tokens >= 2000 * r * int(self.seq_len)] or [min(self.rows())])
        told = self.recipe(*shape, rows, 1, None).train                               # rows that were given, or that do not go into forwards, differ
        steps = math.ceil(tokens / (told.micro_batch_size * told.grad_accum_steps * int(self.seq_len)))
        return plan_of(self.recipe(*shape, rows, steps, None), self.machine, self.text, self.law)

    def probed(self, memory: int | None = None) -> Choice:
        """The same choice on this machine, measured by real updates at a few sizes of the family. Some seconds."""
        sizes, tokens = ([(64, 2), (192, 3), (512, 2)], 1024) if self.machine.device == "cpu" else ([(256, 4), (768, 6)], 8192)
        recipe, row = self.recipe(64, 2, VOCABULARIES[2], 4, 10 ** 6, None), int(self.seq_len)
        samples: list[tuple[Any, Shape]] = []
        for apart in (math.inf, 1.0) if self.recurrent else (math.inf,):              # what a recurrence reads side by side takes another path
            for d_model, layers in sizes:
                told = {**to_dict(self.family.presets["tiny"]), **sizes_of(self.family, d_model, layers), "vocab_size": VOCABULARIES[2]}
                samples.append((from_dict(self.family.config, {**told, "max_seq_len": row}), Shape(max(1, tokens // row), row, apart * row)))
        machine = probe(self.family, samples, replace(recipe.train, grad_accum_steps=1), memory=memory)
        return Choice(self.given, self.text, machine, self.law)
