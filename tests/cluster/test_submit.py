"""Chains of jobs as they would be submitted, profiles, limits and refusals; no Slurm needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.errors import DataError
from pretrain.cluster.jobs import view_jobs
from pretrain.cluster.profiles import EXAMPLE, Profile, load_profile
from pretrain.cluster.records import Record, remember, remembered
from pretrain.cluster.restarts import STARTS_WITHOUT_PROGRESS, note_start, reached_step
from pretrain.cluster.submit import check_time, job_environment, plan_recipe, submit, time_limit_seconds
from pretrain.environment import clean_environment
from pretrain.errors import LaunchError, RecipeError, UserError
from pretrain.evaluation.held_out import TEST_FILE
from tests.pretrain.support import make_dataset, recipe_values, tiny_model, write_recipe
from tests.slurm.corpus import prep_arguments, write_text_files


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
    profile = Profile(nodes=2, gpus_per_node=2, partition="gpu", time="24:00:00", options=("--mail-type=END",))
    train, evaluate = plan_recipe(str(recipe), ["optim.lr=0.02"], profile, ["perplexity"])
    command = train.command({})
    assert command[:2] == ["sbatch", "--parsable"]
    asked = {"--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--partition=gpu", "--time=24:00:00"}
    assert asked | {"--mail-type=END"} <= set(command)
    assert command[-2:] == [str(recipe), "optim.lr=0.02"]
    following = evaluate.command({"tiny": "17"})
    assert "--dependency=afterok:17" in following and "--nodes=1" in following
    assert following[-1] == "--suite=perplexity"


def test_where_requeueing_is_forbidden_training_is_a_chain(recipe):
    train, evaluate = plan_recipe(str(recipe), [], Profile(requeue=False, chain=5), None)
    assert {"--no-requeue", "--array=1-5%1"} <= set(train.command({}))
    assert "--dependency=afterany:17" in evaluate.command({"tiny": "17"})


def test_what_cannot_run_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"batch\.sequences: 8 is not micro_batch \(2\) x 8 ranks"):
        plan_recipe(str(recipe), [], Profile(nodes=4, gpus_per_node=2), None)
    with pytest.raises(UserError, match="did you mean 'perplexity'"):
        plan_recipe(str(recipe), [], Profile(), ["perplexty"])
    (recipe.parent / "data" / TEST_FILE).unlink()
    plan_recipe(str(recipe), [], Profile(), ["blimp"])
    with pytest.raises(RecipeError, match="missing, and perplexity, own, routing are evaluated"):
        plan_recipe(str(recipe), [], Profile(), None)
    shard = next(recipe.parent.glob("data/train-*.bin"))
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        plan_recipe(str(recipe), [], Profile(), None)


def test_without_slurm_nothing_is_submitted(recipe, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="--local"):
        submit(plan_recipe(str(recipe), [], Profile(), None), Profile(), dry_run=False, say=print)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("UNLIMITED", None)],
)
def test_time_limits_as_slurm_reads_them(text, seconds):
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["tomorrow", "1:2:3:4", "-5", "1-x", ""])
def test_what_is_no_time_limit(text):
    with pytest.raises(LaunchError, match="time limit"):
        time_limit_seconds(text)


def test_a_limit_shorter_than_its_announcement_is_refused():
    check_time(Profile(time="10:00"))
    with pytest.raises(LaunchError, match="at least 10 minutes"):
        check_time(Profile(time="5:00"))


def test_profiles_give_way_to_the_command_line(clusters):
    clusters.write_text(
        "default: juno\nclusters:\n  juno: {partition: gpu, nodes: 4, gpus_per_node: 8, time: 24:00:00,\n"
        "         environment: {NCCL_DEBUG: 1}}\n  small: {}\n"
    )
    profile = load_profile(None, nodes=2, account="nlp", qos=None)
    assert (profile.partition, profile.nodes, profile.account, profile.time) == ("gpu", 2, "nlp", "24:00:00")
    assert profile.environment == {"NCCL_DEBUG": "1"} and profile.ranks == 16
    assert load_profile("small").partition is None


def test_a_profile_reaches_the_jobs_as_variables(monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "of somebody's shell")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as it is set on a login node without GPUs
    profile = Profile(
        setup="module load cuda", container="mor.sif", launcher="deepspeed", health="exclude", environment={"NCCL": "1"}
    )
    environ = job_environment(profile)
    wanted = {"MOR_SETUP": "module load cuda", "MOR_CONTAINER": "mor.sif", "MOR_LAUNCHER": "deepspeed"}
    assert {**wanted, "MOR_HEALTH": "exclude", "NCCL": "1"}.items() <= environ.items()
    assert not {"SBATCH_ACCOUNT", "DS_ACCELERATOR"} & set(environ)
    assert "MOR_CONTAINER" not in job_environment(Profile())


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("clusters: {a: {partitoin: gpu}}", "a", "did you mean 'partition'"),
        ("clusters: {a: {}}", "b", "no cluster 'b'"),
        ("clusters: {a: {nodes: 0}}", "a", "nodes"),
        ("clusters: [", "a", "YAML"),
    ],
)
def test_profiles_that_cannot_be_used(clusters, content, name, message):
    clusters.write_text(content)
    with pytest.raises(LaunchError, match=message):
        load_profile(name)


def test_the_example_can_be_used(monkeypatch):
    monkeypatch.setenv("MOR_CLUSTERS", str(EXAMPLE))
    assert load_profile(None).ranks == 32 and load_profile(None).time == "24:00:00"
    shown = load_profile("juno").model_fields_set | load_profile("containers").model_fields_set
    assert shown == set(Profile.model_fields) - {"tasks_per_node"}, "the example shows every key"


def test_a_profile_without_a_file_is_named(clusters):
    with pytest.raises(LaunchError, match=str(clusters)):
        load_profile("juno")


def test_a_crash_loop_is_recognised_by_its_steps(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for _ in range(STARTS_WITHOUT_PROGRESS):
        assert note_start(run, "1", "crash") is None
    assert "without a checkpoint after step 0" in note_start(run, "1", "crash")
    assert note_start(run, "2", "by hand") is None, "a person's new submission starts counting anew"
    (run / "checkpoints" / "latest").write_text("step-00000100\n")
    assert reached_step(run) == 100
    for _ in range(STARTS_WITHOUT_PROGRESS):
        assert note_start(run, "2", "restart") is None
    assert note_start(run, "2", "restart") is not None


def test_jobs_are_followed_through_their_run_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MOR_JOBS", str(tmp_path / "jobs.jsonl"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "running", "step": 0, "steps": 100}))
    lines = [{"kind": "train", "step": 40, "lm_loss": 2.5, "step_seconds": 3.0}, {"kind": "event", "event": "x"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st')
    remember(Record("41", "tiny", "train", str(run), str(tmp_path / "log"), 0.0))
    remember(Record("42", "tiny-eval", "eval", str(run), str(tmp_path / "log"), 0.0))
    answer = "41|RUNNING|None\n42|PENDING|Dependency\n"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\nprintf '{answer}'\n".replace("\n'", "\\n'"))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    training, evaluation = view_jobs(remembered())
    assert (training.state, training.step, training.steps, training.loss) == ("RUNNING", 40, 100, 2.5)
    assert training.remaining == 180.0
    assert (evaluation.state, evaluation.reason) == ("PENDING", "Dependency")
    monkeypatch.setenv("PATH", "")
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 100, "steps": 100}))
    assert view_jobs(remembered())[0].state == "COMPLETED"


@pytest.mark.slow
def test_the_same_chain_without_slurm(tmp_path):
    text = write_text_files(tmp_path / "text")
    prep = [sys.executable, "-m", "data_prep"]
    words = ["--out", str(text / "words.model"), "--vocab-size", "300"]
    subprocess.run([*prep, "tokenizer", "train", str(text / "*.jsonl"), *words], check=True, capture_output=True)
    data = tmp_path / "data"
    subprocess.run([*prep, "tokenize", *prep_arguments(text, data)], check=True, capture_output=True)
    values = recipe_values(data, tmp_path / "run", model=tiny_model("vanilla", vocab_size=300))
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    command = [sys.executable, "-m", "pretrain.cli.main", "submit", str(recipe), "--local", "--tasks-per-node", "2"]
    environ = {**clean_environment(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--suite", "routing"], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert (tmp_path / "run" / "evaluation" / "routing.json").is_file()
