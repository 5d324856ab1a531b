"""The error for corpora, tokenizers and data sets that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Input or output that cannot be used; the message names the file, what was expected and what to do."""
