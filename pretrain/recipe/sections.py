"""The sections of a recipe: every key with its type, its default and what it means.

Lengths are given in steps, as a share of the run, in tokens or in FLOPs; `pretrain.recipe.plan` turns them into steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pretrain.recipe.messages import first_problem, nearest

# What every number of the file formats and libraries below holds exactly; far more than any size, count or step.
LARGEST = 1 << 53
MOST_STEPS = 10**9
# A million sequences of 2,048 tokens are a hundred times the largest batch that anybody trains with.
_MOST_SEQUENCES = 1 << 20
_MOST_BRANCHES = 100
# Held-out text is read into memory.
MOST_TEXT_BYTES = 1 << 32
_HOURS_OF_TEN_YEARS = 87_600

Precision = Literal["auto", "bf16", "fp16", "fp32", "bf16_autocast"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _as_whole(value: Any) -> Any:
    """1e9 steps are a whole number of steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, AfterValidator(_finite)]
Whole = Annotated[int, BeforeValidator(_as_whole), Field(ge=-LARGEST, le=LARGEST)]
Name = Annotated[str, Field(min_length=1)]
"""Of a file, a folder or a thing."""
Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""A tuple that files write as a list."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Amount(Section):
    """A length of training given in tokens or in training FLOPs instead of steps; exactly one."""

    tokens: Number | None = Field(default=None, gt=0)
    flops: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> Amount:
        if (self.tokens is None) == (self.flops is None):
            raise ValueError("give exactly one of tokens and flops")
        return self


def _length(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            return Amount.model_validate(value)
        except ValidationError as error:
            # Raised from here, the reason is not buried among those of the other forms.
            raise ValueError(first_problem(error, Amount)) from None
    if isinstance(value, bool) or not isinstance(value, (int, float, Amount)):
        raise ValueError("give steps (a whole number), a share of the run (0.05), {tokens: N} or {flops: N}")
    if isinstance(value, float) and not 0.0 <= value < 1.0:
        if not value.is_integer() or value < 1:
            raise ValueError(f"{value} is neither a share of the run (0 <= share < 1) nor a whole number of steps")
        value = int(value)
    if isinstance(value, int) and not 0 <= value <= MOST_STEPS:
        raise ValueError(f"must lie between 0 and {MOST_STEPS:,} steps")
    return value


Length = Annotated[int | float | Amount, BeforeValidator(_length)]
"""Steps (whole number), share of the run (a float below 1), or an `Amount`."""


class Source(Section):
    """One data set of a mixture.

    Attributes:
        path: data set folder; subset: one of the sources inside it (such as Pile-CC), None takes all.
        name: what records call it; by default the subset, or the folder's name. The order of samples depends on it.
        weight: its share of the samples (relative to the others').
        final_weight: its share at the end of the run; the shares move there over `data.anneal`.
    """

    path: Name
    subset: Name | None = None
    name: Name | None = None
    weight: Number = Field(default=1.0, ge=0)
    final_weight: Number | None = Field(default=None, ge=0)

    @property
    def label(self) -> str:
        return self.name or self.subset or Path(self.path).name


class WeightPhase(Section):
    """Weights of a mixture that hold from the step `start` on.

    Attributes:
        weights: relative shares by source (its `name`); a source that is not named gives nothing.
    """

    start: Length
    weights: dict[str, Annotated[Number, Field(ge=0)]]


class Data(Section):
    """What is trained on.

    Attributes:
        path: data set folder written by `mor prep tokenize`; or `sources`: several, with weights. Exactly one of the
            two.
        anneal: the last part of the run over which weights move to `final_weight`; 0 switches it off.
        phases: weights that change at given steps, instead of `anneal`; before the first phase `weight` holds. Changes
            are tied to sample numbers: every sample that is left out brings them forward by one sample.
        packing: `concat` cuts the stream of documents into sequences; `best-fit` reads those that
            `mor prep tokenize --packing best-fit` arranged, whose padding is neither predicted nor routed. Validation
            reads concatenated text either way, so that the two are compared on the same tokens.
        verify: `structure` compares file sizes with the manifest at every start, `checksums` reads every byte.
        skip_samples: ranges [first, last] of sample numbers that are left out, such as those a non-finite step named.
    """

    path: Name | None = None
    sources: Annotated[tuple[Source, ...], Listed] = ()
    anneal: Length = 0
    phases: Annotated[tuple[WeightPhase, ...], Listed] = ()
    packing: Literal["concat", "best-fit"] = "concat"
    verify: Literal["structure", "checksums"] = "structure"
    skip_samples: Annotated[
        tuple[tuple[Whole, Whole], ...],
        BeforeValidator(
            lambda v: tuple(tuple(r) if isinstance(r, list) else r for r in v) if isinstance(v, list) else v
        ),
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> Data:
        if (self.path is None) == (not self.sources):
            raise ValueError("give exactly one of path (one data set folder) and sources (a mixture)")
        if self.phases and (self.anneal or not self.sources):
            raise ValueError("phases: need sources to weigh, and no anneal, which moves the same weights")
        names = [source.label for source in self.sources]
        for name in (name for phase in self.phases for name in phase.weights if name not in names):
            raise ValueError(f"phases: no source is called {name!r}; {nearest(name, names)}")
        previous = -1
        for first, last in self.skip_samples:
            if first <= previous or last < first:
                raise ValueError("skip_samples: ranges must be [first, last], ascending and apart from each other")
            previous = last
        return self


class Optim(Section):
    """The optimiser. Defaults are the paper's (arXiv 2507.10524, appendix on training).

    Attributes:
        name: `adamw`, or `muon`: Muon for the matrices inside the layers, AdamW for everything else, see
            `pretrain.training.muon`.
        lr: peak learning rate; Muon's updates are scaled to the size of AdamW's, so that it serves both.
        momentum: Muon's; betas and eps are AdamW's.
        weight_decay: applied to matrices only; norms and other vectors are not decayed.
        grad_clip: largest global gradient norm; 0 switches clipping off.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Number = Field(default=3e-3, gt=0)
    momentum: Number = Field(default=0.95, ge=0, lt=1)
    betas: Annotated[tuple[Number, Number], Listed] = (
        0.9,
        0.95,
    )
    eps: Number = Field(default=1e-8, gt=0)
    weight_decay: Number = Field(default=0.1, ge=0)
    grad_clip: Number = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Optim:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas: both must lie in [0, 1)")
        return self


class Schedule(Section):
    """How the learning rate moves.

    Attributes:
        kind: `wsd` (warm-up, stable, decay), `cosine`, `linear`, `constant`.
        warmup: linear rise to the peak; decay: length of the final fall (wsd only).
        decay_shape: `linear`, or `1-sqrt` (1 - sqrt(x), Haegele et al. 2024, arXiv 2405.18392).
        floor: smallest learning rate as a share of the peak, reached at the end.
    """

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup: Length = 0.05
    decay: Length = 0.2
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    floor: Number = Field(default=0.0, ge=0, lt=1)


class Budget(Section):
    """How long to train: exactly one of flops, tokens and steps.

    Attributes:
        flops: training FLOPs (three times the forward pass, embedding look-up left out, every layer application
            counted).
        branches: smaller budgets of the same unit. Each gets its own decay, branched off the trunk run, in
            RUN/branches/.
    """

    flops: Number | None = Field(default=None, gt=0)
    tokens: Number | None = Field(default=None, gt=0)
    steps: Whole | None = Field(default=None, gt=0, le=MOST_STEPS)
    branches: Annotated[tuple[Number, ...], Listed, Field(max_length=_MOST_BRANCHES)] = ()

    @property
    def unit(self) -> str:
        return next(name for name in ("flops", "tokens", "steps") if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if sum(value is not None for value in (self.flops, self.tokens, self.steps)) != 1:
            raise ValueError("give exactly one of flops, tokens and steps")
        if list(self.branches) != sorted(set(self.branches)) or any(not 0 < b < self.amount for b in self.branches):
            raise ValueError(
                f"branches: must ascend and each lie between 0 and the budget of {self.amount:g} {self.unit}"
            )
        return self


class Batch(Section):
    """How much one optimiser step sees.

    Attributes:
        sequences: global batch, over all ranks and accumulation steps; micro_batch: sequences of one forward pass on
            one rank.
        sequence_length: tokens per sequence (T).
        warmup_from: global batch at the start of the run, growing to `sequences` over `warmup`; None starts at full
            size.
    """

    sequences: Whole = Field(gt=0, le=_MOST_SEQUENCES)
    micro_batch: Whole = Field(gt=0)
    sequence_length: Whole = Field(gt=0)
    warmup_from: Whole | None = Field(default=None, gt=0)
    warmup: Length = 0

    @model_validator(mode="after")
    def _check(self) -> Batch:
        if self.sequences % self.micro_batch:
            raise ValueError(f"sequences ({self.sequences}) must be a multiple of micro_batch ({self.micro_batch})")
        if self.warmup_from is not None and (self.warmup_from > self.sequences or self.warmup_from % self.micro_batch):
            raise ValueError(
                f"warmup_from must be a multiple of micro_batch ({self.micro_batch}) and at most sequences "
                f"({self.sequences})"
            )
        return self


class Deepspeed(Section):
    """Which DeepSpeed JSON.

    Attributes:
        config: the name of one in ds_configs/ (`zero3`), a path, or `auto`: the lowest ZeRO stage whose estimated
            memory fits a rank, see `pretrain.training.zero_stage`.
    """

    config: Name = "zero3"


class Checkpoint(Section):
    """When checkpoints are written and which stay.

    Attributes:
        every: distance between checkpoints; 0 writes the last one only.
        every_minutes: also write one after this many minutes, measured from the end of the last checkpoint of any kind
            by rank 0's clock; None: only by steps.
        keep: number of newest checkpoints that stay. keep_every: those at its multiples stay too. keep_best: also write
            and keep the one with the lowest causal validation loss. log_spaced: also write and keep steps 1, 2, 4, 8...
        asynchronous: files are written by a thread while training goes on (costs one copy of the state in memory).
        universal: convert automatically when the world size has changed.
        weights_only: when the ZeRO stage has changed, go on with the weights and the position in the data, and with
            new optimiser states.
    """

    every: Length = 0.1
    every_minutes: Number | None = Field(default=None, gt=0, le=60 * _HOURS_OF_TEN_YEARS)
    keep: Whole = Field(default=2, ge=1)
    keep_every: Length | None = None
    keep_best: bool = False
    log_spaced: bool = False
    asynchronous: bool = False
    universal: bool = False
    weights_only: bool = False


class Suites(Section):
    """Evaluation suites during training, such as WikiText perplexity and few-shot tasks; see `mor eval`.

    Attributes:
        names: suites, as `mor eval --suite` takes them.
        every: distance between evaluations; 0 evaluates at the end only.
        limit: largest number of documents or questions of each task; None takes all.
        text_bytes: UTF-8 bytes of held-out text that `perplexity` reads.
    """

    names: Annotated[tuple[Name, ...], Listed] = Field(min_length=1)
    every: Length = 0.25
    limit: Whole | None = Field(default=100, ge=1)
    text_bytes: Whole = Field(default=100_000, ge=1, le=MOST_TEXT_BYTES)


class Evaluation(Section):
    """Validation loss during training, on the validation split, with causal and top-k routing; and suites.

    Attributes:
        every: distance between evaluations; 0 evaluates at the end only.
        sequences: how many sequences of each source; the same ones every time.
        max_share: cap on the share of the time since the start that evaluation may take. An evaluation is skipped if,
            at its last measured cost, it would exceed the cap; the last one never is. None: no cap.
    """

    every: Length = 0.1
    sequences: Whole = Field(default=64, ge=1, le=_MOST_SEQUENCES)
    suites: Suites | None = None
    max_share: Number | None = Field(default=None, gt=0, lt=1)


class Logging(Section):
    """metrics.jsonl is always written; wandb and TensorBoard mirror it.

    Attributes:
        every: steps between training records; wandb: `online`, `offline` or `disabled`.
    """

    every: Whole = Field(default=10, ge=1)
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    wandb_project: Name = "mor-pretrain"
    tensorboard: bool = False


class CapacityWarmup(Section):
    """Expert-choice capacities start at 1 and reach the configured ones along a half cosine over `length`."""

    length: Length


class DepthWarmup(Section):
    """All tokens take 1 recursion step at the start, and one more after each R-th part of `length`. After `length` the
    router decides; without a router all tokens take R steps.
    """

    length: Length


class Faults(Section):
    """What to do when training goes wrong.

    Attributes:
        max_non_finite: the run stops after this many steps in a row whose update was skipped (non-finite loss or
            gradient, or a spike), or after this many rollbacks to one checkpoint.
        spike: a step is a spike if its language-model loss exceeds the mean of the last `spike_window` steps by more
            than this (nats); None: off.
        on_spike: `skip` skips the update; `rollback` returns to the last checkpoint and skips the samples since then.
    """

    max_non_finite: Whole = Field(default=5, ge=1)
    spike: Number | None = Field(default=None, gt=0)
    spike_window: Whole = Field(default=50, ge=2, le=1_000_000)
    on_spike: Literal["skip", "rollback"] = "skip"


class Limits(Section):
    """When a run ends early.

    Attributes:
        wall_clock_hours: stop with a checkpoint after this time.
        stall_seconds: end the job when a rank has made no progress for this long.
    """

    wall_clock_hours: Number | None = Field(default=None, gt=0, le=_HOURS_OF_TEN_YEARS)
    stall_seconds: Number = Field(default=1800.0, gt=0, le=3600 * _HOURS_OF_TEN_YEARS)
