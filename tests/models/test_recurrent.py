"""The recurrent and convolutional families against their papers: what a whole model says, in plain loops over the equations; and what each sees."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hanok.bundle.bundle import Bundle, empty_model, load_bundle, save_bundle
from hanok.contracts import Batch
from hanok.errors import ConfigError, RequestError
from hanok.models import catalog
from hanok.nn.lower import StreamLinear, lower
from repeatable import close
from zoo import BY_NAME, D, V

pytestmark = pytest.mark.usefixtures("repeatable")


def source_of(*lengths):
    return Batch(torch.randint(3, V, (len(lengths), max(lengths))), keep=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def both(token_ids, source):
    return Batch(token_ids, source_ids=source.token_ids, source_keep=source.keep)


@pytest.mark.parametrize(("name", "theirs", "n_layers"), [("rnn", nn.RNN, 2), ("rnn-tied", nn.RNN, 1), ("lstm", nn.LSTM, 2), ("gru", nn.GRU, 2)])
def test_a_language_model_is_torchs_layers_between_an_embedding_and_a_head(name, theirs, n_layers):
    model = BY_NAME[name].build()
    bare = theirs(D, D, n_layers, batch_first=True)
    bare.load_state_dict(model.layers.state_dict())
    ids = torch.randint(V, (3, 9))
    close(model(Batch(ids)), bare(model.embed.token(ids))[0] @ model.head.weight.t() + model.head.bias)
    assert (model.head.weight is model.embed.token.weight) == BY_NAME[name].config.tie_embeddings


@pytest.mark.parametrize("name", ["rnn-encoder-decoder", "gru-encoder-decoder"])
def test_an_encoders_last_state_is_all_that_the_decoder_learns(name):
    model, source, ids = BY_NAME[name].build(), source_of(6, 2), torch.randint(V, (2, 5))
    got = model(both(ids, source))
    for b, n in enumerate((6, 2)):
        _, last = nn.RNNBase.__call__(model.encoder.layers, model.encoder.embed.token(source.token_ids[b:b + 1, :n]))
        out, _ = model.layers(model.embed.token(ids[b:b + 1]), last)
        close(got[b], model.head(out[0]))
    state = model.start(source, 2, 9)
    assert state.source is None and state.cells[0].shape[-1] == D


def test_bahdanaus_equations():
    """arXiv:1409.0473, A.2: one word at a time, one row at a time."""
    model, source, ids = BY_NAME["bahdanau"].build(), source_of(6, 2), torch.randint(V, (2, 5))
    got, n = model(both(ids, source)), BY_NAME["bahdanau"].config.d_hidden
    packed = pack_padded_sequence(model.encoder.embed.token(source.token_ids), torch.tensor([6, 2]), batch_first=True)
    annotations, _ = pad_packed_sequence(model.encoder.layers(packed)[0], batch_first=True)
    align, cell = model.alignment, model.cell.h_proj
    for b, length in enumerate((6, 2)):
        memory = annotations[b, :length]
        s = torch.tanh(model.bridge(memory[0, n:]))                                   # of the backward direction at the first word
        for t in range(5):
            e = torch.stack([align.v.weight[0] @ torch.tanh(align.q_proj.weight @ s + align.k_proj.weight @ h) for h in memory])
            c = (e.exp() / e.exp().sum()) @ memory
            y = model.embed.token(ids[b, t])
            said = (model.readout.weight @ torch.cat([s, y, c]) + model.readout.bias).tolist()
            maxout = torch.tensor([max(said[2 * j], said[2 * j + 1]) for j in range(len(said) // 2)])
            close(got[b, t], model.head(maxout))
            gates, own = model.token_gates(y) + model.context_gates.weight @ c, cell.weight @ s + cell.bias
            r, z = torch.sigmoid(gates[:n] + own[:n]), torch.sigmoid(gates[n:2 * n] + own[n:2 * n])
            s = z * s + (1 - z) * torch.tanh(gates[2 * n:] + r * own[2 * n:])


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_luongs_equations(score):
    """arXiv:1508.04025, eq. 5 to 8, with input feeding (3.3): one word at a time, one row at a time."""
    model, source, ids = BY_NAME[f"luong-{score}"].build(), source_of(6, 2), torch.randint(V, (2, 5))
    got, align = model(both(ids, source)), model.alignment
    for b, length in enumerate((6, 2)):
        memory, (h, c) = model.encoder.layers(model.encoder.embed.token(source.token_ids[b:b + 1, :length]))
        memory, h, c, fed = memory[0], list(h[:, 0]), list(c[:, 0]), torch.zeros(D)
        for t in range(5):
            enters = torch.cat([model.embed.token(ids[b, t]), fed])
            for i, cell in enumerate(model.cells):
                weight = torch.cat([model.token_gates.weight, model.gates[0].weight], 1) if i == 0 else model.gates[i].weight
                bias = model.token_gates.bias if i == 0 else model.gates[i].bias
                enter, forget, new, leave = (weight @ enters + bias + cell.h_proj(h[i])).chunk(4)
                c[i] = torch.sigmoid(forget) * c[i] + torch.sigmoid(enter) * torch.tanh(new)
                h[i] = enters = torch.sigmoid(leave) * torch.tanh(c[i])
            match score:
                case "dot":
                    scores = memory @ h[-1]
                case "general":
                    scores = torch.stack([h[-1] @ align.k_proj.weight @ m for m in memory])
                case "concat":
                    scores = torch.stack([align.v.weight[0] @ torch.tanh(align.q_proj.weight @ h[-1] + align.k_proj.weight @ m) for m in memory])
            context = (scores.exp() / scores.exp().sum()) @ memory
            fed = torch.tanh(model.combine.weight @ torch.cat([context, h[-1]]))
            close(got[b, t], model.head(fed))


def test_a_score_is_picked_when_the_model_is_built():
    kinds = {score: type(BY_NAME[f"luong-{score}"].build().alignment).__name__ for score in ("dot", "general", "concat")}
    assert kinds == {"dot": "DotAlignment", "general": "GeneralAlignment", "concat": "ConcatAlignment"}


SEQ2SEQ = ["rnn-encoder-decoder", "bahdanau", "luong-general"]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_without_a_source_there_is_nothing_to_answer(name):
    model = BY_NAME[name].build()
    for ask in (lambda: model(Batch(torch.zeros(1, 2, dtype=torch.long))), lambda: model.start(None, 1, 4)):
        with pytest.raises(RequestError, match="give source_ids"):
            ask()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_answers_of_several_sources_do_not_share_a_row(name):
    model, ids = BY_NAME[name].build(), torch.randint(V, (1, 4))
    with pytest.raises(RequestError, match="a row of its own") as refused:
        model.hidden(replace(both(ids, source_of(3)), document_ids=torch.tensor([[0, 0, 1, 1]])))
    assert refused.value.kind == "unsupported"


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_what_stands_in_a_sources_pads_is_never_read(name):
    model, source, ids = BY_NAME[name].build(), source_of(6, 2), torch.randint(V, (2, 4))
    other = replace(source, token_ids=torch.where(source.keep, source.token_ids, 1))
    assert torch.equal(model(both(ids, source)), model(both(ids, other)))


def test_a_cnn_is_short_of_sight_and_a_gru_is_not():
    for name, seen in (("cnn", 10), ("gru", 30)):                                     # 3 layers, 4 tokens each: 3 x 3 + 1
        model, ids = BY_NAME[name].build(), torch.randint(V, (1, 30))
        expected = model(Batch(ids))[0, -1]
        near, far = ids.clone(), ids.clone()
        near[0, -seen] = (near[0, -seen] + 1) % V
        far[0, :-seen] = (far[0, :-seen] + 1) % V
        assert not torch.equal(model(Batch(near))[0, -1], expected)
        assert torch.equal(model(Batch(far))[0, -1], expected)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "cnn", "rnn-encoder-decoder", "bahdanau", "luong-general"])
def test_the_published_sizes_can_be_built(name):
    family = catalog.FAMILIES[BY_NAME[name].family]
    assert len(family.presets) >= 2 and family.presets["tiny"].vocab_size == 4096
    for config in family.presets.values():
        model = empty_model(family, config)
        assert sum(p.numel() for p in model.parameters()) > 500_000
        assert model.head.weight.shape == (config.vocab_size, config.d_model)


def test_what_the_papers_say_of_their_sizes():
    def millions(family, preset):
        return round(sum(p.numel() for p in empty_model(catalog.family(family), catalog.preset(family, preset)).parameters()) / 1e6)

    assert millions("lstm", "zaremba-medium") == 20 and millions("lstm", "zaremba-large") == 66
    with pytest.raises(ConfigError, match="n_layers is 0"):
        replace(catalog.preset("gru", "tiny"), n_layers=0)


@pytest.mark.parametrize("name", ["lstm", "gru-encoder-decoder", "bahdanau", "luong-concat"])
def test_a_bundle_decodes_and_trains_with_the_weights_it_holds(name, tmp_path):
    """torch.nn's recurrent layers keep a list of their weights beside them; it must not be of those that the model was built with."""
    case = BY_NAME[name]
    before = case.build()
    after = load_bundle(save_bundle(Bundle(catalog.FAMILIES[case.family], case.config, before), tmp_path / "out")).model
    source, ids = source_of(4, 3) if case.reads_source else None, torch.randint(V, (2, 5))
    for model in (after, lower(after)):
        mine, theirs = model.start(source, 2, 5), before.start(source, 2, 5)
        close(model.step(ids, mine), before.step(ids, theirs))
    with torch.enable_grad():
        batch = Batch(ids) if source is None else both(ids, source)
        after.train()(batch).sum().backward()
    assert all(p.grad is not None for p in after.parameters())
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(2.0)
    assert not torch.equal(after.eval()(batch), before(batch))
    close(lower(after)(batch), after(batch), 1e-4)


@pytest.mark.parametrize("name", ["bahdanau", "luong-general", "cnn"])
def test_what_loops_in_python_is_lowered_to_the_streaming_kernel(name):
    plain, low = BY_NAME[name].build(), lower(BY_NAME[name].build())
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    assert linears and sum(isinstance(module, StreamLinear) for module in low.modules()) == len(linears)


@pytest.mark.parametrize("name", ["lstm", "cnn", "rnn-encoder-decoder", "bahdanau", "luong-dot"])
def test_dropout_acts_in_training_only(name):
    case = replace(BY_NAME[name], config=replace(BY_NAME[name].config, dropout=0.5))
    model, ids = case.build(), torch.randint(V, (2, 5))
    batch = both(ids, source_of(4, 3)) if case.reads_source else Batch(ids)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def test_a_gru_learns_what_only_its_first_token_tells():
    """20 tokens back: beyond what a convolution of this size sees, so that it cannot learn it."""
    found = {}
    ids = torch.randint(3, V, (32, 20))
    ids[:, 0] = torch.arange(32) % 2
    for name in ("gru", "cnn"):
        torch.manual_seed(0)
        model = catalog.FAMILIES[name].build(replace(BY_NAME[name].config, dropout=0.0)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        ids[:, 1:] = 5
        for _ in range(60):
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(model(Batch(ids))[:, -1], ids[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[name] = loss.item()
    assert found["gru"] < 0.1 and found["cnn"] > 0.6
