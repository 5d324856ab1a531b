"""What the report says, in order, independent of how it is written down (page, markdown)."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.comparison import numbers
from pretrain.comparison.report import tables, views
from pretrain.comparison.report.drawing import Picture
from pretrain.comparison.report.findings import equal_cost, findings
from pretrain.comparison.report.pictures import (
    budget_picture,
    depth_picture,
    few_shot_picture,
    loss_picture,
    tokens_picture,
)
from pretrain.comparison.report.results import Results
from pretrain.comparison.report.tables import Table

Block = Picture | Table | dict[str, str] | str


@dataclass(frozen=True)
class Section:
    """A heading, then pictures, tables, name-value lists and commands."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    description: str
    labels: list[str]
    findings: list[str]
    problems: list[str]
    sections: list[Section]
    footer: str


def compose(results: Results, experiment_file: str) -> Document:
    """Put a report together from what the runs say.

    Args:
        experiment_file: path that the commands to reproduce name.
    """
    experiment = results.experiment
    budget = results.main_budget
    arms = results.arms(budget)
    return Document(
        title=experiment.title or experiment.name,
        subtitle=_subtitle(results),
        description=experiment.description.strip(),
        labels=[results.label(name) for name in experiment.arms],
        findings=findings(results),
        problems=results.problems,
        sections=[*(_measurements(results) if arms else []), _how(results, experiment_file)],
        footer=f"Written by mor {importlib.metadata.version('mor-pretrain')} on {datetime.date.today().isoformat()} "
        f"from the run folders under {experiment.folder}.",
    )


def _measurements(results: Results) -> list[Section]:
    budget = results.main_budget
    test = [tables.test_table(results, budget, task) for task in tables.loss_tasks(results, budget)]
    losses: list[Block | None] = [loss_picture(results, budget), *test, tables.routing_table(results, budget)]
    budgets = [budget_picture(results), views.budgets_table(results)]
    at_equal_tokens = views.equal_tokens_table(results, budget)
    tokens = [at_equal_tokens, tokens_picture(results, budget)] if at_equal_tokens is not None else []
    few_shot: list[Block | None] = [few_shot_picture(results, budget)]
    if few_shot[0] is not None:
        few_shot.append(tables.few_shot_table(results, budget))
    few_shot.append(tables.skipped_table(results))
    sections = [
        Section("Loss", _present(losses)),
        Section("Every budget", _present(budgets)),
        Section("At equal tokens", _present(tokens)),
        Section("Size and cost", [tables.size_table(results, budget), tables.budget_table(results, budget)]),
        Section("Depth", _present([depth_picture(results, budget)])),
        Section("Few-shot tasks", _present(few_shot)),
        Section("The paper's results", _present([views.paper_table(results, budget)])),
        Section("Speed and memory", [tables.speed_table(results, budget)]),
    ]
    return [section for section in sections if section.blocks]


def _how(results: Results, experiment_file: str) -> Section:
    facts = _facts(results)
    commands = "\n".join(
        [
            f"mor compare run {experiment_file}      # data, training, evaluation, this report",
            f"mor compare report {experiment_file}   # this report again, from the run folders",
        ]
    )
    blocks: list[Block] = [facts, commands] if facts else [commands]
    return Section("How it was made", blocks)


def _facts(results: Results) -> dict[str, str]:
    run = next((record for record in results.records if record.environment), None)
    if run is None:
        return {}
    environment = run.environment
    facts = {
        "Commit": _text(environment.get("commit")),
        "Versions": ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items()),
        "Machine": ", ".join(_text(environment.get(key)) for key in ("device", "host") if environment.get(key)),
        "Ranks": ", ".join(
            part
            for part in (
                f"{environment['world_size']}" if environment.get("world_size") else "",
                f"launched by {environment['launcher']}" if environment.get("launcher") else "",
                f"{environment['precision']}" if environment.get("precision") else "",
                f"ZeRO stage {environment['zero_stage']}" if environment.get("zero_stage") is not None else "",
            )
            if part
        ),
        "Sequence length": f"{run.plan.get('sequence_length')} tokens, "
        f"{numbers.whole(run.plan.get('tokens_per_step'))} tokens per step",
        "Seeds": ", ".join(str(seed) for seed in results.seeds if seed is not None),
        "Data": f"manifest {_text(run.plan.get('data_manifest'))[:16]}, "
        f"tokenizer {_text(run.plan.get('tokenizer_fingerprint'))[:16]}",
        "Runs": ", ".join(record.trial.name for record in results.records),
    }
    return {name: text for name, text in facts.items() if text}


def _subtitle(results: Results) -> str:
    arms = results.arms(results.main_budget)
    if not arms:
        return f"{len(results.experiment.arms)} arms, none finished yet"
    flops = [arm.first.counted_flops for arm in arms if arm.first.counted_flops]
    cost = equal_cost(arms)
    mean = f" ({numbers.power_of_ten(sum(flops) / len(flops))} each)" if flops and "FLOPs" in cost else ""
    seeds = sorted({len(arm.runs) for arm in arms})
    fewest = f"{seeds[0]} to " if len(seeds) > 1 else ""
    return f"{_counted(len(arms), 'arm')} {cost}{mean} · {fewest}{_counted(seeds[-1], 'seed')} per arm"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"


def _present(blocks: Sequence[Block | None]) -> list[Block]:
    return [block for block in blocks if block is not None]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
