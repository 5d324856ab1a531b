"""The experiment's text: prepared by `python -m data_prep` where it is not there yet."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.json_input import read_json
from data_prep.locks import locked
from data_prep.plain_text import cell
from data_prep.reading.manifest import FILE_NAME
from pretrain.comparison.experiment import TRAIN_TOKENIZER, DataSection, Experiment
from pretrain.comparison.launch import run_child
from pretrain.errors import RecipeError, RunError

_RECORD = "prepared_from.json"


def prepare_data(experiment: Experiment, console: Console) -> None:
    """Train the tokenizer if the experiment asks for one, and tokenize, unless the data set folder exists.

    Of several processes that call this at once, the first does the work and the others wait.

    Raises:
        RecipeError: the folder was prepared from another text or with another tokenizer, or there is no text to
        prepare it from. RunError: preparation failed; its own message has been printed.
        Interrupted: after a signal; the same call continues.
    """
    if experiment.source_folders:
        return
    path, data = experiment.data_path, experiment.data
    wanted = data.model_dump(mode="json", exclude={"path"})
    if (path / FILE_NAME).is_file():
        _refuse_other_text(experiment, wanted)
        return
    if data.corpus is None:
        raise RecipeError(
            f"{path}: no data set there (no {FILE_NAME}) and data.corpus names no text to prepare it from; "
            "prepare it with `mor prep tokenize`, or set data.corpus."
        )
    with locked(path.with_name(f".{path.name}.lock"), f"{path}: another process is preparing this data set"):
        if (path / FILE_NAME).is_file():
            _refuse_other_text(experiment, wanted)
            return
        tokenizer = data.tokenizer
        if tokenizer == TRAIN_TOKENIZER:
            tokenizer = str(_trained_tokenizer(experiment, console))
        console.print(cell(f"Tokenizing {data.corpus} into {path}"))
        limit = ["--max-tokens", str(data.max_tokens)] if data.max_tokens else []
        _data_prep(data, ["tokenize", data.corpus, "--out", str(path), "--tokenizer", tokenizer, *limit])
        write_json(path / _RECORD, wanted)


def _trained_tokenizer(experiment: Experiment, console: Console) -> Path:
    """The tokenizer beside the data set, trained unless it is there and was made from what the experiment says now."""
    data = experiment.data
    file = experiment.data_path.with_name(f"{experiment.data_path.name}-tokenizer.model")
    record = file.with_suffix(".json")
    wanted = {key: getattr(data, key) for key in ("corpus", "vocab_size", "validation", "test")}
    if file.is_file() and record.is_file():
        with suppress(DataError):
            if read_json(record) == wanted:
                return file
    file.unlink(missing_ok=True)
    console.print(cell(f"Training a tokenizer of {data.vocab_size} entries on {data.corpus}"))
    size = ["--vocab-size", str(data.vocab_size)]
    _data_prep(data, ["tokenizer", "train", str(data.corpus), "--out", str(file), *size])
    write_json(record, wanted)
    return file


def _refuse_other_text(experiment: Experiment, wanted: dict[str, object]) -> None:
    record = experiment.data_path / _RECORD
    if experiment.data.corpus is None or not record.is_file():
        return  # prepared by hand: the folder is what the experiment asks for
    found = read_json(record)
    if not isinstance(found, dict):
        raise DataError(f"{record}: is not a JSON object. Remove {experiment.data_path} to prepare the data again.")
    for key, value in wanted.items():
        if found.get(key) != value:
            raise RecipeError(
                f"{experiment.data_path}: was prepared with data.{key} = {found.get(key)!r}, and the experiment says "
                f"{value!r}; give this experiment a name of its own (name=NAME) to keep the data and runs of both."
            )


def _data_prep(data: DataSection, arguments: list[str]) -> None:
    # The same shares for both commands, so that the tokenizer is trained without the held-out documents.
    shares = ["--validation", str(data.validation), "--test", str(data.test)]
    status = run_child([sys.executable, "-m", "data_prep", *arguments, *shares], log=None)
    if status != 0:
        raise RunError(f"data preparation ended with status {status}; see above. The same command continues.")
