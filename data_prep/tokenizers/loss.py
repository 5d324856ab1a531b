"""What of a text its ids do not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_prep.tokenizers.base import Tokenizer


def lost_bytes(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """UTF-8 bytes of `text` that `ids`, its encoding, do not hold: 0 where decoding gives the text back."""
    back = tokenizer.decode(ids)
    if back == text:
        return 0
    lost = Counter(text)
    lost.subtract(back)
    return sum(
        times * len(character.encode("utf-8", "surrogatepass")) for character, times in lost.items() if times > 0
    )
