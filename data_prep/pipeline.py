"""`tokenize`: from sources to a finished data set folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from data_prep.check import round_trip, sample_documents
from data_prep.engine import choose_engine
from data_prep.errors import DataError
from data_prep.manifest import FILE_NAME, Manifest, TokenizerInfo, read_manifest
from data_prep.merge import finish, load_receipts, merged_schedule, missing_shards
from data_prep.piece import Progress
from data_prep.plan import WORK, Plan, Settings, differences, read_plan, write_plan
from data_prep.schedule import Key, Schedule, Share
from data_prep.sources import find_sources, plan_groups
from data_prep.tokenizers import copy_tokenizer, load_tokenizer
from data_prep.workers import Pool, quiet_libraries


class Listener(Protocol):
    """Who is told how the work goes."""

    def say(self, message: str) -> None:
        """Something a person should know."""

    def begin(self, plan: Plan, schedule: Schedule) -> None:
        """The work starts; some of it may be done already."""

    def progress(self, worker: int, key: Key, progress: Progress) -> None:
        """A batch is encoded."""


def tokenize(
    specifications: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    settings: Settings,
    listener: Listener,
    *,
    eod_token: str = "",
    workers: int = 1,
    share: Share | None = None,
    max_rejects: float = 0.01,
    max_broken: int = 0,
) -> Manifest | None:
    """Write the data set `out` from `specifications`, continuing an unfinished run of the same settings.

    Args:
        settings: without sources; those are found here.
        share: do only this task's pieces and leave the manifest to `merge_tasks`.

    Returns:
        The manifest; None when the work of other tasks is missing.

    Raises:
        DataError: see the message.
        OSError: writing failed; running again continues.
    """
    folder = Path(out)
    quiet_libraries()
    alone = share is None
    share = share or Share()
    done = finished(specifications, folder, tokenizer, settings, eod_token)
    if done is not None:
        listener.say(f"{folder} is finished already, with these settings; nothing to do.")
        return done
    with only_writer(folder, "" if alone else f"-{share.index}"):
        plan = prepare(specifications, folder, tokenizer, settings, eod_token, listener)
        schedule = Schedule(plan.groups, share, plan.settings.max_tokens)
        load_receipts(folder, schedule)
        for name in missing_shards(folder, list(schedule.receipts.values())):
            raise DataError(
                f"{folder / name} is missing though it was finished; remove {folder / WORK} to begin again."
            )
        listener.begin(plan, schedule)
        Pool(folder, plan, schedule, workers, listener.progress).run()
        if not alone:
            return None
        return complete(folder, plan, max_rejects, max_broken)


def merge_tasks(folder: str | os.PathLike[str], max_rejects: float = 0.01, max_broken: int = 0) -> Manifest:
    """Finish a data set whose pieces were done by array tasks or other machines.

    Raises:
        DataError: no tasks ran there, or some did not finish.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return read_manifest(folder)
    plan = read_plan(folder)
    if plan is None:
        raise DataError(f"{folder} holds no unfinished data set; run the tasks first, all with this folder as --out.")
    with only_writer(folder, ""):
        return complete(folder, plan, max_rejects, max_broken)


def complete(folder: Path, plan: Plan, max_rejects: float, max_broken: int) -> Manifest:
    """Check that every piece is there, cut at the maximum of tokens, and write the manifest."""
    schedule = merged_schedule(folder, plan)
    return finish(folder, plan, schedule, max_rejects, max_broken)


def finished(
    specifications: Sequence[str], folder: Path, tokenizer: str | os.PathLike[str], settings: Settings, eod_token: str
) -> Manifest | None:
    """The manifest of `folder` when it is finished with these settings.

    Raises:
        DataError: the folder holds a data set of other settings.
    """
    if not (folder / FILE_NAME).is_file():
        return None
    manifest = read_manifest(folder)
    sources, _ = find_sources(specifications, settings.options)
    loaded = load_tokenizer(tokenizer, eod_token)
    wanted = Plan(replace(settings, sources=tuple(sources)), _info(loaded, ""), {}, ()).to_dict()["settings"]
    recorded = dict(manifest.settings)
    if not settings.piece_bytes:
        recorded["piece_bytes"] = 0
    changed = differences(recorded, wanted)
    if loaded.fingerprint != manifest.tokenizer.fingerprint:
        changed.append("the tokenizer")
    if loaded.eod_id != manifest.tokenizer.eod_id:
        changed.append("END_OF_DOCUMENT")
    if changed:
        raise DataError(
            f"{folder} holds a finished data set of other settings ({'; '.join(changed)}). Choose another --out."
        )
    return manifest


def prepare(
    specifications: Sequence[str],
    folder: Path,
    tokenizer: str | os.PathLike[str],
    settings: Settings,
    eod_token: str,
    listener: Listener,
) -> Plan:
    """Find the sources, choose the engine, copy the tokenizer and write the plan; or take up the plan that is there.

    Raises:
        DataError: a plan of other settings is there.
    """
    sources, ignored = find_sources(specifications, settings.options)
    if ignored:
        listener.say(f"{len(ignored)} file(s) of unknown kind are left out, the first is {ignored[0]}.")
    settings = replace(settings, sources=tuple(sources))
    loaded = load_tokenizer(tokenizer, eod_token)
    groups = tuple(plan_groups(sources, settings.options, settings.piece_bytes))
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    texts = sample_documents(groups, settings.options, work)
    _, engine = choose_engine(loaded, texts)
    for name, why in engine["refused"].items():
        listener.say(f"the encoder {name} is not used: {why}.")
    file = "tokenizer/" + copy_tokenizer(loaded, folder / "tokenizer")
    plan = Plan(settings, _info(loaded, file), engine, groups, round_trip(loaded, texts))
    old = read_plan(folder)
    if old is None:
        write_plan(folder, plan)
        return plan
    changed = differences(old.described(), plan.described())
    if changed:
        raise DataError(
            f"{folder} holds an unfinished data set of other settings ({'; '.join(changed)}). "
            f"Choose another --out, or remove {work} to begin again."
        )
    return plan


@contextmanager
def only_writer(folder: Path, task: str) -> Iterator[None]:
    """Hold the folder for this process.

    Raises:
        DataError: another process is writing there.
    """
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"lock{task}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is writing {folder}; wait for it or choose another --out.") from None
        except OSError:
            pass  # a file system without locks
        yield


def _info(tokenizer: object, file: str) -> TokenizerInfo:
    names = ("kind", "fingerprint", "vocab_size", "eod_id")
    return TokenizerInfo(**{name: getattr(tokenizer, name) for name in names}, file=file)
