"""The report as one long table: a line per number, to compute with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from data_prep.plain_text import spreadsheet_cell
from pretrain.comparison.report.results import Results
from pretrain.comparison.run_records import RunRecord

_COLUMNS = ("run", "arm", "seed", "budget", "state", "quantity", "value", "stderr", "n", "routing")


def spreadsheet(results: Results) -> str:
    """The report as CSV. Numbers have full precision, nan for one that is not finite; runs without numbers have one
    line with their state.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for record in results.records:
        trial = record.trial
        head = (trial.name, trial.arm, trial.seed, trial.budget, record.state)
        rows = list(_quantities(record)) or [(None,) * 5]
        writer.writerows(map(spreadsheet_cell, (*head, *row)) for row in rows)
    return stream.getvalue()


def _quantities(record: RunRecord) -> Iterator[tuple[object, ...]]:
    singles = {
        **{f"parameters_{name}": value for name, value in record.parameters.items()},
        "training_flops_per_token": record.training_flops_per_token,
        "training_flops_planned": record.plan.get("training_flops"),
        "training_flops_counted": record.counted_flops,
        "tokens": record.tokens,
        "steps": record.step,
        "tokens_per_second": record.tokens_per_second,
        "step_seconds": record.step_seconds,
        "memory_peak_bytes": record.memory_peak_bytes,
        "kv_bytes_per_token": record.kv_bytes,
    }
    for name, single in singles.items():
        if single is not None:
            yield name, single, None, None, None
    for routing in record.validation:
        yield "validation_loss", record.final_validation(routing), None, None, routing
    for looked_at, shares in record.depths.items():
        for depth, share in enumerate(shares):
            yield f"share_of_tokens_at_depth_{depth}", share, None, None, looked_at
    for score in record.scores:
        yield f"{score.task}/{score.metric}", score.value, score.stderr, score.n, score.routing
