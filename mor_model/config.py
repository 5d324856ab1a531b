"""What a network is: every choice that changes its function, checked when the configuration is built.

`ModelConfig` is frozen and strict. What changes from step to step of a run (capacity warm-up, a curriculum) is not
here: it is an argument of the forward pass, so that the network stays a function of its configuration and its inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from mor_model.errors import ConfigError, refuse_unknown_keys, shown
from mor_model.layer_schedule import MAX_LAYERS, LayerSchedule, layer_schedule

RouterNetwork = Literal["linear", "mlp", "wide_mlp", "random"]
KVSharing = Literal["recursion_wise", "shared", "hybrid"]

# Far above the sizes of any network: a file that says more is damaged or hostile.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "num_layers": MAX_LAYERS,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "intermediate_size": 1 << 20,
    "head_dim": 1 << 14,
    "context_length": 1 << 30,
    "recursions": MAX_LAYERS,
}


def _check_choice(where: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{where}: {shown(value)} is not one of {', '.join(map(repr, choices))}.")


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _check_not_negative(router: ExpertChoiceConfig | TokenChoiceConfig, *names: str) -> None:
    for name in names:
        value = getattr(router, name)
        if not (_is_number(value) and value >= 0):
            raise ConfigError(f"model.router.{name}: must be a finite number of at least 0, not {shown(value)}.")


def check_sizes(**values: object) -> None:
    """Refuse sizes of a network that are not whole numbers from 1 to `_LARGEST`.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"model.{name}: must be a whole number of at least 1, not {shown(value)}.")
        if value > _LARGEST[name]:
            raise ConfigError(f"model.{name}: must be at most {_LARGEST[name]:,}, not {shown(value)}.")


def _refuse_idle_options(router: ExpertChoiceConfig | TokenChoiceConfig, names: tuple[str, ...], why: str) -> None:
    """Refuse options that differ from their defaults although they have no effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(router)}
    for name in names:
        if getattr(router, name) != defaults[name]:
            raise ConfigError(f"model.router.{name}: {shown(getattr(router, name))} has no effect {why}; leave it out.")


def _check_target_depth(router: ExpertChoiceConfig | TokenChoiceConfig) -> None:
    if router.target_depth is None:
        _refuse_idle_options(router, ("target_depth_coefficient",), "without a target_depth")
    elif not _is_number(router.target_depth):
        raise ConfigError(
            f"model.router.target_depth: must be a number of recursion steps or null, not {shown(router.target_depth)}."
        )


@dataclass(frozen=True)
class ExpertChoiceConfig:
    """Expert-choice routing: at every recursion step the step chooses its tokens (paper, section 2.2.1).

    Attributes:
        network: the router at each recursion step. `linear` (no bias) is the paper's; `wide_mlp` is 4x as wide as
            `mlp`; `random` draws scores and learns nothing (the control for every claim about routing).
        gate: bounds the score before it weighs the block's output; `none` is unbounded and known to give NaN.
        alpha: scale of the gate.
        capacities: share of the SEQUENCE each step may take, one per recursion, not increasing; None is (R-r+1)/R.
        causal: what decides at inference without looking ahead. `aux_loss` trains the scores themselves so that
            sigmoid >= 0.5 does; `aux_router` trains a second router on detached hidden states and leaves the scores
            alone.
        causal_coefficient: weight of the binary cross-entropy that trains it.
        z_loss: weight of the router z-loss (mean squared score).
        entropy: weight of a bonus for undecided gates (mean binary entropy of sigmoid(score)).
        target_depth: mean depth that the causal router is drawn to, in recursion steps; None leaves depth to capacity.
        target_depth_coefficient: weight of (mean causal depth - target_depth)^2.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    network: RouterNetwork = "linear"
    gate: Literal["sigmoid", "tanh", "none"] = "sigmoid"
    alpha: float = 0.1
    capacities: tuple[float, ...] | None = None
    causal: Literal["aux_loss", "aux_router"] = "aux_loss"
    causal_coefficient: float = 0.001
    z_loss: float = 0.0
    entropy: float = 0.0
    target_depth: float | None = None
    target_depth_coefficient: float = 0.01

    def __post_init__(self) -> None:
        where = "model.router"
        _check_choice(f"{where}.network", self.network, get_args(RouterNetwork))
        _check_choice(f"{where}.gate", self.gate, ("sigmoid", "tanh", "none"))
        _check_choice(f"{where}.causal", self.causal, ("aux_loss", "aux_router"))
        _check_not_negative(self, "alpha", "causal_coefficient", "z_loss", "entropy", "target_depth_coefficient")
        _check_target_depth(self)
        if self.network == "random":
            why = "with random scores, which nothing can train"
            _refuse_idle_options(self, ("z_loss", "entropy", "target_depth"), why)
            if self.causal == "aux_loss":
                if self.causal_coefficient != 0.0:
                    _refuse_idle_options(self, ("causal_coefficient",), why)
                object.__setattr__(self, "causal_coefficient", 0.0)
        if self.capacities is not None:
            if not isinstance(self.capacities, (tuple, list)):
                raise ConfigError(
                    f"{where}.capacities: must be a list with one share per recursion, not {shown(self.capacities)}."
                )
            check_capacities(f"{where}.capacities", self.capacities)
            object.__setattr__(self, "capacities", tuple(float(capacity) for capacity in self.capacities))

    def step_capacities(self, recursions: int) -> tuple[float, ...]:
        """Share of the sequence each recursion step takes (length R)."""
        if self.capacities is not None:
            return self.capacities
        return tuple((recursions - r) / recursions for r in range(recursions))


def check_capacities(where: str, capacities: tuple[float, ...] | list[float]) -> None:
    """Refuse shares of the sequence that no sequence of recursion steps can have.

    Raises:
        ConfigError: naming `where` they come from.
    """
    for capacity in capacities:
        if not (_is_number(capacity) and 0.0 < capacity <= 1.0):
            raise ConfigError(f"{where}: each must lie in (0, 1], not {shown(capacity)}.")
    for earlier, later in itertools.pairwise(capacities):
        if later > earlier:
            raise ConfigError(
                f"{where}: {later} after {earlier}; they may not increase, because only tokens "
                "selected at one step compete at the next."
            )


@dataclass(frozen=True)
class TokenChoiceConfig:
    """Token-choice routing: every token picks its depth once, before the first recursion step (paper, section 2.2.1).

    Attributes:
        network: as in `ExpertChoiceConfig`; one router with R outputs.
        gate: turns the R scores into weights.
        alpha: scale of the weights.
        combine: `paper` weighs every step's output and adds the recursion input at the token's last step; `code` is the
            released code's: earlier steps pass ungated.
        balance: `loss` adds R/T * sum_i count_i * P_i; `bias` is loss-free: a bias used for selection only; `none` does
            nothing.
        balance_coefficient: weight of the balance loss.
        bias_update_rate: how far the loss-free bias moves per optimiser step.
        z_loss: weight of the router z-loss (mean squared log-sum-exp of the scores).
        entropy: weight of a bonus for undecided routers (mean entropy over the depths).
        target_depth: mean depth the router is drawn to, in recursion steps; None leaves it to the balance.
        target_depth_coefficient: weight of (mean expected depth - target_depth)^2.
    """

    kind: Literal["token_choice"] = "token_choice"
    network: RouterNetwork = "linear"
    gate: Literal["softmax", "sigmoid"] = "softmax"
    alpha: float = 1.0
    combine: Literal["paper", "code"] = "paper"
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_coefficient: float = 0.1
    bias_update_rate: float = 0.001
    z_loss: float = 0.0
    entropy: float = 0.0
    target_depth: float | None = None
    target_depth_coefficient: float = 0.01

    def __post_init__(self) -> None:
        where = "model.router"
        _check_choice(f"{where}.network", self.network, get_args(RouterNetwork))
        _check_choice(f"{where}.gate", self.gate, ("softmax", "sigmoid"))
        _check_choice(f"{where}.combine", self.combine, ("paper", "code"))
        _check_choice(f"{where}.balance", self.balance, ("loss", "bias", "none"))
        _check_not_negative(self, "alpha", "z_loss", "entropy", "balance_coefficient", "bias_update_rate")
        _check_not_negative(self, "target_depth_coefficient")
        _check_target_depth(self)
        if self.balance != "loss":
            _refuse_idle_options(self, ("balance_coefficient",), f"with balance {self.balance!r}")
        if self.balance != "bias":
            _refuse_idle_options(self, ("bias_update_rate",), f"with balance {self.balance!r}")
        if self.network == "random":
            idle = ("z_loss", "entropy", "target_depth", "balance_coefficient")
            _refuse_idle_options(self, idle, "with random scores, which nothing can train")


RouterConfig = ExpertChoiceConfig | TokenChoiceConfig
_ROUTERS: dict[str, type[ExpertChoiceConfig] | type[TokenChoiceConfig]] = {
    "expert_choice": ExpertChoiceConfig,
    "token_choice": TokenChoiceConfig,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model of the Llama family with recursive depth.

    A vanilla transformer is `sharing='none'`, one recursion, no router: the same network, not another one.

    Attributes:
        vocab_size: V; hidden_size: D; num_layers: effective depth L (layer applications, not stored layers).
        num_heads, num_kv_heads: H and the number of key-value heads it must be a multiple of (grouped-query attention).
        head_dim: K; None is hidden_size / num_heads.
        intermediate_size: width of the SwiGLU feed-forward.
        context_length: longest sequence trained on, in tokens.
        rope_theta: base of the rotary position embedding; norm_eps: epsilon of RMSNorm.
        tie_embeddings: the output head is the embedding matrix.
        sharing, recursions: parameter sharing, see `mor_model.layer_schedule`.
        router: None runs every token through every recursion step.
        kv_sharing: `recursion_wise` keeps keys and values of the selected tokens per step; `shared` lets later steps
            read the first step's; `hybrid` reads the first step's, refreshed at the tokens selected since (paper,
            section 2.2.2).
        document_masking: attention never crosses a document boundary (the forward pass then needs document ids).
        reset_positions: rotary positions restart with every document; requires document_masking.
        init_std: standard deviation of the initial weights, see `mor_model.initialization`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int | None = None
    context_length: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    sharing: str = "none"
    recursions: int = 1
    router: RouterConfig | None = None
    kv_sharing: KVSharing = "recursion_wise"
    document_masking: bool = False
    reset_positions: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _LARGEST}
        if self.head_dim is None:
            del sizes["head_dim"]
        check_sizes(**sizes)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model: hidden_size ({self.hidden_size}) is not a multiple of num_heads ({self.num_heads}); "
                "change one of them or set head_dim."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: num_heads ({self.num_heads}) is not a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_width % 2:
            raise ConfigError(f"model.head_dim: {self.head_width} is odd; rotary embeddings turn pairs of channels.")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"model.{name}: must be a positive number, not {shown(getattr(self, name))}.")
            object.__setattr__(self, name, float(getattr(self, name)))
        _check_choice("model.kv_sharing", self.kv_sharing, get_args(KVSharing))
        for name in ("tie_embeddings", "document_masking", "reset_positions"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name}: must be true or false, not {shown(getattr(self, name))}.")
        schedule = self.schedule  # refuses impossible sharing
        if self.router is not None:
            self._check_router()
        if self.kv_sharing != "recursion_wise":
            if self.router is None:
                raise ConfigError(
                    f"model.kv_sharing: {self.kv_sharing!r} shares the first recursion's keys with routed tokens and "
                    "requires a router; use 'recursion_wise' without one."
                )
            if not schedule.steps_share_layers:
                raise ConfigError(
                    f"model.kv_sharing: {self.kv_sharing!r} requires the same layers at every recursion, which sharing "
                    f"{self.sharing!r} does not give; use cycle or middle_cycle."
                )
            if self.capacities[0] < 1.0:
                raise ConfigError(
                    f"model.kv_sharing: {self.kv_sharing!r} reads every token's first keys, so the first of the "
                    f"router's capacities must be 1, not {self.capacities[0]}."
                )
        if self.reset_positions and not self.document_masking:
            raise ConfigError(
                "model.reset_positions: positions restart only where documents are told apart; "
                "set document_masking too."
            )

    def _check_router(self) -> None:
        router = self.router
        if not isinstance(router, (ExpertChoiceConfig, TokenChoiceConfig)):
            raise ConfigError(
                f"model.router: {shown(router)} is not a router; give its fields, for example kind: expert_choice, or "
                "null."
            )
        if self.recursions < 2:
            raise ConfigError(
                "model.router: a router needs at least 2 recursions to choose between; "
                "set recursions or leave the router out."
            )
        if isinstance(router, ExpertChoiceConfig) and router.capacities is not None:
            given = len(router.capacities)
            if given != self.recursions:
                raise ConfigError(
                    f"model.router.capacities: {given} values for {self.recursions} recursions; give one per recursion."
                )
        if router.target_depth is not None and not 1.0 <= router.target_depth <= self.recursions:
            raise ConfigError(
                f"model.router.target_depth: must lie between 1 and {self.recursions} recursions, "
                f"not {router.target_depth}."
            )

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @cached_property
    def schedule(self) -> LayerSchedule:
        return layer_schedule(self.num_layers, self.recursions, self.sharing)

    @property
    def capacities(self) -> tuple[float, ...]:
        """Planned share of the sequence at each recursion step: ones without expert-choice routing.

        Token-choice has no fixed capacity; what a balanced router gives, (R-r+1)/R, is what a plan can assume.
        """
        if isinstance(self.router, ExpertChoiceConfig):
            return self.router.step_capacities(self.recursions)
        if isinstance(self.router, TokenChoiceConfig):
            return tuple((self.recursions - r) / self.recursions for r in range(self.recursions))
        return (1.0,) * self.recursions

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` (and JSON, and YAML) bring back unchanged."""
        plain = dataclasses.asdict(self)
        if isinstance(self.router, ExpertChoiceConfig) and self.router.capacities is not None:
            plain["router"]["capacities"] = list(self.router.capacities)
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build a configuration from plain values.

        Raises:
            ConfigError: for an unknown key (naming the nearest known one), a missing one, or an impossible combination.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"model: must be a mapping of fields to values, not {shown(values)}.")
        values = dict(values)
        refuse_unknown_keys("model", values, [field.name for field in dataclasses.fields(cls)])
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"model: {', '.join(missing)} missing; give each a value or start from a preset.")
        router = values.get("router")
        if isinstance(router, dict):
            router = dict(router)
            kind = router.get("kind", "expert_choice")
            _check_choice("model.router.kind", kind, tuple(_ROUTERS))
            router_class = _ROUTERS[kind]
            refuse_unknown_keys("model.router", router, [field.name for field in dataclasses.fields(router_class)])
            values["router"] = router_class(**router)
        return cls(**values)
