"""What a data set holds, in words and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.plain_text import plain
from data_prep.reading.manifest import Manifest


def report(manifest: Manifest) -> str:
    """The statistics of a data set as text: splits, sources, document lengths, fertility, what was left out."""
    return "\n".join(map(plain, _lines(manifest)))


def _lines(manifest: Manifest) -> Iterator[str]:
    yield f"{'split':<12}{'documents':>14}{'tokens':>18}{'MB of text':>13}{'bytes/token':>13}"
    for name, split in manifest.splits.items():
        ratio = split.text_bytes / max(1, split.tokens)
        yield f"{name:<12}{split.documents:>14,}{split.tokens:>18,}{split.text_bytes / 1e6:>13,.1f}{ratio:>13.3f}"
    total = max(1, sum(source["tokens"] for source in manifest.sources))
    width = max([len(source["name"]) for source in manifest.sources] + [6]) + 2
    yield ""
    yield f"{'source':<{width}}{'documents':>14}{'tokens':>18}{'share':>9}{'mean length':>13}{'bytes/token':>13}"
    for source in sorted(manifest.sources, key=lambda s: -s["tokens"]):
        mean = source["tokens"] / max(1, source["documents"])
        ratio = source["text_bytes"] / max(1, source["tokens"])
        yield (
            f"{source['name']:<{width}}{source['documents']:>14,}{source['tokens']:>18,}"
            f"{source['tokens'] / total:>9.2%}{mean:>13,.0f}{ratio:>13.3f}"
        )
    by_source = manifest.statistics.get("lengths_log2", {}).values()
    counts = [sum(column) for column in zip_longest(*by_source, fillvalue=0)]
    if counts:
        yield ""
        yield "tokens per document"
        highest = max(counts)
        for power, count in enumerate(counts):
            if any(counts[: power + 1]):
                bar = "#" * round(40 * count / highest)
                yield f"{1 << power:>14,} to {(2 << power) - 1:>13,}  {count:>12,}  {bar}"
    sample = manifest.statistics.get("round_trip", {})
    yield ""
    if sample.get("words"):
        yield f"fertility on the sample: {sample.get('tokens', 0) / sample['words']:.3f} tokens per word"
    yield f"tokenizer: {manifest.tokenizer.kind}, {manifest.tokenizer.vocab_size:,} ids; {manifest.dtype}"
    if manifest.engine:
        fallbacks = manifest.engine.get("fallbacks", 0)
        yield f"encoder: {manifest.engine.get('name')}, {fallbacks:,} texts by the tokenizer's own library instead"
    for name, found in (("filtered", manifest.statistics.get("filtered", {})), ("rejected", manifest.rejects)):
        listed = ", ".join(f"{count:,} {reason}" for reason, count in found.items()) or "nothing"
        yield f"{name}: {listed}"
    for name, packing in manifest.statistics.get("packing", {}).items():
        if isinstance(packing, dict) and packing:
            yield f"packing of {name}: {packing['padding']:.2%} padding, {packing['truncation']:.2%} of documents cut"


def draw_lengths(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Draw the distribution of document lengths, one line per source, into a picture (its ending says which kind).

    Raises:
        DataError: the ending is of no kind of picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    kind = Path(path).suffix[1:]
    if kind not in figure.canvas.get_supported_filetypes():
        raise DataError(f"{path}: the name of a picture ends in .png, .svg or .pdf, not in {Path(path).suffix!r}.")
    for source, counts in manifest.statistics.get("lengths_log2", {}).items():
        first = next((n for n, count in enumerate(counts) if count), 0)
        shares = [count / max(1, sum(counts)) for count in counts[first:]]
        axes.stairs(shares, [1 << n for n in range(first, len(counts) + 1)], label=source)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("share of documents")
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as stream:
        figure.savefig(stream, format=kind, dpi=150)
    pyplot.close(figure)
