"""One tiny model, pre-trained once by the command line itself, and a shell to type in."""
from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from terminal import Ended, Nursery, command, tree

import hanok

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
TINY = ["tokenizer.vocab_size=300", "data.seq_len=32", "train.micro_batch_size=4", "train.eval_tokens=512", "model.sizes.d_model=32",
        "model.sizes.n_layers=1", "model.sizes.n_heads=2", "model.sizes.n_kv_heads=1", "model.sizes.d_ff=64"]
CONTEXT = 64


def settings(*more: str) -> list[str]:
    """--set for a model that trains in no time."""
    return [part for setting in (*TINY, *more) for part in ("--set", setting)]


class Shell:
    """shell(*arguments) is the end of a hanok command in an empty folder, `cwd`; env adds to the environment."""

    def __init__(self, nursery: Nursery, env: dict[str, str], cwd: Path):
        self.nursery, self.env, self.cwd = nursery, env, cwd

    def __call__(self, *arguments: object, env: dict[str, str] | None = None, stdin: bytes = b"", out: int | None = None, **limits: int) -> Ended:
        return self.nursery.run(arguments, env={**self.env, **(env or {})}, cwd=self.cwd, stdin=stdin, out=out, **limits)

    def refused(self, *arguments: object, env: dict[str, str] | None = None, stdin: bytes = b"") -> str:
        """The line with which a command is refused; fails if it changed anything in the folder."""
        before = tree(self.cwd)
        line = self(*arguments, env=env, stdin=stdin).refused()
        assert tree(self.cwd) == before
        return line


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def env(home: Path) -> dict[str, str]:
    """What a child knows of its surroundings: no index, no configuration, no terminal's width."""
    ours = ("PIP_", "HANOK_", "PYTHON", "COLUMNS", "LINES", "XDG_", "NO_COLOR", "FORCE_COLOR")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(ours)},
            "PYTHONPATH": str(Path(hanok.__file__).parents[1]), "PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8", "TERM": "xterm",
            "HOME": str(home), "HANOK_HOME": str(home / "hanok"), "OMP_NUM_THREADS": "1",
            "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(home / "nothing")}


@pytest.fixture(scope="session")
def nursery(env: dict[str, str]) -> Iterator[Nursery]:
    nursery = Nursery(env)
    yield nursery
    nursery.close()


@pytest.fixture
def shell(nursery: Nursery, env: dict[str, str], tmp_path: Path) -> Shell:
    (tmp_path / "here").mkdir()
    return Shell(nursery, env, tmp_path / "here")


@pytest.fixture(scope="session")
def text(home: Path) -> Path:
    """A page of text."""
    path = home / "text.txt"
    path.write_text("".join(f"The {colour} {thing} is {n} years old.\n" for n in range(12) for colour in ("red", "blue", "green", "white")
                            for thing in ("house", "door", "roof", "floor", "stair")))
    return path


@pytest.fixture(scope="session")
def pretrained(home: Path, env: dict[str, str], text: Path) -> Ended:
    """The end of `hanok pretrain` in a fresh process; the model is in home/model."""
    how = settings(f"model.sizes.max_seq_len={CONTEXT}", "train.learning_rate=0.02")
    return command("pretrain", text, "--out", "model", "--steps", 40, "--json", *how, env=env, cwd=home)


@pytest.fixture(scope="session")
def model(home: Path, pretrained: Ended) -> Path:
    """A bundle that chats, in no more than 64 tokens."""
    assert pretrained.status == 0, pretrained
    (home / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return home / "model"


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be changed."""
    return Path(shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints")))


@pytest.fixture
def endless(copy: Path) -> Path:
    """The model with a context that takes minutes to fill, and nothing that ends an answer."""
    edit(copy / "config.json", max_seq_len=200_000)
    edit(copy / "generation.json", stop_ids=[])
    return copy


def edit(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def docs() -> ModuleType:
    """scripts/docs.py."""
    spec = importlib.util.spec_from_file_location("docs", Path(__file__).parents[2] / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
