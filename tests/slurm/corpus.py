"""A small corpus of made-up English, and small experiments on it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import yaml


def write_text_files(folder: Path) -> Path:
    """Six files of made-up English."""
    folder.mkdir()
    words = re.findall(r"\w+", "the sea of stones was quiet and every boat had gone home before rain fell on the roofs")
    generator = random.Random(5)
    for number in range(6):
        texts = (" ".join(generator.choices(words, k=generator.randint(20, 90))) for _ in range(120))
        (folder / f"part{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def prep_arguments(corpus: Path, out: Path) -> list[str]:
    return [str(corpus / "*.jsonl"), "--out", str(out), "--tokenizer", str(corpus / "words.model"), "--test", "0.05"]


def write_experiment(file: Path, folder: Path, data: Path) -> Path:
    """Two arms of some thousand parameters, twelve steps each."""
    shape = {"num_layers": 5, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
    values = {
        "name": "tiny",
        "runs": str(folder),
        "data": {"path": str(data)},
        "launch": {"launcher": "python", "ranks": 1},
        "base": {
            "seed": 1,
            "model": {**shape, "context_length": 64},
            "budget": {"steps": 12},
            "batch": {"sequences": 8, "micro_batch": 4, "sequence_length": 64},
            "precision": "fp32",
            "deepspeed": {"config": "zero1"},
            "evaluation": {"every": 6, "sequences": 4},
        },
        "arms": {
            "vanilla": {},
            "mor": {"model": {"sharing": "middle_cycle", "recursions": 3, "router": {"kind": "expert_choice"}}},
        },
        "evaluation": {"suites": ["perplexity", "routing"], "text_bytes": 4000},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def finished(folder: Path) -> list[str]:
    """Names of the experiment's finished runs."""
    states = {file.parent.name: json.loads(file.read_text())["state"] for file in folder.glob("*/status.json")}
    return sorted(name for name, state in states.items() if state == "finished")


def write_whole_experiment(work: Path, name: str) -> tuple[Path, Path]:
    """An experiment whose text is not prepared yet, in `work`: its file and its folder."""
    text = write_text_files(work / f"{name}-text")
    folder = work / "runs" / name
    file = write_experiment(work / f"{name}.yaml", folder, work / f"{name}-data")
    values = yaml.safe_load(file.read_text())
    values["data"] |= {"corpus": str(text / "*.jsonl"), "tokenizer": "train", "vocab_size": 300, "test": 0.05}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file, folder
