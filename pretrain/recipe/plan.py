"""From a budget to steps: how long a run is, what it costs, where decay, branches, checkpoints and evaluations lie.

FLOPs are those of `mor_model.flops`: training FLOPs are three times the forward pass, every layer application counted
for its active tokens. A plan is a pure function of the recipe; only the names of data and tokenizer are added when data
is opened.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass
from typing import Any

from data_prep.reading.mixture import Phase
from mor_model.config import ExpertChoiceConfig, ModelConfig
from mor_model.flops import count_parameters, flops_per_sequence
from pretrain.errors import RecipeError
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schedules import BatchSize, LearningRate, Recursion
from pretrain.recipe.sections import MOST_STEPS, Amount, Source

# Weights that move do so in this many steps; a share then differs from the straight line by a thirty-second of the way.
_ANNEAL_PHASES = 16


@dataclass(frozen=True)
class Branch:
    """A smaller budget of the same run: leaves the trunk after `start` steps and decays until `steps`."""

    amount: float
    start: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its folder and recipe: `6e18`, without a plus sign, which names may not contain."""
        return f"{self.amount:g}".replace("e+", "e")


@dataclass(frozen=True)
class Plan:
    """One run in numbers.

    Attributes:
        steps: optimiser updates; sequence_length: T.
        flops_per_sequence: training FLOPs of one sequence at the configured capacities.
        training_flops, tokens: of the whole run, warm-ups included.
        checkpoint_every, keep_every, evaluate_every, suites_every: in steps; 0 is never.
        anneal: steps at the end over which the mixture's weights move; phases: steps at which they change.
    """

    steps: int
    sequence_length: int
    batch: BatchSize
    learning_rate: LearningRate
    recursion: Recursion
    flops_per_sequence: float
    training_flops: float
    tokens: int
    checkpoint_every: int
    keep_every: int
    evaluate_every: int
    suites_every: int
    anneal: int
    phases: tuple[int, ...]
    branches: tuple[Branch, ...]
    parameters: dict[str, int]

    @property
    def tokens_per_step(self) -> int:
        return self.batch.full * self.sequence_length

    @property
    def trunk_checkpoints(self) -> frozenset[int]:
        """Steps whose checkpoints are always written and kept: where branches leave, and where the final fall of a
        warm-up-stable-decay schedule begins, from where a larger budget could go on.
        """
        falls = {self.steps - self.learning_rate.decay} if self.learning_rate.decay else set()
        return frozenset({branch.start for branch in self.branches} | falls)

    def to_dict(self, data: dict[str, Any]) -> dict[str, Any]:
        """What plan.json holds; `data` adds tokenizer_fingerprint and data_manifest."""
        return {
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "sequence_length": self.sequence_length,
            "tokens": self.tokens,
            "flops_per_token_forward": self.flops_per_sequence / 3.0 / self.sequence_length,
            "training_flops": self.training_flops,
            "parameters": self.parameters,
            "warmup_steps": self.learning_rate.warmup,
            "decay_steps": self.learning_rate.decay,
            "checkpoint_every": self.checkpoint_every,
            "evaluate_every": self.evaluate_every,
            "suites_every": self.suites_every,
            "branches": [dataclasses.asdict(branch) for branch in self.branches],
            **data,
        }


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether `step` is a multiple of `every` (0: never) or the last of `steps`."""
    return step == steps or (every > 0 and step % every == 0)


def training_flops_of_sequence(config: ModelConfig, length: int, shares: tuple[float, ...] | None = None) -> float:
    """Training FLOPs of one sequence of `length` tokens; `shares` of them take each recursion step, rounded as by
    top-k.
    """
    if shares is None:
        return flops_per_sequence(config, length).training
    return flops_per_sequence(config, length, active=_active_tokens(length, shares)).training


def _active_tokens(length: int, shares: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(float(max(1, int(share * length))) if share else 0.0 for share in shares)


def make_plan(recipe: Recipe) -> Plan:
    """Derive the plan of a recipe.

    Raises:
        RecipeError: when the budget is too small for one step, or warm-up, decay and branches do not fit into it.
    """
    config = recipe.network
    routed = isinstance(config.router, ExpertChoiceConfig)
    per_sequence = training_flops_of_sequence(
        config, recipe.batch.sequence_length, config.capacities if routed else None
    )
    smallest = recipe.budget.branches[0] if recipe.budget.branches else recipe.budget.amount
    smallest_steps = _solve(recipe, config, per_sequence, smallest)[0]
    steps, batch, recursion = _solve(recipe, config, per_sequence, recipe.budget.amount)
    convert = _Converter(recipe, per_sequence)
    rate = _learning_rate(recipe, convert, steps, smallest_steps)
    branches = []
    for amount in recipe.budget.branches:
        length = _solve(recipe, config, per_sequence, amount)[0]
        decay = _learning_rate(recipe, convert, length, smallest_steps).decay
        branches.append(Branch(amount, length - decay, length))
        if convert(recipe.data.anneal, length) > decay or any(isinstance(s.start, float) for s in recipe.data.phases):
            raise RecipeError(
                f"budget.branches: {amount:g} would have other data before it leaves the trunk; make data.anneal as "
                "short as the decay, and give the start of data.phases in steps, tokens or FLOPs."
            )
    names = [branch.name for branch in branches]
    for name in {name for name in names if names.count(name) > 1}:
        raise RecipeError(
            f"budget.branches: two of them would both be called {name}; choose budgets that differ in their first six "
            "digits."
        )
    if branches and recipe.schedule.kind != "wsd":
        raise RecipeError(
            "budget.branches: only the wsd schedule can branch off a decay; set schedule.kind to wsd or drop the "
            "branches."
        )
    keep_every, suites = recipe.checkpoint.keep_every, recipe.evaluation.suites
    return Plan(
        steps=steps,
        sequence_length=recipe.batch.sequence_length,
        batch=batch,
        learning_rate=rate,
        recursion=recursion,
        flops_per_sequence=per_sequence,
        training_flops=_run_flops(config, recipe.batch.sequence_length, per_sequence, batch, recursion, steps),
        tokens=batch.before(steps) * recipe.batch.sequence_length,
        checkpoint_every=convert(recipe.checkpoint.every, steps),
        keep_every=0 if keep_every is None else convert(keep_every, steps),
        evaluate_every=convert(recipe.evaluation.every, steps),
        suites_every=0 if suites is None else convert(suites.every, steps),
        anneal=min(steps, convert(recipe.data.anneal, steps)),
        phases=_phases(recipe, convert, steps),
        branches=tuple(branches),
        parameters=dataclasses.asdict(count_parameters(config)),
    )


class _Converter:
    """Lengths of a recipe to steps."""

    def __init__(self, recipe: Recipe, flops_per_sequence: float) -> None:
        self._tokens = recipe.batch.sequences * recipe.batch.sequence_length
        self._flops = recipe.batch.sequences * flops_per_sequence

    def __call__(self, length: int | float | Amount, steps: int) -> int:
        if isinstance(length, Amount):
            amount = length.tokens / self._tokens if length.tokens is not None else (length.flops or 0.0) / self._flops
            return max(1, round(min(amount, MOST_STEPS)))
        if isinstance(length, float):
            return max(1, round(length * steps)) if length > 0 else 0
        return length


def _solve(recipe: Recipe, config: ModelConfig, per_sequence: float, amount: float) -> tuple[int, BatchSize, Recursion]:
    """Number of steps that comes nearest to `amount` of the budget's unit, and the warm-ups of a run of that length."""
    unit = recipe.budget.unit
    length = recipe.batch.sequence_length
    per_full_step = {
        "steps": 1.0,
        "tokens": recipe.batch.sequences * length,
        "flops": recipe.batch.sequences * per_sequence,
    }[unit]
    steps = _check_steps(recipe, round(amount / per_full_step))
    # Warm-ups may be shares of the run, whose length depends on what the warm-ups cost: a few rounds settle it.
    for _ in range(8):
        batch, recursion = _warmups(recipe, config, per_sequence, steps)
        if unit == "steps":
            return steps, batch, recursion
        warm = max(batch.warmup, recursion.warmup)
        if unit == "tokens":
            spent = float(batch.before(warm) * length)
        else:
            spent = _run_flops(config, length, per_sequence, batch, recursion, warm)
        solved = _check_steps(recipe, warm + round((amount - spent) / per_full_step))
        if solved == steps:
            break
        steps = solved
    if amount < 0.5 * per_full_step and recipe.batch.warmup_from is None:
        raise RecipeError(
            f"budget.{unit}: {amount:g} is less than half an optimiser step ({per_full_step:g} {unit}); raise it or "
            "shrink the batch."
        )
    return steps, batch, recursion


def _check_steps(recipe: Recipe, steps: int) -> int:
    if steps > MOST_STEPS:
        raise RecipeError(
            f"budget.{recipe.budget.unit}: would be {float(steps):.3g} steps, more than the {MOST_STEPS:,} that a run "
            "may have; lower it or enlarge the batch."
        )
    return max(1, steps)


def _warmups(recipe: Recipe, config: ModelConfig, per_sequence: float, steps: int) -> tuple[BatchSize, Recursion]:
    convert = _Converter(recipe, per_sequence)
    full, start = recipe.batch.sequences, recipe.batch.warmup_from
    batch = BatchSize(full, full)
    if start is not None:
        if full % start or (full // start) & (full // start - 1):
            raise RecipeError(f"batch.warmup_from: {start} must be sequences ({full}) halved a whole number of times.")
        batch = BatchSize(full, start, convert(recipe.batch.warmup, steps))
    recursion = Recursion(
        config.capacities,
        capacity_warmup=0 if recipe.capacity_warmup is None else convert(recipe.capacity_warmup.length, steps),
        depth_warmup=0 if recipe.depth_warmup is None else convert(recipe.depth_warmup.length, steps),
    )
    return batch, recursion


def _run_flops(
    config: ModelConfig, length: int, per_sequence: float, batch: BatchSize, recursion: Recursion, steps: int
) -> float:
    warm = min(steps, recursion.warmup)

    def work(step: int) -> tuple[int, tuple[float, ...]]:
        return batch.at(step), _active_tokens(length, recursion.active_at(step))

    total, first = 0.0, 0
    while first < warm:
        # The cost of a step only rises or only falls, so steps of equal cost are neighbours.
        sequences, active = here = work(first)
        end = bisect.bisect_left(range(warm), True, lo=first, key=lambda step: work(step) != here)
        total += (end - first) * sequences * flops_per_sequence(config, length, active=active).training
        first = end
    return total + (batch.before(steps) - batch.before(warm)) * per_sequence


def _phases(recipe: Recipe, convert: _Converter, steps: int) -> tuple[int, ...]:
    starts = [convert(phase.start, steps) for phase in recipe.data.phases]
    if starts != sorted(set(starts)) or (starts and starts[0] < 1):
        raise RecipeError(
            f"data.phases: begin at steps {', '.join(map(str, starts))}; they must ascend, the first after step 0, for "
            "which the sources' own weights stand."
        )
    return tuple(starts)


def _learning_rate(recipe: Recipe, convert: _Converter, steps: int, smallest_steps: int) -> LearningRate:
    schedule = recipe.schedule
    # All branches share one trunk, so their warm-up is that of the smallest budget (as in the paper).
    warmup = convert(schedule.warmup, smallest_steps)
    decay = convert(schedule.decay, steps) if schedule.kind == "wsd" else 0
    if warmup + decay > steps:
        raise RecipeError(
            f"schedule: warm-up ({warmup} steps) and decay ({decay} steps) do not fit into a run of {steps} steps; "
            "shorten them."
        )
    return LearningRate(schedule.kind, steps, warmup, decay, schedule.decay_shape, schedule.floor)


def data_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The sources of a recipe's data; a single data set is one source."""
    # The name decides the order of samples, so a single data set has one that does not change when its folder moves.
    return recipe.data.sources or (Source(path=str(recipe.data.path), name="data"),)


def weight_phases(recipe: Recipe, plan: Plan) -> list[Phase]:
    """The weights at the start, those of each phase, and where they anneal, a new set at every sixteenth of the way."""
    sources = data_sources(recipe)

    def weights(x: float) -> dict[str, float]:
        ends = {s.label: s.weight if s.final_weight is None else s.final_weight for s in sources}
        return {s.label: (1.0 - x) * s.weight + x * ends[s.label] for s in sources}

    phases = [Phase(0, weights(0.0))]
    phases += [Phase(plan.batch.before(step), phase.weights) for step, phase in zip(plan.phases, recipe.data.phases)]
    if plan.anneal and any(source.final_weight is not None for source in sources):
        total = plan.batch.before(plan.steps)
        begin = plan.batch.before(plan.steps - plan.anneal)
        for number in range(1, _ANNEAL_PHASES + 1):
            first = begin + (total - begin) * (number - 1) // _ANNEAL_PHASES
            if first > phases[-1].first_sample:
                phases.append(Phase(first, weights(number / _ANNEAL_PHASES)))
    return phases
