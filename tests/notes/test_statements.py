"""What the source notes say of the mechanism, each statement as a small calculation. docs/notes.md points here where no verb shows it.

B batch, T positions, D d_model, H heads, K d_head, V vocabulary.
"""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hanok.contracts import Batch, Sampling
from hanok.generate.sampling import candidates
from hanok.models import catalog
from hanok.models.rnn import RNNConfig
from hanok.nn.attention import SelfAttention, attend, attention_weights
from hanok.nn.layers import MLP
from hanok.nn.masks import Causal, frame_of, span_of
from hanok.nn.position import Position
from hanok.nn.recurrent import GRUCell, LSTMCell
from hanok.train.measure import Shape, count_one
from hanok.train.recipe import TrainRecipe
from zoo import BY_NAME, D, H, L, V

T = 7


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def free_frame(*rules):
    return frame_of(Position(), span_of(Batch(torch.zeros(1, T, dtype=torch.long))), rules)


def test_attention_without_positions_does_not_know_order():
    """Shuffling the tokens shuffles the outputs, and changes nothing else: order must be told (positional encoding)."""
    attention, x, order = SelfAttention(D, H), torch.randn(1, T, D), torch.randperm(T)
    assert torch.allclose(attention(x[:, order], free_frame()), attention(x, free_frame())[:, order], atol=1e-6)
    told = BY_NAME["transformer"].build().encoder
    ids = torch.randperm(V)[:T][None]
    assert not torch.allclose(told.hidden(Batch(ids[:, order])), told.hidden(Batch(ids))[:, order], atol=1e-2)


def test_an_output_is_the_weighted_mean_of_the_values():
    q, k, v = torch.randn(3, 1, H, T, 8).unbind()
    weights = attention_weights(q, k)
    assert torch.allclose(weights.sum(-1), torch.ones(1, H, T))
    assert (weights >= 0).all()
    by_hand = sum(weights[..., s, None] * v[..., None, s, :] for s in range(T))
    assert torch.allclose(attend(q, k, v), by_hand, atol=1e-6)


def test_each_vector_is_multiplied_by_three_learned_matrices():
    attention, x = SelfAttention(D, H), torch.randn(1, T, D)
    q, (k, v) = attention.queries(x), attention.keys_values(x)
    for got, layer in ((q, attention.q_proj), (k, attention.k_proj), (v, attention.v_proj)):
        assert torch.allclose(attention.split(x @ layer.weight.T + layer.bias), got, atol=1e-6)
    attention(x, free_frame()).square().sum().backward()
    assert all(layer.weight.grad.norm() > 0 for layer in (attention.q_proj, attention.k_proj, attention.v_proj))


def test_scores_grow_with_the_width_and_scaling_stops_it():
    """The variance of q.k is d_k; divided by sqrt(d_k) it is 1. Unscaled, the softmax of a wide head lets hardly any gradient through."""
    def gradient(scale, width=512):
        q, k = torch.randn(2, 1, 256, 16, width).unbind()
        scores = (q @ k.transpose(-1, -2) * scale).requires_grad_()
        chosen, = torch.autograd.grad(scores.softmax(-1).amax(-1).sum(), scores)
        return scores.detach().var().item(), chosen.abs().mean().item()

    (wide, little), (one, much) = gradient(1.0), gradient(512 ** -0.5)
    assert wide == pytest.approx(512, rel=0.1)
    assert one == pytest.approx(1, rel=0.1)
    assert little < 0.3 * much


def test_a_masked_score_is_minus_infinity_and_its_weight_zero():
    q, k = torch.randn(2, 1, H, T, 8).unbind()
    mask = Causal().dense(span_of(Batch(torch.zeros(1, T, dtype=torch.long))))
    weights = attention_weights(q, k, mask)
    assert (weights.triu(1) == 0).all()
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    by_hand = (scores + torch.full((T, T), float("-inf")).triu(1)).softmax(-1)
    assert torch.allclose(weights, by_hand, atol=1e-6)


def test_heads_work_apart_and_are_joined_by_one_matrix():
    attention, x = SelfAttention(D, H), torch.randn(1, T, D)
    q, (k, v) = attention.queries(x), attention.keys_values(x)
    each = [attention_weights(q[:, [h]], k[:, [h]]) @ v[:, [h]] for h in range(H)]
    joined = torch.cat([head.squeeze(1) for head in each], -1)
    assert torch.allclose(attention.out_proj(joined), attention(x, free_frame()), atol=1e-6)
    first, second = (attention_weights(q[:, [h]], k[:, [h]]) for h in (0, 1))
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_feed_forward_net_sees_one_position_at_a_time():
    mlp, x = MLP(D, 4 * D, nn.GELU()), torch.randn(2, T, D)
    assert torch.allclose(torch.cat([mlp(x[:, [t]]) for t in range(T)], 1), mlp(x), atol=1e-6)
    assert not torch.allclose(mlp(x) + mlp(-x), torch.zeros(()), atol=1e-3)              # it is not linear


def test_logits_are_the_output_vector_times_the_embedding_matrix():
    model = BY_NAME["gpt2"].build()
    hidden = model.hidden(Batch(torch.randint(V, (1, T))))
    assert torch.allclose(model.head(hidden), hidden @ model.embed.token.weight.T, atol=1e-5)


def test_sinusoidal_positions_go_past_what_was_trained():
    case = BY_NAME["gpt-relu"]
    model = case.build()
    with torch.no_grad():
        logits = model(Batch(torch.randint(V, (1, case.config.max_seq_len + 9))))
    assert logits.isfinite().all()
    assert model.max_positions is None and BY_NAME["gpt2"].build().max_positions == case.config.max_seq_len


def test_all_positions_are_computed_at_once_and_equal_one_after_the_other():
    model, ids = BY_NAME["llama"].build(), torch.randint(V, (1, T))
    state = model.start(None, 1, T)
    one_by_one = torch.cat([model.step(ids[:, [t]], state) for t in range(T)], 1)
    assert torch.allclose(model.hidden(Batch(ids)), one_by_one, atol=1e-4)


def test_bert_sees_both_sides_and_gpt_only_the_left():
    ids = torch.randint(V, (1, T))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % V
    for name, moves in (("bert-mlm", True), ("gpt2", False)):
        model = BY_NAME[name].build()
        before, after = (model.hidden(Batch(x))[:, 0] for x in (ids, changed))
        assert torch.equal(before, after) != moves


def test_temperature_flattens_and_sharpens():
    logits = torch.randn(50) * 3

    def entropy(temperature):
        p, _ = candidates(logits, Sampling(temperature=temperature))
        return -(p * p.clamp(min=1e-30).log2()).sum().item()

    cold, one, hot = map(entropy, (0.2, 1.0, 2.0))
    assert cold < one < hot < math.log2(50)
    assert torch.allclose(candidates(logits, Sampling(temperature=1.0))[0], logits.softmax(-1), atol=1e-6)


def test_bert_is_an_encoder_t5_both_and_gpt_a_decoder():
    kinds = {name: catalog.family(name).kind for name in ("bert", "t5", "transformer", "gpt", "gpt2")}
    assert kinds == {"bert": "encoder", "t5": "encoder-decoder", "transformer": "encoder-decoder", "gpt": "decoder", "gpt2": "decoder"}
    for name in ("relu", "gelu"):
        built = catalog.family("gpt").build(replace(BY_NAME["gpt-relu"].config, activation=name))
        block = built.stack.blocks[0]
        assert block.cross is None and isinstance(block.ffn.activation, nn.ReLU if name == "relu" else nn.GELU)


def test_a_transformer_has_feed_forward_nets_of_two_layers_and_no_recurrence():
    for name in ("transformer", "gpt-relu"):
        model = BY_NAME[name].build()
        assert not [module for module in model.modules() if isinstance(module, nn.RNNBase | GRUCell | LSTMCell)]
        nets = [module for module in model.modules() if isinstance(module, MLP)]
        assert nets and all([type(part) for part in net.children()] == [nn.Linear, nn.Linear, nn.ReLU] for net in nets)


def test_queries_keys_and_values_come_from_meaning_and_place():
    """The same word at two places asks, answers and says different things; two words at one place do too."""
    model = BY_NAME["gpt2"].build()
    attention = model.stack.blocks[0].attention
    x = model.embed(torch.tensor([[5, 5, 7]]), torch.arange(3)[None])
    for vectors in (attention.queries(x), *attention.keys_values(x)):                 # (1,H,T,K)
        assert not torch.allclose(vectors[:, :, 0], vectors[:, :, 1], atol=1e-3)
    other = model.embed(torch.tensor([[6, 5, 7]]), torch.arange(3)[None])
    assert not torch.allclose(attention.queries(x)[:, :, 0], attention.queries(other)[:, :, 0], atol=1e-3)


def test_a_convolution_sees_as_far_as_its_layers_reach():
    """Each layer adds kernel_size - 1 tokens: a hierarchy, and nothing behind it."""
    model = BY_NAME["cnn"].build()
    reach = L * (BY_NAME["cnn"].config.kernel_size - 1)
    ids = torch.randint(V, (1, reach + 6))
    for far, seen in ((reach, True), (reach + 1, False)):
        changed = ids.clone()
        changed[0, -1 - far] = (ids[0, -1 - far] + 1) % V
        assert torch.equal(model.hidden(Batch(ids))[0, -1], model.hidden(Batch(changed))[0, -1]) != seen


# ---- recurrent networks
def test_an_rnn_decides_from_its_input_and_the_state_before():
    """h_t = tanh(W x_t + U h_(t-1) + b): the same token gives another vector behind another past."""
    model = catalog.family("rnn").build(RNNConfig(V, D, 1, 64)).eval()
    x, layer = torch.randint(V, (1, T)), model.layers
    vectors, h = model.embed(x), torch.zeros(1, D)
    for t, out in enumerate(model.hidden(Batch(x)).unbind(1)):
        h = torch.tanh(vectors[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0)
        assert torch.allclose(out, h, atol=1e-6)
    same = model.hidden(Batch(torch.tensor([[5, 5]])))[0]
    assert not torch.allclose(same[0], same[1], atol=1e-3)


def jacobian(model, distance):
    """How much the last position's vector moves with the embedding of the token `distance` before it, as a norm."""
    seen = []
    handle = model.embed.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    hidden = model.hidden(Batch(torch.randint(V, (1, distance + 1))))[0, -1]
    handle.remove()
    total = 0.0
    for i in range(4):
        total += torch.autograd.grad(hidden[i], seen[0], retain_graph=True)[0][0, 0].square().sum().item()
    return total ** 0.5


def test_what_stood_early_fades_in_a_recurrent_network():
    """The pull of a token on the last vector: in a fresh RNN and LSTM it falls by orders of magnitude with distance, in a Transformer it does not."""
    faded = {}
    for name in ("rnn", "lstm"):
        model = catalog.family(name).build(RNNConfig(V, D, 1, 128)).eval()
        faded[name] = jacobian(model, 64) / jacobian(model, 2)
    model = BY_NAME["llama"].build()
    assert faded["rnn"] < 1e-3 and faded["lstm"] < 1e-2
    assert jacobian(model, 48) / jacobian(model, 2) > 0.03


def test_an_rnn_takes_one_step_after_the_other():
    """A recurrent layer cannot be told a later token's vector without the state that all earlier ones left; attention asks for the tokens alone."""
    rnn, source = BY_NAME["bahdanau"].build(), Batch(torch.randint(V, (1, 5)))
    ids = torch.randint(V, (1, T))
    state, fresh = rnn.start(source, 1, T), rnn.start(source, 1, T)
    rnn.step(ids[:, :-1], state)
    assert not torch.allclose(rnn.step(ids[:, -1:], state), rnn.step(ids[:, -1:], fresh), atol=1e-3)
    q, k, v = torch.randn(3, 1, H, T, 8).unbind()
    assert torch.allclose(attend(q[:, :, -1:], k, v), attend(q, k, v)[:, :, -1:], atol=1e-6)


def test_an_rnns_chain_grows_with_the_text_and_a_transformers_does_not():
    """Kernels that an update starts one after the other, as a plan counts them: all positions of a Transformer are in each of them."""
    def started(name: str, seq_len: int) -> float:
        family = catalog.family(name)
        config = replace(family.presets["tiny"], vocab_size=512, max_seq_len=256)
        return count_one(family, config, TrainRecipe(optimizer="adamw"), Shape(4, seq_len), mixed=False).kernels

    assert started("gpt", 256) == started("gpt", 64)
    for name in ("rnn", "gru"):
        assert started(name, 256) > 3 * started(name, 64)


def test_without_attention_one_vector_holds_the_whole_source():
    """What the decoder is given is as large for 5 tokens as for 50; two sources that leave one state are one source to it."""
    model = BY_NAME["rnn-encoder-decoder"].build()
    short, long = (model.start(Batch(torch.randint(V, (1, n))), 1, 8) for n in (5, 50))
    assert [cell.shape for cell in short.cells] == [cell.shape for cell in long.cells]
    assert short.source is None and long.source is None
    long.cells = short.cells
    ids = torch.randint(V, (1, 4))
    assert torch.equal(model.step(ids, short), model.step(ids, long))


def test_with_attention_each_output_step_weighs_every_source_position():
    for name in ("bahdanau", "luong-general"):
        model, source = BY_NAME[name].build(), Batch(torch.randint(V, (1, 9)))
        seen = []
        handle = model.alignment.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(module.weights(args[0], args[1], args[3])))
        model.hidden(Batch(torch.randint(V, (1, 4)), source_ids=source.token_ids))
        handle.remove()
        weights = torch.stack(seen)                                                   # (T,1,S)
        assert weights.shape == (4, 1, 9) and (weights > 0).all()
        assert torch.allclose(weights.sum(-1), torch.ones(4, 1))
        assert not torch.allclose(weights[0], weights[1], atol=1e-4)                  # every step looks anew
        assert model.start(source, 1, 8).source.memory.size(1) == 9                   # a state for each token, not one for all
