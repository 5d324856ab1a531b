"""From receipts to a manifest: what serial work there is, and it touches metadata only (and held-out text)."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.json_input import parse_json
from data_prep.reading.manifest import SPLITS, Manifest, Shard, Split, write_manifest
from data_prep.reading.shards import bin_path, dtype_for_vocabulary, idx_path
from data_prep.sources.base import SourceError
from data_prep.sources.hub import hub_revisions
from data_prep.sources.streams import ByteStream
from data_prep.tokenizing.packing import concat_summary, write_packing
from data_prep.tokenizing.packing import summary as packing_summary
from data_prep.tokenizing.piece_schedule import Schedule, Share
from data_prep.tokenizing.receipts import Receipt, read_receipt, rejects_path
from data_prep.tokenizing.shard_plan import WORK, Plan, Settings
from data_prep.tokenizing.shuffle import shuffle_source

_SHARD_FILE = re.compile(r"((?:train|validation|test)-\d{5,}-\d{5,}(?:-[^.]*)?)\.(?:bin|idx|packing-.*)")
_UNFINISHED = re.compile(r"\.(?:train|validation|test)-\d{5,}-\d{5,}.*\.tmp")
REJECTS = "rejects.jsonl"
# Rejects of these kinds mean that an unknown number of documents is lost.
BROKEN = ("unreadable_file", "broken_compression")


def load_receipts(folder: Path, schedule: Schedule, retry_broken: bool = False) -> None:
    """Add the finished pieces to the schedule; `retry_broken`: not those of broken files, which may be mended now."""
    for path in sorted((folder / WORK).glob("piece-*.json")):
        receipt = read_receipt(path)
        if receipt.group >= len(schedule.groups):
            raise DataError(f"{path} is of a group that the plan does not have; remove {folder / WORK} to begin again.")
        if retry_broken and any(receipt.rejects.get(kind) for kind in BROKEN):
            path.unlink()
            continue
        schedule.add(receipt)


def check_shards(folder: Path, receipts: Iterable[Receipt]) -> None:
    """Raise a DataError where a file of a finished piece is not there."""
    for shard in (shard for receipt in receipts for shards in receipt.shards.values() for shard in shards):
        for path in (bin_path(folder / shard.name), idx_path(folder / shard.name)):
            if not path.is_file():
                raise DataError(f"{path} is missing though it was done; remove {folder / WORK} to begin again.")


def check_rejects(receipts: list[Receipt], max_rejects: float, max_broken: int, listing: Path) -> None:
    """Raise a DataError where there are too many rejects; `listing` is the list of them."""
    rejects = Counter[str]()
    for receipt in receipts:
        rejects.update(receipt.rejects)
    broken = sum(rejects[kind] for kind in BROKEN)
    documents = sum(shard.documents for r in receipts for shards in r.shards.values() for shard in shards)
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(rejects.items()))
    where = f"They are listed in {listing}, the first is"
    if broken > max_broken:
        raise DataError(
            f"{broken} file(s) could not be read to the end ({listed}). Repair what is broken and run the same command "
            f"again, or accept the loss with --max-broken-files {broken}. {where} {_first_reject(listing, True)}."
        )
    others = rejects.total() - broken
    allowed = max_rejects if max_rejects >= 1 else max_rejects * (documents + others)
    if others > allowed:
        raise DataError(
            f"{others} of {documents + others} documents were rejected ({listed}), more than --max-rejects "
            f"{max_rejects:g} allows. Look at them, then repair the source, name other fields (--text-field) or raise "
            f"the limit; nothing is done twice. {where} {_first_reject(listing, False)}."
        )


def join_rejects(folder: Path, receipts: list[Receipt], target: Path) -> None:
    """Write all rejects into one file, with line numbers that count from the beginning of each file."""
    lines: Counter[int] = Counter()
    with atomic_write(target) as stream:
        for receipt in receipts:
            part = rejects_path(folder, receipt.group, receipt.piece)
            if receipt.rejects and part.is_file():
                with part.open("rb") as source:
                    for line in source:
                        value = _reject(line, part)
                        value["line"] += lines[receipt.group]
                        stream.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
            lines[receipt.group] += receipt.lines
        empty = not stream.tell()
    if empty:
        target.unlink()


def _reject(line: bytes, path: Path) -> dict[str, Any]:
    value = parse_json(line, path)
    texts = [value.get(key) for key in ("file", "reason", "detail")] if isinstance(value, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not isinstance(value.get("line"), int):
        raise DataError(f"{path} is damaged: {line[:60]!r} is no reject; remove it, and run the command again.")
    return value


def _first_reject(path: Path, broken: bool) -> str:
    """The first broken file, or the first other reject: where it is and what is wrong with it."""
    with path.open("rb") as stream:
        for line in stream:
            value = _reject(line, path)
            if (value["reason"] in BROKEN) == broken:
                place, detail = f"{value['file']}:{value['line']}: ", value["detail"]
                return detail if detail.startswith(value["file"]) else place + detail
    return ""


def join_held_out(folder: Path, receipts: list[Receipt]) -> None:
    """Write each held-out split's text as one zstd frame, so that every reader reads all of it."""
    for split in ("validation", "test"):
        parts = [folder / WORK / r.held_out[split] for r in receipts if split in r.held_out]
        target = folder / "held_out" / f"{split}.jsonl.zst"
        if not parts:
            continue
        with (
            atomic_write(target) as raw,
            zstandard.ZstdCompressor(level=3, write_checksum=True).stream_writer(raw, closefd=False) as out,
        ):
            for part in parts:
                try:
                    with closing(ByteStream(part)) as source:
                        while data := source.read():
                            out.write(data)
                except SourceError as error:
                    raise DataError(f"{error}; remove {part.parent} to begin again.") from None


def build_manifest(plan: Plan, receipts: list[Receipt]) -> Manifest:
    """The manifest of finished pieces, in order."""
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    sources: dict[str, dict[str, Any]] = {}
    rejects, filtered = Counter[str](), Counter[str]()
    lengths: dict[str, list[int]] = {}
    for receipt in receipts:
        rejects.update(receipt.rejects)
        filtered.update(receipt.filtered)
        for split, found in receipt.shards.items():
            shards[split] += found
            for shard in found:
                entry = sources.setdefault(
                    shard.source, {"name": shard.source, "documents": 0, "tokens": 0, "text_bytes": 0}
                )
                entry["documents"] += shard.documents
                entry["tokens"] += shard.tokens
                entry["text_bytes"] += shard.text_bytes
        for source, counts in receipt.lengths.items():
            sums = lengths.setdefault(source, [0] * len(counts))
            lengths[source] = [a + b for a, b in zip(sums, counts)]
    settings = plan.to_dict()["settings"]
    settings["piece_bytes"] = plan.groups[0].piece_bytes if plan.groups else 0
    statistics: dict[str, Any] = {
        "filtered": dict(sorted(filtered.items())),
        "lengths_log2": {source: np.trim_zeros(counts, "b") for source, counts in sorted(lengths.items())},
        "forced_cuts": sum(receipt.forced_cuts for receipt in receipts),
        "round_trip": plan.round_trip,
    }
    if revisions := hub_revisions(plan.groups):
        statistics["hub_revisions"] = revisions
    return Manifest(
        tokenizer=plan.tokenizer,
        dtype=dtype_for_vocabulary(plan.tokenizer.vocab_size).name,
        splits={split: Split(tuple(found)) for split, found in shards.items() if found},
        sources=list(sources.values()),
        settings=settings,
        engine={**plan.engine, "fallbacks": sum(receipt.fallbacks for receipt in receipts)},
        rejects=dict(sorted(rejects.items())),
        statistics=statistics,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        version=importlib.metadata.version("mor-pretrain"),
    )


def finish(folder: Path, plan: Plan, schedule: Schedule, max_rejects: float, max_broken: int, workers: int) -> Manifest:
    """Check that all is there, then write rejects, held-out text and, last, the manifest.

    Raises:
        DataError: pieces are missing, or more was rejected than is allowed.
    """
    receipts = schedule.in_order()
    if not schedule.complete:
        raise DataError(f"{folder}: pieces are missing; run the tasks that did not finish again, then merge.")
    check_shards(folder, receipts)
    join_rejects(folder, receipts, folder / REJECTS)
    check_rejects(receipts, max_rejects, max_broken, folder / REJECTS)
    manifest = build_manifest(plan, receipts)
    if not any(split.documents for split in manifest.splits.values()):
        raise DataError(
            f"{', '.join(source.name for source in plan.settings.sources)} held no document that could be used "
            f"({sum(manifest.rejects.values())} rejected, {sum(manifest.statistics['filtered'].values())} left out by "
            "filters); nothing was written. Look at the files, the names of the fields and the filters"
            + (", and whether --max-tokens is below the first document." if plan.settings.max_tokens else ".")
        )
    join_held_out(folder, receipts)
    if plan.settings.shuffle_seed is not None:
        manifest = _shuffled(folder, manifest, plan.settings.shuffle_seed)
    if plan.settings.sequence_length:
        manifest = _with_packing(folder, manifest, plan.settings, workers)
    write_manifest(folder, manifest)
    remove_leftovers(folder, manifest)
    return manifest


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove what does not belong to the finished data set: shards beyond the maximum of tokens or from before a
    shuffle, the unfinished files of workers that were killed, and what was needed to continue.
    """
    named = {shard.name for split in manifest.splits.values() for shard in split.shards}
    for path in folder.iterdir():
        match = _SHARD_FILE.fullmatch(path.name)
        if (match and match[1] not in named) or _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _shuffled(folder: Path, manifest: Manifest, seed: int) -> Manifest:
    shards = manifest.splits["train"].shards if "train" in manifest.splits else ()
    made: list[Shard] = []
    for number, source in enumerate(dict.fromkeys(shard.source for shard in shards)):
        entries = [shard for shard in shards if shard.source == source]
        made += shuffle_source(folder, folder / WORK, entries, seed, number)
    return replace(manifest, splits={**manifest.splits, "train": Split(tuple(made))}) if made else manifest


def _with_packing(folder: Path, manifest: Manifest, settings: Settings, workers: int) -> Manifest:
    """The manifest with what packing pads and cuts at the sequence length; best-fit writes its packing too."""
    length = settings.sequence_length
    found: dict[str, Any] = {"length": length}
    with ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn")) as pool:
        for name, split in manifest.splits.items():
            prefixes = [str(folder / shard.name) for shard in split.shards]
            if settings.packing == "concat":
                found[name] = concat_summary(prefixes, length)
            else:
                run = pool.map if workers > 1 and len(prefixes) > 1 else map
                found[name] = packing_summary(list(run(write_packing, prefixes, [length] * len(prefixes))))
    return replace(manifest, statistics={**manifest.statistics, "packing": found})


def merged_schedule(folder: Path, plan: Plan) -> Schedule:
    """A schedule of the whole plan that knows every receipt in the folder."""
    schedule = Schedule(plan.groups, Share(), plan.settings.max_tokens)
    load_receipts(folder, schedule)
    return schedule
