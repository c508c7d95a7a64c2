"""The recipes that a newcomer copies: one for each family, every field with its unit, every model buildable, each learned by a tiny run."""
from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hanok.bundle.bundle import empty_model, load_bundle
from hanok.cli.pretrain import make_recipe
from hanok.config import from_dict, to_dict, toml
from hanok.errors import ConfigError
from hanok.models import catalog
from hanok.train.pretrain import Pretraining, prepare
from hanok.train.recipe import Recipe, TrainRecipe, read_recipe
from tiny import WORDS, write_prose

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.toml"))
SMALL = {"d_model": 32, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "d_head": 16, "d_embed": 32, "d_hidden": 32,
         "window": 8}
MOST_LINES = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Prose, and the same sentences beside their answers: every word in capitals."""
    folder = write_prose(tmp_path_factory.mktemp("text"), 4, 700)
    draw = random.Random(0)
    words = [word for word in WORDS if word.isascii()]
    pairs = [" ".join(draw.choices(words, k=draw.randrange(2, 6))) for _ in range(400)]
    (folder / "pairs.tsv").write_text("source\ttarget\n" + "".join(f"{pair}\t{pair.upper()}\n" for pair in pairs), encoding="utf-8")
    return folder


def test_every_family_has_one():
    assert {path.stem for path in FILES} >= set(catalog.FAMILIES)
    assert all(read_recipe(FOLDER / f"{name}.toml").model.family == name for name in catalog.FAMILIES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_its_model_can_be_built(path: Path):
    recipe = read_recipe(path)
    family = catalog.family(recipe.model.family)
    sizes = {**to_dict(catalog.preset(family.name, recipe.model.preset)), **recipe.model.sizes, "vocab_size": recipe.tokenizer.vocab_size}
    assert sum(p.numel() for p in empty_model(family, from_dict(family.config, sizes)).parameters()) > 100_000
    assert recipe.data.sources == () and (recipe.data.seq_len or 1) <= sizes["max_seq_len"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_field_has_its_comment_and_the_head_says_how_to_run_it(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len(lines) <= MOST_LINES and all(len(line) <= 150 for line in lines) and lines[:len(head)] == head and len(head) >= 2
    assert re.fullmatch(rf"#   hanok pretrain (TEXT|PAIRS\.tsv) --out runs/{path.stem} --recipe recipes/{path.stem}\.toml", head[-1])
    fields = [line for line in lines[len(head):] if line and not line.startswith("[")]
    assert len(fields) > 15 and not [line for line in fields if not re.fullmatch(r"\w+ = [^#]+ # \S.{5,}", line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tiny_run_of_it_learns(path: Path, text: Path, tmp_path: Path):
    told = read_recipe(path)
    sizes = {name: SMALL.get(name, size) for name, size in told.model.sizes.items()}
    paired = told.data.objective == "seq2seq"
    train = replace(told.train, steps=40, micro_batch_size=8, warmup_steps=8, learning_rate=1e-2, eval_every=40, eval_tokens=600, checkpoint_every=0)
    recipe = replace(told, model=replace(told.model, sizes={**sizes, "dropout": 0.0}), train=train,
                     tokenizer=replace(told.tokenizer, vocab_size=420 if told.tokenizer.kind == "unigram" else 300, n_sentinels=10),
                     data=replace(told.data, sources=(str(text / "pairs.tsv" if paired else text),), validation=0.2, batch_tokens=0,
                                  seq_len=32 if not paired else None))
    made = Pretraining(prepare(recipe), tmp_path / "run")
    before = made.evaluate().loss
    made.run()
    assert made.validation.loss < before - 0.7, (before, made.validation.loss)
    loaded = load_bundle(tmp_path / "run")
    assert loaded.family.name == told.model.family and loaded.manifest["metrics"]["steps"] == 40


# ---- the command line over a file
def test_options_override_the_file_and_settings_override_options(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('[model]\nfamily = "gpt2"\npreset = "small"\n[data]\nsources = ["a.txt"]\nencoding = "cp949"\n[train]\nsteps = 7\nseed = 3\n'
                    'log = "tensorboard"\n[sources]\n"a.txt" = "ab"\n[begun]\nfolder = "/"\n')
    plain = make_recipe(None, file, None, None, None, None, None, [])
    assert plain == read_recipe(file) and plain.data.sources == ("a.txt",) and plain.train == TrainRecipe(steps=7, seed=3, log=("tensorboard",))
    over = make_recipe([Path("b.txt")], file, "llama", "tiny", 8, 4, "utf-8", ["train.steps=9", "train.log="])
    assert (over.model.family, over.model.preset, over.data.sources, over.data.encoding) == ("llama", "tiny", ("b.txt",), "utf-8")
    assert over.train == TrainRecipe(steps=9, seed=4)
    assert make_recipe([Path("b")], None, None, None, None, None, None, []) == replace(Recipe(), data=replace(Recipe().data, sources=("b",)))


def test_sizes_from_the_command_line_are_numbers():
    made = make_recipe(None, None, "gpt2", None, None, None, None, ["model.sizes.d_model=32", "model.sizes.dropout=0", "model.sizes.activation=relu"])
    assert made.model.sizes == {"d_model": 32, "dropout": 0.0, "activation": "relu"} and isinstance(made.model.sizes["dropout"], float)
    assert "d_model = 32" in toml(to_dict(made)).splitlines()
    for setting, told in (("d_model=wide", "gpt2's model.sizes.d_model: got 'wide', expected a whole number"),
                          ("n_kv_heads=2", "gpt2's model.sizes: unknown setting 'n_kv_heads'; did you mean 'n_heads'?")):
        with pytest.raises(ConfigError) as error:
            make_recipe(None, None, "gpt2", None, None, None, None, [f"model.sizes.{setting}"])
        assert str(error.value) == told


@pytest.mark.parametrize(("content", "told"), [
    ("[train]\nstep = 3", "mine.toml.train: unknown setting 'step'; did you mean 'steps'?"),
    ("[trian]\nsteps = 3", "mine.toml: unknown setting 'trian'; did you mean 'train'?"),
    ("train = 3", "mine.toml.train: got 3, expected a table of settings"), ("[train]\nsteps = 'many'", "mine.toml.train.steps: got 'many'"),
    ("[train]\nlog = 'tensorbord'", "did you mean 'tensorboard'?"), ("[train\n", "it should be TOML"), ("[train]\nsteps = 0", "train.steps is 0"),
    ("[train]\nkeep_checkpoints = 0", "train.keep_checkpoints is 0; expected 1 or more"),
])
def test_a_mistake_in_a_file_is_one_line(content: str, told: str, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_recipe(tmp_path / "mine.toml")
    assert told in str(error.value) and "\n" not in str(error.value)
