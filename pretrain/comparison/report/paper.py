"""Results of the Mixture-of-Recursions paper for its 360M networks (Bae et al. 2025, arXiv 2507.10524v3).

The paper counts forward FLOPs alone; budgets here are training FLOPs, three times as many. Its losses are of
FineWeb-Edu, and those of MoR are measured with top-k routing, which looks at future tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_model.config import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig

# Isoflop comparison at R=3: forward FLOPs to loss.
_ISOFLOP = {
    "vanilla": {2.0e18: 3.379, 5.0e18: 3.010, 16.5e18: 2.782},
    "recursive": {2.0e18: 3.486, 5.0e18: 3.072, 16.5e18: 2.847},
    "mor": {2.0e18: 3.103, 5.0e18: 2.916, 16.5e18: 2.792},
}


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's main table at 16.5e18 forward FLOPs; accuracies in per cent."""

    name: str
    parameters: float
    tokens: float
    loss: float
    accuracy: dict[str, float]


def _row(name: str, millions: float, billions: float, loss: float, *accuracies: float) -> PaperRow:
    tasks = ("lambada", "hellaswag", "piqa", "winogrande", "arc", "mmlu")
    return PaperRow(name, millions * 1e6, billions * 1e9, loss, dict(zip(tasks, accuracies, strict=True)))


_MAIN = {
    ("vanilla", 1, "recursion_wise"): _row("vanilla", 315, 20, 2.7824, 32.0, 37.8, 65.6, 50.5, 39.6, 28.0),
    ("recursive", 2, "recursion_wise"): _row("recursive, R=2", 167, 20, 2.8079, 31.0, 37.1, 66.7, 52.3, 40.8, 27.5),
    ("recursive", 3, "recursion_wise"): _row("recursive, R=3", 118, 20, 2.8466, 29.8, 35.9, 65.0, 52.3, 39.0, 27.2),
    ("mor", 2, "recursion_wise"): _row("MoR expert, R=2", 167, 27, 2.7511, 34.4, 39.3, 65.7, 51.2, 39.6, 28.1),
    ("mor", 3, "recursion_wise"): _row("MoR expert, R=3", 118, 30, 2.7925, 33.1, 37.9, 66.9, 52.1, 38.3, 27.4),
    ("mor", 4, "recursion_wise"): _row("MoR expert, R=4", 98, 30, 2.8204, 30.1, 37.3, 65.0, 51.1, 38.9, 27.4),
    ("token", 3, "recursion_wise"): _row("MoR token, R=3", 118, 30, 2.9163, 27.6, 34.1, 63.8, 50.6, 37.4, 26.8),
    ("mor", 3, "shared"): _row("MoR expert, R=3, shared KV", 118, 31, 2.7983, 31.7, 37.2, 65.1, 51.0, 39.0, 27.1),
}


def paper_row(config: ModelConfig) -> PaperRow | None:
    """The paper's main result for this network; None for a network that is not among its 360M ones."""
    if not _is_360m(config):
        return None
    return _MAIN.get((_kind(config), config.recursions, config.kv_sharing))


def paper_loss(config: ModelConfig, training_flops: float) -> float | None:
    """The paper's isoFLOP loss of this network at a budget within 2 % of one of its own; None where it has none."""
    if not _is_360m(config) or config.recursions not in (1, 3) or config.kv_sharing != "recursion_wise":
        return None
    for forward, loss in _ISOFLOP.get(_kind(config), {}).items():
        if abs(training_flops / (3 * forward) - 1.0) < 0.02:
            return loss
    return None


def _is_360m(config: ModelConfig) -> bool:
    shape = (config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size)
    sharing = "none" if config.recursions == 1 else "middle_cycle"
    return shape == (960, 15, 5, 2560) and config.num_layers in (32, 34) and config.sharing == sharing


def _kind(config: ModelConfig) -> str:
    if isinstance(config.router, ExpertChoiceConfig):
        return "random" if config.router.network == "random" else "mor"
    if isinstance(config.router, TokenChoiceConfig):
        return "token"
    return "vanilla" if config.recursions == 1 else "recursive"
