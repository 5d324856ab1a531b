"""The table of docs/scale.md is what its command prints."""

from __future__ import annotations

from benchmarks.scale import table
from tests.pretrain.support import ROOT


def test_the_table_is_computed_from_the_code():
    assert "\n".join(table("1.7b", [16, 512])) in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
