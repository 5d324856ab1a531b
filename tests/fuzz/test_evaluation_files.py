"""Files that evaluation reads: stored results, evaluation sets and held-out documents."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pretrain.evaluation.evaluate import evaluate_run
from pretrain.evaluation.held_out import TEST_FILE, choose, held_out_files, read_documents, text_identity
from pretrain.evaluation.identity import identity, stored_result
from pretrain.evaluation.local_data import read_records, read_splits
from pretrain.evaluation.settings import Settings, result_file
from pretrain.evaluation.summary import markdown_summary
from pretrain.records.run_folder import RunFolder
from tests.fuzz.support import counts, drive, from_file, mutate_bytes, mutate_file, mutate_json, mutate_value
from tests.pretrain.evaluation.runs import make_run
from tests.pretrain.evaluation.test_own_suite import prose

SETTINGS = Settings(limit=1, text_bytes=500)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MOR_SHARED_DATA", raising=False)
        run = make_run(tmp_path_factory.mktemp("fuzz") / "run", [prose(seed, 12) for seed in range(2)])
        evaluate_run(run, ["perplexity"], settings=SETTINGS)
    return run


@counts
def test_stored_results(run: RunFolder, count: int) -> None:
    """What is not as it was written is made again, so no change of a figure is ever shown."""
    file = result_file(run, "perplexity", SETTINGS)
    written = file.read_bytes()
    whole, made_of = json.loads(written), identity(run, "perplexity", SETTINGS)

    def read(file: Path) -> dict[str, Any] | None:
        found = stored_result(run, "perplexity", SETTINGS, made_of=made_of)
        if found is not None:
            markdown_summary({"run": {"perplexity": found}})
        return found

    def changed(content: bytes, found: dict[str, Any] | None) -> str | None:
        return None if found is None or found == whole else f"{found}"

    use = from_file(file, read)
    try:
        drive(count, lambda source: mutate_json(whole, source), use, changed=changed)
    finally:
        assert use(written) == whole


RECORDS = [
    {"subject": "anatomy", "question": f"What is {n}?", "choices": ["a", "b", "c"], "answer": n % 3, "weight": 0.5}
    for n in range(3)
]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@counts
def test_evaluation_sets(tmp_path: Path, count: int) -> None:
    """Records that are used are those that the file holds."""

    def make(source: random.Random) -> bytes:
        if source.random() < 0.5:
            return lines([*RECORDS[:2], mutate_value(RECORDS[2], source)]).encode()
        return mutate_file(lines(RECORDS), source)

    def use(content: bytes) -> list[dict[str, Any]]:
        with tempfile.NamedTemporaryFile(dir=tmp_path, suffix=".jsonl") as file:  # a known name is not read again
            file.write(content)
            file.flush()
            read_splits({"test": file.name}, {"subject": "anatomy"})
            return read_records(Path(file.name))

    def changed(content: bytes, records: list[dict[str, Any]]) -> str | None:
        expected = [json.loads(line, parse_int=float) for line in content.splitlines() if line.strip()]
        return None if expected == records else f"{records} for {expected}"

    drive(count, make, use, seed="sets", changed=changed)


@counts
def test_held_out_documents(tmp_path: Path, count: int) -> None:
    """Documents that are read are texts that the file holds."""
    documents = [{"text": f"Document {n}, not long.\nIt has a second line.", "source": "web"} for n in range(4)]
    file = tmp_path / TEST_FILE
    file.parent.mkdir()
    (tmp_path / "recipe.yaml").write_text("name: x\n", encoding="utf-8")
    compressor = zstandard.ZstdCompressor(write_checksum=True)

    def make(source: random.Random) -> tuple[list[Any] | None, bytes]:
        if source.random() < 0.6:
            mutated = [*documents[:3], mutate_value(documents[3], source)]
            return mutated, compressor.compress(lines(mutated).encode())
        return None, mutate_bytes(compressor.compress(lines(documents).encode()), source)

    def use(given: tuple[list[Any] | None, bytes]) -> list[str]:
        file.write_bytes(given[1])
        found, _ = read_documents(held_out_files(RunFolder(tmp_path), tmp_path), 10**6)
        chosen = choose(found, 60)
        assert text_identity([document.text for document in chosen])["text_bytes"] <= 60
        return sorted(document.text for document in found)

    def changed(given: tuple[list[Any] | None, bytes], texts: list[str]) -> str | None:
        if given[0] is None:
            return None if set(texts) <= {document["text"] for document in documents} else f"{texts}"
        return None if texts == sorted(d["text"] for d in given[0] if d["text"].strip()) else f"{texts}"

    drive(count, make, use, seed="held out", changed=changed)
