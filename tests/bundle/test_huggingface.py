"""Parity with Hugging Face on tiny random weights, through real folders on disk: theirs -> ours -> theirs, and what the tables refuse."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from hanok.bundle.bundle import Bundle
from hanok.bundle.huggingface import read_config, read_weights
from hanok.bundle.imports import export_folder, import_folder
from hanok.bundle.tables import expressible
from hanok.bundle.weights import read_folder, write_safetensors
from hanok.contracts import Batch
from hanok.errors import ConfigError, HanokError, WeightsError
from hanok.generate.search import greedy, source_of
from hanok.models import catalog
from zoo import BY_NAME, CASES, C, V

twins = pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=lambda case: case.name)
LENGTHS = (5, 9, 2)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def inputs(case):
    """A padded batch for us and the same for them."""
    torch.manual_seed(3)
    token_ids = torch.randint(3, V - 2, (3, 9))
    keep = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    if not case.reads_source:
        more = {"token_type_ids": torch.randint(2, (3, 9))} if case.family == "bert" else {}
        return Batch(token_ids, keep=keep, segment_ids=more.get("token_type_ids")), {"input_ids": token_ids, "attention_mask": keep.long(), **more}
    source = torch.randint(3, V - 2, (3, 7))
    source_keep = torch.arange(7) < torch.tensor((7, 3, 5))[:, None]
    return (Batch(token_ids, keep=keep, source_ids=source, source_keep=source_keep),
            {"input_ids": source, "attention_mask": source_keep.long(), "decoder_input_ids": token_ids})


def logits(output):
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if hasattr(output, name):
            return getattr(output, name)
    raise AssertionError(output)


def compare(ours, theirs, case):
    batch, kwargs = inputs(case)
    got, expected = ours(batch), logits(theirs(**kwargs))
    for i, n in enumerate(LENGTHS):
        assert (got[i, :n] - expected[i, :n]).abs().max() <= 2e-4


@twins
def test_logits_equal_theirs_and_the_round_trip_keeps_them(case, tmp_path: Path):
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path / "theirs")
    bundle = import_folder(tmp_path / "theirs")
    assert {k: v for k, v in vars(bundle.config).items() if "dropout" not in k} == {k: v for k, v in vars(case.config).items() if "dropout" not in k}
    compare(bundle.model, theirs, case)
    export_folder(bundle, tmp_path / "ours")
    back, told = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    compare(bundle.model, back.eval(), case)
    again = import_folder(tmp_path / "ours")
    assert again.config == bundle.config
    assert all(torch.equal(a, b) for a, b in zip(bundle.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.generates and case.twin], ids=lambda case: case.name)
def test_greedy_text_equals_theirs(case, tmp_path: Path):
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path / "theirs")
    model = import_folder(tmp_path / "theirs").model
    rows = [[0, 5, 9, 4], [0, 7], [0, 3, 8, 8, 12, 40]]
    sources = [[5, 6, 7], [9, 10, 11, 12, 13], [20]]
    ours = greedy(model, rows, 12, source_of(sources) if case.reads_source else None)
    generation = theirs.generation_config
    generation.eos_token_id = generation.forced_eos_token_id = generation.bad_words_ids = None
    for row, source, written in zip(rows, sources, ours):
        read = torch.tensor([source if case.reads_source else row])
        more = {"decoder_input_ids": torch.tensor([row])} if case.reads_source else {}
        expected = theirs.generate(read, attention_mask=torch.ones_like(read), max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=1,
                                   pad_token_id=V - 1, **more)[0].tolist()
        assert written == expected


def test_shards_are_read(tmp_path: Path):
    theirs = BY_NAME["llama"].build_twin()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    compare(import_folder(tmp_path).model, theirs, BY_NAME["llama"])
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(WeightsError, match=r"00002-of.* is missing \(1 of"):
        import_folder(tmp_path)


@pytest.mark.parametrize("spelling", ["old", "new", "both"])
def test_rope_is_read_in_both_spellings_and_written_in_both(spelling, tmp_path: Path):
    case = BY_NAME["llama-llama3-rope"]
    case.build_twin().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    data = json.loads(file.read_text())
    newer = data.pop("rope_parameters")
    older = {"rope_theta": newer["rope_theta"], "rope_scaling": {k: v for k, v in newer.items() if k != "rope_theta"}}
    file.write_text(json.dumps({**data, **({"rope_parameters": newer} if spelling != "old" else {}), **(older if spelling != "new" else {})}))
    bundle = import_folder(tmp_path / "theirs")
    assert bundle.config.rope_scaling == case.config.rope_scaling
    export_folder(bundle, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["rope_theta"] == 10_000.0 and written["rope_scaling"]["rope_type"] == "llama3" and written["rope_parameters"]["factor"] == 8.0


@pytest.mark.parametrize(("change", "told"), [
    ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act"), ({"a_new_trick": 3}, "a_new_trick"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"), ({"model_type": "mamba"}, "mamba"),
    ({"num_hidden_layers": None}, "num_hidden_layers|n_layers"),
    ({"num_hidden_layers": 5}, r"layers\.3\.\S+' is missing"), ({"num_hidden_layers": 2}, r"layers\.2\.\S+' \(\S+ ?\S*\) has no place"),
    ({"intermediate_size": 60}, r"\(64, 32\), the config wants \(60, 32\)"),
])
def test_what_the_table_does_not_explain_is_refused_by_name(change, told, tmp_path: Path):
    BY_NAME["llama"].build_twin().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(HanokError, match=told) as refused:
        import_folder(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_attribute_at_its_default_is_not_refused(tmp_path: Path):
    BY_NAME["llama"].build_twin().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_bias": False, "pretraining_tp": 1, "torch_dtype": "float16"}))
    import_folder(tmp_path)


def test_a_head_that_contradicts_its_tie_is_refused(tmp_path: Path):
    case = BY_NAME["llama"]
    case.build_twin().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(WeightsError, match="lm_head.weight"):
        import_folder(tmp_path)


def test_a_gpt2_folder_without_prefix_and_with_mask_buffers_is_read(tmp_path: Path):
    """The files that the world has of GPT-2 leave out `transformer.` and carry `attn.bias`."""
    case = BY_NAME["gpt2"]
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    write_safetensors(tmp_path / "model.safetensors", {**tensors, "h.0.attn.bias": torch.ones(1, 1, C, C)})
    compare(import_folder(tmp_path).model, theirs, case)


def test_an_old_bert_with_gamma_and_beta_is_read(tmp_path: Path):
    case = BY_NAME["bert-pretraining"]
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.contiguous()
           for name, tensor in theirs.state_dict().items() if "decoder" not in name and "position_ids" not in name}
    write_safetensors(tmp_path / "model.safetensors", old)
    compare(import_folder(tmp_path).model, theirs, case)


def test_a_family_that_they_cannot_express_says_who_can(tmp_path: Path):
    case = BY_NAME["gpt-relu"]
    with pytest.raises(ConfigError, match="no class for gpt; families that export are .*qwen3"):
        export_folder(Bundle(catalog.family("gpt"), case.config, case.build()), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "config", "told"), [
    ("gpt1", replace(BY_NAME["gpt1"].config, d_ff=64), r"no Hugging Face class expresses this gpt1: it needs d_ff = 4 x d_model \(128, not 64\)"),
    ("gpt1", replace(BY_NAME["gpt1"].config, activation="gelu"), "it needs activation = gelu_tanh or relu, not gelu"),
    ("llama", replace(BY_NAME["llama"].config, qk_norm=True), "it needs qk_norm = False"),
    ("mistral", replace(BY_NAME["mistral"].config, qk_norm=True), "it needs qk_norm = False"),
])
def test_a_config_that_they_cannot_express_says_what_it_needs(name, config, told, tmp_path: Path):
    family = catalog.family(name)
    with pytest.raises(ConfigError, match=told):
        export_folder(Bundle(family, config, family.build(config)), tmp_path / "out")
    assert not expressible(family.hf, config) and expressible(family.hf, BY_NAME[name].config) and not list(tmp_path.iterdir())


def test_what_a_file_leaves_out_is_what_their_class_takes():
    """Their own configs without any argument, told to us with only the sizes that must be there."""
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "n_embd", "n_layer", "n_head")
    for name, theirs in (("llama", transformers.LlamaConfig()), ("mistral", transformers.MistralConfig()), ("qwen2", transformers.Qwen2Config()),
                         ("qwen3", transformers.Qwen3Config()), ("gpt1", transformers.OpenAIGPTConfig()), ("gpt2", transformers.GPT2Config())):
        family = catalog.family(name)
        table, told = family.hf[0], json.loads(theirs.to_json_string(use_diff=False))
        full = {key: told[key] for key in (*table.settings, "rope_parameters") if key in told}
        got, expected = (read_config(table, family, data, {}, "x") for data in (full, {key: full[key] for key in required if key in full}))
        assert vars(got) | {"d_head": None} == vars(expected) | {"d_head": None}, name
        assert getattr(got, "d_head", None) in (None, got.d_model // got.n_heads)


@pytest.mark.parametrize(("name", "change", "told"), [
    ("qwen2", {"use_sliding_window": True}, "'use_sliding_window' = True is not supported for qwen2; only False is"),
    ("qwen2", {"attention_bias": False}, "'attention_bias' = False is not known for qwen2"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "window is 0; expected 1 or more"), ("mistral", {"hidden_act": "gelu"}, "hidden_act"),
    ("gpt1", {"afn": "silu"}, "activation: got 'silu'"), ("gpt1", {"n_positions": 63}, "has shape"),
])
def test_relatives_refuse_what_their_tables_do_not_explain(name, change, told, tmp_path: Path):
    BY_NAME[name].build_twin().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(HanokError, match=told) as refused:
        import_folder(tmp_path)
    assert "\n" not in str(refused.value)


def test_qwen2_as_published_is_read(tmp_path: Path):
    """Its files tell of a window that they do not use."""
    case = BY_NAME["qwen2"]
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": 4, "max_window_layers": 2, "use_sliding_window": False,
                                "use_mrope": False, "attention_dropout": 0.0}))
    compare(import_folder(tmp_path).model, theirs, case)


def test_a_window_binds(tmp_path: Path):
    """Without it the logits would differ behind the fifth token, and only there."""
    case = BY_NAME["mistral"]
    case.build_twin().save_pretrained(tmp_path)
    bound = import_folder(tmp_path).model
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": None}))
    free = import_folder(tmp_path)
    assert free.config.window is None
    differ = (free.model(inputs(case)[0]) - bound(inputs(case)[0])).abs()
    assert differ[1, :5].max() <= 1e-5 and differ[1, 5:].max() > 0.01


def test_half_precision_is_read_as_fp32(tmp_path: Path):
    case = BY_NAME["llama"]
    theirs = case.build_twin().bfloat16()
    theirs.save_pretrained(tmp_path)
    bundle = import_folder(tmp_path)
    assert next(bundle.model.parameters()).dtype == torch.float32
    compare(bundle.model, theirs.float(), case)


def test_an_untied_t5_keeps_its_head_in_a_round_trip(tmp_path: Path):
    """T5 1.1 as published: a head of its own, unscaled."""
    case = replace(BY_NAME["t5-1.1"], config=replace(BY_NAME["t5-1.1"].config, tie_embeddings=False))
    bundle = Bundle(catalog.family("t5"), case.config, case.build())
    export_folder(bundle, tmp_path / "ours")
    compare(bundle.model, transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval(), case)
    assert import_folder(tmp_path / "ours").config == case.config


def test_reading_weights_twice_gives_the_same(tmp_path: Path):
    case = BY_NAME["gpt2"]
    case.build_twin().save_pretrained(tmp_path)
    table = catalog.family("gpt2").hf[0]
    once, again = (read_weights(table, case.config, read_folder(tmp_path), "x") for _ in range(2))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)

