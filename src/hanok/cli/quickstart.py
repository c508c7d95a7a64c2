"""hanok quickstart: the first five minutes. A real open model answers; raw text becomes a tokenizer, a trained model, a bundle and a table.

Everything is what the other verbs do; nothing here is known to them. What cannot be reached is left out, and said.
"""
from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import next_commands, say, shown

CHAT_MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
PROMPT = "def read(self, path):\n"
SAMPLE_EVERY_S = 20
ATTENTION_MODEL, WORD = "all-minilm-l6-v2", "novel"
SENTENCES, MEANINGS = ("Attention is a novel idea", "I read a novel book"), ("new", "innovative", "fiction")
SMOL_BYTES = 24 * 1024
"""Bytes of the held-out text that SmolLM2 is asked about: it is thirty times the size of ours."""


@dataclass
class Story:
    """What was made so far."""
    folder: Path
    begin: float = field(default_factory=time.perf_counter)
    chat_model: Any = None
    missing: list[str] = field(default_factory=list)

    def part(self, number: int, title: str) -> None:
        print(f"\n[{number}/7] {title}", flush=True)


def quickstart(
    *,
    text: Annotated[list[Path] | None, Parameter(negative="", help="What to learn from; else the Python standard library's source.")] = None,
    out: Annotated[Path | None, Parameter(help="The run's new folder; runs/quickstart, or the next free name.")] = None,
    seconds: Annotated[float, Parameter(help="Training time.")] = 120.0,
    prompt: Annotated[str, Parameter(show_default=False, help="What the model is asked to go on from while it learns.")] = PROMPT,
    offline: Annotated[bool, Parameter(negative="", help="Leave out what was not fetched before.")] = False,
    seed: Annotated[int, Parameter(help="Of weights and of the order of the text.")] = 0,
) -> None:
    """The first five minutes: a real model answers, raw text becomes a trained model."""
    from hanok.disk import refuse_occupied
    folder = out or free_name(Path("runs") / "quickstart")
    refuse_occupied(folder)
    recipe = recipe_of(text, seconds, seed)
    story = Story(folder)
    a_real_model_answers(story, offline)
    prepared = text_becomes_tokens(story, recipe)
    run, bundle = tokens_become_a_model(story, prepared, prompt)
    pictures = a_bundle_with_pictures(story, run, bundle)
    scores(story, prepared, bundle, pictures, text is None)
    a_word_is_followed(story, offline, pictures)
    what_was_made(story, run, prompt, pictures)


def free_name(path: Path) -> Path:
    """`path`, or path-2, path-3, ... whichever is not there yet."""
    taken = (path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 10_000)))
    return next(candidate for candidate in taken if not candidate.exists())


def recipe_of(text: list[Path] | None, seconds: float, seed: int):
    """The default family at a size that learns something in two minutes on two cores."""
    from hanok.data.sources import standard_library
    from hanok.train.recipe import DataRecipe, ModelRecipe, Recipe, TrainRecipe
    sources = tuple(map(str, text or standard_library()))
    return Recipe(
        ModelRecipe(preset="tiny"), data=DataRecipe(sources),
        train=TrainRecipe(steps=100_000, seconds=seconds, micro_batch_size=4, warmup_steps=20, eval_every=200, eval_tokens=131_072,
                          checkpoint_every=0, seed=seed))


# ---- 1 ---------------------------------------------------------------------------------------------------------
def a_real_model_answers(story: Story, offline: bool) -> None:
    from hanok.api import load
    story.part(1, f"a real open model answers: {CHAT_MODEL}")
    path = fetched(story, CHAT_MODEL, offline)
    if path is None:
        return
    story.chat_model = load(path)
    print(f"you> {QUESTION}\nit>  ", end="", flush=True)
    begin, n_tokens = time.perf_counter(), 0
    for chunk in story.chat_model.stream_chat(QUESTION, max_new_tokens=64):
        n_tokens += len(chunk.token_ids)
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    print(f"\n     ({n_tokens} tokens, {n_tokens / (time.perf_counter() - begin):.1f} a second, on this machine)")


def fetched(story: Story, name: str, offline: bool) -> Path | None:
    """A real model's bundle; None, and said, where it cannot be reached."""
    from hanok.bundle.pull import pull
    from hanok.errors import HanokError
    from hanok.report import Progress
    try:
        with Progress("fetching", unit="bytes") as bar:
            return pull(name, progress=bar.bytes_callback(), offline=offline)
    except HanokError as error:
        story.missing.append(f"{name}: {error}")
        print(f"left out: {error}")
        return None


# ---- 2 ---------------------------------------------------------------------------------------------------------
def text_becomes_tokens(story: Story, recipe: Any) -> Any:
    from hanok.train.pretrain import prepare
    story.part(2, "raw text becomes tokens")
    prepared = prepare(recipe, print)
    info = prepared.train.info
    print(f"{info.bytes / 1e6:.1f} MB are {info.tokens / 1e6:.2f} million tokens: {info.bytes / info.tokens:.2f} bytes a token")
    return prepared


# ---- 3 ---------------------------------------------------------------------------------------------------------
def tokens_become_a_model(story: Story, prepared: Any, prompt: str) -> tuple[Any, Any]:
    from hanok import report
    from hanok.api import LoadedModel
    from hanok.cli.pretrain import live
    from hanok.train.pretrain import Pretraining
    run = Pretraining(prepared, story.folder)
    n = sum(p.numel() for p in run.model.parameters())
    seconds = prepared.recipe.train.seconds
    story.part(3, f"a {prepared.family.name} of {report.count(n)} parameters learns for {report.seconds(seconds)}; it is asked every "
                  f"{SAMPLE_EVERY_S} seconds to go on from {prompt.strip()!r}")
    asked = 0

    def ask(step: Any) -> None:
        nonlocal asked
        if step.seconds < asked * SAMPLE_EVERY_S or run.trainer.done:
            return
        asked += 1
        run.validation = run.validation or run.evaluate()
        run.model.eval()
        written = LoadedModel(run.bundle()).generate(prompt, max_new_tokens=40, temperature=0.7, top_p=0.9).text
        run.model.train()
        bar.print(f"  after {step.seconds:3.0f} s, {run.validation.bits_per_byte:.2f} bits/byte: {' '.join(written.split())[:110]!r}")

    with report.Progress("training", total=100, unit="percent") as bar:
        bundle = run.run(ask, lambda step: bar.update(100 * step.progress, **live(step, run)))
    return run, bundle


# ---- 4 ---------------------------------------------------------------------------------------------------------
def a_bundle_with_pictures(story: Story, run: Any, bundle: Any) -> list[Path]:
    from hanok.cli.pretrain import picture_of
    story.part(4, "what was learned, as a bundle")
    metrics = bundle.manifest["metrics"]
    print(f"{metrics['steps']} steps, {metrics['tokens'] / 1e6:.2f} million tokens, {metrics['validation_bits_per_byte']:.3f} bits a byte "
          "on text that it never saw")
    return picture_of(run)


# ---- 5 ---------------------------------------------------------------------------------------------------------
def scores(story: Story, prepared: Any, bundle: Any, pictures: list[Path], is_public: bool) -> None:
    from hanok import report
    from hanok.api import LoadedModel
    from hanok.errors import HanokError
    from hanok.evaluate.baselines import gzip_bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte
    story.part(5, "bits a byte on the held-out text, beside things that are no neural networks")
    seen, held_out = ("\n".join(document.text for document in documents) for documents in (prepared.documents, prepared.held_out))
    train, whole, few = seen.encode(), held_out.encode(), held_out.encode()[:SMOL_BYTES].decode(errors="ignore")
    ours = LoadedModel(bundle)
    rows: list[tuple[str, float, int]] = [
        ("gzip", gzip_bits_per_byte(train, whole), len(whole)), ("byte 5-gram", ngram_bits_per_byte(train, whole), len(whole)),
        ("xz, given the training text", xz_bits_per_byte(train, whole), len(whole)), ("ours", ours.score(held_out).bits_per_byte, len(whole))]
    if story.chat_model is not None:
        rows += [("ours", ours.score(few).bits_per_byte, len(few.encode())),
                 ("SmolLM2-135M", story.chat_model.score(few).bits_per_byte, len(few.encode()))]
    print(report.table(["model", "bits/byte", "on"], [[name, f"{bits:.3f}", report.size(n)] for name, bits, n in rows], align="lrr"))
    if story.chat_model is not None:
        seen = ", very likely this source among it" if is_public else ""
        print(f"SmolLM2 has a hundred times the weights and learned from far more text{seen}.")
    ngram, xz, best = (bits for _, bits, _ in rows[1:4])
    if ngram < best:
        print(f"Counting wins too ({ngram:.2f}): a 5-gram reads all of the text in a second; what counts cannot say takes a network longer.")
    if xz < best:
        weights, share = sum(p.numel() for p in bundle.model.parameters()), bundle.manifest["metrics"]["tokens"] / prepared.train.info.tokens
        print(f"xz wins ({xz:.2f} against {best:.2f}): it may copy whole lines from the {len(train) / 1e6:.0f} MB of training text that it carries\n"
              f"along, and source code repeats itself; ours carries {report.size(4 * weights)} of weights and saw {share:.0%} of the text once.\n"
              "More minutes close the gap.")
    try:
        picture = story.folder / "bits_per_byte.png"
        report.plot_bars([f"{name}, {report.size(n)}" for name, _, n in rows], [bits for _, bits, _ in rows], picture,
                         title="Held-out text", unit="bits a byte (less is better)", highlight=[f"ours, {report.size(n)}" for _, _, n in rows])
        pictures.append(picture)
    except HanokError as error:
        say(str(error))


# ---- 6 ---------------------------------------------------------------------------------------------------------
def a_word_is_followed(story: Story, offline: bool, pictures: list[Path]) -> None:
    from hanok.api import load
    from hanok.cli.attend import draw
    from hanok.errors import HanokError
    from hanok.word_study import study
    story.part(6, f"attention, looked at: what ties '{WORD}' to its neighbours, and does it take on a meaning from them?")
    path = fetched(story, ATTENTION_MODEL, offline)
    if path is None:
        return
    seen = study(load(path).attention, SENTENCES, WORD, MEANINGS)
    print("\n".join(seen.verdicts()))
    try:
        picture = story.folder / f"{WORD}.png"
        draw(seen, picture)
        pictures.append(picture)
    except HanokError as error:
        say(str(error))


# ---- 7 ---------------------------------------------------------------------------------------------------------
def what_was_made(story: Story, run: Any, prompt: str, pictures: list[Path]) -> None:
    from hanok import report
    story.part(7, f"done in {report.seconds(time.perf_counter() - story.begin)}; what was made:")
    folder = shown(story.folder)
    print(f"  {folder}/  the bundle: weights, config, tokenizer, manifest, and README.md, its card")
    print(f"  {folder}/recipe.toml, metrics.csv  what was done, and how it went")
    for picture in pictures:
        print(f"  {shown(picture)}")
    for missing in story.missing:
        print(f"  left out: {missing}")
    next_commands(f'hanok generate {folder} --prompt "{prompt.splitlines()[0]}" --temperature 0.7', f"hanok show {folder}",
                  *([f"hanok chat {CHAT_MODEL}"] if story.chat_model is not None else []),
                  *([f'hanok attend {ATTENTION_MODEL} --text "{SENTENCES[0]}"'] if any(p.name == f"{WORD}.png" for p in pictures) else []),
                  f"hanok pretrain YOUR_TEXT --out {shown(free_name(Path('runs') / 'mine'))}", f"hanok export {folder} {folder}-hf")
