"""The commands of `python -m data_prep` and `mor prep`; what is heavy is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.errors import DataError

if TYPE_CHECKING:
    from data_prep.plan import Settings

app = typer.Typer(
    help="Corpora to training shards.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
tokenizer_app = typer.Typer(help="Train or check a tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="[NAME=]file, folder, glob, hub:REPO[:CONFIG[:SPLIT]], python-docs, pile, c4, openwebtext, fineweb-edu, "
        "wikitext-103, or - for standard input.",
    ),
]
TextField = Annotated[str, typer.Option(help="Field of the text, dotted for nested ones.")]
Format = Annotated[str, typer.Option(help="jsonl, parquet, text or wikitext, where file names do not say.")]
Separator = Annotated[str, typer.Option(help="What stands between documents of text files (\\n is understood).")]
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
MaxBroken = Annotated[int, typer.Option("--max-broken-files", min=0, help="Files that may break off to allow.")]


@app.command()
def tokenize(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    tokenizer: Annotated[str, typer.Option(help=".model, tokenizer.json, a folder with one, or tiktoken:NAME.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes (0: one per processor).")] = 0,
    validation: Validation = 0.01,
    test: Test = 0.01,
    split_seed: SplitSeed = 0,
    text_field: TextField = "text",
    format: Format = "",
    separator: Separator = "",
    subset_field: SubsetField = "",
    subset: Subset = [],  # noqa: B006
    language_field: LanguageField = "",
    language: Language = [],  # noqa: B006
    minimum_bytes: MinimumBytes = 0,
    maximum_bytes: MaximumBytes = 0,
    max_tokens: Annotated[int, typer.Option(min=0, help="Training tokens to write at most (0: all).")] = 0,
    eod: Annotated[str, typer.Option(help="END_OF_DOCUMENT token, where the tokenizer does not say.")] = "",
    max_rejects: MaxRejects = 0.01,
    max_broken: MaxBroken = 0,
    task_index: Annotated[int, typer.Option(min=0, help="This task's number, for arrays.")] = 0,
    task_count: Annotated[int, typer.Option(min=0, help="Number of tasks; then `merge`.")] = 0,
) -> None:
    """Turn corpora into shards. A stopped run continues when the same command runs again."""
    from data_prep.pipeline import tokenize as run
    from data_prep.progress import Display
    from data_prep.schedule import Share

    settings = _settings(
        validation, test, split_seed, text_field, format, separator, subset_field, subset, language_field, language,
        minimum_bytes, maximum_bytes, max_tokens,
    )  # fmt: skip
    if task_count and task_index >= task_count:
        raise DataError(f"--task-index {task_index} must be below --task-count {task_count}.")
    display = Display()
    with _interruptible(display):
        manifest = run(
            sources,
            out,
            tokenizer,
            settings,
            display,
            eod_token=eod,
            workers=workers or _processors(),
            share=Share(task_index, task_count) if task_count else None,
            max_rejects=max_rejects,
            max_broken=max_broken,
        )
        display.close()
        if display.worked:
            display.say(display.summary())
        if manifest is None:
            display.say(f"task {task_index} of {task_count} is done; `merge {out}` when all are.")
        elif display.worked:
            _describe(out)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Data set folder the tasks wrote into.")],
    max_rejects: MaxRejects = 0.01,
    max_broken: MaxBroken = 0,
) -> None:
    """Finish a data set whose pieces were done by array tasks."""
    from data_prep.pipeline import merge_tasks

    merge_tasks(out, max_rejects, max_broken)
    _describe(out)


@tokenizer_app.command("train")
def tokenizer_train(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="File to write: .model for sentencepiece, .json for byte-bpe.")],
    vocab_size: Annotated[int, typer.Option(min=260, help="Vocabulary size.")],
    kind: Annotated[str, typer.Option(help="sentencepiece-bpe, sentencepiece-unigram or byte-bpe.")] = (
        "sentencepiece-bpe"
    ),
    max_bytes: Annotated[int, typer.Option(min=0, help="Text to train on, sampled over all (0: all).")] = 100_000_000,
    validation: Validation = 0.01,
    test: Test = 0.01,
    split_seed: SplitSeed = 0,
    text_field: TextField = "text",
    format: Format = "",
    separator: Separator = "",
    subset_field: SubsetField = "",
    subset: Subset = [],  # noqa: B006
    language_field: LanguageField = "",
    language: Language = [],  # noqa: B006
    minimum_bytes: MinimumBytes = 0,
    maximum_bytes: MaximumBytes = 0,
) -> None:
    """Train a tokenizer on the documents that `tokenize` with the same split options would train on."""
    import tempfile
    from dataclasses import replace

    from data_prep.sources import find_sources
    from data_prep.tokenizers.train import train_tokenizer

    settings = _settings(
        validation, test, split_seed, text_field, format, separator, subset_field, subset, language_field, language,
        minimum_bytes, maximum_bytes, 0,
    )  # fmt: skip
    found, _ = find_sources(sources, settings.options)
    with tempfile.TemporaryDirectory(prefix="data_prep-") as scratch:
        trained, counts = train_tokenizer(
            replace(settings, sources=tuple(found)), out, kind, vocab_size, max_bytes, Path(scratch)
        )
    print(
        f"{out}: {kind}, {trained.vocab_size:,} entries, trained on {counts['documents']:,} documents "
        f"({counts['bytes'] / 1e6:,.1f} MB; {counts['held_out']:,} held out, {counts['left_out']:,} left out)."
    )


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Data set folder.")],
) -> None:
    """Check a data set: structure, checksums, ids within the vocabulary, counts."""
    from data_prep.verify import verify_dataset

    report = verify_dataset(out)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.ok:
        raise typer.Exit(1)
    print(f"{out}: in order; {report.shards:,} shards, {report.documents:,} documents, {report.tokens:,} tokens.")


def _settings(
    validation: float,
    test: float,
    split_seed: int,
    text_field: str,
    format: str,
    separator: str,
    subset_field: str,
    subset: list[str],
    language_field: str,
    language: list[str],
    minimum_bytes: int,
    maximum_bytes: int,
    max_tokens: int,
) -> Settings:
    from data_prep.plan import Settings
    from data_prep.sources import ReadOptions

    options = ReadOptions(
        text_field=text_field,
        subset_field=subset_field,
        subsets=tuple(subset),
        language_field=language_field,
        languages=tuple(language),
        separator=separator.replace("\\n", "\n").replace("\\t", "\t"),
        minimum_bytes=minimum_bytes,
        maximum_bytes=maximum_bytes,
        format=format,
    )
    return Settings(
        sources=(),
        options=options,
        validation=validation,
        test=test,
        split_seed=split_seed,
        max_tokens=max_tokens,
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _interruptible(display: object) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _close(display)
        print("stopped; the same command continues where this one was.", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        _close(display)
        reason = error.strerror or str(error)
        raise DataError(f"writing failed: {reason}. Finished pieces are kept; the same command continues.") from None
    except DataError:
        _close(display)
        raise


def _close(display: object) -> None:
    getattr(display, "close", lambda: None)()


def _describe(out: Path) -> None:
    from data_prep.check import describe_round_trip
    from data_prep.manifest import read_manifest

    manifest = read_manifest(out)
    for name, split in manifest.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes / 1e6:,.1f} MB, "
            f"{len(split.shards)} shard(s)"
        )
    if manifest.rejects:
        listed = ", ".join(f"{count} {reason}" for reason, count in manifest.rejects.items())
        print(f"rejected: {listed}; listed in {out / 'rejects.jsonl'}", file=sys.stderr)
    sentence = describe_round_trip(manifest.statistics.get("round_trip", {}))
    if sentence:
        print(f"note: {sentence}", file=sys.stderr)
    print(f"encoder {manifest.engine.get('name')}; {out} is ready.")
