"""m.attention and m.next_tokens on tiny bundles, and a word followed through sentences: equal to the probe and to plain loops, told truly."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import hanok
from hanok.attention_view import MOST_TOKENS, Attention, Words, word_spans
from hanok.contracts import Batch
from hanok.errors import ConfigError, HanokError, RequestError
from hanok.models.bahdanau import BahdanauConfig
from hanok.models.bert import BertConfig
from hanok.models.rnn import RNNConfig
from hanok.models.t5 import T5Config
from hanok.probe import probe
from hanok.word_study import WordStudy, study
from threads import one_thread
from tiny import CONFIG, bundle, prose, tokenizer

__all__ = ["one_thread"]
ONE, OTHER = "the house stands on a stone", "its roof looks at a stone house"


@pytest.fixture(scope="module")
def models() -> dict[str, hanok.LoadedModel]:
    made = {
        "llama": bundle(replace(CONFIG, max_seq_len=2000)), "short": bundle(),
        "bert": bundle(BertConfig(200, 32, 2, 4, 64, 24), "bert", words=tokenizer("wordpiece", 200), add_special=True),
        "t5": bundle(T5Config(400, 32, 2, 2, 4, 8, 64, max_seq_len=40, tie_embeddings=False, scale_head=False), "t5",
                     words=tokenizer("unigram", 400), start_ids=(3,), add_special=True),
        "bahdanau": bundle(BahdanauConfig(400, 32, 24, 40, 1, 40), "bahdanau", words=tokenizer("unigram", 400), start_ids=(3,), add_special=True),
        "lstm": bundle(RNNConfig(300, 32, 2, 64), "lstm"),
    }
    return {name: hanok.LoadedModel(made[name], name) for name in made}


def refused(error: type[HanokError], act) -> str:
    with pytest.raises(error) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


# ---- attention
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_attention_is_the_plain_models_probe(models, name):
    m = models[name]
    seen = m.attention(ONE)
    ids = m.tokenizer.encode(ONE, add_special=name == "bert")
    expected = probe(m.bundle.model, Batch(torch.tensor([ids])))
    assert torch.equal(seen.weights, torch.cat(expected.self_attention)) and torch.equal(seen.hidden, torch.cat(expected.hidden))
    assert seen.is_causal == (name == "llama") and not seen.is_cross and (seen.n_layers, seen.n_heads) == (2, 4)
    assert seen.words == (("[CLS]", *ONE.split(), "[SEP]") if name == "bert" else tuple(ONE.split()))
    assert len(seen.tokens) == len(ids)


@pytest.mark.parametrize("name", ["t5", "bahdanau"])
def test_an_answer_looks_at_its_source(models, name):
    """Row t is the position that says token t: it has read the start and t tokens before."""
    m = models[name]
    ids = list(m.generate(ONE, temperature=0.0, max_new_tokens=32).token_ids)
    seen = m.attention(ONE)
    source = m.tokenizer.encode(ONE, add_special=True)
    expected = probe(m.bundle.model, Batch(torch.tensor([[3, *ids[:-1]]]), source_ids=torch.tensor([source])))
    assert seen.is_cross and not seen.is_causal
    assert torch.allclose(seen.weights, torch.cat(expected.cross_attention), atol=1e-6) and seen.weights.shape[2:] == (len(ids), len(source))
    assert seen.columns.real == ONE.split() and seen.hidden.size(1) == len(ids)
    given = m.attention("the roof", source=ONE)
    assert given.rows.real == ["the", "roof"] and given.columns.words == seen.columns.words
    assert sum(w for _, w in given.of_word("roof")) + given.to_specials("roof") == pytest.approx(1, abs=1e-5)


def test_an_encoder_looks_at_its_source(models):
    """As the whole model's encoder does when it answers."""
    m = models["t5"]
    ids = m.tokenizer.encode(ONE, add_special=True)
    expected = probe(m.bundle.model, Batch(torch.tensor([[3]]), source_ids=torch.tensor([ids])))
    seen = m.attention(ONE, side="source")
    assert torch.equal(seen.weights, torch.cat(expected.encoder_attention)) and not seen.is_causal and not seen.is_cross
    encoder = m.bundle.model.encoder
    assert torch.allclose(encoder.stack.final_norm(seen.hidden[-1]), encoder.hidden(Batch(torch.tensor([ids])))[0], atol=1e-6)
    assert seen.words == (*ONE.split(), "</s>")
    told = study(lambda text: m.attention(text, side="source"), [ONE, OTHER], "stone", ["roof", "rain"])
    assert told.alike is not None and told.sentences[0].meanings.keys() == {"roof", "rain"}


def test_an_answer_looks_at_itself(models):
    """A row for each token that was read, the start before them."""
    m = models["t5"]
    ids, source = m.tokenizer.encode("the old roof", add_special=True), m.tokenizer.encode(ONE, add_special=True)
    expected = probe(m.bundle.model, Batch(torch.tensor([[3, *ids]]), source_ids=torch.tensor([source])))
    seen = m.attention("the old roof", ONE, side="answer")
    assert torch.equal(seen.weights, torch.cat(expected.self_attention)) and torch.equal(seen.hidden, torch.cat(expected.hidden))
    assert seen.is_causal and not seen.is_cross and seen.rows.real == ["the", "old", "roof"] and seen.rows.special[0]
    written = list(m.generate(ONE, temperature=0.0, max_new_tokens=5).token_ids)
    own = m.attention(ONE, side="answer", max_new_tokens=5)
    assert own.weights.shape[2:] == (1 + len(written),) * 2
    told = study(lambda text: m.attention(text, ONE, side="answer"), ["the old roof"], "old").findings()
    assert any("'old' cannot see 'roof'" in line for line in told) and any("gives the same vector" in line for line in told)


def test_an_answer_is_as_long_as_is_asked_for(models):
    m = models["bahdanau"]
    for n in (1, 7):
        assert m.attention(ONE, max_new_tokens=n).weights.size(2) == n
    for n, told in ((257, "max_new_tokens is 257; attention is looked at in 256 tokens at most"), (0, "max_new_tokens 0; expected 1 or more")):
        assert told in refused(RequestError, lambda n=n: m.attention(ONE, max_new_tokens=n))


@pytest.mark.parametrize("name, options, told", [
    ("t5", {"side": "cros"}, "unknown side 'cros'; did you mean 'cross'?"), ("bert", {"side": "source"}, "leave the side out"),
    ("short", {"max_new_tokens": 3}, "it reads one text; leave max_new_tokens out"),
    ("t5", {"side": "source", "source": OTHER}, "the source alone is looked at, and a source and a text were given"),
    ("t5", {"side": "source", "max_new_tokens": 3}, "max_new_tokens was given, and the model need not write"),
    ("t5", {"source": OTHER, "max_new_tokens": 3}, "max_new_tokens was given, and the model need not write"),
    ("bahdanau", {"side": "source"}, "the encoder of bahdanau (bahdanau) has no attention of its own; leave the side out"),
    ("bahdanau", {"side": "answer"}, "the decoder of bahdanau (bahdanau) has no attention of its own; leave the side out"),
], ids=str)
def test_sides_that_cannot_be_looked_at(models, name, options, told):
    assert told in refused(RequestError, lambda: models[name].attention(ONE, **options))


def test_attention_of_what_cannot_be(models):
    m = models["short"]
    assert refused(RequestError, lambda: m.attention(" \n")) == "the text is empty; a few words were expected"
    assert "tokens, the model's context 64; shorten it by at least" in refused(RequestError, lambda: m.attention(prose(80)))
    long = " ".join(["stone"] * 300)
    assert f"attention is looked at in {MOST_TOKENS} at most" in refused(RequestError, lambda: models["llama"].attention(long))
    assert "it reads one text; leave the source out" in refused(RequestError, lambda: m.attention("a", source="b"))
    assert refused(RequestError, lambda: models["t5"].attention("a", source="")).startswith("the source is empty")
    assert "has no attention" in refused(RequestError, lambda: models["lstm"].attention(ONE))
    mute = hanok.LoadedModel(replace(bundle(), tokenizer=None), "mute")
    assert "mute has no tokenizer.json" in refused(ConfigError, lambda: mute.attention("a"))


def test_a_bundle_stays_as_it_was(models):
    m = models["llama"]
    before = m.generate(ONE, max_new_tokens=5)
    m.attention(ONE)
    assert m.generate(ONE, max_new_tokens=5) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in m.bundle.model.modules())


# ---- next tokens
def test_next_tokens_are_the_softmax_of_the_last_logits(models):
    m = models["llama"]
    ids = m.tokenizer.encode("the house")
    with torch.no_grad():
        logits = m.bundle.model(Batch(torch.tensor([ids])))[0, -1].double()
    told = m.next_tokens("the house", (0.5, 1.0, 2.0), top=7)
    assert [spread.temperature for spread in told] == [0.5, 1.0, 2.0]
    for spread in told:
        p = (logits / spread.temperature).softmax(-1)
        assert list(spread.token_ids) == p.topk(7).indices.tolist()
        assert torch.allclose(torch.tensor(spread.probabilities, dtype=torch.float64), p.topk(7).values, atol=1e-5)
        assert spread.entropy == pytest.approx(-sum(x * math.log2(x) for x in p.tolist() if x > 0), abs=1e-4)
        assert spread.rest == pytest.approx(1 - sum(spread.probabilities), abs=1e-9)
    assert told[0].entropy < told[1].entropy < told[2].entropy
    assert told[0].tokens == tuple(m.tokenizer.token_bytes(i).decode("utf-8", "replace") or m.tokenizer.token(i) for i in told[0].token_ids)


def test_greedy_is_no_question(models):
    [greedy] = models["llama"].next_tokens("the house", [0])
    assert greedy.entropy == 0 and greedy.probabilities == (1.0, *[0.0] * 9) and greedy.rest == 0
    assert greedy.token_ids[0] == models["llama"].generate("the house", temperature=0.0, max_new_tokens=1, stop_ids=()).token_ids[0]


def test_what_is_cut_off_has_no_chance(models):
    m = models["llama"]
    [three] = m.next_tokens("the", top_k=3)
    assert [p > 0 for p in three.probabilities] == [True] * 3 + [False] * 7 and sum(three.probabilities) == pytest.approx(1)
    [nucleus], [whole] = m.next_tokens("the", top_p=0.3, top=300), m.next_tokens("the", top=300)
    kept = sum(p > 0 for p in nucleus.probabilities)
    assert sum(whole.probabilities[:kept - 1]) < 0.3 <= sum(whole.probabilities[:kept]) + 1e-6 and whole.rest == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["t5", "bahdanau", "lstm"])
def test_every_generator_expects_something(models, name):
    m = models[name]
    [spread] = m.next_tokens("the house", [0], top=1)
    assert m.generate("the house", temperature=0.0, max_new_tokens=1, stop_ids=()).token_ids == spread.token_ids


def test_what_cannot_be_expected(models):
    m = models["short"]
    assert "is an encoder (bert): it does not say what comes next" in refused(RequestError, lambda: models["bert"].next_tokens("a"))
    assert "the prompt is empty" in refused(RequestError, lambda: m.next_tokens(""))
    assert "the model's context 64; shorten it by at least" in refused(RequestError, lambda: m.next_tokens(prose(80)))
    assert "top is 0; expected 1 token or more" in refused(RequestError, lambda: m.next_tokens("a", top=0))
    assert "no temperature was given" in refused(RequestError, lambda: m.next_tokens("a", []))
    assert "temperature is -1; expected 0 (greedy) or more" in refused(RequestError, lambda: m.next_tokens("a", [-1]))
    assert "top_p is 0.0" in refused(RequestError, lambda: m.next_tokens("a", top_p=0.0))


# ---- a word followed through sentences
def test_a_study_is_cosines_and_weights_by_hand(models):
    m = models["bert"]
    seen = study(m.attention, [ONE, OTHER], "stone", ["roof", "rain"])
    first = seen.sentences[0]
    here, there = m.attention(ONE), m.attention(ONE.replace("stone", "rain"))
    for layer in range(3):
        a, b = here.vectors("stone")[layer].tolist(), there.vectors("rain")[layer].tolist()
        dot, norms = sum(x * y for x, y in zip(a, b)), math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert first.meanings["rain"][layer].item() == pytest.approx(dot / norms, abs=1e-5)
    own = {"the", "stands", "on"}                                                     # what the other sentence has not
    strongest = max(own, key=lambda word: here.between("stone", word).max().item())
    assert first.partner == strongest and first.link == ("stone", strongest) and first.behind == () and first.cut_difference is None
    assert seen.alike is not None and seen.alike.shape == (3,)


def test_a_causal_word_sees_nothing_behind_it_and_does_not_change(models):
    seen = study(models["llama"].attention, [ONE], "house")
    [sentence] = seen.sentences
    assert sentence.behind == ("stands", "on", "a", "stone") and sentence.cut_difference < 1e-5
    assert all(sentence.attention.between("house", other).max() == 0 for other in sentence.behind)
    assert sentence.link[1] == "house" and sentence.link[0] in sentence.behind
    told = " ".join(seen.findings())
    assert f"'house' cannot see '{sentence.link[0]}'" in told and "weight 0 in all 8 heads" in told and "gives the same vector" in told


def made_up(text: str, tie: float, vectors: dict[str, list[float]], words: tuple[str, ...]) -> Attention:
    """A sentence of two heads: the first lets word 1 look at word 2 with `tie`, the second looks at itself; 2-d vectors by word."""
    spans = tuple(word_spans(text))
    n = len(words)
    weights = torch.eye(n).repeat(1, 2, 1, 1).clone()
    weights[0, 0, 1] = 0.0
    weights[0, 0, 1, 2], weights[0, 0, 1, 1] = tie, 1 - tie
    hidden = torch.tensor([[[1.0, 1.0]] * n, [vectors[word] for word in words]])
    gathered = Words(text, words, words, tuple((i,) for i in range(n)), spans, (False,) * n)
    return Attention(gathered, gathered, weights, hidden)


@pytest.mark.parametrize("ties, ending, verdicts", [
    ((0.8, 0.3), [1.0, 0.0], ["Holds on the average", "Holds in the strongest", "Holds behind the last layer"]),
    ((0.2, 0.6), [0.0, 1.0], ["Does not hold on the average", "Does not hold in the strongest", "Does not hold behind the last layer"]),
])
def test_verdicts_follow_the_numbers(ties, ending, verdicts):
    """The first sentence's 'novel' ends at `ending`, the other's between the meanings new (1,0) and fiction (0,1)."""
    def look(text: str) -> Attention:
        words = tuple(text.split())
        first = words[-1] == "idea"
        vectors = {"new": [1.0, 0.0], "fiction": [0.0, 1.0], "novel": ending if first else [1.0, 1.0]}
        return made_up(text, ties[0 if first else 1], {word: vectors.get(word, [1.0, -1.0]) for word in words}, words)

    seen = study(look, ["a novel idea", "one novel book"], "novel", ["new", "fiction"])
    assert [s.partner for s in seen.sentences] == ["idea", "book"]
    told = seen.verdicts()
    assert [line.startswith(verdict) for line, verdict in zip(told, verdicts, strict=True)] == [True] * 3
    assert f"{round(100 * ties[0])}% of its weight against {round(100 * ties[1])}%" in told[1] and "(heads 1.1 and 1.1)" in told[1]
    nearest = "new" if ending[0] else "fiction"
    assert any(f"'novel' ends nearest to '{nearest}'" in line for line in seen.findings())
    assert WordStudy.to_dict(seen)["findings"] == seen.findings()


def test_a_study_refuses_what_it_cannot_compare(models):
    m = models["llama"]
    assert "'roof' is not a word of the text; its words are the, house, stands, on, a, stone" in refused(
        RequestError, lambda: study(m.attention, [ONE], "roof"))
    assert "leaves nothing in the place of 'house'" in refused(RequestError, lambda: study(m.attention, [ONE], "house", [" "]))
    t5 = models["t5"]
    assert "leave meanings out" in refused(RequestError, lambda: study(lambda text: t5.attention(text, ONE), ["the roof"], "roof", ["rain"]))
    crossed = study(lambda text: t5.attention(text, ONE), ["the roof"], "roof")
    assert crossed.sentences[0].partner in ONE.split() and crossed.alike is None and crossed.findings() == []


@pytest.mark.parametrize("name", ["t5", "bahdanau"])
def test_a_word_of_the_source_is_looked_at(models, name):
    m = models[name]
    [sentence] = study(m.attention, [ONE], "Stone").sentences
    seen = m.attention(ONE)
    assert sentence.is_looked_at and sentence.word == "stone" and sentence.text == ONE and sentence.looks() == seen.onto("stone")
    assert sentence.link == (sentence.partner, "stone") and torch.equal(sentence.heads[0], seen.between(sentence.partner, "stone"))
    told = sentence.to_dict()
    assert [look["word"] for look in told["looked_at_by"]] == [word for word, _ in seen.onto("stone")] and "looks_at" not in told
    assert (told["source"], told["answer"]) == (ONE, seen.rows.text)
    message = refused(RequestError, lambda: study(m.attention, [ONE], "roof"))
    assert message == f"'roof' is neither a word of the source ({', '.join(ONE.split())}) nor of the answer ({', '.join(seen.rows.real)})"


def test_a_word_that_both_have_is_that_of_the_text(models):
    m = models["t5"]
    [answer] = study(lambda text: m.attention(text, ONE), ["a stone roof"], "stone").sentences
    assert not answer.is_looked_at and answer.text == "a stone roof" and answer.looks() == m.attention("a stone roof", ONE).of_word("stone")
    [source] = study(lambda text: m.attention("a stone roof", text), [ONE], "stone").sentences
    assert source.is_looked_at and source.text == ONE and {name for name, _ in source.looks()} == {"a", "stone", "roof"}


def test_words_of_two_sources_are_compared(models):
    """One head: 'novel' of each source is looked at by the word of its own answer."""
    answers = {ONE: "the old roof", OTHER: "clouds and rain"}
    m = models["bahdanau"]
    seen = study(lambda text: m.attention(answers[text], text), [ONE, OTHER], "stone")
    [told] = seen.verdicts()
    first, second = seen.sentences
    assert first.partner in answers[ONE].split() and second.partner in answers[OTHER].split()
    assert told.startswith(("Holds in the only head: ", "Does not hold in the only head: ")) and "of their weight against" in told
    assert f"they rank {first.rank(first.partner)} and {second.rank(second.partner)} among" in told
    assert first.rank(first.partner) == [name for name, _ in first.attention.onto("stone")].index(first.partner) + 1


def test_a_word_alone_is_nothing_to_compare(models):
    [alone] = study(models["llama"].attention, ["stone"], "stone").sentences
    assert alone.partner is None and alone.link is None and alone.behind == ()
