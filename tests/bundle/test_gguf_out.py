"""Bundles as GGUF files and back: the same logits, tokens, template and ends; types and their rounding; what is refused leaves nothing behind."""
from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import rope_factors
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.bundle import gguf_out
from hanok.bundle.bundle import Bundle, load_bundle, save_bundle
from hanok.bundle.gguf_out import export_gguf, losses, writable
from hanok.bundle.imports import import_gguf
from hanok.bundle.tables import expressible
from hanok.bundle.weights import parameters
from hanok.contracts import Batch
from hanok.errors import ConfigError, DataError, HanokError, WeightsError
from hanok.models import catalog
from hanok.models.gpt import GPTConfig
from hanok.models.llama import LlamaConfig, RopeScaling
from hanok.models.mistral import MistralConfig
from hanok.text.tokenizer import train
from tiny import CONFIG, bundle, prose, tokenizer
from zoo import BY_NAME

ROWS = 320
NAMES = ("llama", "llama-tied", "llama-linear-rope", "llama-llama3-rope", "qwen3", "qwen2", "qwen2-tied", "mistral", "gpt2")
CASES = {name: (BY_NAME[name].family, replace(BY_NAME[name].config, vocab_size=ROWS)) for name in NAMES} | {
    "llama-many-heads": ("llama", replace(CONFIG, n_kv_heads=4)), "llama-no-head-width": ("llama", replace(CONFIG, d_head=None)),
    "llama-own-rule": ("llama", replace(CONFIG, rope_scaling=RopeScaling("llama3", 6.0, 2.0, 8.0, 4096))),
    "llama-short-waves": ("llama", replace(CONFIG, rope_theta=50.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 512))),
    "gpt2-untied": ("gpt2", GPTConfig(ROWS, 32, 2, 4, 48, 16, tie_embeddings=False))}
IDS = torch.arange(2, 26).view(2, 12)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def logits(made: Bundle) -> torch.Tensor:
    with torch.no_grad():
        return made.model(Batch(IDS))


def refused(error: type[HanokError], made: Bundle, out: Path, *kind) -> str:
    """The line with which an export is refused; fails if it left anything."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error) as told:
        export_gguf(made, out, *kind)
    assert "\n" not in str(told.value) and sorted(out.parent.iterdir()) == before
    return str(told.value)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_in_fp32_is_the_same_bundle(name, tmp_path):
    family, config = CASES[name]
    made = bundle(config, family, template=TEMPLATE, stop_ids=(0,))
    made.manifest = {"licence": "apache-2.0"}
    lost = export_gguf(made, tmp_path / "x.gguf", "f32")
    back = import_gguf(tmp_path / "x.gguf")
    assert back.family is made.family and torch.equal(logits(back), logits(made))
    assert all(torch.equal(ours, parameters(back.model)[key]) for key, ours in parameters(made.model).items())
    length = config.max_seq_len if family != "mistral" else config.window
    assert replace(back.config, norm_eps=config.norm_eps) == replace(config, max_seq_len=length)
    assert back.config.norm_eps == pytest.approx(config.norm_eps) and bool(lost) == (family == "mistral")
    assert back.chat_template == TEMPLATE and back.generation == made.generation and back.manifest["licence"] == "apache-2.0"
    assert back.tokenizer.vocab_size == made.tokenizer.vocab_size and back.tokenizer.specials == made.tokenizer.specials
    for text in (prose(40, seed=5), "x<|endoftext|>y"):
        assert back.tokenizer.encode(text, parse_special=True) == made.tokenizer.encode(text, parse_special=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_second_round_changes_no_byte(tmp_path):
    made = bundle(template=TEMPLATE, stop_ids=(0,))
    export_gguf(made, tmp_path / "x.gguf", "q8_0")
    export_gguf(import_gguf(tmp_path / "x.gguf"), tmp_path / "y.gguf", "q8_0")
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_a_saved_bundle_in_half_precision_goes_out_as_it_lies(tmp_path):
    made = bundle()
    made.model.bfloat16()
    stored = load_bundle(save_bundle(made, tmp_path / "stored"))
    export_gguf(stored, tmp_path / "x.gguf", "f32")
    back = parameters(import_gguf(tmp_path / "x.gguf").model)
    assert all(torch.equal(back[name], ours.float()) for name, ours in parameters(stored.model).items())


# ---- types

def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_vectors_stay_fp32_and_matrices_take_the_type(kind, tmp_path):
    for family, config in (CASES["qwen2"], CASES["llama-llama3-rope"], CASES["gpt2"]):
        path = tmp_path / f"{family}.gguf"
        export_gguf(bundle(config, family), path, kind)
        reader = gguf.GGUFReader(path)
        for tensor in reader.tensors:
            plain = tensor.name == "position_embd.weight" or len(tensor.shape) == 1
            assert tensor.tensor_type.name == ("F32" if plain else kind.upper()), tensor.name
            assert tensor.data_offset % gguf.GGUF_DEFAULT_ALIGNMENT == 0
        assert reader.get_field("general.file_type").contents() == {"f32": 0, "f16": 1, "q8_0": 7}[kind]
        assert path.stat().st_size % gguf.GGUF_DEFAULT_ALIGNMENT == 0


def test_rows_that_do_not_divide_into_blocks_stay_half_precision(tmp_path):
    export_gguf(bundle(LlamaConfig(ROWS, 48, 1, 4, 2, 64, 64)), tmp_path / "x.gguf", "q8_0")
    found = kinds(tmp_path / "x.gguf")
    assert found["blk.0.ffn_down.weight"] == "Q8_0" and found["blk.0.ffn_up.weight"] == found["token_embd.weight"] == "F16"
    assert found["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_rounding_is_the_types_own(name, kind, tmp_path):
    """F16 keeps 11 bits of each number; Q8_0 is off by half a step, 1/254 of the largest of 32 neighbours, and the scale's own rounding."""
    family, config = CASES[name]
    made = bundle(config, family)
    export_gguf(made, tmp_path / "x.gguf", kind)
    back = import_gguf(tmp_path / "x.gguf")
    for key, ours in parameters(made.model).items():
        theirs = parameters(back.model)[key]
        if ours.dim() < 2 or "position" in key:
            assert torch.equal(theirs, ours)
        elif kind == "f16":
            assert torch.equal(theirs, ours.half().float())
        else:
            largest = ours.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
            assert ((theirs - ours).unflatten(-1, (-1, 32)).abs() <= largest * (1 / 254 + 1 / 2048)).all() and not torch.equal(theirs, ours)
    assert (logits(back) - logits(made)).abs().max() < (0.02 if kind == "f16" else 0.5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from(["f32", "f16", "q8_0"]), st.randoms(use_true_random=False),
       st.sampled_from([1e-6, 1.0, 1e3]))
def test_blocks_are_read_as_they_were_made(rows, blocks, kind, random, scale):
    values = torch.tensor([[random.uniform(-scale, scale) for _ in range(32 * blocks)] for _ in range(rows)])
    data = gguf_out.encoded(gguf_out.Planned("x", kind, tuple(values.shape), lambda: values))
    back = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()]))
    step = {"f32": 0.0, "f16": 2 ** -11, "q8_0": 1 / 254 + 1 / 2048}[kind]
    assert (back - values).abs().max() <= step * values.abs().max() + 2 ** -24 * (127 if kind == "q8_0" else 1) * (kind != "f32")


@pytest.mark.parametrize(("number", "kind"), [(7e4, "f16"), (float("inf"), "f32"), (float("nan"), "f32"), (float("nan"), "q8_0"), (1e7, "q8_0")])
def test_a_number_that_the_type_cannot_hold_is_told(number, kind, tmp_path):
    made = bundle()
    with torch.no_grad():
        made.model.stack.blocks[1].ffn.up.weight[3, 4] = number
    assert f"blk.1.ffn_up.weight holds a number that {kind.upper()} cannot" in refused(WeightsError, made, tmp_path / "x.gguf", kind)


# ---- metadata

def metadata(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_llama_3s_rule_goes_out_as_factors(tmp_path):
    family, config = CASES["llama-llama3-rope"]
    export_gguf(bundle(config, family), tmp_path / "x.gguf")
    factors = next(tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "rope_freqs.weight")
    assert np.allclose(factors, rope_factors(config), rtol=1e-5) and len(set(factors.tolist())) > 1
    told = metadata(tmp_path / "x.gguf")
    assert "llama.rope.scaling.factor" not in told and "llama.rope.scaling.type" not in told      # llama.cpp would scale a second time


def test_linear_scaling_goes_out_as_metadata(tmp_path):
    family, config = CASES["llama-linear-rope"]
    export_gguf(bundle(config, family), tmp_path / "x.gguf")
    told = metadata(tmp_path / "x.gguf")
    assert told["llama.rope.scaling.type"] == "linear" and told["llama.rope.scaling.factor"] == 4.0
    assert "rope_freqs.weight" not in kinds(tmp_path / "x.gguf")


def test_a_mistral_goes_out_to_its_window(tmp_path):
    family, config = CASES["mistral"]
    lost = export_gguf(bundle(config, family, stop_ids=(0,)), tmp_path / "x.gguf")
    assert lost == ["llama.cpp ignores a Mistral's window: the file's context is 5 tokens, not 64"]
    told = metadata(tmp_path / "x.gguf")
    assert told["general.architecture"] == "llama" and told["llama.context_length"] == told["llama.attention.sliding_window"] == 5
    for config in (MistralConfig(ROWS, 32, 1, 4, 2, 64, 64), MistralConfig(ROWS, 32, 1, 4, 2, 64, 64, window=64)):
        made = bundle(config, "mistral", stop_ids=(0,))
        assert losses(made, writable(made.family, config)) == []


def test_the_name_is_the_parents_or_the_files(tmp_path):
    made = bundle()
    export_gguf(made, tmp_path / "mine.gguf")
    made.manifest = {"parent": {"name": "SmolLM2 누가"}}
    export_gguf(made, tmp_path / "theirs.gguf")
    assert [metadata(tmp_path / f"{name}.gguf")["general.name"] for name in ("mine", "theirs")] == ["mine", "SmolLM2 누가"]


def test_stop_ids_without_a_place_are_told(tmp_path):
    lost = export_gguf(bundle(stop_ids=(0, 7, 9)), tmp_path / "x.gguf")
    words = tokenizer()
    assert lost == [f"GGUF has a place for three special tokens that end an answer; {words.token(7)!r}, {words.token(9)!r} will not"]
    assert import_gguf(tmp_path / "x.gguf").generation.stop_ids == (0,)


def test_that_an_answer_will_end_where_it_did_not_is_told(tmp_path):
    """A file that names no end would be worse: llama.cpp then ends at token 11."""
    [told] = export_gguf(bundle(), tmp_path / "x.gguf")
    assert told == "no special token ends this model's answers, but llama.cpp always has one that does: here '<|endoftext|>', as the file names it"
    assert import_gguf(tmp_path / "x.gguf").generation.stop_ids == (0,)
    [told] = export_gguf(bundle(words=train("bpe", [prose(400)], 300, specials=[])), tmp_path / "y.gguf")
    assert told.endswith("always has one that does: one of its own choice") and import_gguf(tmp_path / "y.gguf").generation.stop_ids == ()


def test_a_model_without_words_is_written_still(tmp_path):
    made = replace(bundle(), tokenizer=None)
    assert export_gguf(made, tmp_path / "x.gguf", "f32") == []
    back = import_gguf(tmp_path / "x.gguf")
    assert back.tokenizer is None and torch.equal(logits(back), logits(made))


# ---- what is refused

def test_a_family_without_architecture_says_which_have_one(tmp_path):
    for name in ("gpt", "gpt1", "bert", "t5", "transformer"):
        family = catalog.family(name)
        message = refused(ConfigError, Bundle(family, next(iter(family.presets.values())), torch.nn.Identity()), tmp_path / "x.gguf")
        assert f"GGUF has no architecture for {name}; families that it has one for are gpt2, llama, mistral, qwen2, qwen3" in message


@pytest.mark.parametrize(("name", "config", "told"), [
    ("gpt2", GPTConfig(ROWS, 32, 1, 4, 48, 16, activation="relu"), "no GGUF architecture expresses this gpt2: it needs activation = gelu_tanh"),
    ("llama", replace(CONFIG, qk_norm=True), "no GGUF architecture expresses this llama: it needs qk_norm = False"),
])
def test_a_config_without_architecture_says_what_it_needs(name, config, told, tmp_path):
    assert told in refused(ConfigError, bundle(config, name), tmp_path / "x.gguf")
    assert not expressible(catalog.family(name).gguf, config) and expressible(catalog.family(name).gguf, CASES[name][1])


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path):
    made = bundle(words=tokenizer("wordpiece", 300), config=replace(CONFIG, vocab_size=400))
    assert "a wordpiece tokenizer is not written to GGUF" in refused(HanokError, made, tmp_path / "x.gguf")


def test_a_place_that_is_taken_or_misnamed_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    assert "is there already; choose another name, or remove it first" in refused(DataError, bundle(), tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert "give it a name that ends in .gguf" in refused(DataError, bundle(), tmp_path / "y.bin")
    with pytest.raises(DataError, match="a part of this path is a file"):
        export_gguf(bundle(), tmp_path / "x.gguf" / "y.gguf")


def test_an_interruption_leaves_nothing(tmp_path):
    made = bundle()
    table = catalog.family("llama").gguf[0]

    def interrupted(config):
        weights = table.weights(config)
        layout = replace(weights[-1].layout, pack=lambda ours: (_ for _ in ()).throw(KeyboardInterrupt) if ours[0].device.type == "cpu" else ours[0])
        return [*weights[:-1], replace(weights[-1], layout=layout)]

    made.family = replace(made.family, gguf=(replace(table, weights=interrupted),))
    with pytest.raises(KeyboardInterrupt):
        export_gguf(made, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_tensors_are_made_one_at_a_time(tmp_path):
    """Each is packed once for real, in the file's order, and nothing before the head is known to be good."""
    made, seen = bundle(), []
    table = catalog.family("llama").gguf[0]

    def watched(weight):
        def pack(ours):
            if ours[0].device.type == "cpu":
                seen.append(weight.theirs)
            return weight.layout.pack(ours)
        return replace(weight, layout=replace(weight.layout, pack=pack))

    made.family = replace(made.family, gguf=(replace(table, weights=lambda config: [watched(weight) for weight in table.weights(config)]),))
    export_gguf(made, tmp_path / "x.gguf")
    assert seen == list(kinds(tmp_path / "x.gguf"))


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_sizes_go_there_and_back(data):
    n_kv_heads, group, width = (data.draw(st.sampled_from(choices)) for choices in ([1, 2, 3], [1, 2], [2, 4, 8]))
    name = data.draw(st.sampled_from(["llama", "qwen2", "qwen3", "mistral"]))
    heads = n_kv_heads * group
    sizes = (300, heads * width, data.draw(st.integers(1, 2)), heads, n_kv_heads, data.draw(st.integers(1, 40)), 16)
    more = {"d_head": data.draw(st.sampled_from([None, 2, 6])), "tie_embeddings": data.draw(st.booleans()), "qk_norm": name == "qwen3",
            "rope_theta": data.draw(st.sampled_from([100.0, 1e6]))}
    config = MistralConfig(*sizes, **more, window=16) if name == "mistral" else LlamaConfig(*sizes, **more)
    made = bundle(config, name)
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(made, Path(folder) / "x.gguf", "f32")
        back = import_gguf(Path(folder) / "x.gguf")
    assert torch.equal(logits(back), logits(made)) and back.family is made.family
