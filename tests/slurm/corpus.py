"""A small corpus of made-up English for the tests of preparation."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path


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
