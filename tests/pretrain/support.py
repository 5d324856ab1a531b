"""Tiny data sets and recipes, and training processes started the way a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pretrain.ranks.environment import Ranks
from tests.data_prep.support import EOD, write_dataset
from tests.ports import free_port

# One process without a launcher.
ALONE = Ranks(0, 1, 0, 1, 0, "127.0.0.1", 29500, "python")
ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 64
EVERY_FOUR = {"every": 4, "keep": 9}
LENGTH = 32


def markov_documents(count: int, seed: int) -> list[list[int]]:
    """Documents that a model can learn: each token is followed by one of three others."""
    generator = np.random.default_rng(seed)
    followers = np.random.default_rng(1234).integers(1, VOCABULARY, (VOCABULARY, 3))
    documents = []
    for _ in range(count):
        token = int(generator.integers(1, VOCABULARY))
        document = []
        for _ in range(int(generator.integers(20, 60))):
            document.append(token)
            token = int(followers[token, generator.integers(0, 3)])
        documents.append([*document, EOD])
    return documents


def make_dataset(
    folder: Path, *, documents: int = 300, fingerprint: str = "f" * 64, seed: int = 0, validation: bool = True
) -> Path:
    """A data set with a training and, unless told otherwise, a validation split."""
    held_out = {"validation": [("a", markov_documents(20, seed + 1)), ("b", markov_documents(20, seed + 2))]}
    write_dataset(
        folder,
        {"train": [("a", markov_documents(documents, seed))], **(held_out if validation else {})},
        fingerprint=fingerprint,
        vocabulary=VOCABULARY,
    )
    return folder


def tiny_model(variant: str = "mor", **changes: Any) -> dict[str, Any]:
    """A network of some thousand parameters, trained in milliseconds a step."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "intermediate_size": 48,
        "context_length": LENGTH,
        "num_layers": 5,
    }
    if variant != "vanilla":
        shape |= {"sharing": "middle_cycle", "recursions": 3}
    if variant == "mor":
        shape["router"] = {"kind": "expert_choice"}
    return {**shape, **changes}


def recipe_values(data_path: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A complete tiny recipe as plain values; `changes` replace whole sections."""
    values: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "model": tiny_model(),
        "data": {"path": str(data_path)},
        "optim": {"lr": 0.01},
        "schedule": {"kind": "wsd", "warmup": 2, "decay": 4},
        "budget": {"steps": 12},
        "batch": {"sequences": 8, "micro_batch": 2, "sequence_length": LENGTH},
        "precision": "fp32",
        "deepspeed": {"config": "zero3"},
        "checkpoint": {"every": 4},
        "evaluation": {"every": 6, "sequences": 6},
        "logging": {"every": 1},
        "run_dir": str(run_dir),
    }
    return {**values, **changes}


def write_recipe(file: Path, values: dict[str, Any]) -> Path:
    """Write recipe values as YAML."""
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return file


def environment() -> dict[str, str]:
    """Environment of a training process: one thread, CPU, nothing of an outer launcher's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


class Fork:
    """One rank of a `Nursery`, with the methods of a `Popen` that tests use."""

    def __init__(self, nursery: Nursery, pid: int, folder: Path) -> None:
        self._nursery, self._pid, self._folder = nursery, pid, folder
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask(pid=self._pid)["code"]
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Does nothing to a rank that has ended."""
        if self.poll() is None:
            os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked rank", timeout)
            time.sleep(0.01)
        output, errors = ((self._folder / name).read_text(encoding="utf-8") for name in ("output", "errors"))
        return output, errors


def start_module(name: str) -> subprocess.Popen[str]:
    """A process that is told what to do, and answers, by lines through its pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", name],
        env=environment(),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Nursery:
    """A process that has imported everything and forks ranks (see `tests.pretrain.nursery`)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = start_module("tests.pretrain.nursery")

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script: Path, arguments: list[str], variables: dict[str, str]) -> Fork:
        """Fork a rank that runs a script."""
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        files = {"output": str(folder / "output"), "errors": str(folder / "errors")}
        for file in files.values():
            Path(file).touch()  # a rank may be killed before it has opened them
        answer = self.ask(script=str(script), arguments=arguments, variables=variables, **files)
        return Fork(self, answer["pid"], folder)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Job:
    """Training processes started without a launcher, so that a test can kill any one of them."""

    def __init__(
        self,
        recipe: Path,
        *arguments: str,
        ranks: int = 1,
        extra: dict[str, str] | None = None,
        vary: Callable[[int], list[str]] = lambda rank: [],
        script: Path = ROOT / "pretrain" / "train.py",
        nursery: Nursery | None = None,
    ) -> None:
        """`extra` variables for all ranks; `vary` gives a rank arguments of its own; `script` is what is started;
        `nursery` forks the ranks, which is faster than processes of their own.
        """
        port = str(free_port())
        self.processes: list[Any] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            variables = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
            if ranks > 1:
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= extra or {}
            command = ["--config", str(recipe), *arguments, *vary(rank)]
            if nursery is not None:
                self.processes.append(nursery.start(script, command, variables))
                continue
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *command],
                    env={**environment(), **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    @property
    def running(self) -> bool:
        """True while every process lives."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.send_signal(number)

    def wait(self, timeout: float = 240) -> tuple[list[int], str, str]:
        """Exit codes by rank, and what was printed, rank after rank."""
        try:
            printed = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        codes = [process.returncode for process in self.processes]
        return codes, "".join(out for out, _ in printed), "".join(errors for _, errors in printed)


def train(recipe: Path, *arguments: str, ranks: int = 1, expect: int = 0, nursery: Nursery | None = None) -> str:
    """Train to the end; returns what was printed. Fails unless every rank exits with `expect`."""
    codes, output, errors = Job(recipe, *arguments, ranks=ranks, nursery=nursery).wait()
    assert codes == [expect] * ranks, f"exit codes {codes}\n{output}\n{errors}"
    return output + errors


def run_faulty(nursery: Nursery, fault: dict[str, Any], recipe: Path) -> tuple[list[int], str]:
    """Train on two ranks of a machine where something breaks (see `tests.pretrain.faulty`)."""
    script = Path(__file__).parent / "faulty.py"
    job = Job(recipe, ranks=2, extra={"FAULT": json.dumps(fault)}, script=script, nursery=nursery)
    codes, output, errors = job.wait()
    return codes, output + errors


def metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind from metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def last_step(run_dir: Path) -> int:
    """The last step that a run has logged, 0 before the first; also while it goes on and a line is half there."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if file.exists() else []
    return max((record["step"] for record in map(json.loads, lines) if record["kind"] == "train"), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of every logged step."""
    return {record["step"]: record["loss"] for record in metrics(run_dir, "train")}


class Workers:
    """Ranks that stay and train one recipe after another (see `tests.pretrain.worker`)."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes = [start_module("tests.pretrain.worker") for _ in range(ranks)]

    def run(self, *arguments: str) -> tuple[int, str]:
        """Call `pretrain.train.main` on every rank; the largest exit code, and what all printed."""
        port = str(free_port())
        for rank, process in enumerate(self._processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            variables = {name: str(value) for name, value in place.items()}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            assert process.stdin is not None
            process.stdin.write(json.dumps({"arguments": arguments, "variables": variables}) + "\n")
            process.stdin.flush()
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return max(answer["code"] for answer in answers), "".join(answer["printed"] for answer in answers)

    def train(self, folder: Path, values: dict[str, Any]) -> Path:
        """Train a recipe to its end; its run folder."""
        code, printed = self.run("--config", str(write_recipe(folder / f"{Path(values['run_dir']).name}.yaml", values)))
        assert code == 0, printed
        return Path(values["run_dir"])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
