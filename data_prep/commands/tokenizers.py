"""`tokenizer train` and `tokenizer check`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands import options as o
from data_prep.plain_text import say

app = typer.Typer(help="Train or check a tokenizer.", no_args_is_help=True)


@app.command()
def train(
    sources: o.Sources,
    out: Annotated[
        Path, typer.Option(help="File to write: .model for sentencepiece, .json for byte-bpe.", show_default=False)
    ],
    vocab_size: Annotated[int, typer.Option(min=260, help="Vocabulary size.", show_default=False)],
    kind: Annotated[str, typer.Option(help="sentencepiece-bpe, sentencepiece-unigram or byte-bpe.")] = (
        "sentencepiece-bpe"
    ),
    max_bytes: Annotated[int, typer.Option(min=0, help="Text to train on, sampled over all (0: all).")] = 100_000_000,
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
) -> None:
    """Train a tokenizer on the documents that `tokenize` with the same split options would train on."""
    from data_prep.sources.find import find_sources, with_standard_input
    from data_prep.sources.notices import notices
    from data_prep.tokenizing.shard_plan import Settings
    from data_prep.tokenizing.train_tokenizer import train_tokenizer

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
    with o.writing(out), tempfile.TemporaryDirectory(prefix="data_prep-") as scratch:
        found, left_out = find_sources(sources, options)
        for sentence in [*left_out, *notices(found, options)]:
            say(sentence, error=True)
        found = with_standard_input(found, Path(scratch))
        settings = Settings(tuple(found), options, validation, test, split_seed)
        trained, counts = train_tokenizer(settings, out, kind, vocab_size, max_bytes)
    say(
        f"{out}: {kind}, {trained.vocab_size:,} entries, trained on {counts['documents']:,} documents "
        f"({counts['bytes'] / 1e6:,.1f} MB; {counts['held_out']:,} held out, {counts['left_out']:,} left out)."
    )


@app.command()
def check(
    tokenizer: Annotated[str, typer.Argument(help=".model, tokenizer.json, a folder with one, or tiktoken:NAME.")],
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCE]...", help="Corpora to try it on.", show_default=False)
    ] = None,
    text_field: o.TextField = "text",
    eod: Annotated[str, typer.Option(help="END_OF_DOCUMENT token, where the tokenizer does not say.")] = "",
) -> None:
    """Say what a tokenizer is, which encoder is exact for it, and what it loses of a sample of the sources."""
    from data_prep.sources.base import ReadOptions
    from data_prep.sources.find import find_sources, with_standard_input
    from data_prep.sources.groups import plan_groups
    from data_prep.tokenizers.loading import load_tokenizer
    from data_prep.tokenizing.encoder import choose_engine
    from data_prep.tokenizing.nasty import nasty_texts
    from data_prep.tokenizing.tokenizer_check import describe_round_trip, round_trip, sample_documents

    loaded = load_tokenizer(tokenizer, eod)
    say(f"{tokenizer}: {loaded.kind}, {loaded.vocab_size:,} ids, fingerprint {loaded.fingerprint[:16]}")
    say(f"END_OF_DOCUMENT: {loaded.eod_token} = {loaded.eod_id}")
    texts: list[str] = []
    if sources:
        with tempfile.TemporaryDirectory(prefix="data_prep-") as scratch:
            options = ReadOptions(text_field=text_field)
            found, _ = find_sources(sources, options)
            found = with_standard_input(found, Path(scratch))
            texts = sample_documents(plan_groups(found, options), options)
    engine, report = choose_engine(loaded, texts)
    for name, why in report["refused"].items():
        say(f"encoder {name} is refused: {why}")
    say(f"encoder {report['name']} gives the reference's ids")
    for what, sample in (("sample", texts), ("nasty texts", list(nasty_texts()))):
        if sample:
            result = round_trip(engine, sample)
            lost = describe_round_trip(result)
            say(
                f"{what}: {result['exact']} of {result['documents']} come back as they were"
                + (f"; {lost}" * bool(lost))
            )
            if what == "sample" and result["words"]:
                say(f"{result['tokens'] / result['words']:.3f} tokens per word")
