"""What a report shows of runs whose numbers are known."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from mor_model.presets import preset
from pretrain.comparison.report.build import write_report
from pretrain.comparison.report.tables import skipped_table
from pretrain.comparison.run_records import Curve
from tests.pretrain.comparison import synthetic
from tests.pretrain.comparison.synthetic import Report, change, report, write_run, write_runs, write_seeds

TWO = {"arms": {"vanilla": {}, "mor": {}}}


def experiment(root: Path, **changes):
    return synthetic.experiment(root, **{"labels": {"mor": "MoR, R=3"}, **changes})


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Report:
    root = tmp_path_factory.mktemp("runs")
    write_runs(root)
    return report(experiment(root))


@pytest.fixture(scope="module")
def page(complete) -> str:
    return write_report(complete.results, "recipes/small.yaml").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags, ids, and the text of table rows; complains about tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.ids, self.rows = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_fetches_nothing(page):
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert all(address.startswith("#") for address in parsed.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {address[1:] for address in parsed.addresses} | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(parsed.ids)


def test_each_picture_is_drawn_once_and_scales(page):
    drawings = re.findall(r"<svg[^>]*>", page)
    assert len(drawings) == page.count("<figure>") == 4
    assert all("viewBox" in drawing and not re.search(r" (width|height)=", drawing) for drawing in drawings)
    # They take their colours from the style sheet.
    style, rest = page.split("</style>")
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", rest))
    assert {"--ink", "--rule", "--arm-1", "--arm-2", "--arm-3"} <= used
    assert all(f"{name}:" in style for name in used)
    assert "#a0000" not in rest and "#b0000" not in rest  # no stand-in colour is left


def test_every_number_of_the_runs_is_in_the_spreadsheet(complete):
    found = {(row["arm"], row["quantity"], row["routing"]): row for row in complete.rows}
    assert float(found["mor", "perplexity/loss", "causal"]["value"]) == pytest.approx(4.06)
    assert float(found["mor", "perplexity/loss", "causal"]["stderr"]) == pytest.approx(0.011)
    assert float(found["mor", "perplexity/bits_per_byte", "causal"]["value"]) == pytest.approx(4.06 / 4.2 / math.log(2))
    assert float(found["mor", "validation_loss", "causal"]["value"]) == pytest.approx(4.06, abs=1e-3)
    assert float(found["mor", "validation_loss", "topk"]["value"]) == pytest.approx(4.01, abs=1e-3)
    for arm in synthetic.ARMS:
        plan = json.loads((complete.results.experiment.folder / arm / "plan.json").read_text())
        assert float(found[arm, "training_flops_counted", ""]["value"]) == pytest.approx(plan["training_flops"])
        assert float(found[arm, "tokens", ""]["value"]) == plan["tokens"]
        assert float(found[arm, "parameters_total_stored", ""]["value"]) == plan["parameters"]["total_stored"]
    # Five stored layers in place of eleven.
    layers = {arm: float(found[arm, "parameters_layers", ""]["value"]) for arm in synthetic.ARMS}
    assert layers["recursive"] * 11 == layers["vanilla"] * 5 == layers["mor"] * 11


def test_page_and_markdown_show_the_same_numbers(complete, page):
    parsed = Page()
    parsed.feed(page)
    rows = [[cell.strip() for cell in row] for row in parsed.rows]
    lines = [line for line in complete.markdown.splitlines() if line.startswith("| ") and "---" not in line]
    written = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
    body = [row for row in rows if row[0] in ("vanilla", "recursive", "MoR, R=3")]
    assert len(body) == 18 and all(row in written for row in body)
    assert "2507.10524" not in complete.markdown  # the paper has no network so small


def test_differences_are_said_with_their_uncertainty_and_no_more(complete):
    text = complete.text
    assert (
        "recursive is 0.090 nats per token worse than vanilla on the held-out test text at equal training FLOPs" in text
    )
    half = 1.96 * math.hypot(0.011, 0.011)
    assert f"95 % interval +{0.09 - half:.3f} to +{0.09 + half:.3f}" in text
    assert "MoR, R=3 is 0.040 nats per token worse" in text
    assert "This is one seed per arm" in text
    assert "On ARC-easy no arm can be told from chance" in text
    assert re.search(r"counted training FLOPs agree within 0\.\d\d %", text)


def test_a_difference_within_its_interval_is_not_called_one_and_a_tie_is(tmp_path):
    write_runs(tmp_path, (4.02, 4.03, 4.02))
    said = report(experiment(tmp_path))
    assert "recursive and vanilla cannot be told apart" in said.text and "worse" not in said.text
    assert "MoR, R=3 and vanilla have exactly the same loss on the held-out test text" in said.text
    assert "neither is better" in said.text and "MoR, R=3 is 0.000" not in said.text
    test = said.table("Held-out test text")
    assert {arm: row[0].startswith("**") for arm, row in test.items() if arm != "Arm"} == {
        "vanilla": True,
        "recursive": False,
        "MoR, R=3": True,
    }


def test_documents_in_common_are_compared_one_by_one(tmp_path):
    """Standard errors of 0.011 each would hide a difference of 0.01 that every single document shows."""
    for arm, loss in (("vanilla", 4.02), ("recursive", 4.03), ("mor", 4.0202)):
        file = write_run(tmp_path / arm, arm, final_loss=loss) / "evaluation" / "perplexity.json"
        tokens = [100 + index for index in range(50)]
        nats = [n * (loss + 0.3 * math.sin(index) + 1e-6 * math.cos(index * loss)) for index, n in enumerate(tokens)]
        documents = {"nats": nats, "tokens": tokens}
        change(file, lambda content, kept=documents: content["tasks"]["perplexity"].update(documents=kept))
    text = report(experiment(tmp_path)).text
    assert "recursive is 0.010 nats per token worse" in text
    # A difference that is small and clear has a size, not "0.000".
    assert "MoR, R=3 is 0.000200 nats per token worse" in text
    assert re.search(r"95 % interval \+0\.000(199|200) to", text)


def test_several_seeds_give_mean_and_spread(tmp_path):
    write_seeds(tmp_path, "vanilla", {1: 4.01, 2: 4.02, 3: 4.03})
    write_seeds(tmp_path, "mor", {1: 4.05, 2: 4.07, 3: 4.09})
    said = report(experiment(tmp_path, seeds=[1, 2, 3], **TWO))
    assert "MoR, R=3 is 0.050 nats per token worse than vanilla" in said.text and "over seeds" in said.text
    # Student's t with two degrees of freedom: 4.303 * 0.01 / sqrt(3)
    assert "95 % interval +0.025 to +0.075" in said.text
    assert "trained with 3 seeds" in said.text and "one seed" not in said.text
    assert "4.0200 ± 0.0100" in said.markdown


@pytest.fixture(scope="module")
def several_budgets(tmp_path_factory) -> Report:
    root = tmp_path_factory.mktemp("runs")
    budgets = {"branches/6e18": 6.0e18, "branches/1.5e19": 15.0e18, "": 49.5e18}
    for variant, losses in (("vanilla", (3.40, 3.05, 2.80)), ("mor", (3.20, 2.95, 2.81))):
        config = preset("360m", variant, 3)
        for (branch, budget), loss in zip(budgets.items(), losses):
            folder = root / variant / branch
            write_run(folder, variant, budget=budget, final_loss=loss, config=config, sequences=1024)
    return report(experiment(root, budgets=list(budgets.values()), **TWO))


def test_every_budget_stands_beside_the_papers_result(several_budgets):
    rows = several_budgets.table("Loss at every budget of training FLOPs")
    head, vanilla, mor = rows["Arm"], rows["vanilla"], rows["MoR, R=3"]
    assert head[0::2] == ["6.00 × 10¹⁸ (measured)", "1.50 × 10¹⁹ (measured)", "4.95 × 10¹⁹ (measured)"]
    assert head[1::2] == ["(paper)"] * 3
    assert vanilla[1::2] == ["3.379", "3.010", "2.782"] and mor[1::2] == ["3.103", "2.916", "2.792"]
    measured = [[float(cell.strip("*")) for cell in row[0::2]] for row in (vanilla, mor)]
    assert measured[0] == pytest.approx([3.40, 3.05, 2.80], abs=1e-3)
    assert measured[1] == pytest.approx([3.20, 2.95, 2.81], abs=1e-3)
    assert mor[0].startswith("**") and vanilla[4].startswith("**")
    assert "arXiv 2507.10524" in several_budgets.markdown


def test_the_main_tables_are_of_the_largest_budget(several_budgets):
    assert several_budgets.results.main_budget == 49.5e18
    assert "MoR, R=3 and vanilla cannot be told apart" in several_budgets.text
    rows = several_budgets.table("Beside the paper's results")
    assert list(rows) == ["Arm", "vanilla", "paper: vanilla", "MoR, R=3", "paper: MoR expert, R=3"]
    assert rows["paper: vanilla"][:3] == ["315 M", "20.0 B", "2.7824"]
    assert rows["paper: MoR expert, R=3"][2:4] == ["–", "2.7925"]


def test_at_equal_tokens_the_curve_is_read_where_the_shortest_arm_ends(several_budgets):
    rows = several_budgets.table("The same runs after 19.4 B tokens")
    head, vanilla, mor = rows["Arm"], rows["vanilla"], rows["MoR, R=3"]
    folder = several_budgets.results.experiment.folder
    plan = {arm: json.loads((folder / arm / "plan.json").read_text()) for arm in ("vanilla", "mor")}
    assert head[3] == "Training FLOPs (of vanilla's)"
    ratio = plan["mor"]["flops_per_token_forward"] / plan["vanilla"]["flops_per_token_forward"]
    assert float(mor[3]) == pytest.approx(ratio, abs=1e-3) and float(vanilla[3]) == 1.0
    assert float(vanilla[0]) == pytest.approx(2.80, abs=1e-3) and vanilla[1] == "same"
    share = plan["vanilla"]["tokens"] / plan["mor"]["tokens"]
    law = 2.81 + 5.0 * math.exp(-9 * share) + 0.9 * (1 - share) ** 2
    assert float(mor[0]) == pytest.approx(law, abs=0.02)
    assert vanilla[5] == "at its end" and mor[5] == "still at its peak"


def test_arms_that_did_not_finish_are_named_with_the_reason(tmp_path):
    nothing = report(experiment(tmp_path))
    page = write_report(nothing.results, "recipes/small.yaml").read_text(encoding="utf-8")
    assert "No arm has finished" in page and "No arm has finished" in nothing.markdown
    write_run(tmp_path / "vanilla", "vanilla")
    failed = {"state": "failed", "until": 0.5, "evaluate": False, "reason": "loss is not finite"}
    write_run(tmp_path / "recursive", "recursive", **failed)
    said = report(experiment(tmp_path))
    assert [arm.name for arm in said.results.arms(None)] == ["vanilla"]
    assert "recursive: training failed at step" in said.markdown and "loss is not finite" in said.markdown
    assert "mor: not trained yet" in said.markdown
    states = {row["arm"]: row["state"] for row in said.rows}
    assert states == {"vanilla": "finished", "recursive": "failed", "mor": "absent"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "model.json").write_text("{"), "model.json"),
        (lambda run: (run / "plan.json").unlink(), "plan.json: missing"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "st\n{}\n'), "metrics.jsonl:1"),
        (lambda run: (run / "evaluation" / "perplexity.json").write_text("[]"), "perplexity.json"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml"),
        (lambda run: (run / "evaluation" / "perplexity.json").unlink(), "not evaluated on perplexity"),
    ],
)
def test_a_damaged_run_does_not_take_the_report_with_it(tmp_path, damage, words):
    write_run(tmp_path / "vanilla", "vanilla")
    run = write_run(tmp_path / "mor", "mor")
    made = experiment(tmp_path, **TWO)
    damage(run)
    said = report(made)
    (problem,) = said.results.problems
    assert words in problem and "mor" in problem and "Loss by routing" in said.markdown


def test_a_run_that_finished_something_else_has_not_finished(tmp_path):
    write_runs(tmp_path)
    before = experiment(tmp_path)
    said = report(before.model_copy(update={"arms": {**before.arms, "mor": {"budget": {"flops": 2.4e14}}}}))
    assert [arm.name for arm in said.results.arms(None)] == ["vanilla", "recursive"]
    (problem,) = said.results.problems
    assert "budget.flops was 120000000000000.0, the experiment says 240000000000000.0" in problem
    assert "remove that folder" in problem
    assert {row["state"] for row in said.rows if row["arm"] == "mor"} == {"outdated"}


def test_a_budget_is_finished_when_its_own_branch_is(tmp_path):
    write_runs(tmp_path)
    for arm in synthetic.ARMS:
        write_run(tmp_path / arm / "branches" / "1e14", arm, budget=1e14)
    made = experiment(tmp_path, budgets=[1e14, 1.2e14])
    (tmp_path / "mor" / "branches" / "1e14" / "status.json").write_text('{"state": "stopped", "step": 9}')
    results = report(made).results
    assert [arm.name for arm in results.arms(1e14)] == ["vanilla", "recursive"] and len(results.arms(1.2e14)) == 3
    assert len(results.problems) == 1 and "branches/1e14: training was stopped" in results.problems[0]
    # With a smaller budget still the trunk would leave a branch earlier, with another warm-up.
    results = report(made.model_copy(update={"budgets": (1e14, 5e13, 1.2e14)})).results
    assert results.arms(1.2e14) == [] and "mor: was begun with another recipe" in " ".join(results.problems)


def test_run_folders_are_enough_for_a_report(tmp_path):
    """Without the data they were trained on, which would say the size of the vocabulary."""
    write_runs(tmp_path)
    made = experiment(tmp_path)
    model = {key: value for key, value in made.base["model"].items() if key != "vocab_size"}
    made = made.model_copy(update={"base": {**made.base, "model": model}})
    results = report(made).results
    assert results.problems == [] and len(results.arms(None)) == 3
    every = made.evaluation.model_copy(update={"suites": ("all",)})
    problems = report(made.model_copy(update={"evaluation": every})).results.problems
    assert len(problems) == 3 and "not evaluated on own, wikitext" in problems[0] and "blimp" not in problems[0]


def test_depths_that_differ_between_routings_are_said(tmp_path):
    write_runs(tmp_path)
    change(
        tmp_path / "mor" / "evaluation" / "routing.json",
        lambda content: content["tasks"]["routing"]["depth_histogram"].update(causal=[0.0, 0.25, 0.0, 0.75]),
    )
    said = report(experiment(tmp_path))
    words = "takes 2.50 recursion steps on average, with the top-k routing of training 2.00: it computes more"
    assert words in said.text
    assert "MoR, R=3, causal: 25% take 1, 75% take 3" in said.markdown.replace(" %", "%").replace("\u00a0", "")


def test_the_parts_of_one_benchmark_are_skipped_in_one_row():
    no_data = {"why": "no data", "how": "bring it"}
    skipped = [{"suite": "blimp", "task": f"blimp_{part}", **no_data} for part in ("passive", "island")]
    skipped.append({"suite": "arc_easy", "task": "arc_easy", **no_data})
    skipped.append({"suite": "blimp", "task": "blimp_passive", "why": "damaged", "how": "mend it"})
    table = skipped_table(SimpleNamespace(records=[SimpleNamespace(skipped=skipped)] * 2))
    assert table.rows == [
        ["BLiMP (2 parts)", "no data", "bring it"],
        ["ARC-easy", "no data", "bring it"],
        ["BLiMP", "damaged", "mend it"],
    ]


def test_interpolation_stays_within_what_was_measured():
    curve = Curve([0.0, 10.0, 30.0], [0.0, 1.0, 3.0], [5.0, 4.0, 2.0])
    assert curve.at_tokens(5.0) == pytest.approx(4.5)
    assert curve.at_tokens(20.0) == pytest.approx(3.0)
    assert curve.flops_at(20.0) == pytest.approx(2.0)
    assert curve.at_tokens(31.0) is None and curve.at_tokens(-1.0) is None
