"""The corpus that needs no file: the documentation that comes with Python."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.sources.base import Item, PieceReader, accept

NAME = "python-docs"


class EmbeddedReader(PieceReader):
    """Reads all documents of the embedded corpus as one piece."""

    def read(self, path: str, piece: int) -> Iterator[Item]:
        from data_prep.sources.python_docs import iter_documents

        for number, (name, text) in enumerate(iter_documents(), start=1):
            self.file, self.lines = name, number
            yield accept(text, None, None, number, self.options)
