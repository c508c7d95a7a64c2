"""`hanok`: the verbs, none of which is imported before it is asked for, and the one place where a mistake becomes a line and an exit status.

Status 0: done. 1: a fault of ours, with a traceback. 2: a mistake that the message explains. 130: interrupted.
"""
from __future__ import annotations

import os
import sys

from cyclopts import App
from cyclopts.exceptions import CycloptsError

import hanok
from hanok.errors import HanokError

VERBS = {
    "quickstart": ("quickstart", "The first five minutes: a real model answers, raw text becomes a trained model."),
    "pull": ("pull", "Fetch a model as a bundle."),
    "show": ("show", "Say what a bundle is: family, sizes, parameters, memory, tokenizer, lineage."),
    "tokenizer": ("tokenizer:app", "Train a tokenizer."),
    "pretrain": ("pretrain", "Train a model from raw text."),
    "generate": ("generate", "Let a model go on from a prompt."),
    "chat": ("chat", "Talk with a model."),
    "score": ("score", "Say how well a model predicts a text."),
    "export": ("export", "Write a bundle for other tools."),
    "import": ("import_model", "Make a bundle of a Hugging Face folder or a GGUF file."),
}


def build_app() -> App:
    """The command line, without any verb's module."""
    app = App(name="hanok", help="One toolkit for the whole life of a Transformer: text, tokenizer, training, evaluation, a model that answers.",
              version=hanok.__version__, version_flags=["--version"], help_format="plaintext")
    for verb, (place, help_text) in VERBS.items():
        module, _, name = place.partition(":")
        app.command(f"hanok.cli.{module}:{name or module}", name=verb, help=help_text)
    return app


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    try:
        build_app()(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        leave(2, " ".join(str(error).split()))
    except HanokError as error:
        leave(2, str(error))
    except KeyboardInterrupt:
        leave(130, "interrupted; nothing was left half-written")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def leave(status: int, message: str) -> None:
    """One line on stderr, and out."""
    print(f"hanok: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
