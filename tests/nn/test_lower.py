"""A lowered model against the plain one: the same numbers and words from the same memory, and a plain model that never notices."""
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hanok.bundle.weights import assign, parameters, read_safetensors, write_safetensors
from hanok.contracts import Batch, Generator
from hanok.generate.search import greedy, pad_rows
from hanok.nn.attention import SelfAttention
from hanok.nn.layers import GatedMLP
from hanok.nn.loss import token_cross_entropy
from hanok.nn.lower import FusedGatedMLP, FusedSelfAttention, StreamLinear, joined, lower, side_by_side
from hanok.nn.masks import Frame
from zoo import BY_NAME, CASES, D, V

everyone = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
generators = pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=lambda case: case.name)
kernels = pytest.mark.parametrize("one_dnn", [1, 16, 0], ids=["one-dnn", "one-dnn for 16 rows", "torch"])


def lowered(model, one_dnn):
    """`one_dnn`: rows that it is laid out for, or 0 for torch's own kernels."""
    low = lower(model, one_dnn or 1)
    for module in low.modules():
        if isinstance(module, StreamLinear):
            if one_dnn and not module.by_one_dnn:
                pytest.skip("this torch has no oneDNN kernel")
            module.by_one_dnn = bool(one_dnn)
    return low


def ids(*shape):
    return torch.randint(3, V - 2, shape)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@everyone
@kernels
def test_a_forward_is_the_plain_models(case, one_dnn):
    model = case.build()
    low = lowered(model, one_dnn)
    with torch.no_grad():
        for n_rows, length in ((1, 5), (3, 12), (7, 12)):                             # 5, 36 and 84 vectors
            keep = torch.arange(length) < torch.randint(2, length + 1, (n_rows, 1))
            source = {"source_ids": ids(n_rows, 6), "source_keep": torch.arange(6) < torch.randint(1, 7, (n_rows, 1))} if case.reads_source else {}
            batch = Batch(ids(n_rows, length), keep=keep, **source)
            close(low(batch)[keep], model(batch)[keep])
            close(low.head(low.hidden(batch)), low(batch))
        if not case.reads_source:
            packed = Batch(ids(1, 10), positions=torch.tensor([[*range(6), *range(4)]]), document_ids=torch.tensor([[0] * 6 + [1] * 4]))
            close(low(packed), model(packed))


def tour(model, source, more, tokens, forgets):
    """Logits of all that a state can do."""
    state = model.start(source, 3, 20)
    seen = [model.step(tokens[:, :6], state, [6, 2, 4])[1, :2], model.step(tokens[:, 6:7], state), model.step(tokens[:, 7:10], state, [3, 0, 1])[0]]
    picked = state.select([2, 0])
    seen.append(model.step(tokens[:2, 10:11], picked))
    if forgets:
        state.truncate([4, 2, 3])
    mark = state.snapshot()
    seen.append(model.step(tokens[:, 3:5], state))
    state.restore(mark)
    arrival = model.start(more, 1, 30)
    model.step(tokens[:1, :5], arrival)
    both = state.join(arrival)
    seen.append(model.step(tokens[[0, 1, 2, 0], 11:12], both))
    return [model.head(hidden) for hidden in seen], both.lengths


@generators
@kernels
def test_a_state_does_what_it_does_for_the_plain_model(case, one_dnn):
    model = case.build()
    low = lowered(model, one_dnn)
    assert isinstance(low, Generator) and low.reads_source == model.reads_source
    source, more = (Batch(ids(3, 5), keep=torch.arange(5) < torch.tensor([[5], [2], [4]])), Batch(ids(1, 7))) if case.reads_source else (None, None)
    tokens = ids(3, 12)
    with torch.inference_mode():
        (got, lengths), (expected, same) = (tour(either, source, more, tokens, case.forgets) for either in (low, model))
    assert lengths == same == ([5, 3, 4, 6] if case.forgets else [11, 4, 7, 6])
    for one, other in zip(got, expected, strict=True):
        close(one, other)


@generators
def test_greedy_text_is_the_plain_models(case):
    model = case.build()
    torch.manual_seed(3)
    rows = [[0, *ids(n).tolist()] for n in (4, 1, 8)]
    source = Batch(pad_rows([row * 2 for row in rows])[0]) if case.reads_source else None
    with torch.no_grad():
        assert greedy(lower(model), rows, 15, source) == greedy(model, rows, 15, source)


@kernels
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "unbiased"])
def test_the_kernels_take_any_shape(one_dnn, bias):
    torch.manual_seed(0)
    linear = nn.Linear(D, 11, bias)
    low = lowered(linear, one_dnn)
    with torch.no_grad():
        for x in (torch.randn(D), torch.randn(0, D), torch.randn(300, D), torch.randn(2, 3, 5, D),
                  torch.randn(4, 6, D)[:, -1], torch.randn(D, 9).t(), torch.randn(3, 4, D).transpose(0, 1)):
            close(low(x), linear(x))


class Kernels(TorchDispatchMode):
    """The operators that were really called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


@kernels
def test_the_kernel_that_was_found_is_the_one_that_is_called(one_dnn):
    low = lowered(nn.Linear(D, 11), one_dnn)
    with torch.inference_mode(), Kernels() as kernels_:
        low(torch.randn(3, D))
    assert any("_linear_pointwise" in name for name in kernels_.called) == bool(one_dnn)


@pytest.mark.parametrize("norms", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_either_norm_of_queries_and_keys_counts(norms):
    torch.manual_seed(0)
    q_norm, k_norm = (nn.RMSNorm(8) if normed else None for normed in norms)
    attention = SelfAttention(16, 2, q_norm=q_norm, k_norm=k_norm).eval()
    x, frame = torch.randn(2, 4, 16), Frame(None, None, is_causal=True)
    with torch.no_grad():
        close(lower(attention)(x, frame), attention(x, frame))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_keep_torchs_kernels(dtype):
    model = BY_NAME["qwen3"].build().to(dtype)
    low, batch = lower(model), Batch(ids(2, 5))
    assert not any(module.by_one_dnn for module in low.modules() if isinstance(module, StreamLinear))
    with torch.no_grad():
        got, expected = low(batch), model(batch)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, atol=0.3 if dtype == torch.bfloat16 else 1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_norms_as_torch_does(dtype):
    """The sum of a wide vector's squares overflows fp16 and rounds coarsely in bf16."""
    torch.manual_seed(0)
    norm, x = nn.RMSNorm(64, eps=1e-6).to(dtype), (60 * torch.randn(9, 64)).to(dtype)
    with torch.no_grad():
        assert torch.equal(lower(nn.Sequential(norm))(x), norm(x))


@everyone
def test_gradients_need_not_be_switched_off(case):
    """Who calls a lowered model without inference mode gets the same numbers, and no graph."""
    model = case.build()
    low, batch = lower(model), Batch(ids(2, 6), source_ids=ids(2, 5) if case.reads_source else None)
    embedded = []
    low.embed.register_forward_hook(lambda module, args, out: embedded.append((out, out.clone())))
    got = low(batch)
    close(got, model(batch).detach())
    assert not got.requires_grad
    assert all(torch.equal(out, copy) for out, copy in embedded)                      # no layer writes into what another one made


def opened(case, tmp_path):
    """The model as a bundle holds it: its weights are views of one file."""
    model = case.build()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, parameters(model))
    assign(model, read_safetensors(path), "here")
    return model.eval()


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def tensors_of(model):
    """Every tensor that a lowered model holds."""
    streamed = [tensor for module in model.modules() if isinstance(module, StreamLinear) for tensor in (module.weight, module.bias)]
    return [tensor for tensor in streamed if tensor is not None] + list(model.parameters()) + list(model.buffers())


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-1.0", "t5-1.1", "llama-tied"])
def test_a_bundle_without_biases_is_lowered_without_a_copy(name, tmp_path):
    model = opened(BY_NAME[name], tmp_path)
    low = lower(model)
    file = storage(model.embed.token.weight)
    assert {storage(tensor) for tensor in tensors_of(low)} == {file}
    for plain, new in zip(model.stack.blocks, low.stack.blocks):
        attention, fused = plain.attention, new.attention
        assert isinstance(fused, FusedSelfAttention)
        assert fused.qkv.weight.data_ptr() == attention.q_proj.weight.data_ptr()
        assert torch.equal(fused.qkv.weight, torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]))
        assert fused.out_proj.weight.data_ptr() == attention.out_proj.weight.data_ptr()
        if isinstance(plain.ffn, GatedMLP):
            assert isinstance(new.ffn, FusedGatedMLP) and new.ffn.gate_up.weight.data_ptr() == plain.ffn.gate.weight.data_ptr()
            assert torch.equal(new.ffn.gate_up.weight, torch.cat([plain.ffn.gate.weight, plain.ffn.up.weight]))
    plain = model.stack.blocks[0].attention
    with torch.no_grad():
        plain.v_proj.weight.zero_()                                                   # one memory: a change shows through
    n_changed = plain.v_proj.out_features
    qkv = low.stack.blocks[0].attention.qkv.weight
    assert not qkv[-n_changed:].any() and qkv[:-n_changed].all()


@pytest.mark.parametrize("name", ["gpt2", "transformer"])
def test_where_biases_lie_between_only_q_k_and_v_are_copied(name, tmp_path):
    model = opened(BY_NAME[name], tmp_path)
    low, file = lower(model), storage(model.embed.token.weight)
    copied = [tensor for tensor in tensors_of(low) if storage(tensor) != file]
    n_attentions = sum(type(module) is SelfAttention for module in model.modules())
    assert len(copied) == 2 * n_attentions                                            # a matrix and a bias each
    qkv, plain = low.stack.blocks[0].attention.qkv, model.stack.blocks[0].attention
    assert torch.equal(qkv.weight, torch.cat([plain.q_proj.weight, plain.k_proj.weight, plain.v_proj.weight]))
    assert torch.equal(qkv.bias, torch.cat([plain.q_proj.bias, plain.k_proj.bias, plain.v_proj.bias]))


def test_a_model_that_was_built_and_not_opened_shares_what_it_can():
    model = BY_NAME["llama-tied"].build()
    low = lower(model)
    own = {storage(parameter) for parameter in model.parameters()}
    attention = low.stack.blocks[0].attention
    assert storage(attention.qkv.weight) not in own
    assert storage(attention.out_proj.weight) in own
    assert low.embed.token.weight.data_ptr() == low.head.weight.data_ptr() == model.embed.token.weight.data_ptr()


def test_side_by_side_is_exact():
    whole = torch.arange(24.0)
    a, b, c = whole[:8].view(2, 4), whole[8:12].view(1, 4), whole[12:24].view(3, 4)
    seen = side_by_side([a, b, c])
    assert seen.data_ptr() == whole.data_ptr() and torch.equal(seen, whole.view(6, 4))
    assert side_by_side([b, c]).data_ptr() == b.data_ptr()
    for apart in ([a, c], [b, a], [a, a], [a, b.clone()], [a.t(), b.t()], [whole[:8].view(4, 2).t(), b]):
        assert side_by_side(apart) is None
    halves = torch.zeros(8, dtype=torch.bfloat16)
    assert side_by_side([halves[:4].view(1, 4), halves[4:].view(torch.float16).view(1, 4)]) is None
    assert joined([None, None]) is None
    assert torch.equal(joined([a, c]), torch.cat([a, c])) and joined([a, c]).data_ptr() != a.data_ptr()


@everyone
def test_the_plain_model_does_not_notice(case):
    model = case.build().train()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    low = lower(model)
    low.embed.register_forward_hook(lambda *args: None)
    assert not low.training and not any(module.training for module in low.modules())
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == names
    assert not model.embed._forward_hooks                                             # a probe of one is not a probe of the other
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "t5-1.0", "bert-mlm"])
def test_the_plain_model_still_trains(name):
    case = BY_NAME[name]
    torch.manual_seed(0)
    model = case.build().train()
    lower(model)
    batch = Batch(ids(2, 6), source_ids=ids(2, 5) if case.reads_source else None)
    targets = ids(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    for _ in range(3):
        total, _ = token_cross_entropy(model.hidden(batch), targets, model.head)
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(total.item())
    assert losses[2] < losses[1] < losses[0]


def test_dropout_of_the_plain_model_does_not_reach_the_lowered_one():
    model = BY_NAME["bert"].build().train()
    low, batch = lower(model), Batch(ids(2, 6))
    model.train()
    with torch.no_grad():
        assert torch.equal(low(batch), low(batch))
        assert not torch.equal(model(batch), model(batch))
        close(low(batch), model.eval()(batch))


def test_what_is_shared_stays_shared():
    model = BY_NAME["t5-1.0"].build()
    low = lower(model)
    assert low.encoder.embed.token is low.embed.token
    assert low.head.linear.weight.data_ptr() == low.embed.token.weight.data_ptr()
