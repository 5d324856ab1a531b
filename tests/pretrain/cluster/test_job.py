"""The batch scripts' own program where there is no Slurm: what it would start, and what it needs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster import rank
from pretrain.cluster.job import choose_port, read_codes
from pretrain.cluster.restarts import STARTS_WITHOUT_PROGRESS
from pretrain.cluster.tasks import evaluation_arguments
from pretrain.errors import LaunchError
from pretrain.ranks.environment import clean_environment, rendezvous_port
from pretrain.ranks.signals import EXIT_AGAIN, EXIT_FAILED, EXIT_FINISHED, EXIT_HELD, EXIT_NO_PROGRESS, EXIT_USER
from pretrain.recipe.recipe import Recipe, build_recipe, load_recipe
from pretrain.records.finished import parts
from tests.pretrain.support import ROOT, recipe_values, tiny_model, write_recipe

FOUR_TASKS = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "4", "SLURM_CPUS_ON_NODE": "4"}
TWO_TASKS = {**FOUR_TASKS, "SLURM_NTASKS": "2", "SLURM_CPUS_ON_NODE": "2"}
ELEMENT = {**TWO_TASKS, "SLURM_ARRAY_JOB_ID": "16"}
# Writes its arguments down, leaves the exit codes that WORDS holds by rank as ranks would, and ends with CODE.
SRUN = """#!/bin/sh
echo "srun $*" >>{calls}
for word in $WORDS; do printf %s "${{word#*=}}" >"$MOR_EXIT_CODE_FILE.${{word%%=*}}"; done
exit ${{CODE:-0}}
"""
# Requeueing is refused, or ends the job's script as Slurm does.
SCONTROL = """#!/bin/sh
echo "scontrol $*" >>{calls}
case "$*" in *show*) echo JobState=RUNNING; exit ;; esac
[ "$REQUEUE" = allowed ] || exit 1
read -r _ name _ parent _ </proc/$PPID/stat
[ "$name" = "(sh)" ] || parent=$PPID
kill -TERM $parent
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >>{calls}
"""


@pytest.fixture
def started(tmp_path):
    """Runs a kind of job with Slurm's programs replaced; returns what it called them with, and the exit code."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / "bin" / name).write_text(text.format(calls=calls), encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*arguments: str, **environ: str) -> tuple[list[str], int]:
        calls.write_text("")
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {**clean_environment(), "PATH": path, **environ}
        done = subprocess.run([sys.executable, "-m", "pretrain.cluster.job", *arguments], env=variables, cwd=tmp_path)
        return calls.read_text(encoding="utf-8").splitlines(), done.returncode

    return run


PREP = ("prep", "text.jsonl", "--out", "data", "--tokenizer", "words.model")


@pytest.mark.parametrize(
    ("image", "before", "python"),
    [
        ("", "", sys.executable),
        ("/mor.sif", "apptainer exec --nv --bind {root},{here} /mor.sif ", "python"),
        ("/mor.sqsh", "--container-workdir={here} ", "python"),
    ],
)
def test_mpi_ranks_run_where_the_others_do(started, tmp_path, image, before, python):
    calls, code = started(*PREP, **FOUR_TASKS, MOR_CONTAINER=image)
    assert code == 0
    (call,) = calls
    assert "--mpi=pmix" in call.split()
    before = before.format(root=ROOT, here=tmp_path)
    assert call.endswith(f"{before}{python} -u -m pretrain.cli.main prep tokenize {' '.join(PREP[1:])} --mpi")
    assert ("--container-image=/mor.sqsh" in call) == (image == "/mor.sqsh")


def test_outside_a_job_it_says_how_to_start_one(started):
    assert started(*PREP) == ([], EXIT_USER)


def test_a_node_needs_no_packages_for_it():
    # The packages may be inside the container only.
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pretrain.cluster.job"
    subprocess.run([sys.executable, "-S", "-c", program], check=True)


@pytest.fixture
def recipe(tmp_path) -> str:
    """A recipe of 16 steps with a branch of 8, whose trunk alone is finished."""
    schedule = {"kind": "wsd", "warmup": 2, "decay": 0.25}
    changes = {"budget": {"steps": 16, "branches": [8]}, "schedule": schedule, "model": tiny_model("vanilla")}
    values = recipe_values(tmp_path / "data", tmp_path / "run", **changes)
    leave(build_recipe(values), 0)
    return str(write_recipe(tmp_path / "recipe.yaml", values))


def leave(recipe: Recipe, number: int) -> None:
    part = parts(recipe)[number]
    part.folder.write_text(part.folder.recipe_file, part.recipe.to_yaml())
    part.folder.write_json(part.folder.status_file, {"state": "finished", "step": part.steps, "steps": part.steps})


def programs(calls: list[str]) -> list[str]:
    return [" ".join(call.split()[:2]) for call in calls if "srun" in call or "show" not in call]


def test_a_run_whose_branch_is_not_finished_is_trained(started, recipe, tmp_path):
    # The branch was interrupted, as its first rank says; srun knows nothing of it.
    calls, code = started("train", recipe, **TWO_TASKS, WORDS=f"0={EXIT_AGAIN}")
    assert programs(calls) == ["srun --kill-on-bad-exit=1", "scontrol requeue"] and code == EXIT_AGAIN
    leave(load_recipe(recipe), 1)
    calls, code = started("train", recipe, **ELEMENT)
    assert (calls, code) == (["scancel --state=PENDING 16"], EXIT_FINISHED)
    calls, code = started("train", recipe, "budget.steps=24", **ELEMENT, WORDS=f"0={EXIT_FINISHED}", CODE="1")
    assert programs(calls) == ["srun --kill-on-bad-exit=1", "scancel --state=PENDING"], "a larger budget is trained"
    assert code == EXIT_FINISHED, "the first rank knows better than srun"
    assert not list(tmp_path.glob(".run.exit-code*"))


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (f"0={EXIT_USER} 1={EXIT_USER}", "143", EXIT_USER),
        (f"0={EXIT_AGAIN} 1={EXIT_USER}", "0", EXIT_USER),
        (f"0={EXIT_HELD}", "0", EXIT_HELD),
    ],
)
def test_what_would_end_the_same_way_ends_the_chain(started, recipe, words, code, expected):
    calls, found = started("train", recipe, **ELEMENT, WORDS=words, CODE=code)
    assert programs(calls) == ["srun --kill-on-bad-exit=1", "scancel --state=PENDING"] and found == expected


def test_a_recipe_that_cannot_be_used_ends_the_chain(started, recipe, capfd):
    assert started("train", recipe, "optimm.lr=1", **ELEMENT) == (["scancel --state=PENDING 16"], EXIT_USER)
    assert "did you mean 'optim'" in capfd.readouterr().err


def test_nothing_starts_on_nodes_that_are_not_fit(started, recipe, capfd):
    calls, code = started("train", recipe, **TWO_TASKS, MOR_HEALTH="check")
    assert len(calls) == 1 and "pretrain.cluster.health alone" in calls[0] and code == EXIT_FAILED
    assert "node localhost is not fit: wrote no report" in capfd.readouterr().out


def test_ranks_that_say_nothing_are_started_again(started, recipe):
    # As a full disk leaves it: a file of rank 0 with nothing in it.
    calls, code = started("train", recipe, **TWO_TASKS, WORDS="0=", CODE="1")
    assert programs(calls) == ["srun --kill-on-bad-exit=1", "scontrol requeue"] and code == EXIT_FAILED
    calls, code = started("train", recipe, **ELEMENT, CODE="0")
    assert programs(calls) == ["srun --kill-on-bad-exit=1"] and code == EXIT_FAILED, "a node that failed is no success"


def test_ranks_leave_their_codes_where_the_job_reads_them(tmp_path, monkeypatch):
    prefix = tmp_path / ".a[1].exit-code"
    monkeypatch.setenv("MOR_EXIT_CODE_FILE", str(prefix))
    for number, code, seen_by_srun in (("0", 75, 0), ("1", 75, 0), ("2", 2, 2), ("3", 0, 0)):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setattr(rank, "train", lambda arguments, code=code: code)
        assert rank.main([]) == seen_by_srun
    monkeypatch.delenv("RANK")  # the launcher's variables could not be used
    monkeypatch.setenv("SLURM_PROCID", "4")
    monkeypatch.setattr(rank, "train", lambda arguments: 2)
    assert rank.main([]) == 2
    for name, text in ((".a[1].exit-code.5", ""), (".a[1].exit-code.6", "x"), (".a[1].exit-code.7", "\xff")):
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert read_codes(prefix) == {0: 75, 2: 2, 4: 2}
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MOR_EXIT_CODE_FILE", str(Path(__file__) / "below-a-file"))
    assert rank.main([]) == 2, "a disk that takes nothing changes no exit code"


@pytest.mark.parametrize(("name", "text"), [("SLURM_RESTART_COUNT", "x"), ("SLURM_CPUS_ON_NODE", "9" * 5000)])
def test_a_number_that_slurm_does_not_set_is_named(started, recipe, name, text):
    assert started("train", recipe, **{**FOUR_TASKS, name: text}) == ([], EXIT_USER)


def test_the_meeting_place_is_free(monkeypatch):
    environ = {"SLURM_JOB_ID": "17"}
    assert choose_port(environ) == rendezvous_port(environ)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr("pretrain.cluster.job.rendezvous_port", lambda environ: taken)
        assert choose_port(environ) != taken


def test_runs_suites_and_other_options_of_an_evaluation():
    found = evaluation_arguments(["a", "b", "--depth=2", "--hub"])
    assert found == (["a", "b"], ["perplexity", "own", "routing"], ["--depth=2", "--hub"])
    given = ["a", "-s", "own", "--limit", "3", "--suite=blimp"]
    assert evaluation_arguments(given) == (["a"], ["own", "blimp"], ["--limit", "3"])
    for wrong in (["--limit=3", "a"], [], ["a", "--markdown=table.md"]):
        with pytest.raises(LaunchError, match=r"^eval: "):
            evaluation_arguments(wrong)


def test_a_killed_evaluation_is_requeued_until_it_gets_nowhere(started, tmp_path):
    arguments = ("eval", "run", "-s", "own")
    killed = {**FOUR_TASKS, "MOR_CONTAINER": "/mor.sqsh", "CODE": "137", "REQUEUE": "allowed"}
    history, recent, old = (tmp_path / f".eval-{job}.restarts.json" for job in (17, 4, 3))
    for file in (recent, old):
        file.touch()
    os.utime(old, (0, 0))
    for restart in range(2 * STARTS_WITHOUT_PROGRESS):
        if restart == STARTS_WITHOUT_PROGRESS:
            (tmp_path / "run" / "evaluation").mkdir(parents=True)
            (tmp_path / "run" / "evaluation" / "perplexity.json").touch()  # it has made progress
        calls, code = started(*arguments, **killed, SLURM_RESTART_COUNT=str(restart))
        assert code == EXIT_AGAIN and "scontrol requeue 17" in calls
        assert sorted(tmp_path.glob(".eval-*")) == [history, recent]
    calls, code = started(*arguments, **killed)
    assert code == EXIT_NO_PROGRESS and programs(calls) == []
    assert not history.exists(), "a job by hand counts from zero"
    assert started(*arguments, **{**killed, "REQUEUE": ""})[1] == 137, "where requeueing is not allowed"


@pytest.mark.parametrize(
    ("words", "reason"), [("exit 2", "message above"), ("exit 9", "ended with code 9"), ("", "result")]
)
def test_it_says_why_a_recipe_cannot_be_read(started, tmp_path, capfd, words, reason):
    # srun, which enters the container, is what answers.
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/sh\necho srun >>{tmp_path / 'calls'}\n{words}\n")
    assert started("train", "recipe.yaml", **TWO_TASKS, MOR_CONTAINER="/mor.sqsh") == (["srun"], EXIT_USER)
    assert "nothing was started" in (said := capfd.readouterr().err) and reason in said
