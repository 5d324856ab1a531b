"""What the report says, in order, for page and markdown alike."""

from __future__ import annotations

import datetime
import importlib.metadata
from dataclasses import dataclass

from pretrain.comparison import numbers
from pretrain.comparison.report import pictures, tables, views
from pretrain.comparison.report.drawing import Picture
from pretrain.comparison.report.findings import equal_cost, findings
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
    """The report of these runs; `experiment_file` is the path that its commands name."""
    experiment = results.experiment
    arms = results.main_arms
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
    at_equal_tokens = views.equal_tokens_table(results)
    few_shot = pictures.few_shot_picture(results)
    test = [tables.test_table(results, task) for task in tables.loss_tasks(results)]
    found: dict[str, list[Block | None]] = {
        "Loss": [pictures.loss_picture(results), *test, tables.routing_table(results)],
        "Every budget": [pictures.budget_picture(results), views.budgets_table(results)],
        "At equal tokens": [at_equal_tokens, pictures.tokens_picture(results) if at_equal_tokens else None],
        "Size and cost": [tables.size_table(results), tables.budget_table(results)],
        "Depth": [pictures.depth_picture(results)],
        "Few-shot tasks": [
            few_shot,
            tables.few_shot_table(results) if few_shot else None,
            tables.skipped_table(results),
        ],
        "The paper's results": [views.paper_table(results)],
        "Speed and memory": [tables.speed_table(results)],
    }
    present = {title: [block for block in blocks if block is not None] for title, blocks in found.items()}
    return [Section(title, blocks) for title, blocks in present.items() if blocks]


def _how(results: Results, experiment_file: str) -> Section:
    facts = _facts(results)
    commands = (
        f"mor compare run {experiment_file}      # data, training, evaluation, this report\n"
        f"mor compare report {experiment_file}   # this report again, from the run folders"
    )
    return Section("How it was made", [*([facts] if facts else []), commands])


def _facts(results: Results) -> dict[str, str]:
    run = next((record for record in results.records if record.environment), None)
    if run is None:
        return {}
    environment, plan = run.environment, run.plan
    launcher, zero_stage = environment.get("launcher"), environment.get("zero_stage")
    facts = {
        "Commit": _listed(environment.get("commit")),
        "Versions": _listed(*(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())),
        "Machine": _listed(environment.get("device"), environment.get("host")),
        "Ranks": _listed(
            environment.get("world_size"),
            f"launched by {launcher}" if launcher else None,
            environment.get("precision"),
            None if zero_stage is None else f"ZeRO stage {zero_stage}",
        ),
        "Sequence length": f"{plan.get('sequence_length')} tokens, "
        f"{numbers.whole(plan.get('tokens_per_step'))} tokens per step",
        "Seeds": _listed(*results.seeds),
        "Data": f"manifest {_listed(plan.get('data_manifest'))[:16]}, "
        f"tokenizer {_listed(plan.get('tokenizer_fingerprint'))[:16]}",
        "Runs": _listed(*(record.trial.name for record in results.records)),
    }
    return {name: text for name, text in facts.items() if text}


def _listed(*parts: object) -> str:
    """The parts that are known, separated by commas."""
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def _subtitle(results: Results) -> str:
    arms = results.main_arms
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
