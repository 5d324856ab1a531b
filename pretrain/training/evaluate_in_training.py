"""Evaluation while training: validation loss and suites on their schedules, what they cost, and a cap on that.

Suites are those of `mor eval`, on the network as it is after a step, with causal routing; all ranks share the work.
Results lie in RUN/evaluation/step-00000100/<suite>.json, their headline figures in metrics.jsonl.

A request to stop breaks an evaluation off before its next forward pass. Nothing of it is recorded; the checkpoint
remembers it (`TrainState.unfinished`), and the next start begins with it. One that fails is reported and left out.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.store import TrainState
from pretrain.errors import RecipeError, RunError
from pretrain.evaluation.evaluation_ranks import rank_and_world
from pretrain.evaluation.held_out import texts_of
from pretrain.evaluation.settings import HELD_OUT_SUITES, Settings
from pretrain.evaluation.suites import benchmarks, check_suites, harness_tasks, shared_evaluation_data
from pretrain.evaluation.task_files import plan_tasks
from pretrain.ranks.agreement import on_first_rank
from pretrain.ranks.lockstep import BrokenOff, EvaluationFailed, Lockstep
from pretrain.ranks.signals import Asked
from pretrain.recipe.plan import Plan, is_due
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.sections import Suites
from pretrain.records.run_folder import RunFolder
from pretrain.records.telemetry import Telemetry
from pretrain.training.validation import Validator

Records = list[tuple[str, dict[str, Any]]]
Beat = Callable[[str], None]


@dataclass
class SuiteRunner:
    """Evaluates the network in training on the recipe's suites.

    Attributes:
        engine: DeepSpeed's; tokenizer: its folder; texts: files of held-out documents, for suites that read them.
    """

    engine: Any
    suites: Suites
    folder: RunFolder
    telemetry: Telemetry
    tokenizer: Path
    texts: Sequence[Path]
    device: torch.device
    lockstep: Lockstep

    def __post_init__(self) -> None:
        from data_prep.tokenizers.loading import load_tokenizer
        from pretrain.evaluation.evaluate import most_text
        from pretrain.evaluation.held_out import read_documents

        self._tokenizer = load_tokenizer(self.tokenizer)
        self._settings = Settings(limit=self.suites.limit, text_bytes=self.suites.text_bytes)
        self._documents = read_documents(self.texts, most_text(self._settings))[0] if self.texts else []

    def run(self, state: TrainState, beat: Beat) -> Records:
        """One record per suite; collective. `beat` is told how far the evaluation is."""
        from pretrain.evaluation.evaluate import evaluate_model

        results = evaluate_model(
            self.engine.module,
            self._tokenizer,
            self.suites.names,
            documents=self._documents,
            settings=self._settings,
            device=self.device,
            progress=lambda suite, done, total: beat(f"{suite} after step {state.step}: batch {done} of {total}"),
            lockstep=self.lockstep,
        )
        place = {"step": state.step, "tokens": state.tokens, "flops": state.flops}
        if rank_and_world()[0] == 0:
            folder = self.folder.evaluation / f"step-{state.step:08d}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for suite, result in results.items():
                    self.folder.write_json(folder / f"{suite}.json", {**result, **place})
            except OSError as error:
                self.telemetry.event("results_not_written", state.step, problem=str(error))
                self.telemetry.say(f"{folder}: not written ({error}). Training goes on; metrics.jsonl has the figures.")
        return [("evaluation", _headline(suite, result)) for suite, result in results.items()]


@dataclass
class EvaluationHooks:
    """What a run measures of itself after a step, on its schedules.

    Attributes:
        max_share: see `sections.Evaluation`; validator, suites: None where there is nothing to measure.
        beat: the watchdog's; lockstep: that of validator and suites; clock: in seconds.
    """

    plan: Plan
    max_share: float | None
    validator: Validator | None
    suites: SuiteRunner | None
    telemetry: Telemetry
    beat: Beat
    lockstep: Lockstep
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._actions: dict[str, tuple[int, Callable[[TrainState], Records]]] = {}
        if self.validator is not None:
            self._actions["validation"] = (self.plan.evaluate_every, functools.partial(_validate, self.validator))
        if self.suites is not None:
            self._actions["suites"] = (self.plan.suites_every, functools.partial(self.suites.run, beat=self.beat))
        self._began = self.clock()
        self._spent = 0.0
        self._last: dict[str, float] = {}

    def run(self, state: TrainState, asked: Asked) -> Asked:
        """Measure what is due after `state.step` steps, unless the ranks are asked to stop. Collective.

        `state` keeps the best validation loss so far, and what was not measured because of a stop.

        Args:
            asked: what the ranks are asked to do before; returns what they are asked to do afterwards.

        Raises:
            RunError: on all ranks alike, if a validation loss after the last step is not finite.
        """
        return self._run(self._due(state.step), state, asked)

    def run_unfinished(self, state: TrainState) -> Asked:
        """Measure what the previous start did not measure because of a stop, if it is still due; see `run`."""
        due = [name for name in self._due(state.step) if name in state.unfinished]
        return self._run(due, state, Asked())

    def _due(self, step: int) -> list[str]:
        return [name for name, (every, _) in self._actions.items() if is_due(step, every, self.plan.steps)]

    def _run(self, due: list[str], state: TrainState, asked: Asked) -> Asked:
        for place, name in enumerate(due):
            if not asked.request.stops:
                asked = max(asked, self._measure(name, state))
            if asked.request.stops:
                state.unfinished = tuple(due[place:])
                self.telemetry.event("evaluation_broken_off", state.step, what=list(state.unfinished))
                self.telemetry.say(
                    f"Step {state.step}: {' and '.join(state.unfinished)} broken off by a request to stop; the next "
                    "start begins with it."
                )
                return asked
        state.unfinished = ()
        return asked

    def _measure(self, name: str, state: TrainState) -> Asked:
        """Measure one thing and record it; returns what broke it off, if anything did."""
        # A run is made for its final figures: these are measured whatever they cost.
        if state.step < self.plan.steps and not self._affordable(name, state.step):
            return Asked()
        self.beat(f"{name} after step {state.step}")
        began = self.clock()
        try:
            records = self.lockstep.run(lambda: self._actions[name][1](state))
        except BrokenOff as stopped:
            return stopped.asked
        except EvaluationFailed as failure:
            self.telemetry.event("evaluation_failed", state.step, what=name, problem=str(failure))
            self.telemetry.say(f"Step {state.step}: {name} failed ({failure}) and is left out; training goes on.")
            return Asked()
        ended = self.clock()
        self._last[name] = ended - began
        self._spent += ended - began
        share = self._spent / (ended - self._began) if ended > self._began else 0.0
        place = {"step": state.step, "tokens": state.tokens, "flops": state.flops}
        for kind, record in records:
            self.telemetry.record(kind, {**place, **record, "evaluation_share": share})
        for kind, record in records if state.step == self.plan.steps else ():
            if kind == "validation" and not math.isfinite(record["loss_causal"]):
                raise RunError(
                    f"The validation loss of the final weights is not finite ({record['source']}), so training has "
                    "diverged; lower optim.lr in a new run_dir."
                )
        return Asked()

    def _affordable(self, name: str, step: int) -> bool:
        """Whether evaluation stays under the cap (a share of the time since the start) at its last cost, by rank 0's
        clock.
        """
        cap = self.max_share
        if cap is None or name not in self._last:
            return True
        last = self._last[name]
        share = (self._spent + last) / (self.clock() - self._began + last)
        if on_first_rank(lambda: share <= cap):
            return True
        self.telemetry.event("evaluation_skipped", step, what=name, share=share, max_share=cap)
        self.telemetry.say(
            f"Step {step}: {name} left out; with it, evaluation would take {share:.1%} of the time "
            f"(evaluation.max_share is {cap:.1%})."
        )
        return False


def _validate(validator: Validator, state: TrainState) -> Records:
    records = validator.run()
    mean = sum(record["loss_causal"] for record in records) / len(records)
    if mean < (math.inf if state.best_validation is None else state.best_validation[0]):
        state.best_validation = (mean, state.step)
    return [("validation", record) for record in records]


def held_out_texts(recipe: Recipe) -> list[Path]:
    """Files of held-out documents that the recipe's suites read; none where no suite reads any.

    Raises:
        RunError: a data set has no such file.
    """
    suites = recipe.evaluation.suites
    if suites is None or not set(check_suites(suites.names)) & set(HELD_OUT_SUITES):
        return []
    return texts_of(Path(path) for path in [source.path for source in recipe.data.sources] or [str(recipe.data.path)])


def check_suites_of(recipe: Recipe) -> None:
    """Refuse suites that could not run, before anything is trained.

    Raises:
        UserError: a suite is unknown, or its questions, or the held-out text it reads, are not on this machine.
    """
    suites = recipe.evaluation.suites
    if suites is None:
        return
    names = check_suites(suites.names)
    if "own" in names:
        harness_tasks()
    held_out_texts(recipe)
    for name in [name for name in names if name not in HELD_OUT_SUITES]:
        plan = plan_tasks(benchmarks()[name], shared_evaluation_data(), hub=False)
        if not plan.local:
            raise RecipeError(
                f"evaluation.suites: {name} has no questions on this machine ({plan.skipped[0]['why']}); set "
                "MOR_SHARED_DATA to a folder with eval/, or drop the suite."
            )


def _headline(suite: str, result: dict[str, Any]) -> dict[str, Any]:
    """What metrics.jsonl keeps of a suite: its summary and the one figure that stands for it."""
    summary = result["tasks"].get(suite, {})
    primary = result["primary"] or {}
    return {
        "suite": suite,
        "routing": summary.get("routing", "causal"),
        "metric": primary.get("metric"),
        "value": primary.get("value"),
        "stderr": primary.get("stderr"),
        "n": summary.get("n", 0),
        **{name: summary.get(name, 0) for name in ("not_finite", "lost_bytes", "prompts_cut")},
        "metrics": summary.get("metrics", {}),
        "skipped": len(result["skipped"]),
        "seconds": result["seconds"],
    }
