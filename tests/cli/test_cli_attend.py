"""hanok attend: terminal, picture and JSON of one text, of a word in several sentences, of an answer at its source; mistakes in one line."""
from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CONTEXT, Shell

from hanok.bundle.bundle import save_bundle
from hanok.cli.main import build_app
from hanok.models.bahdanau import BahdanauConfig
from hanok.models.bert import BertConfig
from hanok.models.rnn import RNNConfig
from hanok.models.t5 import T5Config
from tiny import bundle, tokenizer

ONE, OTHER = "the house stands on a stone", "its roof looks at a stone house"
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, an encoder-decoder and a model without attention."""
    folder = tmp_path_factory.mktemp("bundles")
    save_bundle(bundle(BertConfig(200, 32, 2, 4, 64, 24), "bert", words=tokenizer("wordpiece", 200), add_special=True), folder / "bert")
    save_bundle(bundle(T5Config(400, 32, 2, 2, 4, 8, 64, max_seq_len=200, tie_embeddings=False, scale_head=False), "t5",
                       words=tokenizer("unigram", 400), start_ids=(3,), add_special=True), folder / "t5")
    save_bundle(bundle(BahdanauConfig(400, 32, 24, 40, 1, 40), "bahdanau", words=tokenizer("unigram", 400), start_ids=(0,), add_special=True),
                folder / "bahdanau")
    save_bundle(bundle(RNNConfig(300, 32, 2, 64), "lstm"), folder / "lstm")
    return folder


def test_a_text_on_the_terminal(shell: Shell, model: Path):
    ended = shell("attend", model, "--text", "The red house is old.")
    assert ended.status == 0 and ended.lines[0] == "no picture was asked for; --out FILE.png draws one"
    assert "looks most at" in ended.out and "(mean of 2 heads; itself and special tokens left out)" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[2:-2]] == ["The", "red", "house", "is", "old", "."]
    assert ended.next_commands()[0].startswith("hanok attend ")


@pytest.mark.parametrize("more, title", [((), "mean of 8 heads"), (("--layer", 2), "mean of layer 2's 4 heads"),
                                         (("--layer", 2, "--head", 4), "head 2.4")])
def test_a_text_as_a_picture(more: tuple, title: str, shell: Shell, bundles: Path):
    ended = shell("attend", bundles / "bert", "--text", ONE, *more, "--out", "a b.png")
    assert ended.status == 0 and title in ended.out and ended.lines[0] == "the picture is a b.png"
    assert (shell.cwd / "a b.png").read_bytes().startswith(PNG)


def test_a_text_as_json(shell: Shell, bundles: Path):
    told = shell("attend", bundles / "bert", "--text", ONE, "--layer", 1, "--head", 2, "--json").json()
    assert told.keys() == {"bundle", "text", "tokens", "words", "looked_at", "layers", "heads", "layer", "head", "weights", "picture"}
    assert told["words"] == told["looked_at"] == ["[CLS]", *ONE.split(), "[SEP]"] and (told["layers"], told["heads"]) == (2, 4)
    assert [sum(row) for row in told["weights"]] == pytest.approx([1] * 8, abs=1e-4) and told["picture"] is None


def test_a_word_is_followed_through_two_sentences(shell: Shell, bundles: Path):
    how = ("attend", bundles / "bert", "--text", ONE, "--text", OTHER, "--word", "stone", "--meaning", "roof", "--meaning", "rain")
    ended = shell(*how, "--out", "stone.png")
    assert ended.status == 0 and (shell.cwd / "stone.png").read_bytes().startswith(PNG)
    told = shell(*how, "--json").json()
    assert told["word"] == "stone" and [sentence["text"] for sentence in told["sentences"]] == [ONE, OTHER]
    for sentence in told["sentences"]:
        assert sum(look["weight"] for look in sentence["looks_at"]) + sentence["to_special_tokens"] == pytest.approx(1, abs=1e-4)
        assert sentence["meanings"].keys() == {"roof", "rain"} and len(sentence["meanings"]["roof"]) == 3 and len(sentence["link"]["heads"]) == 3
        assert f"heads in which 'stone' looks at '{sentence['link']['at']}' most" in ended.out
    assert all(f"- {line}" in ended.out for line in told["findings"]) and len(told["findings"]) >= 6
    assert ended.out.index("What the numbers say:") > ended.out.index("in its place, cosine behind layer")
    assert "[CLS] [SEP]" in ended.out


def test_what_to_type_next_can_be_typed(shell: Shell, bundles: Path, model: Path, docs):
    app = build_app()
    ends = [shell("attend", bundles / "bert", "--text", ONE), shell("attend", model, "--text", ONE, "--word", "house"),
            shell("next", model, "--prompt", "The"), shell("next", bundles / "lstm", "--prompt", "The")]
    assert "attend" in ends[2].err and "attend" not in ends[3].err               # it would be refused
    assert not [line for ended in ends for line in ended.next_commands() if docs.fault(app, line) is not None]


def test_one_head_of_a_word_is_a_matrix(shell: Shell, bundles: Path):
    ended = shell("attend", bundles / "bert", "--text", ONE, "--word", "stone", "--layer", 2, "--head", 1, "--out", "head.png")
    assert "head 2.1" in ended.out and (shell.cwd / "head.png").read_bytes().startswith(PNG)


def test_a_causal_word_cannot_see_what_is_behind_it(shell: Shell, model: Path):
    ended = shell("attend", model, "--text", "The red house is old.", "--word", "red")
    assert "'red' cannot see '" in ended.out and "weight 0 in all 2 heads" in ended.out and "gives the same vector" in ended.out
    assert "'The' stands first, where a causal model rests what it has no use for" in ended.out


def test_an_answer_looks_at_its_source(shell: Shell, bundles: Path):
    answer = shell("attend", bundles / "t5", "--text", ONE, "--json").json()
    assert answer["looked_at"] == [*ONE.split(), "</s>"] and answer["words"] != answer["looked_at"]
    given = shell("attend", bundles / "t5", "--text", "the roof", "--source", ONE, "--word", "roof", "--out", "roof.png", "--json").json()
    assert {look["word"] for look in given["sentences"][0]["looks_at"]} == set(ONE.split()) and given["picture"] == "roof.png"
    assert (shell.cwd / "roof.png").exists()


def test_a_word_of_the_source_shows_who_looks_at_it(shell: Shell, bundles: Path):
    for name, whose in (("t5", "mean of 8 heads"), ("bahdanau", "the only head")):
        ended = shell("attend", bundles / name, "--text", ONE, "--word", "house", "--out", f"{name}.png")
        assert ended.status == 0 and (shell.cwd / f"{name}.png").read_bytes().startswith(PNG)
        assert ended.out.startswith(f'"{ONE}" → "') and f"'house' is looked at by  weight  {whose}" in ended.out
        assert ended.out.endswith("There is no other sentence to compare it with; --text gives one more.\n") and "1 heads" not in ended.out
        [sentence] = shell("attend", bundles / name, "--text", ONE, "--word", "house", "--json").json()["sentences"]
        assert sentence["looked_at_by"] and sentence["link"]["at"] == "house" and sentence["source"] == ONE
    one = shell("attend", bundles / "bahdanau", "--text", ONE, "--layer", 1, "--out", "a.png")
    assert "(layer 1's only head; special tokens left out)" in one.out and one.out.startswith(f'"{ONE}" → "')
    assert "'book' is neither a word of the source (the, house, stands, on, a, stone) nor of the answer (" in shell.refused(
        "attend", bundles / "t5", "--text", ONE, "--word", "book")


def test_each_side_of_an_encoder_decoder(shell: Shell, bundles: Path):
    how = ("attend", bundles / "t5", "--text", ONE, "--json")
    source = shell(*how, "--side", "source").json()
    assert source["words"] == source["looked_at"] == [*ONE.split(), "</s>"]
    answer = shell(*how, "--side", "answer", "--max-new-tokens", 5).json()
    assert answer["words"] == answer["looked_at"] and len(answer["tokens"]) == 6
    assert shell(*how, "--side", "cross", "--max-new-tokens", 5).json() == shell(*how, "--max-new-tokens", 5).json()
    meant = shell("attend", bundles / "t5", "--text", ONE, "--side", "source", "--word", "stone", "--meaning", "roof", "--out", "stone.png")
    assert meant.status == 0 and "ends with a cosine of 'roof'" in meant.out
    assert "has no attention of its own" in shell.refused("attend", bundles / "bahdanau", "--text", ONE, "--side", "source")


def test_an_answer_that_is_too_long_to_draw_is_told_as_such(shell: Shell, bundles: Path):
    how = ("attend", bundles / "t5", "--out", "a.png")
    assert "the answer has 72 words, and a picture shows 64; let fewer tokens be written" in shell.refused(*how, "--source", ONE, "--text", "a " * 70)
    assert "the source has 72 words" in shell.refused(*how, "--text", "a " * 70, "--max-new-tokens", 3)


def test_what_sees_only_itself_says_so(shell: Shell, model: Path, bundles: Path):
    ended = shell("attend", model, "--text", "The red house")
    assert ended.out.splitlines()[2].split() == ["The", "only", "itself"] and "0.0%" not in ended.out
    first, second = (shell("attend", model, "--text", "The red house", "--word", word, "--out", "w.png") for word in ("The", "red"))
    assert "'The' stands first: it sees only itself\n" in first.out and "rests what it has no use for" not in first.out
    for ended, seen in ((first, ["The"]), (second, ["The", "red"])):
        lines = ended.out.splitlines()
        assert sorted(line.split()[0] for line in lines[3:3 + len(seen)]) == seen and lines[3 + len(seen)].startswith("heads in which")
    answer = shell("attend", bundles / "t5", "--source", ONE, "--text", "the roof", "--side", "answer", "--word", "the")
    assert "'the' stands first: it sees only itself and special tokens" in answer.out


def test_only_pngs_are_written(shell: Shell, model: Path):
    for name in ("notes.txt", "a.pdf"):
        (shell.cwd / name).write_text("mine")
        for how in (("attend", model, "--text", ONE), ("attend", model, "--text", ONE, "--word", "house"), ("next", model, "--prompt", "The")):
            assert shell.refused(*how, "--out", name).endswith(f"{name}: pictures are PNG files; give a name that ends in .png")
    assert "there is no such bundle" not in shell.refused("attend", "nothing", "--text", ONE, "--out", "a.pdf")


@pytest.mark.parametrize("given", ["돌", "a", "한옥은 🏠 돌 위에", "--x", "🏠"])
def test_any_text_is_drawn(given: str, shell: Shell, model: Path):
    assert shell("attend", model, "--text", given, "--out", "a.png").status == 0
    assert shell("attend", model, "--text", given, "--word", given.split()[0].lstrip("-"), "--out", "b.png").status == 0


def test_an_ascii_terminal_gets_what_it_knows(shell: Shell, model: Path):
    assert shell("attend", model, "--text", "한옥은 돌 위에", "--word", "돌", env={"PYTHONIOENCODING": "ascii"}).status == 0


MISTAKES = {
    "an empty text": (("--text", " "), "the text is empty; a few words were expected"),
    "no text": ((), "--text"),
    "a word that is not there": (("--text", ONE, "--word", "book"),
                                 "'book' is not a word of the text; its words are the, house, stands, on, a, stone"),
    "a layer that is not there": (("--text", ONE, "--layer", "9"), "there is no layer 9; this model has 2, counted from 1"),
    "a head that is not there": (("--text", ONE, "--layer", "1", "--head", "0"), "there is no head 0; this model has 4"),
    "a word's head that is not there": (("--text", ONE, "--word", "a", "--layer", "1", "--head", "5", "--out", "x.png"), "there is no head 5"),
    "a head without its layer": (("--text", ONE, "--head", "3"), "--head 3 needs --layer"),
    "two texts and no word": (("--text", ONE, "--text", OTHER), "2 texts were given, and no word to follow; say which with --word"),
    "a meaning and no word": (("--text", ONE, "--meaning", "new"), "--meaning was given, and no word to follow"),
    "a source for an encoder": (("--text", ONE, "--source", OTHER), "it reads one text; leave the source out"),
    "a text beyond the context": (("--text", ONE + " the roof" * 20), "the model's context 24; shorten it by at least"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, shell: Shell, bundles: Path):
    arguments, told = MISTAKES[name]
    assert told in shell.refused("attend", bundles / "bert", *arguments)


def test_models_and_pictures_that_cannot_be(shell: Shell, bundles: Path, model: Path):
    assert "has no attention" in shell.refused("attend", bundles / "lstm", "--text", ONE)
    assert "leave meanings out" in shell.refused("attend", bundles / "t5", "--text", ONE, "--word", "the", "--meaning", "x", "--source", OTHER)
    assert "there is no such bundle" in shell.refused("attend", "nothing", "--text", ONE)
    assert f"the model's context {CONTEXT}" in shell.refused("attend", model, "--text", "The red house. " * 40)
    (shell.cwd / "folder.png").mkdir()
    assert "folder.png: this is a folder" in shell.refused("attend", bundles / "bert", "--text", ONE, "--out", "folder.png")
