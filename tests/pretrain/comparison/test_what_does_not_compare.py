"""What a report must not rank: numbers that are none, ties, figures of different texts, text that was cut or lost."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pretrain.cli.main import main
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.report.build import print_results, write_report
from pretrain.comparison.report.findings import findings
from pretrain.comparison.report.results import Results, read_results
from tests.pretrain.comparison.synthetic import experiment, write_run

ARMS = ("vanilla", "recursive", "mor")


def write_runs(root: Path, losses: tuple[float, ...] = (4.02, 4.11, 4.06)) -> None:
    for arm, loss in zip(ARMS, losses):
        write_run(root / arm, arm, final_loss=loss)


def change(file: Path, how: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def make_infinite(run: Path) -> None:
    """As the trainer and `mor eval` leave a network whose weights are not finite."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in lines[len(lines) // 2 :]:
        for name in ("loss", "lm_loss", "loss_causal", "loss_topk", "grad_norm"):
            if name in record:
                record[name] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for suite in ("perplexity", "routing", "blimp"):

        def forget(content: Any, suite: str = suite) -> None:
            task = content["tasks"][suite]
            task["metrics"] = dict.fromkeys(task["metrics"])
            task["stderr"] = dict.fromkeys(task["stderr"])
            task["not_finite"] = task["n"]

        change(run / "evaluation" / f"{suite}.json", forget)


def written(made: Experiment) -> tuple[Results, str, str, list[dict[str, str]]]:
    """What was read, the page, the Markdown, and the rows of the spreadsheet."""
    results = read_results(made)
    index = write_report(results, "recipes/small.yaml")
    page, markdown, rows = (
        (index.with_name(name)).read_text(encoding="utf-8") for name in ("index.html", "report.md", "report.csv")
    )
    return results, page, markdown, list(csv.DictReader(io.StringIO(rows)))


def table(markdown: str, title: str) -> dict[str, list[str]]:
    """The rows of a table, by their first cell."""
    lines = markdown.split(f"**{title}")[1].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines if "---" not in line]
    return {row[0]: row[1:] for row in rows}


def terminal(results: Results) -> str:
    stream = io.StringIO()
    print_results(results, Console(file=stream, width=200))
    return stream.getvalue()


def test_an_arm_without_numbers_wins_nothing_and_is_no_silent_finish(tmp_path: Path) -> None:
    write_runs(tmp_path)
    make_infinite(tmp_path / "mor")
    results, page, markdown, rows = written(experiment(tmp_path))
    assert [problem.split(": ")[0] for problem in results.problems] == ["mor"]
    assert "training loss that is not finite" in results.problems[0]
    assert "training loss that is not finite" in page and "training loss that is not finite" in terminal(results)
    test = table(markdown, "Held-out test text")
    assert test["mor"][:5] == ["not finite"] * 5 and test["vanilla"][0].startswith("**4.02")
    accuracy = table(markdown, "Accuracy in per cent")["BLiMP"]
    assert accuracy[5] == "not finite" and accuracy[3] != "not finite"
    assert "not finite" in table(markdown, "Loss by routing")["mor"][0]
    text = " ".join(findings(results))
    assert "mor and vanilla are not compared: a loss of mor is not finite" in text
    assert "mor is not finite: its loss at the end of training (mor)" in text and "BLiMP (6700 of its examples)" in text
    assert not re.search(r"mor is \d", text) and "recursive is 0.090 nats per token worse" in text
    values = [row["value"] for row in rows if row["arm"] == "mor" and row["quantity"] == "perplexity/loss"]
    assert len(values) == 1 and math.isnan(float(values[0]))


def test_one_seed_without_numbers_is_not_averaged_away(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        suffix = "" if seed == 1 else f"-seed{seed}"
        for arm in ("vanilla", "mor"):
            write_run(tmp_path / f"{arm}{suffix}", arm, seed=seed, final_loss=4.0 + 0.01 * seed)
    make_infinite(tmp_path / "mor-seed2")
    results, _, markdown, _ = written(experiment(tmp_path, arms={"vanilla": {}, "mor": {}}, seeds=[1, 2, 3]))
    assert table(markdown, "Held-out test text")["mor"][0] == "not finite"
    text = " ".join(findings(results))
    assert "mor and vanilla are not compared" in text and "(mor-seed2)" in text


def test_exact_ties_share_the_win_and_the_headline_says_so(tmp_path: Path) -> None:
    write_runs(tmp_path, (4.02, 4.02, 4.06))
    results, _, markdown, _ = written(experiment(tmp_path))
    test = table(markdown, "Held-out test text")
    assert test["vanilla"][0].startswith("**") and test["recursive"][0].startswith("**")
    assert not test["mor"][0].startswith("**")
    text = " ".join(findings(results))
    assert "recursive and vanilla have exactly the same loss on the held-out test text" in text
    assert "neither is better" in text and "recursive is 0.000" not in text


@pytest.mark.parametrize("field", ["text_sha256", "text_bytes"])
def test_figures_of_different_text_are_no_table(tmp_path: Path, field: str) -> None:
    write_runs(tmp_path)
    other = {"text_sha256": "b" * 64, "text_bytes": 5_997}
    file = tmp_path / "mor" / "evaluation" / "perplexity.json"
    change(file, lambda content: content["tasks"]["perplexity"].update({field: other[field]}))
    change(tmp_path / "vanilla" / "evaluation" / "blimp.json", lambda content: content["tasks"]["blimp"].update(n=20))
    results, _, markdown, _ = written(experiment(tmp_path))
    assert "**Held-out test text" not in markdown and "**Loss by routing" in markdown
    text = " ".join(findings(results))
    assert "Held-out test text: not compared, because the arms read different text (vanilla, recursive read" in text
    assert f"mor read {'5,997' if field == 'text_bytes' else '90,000'} bytes" in text and "mor compare run" in text
    assert "BLiMP: not compared" in text and "BLiMP" not in table(markdown, "Accuracy in per cent")
    assert "mor is 0.040" in text and "on the validation text" in text  # which both read alike
    assert "not compared" in terminal(results) and "4.06" not in terminal(results)


def write_seeds(root: Path, arm: str, losses: dict[int, float]) -> None:
    for seed, loss in losses.items():
        write_run(root / (arm if seed == 1 else f"{arm}-seed{seed}"), arm, seed=seed, final_loss=loss)


def test_arms_of_different_seeds_are_compared_on_those_they_share(tmp_path: Path) -> None:
    write_seeds(tmp_path, "vanilla", {1: 4.01, 2: 4.02})
    write_seeds(tmp_path, "mor", {2: 4.02, 3: 4.03})
    results, page, markdown, _ = written(experiment(tmp_path, arms={"vanilla": {}, "mor": {}}, seeds=[1, 2, 3]))
    text = " ".join(findings(results))
    assert "mor and vanilla have exactly the same loss" in text
    assert "did not finish with the same seeds (vanilla: 1, 2; mor: 2, 3)" in text and "one seed per arm" not in text
    assert not any("**" in value for row in table(markdown, "Held-out test text").values() for value in row)
    (tmp_path / "mor-seed3" / "status.json").unlink()
    results, page, markdown, _ = written(results.experiment)
    assert "one seed per arm" not in " ".join(findings(results)) and "1 to 2 seeds per arm" in page
    assert table(markdown, "Held-out test text")["mor"][0] == "4.0200 ± 0.0110"
    assert "deviation over seeds, for an arm of one seed the standard error over the documents" in markdown


def test_validation_losses_that_were_not_recorded_are_missing(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_seeds(tmp_path, "vanilla", {seed: 4.0})
        write_seeds(tmp_path, "mor", {seed: 4.1})
    for run, lost in (("mor", "loss_topk"), ("mor-seed2", "loss_causal")):
        file = tmp_path / run / "metrics.jsonl"
        file.write_text(re.sub(rf'"{lost}": [^,]*, ', "", file.read_text()))
    _, _, markdown, _ = written(experiment(tmp_path, arms={"vanilla": {}, "mor": {}}, seeds=[1, 2]))
    after = table(markdown, "The same runs after")
    assert "±" in after["vanilla"][0] and after["mor"][0] != "–" and "±" not in after["mor"][0]


def test_a_cost_that_was_not_recorded_is_not_called_equal(tmp_path: Path) -> None:
    write_runs(tmp_path)
    file = tmp_path / "mor" / "metrics.jsonl"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if '"train"' not in line))
    text = " ".join(findings(read_results(experiment(tmp_path))))
    assert re.search(r"mor .*at a cost that was not recorded", text) and "FLOPs agree" not in text


def test_a_difference_that_is_small_and_clear_has_a_size(tmp_path: Path) -> None:
    for arm, gap in (("vanilla", 0.0), ("mor", 0.0002)):
        write_run(tmp_path / arm, arm)
        documents = {"nats": [400 + 100 * gap + gap * (number % 7) for number in range(50)], "tokens": [100] * 50}
        file = tmp_path / arm / "evaluation" / "perplexity.json"
        change(file, lambda content, kept=documents: content["tasks"]["perplexity"].update(documents=kept))
    text = " ".join(findings(read_results(experiment(tmp_path, arms={"vanilla": {}, "mor": {}}))))
    assert "mor is 0.000206 nats per token worse" in text and "95 % interval +0.000205 to" in text


def test_losses_at_other_budgets_are_compared_seed_by_seed(tmp_path: Path) -> None:
    for arm, gap in (("vanilla", 0.0), ("mor", 0.1)):
        for seed in (1, 2, 3):
            trunk = tmp_path / (arm if seed == 1 else f"{arm}-seed{seed}")
            write_run(trunk, arm, seed=seed)
            loss = 4 + 0.5 * seed + gap * (0.9 + 0.1 * (seed % 2))
            write_run(trunk / "branches" / "1e14", arm, budget=1e14, seed=seed, final_loss=loss)
    (tmp_path / "mor-seed3" / "branches" / "1e14" / "status.json").unlink()
    made = experiment(tmp_path, arms={"vanilla": {}, "mor": {}}, seeds=[1, 2, 3], budgets=[1e14, 1.2e14])
    results, _, markdown, _ = written(made)
    text = " ".join(findings(results))
    assert "against vanilla, in nats per token: +0.095 (95 % interval +0.031 to +0.159, over seeds) at 1.00" in text
    for seed in ("mor", "mor-seed2"):
        file = tmp_path / seed / "branches" / "1e14" / "metrics.jsonl"
        file.write_text(file.read_text().replace('"tokens_evaluated": 16384', '"tokens_evaluated": 4096'))
    results, _, markdown, _ = written(made)
    text = " ".join(findings(results))
    assert "Validation text: not compared" in text and "Remove the run folders of one side" in text
    assert "against vanilla, in nats per token" not in text and "Loss at every budget" not in markdown


def test_validation_losses_of_different_data_are_not_compared(tmp_path: Path) -> None:
    """Of a data set that was prepared anew between two arms."""
    for arm in ARMS:
        write_run(tmp_path / arm, arm, evaluate=False)
    change(tmp_path / "mor" / "plan.json", lambda plan: plan.update(data_manifest="e" * 16))
    text = " ".join(findings(read_results(experiment(tmp_path))))
    assert "Validation text: not compared" in text and "mor and vanilla have no loss in common" in text


def test_validation_losses_of_different_text_are_no_table(tmp_path: Path) -> None:
    for arm in ARMS:
        write_run(tmp_path / arm, arm, evaluate=False)
    metrics = tmp_path / "mor" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens_evaluated": 16384', '"tokens_evaluated": 4096'))
    results, page, markdown, _ = written(experiment(tmp_path))
    text = " ".join(findings(results))
    assert "Validation text: not compared" in text and "mor read docs: 4 096 tokens" in text
    assert "mor and vanilla have no loss in common to compare" in text
    assert "Loss against training FLOPs" not in page and table(markdown, "Loss by routing")["mor"][0] == "–"


def test_results_from_before_texts_were_recorded_are_compared(tmp_path: Path) -> None:
    write_runs(tmp_path)
    for arm in ARMS:

        def forget(content: Any) -> None:
            for name in ("not_finite", "lost_bytes", "scored_bytes", "text_bytes", "text_sha256"):
                del content["tasks"]["perplexity"][name]

        change(tmp_path / arm / "evaluation" / "perplexity.json", forget)
    results, _, markdown, _ = written(experiment(tmp_path))
    assert table(markdown, "Held-out test text")["vanilla"][0].startswith("**4.02")
    assert "recursive is 0.090 nats per token worse" in " ".join(findings(results))
    assert "do not depend on the tokenizer" not in markdown  # of which nothing was recorded


def test_text_that_the_tokens_do_not_hold_is_shown_beside_the_figures(tmp_path: Path) -> None:
    write_runs(tmp_path)
    assert "bits per byte do not depend on the tokenizer" in written(experiment(tmp_path))[2]
    for arm in ARMS:

        def lose(content: Any) -> None:
            task = content["tasks"]["perplexity"]
            task["lost_bytes"] = 27_000
            task["metrics"] |= dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"))

        change(tmp_path / arm / "evaluation" / "perplexity.json", lose)
    results, page, markdown, _ = written(experiment(tmp_path))
    assert table(markdown, "Held-out test text")["mor"] == [
        *table(markdown, "Held-out test text")["mor"][:2], "–", "–", "–", "30.00 %", "causal"
    ]  # fmt: skip
    assert "do not depend on the tokenizer" not in page
    assert "The tokens of mor do not hold all bytes (30.00 % of Held-out test text)" in " ".join(findings(results))
    assert "not finite" not in " ".join(findings(results))


def test_prompts_that_were_cut_are_shown_beside_the_figures(tmp_path: Path) -> None:
    write_runs(tmp_path)
    assert "Cut" not in written(experiment(tmp_path))[2]
    file = tmp_path / "mor" / "evaluation" / "hellaswag.json"
    change(file, lambda content: content["tasks"]["hellaswag"].update(prompts_cut=24))
    results, _, markdown, _ = written(experiment(tmp_path))
    rows = table(markdown, "Accuracy in per cent")
    assert rows["HellaSwag"][6] == "0 to 24" and rows["BLiMP"][6] == "0"
    assert "Prompts longer than the context of mor lost their beginning: HellaSwag (24 of 1000)." in findings(results)


HOSTILE = "=[/red]$x_1$<b>|*v*\x1b[31m\u202e\ud800\n# x"


def test_names_from_outside_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    for budget in (1e14, 1.2e14):
        for arm in ("vanilla", "mor"):
            folder = tmp_path / arm if budget == 1.2e14 else tmp_path / arm / "branches" / "1e14"
            write_run(folder, arm, budget=budget)
    task = {"metrics": {"acc": 0.5}, "n": 9, "routing": "causal", "chance": 0.25}
    own = {"suite": "own", "tasks": {"=1+[/x]$y$|": task}, "skipped": [], "primary": None}
    (tmp_path / "mor" / "evaluation" / "own.json").write_text(json.dumps(own))
    broken = tmp_path / "mor-seed2"
    write_run(broken, "mor", state="failed", until=0.5, evaluate=False, reason="=1+[/path]\x1b[2J\ud800 *x*")
    made = experiment(
        tmp_path,
        arms={"vanilla": {}, "mor": {}},
        labels={"vanilla": HOSTILE, "mor": "_hidden $a$ $b_"},
        title=HOSTILE,
        description=HOSTILE,
        budgets=[1e14, 1.2e14],
        seeds=[1, 2],
    )
    results, page, markdown, rows = written(made)
    for text in (page, markdown, terminal(results)):
        assert "\x1b" not in text and "\u202e" not in text and r"\ud800" in text.replace("\\\\", "\\")
    assert "<b>" not in page.split("<h1>")[1].split("</h1>")[0] and "<b>" not in re.sub(r"\\<", "", markdown)
    assert "*x*" not in markdown.replace("\\*x\\*", "") and "\n# x" not in markdown
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)
    legends = [drawing for drawing in re.findall(r"<svg.*?</svg>", page, re.S) if "_hidden $a$ $b_" in drawing]
    assert len(legends) >= 3  # curves, budgets and scores
    assert r"| =1+\[/x\]\$y\$\| |" in markdown
    assert "'=1+[/x]$y$|/acc" in {row["quantity"] for row in rows}
    assert all(not value.startswith(("=", "+", "@")) for row in rows for value in row.values())
    assert "[/path]" in terminal(results)


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
