"""The memory that a dry run promises, against what real tensors and real runs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.training_runs import GIVE_BACK
from mor_model import RecursiveTransformer
from pretrain.recipe.deepspeed_json import resolve_ds_config
from pretrain.recipe.recipe import Recipe, build_recipe
from pretrain.training.memory import estimate_memory, peak_of_passes
from pretrain.training.optimizer import build_optimizer
from tests.mor_model.live_memory import LiveBytes
from tests.pretrain.support import LENGTH, Job, make_dataset, metrics, recipe_values, tiny_model, write_recipe


def network_size(recipe: Recipe) -> int:
    return sum(parameter.numel() for parameter in RecursiveTransformer(recipe.network).parameters())


@pytest.mark.parametrize("gradients_stay", [False, True])
@pytest.mark.parametrize("variant", ["vanilla", "mor"])
@pytest.mark.parametrize("activation_checkpointing", ["none", "recursion", "layer"])
def test_the_passes_are_followed_to_the_byte(variant: str, activation_checkpointing: str, gradients_stay: bool) -> None:
    values = recipe_values(
        Path("data"), Path("run"), model=tiny_model(variant), activation_checkpointing=activation_checkpointing
    )
    recipe = build_recipe(values)
    model = RecursiveTransformer(recipe.network, recipe.activation_checkpointing)
    model.initialize(0)
    for parameter in model.parameters():
        if not gradients_stay:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    tokens = torch.zeros(recipe.batch.micro_batch, LENGTH, dtype=torch.long)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(tokens, tokens).loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak_of_passes(recipe)[gradients_stay] == pytest.approx(peak - 4 * network_size(recipe), rel=0.01)


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16", "fp16"])
def test_every_router_and_precision_is_followed(precision: str) -> None:
    def peak(**model: Any) -> int:
        values = recipe_values(Path("data"), Path("run"), model=tiny_model(**model), precision=precision)
        recipe = build_recipe({**values, "activation_checkpointing": "none"})
        return peak_of_passes(recipe).peak

    chosen, planned = peak(router={"kind": "token_choice"}), peak()
    # Both let a third of the tokens go at every step.
    assert chosen == pytest.approx(planned, rel=0.02)
    masked = peak(document_masking=True, kv_sharing="shared")
    assert 0.5 * planned < masked < 1.5 * planned


def test_one_micro_batch_a_step_holds_less_than_several() -> None:
    """Its gradients come while its activations go; when there are several, those of the first stay meanwhile."""

    def total(sequences: int, stage: str) -> int:
        batch = {"sequences": sequences, "micro_batch": 4, "sequence_length": LENGTH}
        recipe = build_recipe(recipe_values(Path("data"), Path("run"), deepspeed={"config": stage}, batch=batch))
        return estimate_memory(recipe, resolve_ds_config(recipe, 1), 1, on_cpu=False).total

    recipe = build_recipe(recipe_values(Path("data"), Path("run")))
    followed = peak_of_passes(recipe)
    assert followed.peak < followed.peak_with_gradients < followed.peak + 4 * network_size(recipe)
    assert total(4, "zero0") < total(8, "zero0") and total(4, "zero3") == total(8, "zero3")


def test_partitioning_divides_what_stays() -> None:
    def memory(stage: str, ranks: int, **changes: Any) -> Any:
        recipe = build_recipe(recipe_values(Path("data"), Path("run"), deepspeed={"config": stage}, **changes))
        return estimate_memory(recipe, resolve_ds_config(recipe, ranks), ranks, on_cpu=False)

    whole, quarter = memory("zero3", 1, precision="bf16"), memory("zero3", 4, precision="bf16")
    count = whole.weights // 2
    assert (whole.gradients, whole.optimizer, whole.update) == (4 * count, 12 * count, 4 * count)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(whole, name) == pytest.approx(4 * getattr(quarter, name), abs=50)
    two = memory("zero2", 4, precision="bf16")
    assert (two.weights, two.gradients) == (whole.weights, quarter.gradients)
    one = memory("zero1", 4, precision="bf16")
    assert (one.weights, one.gradients, one.optimizer) == (whole.weights, 2 * count, quarter.optimizer)
    offloaded = memory("zero3_offload_all", 4, precision="bf16")
    assert offloaded.weights == offloaded.gradients == offloaded.optimizer == 0 < offloaded.passes


@pytest.mark.parametrize("variant", ["vanilla", "mor"])
def test_muons_states_and_working_memory_are_those_of_the_optimiser(variant: str) -> None:
    """Stage 0, where an update allocates nothing but Muon's own: a real step, storage by storage."""
    optim = {"name": "muon", "lr": 0.01}
    stage = {"config": "zero0"}
    recipe = build_recipe(
        recipe_values(Path("data"), Path("run"), model=tiny_model(variant), optim=optim, deepspeed=stage)
    )
    model = RecursiveTransformer(recipe.network, recipe.activation_checkpointing)
    model.initialize(0)
    optimizer = build_optimizer(model, recipe.optim, offloaded=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    estimate = estimate_memory(recipe, resolve_ds_config(recipe, 2), 2, on_cpu=True)
    assert estimate.optimizer == sum(value.nbytes for value in states)
    with LiveBytes() as live:
        optimizer.step()
    assert estimate.update == pytest.approx(live.peak, rel=0.25)


def test_partitioned_muon_keeps_one_moment_of_its_matrices() -> None:
    """A fourth of master copies, momentum and, of what is not Muon's, a second moment; an update copies gradients to
    fp32 and adds another copy of Muon's.
    """
    values = recipe_values(Path("data"), Path("run"), precision="bf16", deepspeed={"config": "zero3"})
    adamw, muon = (build_recipe({**values, "optim": {"name": name}}) for name in ("adamw", "muon"))
    named = RecursiveTransformer(adamw.network).named_parameters()
    hidden = sum(p.numel() for n, p in named if ".attention." in n or ".feed_forward." in n)
    plain, other = (estimate_memory(recipe, resolve_ds_config(recipe, 4), 4, on_cpu=False) for recipe in (adamw, muon))
    assert 0 < hidden < network_size(adamw)
    assert plain.optimizer - other.optimizer == 4 * hidden // 4
    assert other.update > plain.update - 4 * (network_size(adamw) - hidden) // 4
    assert (other.weights, other.gradients, other.passes) == (plain.weights, plain.gradients, plain.passes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "layers", "stage", "precision", "ranks", "optimizer", "micro_batches"),
    [
        (512, 8, "zero3", "bf16", 1, "adamw", 2),
        (512, 8, "zero1", "bf16", 2, "adamw", 2),
        (512, 8, "zero0", "fp32", 1, "adamw", 2),
        (768, 11, "zero3", "fp32", 2, "adamw", 2),
        (512, 8, "zero0", "fp32", 1, "adamw", 1),
        (512, 8, "zero1", "bf16", 2, "adamw", 1),
        (512, 8, "zero0", "fp32", 1, "muon", 2),
        (512, 8, "zero1", "bf16", 2, "muon", 2),
        (512, 8, "zero3", "fp32", 2, "muon", 2),
    ],
)
def test_the_estimate_is_within_15_percent_of_a_run(
    tmp_path: Path, width: int, layers: int, stage: str, precision: str, ranks: int, optimizer: str, micro_batches: int
) -> None:
    """Peak resident memory of rank 0 over what it held before the network was built, where freed memory is given back
    at once, so that what is resident is what is alive.
    """
    model = tiny_model(
        "mor" if width == 768 else "vanilla",
        hidden_size=width,
        num_heads=8,
        num_kv_heads=8,
        intermediate_size=8 * width // 3,
        num_layers=layers,
        vocab_size=8192,
    )
    values = recipe_values(
        make_dataset(tmp_path / "data"),
        tmp_path / "run",
        model=model,
        precision=precision,
        deepspeed={"config": stage},
        optim={"name": optimizer},
        batch={"sequences": 2 * ranks * micro_batches, "micro_batch": 2, "sequence_length": LENGTH},
        budget={"steps": 2},
        schedule={"kind": "constant", "warmup": 0},
        checkpoint={"every": 0},
        evaluation={"every": 0, "sequences": 1},
    )
    codes, output, errors = Job(write_recipe(tmp_path / "r.yaml", values), ranks=ranks, extra=GIVE_BACK).wait(500)
    assert codes == [0] * ranks, output + errors
    before = metrics(tmp_path / "run", "event")[0]["memory_bytes"]
    measured = metrics(tmp_path / "run", "train")[-1]["memory_peak_bytes_per_rank"][0] - before
    recipe = build_recipe(values)
    estimate = estimate_memory(recipe, resolve_ds_config(recipe, ranks), ranks, on_cpu=True)
    assert estimate.total == pytest.approx(measured, rel=0.15), f"{estimate.total / measured:.3f}"
