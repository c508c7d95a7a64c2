"""What the probe sees equals what `transformers` gives out, and an alignment's own equations; the model does not notice that it is looked at.

B batch, T query positions, S source positions, L layers, H heads.
"""
from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from hanok.bundle.imports import import_folder
from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.nn.lower import lower
from hanok.nn.recurrent import Alignment
from hanok.probe import Probe, probe
from threads import one_thread
from zoo import BY_NAME, CASES, H, L, V

__all__ = ["one_thread"]
LENGTHS, SOURCE_LENGTHS = (6, 9, 2), (7, 3, 5)
BLIND = ["rnn", "lstm", "gru", "cnn", "rnn-encoder-decoder", "gru-encoder-decoder"]
ALIGNED = [case.name for case in CASES if case.family in ("bahdanau", "luong")]
SEEING = [case for case in CASES if case.name not in ALIGNED and case.family not in ("rnn", "lstm", "gru", "cnn", "rnn_encoder_decoder")]


def batch_of(case, padded: bool = True) -> Batch:
    torch.manual_seed(5)
    token_ids = torch.randint(3, V - 2, (3, 9))
    keep = torch.arange(9) < torch.tensor(LENGTHS)[:, None] if padded else None
    if not case.reads_source:
        return Batch(token_ids, keep=keep)
    source_keep = torch.arange(7) < torch.tensor(SOURCE_LENGTHS)[:, None] if padded else None
    return Batch(token_ids, keep=keep, source_ids=torch.randint(3, V - 2, (3, 7)), source_keep=source_keep)


def equal(got, expected, n_layers, tolerance=1e-6):
    """Row by row, pads left out of who looks; theirs may be None where a decoder has no such layers."""
    assert len(got) == len(expected) == n_layers
    for ours, theirs in zip(got, expected):
        assert ours.shape == theirs.shape
        for b, n in enumerate(LENGTHS):
            assert (ours[b, ..., :n, :] - theirs[b, ..., :n, :]).abs().max() <= tolerance


# ---- Hugging Face
@pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=lambda case: case.name)
def test_weights_and_hidden_vectors_equal_theirs(case, tmp_path):
    theirs = case.build_twin()
    theirs.save_pretrained(tmp_path / "theirs")
    model, batch = import_folder(tmp_path / "theirs").model, batch_of(case)
    theirs.set_attn_implementation("eager")
    if case.family == "t5":                                                           # in fp32 its unscaled scores round by more than 1e-6
        model, theirs = model.double(), theirs.double()
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    seen = probe(model, batch)
    with torch.no_grad():
        if not case.reads_source:
            told = theirs(input_ids=batch.token_ids, attention_mask=batch.keep.long(), **kwargs)
            equal(seen.self_attention, told.attentions, L)
            hidden, n_layers = told.hidden_states, L
            assert seen.encoder_attention == seen.cross_attention == []
        else:
            told = theirs(input_ids=batch.source_ids, attention_mask=batch.source_keep.long(), decoder_input_ids=batch.token_ids, **kwargs)
            equal(seen.self_attention, told.decoder_attentions, 2)
            equal(seen.cross_attention, told.cross_attentions, 2)
            hidden, n_layers = told.decoder_hidden_states, 2
            for ours, other in zip(seen.encoder_attention, told.encoder_attentions, strict=True):
                for b, n in enumerate(SOURCE_LENGTHS):
                    assert (ours[b, :, :n] - other[b, :, :n]).abs().max() <= 1e-6
        last = model.stack.final_norm(seen.hidden[-1])                                # theirs is normed already where a model norms at its end
    scale = max(1.0, max(layer.abs().max().item() for layer in hidden))
    equal([*seen.hidden[:-1], last], hidden, n_layers + 1, 1e-6 * scale)


# ---- what holds of all weights
@pytest.mark.parametrize("case", SEEING, ids=lambda case: case.name)
def test_rows_sum_to_one_and_pads_and_the_future_get_nothing(case):
    model, batch = case.build(), batch_of(case)
    seen = probe(model, batch)
    for layer in (*seen.self_attention, *seen.encoder_attention, *seen.cross_attention):
        assert torch.allclose(layer.sum(-1), torch.ones(layer.shape[:-1]), atol=1e-5) and layer.shape[:2] == (3, H)
    for layer in seen.cross_attention + seen.encoder_attention:
        assert all(layer[b, ..., n:].eq(0).all() for b, n in enumerate(SOURCE_LENGTHS))
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for layer in seen.self_attention:
        if case.generates:
            assert layer[..., future].eq(0).all()
        else:
            assert all(layer[b, ..., n:].eq(0).all() for b, n in enumerate(LENGTHS)) and layer[..., future].ne(0).any()


def test_a_window_is_seen():
    seen = probe(BY_NAME["mistral"].build(), batch_of(BY_NAME["mistral"]))
    far = torch.ones(9, 9, dtype=torch.bool).tril(-5)
    assert all(layer[..., far].eq(0).all() and layer[..., 8, 4].ne(0).all() for layer in seen.self_attention)


def test_lists_are_told_by_where_a_layer_sits():
    case = BY_NAME["t5-1.0"]
    seen = probe(case.build(), batch_of(case))
    assert [len(part) for part in (seen.encoder_attention, seen.self_attention, seen.cross_attention, seen.hidden)] == [L, 2, 2, 3]
    assert seen.encoder_attention[0].shape == (3, H, 7, 7) and seen.cross_attention[0].shape == (3, H, 9, 7)


# ---- alignments
@pytest.mark.parametrize("name", ALIGNED)
def test_an_alignment_is_one_layer_of_one_head(name):
    """Its weights, times the memory, are the contexts that the model itself worked out at every position."""
    case = BY_NAME[name]
    model, batch = case.build(), batch_of(case)
    [alignment] = [module for module in model.modules() if isinstance(module, Alignment)]
    contexts, memories = [], []

    def keep_apart(module, args, context):
        contexts.append(context)
        memories.append(args[2])

    hook = alignment.register_forward_hook(keep_apart)
    with torch.no_grad():
        seen = probe(model, batch)
    hook.remove()
    [weights] = seen.cross_attention
    assert weights.shape == (3, 1, 9, 7) and seen.self_attention == seen.encoder_attention == []
    assert torch.allclose(weights.sum(-1), torch.ones(3, 1, 9), atol=1e-5)
    assert all(weights[b, ..., n:].eq(0).all() for b, n in enumerate(SOURCE_LENGTHS))
    assert torch.allclose(weights[:, 0] @ memories[0], torch.stack(contexts, 1), atol=1e-5)
    assert not torch.allclose(weights[:, :, 0], weights[:, :, 5])                     # it looks elsewhere at another position
    assert torch.equal(seen.hidden[-1], model.hidden(batch))


# ---- it leaves no trace
@pytest.mark.parametrize("name", ["qwen3", "bert", "t5-1.1", "bahdanau"])
def test_the_model_does_not_notice(name):
    case = BY_NAME[name]
    model, batch = case.build(), batch_of(case)
    before, attributes = model(batch), {id(module): dict(vars(module)) for module in model.modules()}
    probe(model, batch)
    assert torch.equal(model(batch), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert vars(module).keys() == attributes[id(module)].keys()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_gone_when_the_forward_raises():
    model = BY_NAME["llama"].build()
    with pytest.raises(IndexError):
        probe(model, Batch(torch.full((1, 3), V)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_seen_carries_gradients_and_a_probe_is_frozen():
    seen = probe(BY_NAME["gpt2"].build(), batch_of(BY_NAME["gpt2"]))
    assert isinstance(seen, Probe) and not any(t.requires_grad for t in (*seen.self_attention, *seen.hidden))
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.hidden = []


def test_a_model_in_training_is_read_as_it_is():
    """Weights before dropout, and the mode stays."""
    case = BY_NAME["gpt2"]
    model = case.build().train()
    seen = probe(model, batch_of(case))
    assert model.training and torch.allclose(seen.self_attention[0].sum(-1), torch.ones(3, H, 9), atol=1e-5)


# ---- what has no attention
@pytest.mark.parametrize("name", BLIND)
def test_a_model_without_attention_says_what_can_be_looked_at(name):
    case = BY_NAME[name]
    model = case.build()
    with pytest.raises(RequestError, match="has no attention.*model.hidden.*m.next_tokens") as told:
        probe(model, batch_of(case))
    assert told.value.kind == "unsupported" and "\n" not in str(told.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_lowered_model_points_to_the_plain_one():
    case = BY_NAME["llama"]
    plain = case.build()
    with pytest.raises(RequestError, match="probe the plain one, m.bundle.model"):
        probe(lower(copy.deepcopy(plain)), batch_of(case))
