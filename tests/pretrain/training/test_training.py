"""The loop under DeepSpeed against plain PyTorch, and what it leaves in the run folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor_model import RecursiveTransformer
from mor_model.flops import flops_per_sequence
from mor_model.weights import load_model, save_weights
from pretrain.errors import RecipeError
from pretrain.ranks.environment import Ranks
from pretrain.recipe.recipe import build_recipe, load_recipe
from pretrain.training.prepare import prepare
from tests.data_prep.support import EOD
from tests.ports import free_port
from tests.pretrain.reference import plain_losses
from tests.pretrain.support import (
    LENGTH,
    VOCABULARY,
    Workers,
    environment,
    losses,
    metrics,
    recipe_values,
    tiny_model,
    train,
    write_recipe,
)

# A bucket smaller than one matrix: shared layers are then reduced in pieces, once per recursion step.
TINY_BUCKETS = {"stage": 3, "reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0}


def with_stage(tmp_path: Path, stage: int, **settings: Any) -> dict[str, Any]:
    file = tmp_path / f"stage{stage}.json"
    zero = {"stage": stage, **settings} if stage else {"stage": 0}
    file.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    return {"config": str(file)}


def compare(run: Path, values: dict[str, Any], tolerance: float = 1e-5) -> None:
    expected, norms, weights = plain_losses(values)
    records = metrics(run, "train")
    assert [record["loss"] for record in records] == pytest.approx(expected, abs=tolerance)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-3, abs=tolerance)
    trained = load_file(run / "weights" / "model.safetensors")
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, weights[name].to(tensor.dtype), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("variant", "activation_checkpointing", "micro_batch"),
    [
        pytest.param("vanilla", "none", 4, marks=pytest.mark.slow),
        ("recursive", "recursion", 2),
        pytest.param("mor", "recursion", 1, marks=pytest.mark.slow),
        ("mor", "none", 4),
    ],
)
def test_two_ranks_of_zero3_train_like_one_plain_process(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, variant: str, activation_checkpointing: str, micro_batch: int
) -> None:
    values = recipe_values(
        tiny_data,
        tmp_path / "run",
        model=tiny_model(variant),
        activation_checkpointing=activation_checkpointing,
        batch={"sequences": 8, "micro_batch": micro_batch, "sequence_length": LENGTH},
        deepspeed=with_stage(tmp_path, 3, **{k: v for k, v in TINY_BUCKETS.items() if k != "stage"}),
    )
    compare(two_ranks.train(tmp_path, values), values)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_train_like_one_plain_process(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: int
) -> None:
    model = tiny_model(router={"kind": "token_choice", "balance": "loss"})
    values = recipe_values(tiny_data, tmp_path / "run", model=model, deepspeed=with_stage(tmp_path, stage))
    compare(two_ranks.train(tmp_path, values), values)


@pytest.mark.parametrize(
    ("stage", "model"),
    [(3, tiny_model()), (2, tiny_model("recursive", sharing="middle_sequence")), (0, tiny_model("recursive"))],
)
def test_depth_grows_on_all_ranks_alike(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: int, model: dict[str, Any]
) -> None:
    """While depth is small, routers (and in a sequence the later layers) take no part and get no gradient."""
    values = recipe_values(
        tiny_data,
        tmp_path / "run",
        model=model,
        depth_warmup={"length": 6},
        budget={"steps": 9},
        deepspeed=with_stage(tmp_path, stage),
    )
    run = two_ranks.train(tmp_path, values)
    compare(run, values)
    active = [record["active"] for record in metrics(run, "train")]
    assert active[:6] == [[1.0, 0.0, 0.0]] * 3 + [[1.0, 1.0, 0.0]] * 3
    assert all(share > 0 for share in active[6])


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_a_growing_batch_is_averaged_over_what_it_has(
    tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: int
) -> None:
    """Three updates each of 1 and 2 micro-batches a rank, then of 4: every gradient is the mean of its own batch."""
    batch = {"sequences": 16, "micro_batch": 2, "sequence_length": LENGTH, "warmup_from": 4, "warmup": 6}
    values = recipe_values(tiny_data, tmp_path / "run", batch=batch, deepspeed=with_stage(tmp_path, stage))
    run = two_ranks.train(tmp_path, values)
    compare(run, values)
    sizes = [4, 4, 4, 8, 8, 8, 16]
    assert [record["tokens"] for record in metrics(run, "train")][:7] == [sum(sizes[:n]) * LENGTH for n in range(1, 8)]


@pytest.mark.parametrize("stage", [0, 3])
def test_training_starts_from_given_weights(tmp_path: Path, tiny_data: Path, two_ranks: Workers, stage: int) -> None:
    """Weights drawn with the recipe's seed and given as a folder train like those the run draws itself."""
    values = recipe_values(tiny_data, tmp_path / "drawn", deepspeed=with_stage(tmp_path, stage), budget={"steps": 7})
    recipe = build_recipe(values)
    for folder, seed in (("same", recipe.seed), ("other", recipe.seed + 1)):
        model = RecursiveTransformer(recipe.network)
        model.initialize(seed)
        save_weights(tmp_path / folder, model.state_dict(), recipe.network)
    drawn = losses(two_ranks.train(tmp_path, values))
    given = {**values, "run_dir": str(tmp_path / "given"), "initial_weights": str(tmp_path / "same")}
    assert losses(two_ranks.train(tmp_path, given)) == drawn
    different = {**values, "run_dir": str(tmp_path / "third"), "initial_weights": str(tmp_path / "other")}
    assert losses(two_ranks.train(tmp_path, different)) != drawn


def test_weights_of_another_network_are_refused_before_training(tmp_path: Path, tiny_data: Path) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", initial_weights=str(tmp_path / "weights"))
    other = build_recipe(recipe_values(tiny_data, tmp_path / "run", model=tiny_model(rope_theta=5e5))).network
    model = RecursiveTransformer(other)
    model.initialize(0)
    save_weights(tmp_path / "weights", model.state_dict(), other)
    alone = Ranks(0, 1, 0, 1, 0, "127.0.0.1", 29500, "python")
    with pytest.raises(RecipeError, match=r"initial_weights: model\.rope_theta"):
        prepare(build_recipe(values), alone)
    with pytest.raises(RecipeError, match=r"initial_weights: .*missing"):
        prepare(build_recipe({**values, "initial_weights": str(tmp_path / "none")}), alone)


def test_one_rank_and_bf16(tmp_path: Path, tiny_data: Path, one_rank: Workers, two_ranks: Workers) -> None:
    """One rank equals plain PyTorch; bf16 with fp32 master weights stays near, alike on one and two ranks."""
    values = recipe_values(tiny_data, tmp_path / "one")
    compare(one_rank.train(tmp_path, values), values)
    half = recipe_values(tiny_data, tmp_path / "half", precision="bf16")
    run = two_ranks.train(tmp_path, half)
    expected = plain_losses(values)[0]
    assert list(losses(run).values()) == pytest.approx(expected, abs=0.03)
    again = one_rank.train(tmp_path, {**half, "run_dir": str(tmp_path / "again")})
    assert list(losses(again).values()) == pytest.approx(list(losses(run).values()), abs=0.02)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, two_ranks: Workers) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return two_ranks.train(folder, recipe_values(tiny_data, folder / "run"))


def test_the_run_folder_holds_what_others_read(finished: Path, tiny_data: Path) -> None:
    plan = json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    assert plan["steps"] == 12 and plan["tokens_per_step"] == 8 * LENGTH and plan["sequence_length"] == LENGTH
    assert plan["tokenizer_fingerprint"] == "f" * 64
    recipe = load_recipe(finished / "recipe.yaml")
    config = recipe.network
    assert json.loads((finished / "model.json").read_text(encoding="utf-8")) == config.to_dict()
    assert json.loads((finished / "status.json").read_text(encoding="utf-8")) == {
        "state": "finished",
        "step": 12,
        "steps": 12,
    }
    found = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert found["world_size"] == 2 and found["zero_stage"] == 3 and found["precision"] == "fp32"
    assert json.loads((finished / "tokenizer" / "tiktoken.json").read_text()) == {"name": "made-up"}
    # The data set's tokenizer lies among its shards: none of them is copied.
    assert {file.name for file in (finished / "tokenizer").iterdir()} == {"tiktoken.json", "tokenizer_config.json"}
    model = load_model(finished / "weights")
    assert sum(p.numel() for p in model.parameters()) == plan["parameters"]["total_stored"]
    assert not list(finished.rglob("*.tmp")) and not list(finished.rglob("*.writing"))


def test_training_records_are_complete_and_add_up(finished: Path) -> None:
    records = metrics(finished, "train")
    config = load_recipe(finished / "recipe.yaml").network
    active = [32.0, 21.0, 10.0]  # 1, 2/3 and 1/3 of 32 tokens, rounded down
    per_step = 8 * flops_per_sequence(config, LENGTH, active=active).training
    for number, record in enumerate(records, 1):
        assert record["step"] == number and record["tokens"] == number * 8 * LENGTH
        assert record["active"] == pytest.approx([a / LENGTH for a in active])
        assert record["flops"] == pytest.approx(number * per_step)
        assert record["flops_planned"] == pytest.approx(number * per_step)
        assert record["loss"] == pytest.approx(record["lm_loss"] + sum(record["aux"].values()), abs=1e-6)
        assert record["lr"] == pytest.approx(0.01 * min(1.0, number / 2, (13 - number) / 4))
        assert len(record["memory_peak_bytes_per_rank"]) == 2
        assert record["memory_peak_bytes"] == max(record["memory_peak_bytes_per_rank"]) > 1e8
        assert sum(record["parts"].values()) <= record["step_seconds"] * 1.05
        assert set(record["parts"]) == {"data", "forward", "backward", "optimizer", "communication"}
        for name in ("tokens_per_second", "sampling_accuracy", "dead_share", "router_entropy", "gate_mean", "gate_std"):
            assert record[name] >= 0
        assert record["samples"] == {"data": 8 * number}
    assert records[-1]["loss"] < records[0]["loss"] - 0.5, "it learns"


def test_validation_is_the_mean_over_the_same_sequences(finished: Path, tiny_data: Path) -> None:
    """The last record against the exported weights, sequence by sequence."""
    from data_prep.reading.dataset import open_dataset

    model = load_model(finished / "weights")
    records = metrics(finished, "validation")
    assert [(r["step"], r["source"]) for r in records] == [(6, "a"), (6, "b"), (12, "a"), (12, "b")]
    for record in records[2:]:
        data = open_dataset(tiny_data, "validation").only(record["source"])
        count = data.num_sequences(LENGTH)
        chosen = [place * count // 6 for place in range(6)]
        for routing in ("causal", "topk"):
            each = []
            for index in chosen:
                tokens = torch.from_numpy(data.sequence(index, LENGTH).astype("int64"))[None]
                with torch.no_grad():
                    each.append(float(model(tokens[:, :-1], tokens[:, 1:], routing=routing).lm_loss))
            assert record[f"loss_{routing}"] == pytest.approx(sum(each) / 6, abs=1e-5)
        assert record["tokens_evaluated"] == 6 * LENGTH and record["routing_default"] == "causal"


def test_a_finished_run_is_left_alone(finished: Path, two_ranks: Workers) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    code, printed = two_ranks.run("--config", str(finished / "recipe.yaml"))
    assert code == 0 and "already finished" in printed and "Nothing to do" in printed
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before


def test_the_folder_of_another_recipe_is_refused(finished: Path, one_rank: Workers, tmp_path: Path) -> None:
    code, printed = one_rank.run("--config", str(finished / "recipe.yaml"), "optim.lr=0.5")
    assert code == 2 and "optim.lr" in printed and "0.01" in printed and printed.count("\n") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine", encoding="utf-8")
    code, printed = one_rank.run("--config", str(finished / "recipe.yaml"), f"run_dir={tmp_path / 'other'}")
    assert code == 2 and "not empty" in printed


def test_document_masks_reach_the_network(tmp_path: Path, tiny_data: Path, two_ranks: Workers) -> None:
    """With masks the first step's loss is that of each document alone."""
    model = tiny_model("vanilla", document_masking=True, reset_positions=True)
    values = recipe_values(tiny_data, tmp_path / "run", model=model, budget={"steps": 6}, seed=3)
    run = two_ranks.train(tmp_path, values)
    from data_prep.reading.dataset import open_dataset
    from data_prep.reading.mixture import Mixture, MixtureSource, Phase
    from mor_model import RecursiveTransformer

    network = RecursiveTransformer(build_recipe({**values, "model": tiny_model("vanilla")}).network)
    network.initialize(3)
    data = Mixture([MixtureSource("data", open_dataset(tiny_data))], LENGTH, [Phase(0, {"data": 1.0})], 3)
    total, count = 0.0, 0
    for row in data.batch(0, 8).astype("int64").tolist():
        start = 0
        for end in range(1, LENGTH + 1):
            if row[end - 1] == EOD or end == LENGTH:
                tokens = torch.tensor([row[start : end + 1]])
                loss = network(tokens[:, :-1], tokens[:, 1:]).lm_loss
                total, count = total + float(loss) * (end - start), count + end - start
                start = end
    assert count == 8 * LENGTH
    assert losses(run)[1] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(
    "launcher",
    ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow), pytest.param("mor", marks=pytest.mark.slow)],
)
def test_every_way_of_starting_gives_the_same_run(
    tmp_path: Path, tiny_data: Path, finished: Path, launcher: str
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", recipe_values(tiny_data, tmp_path / "run"))
    scripts = Path(sys.executable).parent
    script = [str(Path(__file__).parents[3] / "pretrain" / "train.py"), "--config", str(recipe)]
    command = {
        "deepspeed": [str(scripts / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), *script],
        "torchrun": [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", *script],
        "mor": [str(scripts / "mor"), "train", str(recipe)],
    }[launcher]
    variables = {**environment(), "PATH": f"{scripts}:{environment()['PATH']}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = losses(tmp_path / "run"), losses(finished)
    if launcher == "mor":  # one rank adds up in another order
        assert mine == pytest.approx(theirs, abs=1e-5)
    else:
        assert mine == theirs


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    values = recipe_values(tiny_data, tmp_path / "run", model=tiny_model(vocab_size=VOCABULARY - 1))
    printed = train(write_recipe(tmp_path / "r.yaml", values), expect=2)
    assert "model.vocab_size" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_every_other_network_starts_too(tmp_path: Path, tiny_data: Path, one_rank: Workers) -> None:
    """Options of the recipe together: warm-ups, mixture, annealing, TensorBoard and offline wandb."""
    values = recipe_values(
        tiny_data,
        tmp_path / "run",
        model=tiny_model(),
        data={
            "sources": [
                {"path": str(tiny_data), "name": "one", "weight": 3.0},
                {"path": str(tiny_data), "name": "two", "weight": 1.0, "final_weight": 9.0},
            ],
            "anneal": 0.5,
        },
        batch={"sequences": 8, "micro_batch": 2, "sequence_length": 32, "warmup_from": 2, "warmup": 6},
        capacity_warmup={"length": 6},
        logging={"every": 1, "tensorboard": True, "wandb": "offline"},
    )
    run = one_rank.train(tmp_path, values)
    records = metrics(run, "train")
    # Three steps each of 2 and 4 sequences, then 8.
    assert [record["tokens"] // 32 for record in records] == [2, 4, 6, 10, 14, 18, 26, 34, 42, 50, 58, 66]
    assert [record["active"][2] for record in records][:2] == pytest.approx([1.0, 0.9375], abs=0.02)
    assert records[-1]["active"] == pytest.approx([1.0, 21 / 32, 10 / 32])
    assert sum(records[-1]["samples"].values()) == 66
    assert records[5]["samples"]["one"] == pytest.approx(13.5, abs=2)
    assert records[-1]["samples"]["two"] > 15
    assert list((run / "tensorboard").glob("events.*")) and list((run / "wandb").glob("offline-run-*"))
    assert {r["source"] for r in metrics(run, "validation")} == {"one/a", "one/b"}
