"""hanok as a stranger meets it: child processes with streams, folder and environment of their own.

`command` and `start` begin a fresh Python. Most children are forks of one that has imported torch and done nothing else (`Nursery`): a stranger sees
no difference, and a command costs 0.1 s instead of 2 s.
"""
from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 60
HANOK = (sys.executable, "-m", "hanok.cli.main")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""
    status: int                              # negative: the signal that ended it
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What was said for people."""
        return self.err.splitlines()

    def refused(self) -> str:
        """The one line of a mistake; fails if there is a traceback, another status, anything else said, or anything on stdout."""
        assert (self.status, self.out) == (2, ""), self
        assert len(self.lines) == 1 and self.err.endswith("\n"), self
        assert self.err.startswith("hanok: "), self
        return self.lines[0]

    def interrupted(self) -> str:
        """The last line of an interrupted command."""
        assert self.status == 130 and "Traceback" not in self.err, self
        assert self.lines[-1].startswith("hanok: interrupted; ") and self.err.count("hanok: ") == 1, self
        return self.lines[-1]

    def json(self) -> dict[str, Any]:
        """The one document on stdout."""
        assert self.status == 0, self
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document

    def next_commands(self) -> list[str]:
        """What to type next, as it was told."""
        assert self.status == 0, self
        begin = max(i for i, line in enumerate(self.lines) if line.startswith("next: "))
        return [line.removeprefix("next:").strip() for line in self.lines[begin:]]


def command(*arguments: object, env: Mapping[str, str], cwd: Path, launcher: Sequence[str] = HANOK) -> Ended:
    """A fresh process, to its end."""
    return ended(start(*arguments, env=env, cwd=cwd, launcher=launcher))


def start(*arguments: object, env: Mapping[str, str], cwd: Path, launcher: Sequence[str] = HANOK) -> subprocess.Popen[str]:
    """A fresh process that goes on by itself."""
    return subprocess.Popen([*launcher, *map(str, arguments)], env=dict(env), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, encoding="utf-8")


def ended(child: subprocess.Popen[str]) -> Ended:
    """The end of a child."""
    try:
        out, err = child.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise AssertionError(f"still running after {PATIENCE_S} s: {child.communicate()}") from None
    return Ended(child.returncode, out, err)


def wait_for(condition: Callable[[], Any], child: subprocess.Popen[str]) -> Any:
    """What `condition` gives as soon as it is something; fails if the child ends before."""
    until = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if child.poll() is not None or time.monotonic() > until:
            child.kill()
            raise AssertionError(f"waited in vain: {child.communicate()}")
        time.sleep(0.001)
    return found


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, hidden things too: relative name -> hash of a file's bytes, "" for a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in folder.rglob("*")}


class Nursery:
    """A process that has imported everything and forks a child for each command."""

    def __init__(self, env: Mapping[str, str]):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], env=dict(env), pass_fds=[theirs.fileno()])

    def run(self, arguments: Sequence[object], *, env: Mapping[str, str], cwd: Path, stdin: bytes = b"", out: int | None = None,
            **limits: int) -> Ended:
        """A command to its end. `out`: where stdout goes instead of into the answer. Limits: file_bytes it may write, uid it runs as."""
        names = [cwd.parent / f"{cwd.name}.{name}" for name in ("in", "out", "err")]
        names[0].write_bytes(stdin)
        with open(names[0], "rb") as given, open(names[1], "wb") as said, open(names[2], "wb") as told:
            order = {"arguments": list(map(str, arguments)), "env": dict(env), "cwd": str(cwd), **limits}
            socket.send_fds(self.socket, [json.dumps(order).encode()], [given.fileno(), said.fileno() if out is None else out, told.fileno()])
            status = json.loads(self.socket.recv(64))
        return Ended(status, names[1].read_text("utf-8"), names[2].read_text("utf-8"))

    def close(self) -> None:
        self.socket.close()
        assert self.process.wait(PATIENCE_S) == 0


def serve(orders: socket.socket) -> None:
    """Takes orders until nobody can give any."""
    import codecs
    import importlib

    from hanok.cli.main import VERBS
    rooms = ["gguf", "torch._dynamo", "rich.progress", "hanok.api", "hanok.bundle.pull", "hanok.train.pretrain"]
    for room in (*rooms, *(f"hanok.cli.{place.partition(':')[0]}" for place, _ in VERBS.values())):
        importlib.import_module(room)
    codecs.lookup("utf-8-sig")                           # who has no rights could not read the codec's module any more
    while True:
        message, fds, _, _ = socket.recv_fds(orders, 1 << 20, 3)
        if not message:
            return
        pid = os.fork()
        if not pid:
            live(json.loads(message), fds)
        for fd in fds:
            os.close(fd)
        orders.send(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def live(order: dict[str, Any], fds: Sequence[int]) -> None:
    """Is one command, from its surroundings to its exit status."""
    import resource
    import signal
    import traceback

    from hanok.cli.main import main
    signal.alarm(PATIENCE_S)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    os.closerange(3, 64)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.stdout = open(1, "w", encoding=order["env"]["PYTHONIOENCODING"], closefd=False)  # noqa: SIM115 - it lives as long as the process
    if "file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    if "uid" in order:
        os.seteuid(order["uid"])
    status = 0
    try:
        main(order["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
