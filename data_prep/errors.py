"""What a person must change about a corpus, a tokenizer or a data set."""

from __future__ import annotations


class DataError(ValueError):
    """Input or output that cannot be used; the message names the file, what was expected and what to do."""
