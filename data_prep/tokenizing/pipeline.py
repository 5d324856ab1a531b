"""`tokenize`: from sources to a finished data set folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data_prep.errors import DataError
from data_prep.locks import locked
from data_prep.reading.manifest import FILE_NAME, Manifest, read_manifest
from data_prep.sources.base import Group
from data_prep.sources.find import find_sources, with_standard_input
from data_prep.sources.groups import plan_groups
from data_prep.sources.hub import hub_revisions
from data_prep.sources.notices import notices
from data_prep.tokenizers.base import Tokenizer, TokenizerInfo
from data_prep.tokenizers.loading import copy_tokenizer, load_tokenizer
from data_prep.tokenizing.encoder import Engine, choose_engine
from data_prep.tokenizing.merge import check_shards, finish, load_receipts, merged_schedule, remove_leftovers
from data_prep.tokenizing.mpi import MpiWorld
from data_prep.tokenizing.piece import PieceWorker, Progress
from data_prep.tokenizing.piece_schedule import Key, Schedule, Share
from data_prep.tokenizing.receipts import read_receipt, receipt_path
from data_prep.tokenizing.shard_plan import WORK, Plan, Settings, changed_groups, differences, read_plan, write_plan
from data_prep.tokenizing.tokenizer_check import round_trip, sample_documents
from data_prep.tokenizing.workers import Pool, quiet_libraries


class Listener(Protocol):
    """Receives the progress of a run."""

    def say(self, message: str) -> None:
        """A message for the user."""

    def begin(self, plan: Plan, schedule: Schedule) -> None:
        """The work starts; some of it may be done already."""

    def progress(self, worker: int, key: Key, progress: Progress) -> None:
        """A batch is encoded."""


@dataclass(frozen=True)
class Job:
    """What is to be done.

    sources: as on the command line. settings: without sources; those are found from the names. max_rejects: rejected
    documents to allow, a share below 1 or a number. max_broken: files that may break off.
    """

    sources: tuple[str, ...]
    out: Path
    tokenizer: str
    settings: Settings
    eod_token: str = ""
    max_rejects: float = 0.01
    max_broken: int = 0


def tokenize(job: Job, listener: Listener, *, workers: int = 1, share: Share | None = None) -> Manifest | None:
    """Write the data set `job.out`, continuing an unfinished run of the same settings.

    Args:
        workers: processes.
        share: do only this task's pieces and leave the manifest to `merge_tasks`.

    Returns:
        The manifest; None when other tasks have their share to do.

    Raises:
        DataError: see the message.
        OSError: writing failed; running again continues.
    """
    quiet_libraries()
    done = finished(job, listener)
    if done is not None:
        return done
    with only_writer(job.out, "" if share is None else f"-{share.index}"):
        with Pool(job.out, job.tokenizer, job.eod_token, workers, listener.progress) as pool:
            plan, engine = prepare(job, listener, pool.start, alone=share is None)
            pool.run(plan, begin(job.out, plan, share or Share(), listener), engine)
        if share is not None:
            return None
        return complete(job.out, plan, job.max_rejects, job.max_broken, workers)


def tokenize_mpi(job: Job, listener: Listener) -> Manifest | None:
    """The same with one worker per MPI rank; every rank calls it.

    Returns:
        The manifest on rank 0, None on the others.
    """
    quiet_libraries()
    world = MpiWorld()
    if world.rank:
        world.serve(job.out)
        return None
    try:
        manifest = finished(job, listener)
        if manifest is None:
            with only_writer(job.out, ""):
                plan, engine = prepare(job, listener)
                schedule = begin(job.out, plan, Share(), listener)
                world.lead(job.out, plan, schedule, listener.progress, engine)
                world.dismiss()
                manifest = complete(job.out, plan, job.max_rejects, job.max_broken, 1)
        world.finished = True
        return manifest
    finally:
        world.dismiss()


def merge_tasks(
    folder: str | os.PathLike[str], max_rejects: float = 0.01, max_broken: int = 0, workers: int = 1
) -> Manifest:
    """Finish a data set whose pieces were done by array tasks or other machines.

    Raises:
        DataError: no tasks ran there, or some did not finish.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return _cleaned(folder, read_manifest(folder))
    plan = read_plan(folder)
    if plan is None:
        raise DataError(f"{folder} holds no unfinished data set; run the tasks first, all with this folder as --out.")
    with only_writer(folder, ""):
        return complete(folder, plan, max_rejects, max_broken, workers)


def begin(folder: Path, plan: Plan, share: Share, listener: Listener) -> Schedule:
    """The schedule of `share`, with all that is finished already.

    Raises:
        DataError: a finished shard is missing.
    """
    schedule = Schedule(plan.groups, share, plan.settings.max_tokens)
    load_receipts(folder, schedule, retry_broken=True)
    check_shards(folder, schedule.receipts.values())
    listener.begin(plan, schedule)
    return schedule


def complete(folder: Path, plan: Plan, max_rejects: float, max_broken: int, workers: int) -> Manifest:
    """Check that every piece is there, cut at the maximum of tokens, and write the manifest."""
    schedule = merged_schedule(folder, plan)
    over = schedule.overflow() if plan.settings.max_tokens else None
    if over is not None:
        (group, piece), cap = over
        for _ in PieceWorker(folder, plan).work(group, piece, cap):
            pass
        schedule.add(read_receipt(receipt_path(folder, group, piece)))
    return finish(folder, plan, schedule, max_rejects, max_broken, workers)


def finished(job: Job, listener: Listener) -> Manifest | None:
    """The manifest of `job.out` when it is finished with these settings, which is said.

    Raises:
        DataError: the folder holds a data set of other settings.
    """
    if not (job.out / FILE_NAME).is_file():
        return None
    manifest = read_manifest(job.out)
    sources, _ = find_sources(job.sources, job.settings.options)
    loaded = load_tokenizer(job.tokenizer, job.eod_token)
    wanted = Plan(replace(job.settings, sources=tuple(sources)), _info(loaded, ""), {}, ()).to_dict()["settings"]
    recorded = dict(manifest.settings)
    if not job.settings.piece_bytes:
        recorded["piece_bytes"] = 0
    changed = differences(recorded, wanted)
    if loaded.fingerprint != manifest.tokenizer.fingerprint:
        changed.append("the tokenizer")
    if loaded.eod_id != manifest.tokenizer.eod_id:
        changed.append("END_OF_DOCUMENT")
    if changed:
        raise DataError(
            f"{job.out} holds a finished data set of other settings ({'; '.join(changed)}). Choose another --out."
        )
    listener.say(f"{job.out} is finished already, with these settings; nothing to do.")
    return _cleaned(job.out, manifest)


def _cleaned(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a folder in which nothing is left of how it was made, also where the run was killed then."""
    if (folder / WORK).exists():
        remove_leftovers(folder, manifest)
    return manifest


def prepare(
    job: Job,
    listener: Listener,
    on_groups: Callable[[tuple[Group, ...]], None] = lambda groups: None,
    alone: bool = True,
) -> tuple[Plan, Engine]:
    """Find the sources, choose the engine, copy the tokenizer and write the plan; or take up the plan that is there.

    on_groups: called as soon as it is known what there is to read. alone: no other task works in the folder, so that
    what was made of files that have been repaired since can be forgotten.

    Raises:
        DataError: a plan of other settings is there.
    """
    folder, work = job.out, job.out / WORK
    sources, left_out = find_sources(job.sources, job.settings.options)
    for sentence in [*left_out, *notices(sources, job.settings.options)]:
        listener.say(sentence)
    settings = replace(job.settings, sources=tuple(sources))
    loaded = load_tokenizer(job.tokenizer, job.eod_token)
    work.mkdir(parents=True, exist_ok=True)
    old = read_plan(folder)
    begun = hub_revisions(old.groups) if old else None
    groups = tuple(plan_groups(with_standard_input(sources, work), settings.options, settings.piece_bytes, begun))
    on_groups(groups)
    texts = sample_documents(groups, settings.options)
    engine, report = choose_engine(loaded, texts)
    for name, why in report["refused"].items():
        listener.say(f"the encoder {name} is not used: {why}.")
    file = "tokenizer/" + copy_tokenizer(loaded, folder / "tokenizer")
    plan = Plan(settings, _info(loaded, file), report, groups, round_trip(engine, texts))
    if old is None:
        write_plan(folder, plan)
        return plan, engine
    changed = differences(old.described(), plan.described())
    again = changed_groups(old, plan) if changed and alone else None
    if again:
        listener.say("files have changed since; they, and small files read with them, are read again.")
        for group in again:
            for path in work.glob(f"piece-{group:05d}-*.json"):
                path.unlink()
        write_plan(folder, plan)
    elif changed:
        raise DataError(
            f"{folder} holds an unfinished data set of other settings ({'; '.join(changed)}). "
            f"Choose another --out, or remove {work} to begin again."
        )
    return plan, engine


def only_writer(folder: Path, task: str) -> AbstractContextManager[str]:
    """Hold the folder for this process.

    Raises:
        DataError: another process is writing there.
    """
    busy, advice = f"another process is writing {folder}", "wait for it or choose another --out"
    return locked(folder / WORK / f"lock{task}", busy, patience=0.0, advice=advice)


def _info(tokenizer: Tokenizer, file: str) -> TokenizerInfo:
    return TokenizerInfo(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, file)
