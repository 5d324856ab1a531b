from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest

from mor_model.presets import preset
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.report.build import write_report
from pretrain.comparison.report.findings import findings
from pretrain.comparison.report.results import read_results
from pretrain.comparison.run_records import Curve
from tests.pretrain.comparison import synthetic
from tests.pretrain.comparison.synthetic import write_run

ARMS = {"vanilla": {}, "recursive": {}, "mor": {}}


def experiment(root, **changes) -> Experiment:
    return synthetic.experiment(root, **{"labels": {"mor": "MoR, R=3"}, **changes})


def build_report(made: Experiment, file: str = "recipes/small.yaml"):
    results = read_results(made)
    return results, write_report(results, file)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for arm, loss in (("vanilla", 4.02), ("recursive", 4.11), ("mor", 4.06)):
        write_run(root / arm, arm, final_loss=loss)
    made = experiment(root)
    build_report(made, "recipes/small.yaml")
    return made


def report_text(made: Experiment, name: str) -> str:
    return (made.report_folder / name).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags, ids, and the text of table rows; complains about tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "path", "use", "rect", "circle", "line", "polygon"})

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

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_fetches_nothing(complete):
    text = report_text(complete, "index.html")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


def test_pictures_take_their_colours_from_the_style_sheet(complete):
    text = report_text(complete, "index.html")
    style, rest = text.split("</style>")
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", rest))
    assert {"--ink", "--rule", "--arm-1", "--arm-2", "--arm-3"} <= used
    assert all(f"{name}:" in style for name in used)
    assert "#a0000" not in rest and "#b0000" not in rest  # no stand-in colour is left


def test_every_number_of_the_runs_is_in_the_spreadsheet(complete):
    rows = list(csv.DictReader(io.StringIO(report_text(complete, "report.csv"))))
    found = {(row["arm"], row["quantity"], row["routing"]): row for row in rows}
    assert float(found["mor", "perplexity/loss", "causal"]["value"]) == pytest.approx(4.06)
    assert float(found["mor", "perplexity/loss", "causal"]["stderr"]) == pytest.approx(0.011)
    assert float(found["mor", "perplexity/bits_per_byte", "causal"]["value"]) == pytest.approx(4.06 / 4.2 / math.log(2))
    assert float(found["mor", "validation_loss", "causal"]["value"]) == pytest.approx(4.06, abs=1e-3)
    assert float(found["mor", "validation_loss", "topk"]["value"]) == pytest.approx(4.01, abs=1e-3)
    for arm in ARMS:
        plan = json.loads((complete.folder / arm / "plan.json").read_text())
        assert float(found[arm, "training_flops_counted", ""]["value"]) == pytest.approx(plan["training_flops"])
        assert float(found[arm, "tokens", ""]["value"]) == plan["tokens"]
        assert float(found[arm, "parameters_total_stored", ""]["value"]) == plan["parameters"]["total_stored"]
    # Five stored layers in place of eleven.
    layers = {arm: float(found[arm, "parameters_layers", ""]["value"]) for arm in ARMS}
    assert layers["recursive"] * 11 == layers["vanilla"] * 5 == layers["mor"] * 11


def test_page_and_markdown_show_the_same_numbers(complete):
    page = Page()
    page.feed(report_text(complete, "index.html"))
    rows = [[cell.strip() for cell in row] for row in page.rows]
    lines = [
        line for line in report_text(complete, "report.md").splitlines() if line.startswith("| ") and "---" not in line
    ]
    written = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
    body = [row for row in rows if row[0] in ("vanilla", "recursive", "MoR, R=3")]
    assert len(body) == 18 and all(row in written for row in body)


def test_differences_are_said_with_their_uncertainty_and_no_more(complete):
    text = " ".join(findings(read_results(complete)))
    assert (
        "recursive is 0.090 nats per token worse than vanilla on the held-out test text at equal training FLOPs" in text
    )
    half = 1.96 * math.hypot(0.011, 0.011)
    assert f"95 % interval +{0.09 - half:.3f} to +{0.09 + half:.3f}" in text
    assert "MoR, R=3 is 0.040 nats per token worse" in text
    assert "This is one seed per arm" in text
    assert "On ARC-easy no arm can be told from chance" in text
    assert re.search(r"counted training FLOPs agree within 0\.\d\d %", text)


def test_a_difference_within_its_interval_is_not_called_one(tmp_path):
    for arm, loss in (("vanilla", 4.02), ("recursive", 4.03), ("mor", 4.01)):
        write_run(tmp_path / arm, arm, final_loss=loss)
    text = " ".join(findings(read_results(experiment(tmp_path))))
    assert "recursive and vanilla cannot be told apart" in text and "better" not in text and "worse" not in text


def test_documents_in_common_are_compared_one_by_one(tmp_path):
    """Standard errors of 0.011 each would hide a difference of 0.01 that every single document shows."""
    for arm, loss in (("vanilla", 4.02), ("recursive", 4.03), ("mor", 4.01)):
        file = write_run(tmp_path / arm, arm, final_loss=loss) / "evaluation" / "perplexity.json"
        content = json.loads(file.read_text())
        tokens = [100 + index for index in range(50)]
        nats = [n * (loss + 0.3 * math.sin(index) + 0.002 * math.cos(index * loss)) for index, n in enumerate(tokens)]
        content["tasks"]["perplexity"]["documents"] = {"nats": nats, "tokens": tokens}
        file.write_text(json.dumps(content))
    text = " ".join(findings(read_results(experiment(tmp_path))))
    assert "recursive is 0.010 nats per token worse" in text and "MoR, R=3 is 0.010 nats per token better" in text


def test_several_seeds_give_mean_and_spread(tmp_path):
    for seed, gap in ((1, 0.04), (2, 0.05), (3, 0.06)):
        suffix = "" if seed == 1 else f"-seed{seed}"
        write_run(tmp_path / f"vanilla{suffix}", "vanilla", seed=seed, final_loss=4.0 + 0.01 * seed)
        write_run(tmp_path / f"mor{suffix}", "mor", seed=seed, final_loss=4.0 + 0.01 * seed + gap)
    made = experiment(tmp_path, seeds=[1, 2, 3], arms={"vanilla": {}, "mor": {}})
    results, _ = build_report(made, "recipes/small.yaml")
    text = " ".join(findings(results))
    assert "MoR, R=3 is 0.050 nats per token worse than vanilla" in text and "over seeds" in text
    # Student's t with two degrees of freedom: 4.303 * 0.01 / sqrt(3)
    assert "95 % interval +0.025 to +0.075" in text
    assert "trained with 3 seeds" in text and "one seed" not in text
    assert "4.0200 ± 0.0100" in report_text(made, "report.md")


@pytest.fixture(scope="module")
def several_budgets(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    budgets = (6.0e18, 15.0e18, 49.5e18)
    for variant, losses in (("vanilla", (3.40, 3.05, 2.80)), ("mor", (3.20, 2.95, 2.81))):
        config = preset("360m", variant, 3)
        for budget, loss in zip(budgets, losses):
            folder = (
                root / variant
                if budget == budgets[-1]
                else root / variant / "branches" / f"{budget:g}".replace("+", "")
            )
            write_run(folder, variant, budget=budget, final_loss=loss, config=config, sequences=1024)
    made = experiment(root, arms={"vanilla": {}, "mor": {}}, budgets=budgets)
    build_report(made, "recipes/small.yaml")
    return made


def markdown_table(made: Experiment, title: str) -> list[list[str]]:
    text = report_text(made, "report.md").split(f"**{title}**")[1]
    lines = [line for line in text.split("\n\n")[1].splitlines() if "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_budget_stands_beside_the_papers_result(several_budgets):
    head, vanilla, mor = markdown_table(several_budgets, "Loss at every budget of training FLOPs")
    assert head[1::2] == ["6.00 × 10¹⁸ (measured)", "1.50 × 10¹⁹ (measured)", "4.95 × 10¹⁹ (measured)"]
    assert head[2::2] == ["(paper)"] * 3
    assert vanilla[2::2] == ["3.379", "3.010", "2.782"] and mor[2::2] == ["3.103", "2.916", "2.792"]
    measured = [[float(row[place].strip("*")) for place in (1, 3, 5)] for row in (vanilla, mor)]
    assert measured[0] == pytest.approx([3.40, 3.05, 2.80], abs=1e-3)
    assert measured[1] == pytest.approx([3.20, 2.95, 2.81], abs=1e-3)
    assert mor[1].startswith("**") and vanilla[5].startswith("**")
    text = report_text(several_budgets, "index.html")
    assert "arXiv 2507.10524" in text and "top-k routing, which looks ahead" in text


def test_the_main_tables_are_of_the_largest_budget(several_budgets):
    results = read_results(several_budgets)
    assert results.main_budget == 49.5e18
    assert "MoR, R=3 and vanilla cannot be told apart" in " ".join(findings(results))
    rows = markdown_table(several_budgets, "Beside the paper's results")
    assert [row[0] for row in rows[1:]] == ["vanilla", "paper: vanilla", "MoR, R=3", "paper: MoR expert, R=3"]
    assert rows[2][1:4] == ["315 M", "20.0 B", "2.7824"] and rows[4][3:5] == ["–", "2.7925"]


def test_a_small_network_is_not_held_against_the_paper(complete):
    assert "2507.10524" not in report_text(complete, "index.html")


def test_at_equal_tokens_the_curve_is_read_where_the_shortest_arm_ends(several_budgets):
    head, vanilla, mor = markdown_table(several_budgets, "The same runs after 19.4 B tokens")
    plan = {arm: json.loads((several_budgets.folder / arm / "plan.json").read_text()) for arm in ("vanilla", "mor")}
    assert head[4] == "Training FLOPs (of vanilla's)"
    ratio = plan["mor"]["flops_per_token_forward"] / plan["vanilla"]["flops_per_token_forward"]
    assert float(mor[4]) == pytest.approx(ratio, abs=1e-3) and float(vanilla[4]) == 1.0
    assert float(vanilla[1]) == pytest.approx(2.80, abs=1e-3) and vanilla[2] == "same"
    share = plan["vanilla"]["tokens"] / plan["mor"]["tokens"]
    law = 2.81 + 5.0 * math.exp(-9 * share) + 0.9 * (1 - share) ** 2
    assert float(mor[1]) == pytest.approx(law, abs=0.02)
    assert vanilla[6] == "at its end" and mor[6] == "still at its peak"


def test_arms_that_did_not_finish_are_named_with_the_reason(tmp_path):
    write_run(tmp_path / "vanilla", "vanilla")
    write_run(
        tmp_path / "recursive", "recursive", state="failed", until=0.5, evaluate=False, reason="loss is not finite"
    )
    made = experiment(tmp_path)
    results, index = build_report(made, "recipes/small.yaml")
    assert [arm.name for arm in results.arms(None)] == ["vanilla"]
    text = index.read_text(encoding="utf-8")
    assert "recursive: training failed at step" in text and "loss is not finite" in text
    assert "mor: not trained yet" in text
    assert re.search(r"^recursive,recursive,1,,failed,", report_text(made, "report.csv"), re.M)
    assert re.search(r"^mor,mor,1,,absent,", report_text(made, "report.csv"), re.M)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "model.json").write_text("{"), "model.json"),
        (lambda run: (run / "plan.json").unlink(), "plan.json: missing"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "st\n{}\n'), "metrics.jsonl:1"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train"}\n'), "step"),
        (lambda run: (run / "evaluation" / "perplexity.json").write_text("[]"), "perplexity.json"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml"),
        (lambda run: (run / "evaluation" / "perplexity.json").unlink(), "not evaluated on perplexity"),
    ],
)
def test_a_damaged_run_does_not_take_the_report_with_it(tmp_path, damage, words):
    write_run(tmp_path / "vanilla", "vanilla")
    run = write_run(tmp_path / "mor", "mor")
    made = experiment(tmp_path, arms={"vanilla": {}, "mor": {}})
    damage(run)
    results, index = build_report(made, "recipes/small.yaml")
    assert len(results.problems) == 1 and words in results.problems[0] and "mor" in results.problems[0]
    assert index.is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": {"flops": 2.4e14}}, "budget.flops was 120000000000000.0, the experiment says 240000000000000.0"),
        ({"optim": {"lr": 1e-4}}, "optim.lr was 0.003, the experiment says 0.0001"),
    ],
)
def test_a_run_that_finished_something_else_has_not_finished(tmp_path, change, words):
    for arm in ARMS:
        write_run(tmp_path / arm, arm)
    before = experiment(tmp_path)
    now = before.model_copy(update={"arms": {**before.arms, "mor": change}})
    results, index = build_report(now)
    assert [arm.name for arm in results.arms(None)] == ["vanilla", "recursive"]
    assert len(results.problems) == 1 and words in results.problems[0] and "remove that folder" in results.problems[0]
    assert words in index.read_text(encoding="utf-8")
    assert re.search(r"^mor,mor,1,,outdated,", report_text(now, "report.csv"), re.M)


def test_a_budget_is_finished_when_its_own_branch_is(tmp_path):
    for arm in ARMS:
        write_run(tmp_path / arm, arm)
        write_run(tmp_path / arm / "branches" / "1e14", arm, budget=1e14)
    made = experiment(tmp_path, budgets=[1e14, 1.2e14])
    (tmp_path / "mor" / "branches" / "1e14" / "status.json").write_text('{"state": "stopped", "step": 9}')
    results = read_results(made)
    assert [arm.name for arm in results.arms(1e14)] == ["vanilla", "recursive"] and len(results.arms(1.2e14)) == 3
    assert len(results.problems) == 1 and "branches/1e14: training was stopped" in results.problems[0]
    # With a smaller budget still the trunk would leave a branch earlier, with another warm-up.
    results = read_results(made.model_copy(update={"budgets": (1e14, 5e13, 1.2e14)}))
    assert results.arms(1.2e14) == [] and "mor: was begun with another recipe" in " ".join(results.problems)


def test_run_folders_are_enough_for_a_report(tmp_path):
    """Without the data they were trained on, which would say the size of the vocabulary."""
    for arm in ARMS:
        write_run(tmp_path / arm, arm)
    made = experiment(tmp_path)
    model = {key: value for key, value in made.base["model"].items() if key != "vocab_size"}
    results = read_results(made.model_copy(update={"base": {**made.base, "model": model}}))
    assert results.problems == [] and len(results.arms(None)) == 3


def test_all_suites_are_each_of_them(tmp_path):
    for arm in ARMS:
        write_run(tmp_path / arm, arm)
    problems = read_results(experiment(tmp_path, evaluation={"suites": ["all"]})).problems
    assert len(problems) == 3 and "not evaluated on own, wikitext" in problems[0] and "blimp" not in problems[0]


def test_a_report_without_any_finished_arm_says_so(tmp_path):
    results, index = build_report(experiment(tmp_path), "recipes/small.yaml")
    assert "No arm has finished" in index.read_text(encoding="utf-8")
    assert len(results.problems) == 3


def test_depths_that_differ_between_routings_are_said(tmp_path):
    for arm in ("vanilla", "mor"):
        write_run(tmp_path / arm, arm)
    file = tmp_path / "mor" / "evaluation" / "routing.json"
    content = json.loads(file.read_text())
    content["tasks"]["routing"]["depth_histogram"]["causal"] = [0.0, 0.25, 0.0, 0.75]
    file.write_text(json.dumps(content))
    made = experiment(tmp_path, arms={"vanilla": {}, "mor": {}})
    results, index = build_report(made, "recipes/small.yaml")
    text = " ".join(findings(results))
    assert "takes 2.50 recursion steps on average, with the top-k routing of training 2.00: it computes more" in text
    assert "MoR, R=3, causal: 25% take 1, 75% take 3" in index.read_text(encoding="utf-8").replace(" %", "%")


def test_names_from_outside_are_text_not_markup(tmp_path):
    write_run(tmp_path / "vanilla", "vanilla")
    made = experiment(
        tmp_path,
        arms={"vanilla": {}},
        labels={"vanilla": "<b>V&V</b>"},
        title="a < b",
        description="<script>alert(1)</script>",
    )
    _, index = build_report(made, "recipes/<small>.yaml")
    text = index.read_text(encoding="utf-8")
    assert "<script" not in text and "<b>V&V" not in text and "&lt;b&gt;V&amp;V&lt;/b&gt;" in text
    page = Page()
    page.feed(text)
    assert page.open == []


def test_interpolation_stays_within_what_was_measured():
    curve = Curve([0.0, 10.0, 30.0], [0.0, 1.0, 3.0], [5.0, 4.0, 2.0])
    assert curve.at_tokens(5.0) == pytest.approx(4.5)
    assert curve.at_tokens(20.0) == pytest.approx(3.0)
    assert curve.flops_at(20.0) == pytest.approx(2.0)
    assert curve.at_tokens(31.0) is None and curve.at_tokens(-1.0) is None
