"""`--nproc N`: N processes of the same command on this machine, each told its rank as torchrun would tell it, and watched until the last one ends.

The first rank has the terminal. What another one says on stderr is kept, and shown where that one is the first to fail; then all are ended at once.
A child reads a pipe that ends with its parent, so that none outlives it. Signals reach the parent alone, which passes them on.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from hanok import runtime
from hanok.cli.main import leave, main
from hanok.errors import ConfigError

ASKED = (130, 143)
"""What a rank ends with that was asked to; it leaves a checkpoint, and so do the others."""
GRACE, ECHO = 30.0, 2.0
"""Seconds that ranks have to leave where all were asked to, and to tell a mistake that all of them find."""


def as_typed(given: Mapping[str, Any]) -> list[str]:
    """Options as a command line spells them. ConfigError for what several processes cannot read."""
    words = [f"./{path}" if str(path).startswith("-") and str(path) != "-" else str(path) for path in given.get("text") or []]
    if "-" in words:
        raise ConfigError("TEXT is - (standard input), which --nproc cannot give to several processes; write it into a file first")
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif name != "text" and value is not None and value is not False:
            words += [f"{option}={part}" for part in (value if isinstance(value, list | tuple) else [value])]
    return words


def launch(n: int, arguments: list[str], program: Sequence[str] = ("-m", "hanok.cli.launch")) -> None:
    """Returns where all ranks ended well; else leaves with the status of the first that did not, behind its error."""
    if n < 1:
        raise ConfigError(f"--nproc is {n}; expected 1 or more")
    if runtime.environment("WORLD_SIZE", "1") != "1":
        raise ConfigError("--nproc was given to one of several ranks already (WORLD_SIZE is set); leave it out under torchrun")
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = runtime.environment("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // n))
    told = {**runtime.environment_with_prefix(""), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    said = [tempfile.TemporaryFile() for _ in range(n)]  # noqa: SIM115 - closed with this process
    ranks: list[subprocess.Popen] = []
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in ranks:
            process.send_signal(number)

    before = {name: signal.signal(name, forward) for name in (signal.SIGINT, signal.SIGTERM)}    # first: a rank may be the one that asks
    try:
        for rank in range(n):
            ranks.append(subprocess.Popen(
                [sys.executable, *program, *arguments], stdin=subprocess.PIPE, start_new_session=True,
                env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL if rank else None,
                stderr=said[rank] if rank else None))
            for number in asked:                         # while it was not among them yet
                ranks[-1].send_signal(number)
        failed = first_failure(ranks)
        if failed is not None:
            end(ranks)
            if -ranks[failed].returncode in asked:       # before it learned to leave, or behind its last update
                leave(128 - ranks[failed].returncode, "it was asked to leave, and there was nothing new to keep")
            tell(failed, ranks[failed].returncode, said[failed])
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            process.wait()
        for name, handler in before.items():
            signal.signal(name, handler)
        for file in said:
            file.close()


def first_failure(ranks: list[subprocess.Popen]) -> int | None:
    """The rank that failed first, and had time to say why; None where all ended well. Rank 0 speaks of a mistake that all make, and of a signal."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((number for number, code in enumerate(codes) if code), None)
        if failed is None:
            if None not in codes:
                return None
            time.sleep(0.05)
            continue
        code = codes[failed]
        if failed and code in (2, *ASKED):
            with suppress(subprocess.TimeoutExpired):
                if ranks[0].wait(GRACE if code in ASKED else ECHO) == code:
                    return 0
        elif code in ASKED:
            for rank in ranks:
                with suppress(subprocess.TimeoutExpired):
                    rank.wait(GRACE / len(ranks))
        return failed


def end(ranks: list[subprocess.Popen]) -> None:
    """Ends them now: what they wait for does not come any more."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()
    if runtime.interactive():
        sys.stderr.write("\x1b[?25h\r")                  # the bar hid the cursor
        sys.stderr.flush()


def tell(rank: int, code: int, said: IO[bytes]) -> None:
    """The error, in a line of its own, and the way out."""
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        leave(2, f"rank {rank} was killed ({signal.Signals(-code).name}), and all ranks were ended; hanok pretrain --resume RUN goes on from the "
                 "newest checkpoint")
    if rank:
        last = lines[-1] if lines else f"it ended with status {code} and no word"
        print(f"hanok: rank {rank}: {last.removeprefix('hanok: ')}", file=sys.stderr)
        if code == 1:
            print("\n".join(lines[:-1]), file=sys.stderr)                                # our fault: where it was
    sys.exit(code)


def child() -> None:
    """One rank: ends with its parent."""
    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    main(sys.argv[1:])


if __name__ == "__main__":
    child()
