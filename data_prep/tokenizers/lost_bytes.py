"""What of a text its ids do not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_prep.tokenizers.base import Tokenizer


def lost_bytes(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> int:
    """UTF-8 bytes of `text` that `ids`, its encoding, do not hold: 0 where decoding gives the text back.

    Bits per byte say nothing of these bytes: a model that predicts them and one that cannot have the same likelihood.
    Lost is what became the unknown token, was left out, or was replaced by another character (by a normalisation that
    folds case or compatibility characters, say). Characters are compared by how often they occur, not by their place,
    so spaces that a decoder puts between words hide no letter, but may hide a lost space.
    """
    back = tokenizer.decode(ids)
    if back == text:
        return 0
    missing = Counter(text)
    missing.subtract(back)
    if tokenizer.unk_id is not None:  # it is decoded as a name, whose letters are not of the text
        times = sum(token == tokenizer.unk_id for token in ids)
        for character in tokenizer.decode([tokenizer.unk_id]).strip():
            missing[character] += times
    lost = "".join(character * times for character, times in missing.items())
    return len(lost.encode("utf-8", "surrogatepass"))
