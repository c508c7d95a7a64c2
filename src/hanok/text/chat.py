"""Messages to token ids through a model's own chat template, as Hugging Face's `apply_chat_template` does it, but no message can forge a turn.

What a person types is broken where it spells a token that only the template may write: a mark, made of noncharacters, goes behind its first
character. The tokenizer looks for its tokens in the marked text and removes the marks before it normalises, so ids are those of the plain text.
Templates come with models and are not trusted: Jinja's sandbox keeps them in, and a budget of work ends what would run on (see `_Work`).
"""
from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from hanok.errors import ConfigError, DataError, RequestError
from hanok.text.tokenizer import Encoder, Tokenizer

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The template for a model without one of its own; its tokenizer should have <|im_start|> and <|im_end|> as special tokens."""

MAX_CHARACTERS = 8_000_000                   # characters that a template may write
MAX_WORK = 64_000_000                        # characters that its operations may make; a turn of a loop or a macro counts as 256
MAX_SECONDS = 10.0                           # after which a loop does not turn again
MAX_WIDTH = 10_000                           # columns to pad to, indent by or cut into; bits of a number

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MARK = "\ufdd0"                             # begins each mark; one in a message is followed by _BREAK, so none can be forged
_BREAK, _BEGIN, _END = (_MARK + code for code in "\ufdd1\ufdd2\ufdd3")
_STAND_INS = 0xFDD4                          # from here on: tokens of one character, which cannot be broken
_BRACKETED = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_TAG = re.compile(r"</?\w+>")
_PADDED = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")


class ChatTemplate:
    """A chat template at work with its tokenizer. ConfigError if its source is no template; safe to share between threads.

    `variables` are what the template may name besides the messages: bos_token, eos_token and the like. They are trusted; `variables` given to a
    call (tools, documents, enable_thinking) are treated as messages are. What spells a special token, or another added token in brackets, stays
    text in every string, with two exceptions: the assistant may write plain tags such as <think>, and tags that the template does not use are
    words like any others.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None):
        self.source, self.tokenizer, self.variables = source, tokenizer, dict(variables or {})
        self._template = _compile(source)
        tags = {token for token in tokenizer.added if _TAG.fullmatch(token) and token not in tokenizer.specials}
        markup = {token for token in tokenizer.added
                  if token in tokenizer.specials or _BRACKETED.fullmatch(token) and (token not in tags or token in source)}
        self._markup, self._anywhere, self._in_answers = frozenset(markup), _breaks(markup), _breaks(markup - tags)
        self._stand_ins = {ord(token): _MARK + chr(_STAND_INS + n) for n, token in enumerate(sorted(markup)) if len(token) == 1}

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as text. RequestError if the template refuses the messages or cannot render them."""
        return self._run(_checked(messages), variables, add_generation_prompt)

    def encode(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any) -> list[int]:
        """The conversation as token ids. Only the template writes special tokens; a message that spells one gets ordinary text."""
        text = self._run(self._guarded(messages), self._guard(variables, self._anywhere), add_generation_prompt)
        return self._encode(text)[0]

    def encode_for_training(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> tuple[list[int], list[bool]]:
        """Token ids, and True on each that the assistant must learn to write: its messages, each with the special token that ends its turn.

        A turn begins where the conversation before it, with the generation prompt, ends. Where the template renders that beginning differently,
        its {% generation %} blocks say what is the assistant's; DataError if it has none.
        """
        guarded, variables = self._guarded(messages), self._guard(variables, self._anywhere)
        text = self._run(guarded, variables)
        spans = self._turns(guarded, variables, text)
        if spans is None:
            if not re.search(r"\{%[-+]?\s*generation\b", self.source):
                raise DataError("this chat template renders the beginning of a conversation differently once it goes on, so that the assistant's "
                                "part cannot be told; put {% generation %} ... {% endgeneration %} around it in the template")
            text, spans = _unmarked(self._run(guarded, variables, marks=True))
        ids, offsets = self._encode(text)
        return ids, [any(begin <= start < end for begin, end in spans) for start, _ in offsets]

    def _turns(self, messages: list[dict[str, Any]], variables: dict[str, Any], text: str) -> list[tuple[int, int]] | None:
        """Where in `text` the assistant's turns stand, (begin, end); None if prefixes do not tell."""
        spans = []
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._run(messages[:n], variables, True)
            until = self._run(messages[:n + 1], variables)
            if not (text.startswith(before) and until.startswith(before)):
                return None
            last = self._last_specials.search(until, len(before))
            if last and (found := text.find(last[1], len(before))) >= 0:
                spans.append((len(before), found + len(last[1])))
            elif not last and text.startswith(until):  # turns that end in plain text are learnt to the end
                spans.append((len(before), len(until)))
            else:
                return None
        return spans

    @functools.cached_property
    def _last_specials(self) -> re.Pattern[str]:
        """Finds the special tokens, with space between, that end a text; group 1 is the first of them."""
        words = sorted(filter(str.strip, self.tokenizer.specials), key=len, reverse=True)
        specials = "|".join(map(re.escape, words)) or "(?!)"
        return re.compile(rf"({specials})(?:\s|{specials})*\Z")

    @functools.cached_property
    def _encoder(self) -> Encoder:
        restore = [(stand_in, chr(code)) for code, stand_in in self._stand_ins.items()] + [(_BREAK, "")]

        def edit(data: dict[str, Any]) -> None:
            steps: list[Any] = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in restore]
            data["normalizer"] = {"type": "Sequence", "normalizers": steps + ([data["normalizer"]] if data["normalizer"] else [])}
            data["post_processor"] = None
            for token in data["added_tokens"]:
                token["normalized"] &= token["content"] not in self._markup  # else it is looked for again when the marks are gone

        return self.tokenizer.variant(self._markup, edit)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            return self._encoder.encode(text)
        except DataError as error:
            raise RequestError(str(error)) from None

    def _guarded(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        guarded = []
        for message in _checked(messages):
            role = message["role"]
            plain = self._guard(message, self._in_answers if role == "assistant" else self._anywhere)
            if role not in ROLES and f"'{role}'" not in self.source and f'"{role}"' not in self.source:
                plain["role"] = f"{_BREAK}{plain['role']}{_BREAK}"  # a template may make a token of it: '<|' + role + '|>'
            guarded.append(plain)
        return guarded

    def _guard(self, value: Any, breaks: re.Pattern[str]) -> Any:
        """`value` with every string in it, keys too, broken where it spells a token that is not its to write."""
        if isinstance(value, str):
            return breaks.sub(rf"\g<0>{_BREAK}", value).translate(self._stand_ins)
        if isinstance(value, Mapping):
            return {self._guard(name, breaks): self._guard(part, breaks) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(part, breaks) for part in value]
        return value

    def _run(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], add_generation_prompt: bool = False, marks: bool = False) -> str:
        given = {"tools": None, "documents": None, **self.variables, **variables}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        before = _WORK.set(_Work(marks))
        written, pieces = 0, []
        try:
            for piece in self._template.generate(given):
                pieces.append(piece)
                written += len(piece)
                if written > MAX_CHARACTERS:
                    raise RequestError(f"the chat template wrote more than {MAX_CHARACTERS:,} characters; send less", "too_long")
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            if not isinstance(error, jinja2.UndefinedError):
                raise ConfigError(f"the chat template is not allowed or able to do this: {_line(error)}") from None
            raise RequestError(f"the chat template cannot render these messages: {_line(error)}") from None
        except Exception as error:           # what Python says to data of another shape than the template wants
            raise RequestError(f"the chat template cannot render these messages: {type(error).__name__}: {_line(error)}") from None
        finally:
            _WORK.reset(before)
        return "".join(pieces)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(f"got a {type(messages).__name__}, expected a list of messages, each with a role and content")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {n} is {message!r:.60}; an object with a role (such as 'user') and content was expected")
    return [dict(message) for message in messages]


def _breaks(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the character behind which a mark must go: a mark's own first, and that of each token, whatever its case."""
    rests: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len):
        if len(token) > 1:
            rests.setdefault(re.escape(token[0]), []).append(re.escape(token[1:]))
    return re.compile("|".join([_MARK, *(f"{first}(?={'|'.join(group)})" for first, group in rests.items())]), re.IGNORECASE)


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of {% generation %} blocks, and where the blocks stood."""
    plain, spans, begins = "", [], []
    for piece in re.split(f"({_BEGIN}|{_END})", text):
        if piece == _BEGIN:
            begins.append(len(plain))
        elif piece == _END and begins:
            spans.append((begins.pop(), len(plain)))
        elif piece != _END:
            plain += piece
    return plain, spans


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@dataclass
class _Work:
    """What one rendering may still do. Loops and macros pay for each turn and its fixed text; joining, repeating, formatting, filters, calls and
    output pay for the characters and items that they make, before they make them where that could be much. Time is looked at with each payment."""
    marks: bool                              # whether {% generation %} blocks are marked
    left: int = MAX_WORK
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)


_WORK: ContextVar[_Work] = ContextVar("work")


def _spend(units: int) -> None:
    work = _WORK.get()
    work.left -= units
    if work.left < 0 or time.monotonic() > work.deadline:
        raise RequestError("the chat template did more work than a conversation needs and was stopped; send less, or mend the template", "too_long")


def _weigh(value: Any) -> None:
    """Pays for all text that `value` holds, however often it holds it."""
    stack = [value]
    while stack:
        part = stack.pop()
        _spend(len(part) + 16 if isinstance(part, str) else 32)
        if isinstance(part, Mapping):
            stack += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            stack += part


def _refuse(wide: object) -> None:
    if wide:
        raise RequestError(f"the chat template asks for numbers or columns of text beyond {MAX_WIDTH:,}; mend the template")


_WIDENING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "wordwrap"})
_LOOKING = frozenset({"length", "count", "first", "last", "list", "select", "reject", "selectattr", "rejectattr", "map", "default", "d", "items",
                      "sort", "reverse", "unique", "groupby", "min", "max", "attr", "dictsort", "sum", "abs", "int", "float", "round"})


def _paid(name: str, value: Any, arguments: Sequence[Any], run: Callable[[Any], Any]) -> Any:
    """`run(value)`, an operation called `name`, paid for before where it may make much of little, and after."""
    if name in _WIDENING:
        width = max((len(part) if isinstance(part, str) else abs(part) for part in arguments if isinstance(part, str | int)), default=0)
        _refuse(width > MAX_WIDTH)
        places = 0 if not isinstance(value, str) else len(value) if name == "wordwrap" else value.count("\n") + value.count("\t")
        _spend(width * (1 + places))
    elif name == "join":
        value = value if isinstance(value, str) else list(value)
        _spend(len(value) * len(str(arguments[0])) if arguments else 0)
    elif name == "replace" and len(arguments) > 1:
        _spend(str(value).count(str(arguments[0])) * len(str(arguments[1])))
    if name not in _LOOKING and not isinstance(value, str):
        _weigh(value)
    result = run(value)
    _spend(len(result) if isinstance(result, str | list | tuple) else 1)
    return result


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, paying for its work."""
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Payments], finalize=_written)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _tojson
        self.filters = {name: _paid_filter(name, filter_) for name, filter_ in self.filters.items()}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr == "translate")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            _refuse(bits > MAX_WIDTH)
        elif operator == "%" and isinstance(left, str):
            _refuse(_PADDED.search(left))
            _weigh(right)
        elif operator in "+*":
            sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
            times = [side for side in (left, right) if isinstance(side, int)]
            _spend(max(sum(sizes) * (times[0] if operator == "*" and times else 1), 1))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> str:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(value.__self__)]
            _refuse(any("{" in spec or re.search(r"\d{5}", spec) for spec in specs))
            _weigh([args, kwargs])
            return wrapped(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        run = super().call
        if not isinstance(owner, str):
            _spend(256)                      # a macro, most likely
            return run(__context, __obj, *args, **kwargs)
        if name == "join" and args:
            return _paid(name, args[0], [owner], lambda items: run(__context, __obj, items))
        return _paid(name, owner, [*args, *kwargs.values()], lambda _: run(__context, __obj, *args, **kwargs))


def _paid_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    leading = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @functools.wraps(filter_)
    def paid(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _refuse(_PADDED.search(str(args[leading])))
            _weigh([args[leading + 1:], kwargs])
        rest = args[leading + 1:]
        return _paid(name, args[leading], [*rest, *kwargs.values()], lambda value: filter_(*args[:leading], value, *rest, **kwargs))

    return paid


class _Payments(Extension):
    """The {% generation %} tag, and what the compiled template calls to pay."""
    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([self.call_method("mark", [nodes.Const(mark)])], lineno=line) for mark in (_BEGIN, _END))
        return [begin, nodes.Scope(body, lineno=line), end]

    def mark(self, mark: str) -> str:
        return mark if _WORK.get().marks else ""

    def turn(self, cost: int) -> bool:
        _spend(cost)
        return True

    def concat(self, *parts: Any) -> str:
        _weigh(parts)
        return "".join(map(str, parts))


class _Paying(NodeTransformer):
    """Puts the payments into a template's syntax tree."""

    def __init__(self, payments: _Payments):
        self._payments = payments

    def _turn(self, node: nodes.Node) -> nodes.Call:
        fixed = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        return self._payments.call_method("turn", [nodes.Const(256 + fixed)], lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        turn = self._turn(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        if node.test is not None:            # `for x in xs if ...` turns without entering its body
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:
        turn = self._turn(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._payments.call_method("concat", node.nodes, lineno=node.lineno)


def _compile(source: str) -> jinja2.Template:
    environment = _Environment()
    payments: Any = environment.extensions[_Payments.identifier]
    before = _WORK.set(_Work(False))         # constants are folded now
    try:
        tree = _Paying(payments).visit(environment.parse(source))
        tree.set_environment(environment)
        return environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template, line {error.lineno}: {_line(error)}") from None
    except (RecursionError, SyntaxError, MemoryError) as error:
        raise ConfigError(f"the chat template is nested too deeply: {_line(error)}") from None
    finally:
        _WORK.reset(before)


def _written(value: Any) -> str:
    if not isinstance(value, str):
        _weigh(value)
    text = str(value)
    _spend(len(text))
    return text


def _raise_exception(message: str) -> None:
    raise RequestError(f"the chat template refuses these messages: {' '.join(str(message).split())[:300]}")


def _strftime_now(format: str) -> str:
    _refuse(len(format) > MAX_WIDTH or _PADDED.search(format))
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    _refuse(isinstance(indent, int) and indent > 16)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
