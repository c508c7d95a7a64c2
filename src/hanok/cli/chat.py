"""hanok chat BUNDLE"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import next_commands, say, typed
from hanok.errors import DataError, RequestError

if TYPE_CHECKING:
    from hanok.contracts import Request

HELP = """/help             this text
/system TEXT      what the model is told before everything else; begins anew
/reset            forget the conversation
/undo             forget the last question and its answer
/set NAME VALUE   temperature, top_p, top_k, max_new_tokens, seed
/history          the conversation so far
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer"""


def chat(
    bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model; it must have a chat template.")],
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True, help="What the model is told before everything else.")] = None,
    max_new_tokens: Annotated[int, Parameter(help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float | None, Parameter(help="0: the likeliest token each time.")] = None,
    top_p: Annotated[float | None, Parameter(help="Choose among the likeliest tokens that together reach p.")] = None,
    seed: Annotated[int, Parameter(help="Of the random numbers.")] = 0,
    beyond_context: Annotated[bool, Parameter(negative="", show_default=False, help="Go on past the trained context, where positions allow "
                                                                                    "it.")] = False,
) -> None:
    """Talk with a model: streaming, with history; /help inside. Lines may also come through a pipe."""
    from hanok.api import load
    from hanok.bundle.pull import find
    model = load(find(bundle))
    _ = model.template
    talk = Conversation(model, system, {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
                                        "beyond_context": beyond_context})
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history in input()
    if sys.stdin.isatty():
        say(f"{bundle}: type /help for commands, /quit to leave")
    while (line := ask()) is not None:
        if not talk.take(line.strip()):
            break
    next_commands(f"hanok score {typed(bundle)} --text FILE")


def ask() -> str | None:
    """A line, or None at the end."""
    try:
        return input("you> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        say()
        return ""
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not {error.encoding}: 0x{error.object[error.start]:02x} at byte {error.start} of what was read; "
                        f"send {error.encoding}") from None


class Conversation:
    """What was said so far, and the commands that change it."""

    def __init__(self, model: Any, system: str | None, options: dict[str, Any]):
        self.model, self.options, self.warned = model, options, False
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def take(self, line: str) -> bool:
        """Answers a line; False ends the conversation."""
        if not line:
            return True
        if not line.startswith("/"):
            self.answer(line)
            return True
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {"help": lambda _: print(HELP), "system": self.system, "reset": self.reset, "undo": self.undo,
                                                      "set": self.set, "history": self.history}
        if name in ("quit", "exit"):
            return False
        if name not in commands:
            say(f"no command /{name}; /help lists them")
        else:
            commands[name](rest.strip())
        return True

    def answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        said, reason = "", None
        try:
            request = self.model.chat_request(self.messages, **self.options)
            self.warn(request)
            for _, chunk in self.model.run([request]):
                said, reason = said + chunk.text, chunk.finish_reason
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            reason = "interrupted"
        except RequestError as error:
            self.messages.pop()
            if not sys.stdin.isatty():
                raise
            say(f"hanok: {error} (/reset begins anew)")
            return
        print()
        if reason != "stop":
            say(f"({reason})")
        self.messages.append({"role": "assistant", "content": said})

    def warn(self, request: Request) -> None:
        """Says once that the trained context may be passed. RequestError for what cannot be served."""
        from hanok.generate.run import may_pass
        self.model.check(request)
        if not self.warned and may_pass(request, self.model.config.max_seq_len):
            say(f"going past the {self.model.config.max_seq_len} tokens that it was trained for; quality may fall")
            self.warned = True

    def system(self, text: str) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []

    def reset(self, _: str) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def undo(self, _: str) -> None:
        if len(self.messages) >= 2 and self.messages[-1]["role"] == "assistant":
            del self.messages[-2:]

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        kinds: dict[str, Callable[[str], Any]] = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int}
        if name not in kinds:
            say(f"/set knows {', '.join(kinds)}")
            return
        try:
            self.options[name] = kinds[name](value)
        except ValueError:
            say(f"/set {name}: got '{value}', expected a number")

    def history(self, _: str) -> None:
        for message in self.messages:
            print(f"{message['role']}> {message['content']}")
