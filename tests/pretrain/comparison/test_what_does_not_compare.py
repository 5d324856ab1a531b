"""What a report must not rank: numbers that are none, ties, figures of different texts, text that was cut or lost."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pretrain.cli.main import main
from pretrain.comparison.report.build import write_report
from tests.pretrain.comparison.synthetic import ARMS, change, experiment, report, write_run, write_runs, write_seeds

TWO: dict[str, Any] = {"arms": {"vanilla": {}, "mor": {}}}


def make_infinite(run: Path) -> None:
    """As the trainer and `mor eval` leave a network whose weights are not finite."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines[len(lines) // 2 :]:
        for name in ("loss", "lm_loss", "loss_causal", "loss_topk", "grad_norm"):
            if name in record:
                record[name] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def forget(content: Any) -> None:
        (task,) = content["tasks"].values()
        task |= {"metrics": dict.fromkeys(task["metrics"]), "stderr": dict.fromkeys(task["stderr"])}
        task["not_finite"] = task["n"]

    for suite in ("perplexity", "routing", "blimp"):
        change(run / "evaluation" / f"{suite}.json", forget)


def test_an_arm_without_numbers_wins_nothing_and_is_no_silent_finish(tmp_path: Path) -> None:
    write_runs(tmp_path)
    make_infinite(tmp_path / "mor")
    said = report(experiment(tmp_path))
    (problem,) = said.results.problems
    page = write_report(said.results, "recipes/small.yaml").read_text(encoding="utf-8")
    assert problem.startswith("mor: ") and "training loss that is not finite" in problem
    assert problem in page and problem in said.terminal
    test = said.table("Held-out test text")
    assert test["mor"][:5] == ["not finite"] * 5 and test["vanilla"][0].startswith("**4.02")
    accuracy = said.table("Accuracy in per cent")["BLiMP"]
    assert accuracy[5] == "not finite" and accuracy[3] != "not finite"
    assert "not finite" in said.table("Loss by routing")["mor"][0]
    text = said.text
    assert "mor and vanilla are not compared: a loss of mor is not finite" in text
    assert "mor is not finite: its loss at the end of training (mor)" in text and "BLiMP (6700 of its examples)" in text
    assert not re.search(r"mor is \d", text) and "recursive is 0.090 nats per token worse" in text
    values = [row["value"] for row in said.rows if row["arm"] == "mor" and row["quantity"] == "perplexity/loss"]
    assert len(values) == 1 and math.isnan(float(values[0]))


def test_one_seed_without_numbers_is_not_averaged_away(tmp_path: Path) -> None:
    for arm in ("vanilla", "mor"):
        write_seeds(tmp_path, arm, {seed: 4.0 + 0.01 * seed for seed in (1, 2, 3)})
    make_infinite(tmp_path / "mor-seed2")
    said = report(experiment(tmp_path, **TWO, seeds=[1, 2, 3]))
    assert said.table("Held-out test text")["mor"][0] == "not finite"
    assert "mor and vanilla are not compared" in said.text and "(mor-seed2)" in said.text


@pytest.mark.parametrize("field", ["text_sha256", "text_bytes"])
def test_figures_of_different_text_are_no_table(tmp_path: Path, field: str) -> None:
    write_runs(tmp_path)
    other = {"text_sha256": "b" * 64, "text_bytes": 5_997}
    file = tmp_path / "mor" / "evaluation" / "perplexity.json"
    change(file, lambda content: content["tasks"]["perplexity"].update({field: other[field]}))
    change(tmp_path / "vanilla" / "evaluation" / "blimp.json", lambda content: content["tasks"]["blimp"].update(n=20))
    said = report(experiment(tmp_path))
    assert "**Held-out test text" not in said.markdown and "**Loss by routing" in said.markdown
    text = said.text
    assert "Held-out test text: not compared, because the arms read different text (vanilla, recursive read" in text
    assert f"mor read {'5,997' if field == 'text_bytes' else '90,000'} bytes" in text and "mor compare run" in text
    assert "BLiMP: not compared" in text and "BLiMP" not in said.table("Accuracy in per cent")
    assert "mor is 0.040" in text and "on the validation text" in text  # which both read alike
    assert "not compared" in said.terminal and "4.06" not in said.terminal


def test_arms_of_different_seeds_are_compared_on_those_they_share(tmp_path: Path) -> None:
    write_seeds(tmp_path, "vanilla", {1: 4.01, 2: 4.02})
    write_seeds(tmp_path, "mor", {2: 4.02, 3: 4.03})
    said = report(experiment(tmp_path, **TWO, seeds=[1, 2, 3]))
    assert "mor and vanilla have exactly the same loss" in said.text and "one seed per arm" not in said.text
    assert "did not finish with the same seeds (vanilla: 1, 2; mor: 2, 3)" in said.text
    assert not any("**" in value for row in said.table("Held-out test text").values() for value in row)
    (tmp_path / "mor-seed3" / "status.json").unlink()
    said = report(said.results.experiment)
    assert "one seed per arm" not in said.text and "1 to 2 seeds per arm" in said.markdown
    assert said.table("Held-out test text")["mor"][0] == "4.0200 ± 0.0110"
    assert "deviation over seeds, for an arm of one seed the standard error over the documents" in said.markdown


def test_validation_losses_that_were_not_recorded_are_missing(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_seeds(tmp_path, "vanilla", {seed: 4.0})
        write_seeds(tmp_path, "mor", {seed: 4.1})
    for run, lost in (("mor", "loss_topk"), ("mor-seed2", "loss_causal")):
        file = tmp_path / run / "metrics.jsonl"
        file.write_text(re.sub(rf'"{lost}": [^,]*, ', "", file.read_text()))
    said = report(experiment(tmp_path, **TWO, seeds=[1, 2]))
    after = said.table("The same runs after")
    assert "±" in after["vanilla"][0] and after["mor"][0] != "–" and "±" not in after["mor"][0]


def test_a_cost_that_was_not_recorded_is_not_called_equal(tmp_path: Path) -> None:
    write_runs(tmp_path)
    file = tmp_path / "mor" / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"train"' not in line))
    text = report(experiment(tmp_path)).text
    assert re.search(r"mor .*at a cost that was not recorded", text) and "FLOPs agree" not in text


def test_losses_at_other_budgets_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for arm, gap in (("vanilla", 0.0), ("mor", 0.1)):
        for seed in (1, 2, 3):
            trunk = tmp_path / (arm if seed == 1 else f"{arm}-seed{seed}")
            write_run(trunk, arm, seed=seed)
            loss = 4 + 0.5 * seed + gap * (0.9 + 0.1 * (seed % 2))
            write_run(trunk / "branches" / "1e14", arm, budget=1e14, seed=seed, final_loss=loss)
    (tmp_path / "mor-seed3" / "branches" / "1e14" / "status.json").unlink()
    made = experiment(tmp_path, **TWO, seeds=[1, 2, 3], budgets=[1e14, 1.2e14])
    difference = "+0.095 (95 % interval +0.031 to +0.159, over seeds) at 1.00"
    assert f"against vanilla, in nats per token: {difference}" in report(made).text
    for seed in ("mor", "mor-seed2"):
        file = tmp_path / seed / "branches" / "1e14" / "metrics.jsonl"
        file.write_text(file.read_text().replace('"tokens_evaluated": 16384', '"tokens_evaluated": 4096'))
    said = report(made)
    assert "Validation text: not compared" in said.text and "Remove the run folders of one side" in said.text
    assert "against vanilla, in nats per token" not in said.text and "Loss at every budget" not in said.markdown


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        # A data set that was prepared anew between two arms.
        ("plan.json", "d" * 16, "e" * 16, "manifest eeeeeeeeeeee"),
        ("metrics.jsonl", '"tokens_evaluated": 16384', '"tokens_evaluated": 4096', "mor read docs: 4 096 tokens"),
    ],
)
def test_validation_losses_of_different_text_are_no_table(
    tmp_path: Path, file: str, before: str, after: str, words: str
) -> None:
    write_runs(tmp_path, evaluate=False)
    changed = tmp_path / "mor" / file
    changed.write_text(changed.read_text().replace(before, after))
    said = report(experiment(tmp_path))
    assert "Validation text: not compared" in said.text and words in said.text
    assert "mor and vanilla have no loss in common to compare" in said.text
    assert "Loss against training FLOPs" not in said.markdown and said.table("Loss by routing")["mor"][0] == "–"


def test_results_from_before_texts_were_recorded_are_compared(tmp_path: Path) -> None:
    def forget(content: Any) -> None:
        for name in ("not_finite", "lost_bytes", "scored_bytes", "text_bytes", "text_sha256"):
            del content["tasks"]["perplexity"][name]

    write_runs(tmp_path)
    for arm in ARMS:
        change(tmp_path / arm / "evaluation" / "perplexity.json", forget)
    said = report(experiment(tmp_path))
    assert said.table("Held-out test text")["vanilla"][0].startswith("**4.02")
    assert "recursive is 0.090 nats per token worse" in said.text
    assert "do not depend on the tokenizer" not in said.markdown  # of which nothing was recorded


def test_text_that_was_lost_or_cut_is_shown_beside_the_figures(tmp_path: Path) -> None:
    def lose(content: Any) -> None:
        task = content["tasks"]["perplexity"]
        task["lost_bytes"] = 27_000
        task["metrics"] |= dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"))

    write_runs(tmp_path)
    before = report(experiment(tmp_path)).markdown
    assert "bits per byte do not depend on the tokenizer" in before and "Cut" not in before
    file = tmp_path / "mor" / "evaluation" / "hellaswag.json"
    change(file, lambda content: content["tasks"]["hellaswag"].update(prompts_cut=24))
    for arm in ARMS:
        change(tmp_path / arm / "evaluation" / "perplexity.json", lose)
    said = report(experiment(tmp_path))
    assert said.table("Held-out test text")["mor"][2:] == ["–", "–", "–", "30.00 %", "causal"]
    assert "do not depend on the tokenizer" not in said.markdown
    assert "The tokens of mor do not hold all bytes (30.00 % of Held-out test text)" in said.text
    assert "not finite" not in said.text
    rows = said.table("Accuracy in per cent")
    assert rows["HellaSwag"][6] == "0 to 24" and rows["BLiMP"][6] == "0"
    assert "Prompts longer than the context of mor lost their beginning: HellaSwag (24 of 1000)." in said.text


HOSTILE = "=[/red]$x_1$<b>|*v*\x1b[31m\u202e\ud800\n# x"


def test_names_from_outside_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    for arm in ("vanilla", "mor"):
        write_run(tmp_path / arm, arm)
        write_run(tmp_path / arm / "branches" / "1e14", arm, budget=1e14)
    task = {"metrics": {"acc": 0.5}, "n": 9, "routing": "causal", "chance": 0.25}
    own = {"suite": "own", "tasks": {"=1+[/x]$y$|": task}, "skipped": [], "primary": None}
    (tmp_path / "mor" / "evaluation" / "own.json").write_text(json.dumps(own))
    broken = tmp_path / "mor-seed2"
    write_run(broken, "mor", state="failed", until=0.5, evaluate=False, reason="=1+[/path]\x1b[2J\ud800 *x*")
    made = experiment(
        tmp_path,
        **TWO,
        labels={"vanilla": HOSTILE, "mor": "_hidden $a$ $b_"},
        title=HOSTILE,
        description=HOSTILE,
        budgets=[1e14, 1.2e14],
        seeds=[1, 2],
    )
    said = report(made)
    page = write_report(said.results, "recipes/small.yaml").read_text(encoding="utf-8")
    for text in (page, said.markdown, said.terminal):
        assert "\x1b" not in text and "\u202e" not in text and r"\ud800" in text.replace("\\\\", "\\")
    assert "<b>" not in page.split("<h1>")[1].split("</h1>")[0] and "<b>" not in re.sub(r"\\<", "", said.markdown)
    assert "*x*" not in said.markdown.replace("\\*x\\*", "") and "\n# x" not in said.markdown
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)
    legends = [drawing for drawing in re.findall(r"<svg.*?</svg>", page, re.S) if "_hidden $a$ $b_" in drawing]
    assert len(legends) >= 3  # curves, budgets and scores
    assert r"| =1+\[/x\]\$y\$\| |" in said.markdown
    assert "'=1+[/x]$y$|/acc" in {row["quantity"] for row in said.rows}
    assert all(not value.startswith(("=", "+", "@")) for row in said.rows for value in row.values())
    assert "[/path]" in said.terminal


def test_results_are_printed_where_the_report_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path)
    (tmp_path / "report").write_text("in the way of the folder")
    file = tmp_path / "small.yaml"
    file.write_text(experiment(tmp_path).model_dump_json())
    monkeypatch.setattr(sys, "argv", ["mor", "compare", "report", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "4.06" in shown.out
    assert f"{tmp_path / 'report'}: the report cannot be written" in shown.err and "Traceback" not in shown.err
