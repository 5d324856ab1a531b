"""`mor flops` and `mor generate` as a person runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.tokenizers.loading import load_tokenizer
from mor_model import RecursiveTransformer, load_model, preset, save_weights
from mor_model.generation import generate
from pretrain.cli.generate import _coloured, _legend, spell
from tests.mor_model.run_tokenizers import trained_sentencepiece

TEXT = "the cat sat on the mat and the dog sat on the log; naïve café, 你好 — 12345\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run's weights and tokenizer: bytes and a few merges."""
    folder = tmp_path_factory.mktemp("runs") / "mor"
    config = preset("tiny", "mor", 3, vocab_size=320)
    trained_sentencepiece(
        folder / "tokenizer",
        [TEXT] * 20,
        vocab_size=config.vocab_size,
        character_coverage=0.9995,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        model_type="bpe",
    )
    (folder / "recipe.yaml").write_text("name: test\n")
    model = RecursiveTransformer(config)
    model.initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    save_weights(folder / "weights", model.state_dict(), config)
    return folder


def test_flops_of_a_preset_shows_its_variants_side_by_side(mor):
    shown = mor("flops", "--preset", "360m", "--recursions", "3")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.stdout.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["non-embedding"]] == ["314.64 M", "117.99 M", "117.99 M"]
    assert [cell.strip() for cell in rows["stored layers"]] == ["32", "12", "12"]
    assert [cell.strip() for cell in rows["keys, values (16 bit)"]] == ["40,960 B", "40,960 B", "28,160 B"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flops"], "give either a recipe file or --preset"),
        (["flops", "x.yaml", "--preset", "360m"], "give either a recipe file or --preset"),
        (["flops", "--preset", "36m"], "there is no '36m'; choose one of"),
        (["generate", "no-such-run", "--prompt", "a"], "no such run folder"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(mor, arguments, message):
    failed = mor(*arguments)
    assert failed.returncode == 2 and message in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_generate_prints_plain_text_where_there_is_no_terminal(mor, run):
    prompts = ["the cat", "naïve 你"]
    shown = mor("generate", run, *(f"--prompt={prompt}" for prompt in prompts), "--max-new-tokens", "9")
    assert shown.returncode == 0, shown.stderr
    tokenizer = load_tokenizer(run / "tokenizer")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    found = generate(load_model(run / "weights"), ids, max_new_tokens=9, eos_id=tokenizer.eod_id)
    expected = ""
    for prompt, tokens in zip(ids, found.tokens):
        tokens = [token for token in tokens if token != tokenizer.eod_id]
        expected += tokenizer.decode(prompt + tokens) + "\n"
    assert shown.stdout == expected


def test_generate_never_chooses_an_id_beyond_the_tokenizers(mor, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "padded")
    config = preset("tiny", "mor", 3, vocab_size=384)
    model = RecursiveTransformer(config)
    model.initialize(3)
    size = load_tokenizer(run / "tokenizer").vocab_size
    with torch.no_grad():
        model.head.weight[size:] = 100.0 * model.head.weight[: 384 - size]
    save_weights(folder / "weights", model.state_dict(), config)
    shown = mor("generate", folder, "--prompt", "the cat", "--max-new-tokens", "9")
    assert (shown.returncode, shown.stderr) == (0, "") and shown.stdout.startswith("the cat")


def test_generate_says_what_is_missing(mor, run, tmp_path):
    assert "give a text to continue" in mor("generate", run).stderr
    (tmp_path / "recipe.yaml").write_text("name: test\n")
    unfinished = mor("generate", tmp_path, "--prompt", "a")
    assert unfinished.returncode == 2 and "holds no weights/ yet" in unfinished.stderr
    refused = mor("generate", run, "--prompt", "a", "--device", "nowhere")
    assert refused.returncode == 2 and "cannot be used here" in refused.stderr


def test_characters_split_over_tokens_are_shown_once_and_whole(run):
    tokenizer = load_tokenizer(run / "tokenizer")
    prompt, tokens = tokenizer.encode("the "), tokenizer.encode("猫 sat ☃ on")
    assert tokens != tokenizer.encode("猫 sat ☃ on".encode("ascii", "ignore").decode())
    pieces = spell(tokenizer, prompt, [*tokens, tokenizer.eod_id, 300], [1] * (len(tokens) + 2))
    assert "".join(piece for piece, _ in pieces) == "猫 sat ☃ on"
    assert "猫" in [piece for piece, _ in pieces]


def test_depths_are_shown_in_their_own_colours_with_a_legend():
    text = _coloured("once", [(" upon", 1), (" a", 3), (" time", 1)])
    assert text.plain == "once upon a time"
    styles = [str(span.style) for span in text.spans]
    assert styles[0] == styles[2] != styles[1]
    legend = _legend([1, 3, 1], 3).plain
    assert " 1  67%" in legend and " 2  0%" in legend and "mean 1.67 of 3" in legend
    # What a model makes is no escape of the terminal.
    shown = _coloured("a\x1b[2J", [("\x1b[31mred\n", 1), ("[/bold]", 2)])
    assert shown.plain == "a\\x1b[2J\\x1b[31mred\n[/bold]"
