"""Chains of jobs as they would be submitted, clusters.yaml, time limits and refusals; no Slurm needed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.errors import DataError
from pretrain.cluster.clusters import EXAMPLE, Cluster, load_cluster, time_limit_seconds
from pretrain.cluster.submit import job_environment, plan_experiment, plan_recipe, slurm_options, submit
from pretrain.errors import LaunchError, RecipeError, RunError, UserError
from pretrain.evaluation.held_out import TEST_FILE
from pretrain.ranks.environment import clean_environment
from tests.pretrain.support import make_dataset, recipe_values, tiny_model, write_recipe
from tests.slurm.corpus import finished, write_experiment, write_whole_experiment


@pytest.fixture
def recipe(tmp_path) -> Path:
    data = make_dataset(tmp_path / "data")
    (data / TEST_FILE).parent.mkdir()
    (data / TEST_FILE).touch()
    values = recipe_values(data, tmp_path / "run", model=tiny_model("vanilla"))
    return write_recipe(tmp_path / "tiny.yaml", values)


@pytest.fixture
def clusters(tmp_path, monkeypatch):
    file = tmp_path / "clusters.yaml"
    monkeypatch.setenv("MOR_CLUSTERS", str(file))
    return file


def test_a_recipe_is_trained_and_then_evaluated(recipe):
    cluster = Cluster(nodes=2, gpus_per_node=2, partition="gpu", time="24:00:00", options=("--mail-type=END",))
    train, evaluate = plan_recipe(str(recipe), ["optim.lr=0.02"], cluster, ["perplexity"])
    command = train.command({})
    assert command[:2] == ["sbatch", "--parsable"]
    asked = {"--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--partition=gpu", "--time=24:00:00"}
    assert asked | {"--mail-type=END"} <= set(command)
    assert command[-2:] == [str(recipe), "optim.lr=0.02"]
    following = evaluate.command({"tiny": "17"})
    assert "--dependency=afterok:17" in following and "--nodes=1" in following
    assert following[-1] == "--suite=perplexity"
    # Where requeueing is forbidden, training is a chain.
    train, evaluate = plan_recipe(str(recipe), [], Cluster(requeue=False, chain=5), None)
    assert {"--no-requeue", "--array=1-5%1"} <= set(train.command({}))
    assert "--dependency=afterany:17" in evaluate.command({"tiny": "17"})


def test_what_cannot_run_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"batch\.sequences: 8 is not micro_batch \(2\) x 8 ranks"):
        plan_recipe(str(recipe), [], Cluster(nodes=4, gpus_per_node=2), None)
    with pytest.raises(UserError, match="did you mean 'perplexity'"):
        plan_recipe(str(recipe), [], Cluster(), ["perplexty"])
    (recipe.parent / "data" / TEST_FILE).unlink()
    plan_recipe(str(recipe), [], Cluster(), ["blimp"])
    with pytest.raises(RecipeError, match="missing, and perplexity, own, routing are evaluated"):
        plan_recipe(str(recipe), [], Cluster(), None)
    shard = next(recipe.parent.glob("data/train-*.bin"))
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        plan_recipe(str(recipe), [], Cluster(), None)


def test_the_stage_may_be_left_to_the_nodes(recipe):
    train, _ = plan_recipe(str(recipe), ["deepspeed.config=auto"], Cluster(nodes=2, gpus_per_node=2), None)
    assert train.arguments == (str(recipe), "deepspeed.config=auto")
    # Stage 0 keeps no fp32 weights for bf16; Muon with a universal checkpoint is possible at no stage.
    plan_recipe(str(recipe), ["deepspeed.config=auto", "precision=bf16"], Cluster(), None)
    impossible = ["deepspeed.config=auto", "optim.name=muon", "checkpoint.universal=true"]
    with pytest.raises(RecipeError, match=r"checkpoint\.universal"):
        plan_recipe(str(recipe), impossible, Cluster(), None)


def test_a_folder_with_another_run_is_refused_before_the_queue(recipe):
    run = recipe.parent / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text())
    plan_recipe(str(recipe), ["budget.steps=24", "logging.every=9"], Cluster(), None)
    with pytest.raises(RunError, match="holds a run with seed = 7, but the recipe now says 8"):
        plan_recipe(str(recipe), ["seed=8"], Cluster(), None)


def test_an_experiment_is_evaluated_as_compare_run_does(tmp_path):
    file = write_experiment(tmp_path / "experiment.yaml", tmp_path / "runs", tmp_path / "data")
    values = yaml.safe_load(file.read_text())
    values["base"]["model"]["vocab_size"] = 300
    values["arms"] = {"vanilla": {}}
    values["evaluation"] = {"suites": ["perplexity", "lambada", "routing"], "limit": 5, "text_bytes": 900, "hub": True}
    file.write_text(yaml.safe_dump(values))
    steps = plan_experiment(str(file), [], Cluster(), None, 0)
    expected = ["tiny-prepare", "tiny-vanilla", "tiny-vanilla-eval-1", "tiny-vanilla-eval-2", "tiny-report"]
    assert [step.name for step in steps] == expected
    run = str(tmp_path / "runs" / "vanilla")
    # The limit is one of questions: texts are read whole.
    assert steps[2].arguments == (run, "--suite=perplexity", "--suite=routing", "--text-bytes=900", "--hub")
    assert steps[3].arguments == (run, "--suite=lambada", "--limit=5", "--text-bytes=900", "--hub")
    assert {name for _, name in steps[4].after} == {"tiny-vanilla-eval-1", "tiny-vanilla-eval-2"}


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> None:
    """An `sbatch` that accepts every job as number 17."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")


def test_without_slurm_or_a_place_for_logs_nothing_is_submitted(recipe, sbatch, monkeypatch):
    steps = plan_recipe(str(recipe), [f"run_dir={recipe}/below/a/file"], Cluster(), None)
    with pytest.raises(RunError, match=r"file\.logs: cannot be written"):
        submit(steps, Cluster(), dry_run=False, say=pytest.fail)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="--local"):
        submit(steps, Cluster(), dry_run=False, say=pytest.fail)


def test_a_job_that_cannot_be_remembered_is_submitted_all_the_same(recipe, sbatch, monkeypatch):
    monkeypatch.setenv("MOR_JOBS", str(recipe / "jobs.jsonl"))  # below a file
    said: list[str] = []
    numbers = submit(plan_recipe(str(recipe), [], Cluster(), None), Cluster(), dry_run=False, say=said.append)
    assert set(numbers.values()) == {"17"}
    assert "is submitted, but mor jobs will not know it" in said[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("unlimited", math.inf)],
)
def test_time_limits_as_slurm_reads_them(clusters, text, seconds):
    assert time_limit_seconds(text) == seconds
    # From a file too, where YAML reads some of them as numbers.
    clusters.write_text(f"clusters: {{a: {{time: {text}}}}}")
    assert load_cluster("a").time == text


@pytest.mark.parametrize("text", ["tomorrow", "1:2:3:4", "-5", "1-x", "9" * 5000, "1\n", "\u0661", "5:00", "9"])
def test_what_is_no_time_limit_or_too_short_is_refused(text):
    with pytest.raises(LaunchError, match=r"^time: (is not a time limit|give at least 10 minutes)"):
        load_cluster(time=text)


def test_the_command_line_takes_precedence(clusters):
    clusters.write_text(
        "default: juno\nclusters:\n  juno: {partition: gpu, nodes: 4, gpus_per_node: 8, time: 24:00:00,\n"
        "         environment: {NCCL_DEBUG: 1, http_proxy: ''}}\n  small: {}\n"
    )
    cluster = load_cluster("default", nodes=2, account="nlp", qos=None, partition="")
    assert (cluster.nodes, cluster.account, cluster.time) == (2, "nlp", "24:00:00")
    assert cluster.environment == {"NCCL_DEBUG": "1", "http_proxy": ""} and cluster.ranks == 16
    options = slurm_options(cluster, nodes=2, gpus=cluster.gpus_per_node, tasks=None)
    assert options == ("--nodes=2", "--gpus-per-node=8", "--account=nlp", "--time=24:00:00")
    assert load_cluster("small").gpus_per_node is None


def test_a_cluster_reaches_the_jobs_as_variables(monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "of somebody's shell")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as it is set on a login node without GPUs
    cluster = Cluster(
        setup="module load cuda", container="mor.sif", launcher="deepspeed", health="exclude", environment={"NCCL": "1"}
    )
    environ = job_environment(cluster)
    wanted = {"MOR_SETUP": "module load cuda", "MOR_CONTAINER": "mor.sif", "MOR_LAUNCHER": "deepspeed"}
    assert {**wanted, "MOR_HEALTH": "exclude", "NCCL": "1"}.items() <= environ.items()
    assert not {"SBATCH_ACCOUNT", "DS_ACCELERATOR"} & set(environ)
    assert "MOR_CONTAINER" not in job_environment(Cluster())


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("clusters: {a: {partitoin: gpu}}", "a", "did you mean 'clusters.a.partition'"),
        ("clusters: {a: {}}", "b", "no cluster 'b'"),
        ("clusters: [", "a", "YAML"),
        ("clusters: {a: {nodes: true}}", "a", r"clusters\.a\.nodes: must be a whole number \(given: True\)"),
        ("clusters: {a: {time: true}}", "a", r"clusters\.a\.time"),
        ("clusters: {a: {environment: {A: yes}}}", "a", "variable A is True; write its value as text"),
        ("clusters: {a: {environment: {A=B: x}}}", "a", "variable 'A=B' has a name that no shell accepts"),
        ('clusters: {a: {options: ["--x=\\e[2J"]}}', "a", "holds control characters"),
        ("- a", "a", r"clusters\.yaml: must be a section with keys of its own"),
        ("default: a", "a", "'clusters' is missing"),
        ("clusters: {a: {}, a: {}}", "a", "stands twice"),
        (None, "juno", r"clusters\.yaml: no cluster 'juno'; it describes none"),
    ],
)
def test_clusters_that_cannot_be_used(clusters, content, name, message):
    if content is not None:
        clusters.write_text(content)
    with pytest.raises(LaunchError, match=message):
        load_cluster(name)


def test_the_example_can_be_used(monkeypatch):
    monkeypatch.setenv("MOR_CLUSTERS", str(EXAMPLE))
    assert load_cluster().ranks == 32 and load_cluster().time == "24:00:00"
    shown = load_cluster("juno").model_fields_set | load_cluster("containers").model_fields_set
    assert shown == set(Cluster.model_fields) - {"tasks_per_node"}, "the example shows every key"


@pytest.mark.slow
def test_the_same_chain_without_slurm(tmp_path):
    file, folder = write_whole_experiment(tmp_path, "alone")
    command = [sys.executable, "-m", "pretrain.cli.main", "submit", str(file), "--local", "--tasks-per-node=2"]
    environ = {**clean_environment(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(folder) == ["mor", "vanilla"]
    assert json.loads((folder / "mor" / "environment.json").read_text())["world_size"] == 2
    table = (folder / "report" / "report.csv").read_text()
    assert "perplexity" in table and "mor" in table
