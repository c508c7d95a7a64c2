"""hanok next BUNDLE --prompt TEXT --temperature T"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed

if TYPE_CHECKING:
    from hanok.generate.distribution import NextTokens

BAR = 40
"""Signs of a bar that means certainty."""


def next(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")],
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True, help="What comes before; its special tokens are parsed. For an encoder-decoder, "
                                                                     "the source.")],
    temperature: Annotated[list[float] | None, Parameter(negative="", show_default=False, help="0: greedy; 1: the model's own distribution; may be "
                                                                                               "given several times. By default 0.2, 1 and 2.")]
    = None,
    top: Annotated[int, Parameter(help="Tokens to show.")] = 10,
    top_k: Annotated[int, Parameter(help="Leave the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, Parameter(help="Leave the likeliest tokens that together reach p; 1: all.")] = 1.0,
    out: Annotated[Path | None, Parameter(help="The picture, a PNG; without it everything stays on the terminal.")] = None,
    json: Json = False,
) -> None:
    """Show what a model expects next: the likeliest tokens at each temperature, and how open the question is, in bits.

    An entropy of 0 bits means that one token is certain to be taken, 1 bit a fair coin, n bits a choice among 2^n alike.
    """
    from hanok import pictures, report
    from hanok.api import load
    from hanok.bundle.pull import find
    from hanok.probe import has_attention
    if out is not None:
        report.check_picture(out)
    model = load(find(bundle))
    spreads = model.next_tokens(prompt, temperature or (0.2, 1.0, 2.0), top=top, top_k=top_k, top_p=top_p)
    if out is not None:
        panels = [pictures.NextPanel(f"temperature {spread.temperature:g}", openness(spread), spread.probabilities, spread.rest)
                  for spread in spreads]
        pictures.plot_next(spreads[0].tokens, panels, out, title="What comes next?", unit=f"after “{' '.join(prompt.split())}”")
    if json:
        emit({"bundle": str(bundle), "prompt": prompt, "distributions": [spread.to_dict() for spread in spreads],
              "picture": None if out is None else str(out)})
        return
    for spread in spreads:
        print(f"temperature {spread.temperature:g}: {openness(spread)}")
        rows = [[repr(token), f"{100 * p:.1f}%", "█" * round(BAR * p)] for token, p in zip(spread.tokens, spread.probabilities)]
        print(report.table(["token", "probability", ""], [*rows, ["all others", f"{100 * spread.rest:.1f}%", "░" * round(BAR * spread.rest)]],
                           align="lrl"), end="\n\n")
    say(f"the picture is {shown(out)}" if out is not None else "no picture was asked for; --out FILE.png draws one")
    next_commands(f'hanok generate {typed(bundle)} --prompt "..." --temperature {spreads[-1].temperature:g}',
                  *([f'hanok attend {typed(bundle)} --text "..."'] if has_attention(model.bundle.model) else []))


def openness(spread: NextTokens) -> str:
    """The entropy in words."""
    bits = f"{spread.entropy:.2f} bits"
    if spread.temperature == 0:
        return f"{bits}: greedy"
    return f"{bits}: as among {2 ** spread.entropy:,.0f} alike" if spread.entropy >= 1 else bits
