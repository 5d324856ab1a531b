"""Hugging Face hub data sets, streamed through `datasets`; one file of the data set is one group."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from data_prep.errors import DataError
from data_prep.sources.base import Group, Item, PieceReader, SourceError, accept, field_path, look_up
from data_prep.sources.text import PAGE

PRESETS = {
    "pile": "hub:monology/pile-uncopyrighted",
    "c4": "hub:allenai/c4:en",
    "openwebtext": "hub:Skylion007/openwebtext",
    "fineweb-edu": "hub:HuggingFaceFW/fineweb-edu",
    "wikitext-103": "hub:Salesforce/wikitext:wikitext-103-raw-v1",
}
_ATTEMPTS = 5


def hub_groups(name: str, address: str, first: int, piece_bytes: int) -> list[Group]:
    """One group per file of the hub data set `hub:REPO[:CONFIG[:SPLIT]]`.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    _, repository, config, split, *_ = [*address.split(":"), "", ""]
    split = split or "train"
    files = _load(repository, config, split).num_shards
    extra: dict[str, str | int] = {"repository": repository, "config": config, "split": split, "files": files}
    return [Group(first + n, name, "hub", (), 0, 1, piece_bytes, {**extra, "file": n}) for n in range(files)]


class HubReader(PieceReader):
    """Streams one file of a hub data set; a broken connection is taken up where it broke.

    The rows of WikiText are lines; they are put together to articles as in its raw files.
    """

    def items(self, piece: int) -> Iterator[Item]:
        extra, options = self.group.extra, self.options
        self.file = f"hub:{extra['repository']}:{extra['config']}:{extra['split']}#{extra['file']}"
        text_path, subset_path = field_path(options.text_field), field_path(options.subset_field)
        language_path = field_path(options.language_field)
        if options.format == "wikitext" or str(extra["repository"]).endswith("/wikitext"):
            yield from self._articles(text_path)
        else:
            for row in self._rows():
                text, subset, language = (look_up(row, path) for path in (text_path, subset_path, language_path))
                yield accept(text, subset, language, self.lines, options)
        self.end_seen = True

    def _articles(self, text_path: tuple[str, ...]) -> Iterator[Item]:
        article: list[str] = []
        first = 1
        for row in self._rows():
            line = look_up(row, text_path)
            if not isinstance(line, str):
                yield accept(line, None, None, self.lines, self.options)
                continue
            if PAGE.match(line.encode("utf-8", "surrogatepass")) and any(map(str.strip, article)):
                yield accept("".join(article), None, None, first, self.options)
                article, first = [], self.lines
            article.append(line or " \n")  # the raw file's empty lines hold a space
        if any(map(str.strip, article)):
            yield accept("".join(article), None, None, first, self.options)

    def _rows(self) -> Iterator[Any]:
        extra = self.group.extra
        failures = 0
        while True:
            try:
                stream = _load(str(extra["repository"]), str(extra["config"]), str(extra["split"]))
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
                time.sleep(2.0 ** (failures - 1))


def _load(repository: str, config: str, split: str) -> Any:
    import datasets  # heavy, and needed for hub sources alone

    try:
        return datasets.load_dataset(repository, config or None, split=split, streaming=True)
    except Exception as error:  # the library raises its own, the hub client's and the network's errors
        raise DataError(f"hub data set {repository!r} cannot be opened: {type(error).__name__}: {error}") from None
