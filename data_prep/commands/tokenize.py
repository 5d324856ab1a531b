"""`tokenize` and `merge`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands import options as o
from data_prep.errors import DataError
from data_prep.plain_text import say

app = typer.Typer()


@app.command()
def tokenize(
    sources: o.Sources,
    out: Annotated[Path, typer.Option(help="Data set folder to write.", show_default=False)],
    tokenizer: Annotated[
        str, typer.Option(help=".model, tokenizer.json, a folder with one, or tiktoken:NAME.", show_default=False)
    ],
    workers: o.Workers = 0,
    validation: o.Validation = 0.01,
    test: o.Test = 0.01,
    split_seed: o.SplitSeed = 0,
    text_field: o.TextField = "text",
    format: o.Format = "",
    separator: o.Separator = "",
    subset_field: o.SubsetField = "",
    subset: o.Subset = [],  # noqa: B006
    language_field: o.LanguageField = "",
    language: o.Language = [],  # noqa: B006
    minimum_bytes: o.MinimumBytes = 0,
    maximum_bytes: o.MaximumBytes = 0,
    max_tokens: Annotated[int, typer.Option(min=0, help="Training tokens to write at most (0: all).")] = 0,
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Shuffle the training documents of each source.", show_default=False)
    ] = None,
    packing: Annotated[str, typer.Option(help="concat, or best-fit: also write which documents share a sequence.")] = (
        "concat"
    ),
    sequence_length: Annotated[
        int, typer.Option(min=0, help="Length best-fit packs for; with concat, report the cuts at it.")
    ] = 0,
    piece_bytes: Annotated[int, typer.Option(min=0, help="Text of a shard (0: by the size of the corpus).")] = 0,
    eod: Annotated[str, typer.Option(help="END_OF_DOCUMENT token, where the tokenizer does not say.")] = "",
    max_rejects: o.MaxRejects = 0.01,
    max_broken: o.MaxBroken = 0,
    task_index: Annotated[int, typer.Option(min=0, help="This task's number, from 0, for job arrays.")] = 0,
    task_count: Annotated[int, typer.Option(min=0, help="Number of tasks; `merge` finishes.")] = 0,
    mpi: Annotated[bool, typer.Option("--mpi", help="One worker per MPI rank, under mpirun or srun.")] = False,
) -> None:
    """Turn corpora into shards. A stopped run continues when the same command runs again."""
    from data_prep.tokenizing.piece_schedule import Share
    from data_prep.tokenizing.pipeline import Job, tokenize_mpi
    from data_prep.tokenizing.pipeline import tokenize as run
    from data_prep.tokenizing.progress import Display
    from data_prep.tokenizing.shard_plan import Settings

    if task_count and task_index >= task_count:
        raise DataError(f"--task-index {task_index} must be below --task-count {task_count}.")
    if mpi and (task_count or workers > 1):
        raise DataError("--mpi works with one process per rank; leave out --workers and --task-count.")
    for folder in (Path(address) for source in sources for address in {source, source.split("=", 1)[-1]}):
        if os.path.isdir(folder) and out.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"--out {out} is inside the source {folder}, so the data set would be read as a corpus when the run is "
                "continued. Choose a folder outside."
            )
    options = o.read_options(
        text_field=text_field,
        format=format,
        separator=separator,
        subset_field=subset_field,
        subset=subset,
        language_field=language_field,
        language=language,
        minimum_bytes=minimum_bytes,
        maximum_bytes=maximum_bytes,
    )
    settings = Settings(
        sources=(),
        options=options,
        validation=validation,
        test=test,
        split_seed=split_seed,
        max_tokens=max_tokens,
        shuffle_seed=shuffle_seed,
        packing=packing,
        sequence_length=sequence_length,
        piece_bytes=piece_bytes,
    )
    job = Job(tuple(sources), out, tokenizer, settings, eod, max_rejects, max_broken)
    display = Display()
    with _reported(display, out):
        if mpi:
            manifest = tokenize_mpi(job, display)
            if manifest is None:
                return  # another rank speaks
        else:
            share = Share(task_index, task_count) if task_count else None
            manifest = run(job, display, workers=workers or o.processors(), share=share)
        display.close()
        if display.worked:
            display.say(display.summary())
        if manifest is None:
            display.say(f"task {task_index} of {task_count} is done; run `merge {out}` when all are.")
        elif display.worked:
            describe(out)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Data set folder the tasks wrote into.", show_default=False)],
    workers: o.Workers = 0,
    max_rejects: o.MaxRejects = 0.01,
    max_broken: o.MaxBroken = 0,
) -> None:
    """Finish a data set whose pieces were done by the tasks of a job array."""
    from data_prep.tokenizing.pipeline import merge_tasks
    from data_prep.tokenizing.progress import Display

    with _reported(Display(), out):
        merge_tasks(out, max_rejects, max_broken, workers or o.processors())
    describe(out)


def describe(out: Path) -> None:
    """Print what a finished data set holds, and notes about it on the error stream."""
    from data_prep.reading.manifest import read_manifest
    from data_prep.tokenizing.tokenizer_check import describe_round_trip

    manifest = read_manifest(out)
    for name, split in manifest.splits.items():
        say(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes / 1e6:,.1f} MB, "
            f"{len(split.shards)} shard(s)"
        )
    packing = manifest.statistics.get("packing", {}).get("train")
    if packing:
        say(
            f"{manifest.settings['packing']} packing: {packing['sequences']:,} training sequences, "
            f"{packing['padding']:.2%} padding, {packing['truncation']:.2%} of the documents cut"
        )
    if manifest.rejects:
        listed = ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items())
        say(f"rejected: {listed}; listed in {out / 'rejects.jsonl'}", error=True)
    if manifest.statistics.get("forced_cuts"):
        say(
            f"note: {manifest.statistics['forced_cuts']} cut(s) inside documents without any white space for 4 million "
            "characters; the ids around them may differ from those of the uncut document.",
            error=True,
        )
    sentence = describe_round_trip(manifest.statistics.get("round_trip", {}))
    if sentence:
        say(f"note: {sentence}", error=True)
    say(f"encoder {manifest.engine.get('name')}; {out} is ready.")


@contextlib.contextmanager
def _reported(display: object, out: Path) -> Iterator[None]:
    """Ctrl-C and a full disk end the command with one sentence; what is finished by then stays."""
    try:
        with o.writing(out):
            yield
    except KeyboardInterrupt:
        say("stopped; the same command continues where this one was.", error=True)
        raise typer.Exit(130) from None
    finally:
        getattr(display, "close", lambda: None)()
