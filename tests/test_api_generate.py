"""Beams, n-gram blocking and going beyond the context, from Python and from the command line, on tiny bundles that were saved and loaded."""
from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

import hanok
from hanok.bundle.bundle import save_bundle
from hanok.cli.main import main
from hanok.errors import RequestError
from hanok.generate.beam import search
from hanok.generate.search import greedy, source_of
from hanok.models.bert import BertConfig
from hanok.models.gpt import GPTConfig
from hanok.models.t5 import T5Config
from tiny import bundle, prose, tokenizer

T5 = T5Config(400, 32, 2, 2, 4, 8, 64, max_seq_len=40, tie_embeddings=False, scale_head=False)
PROMPT = "the house"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {
        "llama": bundle(), "gpt2": bundle(GPTConfig(300, 32, 2, 4, 64, 64), "gpt2"), "sampled": bundle(temperature=0.9, repetition_penalty=1.3),
        "t5": bundle(T5, "t5", words=tokenizer("unigram", 400), start_ids=(3,), add_special=True),
        "chat": bundle(template="{% for m in messages %}{{ m['content'] }} {% endfor %}"),
        "bert": bundle(BertConfig(200, 32, 2, 4, 64, 24), "bert", words=tokenizer("wordpiece", 200)),
    }
    folder = tmp_path_factory.mktemp("bundles")
    return {name: save_bundle(made[name], folder / name) for name in made}


@pytest.fixture(scope="module")
def models(folders) -> dict[str, hanok.LoadedModel]:
    return {name: hanok.load(folder) for name, folder in folders.items()}


def refused(act) -> str:
    with pytest.raises(RequestError) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


# ---- from Python

@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_n_best_answers_come_best_first_with_their_scores(models, name):
    m = models[name]
    found = search(m.bundle.model, m.request(PROMPT, n_beams=4, n=3, max_new_tokens=6), 6)
    (answers,) = m.generate_many([PROMPT], n=3, n_beams=4, max_new_tokens=6)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in found]
    assert [answer.score for answer in answers] == pytest.approx([answer.score for answer in found], abs=1e-4)
    assert len({answer.token_ids for answer in answers}) == 3 and answers[0].score > answers[1].score > answers[2].score
    assert [answer.text for answer in answers] == [m.tokenizer.decode(answer.token_ids) for answer in answers]
    assert m.generate(PROMPT, n_beams=4, max_new_tokens=6) == answers[0]
    assert [chunk.score for chunk in m.stream(PROMPT, n_beams=4, max_new_tokens=6)] == [answers[0].score]
    assert m.generate_many([PROMPT, "a"], n=3, n_beams=4, max_new_tokens=6)[0] == answers
    assert m.generate(PROMPT, n_beams=4, max_new_tokens=6, length_penalty=0.0).score == pytest.approx(6 * answers[0].score, rel=1e-5)
    assert m.generate(PROMPT, max_new_tokens=6).score is None
    size = m.config.vocab_size
    assert len(m.generate_many([PROMPT], n=size + 9, n_beams=size + 9, max_new_tokens=1)[0]) == size     # no more exist


def test_beams_draw_nothing(models):
    """A bundle's own temperature is for drawing; one that is asked for together with beams is a mistake. Penalties hold."""
    m = models["sampled"]
    assert m.generate(PROMPT, n_beams=3, max_new_tokens=5, seed=1) == m.generate(PROMPT, n_beams=3, max_new_tokens=5, seed=2)
    request = m.request(PROMPT, n_beams=3)
    assert (request.sampling.temperature, request.sampling.repetition_penalty, m.request(PROMPT, n_beams=1).sampling.temperature) == (0.0, 1.3, 0.9)
    assert "temperature is 0.7 with 3 beams" in refused(lambda: m.generate(PROMPT, n_beams=3, temperature=0.7))
    for options, told in (({"n_beams": 0}, "n_beams is 0"), ({"n_beams": "3"}, "n_beams is '3'; expected a whole number"),
                          ({"length_penalty": float("nan"), "n_beams": 2}, "length_penalty is nan"),
                          ({"length_penalty": 2.0}, "of which there are none"), ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2"),
                          ({"beams": 3}, "unknown option 'beams'; did you mean 'n_beams'?")):
        assert told in refused(lambda options=options: m.generate(PROMPT, **options))
        assert told in refused(lambda options=options: m.stream(PROMPT, **options))
    assert "n is 4 and n_beams 3" in refused(lambda: m.generate_many([PROMPT], n=4, n_beams=3))


def test_beams_are_cut_at_a_stop_string(models):
    m = models["llama"]
    whole = m.generate(PROMPT, n_beams=3, max_new_tokens=12)
    stop = whole.text[3:5]
    cut = m.generate(PROMPT, n_beams=3, max_new_tokens=12, stop=stop)
    assert (cut.text, cut.finish_reason, cut.score) == (whole.text[:whole.text.index(stop)], "stop", whole.score)
    assert cut.token_ids == whole.token_ids[:len(cut.token_ids)]


def test_no_ngram_twice(models):
    for options in ({}, {"n_beams": 3}, {"temperature": 1.0}):
        m = models["llama"]
        answer = m.generate("ab ab ab", no_repeat_ngram_size=2, max_new_tokens=40, **options)
        written = [*m.tokenizer.encode("ab ab ab"), *answer.token_ids]
        begin = len(written) - len(answer.token_ids) - 1
        pairs = list(zip(written, written[1:]))
        assert not [pair for at, pair in enumerate(pairs) if at >= begin and pair in pairs[:at]] and len(answer.token_ids) == 40


def test_going_beyond_the_context(models):
    m, prompt = models["llama"], prose(60)
    ids = m.tokenizer.encode(prompt)
    assert len(ids) > 64
    assert "the model's context 64" in refused(lambda: m.generate(prompt))
    with torch.no_grad():
        expected = greedy(m.bundle.model, [ids], 5)[0][-5:]
    assert m.generate(prompt, beyond_context=True, max_new_tokens=5).token_ids == tuple(expected)
    assert len(m.generate(PROMPT, beyond_context=True, max_new_tokens=80).token_ids) == 80
    t5 = models["t5"]
    source = t5.tokenizer.encode(prompt, add_special=True)
    with torch.no_grad():
        expected = greedy(t5.bundle.model, [[3]], 50, source_of([source]))[0][1:]
    assert len(source) > 40 and t5.generate(prompt, beyond_context=True, max_new_tokens=50).token_ids == tuple(expected)
    assert "beyond the 64 positions that this model learned" in refused(lambda: models["gpt2"].generate(PROMPT, beyond_context=True))


# ---- from the command line

@pytest.fixture
def shell(folders, capsys):
    """shell(bundle, *options) -> (status, stdout, lines of stderr)."""
    def run(name, *options):
        try:
            main(["generate", str(folders[name]), "--prompt", PROMPT, *map(str, options)])
            status = 0
        except SystemExit as left:
            status = left.code
        told = capsys.readouterr()
        return status, told.out, told.err.splitlines()
    return run


def test_beams_on_the_command_line(shell, models):
    (answers,) = models["llama"].generate_many([PROMPT], n=2, n_beams=3, max_new_tokens=6, length_penalty=0.5, no_repeat_ngram_size=2)
    how = ("--beams", 3, "--max-new-tokens", 6, "--length-penalty", 0.5, "--no-repeat-ngram", 2)
    status, out, err = shell("llama", *how, "-n", 2)
    assert (status, out) == (0, "\n\n".join(f"[{i + 1}] (score {answer.score:.4f}) {answer.text}" for i, answer in enumerate(answers)) + "\n")
    status, out, err = shell("llama", *how)
    assert (status, out) == (0, answers[0].text + "\n") and err[0].endswith(f"finish reason: length (score {answers[0].score:.4f})")
    told = json.loads(shell("llama", *how, "-n", 2, "--json")[1])["answers"]
    assert [answer["score"] for answer in told] == pytest.approx([answer.score for answer in answers], abs=1e-5)
    assert json.loads(shell("llama", "--max-new-tokens", 2, "--json")[1])["answers"][0]["score"] is None


def test_the_last_line_says_what_ended_an_answer(shell, models):
    assert shell("llama", "--max-new-tokens", 4)[2][0].endswith("finish reason: length")
    assert shell("llama", "--max-new-tokens", 99)[2][0].endswith("finish reason: length (the context of 64 tokens is full; --beyond-context goes on)")
    assert shell("gpt2", "--max-new-tokens", 99)[2][0].endswith("finish reason: length (the context of 64 tokens is full)")
    left = 64 - len(models["llama"].tokenizer.encode(PROMPT))
    assert shell("llama", "--max-new-tokens", left)[2][0].endswith("finish reason: length")
    first = models["llama"].generate(PROMPT, max_new_tokens=9).text
    assert shell("llama", "--max-new-tokens", 99, "--stop", first[3:5])[2][0].endswith("finish reason: stop")


@pytest.mark.parametrize("more", [(), ("-n", 2, "--temperature", 1), ("--beams", 2), ("--json",)], ids=str)
def test_going_on_is_told_once_and_only_where_it_may_happen(shell, more):
    warning = "going past the 64 tokens that it was trained for; quality may fall"
    status, out, err = shell("llama", "--max-new-tokens", 70, "--beyond-context", *more)
    assert status == 0 and err.count(warning) == 1 and err[0] == warning
    if not more:
        assert err[1].startswith("70 tokens, ") and err[1].endswith("finish reason: length")
    assert warning not in shell("llama", "--max-new-tokens", 4, "--beyond-context", *more)[2]
    assert warning not in shell("llama", "--max-new-tokens", 70, *more)[2]


def test_a_chat_may_go_on_and_says_so_once(folders, capsys, monkeypatch):
    for options, expected in ((["--beyond-context"], ["going past the 64 tokens that it was trained for; quality may fall", "(length)", "(length)"]),
                              ([], ["(length)", "hanok: the prompt has "])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one house\nand another\n"))
        with contextlib.suppress(SystemExit):
            main(["chat", str(folders["chat"]), "--max-new-tokens", "80", *options])
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("next: ")]
        assert len(lines) == len(expected) and all(line.startswith(start) for line, start in zip(lines, expected))


@pytest.mark.parametrize(("name", "options", "told"), [
    ("gpt2", ("--beyond-context",), "hanok: the prompt's 4 and 128 new tokens are beyond the 64 positions that this model learned"),
    ("bert", ("--beyond-context",), "it does not write; use embed"), ("bert", (), "it does not write; use embed"),
    ("llama", ("--beams", 0), "hanok: n_beams is 0"), ("llama", ("--beams", 2, "-n", 3), "hanok: n is 3 and n_beams 2"),
    ("llama", ("--beams", 2, "--temperature", 0.5), "hanok: temperature is 0.5 with 2 beams"),
    ("llama", ("--beams", 2, "--length-penalty", "inf"), "hanok: length_penalty is inf"),
    ("llama", ("--length-penalty", 2), "hanok: a length penalty was given, and it scores beams, of which there are none; ask for 2 beams or more"),
    ("llama", ("--no-repeat-ngram", -1), "hanok: no_repeat_ngram_size is -1"),
    ("llama", ("--beyond-context", "--max-new-tokens", 10 ** 14), "does not fit into memory")], ids=str)
def test_mistakes_are_one_line(shell, name, options, told):
    status, out, err = shell(name, *options)
    assert status == 2 and out == "" and told in err[-1] and len(err) == 1 + ("memory" in told)


def test_a_model_laid_out_for_many_rows_writes_the_same(models, tmp_path):
    path = save_bundle(models["llama"].bundle, tmp_path / "bundle")
    one, many = (hanok.load(path, rows=rows).generate_many([PROMPT, "b"], n=2, max_new_tokens=8) for rows in (1, 16))
    assert one == many
    with pytest.raises(RequestError, match="rows is 0; expected 1 or more"):
        hanok.load(path, rows=0)
