"""hanok generate BUNDLE --prompt TEXT"""
from __future__ import annotations

import sys
import time
from typing import Annotated, Any

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
    no_repeat_ngram: Annotated[int | None, Parameter(help="No N tokens in a row come twice, in prompt and answer together; 0: off.")] = None,
    beams: Annotated[int, Parameter(help="Beam search: keep N answers side by side, give the likeliest; 1: off. Nothing is drawn.")] = 1,
    length_penalty: Annotated[float | None, Parameter(help="A beam's score is log-probability / length^this; more favours length.")] = None,
    beyond_context: Annotated[bool, Parameter(negative="", show_default=False, help="Go on past the trained context, where positions allow "
                                                                                    "it.")] = False,
    seed: Annotated[int, Parameter(help="Of the random numbers.")] = 0,
    n: Annotated[int, Parameter(name=("--n", "-n"), help="Answers, all from one reading of the prompt; with beams the best n.")] = 1,
    stop: Annotated[list[str] | None, Parameter(negative="", allow_leading_hyphen=True, help="A string that ends the answer; may be given several "
                                                                                             "times.")] = None,
    json: Json = False,
) -> None:
    """Let a model go on from a prompt. The text streams to stdout."""
    from hanok.api import load, whole
    from hanok.bundle.pull import find
    from hanok.generate.run import may_pass
    model = load(find(bundle), rows=max(1, n, beams))
    request = model.request(
        prompt, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, stop=tuple(stop or ()),
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        no_repeat_ngram_size=no_repeat_ngram, n_beams=beams, length_penalty=length_penalty, beyond_context=beyond_context)
    model.check(request)
    if may_pass(request, context := model.config.max_seq_len):
        say(f"going past the {context} tokens that it was trained for; quality may fall")
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
            {"text": a.text, "tokens": len(a.token_ids), "finish_reason": a.finish_reason, "score": a.score} for a in answers], "seconds": took})
        return
    if n > 1:
        print("\n\n".join(f"[{i + 1}]{scored(answer)} {answer.text}" for i, answer in enumerate(answers)))
    full = any(answer.finish_reason == "length" and len(answer.token_ids) < max_new_tokens for answer in answers)
    hint = "" if model.model.max_positions is not None else "; --beyond-context goes on"
    say(f"{n_tokens} tokens, {n_tokens / took:.1f} a second, finish reason: {', '.join(dict.fromkeys(a.finish_reason for a in answers))}"
        + (f" (the context of {context} tokens is full{hint})" if full else "") + (scored(answers[0]) if n == 1 else ""))
    next_commands(f"hanok score {typed(bundle)} --text FILE" if model.family.objective == "causal" else f"hanok show {typed(bundle)}")


def scored(answer: Any) -> str:
    """A beam's score, where there is one."""
    return "" if answer.score is None else f" (score {answer.score:.4f})"
