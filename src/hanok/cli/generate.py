"""hanok generate BUNDLE --prompt TEXT"""
from __future__ import annotations

import sys
import time
from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, typed


def generate(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True, help="What to go on from; its special tokens are parsed. For an encoder-decoder, "
                                                                     "the source.")],
    max_new_tokens: Annotated[int, Parameter(help="Tokens at most.")] = 128,
    temperature: Annotated[float | None, Parameter(help="0: the likeliest token each time; 1: the model's own distribution.")] = None,
    top_k: Annotated[int | None, Parameter(help="Choose among the k likeliest tokens; 0: all.")] = None,
    top_p: Annotated[float | None, Parameter(help="Choose among the likeliest tokens that together reach p; 1: all.")] = None,
    min_p: Annotated[float | None, Parameter(help="Leave out tokens less likely than this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, Parameter(help="Divides the logits of tokens already seen; 1: off.")] = None,
    presence_penalty: Annotated[float | None, Parameter(help="Nats taken once from tokens already written; 0: off.")] = None,
    frequency_penalty: Annotated[float | None, Parameter(help="Nats taken for each time that a token was written; 0: off.")] = None,
    seed: Annotated[int, Parameter(help="Of the random numbers.")] = 0,
    n: Annotated[int, Parameter(name=("--n", "-n"), help="Answers, all from one reading of the prompt.")] = 1,
    stop: Annotated[list[str] | None, Parameter(negative="", allow_leading_hyphen=True, help="A string that ends the answer; may be given several "
                                                                                             "times.")] = None,
    json: Json = False,
) -> None:
    """Let a model go on from a prompt. The text streams to stdout."""
    from hanok.api import load, whole
    from hanok.bundle.pull import find
    model = load(find(bundle))
    request = model.request(
        prompt, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, stop=tuple(stop or ()),
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty)
    begin = time.perf_counter()
    if json or n > 1:
        answers = model.answers([request])[0]
    else:
        chunks = []
        for _, chunk in model.run([request]):
            chunks.append(chunk)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        print()
        answers = [whole(chunks, len(request.token_ids))]
    took = time.perf_counter() - begin
    n_tokens = sum(len(answer.token_ids) for answer in answers)
    if json:
        emit({"prompt": prompt, "prompt_tokens": len(request.source_ids or request.token_ids), "answers": [
            {"text": a.text, "tokens": len(a.token_ids), "finish_reason": a.finish_reason} for a in answers], "seconds": took})
        return
    if n > 1:
        print("\n\n".join(f"[{i + 1}] {answer.text}" for i, answer in enumerate(answers)))
    say(f"{n_tokens} tokens, {n_tokens / took:.1f} a second, finish reason: {answers[0].finish_reason}")
    next_commands(f"hanok score {typed(bundle)} --text FILE" if model.family.objective == "causal" else f"hanok show {typed(bundle)}")
