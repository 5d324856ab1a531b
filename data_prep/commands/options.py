"""Options that several commands share, and what they become."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.errors import DataError

if TYPE_CHECKING:
    from data_prep.sources.base import ReadOptions

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        show_default=False,
        help="[NAME=]file, folder, glob, hub:REPO[:CONFIG[:SPLIT]], python-docs, pile, c4, openwebtext, fineweb-edu, "
        "wikitext-103, or - for JSON lines on standard input.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of the text, dotted for nested ones.")]
Format = Annotated[str, typer.Option(help="jsonl, parquet, text or wikitext, where file names do not say.")]
Separator = Annotated[str, typer.Option(help="What stands between documents of text files (\\n, \\r are understood).")]
SubsetField = Annotated[str, typer.Option(help="Field that names the subset, such as meta.pile_set_name.")]
Subset = Annotated[list[str], typer.Option(help="Take only this subset; repeatable.")]
LanguageField = Annotated[str, typer.Option(help="Field that holds the language.")]
Language = Annotated[list[str], typer.Option(help="Take only this language; repeatable.")]
MinimumBytes = Annotated[int, typer.Option(min=0, help="Leave out shorter documents.")]
MaximumBytes = Annotated[int, typer.Option(min=0, help="Leave out longer documents (0: none).")]
Validation = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of documents held out for validation.")]
Test = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of documents held out for testing.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Another seed holds out other documents.")]
MaxRejects = Annotated[float, typer.Option(min=0.0, help="Rejected documents to allow: a share below 1, or a number.")]
MaxBroken = Annotated[
    int,
    typer.Option("--max-broken-files", min=0, help="Truncated files to tolerate; more abort the run."),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes (0: one per processor).")]


def read_options(*, separator: str, subset: list[str], language: Sequence[str] = (), **fields: Any) -> ReadOptions:
    """`ReadOptions` as the command line gives them; in --separator, `\\n`, `\\r` and `\\t` have their usual meaning.

    Raises:
        DataError: options that do not go together.
    """
    from data_prep.sources.base import ReadOptions

    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator.replace(written, meant)
    return ReadOptions(separator=separator, subsets=tuple(subset), languages=tuple(language), **fields)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns an error of the system while the block writes `out`, such as a full disk, into a `DataError`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"writing {error.filename or out} failed: {reason}. Set that right and run the same command again."
        ) from None


def processors() -> int:
    """Processors this process may use."""
    from data_prep.processors import available_processors

    return available_processors()
