"""hanok next: the distribution at each temperature on the terminal, as a picture and as JSON; encoders are refused."""
from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Shell

from hanok.bundle.bundle import save_bundle
from hanok.models.bert import BertConfig
from tiny import bundle, tokenizer

HOW = ("--prompt", "The red", "--temperature", 0, "--temperature", 0.5, "--temperature", 2)


def test_each_temperature_on_the_terminal(shell: Shell, model: Path):
    ended = shell("next", model, *HOW, "--top", 4)
    assert ended.status == 0
    heads = [line for line in ended.out.splitlines() if line.startswith("temperature ")]
    assert heads[0] == "temperature 0: 0.00 bits: greedy" and [head.split(":")[0] for head in heads[1:]] == ["temperature 0.5", "temperature 2"]
    assert ended.out.count("100.0%  " + "█" * 40) == 1 and ended.out.count("all others") == 3 and len(ended.out.splitlines()) == 3 * (1 + 2 + 5 + 1)
    assert ended.lines[0] == "no picture was asked for; --out FILE.png draws one" and ended.next_commands()[0].startswith("hanok generate ")


def test_as_json_and_as_a_picture(shell: Shell, model: Path):
    told = shell("next", model, *HOW, "--out", "next.png", "--json").json()
    assert told.keys() == {"bundle", "prompt", "distributions", "picture"} and told["picture"] == "next.png"
    assert (shell.cwd / "next.png").read_bytes().startswith(b"\x89PNG")
    for spread in told["distributions"]:
        assert spread.keys() == {"temperature", "entropy_bits", "rest", "tokens"} and len(spread["tokens"]) == 10
        assert sum(token["probability"] for token in spread["tokens"]) + spread["rest"] == pytest.approx(1)
    bits = [spread["entropy_bits"] for spread in told["distributions"]]
    assert bits[0] == 0 and bits[0] < bits[1] < bits[2]
    written = shell("generate", model, "--prompt", "The red", "--max-new-tokens", 1, "--json").json()["answers"][0]["text"]
    assert told["distributions"][0]["tokens"][0]["token"] == written


def test_three_temperatures_by_default(shell: Shell, model: Path):
    told = shell("next", model, "--prompt", "The", "--json").json()
    assert [spread["temperature"] for spread in told["distributions"]] == [0.2, 1.0, 2.0]


def test_cuts_reach_the_distribution(shell: Shell, model: Path):
    [two] = shell("next", model, "--prompt", "The", "--temperature", 1, "--top-k", 2, "--json").json()["distributions"]
    assert [token["probability"] > 0 for token in two["tokens"]] == [True] * 2 + [False] * 8 and two["rest"] == 0
    [one] = shell("next", model, "--prompt", "The", "--temperature", 1, "--top-p", 1e-6, "--json").json()["distributions"]
    assert one["entropy_bits"] == 0


@pytest.mark.parametrize("prompt", ["한옥은", "🏠", "--x", "$x$\n"])
def test_any_prompt(prompt: str, shell: Shell, model: Path):
    assert shell("next", model, "--prompt", prompt, "--out", "a.png").status == 0


def test_mistakes_are_one_line(shell: Shell, model: Path, tmp_path: Path):
    encoder = save_bundle(bundle(BertConfig(200, 32, 2, 4, 64, 24), "bert", words=tokenizer("wordpiece", 200), add_special=True), tmp_path / "bert")
    assert "is an encoder (bert): it does not say what comes next; use attention or embed" in shell.refused("next", encoder, "--prompt", "a")
    for arguments, told in ((("--prompt", ""), "the prompt is empty"), (("--prompt", "a", "--temperature", "-1"), "temperature is -1.0"),
                            (("--prompt", "a", "--top", "0"), "top is 0; expected 1 token or more"),
                            (("--prompt", "a", "--top-p", "2"), "top_p is 2.0"),
                            (("--prompt", "The red house. " * 40), "the model's context 64; shorten it by at least"), ((), "--prompt")):
        assert told in shell.refused("next", model, *arguments)
