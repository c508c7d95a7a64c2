"""`hanok`: the verbs, none of which is imported before it is asked for, and the one place where a mistake becomes a line and an exit status.

Status 0: done. 1: a fault of ours, with a traceback. 2: a mistake, or a machine's refusal, that the message explains. 130: interrupted.
"""
from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from cyclopts import App
from cyclopts.exceptions import CycloptsError, MissingArgumentError, UnknownCommandError, UnusedCliTokensError

import hanok
from hanok.disk import disk_error
from hanok.errors import HanokError, nearest

VERBS = {
    "quickstart": ("quickstart", "The first five minutes: a real model answers, raw text becomes a trained model."),
    "pull": ("pull", "Fetch a model as a bundle."),
    "show": ("show", "Say what a bundle is: family, sizes, parameters, memory, tokenizer, lineage."),
    "families": ("families", "List the model families, or one family's presets with their sizes."),
    "tokenizer": ("tokenizer:app", "Train a tokenizer, or bring one of another tool."),
    "corpus": ("corpus:app", "Build a corpus from any sources."),
    "plan": ("plan", "Say what a run would be: model, batch, steps, memory, disk, time and expected loss."),
    "pretrain": ("pretrain", "Train a model from raw text."),
    "generate": ("generate", "Let a model go on from a prompt."),
    "chat": ("chat", "Talk with a model."),
    "next": ("next", "Show what a model expects next, at each temperature."),
    "attend": ("attend", "Show who looks at whom: a model's attention in words."),
    "score": ("score", "Say how well a model predicts a text."),
    "ladder": ("ladder", "Climb from RNN to Transformer: four models on the same pairs and minutes."),
    "export": ("export", "Write a bundle for other tools."),
    "import": ("import_model", "Make a bundle of a Hugging Face folder, a GGUF file, a nanoGPT checkpoint or a llama2.c file."),
}


def build_app() -> App:
    """The command line, without any verb's module."""
    app = App(name="hanok", help="One toolkit for the whole life of a Transformer: text, tokenizer, training, evaluation, a model that answers.",
              version=hanok.__version__, version_flags=["--version"], help_format="plaintext", suppress_keyboard_interrupt=False)
    for verb, (place, help_text) in VERBS.items():
        module, _, name = place.partition(":")
        app.command(f"hanok.cli.{module}:{name or module}", name=verb, help=help_text)
    return app


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")         # type: ignore[union-attr]  # a terminal that lacks a letter shows a ? for it
    try:
        build_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        leave(2, usage(error))
    except HanokError as error:
        leave(2, str(error))
    except KeyboardInterrupt as interrupt:
        leave(130, f"interrupted; {str(interrupt) or 'nothing was left half-written'}")
    except BrokenPipeError:
        forget_output()
        sys.exit(141)
    except OSError as error:
        forget_output()                                      # what the machine refuses is no fault of ours, wherever it was asked
        leave(2, str(disk_error(Path(error.filename or "the output"), error)))


def usage(error: CycloptsError) -> str:
    """A mistake in the command itself, and where to look."""
    match error:
        case UnknownCommandError(unused_tokens=[token, *_], app=App() as app):
            told = f"unknown command '{token}'; {nearest(token, (name for name in app if not name.startswith('-')))}"
        case MissingArgumentError(keyword=None, argument=argument) if argument is not None and argument.index is not None:
            told = f"{argument.name.lstrip('-').upper()} is missing"
        case UnusedCliTokensError(unused_tokens=[token, *_]):
            told = f"'{token}' is one argument too many"
        case _:
            told = str(error).rstrip(".")
    return f"{told} (`{' '.join(('hanok', *(error.command_chain or ())))} --help` says more)"


def forget_output() -> None:
    """What is still to be printed goes nowhere, so that leaving does not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave(status: int, message: str) -> NoReturn:
    """One line on stderr, whatever stands in the message, and out."""
    line = " ".join(part.strip() for part in message.splitlines())
    print("hanok: " + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
