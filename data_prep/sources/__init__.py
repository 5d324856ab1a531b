"""Corpora as streams of documents."""

from data_prep.sources.base import Document, Filtered, Group, LargeDocument, ReadOptions, Reject, SourceError
from data_prep.sources.plan import SourceFiles, find_sources, plan_groups, reader_for, with_standard_input

__all__ = [
    "Document",
    "Filtered",
    "Group",
    "LargeDocument",
    "ReadOptions",
    "Reject",
    "SourceError",
    "SourceFiles",
    "find_sources",
    "plan_groups",
    "reader_for",
    "with_standard_input",
]
