"""A bundle is the same after a round trip, appears whole or not at all, and says in one line what is wrong with it."""
from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import hanok
from hanok.bundle.bundle import (
    Bundle,
    Generation,
    check_tokenizer,
    count_parameters,
    empty_model,
    is_bundle,
    load_bundle,
    read_bundle_config,
    save_bundle,
    write_files,
)
from hanok.bundle.imports import export_folder, import_folder, load_any
from hanok.bundle.weights import parameters, read_safetensors, write_safetensors
from hanok.contracts import Batch
from hanok.disk import sha256
from hanok.errors import ConfigError, DataError, HanokError, WeightsError
from hanok.models import catalog
from hanok.text.tokenizer import Tokenizer
from tiny import bundle, tokenizer
from zoo import BY_NAME, CASES, V

everyone = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FULL = {"stop_ids": (0, 5), "start_ids": (3,), "pad_id": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.25, "repetition_penalty": 1.5,
        "add_special": True, "pooling": "last"}
FILES = ["README.md", "chat_template.jinja", "config.json", "generation.json", "manifest.json", "model.safetensors", "tokenizer.json"]


def of(case, **more) -> Bundle:
    return Bundle(catalog.FAMILIES[case.family], case.config, case.build(), **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def refused(error: type[HanokError], path: Path, open_it=load_bundle) -> str:
    with pytest.raises(error) as told:
        open_it(path)
    assert "\n" not in str(told.value)
    return str(told.value)


def edit_json(path: Path, **changes) -> None:
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_bundle(of(BY_NAME["llama-llama3-rope"], tokenizer=tokenizer("wordpiece", 90)), tmp_path / "saved")


# ---- the same after a round trip

@everyone
@torch.no_grad()
def test_a_loaded_model_equals_the_saved_one_to_the_bit(case, tmp_path):
    before = of(case)
    after = load_bundle(save_bundle(before, tmp_path / "out"))
    assert after.config == case.config and after.family is before.family and not after.model.training
    assert list(parameters(after.model)) == list(parameters(before.model))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(parameters(before.model).values(), parameters(after.model).values()))
    source = {"source_ids": torch.randint(V, (2, 5))} if case.reads_source else {}
    batch = Batch(torch.randint(V, (2, 9)), **source)
    assert torch.equal(after.model(batch), before.model(batch))
    assert sum(count_parameters(after.model).values()) == sum(p.numel() for p in before.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_is_kept_and_ties_stay(dtype, tmp_path):
    case = BY_NAME["llama-tied"]
    before = of(case)
    before.model.to(dtype)
    after = load_bundle(save_bundle(before, tmp_path / "out"))
    assert all(torch.equal(a, b) and b.dtype == dtype for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    assert after.model.head.weight is after.model.embed.token.weight


def test_everything_else_is_the_same_too(tmp_path):
    before = bundle(template="{{ messages }}\n한\r\n", **FULL)
    before.manifest = {"parent": {"name": "누가"}, "seed": 3, "metrics": {"validation_loss": 1.5}}
    out = save_bundle(before, tmp_path / "deep" / "out")
    after = load_bundle(out)
    assert names(out) == FILES
    assert after.generation == before.generation == Generation(**FULL)
    assert after.chat_template == before.chat_template
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert after.manifest == before.manifest and after.manifest["parent"] == {"name": "누가"}
    assert load_any(out).config == after.config
    again = save_bundle(after, tmp_path / "again")
    assert [(again / name).read_bytes() == (out / name).read_bytes() for name in FILES] == [name != "README.md" for name in FILES]    # its title


def test_what_a_bundle_lacks_is_not_written(tmp_path):
    out = save_bundle(of(BY_NAME["bert"]), tmp_path / "out")
    assert names(out) == [name for name in FILES if name not in ("chat_template.jinja", "tokenizer.json")]
    loaded = load_bundle(out)
    assert loaded.tokenizer is None and loaded.chat_template is None and loaded.generation == Generation()
    for name in ("generation.json", "manifest.json", "README.md"):
        (out / name).unlink()
    assert load_bundle(out).generation == Generation() and load_bundle(out).manifest == {}
    with pytest.raises(ConfigError, match="there has no tokenizer.json.*; `hanok import there NEW --tokenizer FILE` gives it one"):
        check_tokenizer(loaded, "there")


def test_writing_into_a_loaded_model_does_not_reach_the_disk(saved):
    digest = sha256(saved / "model.safetensors")
    with torch.no_grad():
        for parameter in load_bundle(saved).model.parameters():
            parameter.zero_()
    assert sha256(saved / "model.safetensors") == digest


def test_a_model_that_was_loaded_can_be_saved_over_itself(saved):
    """Its weights are views of the file that is replaced."""
    loaded = load_bundle(saved)
    before = {name: tensor.clone() for name, tensor in parameters(loaded.model).items()}
    write_files(loaded, saved, "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_safetensors(saved / "model.safetensors").items())


# ---- manifest and card

def test_the_manifest_says_what_made_the_bundle(saved):
    manifest = load_bundle(saved).manifest
    assert manifest["weights_sha256"] == sha256(saved / "model.safetensors")
    assert manifest["versions"] == {"hanok": hanok.__version__, "torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:3]))}


def test_lineage_goes_on_and_the_hash_is_of_the_new_weights(saved, tmp_path):
    child = load_bundle(saved)
    old = child.manifest["weights_sha256"]
    with torch.no_grad():
        child.model.embed.token.weight += 1
    child.manifest = {**child.manifest, "parent": {"weights_sha256": old}, "recipe": {"steps": 5}}
    manifest = load_bundle(save_bundle(child, tmp_path / "child")).manifest
    assert manifest["parent"] == {"weights_sha256": old} and manifest["recipe"] == {"steps": 5}
    assert manifest["weights_sha256"] == sha256(tmp_path / "child" / "model.safetensors") != old
    card = (tmp_path / "child" / "README.md").read_text()
    assert old in card and manifest["weights_sha256"] in card


@everyone
def test_the_card_names_family_sizes_and_verbs(case, tmp_path):
    model = of(case, manifest={"licence": "MIT", "metrics": {"validation_loss": 2.345}, "plot": "loss.png"})
    card = (save_bundle(model, tmp_path / "name of it") / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "# name of it\n" in card and f"A `{case.family}` model" in card
    assert f"{sum(p.numel() for p in model.model.parameters()):,}" in card and "| d_model" in card and "2.345" in card and "loss.png" in card
    assert ("hanok generate" in card) == case.generates
    assert ("hanok score" in card) == (catalog.FAMILIES[case.family].objective == "causal") and "hanok chat" not in card
    assert "licence" not in card and "'" not in card.split("## How it was made")[1].split("##")[0]


def test_the_card_of_a_model_that_chats_says_so_and_one_without_licence_too(tmp_path):
    card = (save_bundle(bundle(template="x"), tmp_path / "out") / "README.md").read_text()
    assert "hanok chat out" in card and "license: unknown" in card


def test_parameters_are_counted_by_part():
    case = BY_NAME["qwen3"]
    parts = count_parameters(case.build())
    assert parts == {"embedding": 97 * 32, "attention": 3 * (32 * 64 * 2 + 32 * 32 * 2), "feed-forward": 3 * 3 * 32 * 64,
                     "norms": 3 * (2 * 32 + 2 * 16) + 32}
    assert count_parameters(BY_NAME["llama"].build())["head"] == 97 * 32
    assert {"recurrence", "embedding", "head"} == set(count_parameters(BY_NAME["lstm"].build()))
    assert {"attention", "recurrence"} < set(count_parameters(BY_NAME["bahdanau"].build()))


# ---- whole or not at all

def test_an_occupied_place_is_refused_and_not_touched(saved, tmp_path):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    assert "saved is not empty; choose another folder, or remove it first" in refused(DataError, saved, lambda path: save_bundle(bundle(), path))
    assert "is a file; a new folder was expected" in refused(DataError, saved / "config.json", lambda path: save_bundle(bundle(), path))
    assert {path: path.read_bytes() for path in saved.iterdir()} == before and names(tmp_path) == sorted(["saved", *(p.name for p in before)])


class Interrupted(Tokenizer):
    """Somebody presses Ctrl-C when the weights are written and the tokenizer is not."""

    def to_json(self):
        raise KeyboardInterrupt


def test_an_interruption_leaves_nothing(tmp_path):
    broken = bundle(words=Interrupted(tokenizer()._rust))
    with pytest.raises(KeyboardInterrupt):
        save_bundle(broken, tmp_path / "a" / "out")
    assert names(tmp_path) == ["a"]
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write_files(broken, tmp_path / "run", "run")
    assert not is_bundle(tmp_path / "run") and "config.json" not in names(tmp_path / "run")


LIMITED = """
import resource, sys
from hanok.bundle.bundle import load_bundle, save_bundle
from hanok.errors import HanokError
bundle = load_bundle(sys.argv[1])
for limit in (0, 50_000, int(sys.argv[3])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_bundle(bundle, sys.argv[2])
    except HanokError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_leaves_nothing(saved, tmp_path):
    last = (saved / "model.safetensors").stat().st_size - 1
    done = subprocess.run([sys.executable, "-c", LIMITED, saved, tmp_path / "out", str(last)], capture_output=True, text=True)
    assert done.stdout.count("the file would be larger than this place allows") == done.stdout.count("\n") == 3, done.stderr
    assert os.listdir(tmp_path) == ["saved"]


# ---- what is wrong

def test_a_path_that_is_no_bundle_says_what_it_is(tmp_path, saved):
    (tmp_path / "file.gguf").touch()
    (tmp_path / "empty").mkdir()
    assert "there is no such bundle; make one with `hanok pull`" in refused(DataError, tmp_path / "none")
    assert "is a file; a bundle is a folder: `hanok import" in refused(DataError, tmp_path / "file.gguf")
    assert "is no bundle: it has no config.json" in refused(DataError, tmp_path / "empty")
    edit_json(saved / "config.json", family=None)
    assert "names no family; a bundle's config.json names one" in refused(DataError, saved)
    edit_json(saved / "config.json", model_type="llama")
    assert f"names no family; `hanok import {saved} OUT` makes a bundle of it" in refused(DataError, saved)
    (saved / "config.json").write_text('{"family": "llama",')
    assert "config.json: line 1, column" in refused(ConfigError, saved)
    assert not is_bundle(tmp_path / "empty") and not is_bundle(tmp_path / "none") and not is_bundle(tmp_path / "file.gguf")


@pytest.mark.parametrize(("change", "told"), [
    ({"d_modl": 32}, "unknown setting 'd_modl'; did you mean 'd_model'?"), ({"family": "lama"}, "unknown family 'lama'; did you mean 'llama'?"),
    ({"family": "mamba"}, "unknown family 'mamba'; "), ({"family": None, "x": '"family"'}, "names no family"), ({"family": []}, "family '[]'"),
    ({"n_layers": "many"}, "config.json.n_layers: got 'many', expected a whole number"), ({"n_layers": None}, "'n_layers' is missing"),
    ({"rope_scaling": {"kind": "yarn", "factor": 2}}, "rope_scaling.kind: got 'yarn'; choose from linear, llama3"),
    ({"rope_scaling": {"kind": "linear"}}, "'factor' is missing"), ({"n_heads": 5, "d_head": None}, "d_model 32 is not divisible by n_heads 5"),
    ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"), ({"d_head": 7}, "a width of 7 is odd"), ({"d_model": -32}, "d_model is -32"),
    ({"n_layers": 0}, "n_layers is 0; expected 1 or more"), ({"vocab_size": -1}, "vocab_size is -1"), ({"dropout": 7}, "dropout is 7.0; expected"),
    ({"n_heads": 0, "d_head": None}, "n_heads is 0"), ({"d_ff": 2 ** 62}, "a llama of these sizes cannot be built: "),
])
def test_a_config_that_cannot_be_is_refused_by_name(saved, change, told):
    edit_json(saved / "config.json", **change)
    assert told in refused(HanokError, saved)


def test_qwen3_without_its_norms_says_what_it_is(tmp_path):
    out = save_bundle(of(BY_NAME["qwen3"]), tmp_path / "out")
    edit_json(out / "config.json", qk_norm=False)
    assert "with false it is a llama" in refused(ConfigError, out)


@pytest.mark.parametrize(("change", "told"), [
    (lambda t: t.pop("head.weight"), "tensor 'head.weight' (97, 32) is missing; is it the right config?"),
    (lambda t: t.update({"head.weight": torch.ones(97, 31)}), "tensor 'head.weight' has shape (97, 31), the config wants (97, 32)"),
    (lambda t: t.update({"head.bias": torch.ones(97)}), "tensor 'head.bias' (97,) has no place in this model"),
    (lambda t: t.update({"head.weight": torch.ones(97, 32, dtype=torch.int8)}), "'head.weight' has type torch.int8, the model wants torch.float32"),
])
def test_weights_that_do_not_fit_are_named(saved, change, told):
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(saved / "model.safetensors").items()}
    change(tensors)
    write_safetensors(saved / "model.safetensors", tensors)
    message = refused(WeightsError, saved)
    assert told in message and str(saved) in message


def test_weights_that_are_cut_or_not_there_are_told(saved):
    weights = saved / "model.safetensors"
    data = weights.read_bytes()
    n_head = 8 + struct.unpack("<Q", data[:8])[0]
    for n in (0, 4, 8, n_head // 2, n_head, n_head + 1, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:n])
        assert "cut short" in refused(WeightsError, saved)
    weights.rename(saved / "model.bin")
    assert "model.bin is a pickle, which can run code" in refused(WeightsError, saved)
    (saved / "model.bin").unlink()
    assert "holds no model.safetensors" in refused(WeightsError, saved)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(saved):
    assert load_bundle(saved).tokenizer.vocab_size <= V
    tokenizer().save(saved)
    message = refused(ConfigError, saved)
    assert f"the tokenizer has {tokenizer().vocab_size} tokens, the model knows 97; they are not of one model" in message and str(saved) in message


def test_an_import_with_a_tokenizer_that_is_larger_than_the_model_is_refused_at_once(tmp_path):
    folder = export_folder(of(BY_NAME["llama"]), tmp_path / "hf")
    tokenizer().save(folder)
    assert "tokens, the model knows 97; they are not of one model" in refused(ConfigError, folder, import_folder)


@pytest.mark.parametrize(("name", "content", "told"), [
    ("tokenizer.json", "{}", "not a tokenizer.json"), ("tokenizer.json", "\xff", "not utf-8"), ("manifest.json", "{", "it should be JSON"),
    ("chat_template.jinja", "\xff", "not utf-8: 0xff at byte 0"), ("generation.json", "[]", "expected a JSON object"),
    ("generation.json", '{"stop_id": [1]}', "unknown setting 'stop_id'; did you mean 'stop_ids'?"),
    ("generation.json", '{"pooling": "max"}', "choose from first, last, mean"), ("generation.json", '{"stop_ids": 5}', "expected a list"),
])
def test_a_file_that_is_broken_is_named(saved, name, content, told):
    (saved / name).write_bytes(content.encode("latin-1"))
    message = refused(HanokError, saved)
    assert told in message and str(saved / name) in message


def test_a_config_can_be_read_without_the_weights(saved):
    (saved / "model.safetensors").unlink()
    family, config = read_bundle_config(saved)
    assert family.name == "llama" and config == BY_NAME["llama-llama3-rope"].config
    assert all(p.is_meta for p in empty_model(family, config).parameters())


# ---- from and to Hugging Face

def test_how_a_model_is_asked_is_the_same_after_export_and_import(tmp_path):
    told = {**FULL, "add_special": False, "pooling": "mean"}
    for name, generation in (("sampled", Generation(**told)), ("greedy", Generation(stop_ids=(4,), repetition_penalty=1.2)), ("plain", Generation())):
        before = replace(bundle(), generation=generation)
        after = import_folder(export_folder(before, tmp_path / name))
        assert asdict(after.generation) == asdict(generation)


def test_a_pad_id_that_is_none_becomes_zero(tmp_path):
    """Early Llama folders have -1."""
    folder = export_folder(bundle(), tmp_path / "hf")
    edit_json(folder / "config.json", pad_token_id=-1)
    (folder / "generation_config.json").unlink()
    assert import_folder(folder).generation.pad_id == 0


def test_load_any_says_what_a_path_is(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    torch.save({}, tmp_path / "model.pt")
    expected = "a bundle, a Hugging Face folder or a .gguf file was expected"
    assert f"there is no such file or folder; {expected}" in refused(DataError, tmp_path / "no", load_any)
    assert f"notes.txt is not a model; {expected}" in refused(DataError, tmp_path / "notes.txt", load_any)
    assert "is no bundle: it has no config.json" in refused(DataError, tmp_path / "empty", load_any)
    assert "is a pickle" in refused(WeightsError, tmp_path / "model.pt", load_any)
    assert load_any(saved).family.name == "llama"
