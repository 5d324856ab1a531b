"""Tables of the report."""

from __future__ import annotations

from types import SimpleNamespace

from pretrain.comparison.report.tables import skipped_table


def test_the_parts_of_one_benchmark_are_skipped_in_one_row():
    left_out = [
        {"suite": "blimp", "task": f"blimp_{part}", "why": "no data", "how": "bring it"}
        for part in ("passive", "island")
    ]
    left_out.append({"suite": "arc_easy", "task": "arc_easy", "why": "no data", "how": "bring it"})
    left_out.append({"suite": "blimp", "task": "blimp_passive", "why": "damaged", "how": "mend it"})
    arms = [SimpleNamespace(skipped=left_out), SimpleNamespace(skipped=left_out[:2])]
    table = skipped_table(SimpleNamespace(records=arms))
    assert table is not None
    assert table.rows == [
        ["BLiMP (2 parts)", "no data", "bring it"],
        ["ARC-easy", "no data", "bring it"],
        ["BLiMP", "damaged", "mend it"],
    ]
    assert skipped_table(SimpleNamespace(records=[SimpleNamespace(skipped=[])])) is None
