"""`hanok chat`, driven through a pipe and through a terminal: commands, history, streaming, Ctrl-C and Ctrl-D."""
from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import Shell, edit
from terminal import PATIENCE_S

import hanok

FEW = ("--max-new-tokens", 6)


# ---- through a pipe
def said(shell: Shell, bundle: Path, *lines: str, options: tuple[object, ...] = FEW) -> tuple[list[str], list[str]]:
    """Lines of stdout, and of stderr."""
    ended = shell("chat", bundle, *options, stdin="".join(f"{line}\n" for line in lines).encode())
    assert ended.status == 0, ended
    return ended.out.splitlines(), ended.lines


@pytest.fixture
def talker(endless: Path) -> Path:
    """A model that says words: it draws them, always the same."""
    edit(endless / "generation.json", temperature=1.0, top_k=20)
    return endless


def test_a_conversation_has_a_history(shell: Shell, talker: Path):
    out, err = said(shell, talker, "The red house", "and a door?", "/history", "/quit", "never read")
    model, messages = hanok.load(talker), []
    for question in ("The red house", "and a door?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": model.chat(messages, max_new_tokens=6).text})
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    history = [f"{message['role']}> {message['content']}" for message in messages]
    assert "\n".join(out) == "\n".join([*answers, *history])
    assert err == ["(length)", "(length)", f"next: hanok score {talker} --text FILE"]
    assert answers[1] != model.chat("and a door?", max_new_tokens=6).text


def test_system_undo_and_reset(shell: Shell, talker: Path):
    assert said(shell, talker, "/system Be brief.", "/history")[0] == ["system> Be brief."]
    assert said(shell, talker, "/history", options=(*FEW, "--system", "- Be brief."))[0] == ["system> - Be brief."]
    out, _ = said(shell, talker, "/system Be brief.", "one", "two", "/undo", "/history")
    assert "system> Be brief." in out and "user> one" in out and "user> two" not in out
    out, _ = said(shell, talker, "/system Be brief.", "one", "/undo", "/undo", "/history")
    assert out[-1] == "system> Be brief." and "user> one" not in out
    out, _ = said(shell, talker, "/system Be brief.", "one", "/reset", "/history")
    assert out[-1] == "system> Be brief." and "user> one" not in out
    assert said(shell, talker, "/system Be brief.", "/system", "/history")[0] == []


def test_undo_takes_back_what_was_asked_and_said(shell: Shell, talker: Path):
    first, _ = said(shell, talker, "one", "/undo", "two", "/history")
    second, _ = said(shell, talker, "two", "/history")
    assert first[-len(second):] == second


def test_settings_change_answers(shell: Shell, talker: Path):
    out, _ = said(shell, talker, "/set temperature 0", "/set max_new_tokens 3", "one")
    assert "\n".join(out) == hanok.load(talker).chat("one", max_new_tokens=3, temperature=0.0).text
    out, _ = said(shell, talker, "/set seed 5", "/set top_p 0.9", "/set top_k 7", "one")
    assert "\n".join(out) == hanok.load(talker).chat("one", max_new_tokens=6, seed=5, top_p=0.9, top_k=7).text


def test_what_is_no_command_is_told_and_the_talk_goes_on(shell: Shell, model: Path):
    out, err = said(shell, model, "/frobnicate", "/set", "/set colour red", "/set seed x", "", "   ", "/help")
    assert [line.split()[0] for line in out] == ["/help", "/system", "/reset", "/undo", "/set", "/history", "/quit"]
    assert err[0] == "no command /frobnicate; /help lists them"
    assert err[1] == err[2] == "/set knows temperature, top_p, top_k, max_new_tokens, seed"
    assert err[3] == "/set seed: got 'x', expected a number" and err[4].startswith("next: ")


def test_what_cannot_be_answered_ends_a_pipe_in_one_line(shell: Shell, model: Path):
    line = shell.refused("chat", model, stdin=b"hello " * 100 + b"\n/help\n")
    assert "the prompt has 614 tokens, the model's context 64" in line
    assert "standard input: not utf-8: 0xff" in shell.refused("chat", model, stdin=b"\xff\n")
    assert "temperature is -1.0" in shell.refused("chat", model, "--temperature", -1, stdin=b"hello\n")


def test_a_message_may_be_korean(shell: Shell, talker: Path):
    assert "user> 한옥은 어떤 집인가요?" in said(shell, talker, "한옥은 어떤 집인가요?", "/history")[0]


# ---- through a terminal
class Terminal:
    """A hanok command on a terminal of its own."""

    def __init__(self, *arguments: object, env: Mapping[str, str], cwd: Path):
        program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from hanok.cli.main import main; main()"
        self.end, theirs = pty.openpty()
        self.child = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
                                      start_new_session=True, env=dict(env), cwd=cwd)
        os.close(theirs)
        self.unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        os.close(self.end)

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def read_until(self, pattern: str) -> str:
        """What appears up to the first match of `pattern`, which is left out of what is read next."""
        until = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self.unread)):
            ready, _, _ = select.select([self.end], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"waited in vain for {pattern!r}: {self.unread!r}"
            try:
                self.unread += os.read(self.end, 65536).decode(errors="replace")
            except OSError:                              # the child is gone
                raise AssertionError(f"ended before {pattern!r}: {self.unread!r}") from None
        seen, self.unread = self.unread[:found.end()], self.unread[found.end():]
        return seen

    def leave(self) -> tuple[int, str]:
        """The exit status, and what was left to read."""
        try:
            while block := os.read(self.end, 65536):
                self.unread += block.decode(errors="replace")
        except OSError:
            pass
        return self.child.wait(PATIENCE_S), self.unread


PROMPT = "you> "


def test_a_talk_on_a_terminal(endless: Path, env: dict[str, str], tmp_path: Path):
    with Terminal("chat", endless, "--max-new-tokens", 5, env=env, cwd=tmp_path) as screen:
        assert "type /help for commands, /quit to leave" in screen.read_until(PROMPT)
        screen.type("/help\r")
        assert "Ctrl-C stops an answer" in screen.read_until(r"Ctrl-C stops an answer[\s\S]*" + PROMPT)
        screen.type("hello\r")
        screen.read_until(r"\(length\)[\s\S]*" + PROMPT)
        screen.type("/frobnicate\r")
        screen.read_until(r"no command /frobnicate[\s\S]*" + PROMPT)

        screen.type("/set max_new_tokens 150000\r")
        screen.read_until(PROMPT)
        screen.type("go on\r")
        screen.read_until(r"go on\s*\n[\s\S]{100}")           # the answer has begun, and would last for minutes
        screen.type("\x03")
        screen.read_until(r"\(interrupted\)[\s\S]*" + PROMPT)
        screen.type("/history\r")
        assert "user> go on" in screen.read_until(r"assistant> [\s\S]*user> go on[\s\S]*assistant> [\s\S]*" + PROMPT)
        screen.type("/undo\r")
        screen.read_until(PROMPT)
        screen.type("/history\r")
        assert "go on" not in screen.read_until(r"user> hello[\s\S]*assistant> [\s\S]*" + PROMPT)

        screen.type("half a line")
        screen.read_until("half a line")
        screen.type("\x03")
        screen.read_until(PROMPT)
        screen.type("/set max_new_tokens 0\r")
        screen.read_until(PROMPT)
        screen.type("hello\r")
        screen.read_until(r"hanok: .*max_new_tokens 0[\s\S]*" + PROMPT)      # on a terminal a mistake does not end the talk
        screen.type("\x04")
        status, rest = screen.leave()
        assert status == 0 and f"next: hanok score {endless} --text FILE" in rest and "Traceback" not in rest
