"""The suite made from held-out text: fair, reproducible, and about the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pretrain.evaluation.evaluate import evaluate_model
from pretrain.evaluation.held_out import Document, read_documents
from pretrain.evaluation.own_suite import CHANCE, MOST_QUESTIONS, questions
from pretrain.evaluation.settings import Settings
from tests.pretrain.evaluation.stubs import BigramModel, ByteTokenizer

_NOUNS = ["river", "garden", "letter", "window", "kitchen", "mountain"]
_NOUNS += ["village", "captain", "teacher", "forest", "bridge", "market"]
_VERBS = ["crossed", "watched", "painted", "followed", "remembered", "described", "visited"]


def prose(seed: int, sentences: int = 60) -> str:
    """Plausible sentences in paragraphs of six, some ending with a noun that came before."""
    choose = random.Random(seed)
    made = []
    for _ in range(sentences):
        one, two, three = choose.sample(_NOUNS, 3)
        made.append(f"The old {one} near the {two} {choose.choice(_VERBS)} every quiet {three} beside that {one}.")
    return "\n\n".join(" ".join(made[i : i + 6]) for i in range(0, sentences, 6))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [prose(seed) for seed in range(6)]


def test_questions_depend_on_the_documents_alone(texts):
    assert questions(texts) == questions(texts[::-1]) == questions(texts + texts[:2])
    assert questions(texts) != questions(texts[:-1])


def test_every_question_is_about_its_text(texts):
    made = questions(texts)
    together = " ".join(" ".join(text.split()) for text in texts)
    assert all(made[name] for name in CHANCE)
    for record in made["own_last_word"]:
        passage = f"{record['context']} {record['target']}"
        assert passage in together
        assert record["target"] in record["context"]
    for record in made["own_continuation"]:
        assert f"{record['context']} {record['choices'][record['gold']]}" in together
        assert len(set(record["choices"])) == 4
    for record in made["own_word_order"]:
        assert record["good"] in together and record["bad"] not in together
        assert sorted(record["good"].split()) == sorted(record["bad"].split())
        assert sum(a != b for a, b in zip(record["good"].split(), record["bad"].split())) == 2


def test_no_document_crowds_out_the_others_and_no_answer_its_place(texts):
    long = [prose(100, 6000), *texts]
    made = questions(long)
    assert all(len(records) <= MOST_QUESTIONS for records in made.values())
    for text in texts:
        flat = " ".join(text.split())
        assert any(record["good"] in flat for record in made["own_word_order"])
    places = [record["gold"] for record in made["own_continuation"]]
    assert all(0.15 < places.count(place) / len(places) < 0.35 for place in range(4))


def test_code_tables_and_scraps_make_no_questions():
    text = (
        "def f(x):\n    return x\n\n>>> f(1)\n1\n\n=== ====\na   b\n\nshort line\n\n| a | b | c | d | e | f | g | h |"
    )
    assert not any(questions([text]).values())


def test_it_runs_through_the_harness_and_says_what_it_could_not_ask(texts):
    documents = [Document(text, "") for text in texts]
    result = evaluate_model(
        BigramModel(context_length=512), ByteTokenizer(), ["own"], settings=Settings(limit=10), documents=documents
    )["own"]
    assert list(result["tasks"]) == ["own", *CHANCE]
    assert result["tasks"]["own"]["n"] == 30
    assert result["primary"]["chance"] == pytest.approx(0.25)
    mean = sum(result["tasks"][name]["metrics"]["acc"] for name in CHANCE) / 3
    assert result["primary"]["value"] == pytest.approx(mean)
    poor = evaluate_model(BigramModel(), ByteTokenizer(), ["own"], documents=[Document("Too short for it.", "")])["own"]
    assert [entry["task"] for entry in poor["skipped"]] == list(CHANCE) and poor["primary"] is None


def test_real_text_gives_a_full_suite(shared_data: Path):
    documents = read_documents([shared_data / "valid/wikipedia.jsonl.zst"], 10**7)[0]
    made = questions(document.text for document in documents)
    assert {name: len(records) for name, records in made.items()} == dict.fromkeys(CHANCE, MOST_QUESTIONS)
