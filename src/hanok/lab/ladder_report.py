"""What a ladder's numbers say: tables in Markdown, and for each of the notes' three claims a sentence that is worked out from them.

A claim is shown, contradicted, held in part, or the numbers say nothing of it; which of these follows from the results alone. A difference counts
where it is larger than what chance or a small sample gives.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hanok import report

FORGETFUL = ("rnn", "lstm")
RECURRENT = ("rnn", "lstm", "bahdanau")
ATTENTIVE = ("bahdanau", "transformer")
LEAST_PAIRS = 30
"""Pairs of a bucket whose scores are compared."""
MARGIN = 0.05
"""What a share has to differ by to count."""
COMPARABLE = 0.1
"""The largest difference of parameters between rungs that are called comparable, as a share of the smallest."""

Results = Mapping[str, Any]
ALIGN = "l" + "r" * 11
"""Of the one table's columns."""


@dataclass(frozen=True)
class Claim:
    """A statement of the notes and what became of it."""
    statement: str
    verdict: str                             # shown, contradicted, in part, undecided
    numbers: str

    def __str__(self) -> str:
        told = {"shown": "Shown by these numbers", "contradicted": "Contradicted by these numbers", "in part": "Held in part",
                "undecided": "These numbers do not decide it"}
        return f"**{self.statement}** {told[self.verdict]}: {self.numbers}."


def claims(results: Results) -> list[Claim]:
    """The notes' three, judged by these results."""
    return [fading(results), bottleneck(results), sequential(results)]


def judged(values: Mapping[str, bool], others: Mapping[str, bool]) -> str:
    """`values`: which of those that should show it do; `others`: which of those that should not do so as well."""
    if not values or not others:
        return "undecided"
    if all(values.values()) and not any(others.values()):
        return "shown"
    return "in part" if any(values.values()) else "contradicted"


# ---- the claims ------------------------------------------------------------------------------------------------
def fading(results: Results) -> Claim:
    """Accuracy at the nearest distance against the farthest. A rung that is no better than guessing even there did not learn the task; whether time
    or number is what it lacks, a single pair at the farthest tells."""
    near, far, learned, told = {}, {}, {}, []
    for name, rung in results["rungs"].items():
        recall = rung["recall"]
        (nearest, near[name]), *_, (farthest, far[name]) = recall["accuracy"]
        noise = 2 * math.sqrt(0.5 / recall["n_questions"])                            # two standard errors of a difference, at worst
        if near[name] > recall["chance"] + noise:
            learned[name] = near[name] - far[name] > noise
            told.append(f"{name} answers {percent(near[name])} right at a distance of {nearest} tokens and {percent(far[name])} at {farthest}")
        else:
            told.append(f"{name} answers {percent(near[name])} right even at {nearest}, where guessing gives {percent(recall['chance'])}, so its "
                        f"numbers say nothing of distance ({alone(recall)})")
    verdict = judged({name: learned[name] for name in FORGETFUL if name in learned}, {name: learned[name] for name in ATTENTIVE if name in learned})
    return Claim("What a recurrent network remembers fades with distance.", verdict, "; ".join(told))


def alone(recall: Results) -> str:
    """What a rung makes of one pair, and of two, at the farthest distance."""
    one, two = (accuracy for _, accuracy in recall["by_pairs"][:2])
    return f"of a single pair it answers {percent(one)} right at {recall['accuracy'][-1][0]}, of two {percent(two)}"


def bottleneck(results: Results) -> Claim:
    """What share of its chrF on the shortest sources each rung keeps on the longest."""
    statement = "Without attention all of a source has to pass through one vector, and long sources suffer."
    kept, scores, shortest, longest = {}, {}, "", ""
    for name, rung in results["rungs"].items():
        buckets = [bucket for bucket in rung["translation"]["by_length"] if bucket["quality"]["pairs"] >= LEAST_PAIRS]
        if len(buckets) < 2:
            return Claim(statement, "undecided", f"fewer than two lengths have {LEAST_PAIRS} test pairs")
        short, long = buckets[0], buckets[-1]
        shortest, longest = words(short), words(long)
        scores[name] = short["quality"]["chrf"], long["quality"]["chrf"], short["quality"]["bleu"], long["quality"]["bleu"]
        kept[name] = scores[name][1] / max(scores[name][0], 1e-9)
    told = [f"from sources of {shortest} words to those of {longest}, chrF goes " + ", ".join(
        f"from {scores[name][0]:.1f} to {scores[name][1]:.1f} for {name} (it keeps {percent(kept[name])})" for name in kept)]
    told += ["BLEU goes " + ", ".join(f"from {scores[name][2]:.1f} to {scores[name][3]:.1f} for {name}" for name in kept)]
    bounds = [kept[name] for name in ATTENTIVE if name in kept]
    line = sum(bounds) / len(bounds) - MARGIN if bounds else 0.0
    without = {name: kept[name] < line for name in FORGETFUL if name in kept}
    return Claim(statement, judged(without, {name: kept[name] < line for name in ATTENTIVE if name in kept}), "; ".join(told))


def sequential(results: Results) -> Claim:
    """How much of its speed on short sequences each rung keeps on long ones, the tokens of an update being as many."""
    told, kept, ends = [], {}, []
    for name, rates in results["speed"]["tokens_per_second"].items():
        ends = [int(length) for length in rates]
        short, long = rates[str(min(ends))], rates[str(max(ends))]
        kept[name] = long / short
        told.append(f"{name} trains on {report.count(short)} tokens a second at a length of {min(ends)} and on {report.count(long)} at {max(ends)} "
                    f"({percent(kept[name])} of it)")
    line = kept.get("transformer", 0.0) - MARGIN
    slowed = {name: kept[name] < line for name in RECURRENT if name in kept}
    return Claim("A recurrence takes one step after the other and cannot run in parallel.",
                 judged(slowed, {name: kept[name] < line for name in ("transformer",) if name in kept}), "; ".join(told))


# ---- the page --------------------------------------------------------------------------------------------------
def markdown(results: Results) -> str:
    """ladder.md."""
    rungs = results["rungs"]
    signatures = next(iter(rungs.values()))["translation"]["signatures"]
    parts = ["# The ladder from RNN to Transformer", introduction(results), report.markdown_table(*overview(results), align=ALIGN),
             "## What the notes say, and what these numbers say", *map(str, claims(results)),
             "![translation, speed and recall](ladder.png)" if results.get("picture") else "",
             "## Translation by the length of the source", by_length(rungs),
             "Greedy search; BLEU is sacrebleu's `" + signatures["bleu"] + "`, chrF `" + signatures["chrf"] + "`. " + remarks(rungs),
             "## Training speed by length", by_speed(results["speed"]),
             f"Source and target tokens a second, each update with {results['speed']['tokens']:,} of them, random ones.",
             "## Associative recall by distance", by_recall(rungs, "accuracy", "distance", percent), recalled(rungs),
             "Where more or fewer pairs have to be held apart, at the farthest distance:", by_recall(rungs, "by_pairs", "pairs", percent),
             "## What reaches the answer before training", by_recall(rungs, "influence", "distance", "{:.1e}".format), untrained(rungs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(results: Results) -> tuple[list[str], list[list[Any]]]:
    """The one table: headers and rows."""
    speeds = results["speed"]["tokens_per_second"]
    lengths = sorted(map(int, next(iter(speeds.values()))))
    distances = [distance for distance, _ in next(iter(results["rungs"].values()))["recall"]["accuracy"]]
    headers = ["rung", "parameters", "updates", "target tokens", "seconds", "validation loss", "BLEU", "chrF", f"tokens/s at {lengths[0]}",
               f"at {lengths[-1]}", f"recall at {distances[0]}", f"at {distances[-1]}"]
    rows = []
    for name, rung in results["rungs"].items():
        training, quality, recall = rung["training"], rung["translation"]["quality"], rung["recall"]["accuracy"]
        rows.append([name, report.count(training["parameters"]), f"{training['steps']:,}", report.count(training["tokens"]),
                     f"{training['seconds']:.0f}", f"{training['validation_loss']:.3f}", f"{quality['bleu']:.1f}", f"{quality['chrf']:.1f}",
                     *(report.count(speeds[name][str(length)]) for length in (lengths[0], lengths[-1])),
                     *(percent(accuracy) for _, accuracy in (recall[0], recall[-1]))])
    return headers, rows


def introduction(results: Results) -> str:
    told, data, machine = results["settings"], results["data"], results["machine"]
    sizes = [rung["training"]["parameters"] for rung in results["rungs"].values()]
    spread = max(sizes) / min(sizes) - 1
    budget = f"{told['steps']:,} updates" if told["seconds"] is None else f"{report.seconds(told['seconds'])} of updates"
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    comparable = "comparable" if spread <= COMPARABLE else "not comparable"
    return (f"{data['train']:,} pairs to learn from (some of them validate) and {data['test']:,} to test, of other groups (files) and without a "
            f"source that the first have; one tokenizer; {budget} for each rung, evaluations not counted; {threads}, "
            f"{machine['device']}, torch {machine['torch']}. The largest rung has {percent(spread)} more parameters than the smallest: {comparable}.")


def by_length(rungs: Results) -> str:
    first = next(iter(rungs.values()))["translation"]
    buckets = first["by_length"]
    rows = [[words(bucket), bucket["quality"]["pairs"], *(score(rung["translation"]["by_length"][i]["quality"]) for rung in rungs.values())]
            for i, bucket in enumerate(buckets)]
    rows.append(["all", first["quality"]["pairs"], *(score(rung["translation"]["quality"]) for rung in rungs.values())])
    return report.markdown_table(["words", "pairs", *(f"{name}: BLEU / chrF" for name in rungs)], rows, align="lr" + "r" * len(rungs))


def remarks(rungs: Results) -> str:
    first = next(iter(rungs.values()))["translation"]
    told = [f"{first['too_long']} sources were longer than the context and left out."] if first["too_long"] else []
    cut = {name: rung["translation"]["cut_short"] for name, rung in rungs.items() if rung["translation"]["cut_short"]}
    if cut:
        told.append("Answers that did not end by themselves: " + ", ".join(f"{name} {n}" for name, n in cut.items()) + ".")
    return " ".join(told)


def by_speed(speed: Results) -> str:
    rates = speed["tokens_per_second"]
    rows = [[length, *(report.count(told[length]) for told in rates.values())] for length in next(iter(rates.values()))]
    return report.markdown_table(["tokens a row", *rates], rows, align="r" * (1 + len(rates)))


def by_recall(rungs: Results, part: str, header: str, spell: Callable[[float], str]) -> str:
    """A part of what was measured of recall, a column a rung."""
    places = [place for place, _ in next(iter(rungs.values()))["recall"][part]]
    rows = [[place, *(spell(rung["recall"][part][i][1]) for rung in rungs.values())] for i, place in enumerate(places)]
    return report.markdown_table([header, *rungs], rows, align="r" * (1 + len(rungs)))


def untrained(rungs: Results) -> str:
    """How the influence falls, beside what training made of it."""
    told = []
    for name, rung in rungs.items():
        recall = rung["recall"]
        (nearest, near), *_, (farthest, far) = recall["influence"]
        told.append(f"{name}'s falls from {nearest} tokens to {farthest} by a factor of {report.count(near / max(far, 1e-30))}, and after training "
                    f"{percent(recall['accuracy'][-1][1])} of its answers at {farthest} are right")
    return ("How far other pairs, and nothing else, move the logits of an answer (root of the mean square) while all weights are as they were drawn: "
            + "; ".join(told) + ". Vanishing is where a model begins; what it has learned to hold on to is another matter.")


def recalled(rungs: Results) -> str:
    trained = ", ".join(f"{name} {report.count(rung['recall']['parameters'])} parameters and {rung['recall']['steps']:,} updates at "
                        f"{rung['recall']['learning_rate']:g} in {report.seconds(rung['recall']['seconds'])}" for name, rung in rungs.items())
    first = next(iter(rungs.values()))["recall"]
    return (f"The share of {first['n_questions']:,} questions that got the right value; guessing among the values that were read gives "
            f"{percent(first['chance'])}. Narrow models of the same families, trained on all distances and 1 to 4 pairs mixed, at the rung's rate "
            f"and at a quarter of it for half of the time each, of which the better is told: {trained}.")


def words(bucket: Mapping[str, Any]) -> str:
    return f"{bucket['first']} or more" if bucket["last"] is None else f"{bucket['first']} to {bucket['last']}"


def score(quality: Mapping[str, Any]) -> str:
    return f"{quality['bleu']:.1f} / {quality['chrf']:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


