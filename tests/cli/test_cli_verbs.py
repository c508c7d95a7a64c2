"""What each verb does when all is well: help, one JSON document, the next command to type; and what goes to which stream."""
from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from conftest import Shell, settings
from terminal import Ended, command

from hanok.cli.main import VERBS, build_app

APP = build_app()
LEAVES = [(verb,) for verb in VERBS if verb not in ("tokenizer", "corpus")] + [("tokenizer", "train"), ("tokenizer", "import"), ("corpus", "build")]


# ---- help
@pytest.mark.parametrize("verb", LEAVES, ids=" ".join)
def test_help_says_every_option(verb: tuple[str, ...], shell: Shell):
    ended = shell(*verb, "--help")
    app = APP
    for name in verb:
        app = app[name]
    names = [name for argument in app.assemble_argument_collection() for name in argument.names]
    assert (ended.status, ended.err) == (0, "") and names
    assert ended.out.startswith(f"Usage: hanok {' '.join(verb)} ")
    assert not [name for name in names if name not in ended.out]
    assert "--empty-" not in ended.out or verb == ("quickstart",)


def test_help_without_a_verb_lists_them_and_imports_none(env: dict[str, str], home: Path):
    program = ("import sys; from hanok.cli.main import main; main({}); "
               "print([name for name in sys.modules if name == 'torch' or name.startswith('hanok.cli.')], file=sys.stderr)")
    for arguments in (["--help"], []):
        ended = command(env=env, cwd=home, launcher=(sys.executable, "-c", program.format(arguments)))
        assert ended.status == 0 and ended.err == "['hanok.cli.main']\n"
        assert not [verb for verb, (_, help_text) in VERBS.items() if verb not in ended.out or help_text[:40] not in ended.out]


def test_no_verbs_help_waits_for_torch(env: dict[str, str], home: Path):
    program = f"import sys; from hanok.cli.main import main; [main([*verb, '--help']) for verb in {LEAVES}]; sys.exit('torch' in sys.modules)"
    assert command(env=env, cwd=home, launcher=(sys.executable, "-c", program)).status == 0


def test_the_console_script_is_the_same_program(env: dict[str, str], home: Path):
    import hanok
    script = Path(sys.executable).parent / "hanok"
    if not script.exists():
        pytest.skip(f"hanok is not installed beside {sys.executable}")
    assert command("--version", env=env, cwd=home, launcher=(str(script),)).out == f"{hanok.__version__}\n"
    assert "unknown command 'trian'" in command("trian", env=env, cwd=home, launcher=(str(script),)).refused()


# ---- results
def test_pretrain_tells_progress_on_stderr_and_one_document_on_stdout(pretrained: Ended, model: Path):
    told = pretrained.json()
    assert told.keys() == {"bundle", "family", "steps", "tokens", "seconds", "validation_loss", "validation_bits_per_byte"}
    assert (told["bundle"], told["family"], told["steps"]) == ("model", "qwen3", 40)
    assert "training" in pretrained.err and "read 1 documents" in pretrained.err
    files = "model.safetensors config.json tokenizer.json generation.json manifest.json README.md recipe.toml metrics.csv"
    assert {path.name for path in model.iterdir()} >= set(files.split())


def test_quiet_pretraining_says_only_what_was_made(shell: Shell, text: Path):
    assert shell("pretrain", text, "--out", "a", "--steps", 1, "--quiet", "--json", *settings()).err == ""
    ended = shell("pretrain", text, "--out", "b", "--steps", 1, "--quiet", *settings())
    assert ended.out == "" and ended.lines[0].startswith("qwen3 in b: steps 1, ") and ended.lines[1].startswith("next: ")


def test_seeds_and_settings_reach_the_recipe(shell: Shell, text: Path):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert shell("pretrain", text, "--out", out, "--seed", seed, *settings("train.steps=2", "train.learning_rate=1e-2")).status == 0
    a, b, c = ((shell.cwd / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c
    recipe = json.loads((shell.cwd / "a" / "manifest.json").read_text())["recipe"]
    assert (recipe["train"]["seed"], recipe["train"]["learning_rate"], recipe["train"]["steps"]) == (3, 0.01, 2)


def test_files_and_options_may_come_in_any_order(shell: Shell, text: Path):
    (shell.cwd / "more.txt").write_text("One more text about a house.\n" * 20)
    ended = shell("pretrain", text, "--out", "run", "more.txt", "--steps", 1, "--json", *settings())
    assert ended.status == 0 and "read 2 documents" in ended.err


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_tokenizers_of_every_kind(kind: str, shell: Shell, text: Path):
    told = shell("tokenizer", "train", text, "--kind", kind, "--vocab-size", 320, "--out", "tok", "--json").json()
    assert told.keys() == {"tokenizer", "kind", "vocab_size", "bytes_per_token"}
    assert (told["tokenizer"], told["kind"]) == ("tok/tokenizer.json", kind) and told["vocab_size"] <= 320
    assert {path.name for path in (shell.cwd / "tok").iterdir()} == {"tokenizer.json"}


def test_a_trained_tokenizer_is_taken_by_pretrain(shell: Shell, text: Path):
    [following] = shell("tokenizer", "train", text, "--vocab-size", 290, "--out", "tok").next_commands()
    assert shell(*shlex.split(following)[1:], "--steps", 1, *settings()).status == 0
    assert (shell.cwd / "runs/mine/tokenizer.json").read_bytes() == (shell.cwd / "tok/tokenizer.json").read_bytes()


def test_show(shell: Shell, model: Path):
    told = shell("show", model, "--json").json()
    assert (told["family"], told["sizes"]["max_seq_len"], told["chat_template"]) == ("qwen3", 64, True)
    assert told["parameters"]["total"] == sum(n for part, n in told["parameters"].items() if part != "total")
    assert "tokenizer: bpe, 300 tokens" in shell("show", model).out


def test_generate(shell: Shell, model: Path):
    how = ("generate", model, "--prompt", "The red house", "--max-new-tokens", 6)
    told = shell(*how, "-n", 2, "--temperature", 1, "--seed", 3, "--json").json()
    assert told.keys() == {"prompt", "prompt_tokens", "answers", "seconds"}
    assert [answer["tokens"] for answer in told["answers"]] == [6, 6] and told["answers"][0]["text"] != told["answers"][1]["text"]
    plain, again = shell(*how), shell(*how, "--json").json()
    assert plain.out == again["answers"][0]["text"] + "\n" and plain.lines[0].startswith("6 tokens, ")
    assert shell(*how, "--temperature", 1, "--seed", 3).out == told["answers"][0]["text"] + "\n"
    assert shell(*how, "--temperature", 1, "--seed", 3, "--top-p", 1e-9).out == plain.out


def test_a_prompt_may_look_like_an_option(shell: Shell, model: Path):
    assert shell("generate", model, "--prompt", "--help me", "--stop", "-", "--max-new-tokens", 2, "--json").json()["prompt"] == "--help me"


def test_score(shell: Shell, model: Path, text: Path):
    told = shell("score", model, "--text", text, "--json").json()
    assert told.keys() >= {"tokens", "loss", "perplexity", "bits_per_byte"}
    assert told["bits_per_byte"] < 8 and 0 < told["loss"] < 7
    assert f"loss           {told['loss']:.4f} nats/token" in shell("score", model, "--text", text).out


def test_there_and_back(shell: Shell, model: Path):
    assert shell("export", model, "--to", "hf", "hf", "--json").json() == {"folder": "hf", "format": "hf", "family": "qwen3"}
    assert shell("import", "hf", "back", "--json").json() == {"bundle": "back", "family": "qwen3"}
    assert (shell.cwd / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert shell("pull", "hf", "--to", "pulled", "--json").json() == {"bundle": "pulled", "family": "qwen3"}


def test_pulled_models_have_names(shell: Shell, model: Path, tmp_path: Path):
    home = {"HANOK_HOME": str(tmp_path / "hanok")}
    assert shell("export", model, tmp_path / "Tiny").status == 0
    assert shell("pull", tmp_path / "Tiny", env=home).next_commands() == ["hanok show tiny", "hanok chat tiny"]
    assert shell("show", "tiny", "--json", env=home).json()["bundle"] == str(tmp_path / "hanok/models/tiny")
    assert "pulled are tiny" in shell.refused("show", "tinny", env=home)


# ---- what to type next
def test_every_verb_says_what_to_type_next_and_the_shell_understands_it(shell: Shell, model: Path, text: Path, docs):
    here = shell.cwd / "it's 한 옥"
    here.mkdir()
    (here / "a text.txt").write_bytes(text.read_bytes())
    a = "it's 한 옥"
    ends = [shell("tokenizer", "train", f"{a}/a text.txt", "--out", f"{a}/tok", "--vocab-size", 290),
            shell("pretrain", f"{a}/a text.txt", "--out", f"{a}/run", "--steps", 1, *settings()),
            shell("show", f"{a}/run"), shell("generate", f"{a}/run", "--prompt", "The", "--max-new-tokens", 1),
            shell("score", f"{a}/run", "--text", text), shell("export", f"{a}/run", f"{a}/hf"), shell("import", f"{a}/hf", f"{a}/back"),
            shell("pull", f"{a}/hf", "--to", f"{a}/pulled"), shell("chat", model, stdin=b"/quit\n")]
    for ended in ends:
        told = [line for line in ended.next_commands() if line.startswith("hanok ")]
        assert told, ended
        for line in told:
            assert docs.fault(APP, line) is None, line
            assert ended is ends[-1] or (shell.cwd / next(word for word in shlex.split(line) if word.startswith(a))).exists()


def test_a_name_that_a_folder_here_bears_is_told_by_its_path(shell: Shell, model: Path, tmp_path: Path):
    home = {"HANOK_HOME": str(tmp_path / "hanok")}
    shell("export", model, "tiny")
    [first, _] = shell("pull", "tiny", env=home).next_commands()
    assert shell(*shlex.split(first)[1:], env=home).status == 0


# ---- streams
def test_a_reader_that_leaves_ends_the_writing(shell: Shell, model: Path):
    read, write = os.pipe()
    os.close(read)
    ended = shell("show", model, out=write)
    os.close(write)
    assert ended.status == 141 and "Traceback" not in ended.err and "hanok:" not in ended.err


def test_a_full_output_is_told(shell: Shell, model: Path):
    full = os.open("/dev/full", os.O_WRONLY)
    for arguments in (("show", model), ("show", model, "--json"), ("generate", model, "--prompt", "The", "--max-new-tokens", 2)):
        ended = shell(*arguments, out=full)
        assert ended.status == 2 and ended.lines[-1].startswith("hanok: the output: the disk is full"), ended
        assert ended.err.count("hanok: ") == 1 and "Traceback" not in ended.err
    os.close(full)


def test_a_terminal_that_lacks_letters_gets_what_it_knows(shell: Shell, model: Path):
    plain = {"PYTHONIOENCODING": "ascii"}
    assert shell("show", model, env=plain).status == 0
    assert shell("generate", model, "--prompt", "한옥", "--max-new-tokens", 1, "--json", env=plain).json()["prompt"] == "한옥"
