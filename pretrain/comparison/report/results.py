"""The runs of an experiment, ordered for a report: by budget, arm and seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.plain_text import plain
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.planned_runs import other_recipe, plan_experiment
from pretrain.comparison.report import statistics
from pretrain.comparison.report.statistics import Difference, mean_and_spread
from pretrain.comparison.run_records import RunRecord, read_run
from pretrain.evaluation.suites import check_suites
from pretrain.records.finished import has_finished

# Beside the tasks of evaluations, the text whose loss is measured during training.
VALIDATION = "validation"


@dataclass(frozen=True)
class Arm:
    """All seeds of one arm at one budget.

    `runs` are the finished ones, in the experiment's order of seeds; `broken` the others.
    """

    name: str
    label: str
    runs: list[RunRecord]
    broken: list[RunRecord]

    @property
    def first(self) -> RunRecord:
        """The run that is shown where seeds do not matter (parameters, FLOPs per token) or one curve is drawn."""
        return self.runs[0]

    def mean(self, getter: Callable[[RunRecord], float | None]) -> tuple[float | None, float | None]:
        """Mean over seeds and their standard deviation; the latter is None for one seed. Not finite where one is."""
        values = [value for run in self.runs if (value := getter(run)) is not None]
        return mean_and_spread(values) if values else (None, None)

    def mean_score(self, task: str, metric: str) -> tuple[float | None, float | None]:
        """Mean over seeds and standard deviation; of a single run the standard error over examples."""
        scores = [score for run in self.runs if (score := run.score(task, metric)) is not None]
        if len(scores) == 1:
            return scores[0].value, scores[0].stderr
        return mean_and_spread([score.value for score in scores]) if scores else (None, None)

    def validation_loss(self, routing: str) -> tuple[float | None, float | None]:
        """Mean over seeds of the validation loss at the end of training, and its spread."""
        return self.mean(lambda run: run.final_validation(routing))

    def texts(self, task: str) -> set[str]:
        """What the runs read for a task, or for `VALIDATION`; see `Score.text`."""
        if task == VALIDATION:
            return {run.validated_on for run in self.runs if run.validation}
        return {score.text for run in self.runs for score in run.scores if score.task == task}


@dataclass(frozen=True)
class Results:
    """What a report is built from."""

    experiment: Experiment
    records: list[RunRecord]

    @property
    def budgets(self) -> list[float | None]:
        """Budgets in the experiment's own order; [None] when the recipe holds the only one."""
        return list(dict.fromkeys(record.trial.budget for record in self.records))

    @property
    def common_budgets(self) -> list[float]:
        """Budgets whose validation losses can be compared: none with fewer than two budgets, or where arms were
        validated on different texts.
        """
        budgets = sorted(budget for budget in self.budgets if budget is not None)
        alike = not any(self.different_texts(VALIDATION, self.arms(budget)) for budget in budgets)
        return budgets if alike and len(budgets) > 1 else []

    @property
    def main_budget(self) -> float | None:
        """The largest budget at which a run finished: the one of tables that show one budget."""
        finished = {record.trial.budget for record in self.records if record.finished}
        candidates = [budget for budget in self.budgets if budget in finished] or self.budgets
        return max(candidates, key=lambda budget: budget or 0.0)

    @property
    def seeds(self) -> list[int | None]:
        return list(dict.fromkeys(record.trial.seed for record in self.records))

    @property
    def problems(self) -> list[str]:
        return [f"{record.label}: {record.problem}" for record in self.records if record.problem]

    def label(self, arm: str) -> str:
        """What tables and pictures call the arm."""
        return plain(self.experiment.label(arm))

    def arm(self, name: str, budget: float | None) -> Arm:
        mine = [record for record in self.records if record.trial.arm == name and record.trial.budget == budget]
        return Arm(name, self.label(name), [r for r in mine if r.finished], [r for r in mine if not r.finished])

    def arms(self, budget: float | None) -> list[Arm]:
        """The arms with at least one finished run at `budget`, in the experiment's order."""
        return [arm for name in self.experiment.arms if (arm := self.arm(name, budget)).runs]

    @property
    def main_arms(self) -> list[Arm]:
        """The arms that finished at the main budget."""
        return self.arms(self.main_budget)

    def reference(self, budget: float | None) -> Arm | None:
        """The arm that others are compared with, None where it did not finish."""
        arm = self.arm(self.experiment.reference_arm, budget)
        return arm if arm.runs else None

    def different_texts(self, task: str, arms: list[Arm] | None = None) -> str | None:
        """Which arms (by default the main ones) read what, where they did not all read the same text for `task`; None
        where they did. Their figures are then figures of different things.
        """
        read: dict[str, list[str]] = {}
        for arm in self.main_arms if arms is None else arms:
            for text in sorted(arm.texts(task)):
                read.setdefault(text, []).append(arm.label)
        if len(read) < 2:
            return None
        return "; ".join(f"{', '.join(arms)} read {text or 'what was not recorded'}" for text, arms in read.items())

    def difference(self, arm: Arm, reference: Arm, task: str, metric: str) -> Difference | None:
        """How `arm` differs from `reference` on one score: over seeds where there are several, else over examples.
        None where one is missing or not finite, or where they are of different texts.
        """
        if len(arm.texts(task) | reference.texts(task)) > 1:
            return None
        mine, theirs = (
            {run.trial.seed: score for run in side.runs if (score := run.score(task, metric)) is not None}
            for side in (arm, reference)
        )
        values, references = ({seed: score.value for seed, score in side.items()} for side in (mine, theirs))
        if not all(map(math.isfinite, [*values.values(), *references.values()])):
            return None
        over_seeds = statistics.difference_of_seeds(values, references)
        if over_seeds is not None:
            return over_seeds
        common = [seed for seed in mine if seed in theirs]
        if not common:
            return None
        a, b = mine[common[0]], theirs[common[0]]
        if a.sums and a.weights == b.weights:
            return statistics.difference_of_pairs(a.sums, b.sums, a.weights)
        return statistics.difference_of_scores(a.value, a.stderr, b.value, b.stderr)


def read_results(experiment: Experiment) -> Results:
    """Read every run folder of the experiment; folders that cannot be read become records with a problem.

    Raises:
        RecipeError, DataError: the experiment cannot be planned, so nothing says what a finished run of it is.
    """
    suites = check_suites(experiment.evaluation.suites)
    records = []
    for run in plan_experiment(experiment):
        record = read_run(run.trial, plain(run.label), suites)
        if record.finished and not has_finished(run.recipe):  # with a smaller budget than the experiment's, for example
            record = dataclasses.replace(record, state="outdated", problem=plain(other_recipe(run)))
        records.append(record)
    return Results(experiment, records)
