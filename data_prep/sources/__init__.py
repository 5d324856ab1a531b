"""Corpora as streams of documents."""

from data_prep.sources.base import Document, Filtered, Group, LargeDocument, ReadOptions, Reject, SourceError
from data_prep.sources.find import SourceFiles, find_sources, with_standard_input
from data_prep.sources.notices import notices
from data_prep.sources.plan import expected_bytes, pieces_expected, plan_groups, reader_for

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
    "notices",
    "pieces_expected",
    "plan_groups",
    "reader_for",
    "with_standard_input",
]
