"""Log-likelihoods of token windows: the one place where evaluation calls the network.

Perplexity, few-shot suites and the harness adapter all reduce to the same question: given these context tokens, how
likely are those targets? Windows are batched by length and shared out over the ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from data_prep.reading.dataset import document_ids
from pretrain.errors import UserError
from pretrain.evaluation.evaluation_ranks import sum_over_ranks
from pretrain.ranks.lockstep import Lockstep

# The logits of a batch are its largest tensor: 64 MiB on a CPU, where larger ones cost more in fresh memory than they
# gain, and 2 GiB on an accelerator (fp32).
_LOGITS_CPU = 1 << 24
_LOGITS_ACCELERATOR = 1 << 29

Item = TypeVar("Item")


class Window(NamedTuple):
    """Targets and the tokens before them, both not empty; together at most one more than the context length."""

    context: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the network reads: all but the last target."""
        return self.context + self.targets[:-1]


def split_windows(context: Sequence[int], targets: Sequence[int], max_length: int) -> list[Window]:
    """Cut `targets` so that every one is predicted exactly once, from at most `max_length` tokens to its left.

    Each window predicts up to `max_length` targets; the last one fills what is left of its length with earlier
    tokens. With one prefix token as `context` these are the rolling windows of lm-evaluation-harness (context_len=1,
    made disjoint); with a prompt as `context` and few targets it is the prompt, cut from the left.

    Args:
        context: tokens before the first target, at least one.
        targets: tokens to predict; none gives no windows.
    """
    if not context:
        raise ValueError("context: is empty; give the END_OF_DOCUMENT token.")
    before = tuple(context)
    windows = []
    for start in range(0, len(targets), max_length):
        piece = tuple(targets[start : start + max_length])
        room = max_length + 1 - len(piece)
        # Only the last `room` tokens before the piece are kept, and they may reach back into the context.
        earlier = tuple(targets[max(0, start - room) : start])
        windows.append(Window((before + earlier)[-room:] if len(earlier) < room else earlier, piece))
    return windows


@dataclasses.dataclass
class Scorer:
    """A network as a function from windows to log-likelihoods.

    Attributes:
        model: a `mor_model.RecursiveTransformer`, or a DeepSpeed engine's `.module`.
        eod_id: END_OF_DOCUMENT; tells documents apart where the network masks attention between them.
        routing: `causal` never looks ahead and is what numbers are reported with; `topk` is the training-time
            selection, which sees the whole window.
        depth: recursion steps every token takes, without routers; None lets the routers decide.
        max_length: most tokens read at once; by default the context length the network was trained with.
        device: where inputs go; by default where the network's parameters are.
        progress: told the number of batches done, and of all batches.
        lockstep: where the ranks meet before every forward pass; by default they do not.
    """

    model: Any
    eod_id: int
    routing: str = "causal"
    depth: int | None = None
    max_length: int = 0
    device: torch.device | None = None
    progress: Callable[[int, int], None] | None = None
    lockstep: Lockstep = dataclasses.field(default_factory=Lockstep)

    def __post_init__(self) -> None:
        recursions = self.model.config.recursions
        if self.depth is not None and not 1 <= self.depth <= recursions:
            raise UserError(f"depth: must lie between 1 and the model's {recursions} recursions, not {self.depth}.")
        self.max_length = self.max_length or self.model.config.context_length
        self.device = self.device or next(self.model.parameters()).device

    def forward(self, inputs_BT: torch.Tensor, **options: Any) -> Any:
        """The network's output with this scorer's routing and depth."""
        if self.model.config.document_masking:
            documents = document_ids(inputs_BT.numpy(force=True), self.eod_id)
            options["documents_BT"] = torch.from_numpy(documents).to(inputs_BT)
        return self.model(inputs_BT, routing=self.routing, depth=self.depth, **options)

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood of each request's targets, and how likely greedy decoding would produce them.

        Every rank must call this with the same requests; each computes its share and all receive the whole result.

        Args:
            requests: (context, targets) each, read in as many windows as they need (`split_windows`).

        Returns:
            (natural logarithms, chances), both float64 of length len(requests). A chance is 1 where every target is the
            one most likely token, 0 where one is not; k tokens that are equally likely share theirs, 1/k each. Where
            the network gives no numbers the logarithm is not finite and the chance 0. No targets give 0 and 1.
        """
        windows: list[Window] = []
        owners: list[int] = []
        # Answers of one token to the same question read the same inputs: one row of the batch serves them all.
        rows: dict[tuple[int, ...], list[int]] = {}
        for owner, (context, targets) in enumerate(requests):
            for window in split_windows(context, targets, self.max_length):
                rows.setdefault(window.inputs, []).append(len(windows))
                windows.append(window)
                owners.append(owner)

        def measure(batch: list[tuple[int, ...]], result: torch.Tensor) -> None:
            logits = self._logits(batch)
            for row, inputs in enumerate(batch):
                for number in rows[inputs]:
                    targets = windows[number].targets
                    result[:, number] = _likelihood(logits[row, len(inputs) - len(targets) : len(inputs)], targets)

        batches = self._batches(sorted(rows, key=lambda inputs: (-len(inputs), inputs)))
        likelihood, greedy = self.sum_over_ranks(batches, measure, (2, len(windows)))
        nats, chances = np.zeros(len(requests)), np.ones(len(requests))
        np.add.at(nats, np.asarray(owners, dtype=np.int64), likelihood)
        np.multiply.at(chances, np.asarray(owners, dtype=np.int64), greedy)
        return nats, chances

    def sum_over_ranks(
        self, batches: Sequence[Item], measure: Callable[[Item, torch.Tensor], None], shape: tuple[int, ...]
    ) -> np.ndarray:
        """`evaluation_ranks.sum_over_ranks` with this scorer's network."""
        sums = sum_over_ranks(
            self.model, batches, measure, shape, device=self.device, lockstep=self.lockstep, progress=self.progress
        )
        return sums.cpu().numpy()

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Rows, longest first, in batches of about the same number of logits."""
        on_cpu = torch.device(self.device or "cpu").type == "cpu"
        budget = (_LOGITS_CPU if on_cpu else _LOGITS_ACCELERATOR) // self.model.config.vocab_size
        batches: list[list[tuple[int, ...]]] = []
        for inputs in rows:
            full = not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > budget
            # Top-k takes a share of the row it sees: padding would change how many tokens that is.
            if full or (self.routing == "topk" and len(batches[-1][0]) != len(inputs)):
                batches.append([])
            batches[-1].append(inputs)
        return batches

    def _logits(self, batch: list[tuple[int, ...]]) -> torch.Tensor:
        longest = len(batch[0])
        inputs = np.zeros((len(batch), longest), dtype=np.int64)
        valid = np.zeros((len(batch), longest), dtype=bool)
        for row, tokens in enumerate(batch):
            inputs[row, : len(tokens)] = tokens
            valid[row, : len(tokens)] = True
        valid_BT = None if valid.all() else torch.from_numpy(valid).to(self.device)
        return self.forward(torch.from_numpy(inputs).to(self.device), valid_BT=valid_BT, return_logits=True).logits_BTV


def _likelihood(logits_NV: torch.Tensor, targets: tuple[int, ...]) -> torch.Tensor:
    """(sum of log-probabilities, chance that greedy decoding gives the targets) as float64; see `Scorer.score`."""
    target_N = torch.tensor(targets, device=logits_NV.device)
    logits_NV = logits_NV.float()
    top_N = logits_NV.amax(dim=-1)
    # The sum over the vocabulary is taken in float64: in float32 it costs about 1e-5 nats a token.
    normaliser_N = (logits_NV - top_N[:, None]).exp().sum(dim=-1, dtype=torch.float64).log()
    chosen_N = (logits_NV.gather(-1, target_N[:, None])[:, 0] - top_N).double()
    equally_likely_N = (logits_NV == top_N[:, None]).sum(dim=-1).clamp(min=1)  # none where there is a NaN
    greedy_N = (chosen_N == 0.0).double() / equally_likely_N
    return torch.stack([(chosen_N - normaliser_N).sum(), greedy_N.prod()])
