"""hanok families: what there is, where it can go, and how large its presets are."""
from __future__ import annotations

import pytest
from conftest import Shell

from hanok.models import catalog


def test_every_family_is_listed_with_where_it_can_go(shell: Shell):
    told = {family["family"]: family for family in shell("families", "--json").json()["families"]}
    assert list(told) == list(catalog.FAMILIES)
    assert told["gpt2"]["huggingface"] == ["GPT2LMHeadModel"] and told["gpt"]["huggingface"] == []
    assert told["bert"]["kind"] == "encoder" and told["t5"]["objective"] == "seq2seq"
    ended = shell("families")
    assert all(f"\n{name}: {family.summary}" in ended.out for name, family in catalog.FAMILIES.items())
    assert ended.next_commands()[0] == f"hanok families {catalog.DEFAULT}"


def test_a_preset_of_billions_is_counted_without_memory(shell: Shell):
    presets = {preset["preset"]: preset for preset in shell("families", "llama", "--json").json()["presets"]}
    assert presets["llama-2-7b"]["parameters"] == 6_738_415_616
    assert presets["smollm2-135m"]["config"]["n_layers"] == 30
    assert "smollm2-135m" in shell("families", "llama").out


@pytest.mark.parametrize("name", ["lama", "frobnicate"])
def test_an_unknown_family(name: str, shell: Shell):
    assert f"unknown family '{name}'; " in shell.refused("families", name)
