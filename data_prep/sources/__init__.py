"""Corpora as streams of documents."""

from data_prep.sources.base import Document, Filtered, Group, LargeDocument, ReadOptions, Reject, SourceError
from data_prep.sources.plan import (
    SourceFiles,
    expected_bytes,
    find_sources,
    mixed_kinds,
    pieces_expected,
    plan_groups,
    reader_for,
    with_standard_input,
)

__all__ = [
    "Document",
    "Filtered",
    "Group",
    "LargeDocument",
    "ReadOptions",
    "Reject",
    "SourceError",
    "SourceFiles",
    "expected_bytes",
    "find_sources",
    "mixed_kinds",
    "pieces_expected",
    "plan_groups",
    "reader_for",
    "with_standard_input",
]
