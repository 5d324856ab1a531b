"""Which stored layer runs at which place of the network: parameter sharing as data.

Everything here is a pure function of (depth, recursions, strategy). The network, FLOPs accounting and export read the
schedule; no other module depends on the strategies' names.

Source of the maps: Bae et al. 2025 (arXiv 2507.10524), section 2.2 and appendix, table of sharing strategies.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_model.errors import ConfigError, shown

# Layer applications; the deepest networks that were trained have about as many.
MAX_LAYERS = 1024
SHARING_STRATEGIES = ("none", "cycle", "sequence", "middle_cycle", "middle_sequence")


@dataclass(frozen=True)
class LayerSchedule:
    """The order in which stored layers are applied.

    Attributes:
        prelude: stored-layer indices applied once to every token before the first recursion step.
        steps: one tuple of stored-layer indices per recursion step; routing happens between steps.
        coda: stored-layer indices applied once to every token after the last recursion step.
        num_stored: how many distinct layers hold parameters.
    """

    prelude: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    coda: tuple[int, ...]
    num_stored: int

    @property
    def recursions(self) -> int:
        return len(self.steps)

    @property
    def applications(self) -> tuple[int, ...]:
        """Stored-layer index of every layer application, in order (length: the effective depth)."""
        return self.prelude + tuple(index for step in self.steps for index in step) + self.coda

    @property
    def steps_share_layers(self) -> bool:
        """True when every recursion step applies the same stored layers in the same order."""
        return all(step == self.steps[0] for step in self.steps)


def layer_schedule(depth: int, recursions: int, sharing: str) -> LayerSchedule:
    """Build the schedule of a network of `depth` layer applications.

    Args:
        depth: effective depth L, the number of layer applications a token that takes every recursion goes through.
        recursions: R, the number of recursion steps.
        sharing: one of `SHARING_STRATEGIES`; `none` is the vanilla transformer, with one recursion.

    Raises:
        ConfigError: when the strategy is unknown, the depth exceeds `MAX_LAYERS` or cannot be divided; the message
            names the nearest valid depths.
    """
    if sharing not in SHARING_STRATEGIES:
        raise ConfigError(f"model.sharing: {shown(sharing)} is not one of {', '.join(SHARING_STRATEGIES)}.")
    if depth < 1 or recursions < 1:
        raise ConfigError(f"model: num_layers ({depth}) and recursions ({recursions}) must both be at least 1.")
    if depth > MAX_LAYERS or recursions > MAX_LAYERS:
        raise ConfigError(f"model: num_layers and recursions must each be at most {MAX_LAYERS:,}.")
    if sharing == "none":
        if recursions != 1:
            raise ConfigError(
                f"model: sharing 'none' is a vanilla transformer and has one recursion, not {recursions}; "
                "set recursions to 1 or choose another sharing (middle_cycle is the paper's best)."
            )
        return LayerSchedule((), (tuple(range(depth)),), (), depth)

    unique = 2 if sharing.startswith("middle_") else 0
    looped = depth - unique
    if looped < recursions or looped % recursions:
        raise ConfigError(
            f"model: {depth} layers cannot be shared by {sharing!r} over {recursions} recursions "
            f"({'num_layers - 2' if unique else 'num_layers'} must be a positive multiple of {recursions}); "
            f"the nearest valid depths are {_nearest_depths(looped, recursions, unique)}."
        )
    block = looped // recursions
    offset = unique // 2
    if sharing.endswith("cycle"):
        order = [offset + i % block for i in range(looped)]
    else:
        order = [offset + i // recursions for i in range(looped)]
    steps = tuple(tuple(order[r * block : (r + 1) * block]) for r in range(recursions))
    if unique:
        return LayerSchedule((0,), steps, (block + 1,), block + 2)
    return LayerSchedule((), steps, (), block)


def valid_depth(at_least: int, recursions: int, sharing: str) -> int:
    """The smallest depth >= `at_least` that `sharing` can divide over `recursions`.

    The paper rounds up in the same way: 135M (30 layers) becomes 32 at R=3, 360M (32 layers) becomes 34 at R=4.
    """
    unique = 2 if sharing.startswith("middle_") else 0
    blocks = max(1, -(-(at_least - unique) // recursions))
    return blocks * recursions + unique


def _nearest_depths(looped: int, recursions: int, unique: int) -> str:
    below = looped // recursions * recursions
    above = below + recursions
    return " and ".join(str(depth + unique) for depth in (below, above) if depth >= recursions)
