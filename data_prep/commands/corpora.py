"""`import`, `export`, `dedup`, `decontaminate`: token files of other stacks, corpora made clean before tokenizing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands import options as o
from data_prep.plain_text import say

app = typer.Typer()
NewFolder = Annotated[Path, typer.Option(help="New folder to write.", show_default=False)]


@app.command("import")
def import_(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="megatron, datatrove, nanogpt or olmo.")],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[SPLIT=]FILE...", show_default=False, help="train unless named, such as validation=val.bin."
        ),
    ],
    out: NewFolder,
    tokenizer: Annotated[
        str,
        typer.Option(help="The tokenizer that made the ids: a file, a folder, or tiktoken:NAME.", show_default=False),
    ],
    eod: Annotated[str, typer.Option(help="END_OF_DOCUMENT token, where the tokenizer does not say.")] = "",
    dtype: Annotated[
        str,
        typer.Option(help="uint16, uint32 or uint64: type of the ids of nanogpt and olmo files."),
    ] = "",
) -> None:
    """Make a data set of token files of another stack."""
    from data_prep.interchange.imports import import_files

    with _shown(out) as show:
        report = import_files(kind, files, out, tokenizer, eod=eod, dtype=dtype, progress=show)
    for name, split in report.manifest.splits.items():
        say(f"{out}: {name}: {split.documents:,} documents, {split.tokens:,} tokens in {len(split.shards)} shard(s)")
    if report.unended or report.empty:
        say(f"{report.unended:,} documents got their END_OF_DOCUMENT, {report.empty:,} empty ones were left out")
    say(f"The first document begins (is it readable?): {report.sample[:200]!r}")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="DATA", help="Data set folder.", show_default=False)],
    out: NewFolder,
) -> None:
    """Write a data set under Megatron's names, for GPT-NeoX or Megatron-LM."""
    from data_prep.interchange.exports import export_megatron

    with _shown(out) as show:
        report = export_megatron(path, out, show)
    for split, prefix in report.prefixes.items():
        summary = report.summaries[split]
        say(f"{split}: {prefix} ({summary.documents:,} documents, {summary.tokens:,} tokens)")
    say(f"tokenizer: {report.tokenizer}")


@app.command()
def dedup(
    sources: o.Sources,
    out: NewFolder,
    near: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Also remove near copies from this similarity on, such as 0.8."),
    ] = None,
    workers: o.Workers = 0,
    text_field: o.TextField = "text",
    format: o.Format = "",
    separator: o.Separator = "",
    subset_field: o.SubsetField = "",
    subset: o.Subset = [],  # noqa: B006
) -> None:
    """Write corpora without copies: exact ones, and with --near also near ones (MinHash of word 5-grams)."""
    from data_prep.corpora.dedup import deduplicate

    options = o.read_options(
        text_field=text_field, format=format, separator=separator, subset_field=subset_field, subset=subset
    )
    with _shown(out) as show:
        report = deduplicate(sources, out, options, threshold=near, workers=workers or o.processors(), progress=show)
    say(
        f"{out}: {report.kept:,} of {report.documents:,} documents kept; {report.exact_copies:,} exact and "
        f"{report.near_copies:,} near copies removed, listed in {out / 'removed.jsonl.zst'}"
    )
    _finish(report.rejects, report.notices, report.documents, out)


@app.command()
def decontaminate(
    sources: o.Sources,
    out: NewFolder,
    against: Annotated[
        list[Path], typer.Option(help="File or folder of evaluation sets; repeatable.", show_default=False)
    ],
    n: Annotated[int, typer.Option("-n", "--ngram", min=1, help="Words of an n-gram.")] = 13,
    matches: Annotated[int, typer.Option(min=1, help="Shared n-grams from which a document is removed.")] = 20,
    workers: o.Workers = 0,
    text_field: o.TextField = "text",
    format: o.Format = "",
    separator: o.Separator = "",
    subset_field: o.SubsetField = "",
    subset: o.Subset = [],  # noqa: B006
) -> None:
    """Write corpora without documents that hold text of evaluation sets, with a report of what was found."""
    from data_prep.corpora.decontaminate import decontaminate as run

    options = o.read_options(
        text_field=text_field, format=format, separator=separator, subset_field=subset_field, subset=subset
    )
    with _shown(out) as show:
        report = run(
            sources, against, out, options, n=n, matches=matches, workers=workers or o.processors(), progress=show
        )
    say(f"{out}: {report.kept:,} of {report.documents:,} documents kept, {report.removed:,} removed")
    for found in report.evaluation:
        if found.contaminated:
            say(f"{found.name}: half or more found of {found.contaminated:,} of {found.items:,} items")
    say(f"{out / 'report.md'} names the items and documents")
    _finish(report.rejects, report.notices, report.documents, out)


def _finish(rejects: dict[str, int], notices: list[str], documents: int, out: Path) -> None:
    """Say what could not be read; exit with 1 where that is a broken file, or more than one document in a hundred."""
    for sentence in notices:
        say(f"note: {sentence}", error=True)
    if not rejects:
        return
    counts = ", ".join(f"{count:,} {reason}" for reason, count in rejects.items())
    say(f"could not be read: {counts}; examples are in {out / 'report.json'}")
    if sum(rejects.values()) > 0.01 * documents or {"broken_compression", "unreadable_file"} & set(rejects):
        raise typer.Exit(1)


@contextmanager
def _shown(out: Path) -> Iterator[Callable[[str, int], None]]:
    """What is under way, on standard error while the block writes `out`, where that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("") as status, o.writing(out):
        yield lambda what, count: status.update(f"{what}: {count:,}")
