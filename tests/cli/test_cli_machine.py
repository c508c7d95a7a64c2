"""What the machine does to a command: a disk that is full, and Ctrl-C in the middle of anything. Nothing is ever left half-written."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Shell, settings
from terminal import PATIENCE_S, ended, start, tree, wait_for

from bundle.shelf import wheel
from hanok.bundle.bundle import empty_model
from hanok.bundle.weights import parameters, write_safetensors
from hanok.config import to_dict, write_json
from hanok.models import catalog
from hanok.models.llama import LlamaConfig


# ---- a full disk
class Disk:
    """A folder for few bytes: a file system of its own where the test may mount one, else a limit on the size of files."""

    def __init__(self, folder: Path, kilobytes: int):
        folder.mkdir()
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        self.is_mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        self.limits = {} if self.is_mounted else {"file_bytes": 1024 * kilobytes}
        self.told = "the disk is full" if self.is_mounted else "the file would be larger than this place allows"

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "small disk", 8)
    yield disk
    disk.close()


VERBS = {
    "tokenizer": ("tokenizer", "train", "{text}", "--kind", "unigram", "--vocab-size", "320", "--out", "{out}"),
    "export": ("export", "{model}", "{out}"), "import": ("import", "{model}", "{out}"), "pull": ("pull", "{model}", "--to", "{out}"),
    "pretrain": ("pretrain", "{text}", "--out", "{out}", "--steps", "3", "--quiet", *settings()),
}


def refused(verb: str, out: Path, shell: Shell, model: Path, text: Path, disk: Disk, **env: str) -> None:
    """Runs the verb; fails unless it says in its last line that the disk is full."""
    told = shell(*(argument.format(out=out, model=model, text=text) for argument in VERBS[verb]), env=env, **disk.limits).refused()
    assert disk.told in told and "nothing was left half-written" in told


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "pretrain"])
def test_a_full_disk_is_told_and_left_as_it_was(verb: str, shell: Shell, model: Path, text: Path, disk: Disk):
    refused(verb, disk.folder / "new", shell, model, text, disk)
    assert tree(disk.folder) == {}


def test_a_run_on_a_disk_that_fills_up_keeps_only_whole_files(shell: Shell, text: Path):
    out = shell.cwd / "new"
    told = shell(*(argument.format(out=out, text=text) for argument in VERBS["pretrain"]), file_bytes=50_000).refused()
    assert "the file would be larger than this place allows" in told and "nothing was left half-written" in told
    assert tree(out).keys() <= {"checkpoints", "metrics.csv", "recipe.toml", "tokenizer.json"}
    assert "no bundle" in shell.refused("show", out) or not out.exists()


def test_a_run_that_the_disk_will_not_hold_does_not_begin(shell: Shell, text: Path, disk: Disk):
    if not disk.is_mounted:
        pytest.skip("no disk of its own")
    told = shell(*(argument.format(out=disk.folder / "new", text=text) for argument in VERBS["pretrain"])).refused()
    assert "of disk, and 8.0 KiB are free" in told and tree(disk.folder) == {}


@pytest.mark.parametrize("verb", ["pretrain", "pull"])
def test_a_full_cache_is_told_and_left_as_it_was(verb: str, shell: Shell, model: Path, text: Path, disk: Disk):
    (disk.folder / "filler").write_bytes(b"\0" * 4000)
    out, before = shell.cwd / "new", tree(disk.folder)
    if verb == "pull":
        ended = shell("pull", model, env={"HANOK_HOME": str(disk.folder)}, **disk.limits)
        assert disk.told in ended.refused()
    else:
        refused(verb, out, shell, model, text, disk, HANOK_HOME=str(disk.folder)) if disk.is_mounted else pytest.skip("no disk of its own")
    assert not out.exists()
    left = tree(disk.folder)
    assert left == before | dict.fromkeys(left.keys() - before.keys(), "") and not [name for name in left if "/." in name]


# ---- Ctrl-C
def test_ctrl_c_while_training_keeps_the_checkpoint_and_says_where(shell: Shell, text: Path, env: dict[str, str]):
    child = start("pretrain", text, "--out", "run", "--json", *settings("train.steps=1000000"), env=env, cwd=shell.cwd)
    metrics = shell.cwd / "run/metrics.csv"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, child)
    child.send_signal(signal.SIGINT)
    end = ended(child)
    [checkpoint] = (shell.cwd / "run/checkpoints").iterdir()
    assert end.interrupted() == (f"hanok: interrupted; what was learned so far is in run/checkpoints/{checkpoint.name}; "
                                 "hanok pretrain --resume run goes on")
    assert end.out == "" and {path.name for path in checkpoint.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert {path.name for path in (shell.cwd / "run").iterdir()} == {"checkpoints", "metrics.csv", "recipe.toml", "tokenizer.json"}
    assert "is no bundle" in shell.refused("show", "run")
    assert "run is not empty" in shell.refused("pretrain", text, "--out", "run", *settings())


def test_ctrl_c_while_writing_an_answer(shell: Shell, endless: Path, env: dict[str, str]):
    child = start("generate", endless, "--prompt", "The", "--max-new-tokens", 100_000, env=env, cwd=shell.cwd)
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    end = ended(child)
    assert end.interrupted() and len(end.lines) == 1 and tree(shell.cwd) == {}


def test_ctrl_c_while_reading_a_model(shell: Shell, model: Path, env: dict[str, str]):
    shell("export", model, "hf")
    (shell.cwd / "hf/tokenizer.json").unlink()
    os.mkfifo(shell.cwd / "hf/tokenizer.json")           # the child waits here for what never comes
    child = start("import", "hf", "new", env=env, cwd=shell.cwd)
    pipe = wait_for(lambda: reader(shell.cwd / "hf/tokenizer.json"), child)
    child.send_signal(signal.SIGINT)
    os.close(pipe)                                       # wakes a child that the signal met on its way to sleep
    end = ended(child)
    assert end.interrupted() == "hanok: interrupted; nothing was left half-written" and len(end.lines) == 1
    assert {path.name for path in shell.cwd.iterdir()} == {"hf"}


def reader(path: Path) -> int | None:
    """The writing end of a pipe that somebody reads, or None."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_ctrl_c_while_writing_a_model(shell: Shell, env: dict[str, str], tmp_path: Path):
    large = tmp_path / "large"
    large.mkdir()
    family, config = catalog.family("llama"), LlamaConfig(200_000, 64, 1, 2, 1, 64, 64)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in parameters(empty_model(family, config)).items()}
    write_safetensors(large / "model.safetensors", zeros)
    write_json(large / "config.json", {"family": "llama", **to_dict(config)})
    for attempt in range(10):                            # whether the signal comes in time is for the machine to decide
        out = shell.cwd / f"new{attempt}"
        child = start("import", large, out.name, env=env, cwd=shell.cwd)
        wait_for(partial(begun, out), child)
        child.send_signal(signal.SIGINT)
        end = ended(child)
        if end.status != 0:
            break
        assert out.exists()
    assert end.interrupted() == "hanok: interrupted; nothing was left half-written" and len(end.lines) == 1
    assert not out.exists() and not list(shell.cwd.glob(".*"))


def begun(out: Path) -> bool:
    """Whether a folder is being written, or is there."""
    return out.exists() or any(out.parent.glob(f".{out.name}.*"))


class Stalled:
    """A package index whose file stops coming after a thousand bytes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/simple"
        self.stalls, self.done = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        page = f'<a href="/tiny_model-1.0-py3-none-any.whl#sha256={"0" * 64}">tiny_model-1.0-py3-none-any.whl</a>'.encode()
        for kind, body, length in (("text/html", page, len(page)), ("application/zip", wheel({})[:100] + b"\0" * 900, 10_000_000)):
            connection, _ = self.listener.accept()
            connection.recv(65536)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n".encode() + body)
            if length > len(body):
                self.stalls.set()
                self.done.wait(PATIENCE_S)
            connection.close()

    def close(self) -> None:
        self.done.set()
        self.thread.join()
        self.listener.close()


def test_ctrl_c_while_fetching(shell: Shell, env: dict[str, str], tmp_path: Path):
    index, home = Stalled(), tmp_path / "hanok"
    settings = {"PIP_INDEX_URL": index.url, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "HANOK_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    child = start("pull", "pypi:tiny-model==1.0#tiny_model/", "--to", "new", env={**env, **settings}, cwd=shell.cwd)
    try:
        wait_for(lambda: index.stalls.is_set() and list(home.rglob("*.part")), child)
        child.send_signal(signal.SIGINT)
    finally:
        index.close()                                    # wakes a child that the signal met on its way to sleep
    end = ended(child)
    assert end.interrupted() == "hanok: interrupted; nothing was left half-written" and len(end.lines) == 1
    assert tree(shell.cwd) == {} and not (home / "models").exists()
    assert all(path.is_dir() or path.suffix == ".part" for path in home.rglob("*"))      # what is there already waits to be continued
