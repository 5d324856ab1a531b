"""The files that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PATH = re.compile(r"(?<![\w./-])(?:mor_model|data_prep|pretrain|ds_configs|recipes|slurm|tests|benchmarks)/[\w./*-]*\w")
LINK = re.compile(r"\]\(([\w./-]+)[)#]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not any(ROOT.glob(path))]
    missing += [link for link in LINK.findall(text) if not (page.parent / link).is_file()]
    assert not missing
