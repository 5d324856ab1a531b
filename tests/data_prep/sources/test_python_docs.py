"""The corpus inside every installation: same documents whatever the number of workers, prose, no duplicates."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.sources import python_docs
from data_prep.sources.python_docs import iter_documents


def test_documents_are_prose_without_code_or_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "LIMIT", 900_000)
    alone = list(iter_documents(workers=1))
    assert alone == list(iter_documents(workers=3))
    documents = dict(alone)
    assert len(documents) == len(alone)
    assert 900_000 <= sum(map(len, documents.values())) < 1_100_000
    seen: set[str] = set()
    for text in documents.values():
        text.encode()  # no lone surrogates
        assert ">>>" not in text and "\x00" not in text
        assert len(text) >= python_docs.SHORTEST
        for paragraph in text.split("\n\n"):
            assert len(paragraph) < 40 or paragraph not in seen
            seen.add(paragraph)
    assert "command-line parsing library" in documents["argparse"]
    assert 'The "try" statement specifies exception handlers' in documents["topics.compound"]
    assert "topics.try" not in documents  # all of it is in topics.compound


def test_modules_are_parsed_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "noisy"
    (package / "tests").mkdir(parents=True)
    prose = "This is the documentation of a module that must not be imported, and it has to be long enough. " * 6
    body = f'"""{prose}"""\nraise SystemExit("imported")\n'
    (package / "__init__.py").write_text(body)
    (package / "twice.py").write_text(body)
    (package / "broken.py").write_text('"""x"""\ndef (:\n')
    (package / "tests" / "test_noisy.py").write_text(body)
    call = 'add_docstr(thing.method, r"""{}""")\n'.format(prose.replace("a module", "a compiled function"))
    (package / "compiled.py").write_text('"""doc"""\n' + call)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(python_docs, "PACKAGES", ("noisy", "not_installed_at_all"))
    monkeypatch.setattr(python_docs, "_topics", lambda: iter(()))
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path / "nothing"))
    documents = dict(iter_documents(workers=1))
    assert list(documents) == ["noisy", "noisy.compiled"]
    assert documents["noisy.compiled"].startswith("noisy.compiled\n\nthing.method\n\nThis is the documentation")


@pytest.mark.slow
def test_the_corpus_has_its_documented_size() -> None:
    size = sum(len(text.encode()) for _, text in iter_documents())
    assert 15e6 < size < 25e6
