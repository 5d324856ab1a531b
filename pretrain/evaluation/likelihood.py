"""Log-likelihoods of token windows: the one place where evaluation calls the network.

Perplexity, few-shot suites and the harness adapter all reduce to the same question: given these context tokens, how
likely are those targets? Windows are batched by length and dealt out over the ranks of the process group, where there
is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from data_prep.reading.dataset import document_ids
from pretrain.errors import UserError
from pretrain.evaluation.settings import Routing, check_routing
from pretrain.ranks.lockstep import Lockstep

# The logits of a batch are its largest tensor: 64 MiB on a CPU, where larger ones cost more in fresh memory than they
# gain, and 2 GiB on an accelerator (fp32).
_LOGITS_CPU = 1 << 24
_LOGITS_ACCELERATOR = 1 << 29

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all) of the windows being scored."""


class Window(NamedTuple):
    """Targets and the tokens that stand before them; both not empty, len(context) + len(targets) <= context length +
    1.
    """

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
        max_length: most tokens the network reads at once.
    """
    if not context:
        raise ValueError(
            "context: at least one token must stand before the first target; give the END_OF_DOCUMENT token."
        )
    before = tuple(context)
    windows = []
    for start in range(0, len(targets), max_length):
        piece = tuple(targets[start : start + max_length])
        room = max_length + 1 - len(piece)
        # Only the last `room` tokens before the piece are kept, and they may reach back into the context.
        earlier = tuple(targets[max(0, start - room) : start])
        windows.append(Window((before + earlier)[-room:] if len(earlier) < room else earlier, piece))
    return windows


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def from_rank_zero(value: Item) -> Item:
    """Rank 0's `value`, on every rank."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back afterwards."""
    training = model.training
    model.eval()
    try:
        # Not inference_mode: its tensors cannot take part in ZeRO-3's gathering of partitioned parameters.
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@dataclasses.dataclass
class Scorer:
    """A network as a function from windows to log-likelihoods.

    Attributes:
        model: a `mor_model.RecursiveTransformer`, or a DeepSpeed engine's `.module`.
        eod_id: END_OF_DOCUMENT; tells documents apart where the network masks attention between them.
        routing: `causal` never looks ahead and is what numbers are reported with; `topk` is the training-time
            selection, which sees the whole window.
        depth: recursion steps every token takes, routers ignored; None lets them decide.
        max_length: most tokens read at once; by default what the network was trained on.
        device: where inputs go; by default where the network's parameters are.
        progress: told after every batch how far scoring has come.
        lockstep: what the ranks agree upon before every forward pass; by default nothing.
    """

    model: Any
    eod_id: int
    routing: Routing = "causal"
    depth: int | None = None
    max_length: int = 0
    device: torch.device | None = None
    progress: Progress | None = None
    lockstep: Lockstep = dataclasses.field(default_factory=Lockstep)

    def __post_init__(self) -> None:
        check_routing(self.routing)
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

    def score(self, windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
        """Log-likelihood of each window's targets, and how likely greedy decoding would produce them.

        Every rank must call this with the same windows; each computes its share and all receive the whole result.

        Returns:
            (natural logarithms, chances), both float64 of length len(windows). A chance is 1 where every target is the
            one most likely token, 0 where one is not; k tokens that are equally likely share theirs, 1/k each. Where
            the network gives no numbers the logarithm is not finite and the chance 0.
        """
        rank, world = rank_and_world()
        # Answers of one token to the same question read the same inputs: one row of the batch serves them all.
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, window in enumerate(windows):
            rows.setdefault(window.inputs, []).append(number)
        batches = self._batches(sorted(rows, key=lambda inputs: (-len(inputs), inputs)))
        mine = batches[rank::world]
        total = sum(map(len, rows))
        result = torch.zeros(2, len(windows), dtype=torch.float64, device=self.device)
        done = 0
        with evaluating(self.model), self.lockstep.passes():
            # Under ZeRO-3 a forward pass is a collective: ranks with fewer batches repeat their last and drop its
            # result.
            for turn in range(-(-len(batches) // world)):
                self.lockstep.meet()
                batch = mine[turn] if turn < len(mine) else batches[-1]
                logits = self._logits(batch)
                if turn >= len(mine):
                    continue
                for row, inputs in enumerate(batch):
                    for number in rows[inputs]:
                        targets = windows[number].targets
                        end = len(inputs)
                        result[:, number] = _likelihood(logits[row, end - len(targets) : end], targets)
                done += world * sum(map(len, batch))
                if self.progress is not None:
                    self.progress(min(done, total), total)
            if world > 1:
                dist.all_reduce(result)
        likelihood, greedy = result.cpu().numpy()
        return likelihood, greedy

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
