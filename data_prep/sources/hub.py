"""Hugging Face hub data sets, streamed through `datasets`; one file of the data set is one group."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.base import Group, Item, PieceReader, SourceError, accept, look_up
from data_prep.sources.text import Pages

PRESETS = {
    "pile": "hub:monology/pile-uncopyrighted",
    "c4": "hub:allenai/c4:en",
    "openwebtext": "hub:Skylion007/openwebtext",
    "fineweb-edu": "hub:HuggingFaceFW/fineweb-edu",
    "wikitext-103": "hub:Salesforce/wikitext:wikitext-103-raw-v1",
}
_ATTEMPTS = 5
_LONGEST_WAIT = 600.0  # seconds; the hub counts requests over five minutes


def hub_groups(name: str, address: str, piece_bytes: int, revisions: Mapping[str, str] | None = None) -> list[Group]:
    """One group per file of the hub data set `hub:REPO[:CONFIG[:SPLIT]]`, all of one commit.

    revisions: commits to read, by repository; others are read as they are now.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    repository, config, split = hub_parts(address)
    revision, files = _commit_and_files(repository, config, split, (revisions or {}).get(repository, ""))
    extra: dict[str, str | int] = {
        "repository": repository, "revision": revision, "config": config, "split": split, "files": files,
    }  # fmt: skip
    return [Group(n, name, "hub", (), 0, 1, piece_bytes, {**extra, "file": n}) for n in range(files)]


def hub_parts(address: str) -> tuple[str, str, str]:
    """Repository, configuration and split of `hub:REPO[:CONFIG[:SPLIT]]`.

    Raises:
        DataError: there is more behind the split.
    """
    repository, config, split, *more = [*address.removeprefix("hub:").split(":"), "", ""]
    if any(more):
        raise DataError(f"{address!r} has too many parts; a hub data set is named hub:REPOSITORY[:CONFIG[:SPLIT]].")
    return repository, config, split or "train"


def hub_revisions(groups: Iterable[Group]) -> dict[str, str]:
    """The commit of each hub data set that `groups` are read from."""
    return {str(g.extra["repository"]): str(g.extra["revision"]) for g in groups if "revision" in g.extra}


def _commit_and_files(repository: str, config: str, split: str, revision: str) -> tuple[str, int]:
    """The commit, by default the newest one, and how many files it has."""
    import huggingface_hub

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            revision = revision or str(huggingface_hub.HfApi().dataset_info(repository).sha)
            return revision, int(_load(repository, config, split, revision).num_shards)
        except Exception as error:  # the library raises its own, the hub client's and the network's errors
            wait = _asked_to_wait(error)
            if wait is None or attempt == _ATTEMPTS:
                raise DataError(
                    f"hub data set {repository!r} cannot be opened: {type(error).__name__}: {error}"
                ) from None
            time.sleep(wait)
    raise AssertionError


class HubReader(PieceReader):
    """Streams one file of a hub data set; a broken connection is resumed at the row where it broke.

    The rows of WikiText are lines; they are put together to articles as in its raw files.
    """

    def read(self, path: str, piece: int) -> Iterator[Item]:
        extra = self.group.extra
        self.file = f"hub:{extra['repository']}:{extra['config']}:{extra['split']}#{extra['file']}"
        if self.options.format == "wikitext" or str(extra["repository"]).endswith("/wikitext"):
            yield from self._articles()
        else:
            yield from map(self.document, self._rows())

    def _articles(self) -> Iterator[Item]:
        pages = Pages(self.options)
        for row in self._rows():
            line = look_up(row, self.paths[0])
            if isinstance(line, str):  # the raw file's empty lines hold a space
                yield from pages.add(line.encode("utf-8", "surrogatepass") or b" \n", self.lines)
            else:
                yield accept(line, None, None, self.lines, self.options)
        yield from pages.finish()

    def _rows(self) -> Iterator[Any]:
        extra = self.group.extra
        failures = 0
        while True:
            try:
                stream = _load(*(str(extra[key]) for key in ("repository", "config", "split", "revision")))
                stream = stream.shard(num_shards=int(extra["files"]), index=int(extra["file"]))
                for row in stream.skip(self.lines) if self.lines else stream:
                    self.lines += 1
                    failures = 0
                    yield row
                return
            except Exception as error:  # the network's, the hub client's and every decompressor's own errors
                failures += 1
                if failures == _ATTEMPTS:
                    raise SourceError(
                        "unreadable_file",
                        f"{self.file}: failed {failures} times after row {self.lines}: {type(error).__name__}: {error}",
                    ) from None
                time.sleep(_asked_to_wait(error) or 2.0 ** (failures - 1))


def _asked_to_wait(error: BaseException | None) -> float | None:
    """Seconds to wait before the next request, if the hub answered 429 or 503; else None."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (429, 503):
            after = re.fullmatch(r"\d+", response.headers.get("Retry-After", ""))
            reset = re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
            seconds = float(after[0]) if after else float(reset[1]) if reset else 1.0
            return min(seconds, _LONGEST_WAIT)
        error = error.__cause__ or error.__context__
    return None


def _load(repository: str, config: str, split: str, revision: str) -> Any:
    import datasets  # heavy, and needed for hub sources alone

    return datasets.load_dataset(repository, config or None, split=split, revision=revision, streaming=True)
