"""`inspect`, `stats` and `verify`: what a finished data set folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands import options as o
from data_prep.errors import DataError
from data_prep.plain_text import say

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(metavar="DATA", help="Data set folder.", show_default=False)]
SplitName = Annotated[str, typer.Option(help="train, validation or test.")]


@app.command()
def verify(out: Folder) -> None:
    """Check a data set: structure, checksums, ids within the vocabulary, counts."""
    from data_prep.reading.verify import verify_dataset

    report = verify_dataset(out)
    for problem in report.problems:
        say(problem, error=True)
    if not report.ok:
        raise typer.Exit(1)
    say(f"{out}: in order; {report.shards:,} shards, {report.documents:,} documents, {report.tokens:,} tokens.")


@app.command()
def stats(
    out: Folder,
    picture: Annotated[Path | None, typer.Option(help="Also draw the document lengths into this file.")] = None,
) -> None:
    """Tokens per source, document lengths, fertility, rejects."""
    from data_prep.reading.length_statistics import draw_lengths, report
    from data_prep.reading.manifest import read_manifest

    manifest = read_manifest(out)
    say(report(manifest))
    if picture is not None:
        with o.writing(picture):
            draw_lengths(manifest, picture)
        say(f"document lengths are drawn in {picture}")


@app.command()
def inspect(
    out: Folder,
    document: Annotated[int | None, typer.Option(min=0, help="Number of a document.", show_default=False)] = None,
    sequence: Annotated[int | None, typer.Option(min=0, help="Number of a sequence.", show_default=False)] = None,
    length: Annotated[
        int, typer.Option(min=0, help="Length of sequences (0: the one the data set was packed for, or 2048).")
    ] = 0,
    split: SplitName = "train",
    ids: Annotated[bool, typer.Option("--ids", help="Print ids too.")] = False,
) -> None:
    """Print a document, or a sequence as training sees it, with its document boundaries."""
    from data_prep.reading.inspection import show_document, show_sequence

    if (document is None) == (sequence is None):
        raise DataError("name either --document N or --sequence N.")
    if document is not None:
        say(show_document(out, split, document, ids))
    else:
        assert sequence is not None
        say(show_sequence(out, split, sequence, length, ids))
