"""What decides an evaluation's numbers, apart from the model and the data, and where its results lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import RunError, UserError

if TYPE_CHECKING:
    from pretrain.records.run_folder import RunFolder

ROUTINGS = ("causal", "topk")
# Suites that need nothing but the run's held-out text. They are what is evaluated unless suites are named.
HELD_OUT_SUITES = ("perplexity", "own", "routing")
TEXT_BYTES = 500_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides an evaluation's numbers, apart from the model and the data.

    Attributes:
        limit: largest number of documents (perplexity) or questions of each task; None takes all.
        routing: see `likelihood.Scorer`; depth: recursion steps every token takes, None lets the routers decide.
        text_bytes: UTF-8 bytes of held-out text that `perplexity` reads; routing analysis reads a fifth of it.
        hub: benchmarks without local files may be read from the Hugging Face hub when it answers.
    """

    limit: int | None = None
    routing: str = "causal"
    depth: int | None = None
    text_bytes: int = TEXT_BYTES
    hub: bool = False

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise UserError(f"routing: {self.routing!r} is not one of {', '.join(ROUTINGS)}.")
        for name in ("limit", "depth", "text_bytes"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 1 << 62:
                raise RunError(f"evaluation {name}: must be a whole number of at least 1, not {value!r:.50}.")


def result_file(run: RunFolder, suite: str, settings: Settings) -> Path:
    """Where a suite's result lies. Only causal figures at free depth have a suite's plain name."""
    routing = ".topk" if settings.routing == "topk" else ""
    depth = f".depth-{settings.depth}" if settings.depth else ""
    return run.evaluation / f"{suite}{routing}{depth}.json"
