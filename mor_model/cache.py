"""Keys and values of generated text.

A token leaves keys and values only where it ran: in the prelude, at the recursion steps it took, and in the coda. So
every place of the schedule keeps its own list per row, the lists of a batch grow at different speeds, and an entry
remembers the true position of its token. Under causal routing a token's path depends on nothing later, so what is
cached never changes and cached decoding equals the full forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mor_model.attention import ALL, CAUSAL, Visibility
from mor_model.config import ModelConfig
from mor_model.layers import KVCache, Memory

_NOWHERE = torch.iinfo(torch.int64).max  # position of an unused entry: later than every query
_FIRST_ALLOCATION = 64  # entries; buffers double from here


class PresentTokens:
    """The tokens of one call at one place.

    Attributes:
        rows_A: rows of the batch that have tokens here, ascending, each with at least one.
        positions_AN: true positions, ascending where valid and later than all that is cached.
        valid_AN: False for padding, which leaves no entry and whose result means nothing.
    """

    def __init__(self, rows_A: Tensor, positions_AN: Tensor, valid_AN: Tensor) -> None:
        self.rows_A, self.positions_AN, self.valid_AN = rows_A, positions_AN, valid_AN
        # Padding looks from the end of time, so that it sees something: an empty softmax would be a NaN.
        self.views_AN = positions_AN.masked_fill(~valid_AN, _NOWHERE - 1)
        self.row_M, self.place_M = valid_AN.nonzero(as_tuple=True)
        self.padded = len(self.row_M) < valid_AN.numel()


class PlaceCache:
    """Entries of one place (prelude, a recursion step, coda), for all rows of a batch and all layers there.

    Attributes:
        counts_B: entries of each row.
        positions_BS: true position of each entry's token; a huge number where unused.
    """

    def __init__(self, batch: int, num_layers: int, device: torch.device) -> None:
        self.counts_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.positions_BS = torch.full((batch, 0), _NOWHERE, dtype=torch.long, device=device)
        self.layers = [_LayerCache(self) for _ in range(num_layers)]

    def extend(self, present: PresentTokens) -> Visibility:
        """Make room for the present tokens; each layer's `update` then fills it.

        Returns:
            Who sees what when the N present tokens look at their rows' S entries, the new ones included.
        """
        empty = self.positions_BS.shape[1] == 0
        counts_A = self.counts_B[present.rows_A]
        slots_AN = counts_A[:, None] + present.valid_AN.cumsum(1) - 1
        counts_A = counts_A + present.valid_AN.sum(1)
        self.counts_B[present.rows_A] = counts_A
        shortest, longest = (int(bound) for bound in torch.aminmax(counts_A))
        self.positions_BS = _with_room(self.positions_BS, longest, _NOWHERE)
        self.present, self.length = present, longest
        self.target_M = present.rows_A[present.row_M], slots_AN[present.row_M, present.place_M]
        self.positions_BS[self.target_M] = present.positions_AN[present.row_M, present.place_M]
        if not present.padded and shortest == longest:
            if empty:
                return CAUSAL
            if present.positions_AN.shape[1] == 1:
                return ALL
        return Visibility(dense=self.seen(present))

    def look(self, present: PresentTokens) -> Visibility:
        """Who sees what when tokens look at entries without leaving any."""
        self.present, self.length = present, int(self.counts_B[present.rows_A].max())
        return Visibility(dense=self.seen(present))

    def seen(self, present: PresentTokens) -> Tensor:
        """Entries that are not later than the present tokens, bool [A, 1, N, S]."""
        return (self.of_rows(self.positions_BS)[:, None, :] <= present.views_AN[:, :, None])[:, None]

    def of_rows(self, entries: Tensor) -> Tensor:
        """The first S entries [A, S, ...] of the present tokens' rows; a view where these are all rows."""
        if len(self.present.rows_A) == len(self.counts_B):
            return entries[:, : self.length]
        return entries[self.present.rows_A, : self.length]

    def reorder(self, rows_B: Tensor) -> None:
        """Let row i continue what row `rows_B[i]` was."""
        self.counts_B, self.positions_BS = self.counts_B[rows_B], self.positions_BS[rows_B]
        for layer in self.layers:
            layer.reorder(rows_B)


class _LayerCache:
    """Keys and values of one layer at one place; see `mor_model.layers.KVCache`."""

    def __init__(self, place: PlaceCache) -> None:
        self.place = place
        self.key_BSGK: Tensor | None = None
        self.value_BSGK: Tensor | None = None

    def update(self, key_BNGK: Tensor, value_BNGK: Tensor) -> tuple[Tensor, Tensor]:
        self.key_BSGK = self._written(self.key_BSGK, key_BNGK)
        self.value_BSGK = self._written(self.value_BSGK, value_BNGK)
        return self.entries()

    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values [A, S, G, K] of the rows that the place looks at."""
        assert self.key_BSGK is not None and self.value_BSGK is not None
        return self.place.of_rows(self.key_BSGK), self.place.of_rows(self.value_BSGK)

    def _written(self, buffer_BSGK: Tensor | None, new_ANGK: Tensor) -> Tensor:
        place, present = self.place, self.place.present
        if buffer_BSGK is None:
            buffer_BSGK = new_ANGK.new_zeros(len(place.counts_B), 0, *new_ANGK.shape[2:])
        buffer_BSGK = _with_room(buffer_BSGK, place.length, 0)
        buffer_BSGK[place.target_M] = new_ANGK[present.row_M, present.place_M]
        return buffer_BSGK

    def reorder(self, rows_B: Tensor) -> None:
        if self.key_BSGK is not None and self.value_BSGK is not None:
            self.key_BSGK, self.value_BSGK = self.key_BSGK[rows_B], self.value_BSGK[rows_B]


class _RefreshedCache:
    """Hybrid keys and values: entries of this and of all earlier steps (the visibility picks a token's latest)."""

    def __init__(self, layers: list[_LayerCache]) -> None:
        self.earlier, self.own = layers[:-1], layers[-1]

    def update(self, key_BNGK: Tensor, value_BNGK: Tensor) -> tuple[Tensor, Tensor]:
        entries = [layer.entries() for layer in self.earlier] + [self.own.update(key_BNGK, value_BNGK)]
        return torch.cat([key for key, _ in entries], dim=1), torch.cat([value for _, value in entries], dim=1)


class DecodingCache:
    """All that decoding a batch remembers.

    Attributes:
        lengths_B: tokens seen in each row, which is the position of its next token.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device) -> None:
        schedule = config.schedule
        self.kv_sharing = config.kv_sharing
        self.lengths_B = torch.zeros(batch, dtype=torch.long, device=device)
        self.prelude = PlaceCache(batch, len(schedule.prelude), device)
        self.steps = [PlaceCache(batch, len(layers), device) for layers in schedule.steps]
        self.coda = PlaceCache(batch, len(schedule.coda), device)
        # Steps a token took, by row and position: tells a token's last entry from those a later step replaced.
        self.depths_BT = torch.zeros(batch, 0, dtype=torch.long, device=device)

    def open_step(
        self, step: int, present: PresentTokens
    ) -> tuple[Visibility, list[Memory | None], list[KVCache | None]]:
        """Prepare recursion step `step` (0-based) for the present tokens.

        Returns:
            the visibility, and for each layer of the step what its block takes as `memory` and as `cache`.
        """
        place = self.steps[step]
        self._note_depth(step + 1, present)
        if step == 0 or self.kv_sharing == "recursion_wise":
            return place.extend(present), [None] * len(place.layers), list(place.layers)
        if self.kv_sharing == "shared":
            first = self.steps[0]
            return first.look(present), [Memory(*layer.entries()) for layer in first.layers], [None] * len(place.layers)
        seen = []
        for number, earlier in enumerate(self.steps[:step], 1):
            earlier.look(present)
            positions_AS = earlier.of_rows(earlier.positions_BS).clamp(max=self.depths_BT.shape[1] - 1)
            stopped_AS = self.depths_BT[present.rows_A].gather(1, positions_AS) == number
            seen.append(earlier.seen(present) & stopped_AS[:, None, None, :])
        place.extend(present)
        dense = torch.cat([*seen, place.seen(present)], dim=-1)
        layers = zip(*(earlier.layers for earlier in self.steps[: step + 1]))
        return Visibility(dense=dense), [None] * len(place.layers), [_RefreshedCache(list(each)) for each in layers]

    def depth_at(self, rows_A: Tensor, positions_AN: Tensor) -> Tensor:
        """Recursion steps taken so far by the tokens at some positions."""
        self.depths_BT = _with_room(self.depths_BT, int(self.lengths_B.max()), 0)
        return self.depths_BT[rows_A].gather(1, positions_AN)

    def _note_depth(self, depth: int, present: PresentTokens) -> None:
        self.depths_BT = _with_room(self.depths_BT, int(self.lengths_B.max()), 0)
        at = present.rows_A[present.row_M], present.positions_AN[present.row_M, present.place_M]
        self.depths_BT[at] = depth

    def reorder(self, rows_B: Tensor) -> None:
        """Let row i continue what row `rows_B[i]` was (beam search)."""
        self.lengths_B, self.depths_BT = self.lengths_B[rows_B], self.depths_BT[rows_B]
        for place in (self.prelude, *self.steps, self.coda):
            place.reorder(rows_B)

    def kept_values(self) -> int:
        """Numbers kept as keys and values, allocated room apart."""
        kept = 0
        for place in (self.prelude, *self.steps, self.coda):
            for layer in place.layers:
                if layer.key_BSGK is not None:
                    kept += 2 * int(place.counts_B.sum()) * layer.key_BSGK[0, 0].numel()
        return kept


def _with_room(buffer_BS: Tensor, length: int, fill: int) -> Tensor:
    """The same entries with space for at least `length` per row; doubling keeps the copying linear in the length."""
    room = buffer_BS.shape[1]
    if length <= room:
        return buffer_BS
    added = max(length, 2 * room, _FIRST_ALLOCATION) - room
    new = buffer_BS.new_full((buffer_BS.shape[0], added, *buffer_BS.shape[2:]), fill)
    return torch.cat((buffer_BS, new), dim=1)
