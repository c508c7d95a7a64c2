"""The law of the house, read from the imports: they go down only, in no circles; few rooms touch the disk, fewer fetch; no room is too large."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "hanok"
FLOORS = {
    "errors": 1, "contracts": 1,
    "disk": 2, "config": 2, "runtime": 2, "report": 2, "pictures": 2, "nn": 2, "text": 2,
    "models": 3, "data": 3, "adapt": 3, "generate": 3, "probe": 3,
    "bundle": 4, "evaluate": 4, "attention_view": 4, "word_study": 4,
    "api": 5, "train": 5, "tasks": 5, "rag": 5,
    "serve": 6, "lab": 6,
    "cli": 7,
}
NEVER = {("nn", "text"), ("text", "nn"), ("nn", "disk"), ("models", "text"), ("models", "disk"), ("models", "runtime"), ("models", "report")}
MODELS_MAY = {"nn", "contracts", "config", "errors", "models"}
DISK = {"bundle", "data", "text.tokenizer", "rag", "config", "report", "train.checkpoint", "serve.store", "cli", "disk", "runtime"}
FETCH = {"bundle.download", "bundle.hub"}
TALK = {("train.distributed", "socket")}
"""Who may look whether another rank is there."""
NETWORK = {"urllib.request", "http.client", "socket", "ssl", "requests", "httpx", "huggingface_hub"}
ENVIRONMENT = {"runtime"}
LAZY = {"transformers", "matplotlib", "huggingface_hub", "pyarrow", "gguf", "rich"}
"""Imported inside the function that needs them."""
MOST_LINES = 450


def modules() -> dict[str, ast.Module]:
    """Dotted name below hanok -> syntax tree."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        name = ".".join(path.relative_to(SRC).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = ast.parse(path.read_text(), str(path))
    return found


TREES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what a tree imports, `from x import y` as x.y."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The module below hanok that an imported name means."""
    if name != "hanok" and not name.startswith("hanok."):
        return None
    path = name.removeprefix("hanok").removeprefix(".")
    while path and path not in TREES:
        path = path.rpartition(".")[0]
    return path


def edges() -> list[tuple[str, str]]:
    """(module, module that it imports), without the root: it holds the version and lazy names."""
    return [(module, target) for module, tree in TREES.items() if module for name in imported(tree) if (target := own(name))]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(module) for module in TREES if module} <= set(FLOORS)


def test_imports_go_down_or_stay_in_their_folder():
    up = [f"{a} -> {b}" for a, b in edges() if room(a) != room(b) and FLOORS[room(a)] < FLOORS[room(b)]]
    assert not up
    beside = {("config", "disk"), ("report", "runtime"), ("pictures", "report"), ("report", "disk"), ("text", "disk"), ("text", "config")}
    same_floor = [f"{a} -> {b}" for a, b in edges() if room(a) != room(b) and FLOORS[room(a)] == FLOORS[room(b)] and FLOORS[room(a)] == 2
                  and (room(a), room(b)) not in beside]
    assert not same_floor


def test_there_are_no_circles():
    below: dict[str, set[str]] = {}
    for a, b in edges():
        if a != b:
            below.setdefault(a, set()).add(b)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module):], module))
        if module not in done:
            for target in sorted(below.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(below):
        visit(module, ())


def test_rooms_that_never_meet():
    assert not [f"{a} -> {b}" for a, b in edges() if (room(a), room(b)) in NEVER]
    assert not [f"{a} -> {b}" for a, b in edges() if room(a) == "models" and room(b) not in MODELS_MAY]
    outside = {"torch", "math", "copy", "re", "weakref", "functools", "dataclasses", "collections", "typing", "__future__"}
    assert not [f"{module}: {name}" for module, tree in TREES.items() if room(module) in ("nn", "models") for name in imported(tree)
                if own(name) is None and name.partition(".")[0] not in outside]


def allowed(module: str, rooms: set[str]) -> bool:
    return module in rooms or any(module.startswith(f"{r}.") for r in rooms)


def test_few_rooms_touch_the_disk():
    assert not [f"{a} -> {b}" for a, b in edges() if b == "disk" and not allowed(a, DISK)]
    opened = [f"{module}:{node.lineno}" for module, tree in TREES.items() if not allowed(module, DISK) for node in ast.walk(tree)
              if isinstance(node, ast.Call) and ((isinstance(node.func, ast.Name) and node.func.id == "open") or (
                  isinstance(node.func, ast.Attribute) and node.func.attr in ("write_text", "write_bytes", "read_text", "read_bytes")))]
    assert not opened


def test_only_the_hub_fetches():
    assert not [f"{module}: {name}" for module, tree in TREES.items() if not allowed(module, FETCH) for name in imported(tree)
                if (module, name) not in TALK and any(name == banned or name.startswith(f"{banned}.") for banned in NETWORK)]


def test_only_the_runtime_reads_the_environment():
    read = ("os.environ", "os.getenv")
    assert not [f"{module}:{node.lineno}" for module, tree in TREES.items() if module not in ENVIRONMENT for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and ast.unparse(node) in read]


def test_optional_parts_are_imported_where_they_are_used():
    def top(tree: ast.Module) -> Iterator[str]:
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from imported(ast.Module([node], []))

    assert not [f"{module}: {name}" for module, tree in TREES.items() for name in top(tree) if name.partition(".")[0] in LAZY]


def test_no_pickle_but_nanogpts_and_of_that_no_code():
    unpickles = ("pickle", "dill", "shelve")
    assert not [f"{module}: {name}" for module, tree in TREES.items() for name in imported(tree) if name.partition(".")[0] in unpickles]
    assert not [f"{module}: {name}" for module, tree in TREES.items() for name in imported(tree) if name in ("torch.load", "torch.save")]
    named = [(module, ast.unparse(node)) for module, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "torch.serialization")]
    assert named == [("bundle.nanogpt", "torch.load")]
    told = [keyword for node in ast.walk(TREES["bundle.nanogpt"]) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            for keyword in node.keywords]
    assert [ast.unparse(keyword.value) for keyword in told if keyword.arg == "weights_only"] == ["True"] and all(keyword.arg for keyword in told)


FILES = [path for folder in ("src", "tests", "benchmarks", "scripts") for path in sorted((SRC.parent.parent / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_giant_files(path: Path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_every_module_says_what_it_is():
    assert not [module for module, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
