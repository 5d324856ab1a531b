"""From a budget to steps, checked by adding up what the steps cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mor_model.flops import flops_per_sequence
from pretrain.errors import RecipeError
from pretrain.recipe.plan import Plan, make_plan
from pretrain.recipe.recipe import build_recipe
from tests.fuzz.support import LIMIT_SECONDS, processor_time
from tests.pretrain.support import LENGTH, recipe_values, tiny_model


def plan_of(*overrides: str, **changes: Any) -> Plan:
    return make_plan(build_recipe(recipe_values(Path("data"), Path("run"), **changes), overrides))


@pytest.mark.parametrize("variant", ["vanilla", "recursive", "mor"])
def test_equal_budgets_cost_equal_flops(variant: str) -> None:
    plan = plan_of("budget.flops=1e11", "schedule.warmup=0.1", "schedule.decay=0.2", model=tiny_model(variant))
    assert plan.training_flops == pytest.approx(1e11, rel=0.5 * plan.training_flops / plan.steps / 1e11)
    recipe = build_recipe(recipe_values(Path("data"), Path("run"), model=tiny_model(variant)))
    # Capacities 1, 2/3, 1/3 of 32 tokens, rounded down as the router does.
    active = {"vanilla": [32.0], "recursive": [32.0] * 3, "mor": [32.0, 21.0, 10.0]}[variant]
    per_step = 8 * flops_per_sequence(recipe.network, LENGTH, active=active).training
    assert plan.training_flops == pytest.approx(plan.steps * per_step)


def test_a_budget_in_tokens_and_in_steps() -> None:
    plan = plan_of("budget.tokens=25600", "schedule.decay=0.2")
    assert (plan.steps, plan.tokens, plan.tokens_per_step) == (100, 25600, 256)
    assert plan.learning_rate.decay == 20
    assert plan_of("budget.steps=37").steps == 37


def test_lengths_become_steps() -> None:
    plan = plan_of(
        "budget.steps=100", "schedule.warmup={tokens: 2560}", "checkpoint.every=0.25", "evaluation.every=7",
        "checkpoint.keep_every={flops: 5.6e8}",
    )  # fmt: skip
    assert (plan.learning_rate.warmup, plan.checkpoint_every, plan.evaluate_every) == (10, 25, 7)
    assert plan.keep_every == 10
    assert plan_of("checkpoint.every=0").checkpoint_every == 0
    for every, steps in (("7", 7), ("0.25", 25), ("{tokens: 2560}", 10), ("{flops: 5.6e8}", 10)):
        plan = plan_of("budget.steps=100", f"evaluation.suites={{names: [own], every: {every}}}")
        assert plan.suites_every == steps
    assert plan_of().suites_every == 0


def test_warmups_are_paid_from_the_budget() -> None:
    """With a batch and a capacity warm-up, adding up every step's own cost still gives the budget."""
    plan = plan_of(
        "budget.flops=1e11",
        "batch.sequences=32",
        "batch.warmup_from=8",
        "batch.warmup=0.5",
        "capacity_warmup.length=0.5",
        "schedule.warmup=0.1",
        "schedule.decay=0.2",
    )
    config = build_recipe(recipe_values(Path("data"), Path("run"))).network
    total, sequences = 0.0, 0
    for step in range(plan.steps):
        capacities = plan.recursion.capacities_at(step) or config.capacities
        active = [float(max(1, int(capacity * LENGTH))) for capacity in capacities]
        total += plan.batch.at(step) * flops_per_sequence(config, LENGTH, active=active).training
        sequences += plan.batch.at(step)
    assert plan.training_flops == pytest.approx(total)
    assert plan.tokens == sequences * LENGTH
    assert total == pytest.approx(1e11, rel=0.02)
    assert plan.batch.at(0) == 8 and plan.batch.at(plan.steps - 1) == 32


@pytest.mark.parametrize("router", [{"kind": "expert_choice"}, {"kind": "token_choice"}, None])
def test_a_depth_that_grows_costs_what_its_steps_cost(router: dict[str, str] | None) -> None:
    """One step, then two, then what the router leaves: 3 recursions, so the warm-up has two stages."""
    changed = ("budget.flops=1e10", "depth_warmup.length=0.5", f"model.router={router if router else 'null'}")
    plan = plan_of(*changed)
    config = build_recipe(recipe_values(Path("data"), Path("run")), changed).network
    length = plan.recursion.depth_warmup
    assert length == pytest.approx(plan.steps / 2, abs=2)
    depths = [plan.recursion.depth_at(step) for step in range(plan.steps)]
    assert depths == [1 if 2 * s < length else 2 if s < length else None for s in range(plan.steps)]
    total = 0.0
    for step, depth in enumerate(depths):
        active = {1: [LENGTH, 0, 0], 2: [LENGTH, LENGTH, 0]}.get(depth)
        if active is None:
            chosen = router is not None and router["kind"] == "expert_choice"
            active = [max(1, int(c * LENGTH)) if chosen else c * LENGTH for c in config.capacities]
        total += plan.batch.at(step) * flops_per_sequence(config, LENGTH, active=active).training
    assert plan.training_flops == pytest.approx(total) == pytest.approx(1e10, rel=0.02)


def test_branches_share_the_trunk_and_decay_on_their_own() -> None:
    plan = plan_of("budget.steps=1000", "budget.branches=[100, 400]", "schedule.warmup=0.1", "schedule.decay=0.2")
    assert plan.learning_rate.warmup == 10, "a tenth of the smallest budget"
    assert [(b.start, b.steps) for b in plan.branches] == [(80, 100), (320, 400)]
    with pytest.raises(RecipeError, match="branches"):
        plan_of("budget.steps=1000", "budget.branches=[100]", "schedule.kind=cosine")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="do not fit"):
        plan_of("budget.steps=5")
    with pytest.raises(RecipeError, match="less than half an optimiser step"):
        plan_of("budget.flops=1")
    with pytest.raises(RecipeError, match="warmup_from"):
        plan_of("batch.sequences=24", "batch.warmup_from=8", "batch.warmup=4")


def test_a_warmup_of_half_a_billion_steps_is_added_up_at_once() -> None:
    def plan(steps: int) -> Plan:
        warmups = ("batch.warmup_from=2", "batch.warmup=0.5", "capacity_warmup.length=0.5")
        return plan_of(f"budget.steps={steps}", *warmups, "schedule.warmup=0.1", "schedule.decay=0.2")

    with processor_time(LIMIT_SECONDS):
        largest = plan(10**9)
    # The same shares of a run a million times shorter, whose steps can be looked at one by one.
    small = plan(1000)
    assert largest.training_flops == pytest.approx(1e6 * small.training_flops, rel=0.01)
    assert largest.tokens == pytest.approx(1e6 * small.tokens, rel=0.01)
    assert small.tokens == sum(small.batch.at(step) for step in range(1000)) * LENGTH


@pytest.mark.parametrize("budget", ["budget.flops=1e30", "budget.tokens=1e30", "budget.steps=1e10"])
def test_more_steps_than_a_run_may_have_are_refused(budget: str) -> None:
    with pytest.raises(RecipeError, match=r"budget\.(flops|tokens|steps): .*1,?000,?000,?000"):
        plan_of(budget)


def test_branches_that_would_share_a_folder_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"budget\.branches: .*both be called 1e10"):
        plan_of("budget.flops=1e11", "budget.branches=[1.0000001e10, 1.0000002e10]")
