"""Run folders as the trainer and the evaluation write them, with numbers made from simple laws so that a test knows
what to expect.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mor_model.config import ExpertChoiceConfig, ModelConfig
from mor_model.flops import count_parameters, flops_per_token
from pretrain.comparison.experiment import Experiment
from pretrain.comparison.planned_runs import plan_experiment
from pretrain.comparison.report.build import print_results
from pretrain.comparison.report.document import compose
from pretrain.comparison.report.findings import findings
from pretrain.comparison.report.markdown import markdown
from pretrain.comparison.report.results import Results, read_results
from pretrain.comparison.report.spreadsheet import spreadsheet

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 192,
    "num_layers": 11,
    "num_heads": 3,
    "num_kv_heads": 1,
    "intermediate_size": 512,
    "context_length": 256,
}
# A model and arms that train in seconds.
TINY = {
    "num_layers": 5,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 64,
    "context_length": 32,
}
TINY_ARMS: dict[str, Any] = {
    "vanilla": {},
    "mor": {"model": {"sharing": "middle_cycle", "recursions": 3, "router": {"kind": "expert_choice"}}},
}


def write_corpus(file: Path, documents: int = 500) -> None:
    """Documents of sentences whose words are drawn from twelve."""
    draw = random.Random(0)
    words = ["depth", "token", "layer", "router", "step", "loss", "word", "page", "tree", "rain", "road", "stone"]
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(documents):
            sentences = (" ".join(draw.choices(words, k=12)).capitalize() + ". " for _ in range(6))
            stream.write(json.dumps({"text": "".join(sentences)}) + "\n")


ARMS = ("vanilla", "recursive", "mor")
LEAK = 0.05  # how much lower the loss of a routed network reads with top-k routing


@dataclass(frozen=True)
class Report:
    """What a report says, without its pictures being drawn: `text` the findings, `rows` those of the spreadsheet."""

    results: Results
    text: str
    markdown: str
    rows: list[dict[str, str]]

    @property
    def terminal(self) -> str:
        stream = io.StringIO()
        print_results(self.results, Console(file=stream, width=200))
        return stream.getvalue()

    def table(self, title: str) -> dict[str, list[str]]:
        """The rows of the table whose title begins so, by their first cell; `Arm` or `Task` is its head."""
        lines = self.markdown.split(f"**{title}")[1].split("\n\n")[1].splitlines()
        split = (re.split(r"(?<!\\)\|", line.strip("|")) for line in lines if "---" not in line)
        return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in split}


def report(made: Experiment) -> Report:
    results = read_results(made)
    text = markdown(compose(results, "recipes/small.yaml"))
    rows = list(csv.DictReader(io.StringIO(spreadsheet(results))))
    return Report(results, " ".join(findings(results)), text, rows)


def change(file: Path, how: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def write_runs(root: Path, losses: Sequence[float] = (4.02, 4.11, 4.06), **settings: Any) -> None:
    """A run of each arm, with these losses."""
    for arm, loss in zip(ARMS, losses):
        write_run(root / arm, arm, final_loss=loss, **settings)


def write_seeds(root: Path, arm: str, losses: dict[int, float]) -> None:
    """A run of one arm for each of these seeds."""
    for seed, loss in losses.items():
        write_run(root / (arm if seed == 1 else f"{arm}-seed{seed}"), arm, seed=seed, final_loss=loss)


def network(arm: str) -> ModelConfig:
    if arm == "vanilla":
        return ModelConfig(**SMALL)
    router = ExpertChoiceConfig() if arm.startswith("mor") else None
    return ModelConfig(**SMALL, sharing="middle_cycle", recursions=3, router=router)


def experiment(root: Path, **changes: Any) -> Experiment:
    """An experiment of three arms; those of its runs that lie in `root` were begun with what it says."""
    base = {"seed": 1, "model": SMALL, "batch": {"sequences": 32, "micro_batch": 4, "sequence_length": 256}}
    values: dict[str, Any] = {
        "name": "small",
        "runs": str(root),
        "base": base if "budgets" in changes else {**base, "budget": {"flops": 1.2e14}},
        "arms": {"vanilla": {}, "recursive": {}, "mor": {}},
        "evaluation": {"suites": ["perplexity", "routing"]},
    }
    made = Experiment.model_validate({**values, **changes})
    for run in plan_experiment(made):
        if run.trial.folder.is_dir():
            (run.trial.folder / "recipe.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    return made


def write_run(
    folder: Path,
    arm: str,
    *,
    budget: float = 1.2e14,
    seed: int = 1,
    final_loss: float = 4.0,
    state: str = "finished",
    until: float = 1.0,
    evaluate: bool = True,
    reason: str | None = None,
    config: ModelConfig | None = None,
    sequences: int = 32,
) -> Path:
    """One run folder.

    Args:
        budget: training FLOPs; final_loss: causal validation loss at the end.
        until: share of the run that has been trained when `state` is not `finished`.
        config: the network, by default a small one for `arm`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config or network(arm)
    length = config.context_length
    per_token = flops_per_token(config, length)
    per_step = sequences * length
    steps = math.ceil(budget / (per_token.training * per_step))
    reached = int(steps * until)
    plan = {
        "steps": steps,
        "tokens_per_step": per_step,
        "sequence_length": length,
        "tokens": steps * per_step,
        "flops_per_token_forward": per_token.forward,
        "training_flops": per_token.training * steps * per_step,
        "parameters": vars(count_parameters(config)),
        "decay_steps": steps // 5,
        "tokenizer_fingerprint": "f" * 16,
        "data_manifest": "d" * 16,
    }
    _json(folder / "model.json", config.to_dict())
    _json(folder / "plan.json", plan)
    versions = {"torch": "2.13.0", "deepspeed": "0.19.8"}
    _json(folder / "environment.json", {"versions": versions, "commit": "0123abcd", "world_size": 2})
    (folder / "recipe.yaml").write_text(f"name: {folder.name}\nseed: {seed}\n", encoding="utf-8")
    records = _metrics(random.Random(f"{seed}{folder.name}"), config, plan, reached, final_loss)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    if evaluate:
        _write_evaluation(folder / "evaluation", config, final_loss, seed)
    ended = {"state": state, "step": reached, "steps": steps}
    _json(folder / "status.json", ended | ({"reason": reason} if reason else {}))
    return folder


def _metrics(
    noise: random.Random, config: ModelConfig, plan: dict[str, Any], reached: int, final: float
) -> Iterator[dict[str, Any]]:
    steps, flops = plan["steps"], 3 * plan["flops_per_token_forward"]
    routed = config.router is not None
    for step in range(1, reached + 1):
        share = step / steps
        loss = final + 5.0 * math.exp(-9 * share) + 0.9 * (1 - share) ** 2
        tokens = step * plan["tokens_per_step"]
        place = {"step": step, "tokens": tokens, "flops": tokens * flops}
        if step % max(5, steps // 200) == 0 or step == reached:
            yield {
                "kind": "train",
                **place,
                "loss": loss + noise.gauss(0, 0.05) + 0.01,
                "lm_loss": loss + noise.gauss(0, 0.05),
                "grad_norm": 1.0,
                "tokens_per_second": 2.0e10 / flops * noise.uniform(0.97, 1.03),
                "step_seconds": plan["tokens_per_step"] * flops / 2.0e10,
                "memory_peak_bytes": 1.1e9,
                "active": list(config.capacities) if routed else [1.0] * config.recursions,
            }
        if step % max(1, steps // 12) == 0 or step == reached:
            yield {
                "kind": "validation",
                **place,
                "source": "docs",
                "loss_causal": loss,
                "loss_topk": loss - (LEAK if routed else 0.0),
                "tokens_evaluated": 16384,
            }


def _json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, default=str), encoding="utf-8")


def _write_evaluation(folder: Path, config: ModelConfig, final: float, seed: int) -> None:
    nats_per_byte = final / 4.2
    perplexity = {
        "metrics": {
            "token_perplexity": math.exp(final),
            "word_perplexity": math.exp(nats_per_byte * 6.1),
            "byte_perplexity": math.exp(nats_per_byte),
            "bits_per_byte": nats_per_byte / math.log(2),
        },
        "stderr": {"token_perplexity": 0.011 * math.exp(final)},
        "n": 212,
        "routing": "causal",
        "not_finite": 0,
        "lost_bytes": 0,
        "scored_bytes": 90_000,
        "text_bytes": 90_000,
        "text_sha256": "a" * 64,
    }
    metrics = {"loss_causal": final + 0.01}
    histogram = {"causal": [0.0] * config.recursions + [1.0]}
    if config.router is not None:
        metrics |= {"loss_topk": final + 0.01 - LEAK, "leak": LEAK}
        histogram = {"causal": [0.0, 0.36, 0.33, 0.31], "topk": [0.0, 1 / 3, 1 / 3, 1 / 3]}
    routing = {
        "metrics": metrics,
        "stderr": dict.fromkeys(metrics, 0.002),
        "n": 88,
        "routing": "causal and topk",
        "depth_histogram": histogram,
    }
    results = {"perplexity": (perplexity, "bits_per_byte"), "routing": (routing, "loss_causal")}
    noise = random.Random(seed)
    few_shot = {"blimp": (0.5, 6700), "lambada": (0.0, 1000), "hellaswag": (0.25, 1000), "arc_easy": (0.25, 570)}
    for task, (chance, n) in few_shot.items():
        accuracy = chance + (0.02 if task == "arc_easy" else 0.08) + noise.uniform(-0.02, 0.02)
        stderr = {"acc": math.sqrt(accuracy * (1 - accuracy) / n)}
        result = {"metrics": {"acc": accuracy}, "stderr": stderr, "n": n, "routing": "causal", "chance": chance}
        results[task] = ({**result, "higher_is_better": {"acc": True}}, "acc")
    for suite, (result, metric) in results.items():
        primary = {"task": suite, "metric": metric}
        content = {"suite": suite, "tasks": {suite: result}, "skipped": [], "primary": primary}
        _json(folder / f"{suite}.json", content)
    missing = [{"task": "mmlu", "why": "no data on this machine", "how": "set MOR_SHARED_DATA to a folder with eval/."}]
    _json(folder / "mmlu.json", {"suite": "mmlu", "tasks": {}, "skipped": missing, "primary": None})
