"""Removing documents that hold text of evaluation sets, found by shared n-grams of words (13 by default).

N-gram overlap with the evaluation sets is the usual test (Brown et al., "Language Models are Few-Shot Learners", 2020,
appendix C, uses 13-grams). A document is removed when it shares enough distinct n-grams, or holds half of an item's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from data_prep.corpora.corpus import CorpusReader, CorpusWriter, Entry, map_entries, removed_documents
from data_prep.corpora.evaluation_texts import EvaluationIndex, Match
from data_prep.errors import DataError
from data_prep.files import write_json, write_text
from data_prep.plain_text import markdown_text
from data_prep.sources.base import ReadOptions

ITEM_SHARE = 0.5
_LISTED = 100  # items of an evaluation set that the report names
_SHORTEST_SHARE = 0.1  # below it, an item is not named in the report


@dataclass(frozen=True)
class FoundItem:
    """An item of an evaluation set: the share of its n-grams found anywhere, and the document that holds most of it."""

    label: str
    ngrams: int
    share: float
    document: str
    document_begins: str
    document_share: float


@dataclass(frozen=True)
class SetReport:
    """One evaluation set. contaminated: items of which half the n-grams or more were found; too_short: without any."""

    name: str
    items: int
    too_short: int
    contaminated: int
    ngrams: int
    ngrams_found: int
    worst: list[FoundItem]


@dataclass(frozen=True)
class DecontaminationReport:
    """What was found and removed. rejects: what could not be read, by reason. notices: notes on the sources."""

    n: int
    matches: int
    item_share: float
    documents: int
    documents_with_matches: int
    removed: int
    kept: int
    kept_bytes: int
    evaluation: list[SetReport]
    rejects: dict[str, int] = field(default_factory=dict)
    reject_examples: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def decontaminate(
    sources: Sequence[str],
    against: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: ReadOptions,
    *,
    n: int = 13,
    matches: int = 20,
    workers: int = 1,
    progress: Callable[[str, int], None] = lambda _what, _count: None,
) -> DecontaminationReport:
    """Write the corpus without documents that hold evaluation text to `out`, with a report beside it.

    `report.json` and `report.md` say which items were found and where; `removed.jsonl.zst` lists every removed document
    with the number of n-grams it shares, the item it holds most of, and an example. `workers` changes none of it.

    Args:
        sources: as for `tokenize`.
        against: files or folders of evaluation sets, see `data_prep.corpora.evaluation_texts`.
        out: a new folder.
        n: words of an n-gram.
        matches: distinct shared n-grams from which a document is removed; one that holds half of an item's always is.
        workers: processes that look for n-grams.
        progress: called with `decontaminate` and the number of documents done, now and then.

    Raises:
        DataError: sources or evaluation sets that do not exist or cannot be read, `out` not empty, numbers below 1.
    """
    if n < 1 or matches < 1:
        raise DataError(
            f"n-grams have at least one word and a removal at least one match; got n={n}, matches={matches}."
        )
    writer = CorpusWriter(out, options)
    index = EvaluationIndex(against, n)
    reader = CorpusReader(sources, options, writer.folder)
    found = np.zeros(index.hashes.size, bool)
    best = _BestDocuments(len(index.labels))
    documents = with_matches = removed_count = 0
    with writer, removed_documents(writer.folder) as write_removed:
        for entry, match in map_entries(reader, _match_batch, workers, index):
            documents += 1
            if documents % 1000 == 0:
                progress("decontaminate", documents)
            if match is None:
                writer.write(entry)
                continue
            with_matches += 1
            found[match.ngrams] = True
            best.add(entry, match)
            if match.ngrams.size < matches and match.shares.max() < ITEM_SHARE:
                writer.write(entry)
                continue
            removed_count += 1
            write_removed(_removal(entry, match, index))
    report = DecontaminationReport(
        n=n,
        matches=matches,
        item_share=ITEM_SHARE,
        documents=documents,
        documents_with_matches=with_matches,
        removed=removed_count,
        kept=writer.documents,
        kept_bytes=writer.text_bytes,
        evaluation=_set_reports(index, found, best),
        rejects=dict(reader.rejects),
        reject_examples=list(reader.examples),
        notices=reader.notices,
    )
    write_text(writer.folder / "report.md", render(report))
    write_json(writer.folder / "report.json", asdict(report))
    return report


def _match_batch(index: EvaluationIndex, batch: list[Entry]) -> list[Match | None]:
    return [index.match(entry.text) for entry in batch]


class _BestDocuments:
    """For each item the document that holds the largest share of it; the first of equals."""

    def __init__(self, items: int) -> None:
        self.shares = np.zeros(items)
        self.places: dict[int, tuple[str, str]] = {}

    def add(self, entry: Entry, match: Match) -> None:
        for item in match.items[match.shares > self.shares[match.items]].tolist():
            self.places[item] = (entry.place, _beginning(entry))
        self.shares[match.items] = np.maximum(self.shares[match.items], match.shares)


def _beginning(entry: Entry) -> str:
    return " ".join(entry.text[:200].split())[:60]


def _removal(entry: Entry, match: Match, index: EvaluationIndex) -> dict[str, object]:
    most = int(np.argmax(match.shares))
    item = int(match.items[most])
    return {
        "document": entry.place,
        "begins": _beginning(entry),
        "ngrams": int(match.ngrams.size),
        "set": next(s.name for s in index.sets if s.first <= item < s.end),
        "item": index.labels[item],
        "item_share": round(float(match.shares[most]), 4),
        "example": match.example,
    }


def _set_reports(index: EvaluationIndex, found: np.ndarray, best: _BestDocuments) -> list[SetReport]:
    shares = index.found_shares(found)
    reports = []
    for evaluation in index.sets:
        span = slice(evaluation.first, evaluation.end)
        sizes = index.item_sizes[span]
        order = np.argsort(-shares[span], kind="stable")[:_LISTED] + evaluation.first
        worst = [
            FoundItem(
                index.labels[item],
                int(index.item_sizes[item]),
                round(float(shares[item]), 4),
                *best.places[item],
                round(float(best.shares[item]), 4),
            )
            for item in order.tolist()
            if shares[item] >= _SHORTEST_SHARE
        ]
        reports.append(
            SetReport(
                evaluation.name,
                evaluation.end - evaluation.first,
                evaluation.too_short,
                int(np.count_nonzero(shares[span] >= ITEM_SHARE)),
                int(sizes.sum()),
                round(float((shares[span] * sizes).sum())),
                worst,
            )
        )
    return reports


def render(report: DecontaminationReport) -> str:
    """The report as Markdown."""
    lines = [
        "# Decontamination",
        "",
        f"{report.documents} documents read, {report.documents_with_matches} share a {report.n}-gram of words with an "
        f"evaluation set, {report.removed} removed (at least {report.matches} shared, or {report.item_share:.0%} of an "
        f"item), {report.kept} kept.",
        "",
        "| evaluation set | items | too short to tell | half or more found | n-grams | found |",
        "|---|---|---|---|---|---|",
    ]
    for found in report.evaluation:
        share = found.ngrams_found / max(found.ngrams, 1)
        cells = (found.name, found.items, found.too_short, found.contaminated, found.ngrams, f"{share:.3%}")
        lines.append(_row(cells))
    for found in report.evaluation:
        if found.worst:
            lines += [
                "",
                f"## {markdown_text(found.name)}",
                "",
                "| item | found | in one document | document |",
                "|---|---|---|---|",
            ]
            lines += [
                _row((i.label, f"{i.share:.1%}", f"{i.document_share:.1%}", f"{i.document} ({i.document_begins})"))
                for i in found.worst
            ]
    if report.rejects:
        lines += [
            "",
            f"Could not be read: {report.rejects}",
            "",
            *(f"- {markdown_text(example)}" for example in report.reject_examples),
        ]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
