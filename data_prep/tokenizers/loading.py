"""Tokenizers behind one interface: sentencepiece models, Hugging Face `tokenizer.json`, tiktoken encodings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.json_input import read_json
from data_prep.tokenizers.base import Tokenizer, TokenizerInfo, configured_eod

TIKTOKEN_FILE = "tiktoken.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", TIKTOKEN_FILE)


def load_tokenizer(path: str | os.PathLike[str], eod_token: str = "") -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `.model` or `.json` file, a folder with `tokenizer.model` or `tokenizer.json`, or `tiktoken:NAME`.
        eod_token: END_OF_DOCUMENT; by default what the tokenizer (or the `tokenizer_config.json` beside it) says.

    Raises:
        DataError: missing, not a tokenizer, or without an END_OF_DOCUMENT that text does not become.
    """
    name = os.fspath(path)
    if name.startswith("tiktoken:"):
        from data_prep.tokenizers.tiktoken_encoding import TiktokenTokenizer

        return TiktokenTokenizer(name.removeprefix("tiktoken:"), eod_token)
    file = Path(name)
    if file.is_dir():
        file = next((file / known for known in TOKENIZER_FILES if (file / known).is_file()), file)
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {path}; expected a sentencepiece .model, a Hugging Face tokenizer.json, a folder with "
            "one of them, or tiktoken:NAME. `python -m data_prep tokenizer train` makes one."
        )
    if file.name == TIKTOKEN_FILE:
        eod_token = eod_token or configured_eod(file.parent)
        return load_tokenizer("tiktoken:" + encoding_name(file), eod_token)
    if file.suffix == ".json":
        from data_prep.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file, eod_token)
    from data_prep.tokenizers.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(file, eod_token)


def copy_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> str:
    """Copy the tokenizer into `folder` so that `load_tokenizer(folder)` gives it back, END_OF_DOCUMENT included.

    Returns:
        Name of the file inside `folder`.

    Raises:
        DataError: the tokenizer's file has changed since it was loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.kind == "tiktoken":
        name = TIKTOKEN_FILE
        write_json(folder / name, {"name": str(tokenizer.path).removeprefix("tiktoken:")})
    else:
        name = "tokenizer.model" if tokenizer.kind == "sentencepiece" else "tokenizer.json"
        with atomic_write(folder / name) as target, tokenizer.path.open("rb") as source:
            shutil.copyfileobj(source, target)
    classes = {"huggingface": "PreTrainedTokenizerFast", "sentencepiece": "LlamaTokenizer"}
    config: dict[str, object] = {"eos_token": tokenizer.eod_token}
    if tokenizer.kind in classes:
        config["tokenizer_class"] = classes[tokenizer.kind]
    write_json(folder / "tokenizer_config.json", config)
    copied = load_tokenizer(folder / name)
    if (copied.fingerprint, copied.eod_id) != (tokenizer.fingerprint, tokenizer.eod_id):
        raise DataError(f"{tokenizer.path} has changed since it was loaded; run the command again.")
    return name


def copy_recorded_tokenizer(file: Path, info: TokenizerInfo, folder: Path) -> Path:
    """Copy the tokenizer of a data set into `folder`: `file`, which its manifest names, and no other of its folder.

    Returns:
        The copied file.

    Raises:
        DataError: the file is missing, or is not the tokenizer that the manifest describes.
    """
    tokenizer = load_recorded_tokenizer(file, info)
    if tokenizer is not None:
        return folder / copy_tokenizer(tokenizer, folder)
    write_json(folder / file.name, {"name": encoding_name(file)})
    write_json(folder / "tokenizer_config.json", {"eos_token": configured_eod(file.parent)})
    return folder / file.name


def load_recorded_tokenizer(file: Path, info: TokenizerInfo) -> Tokenizer | None:
    """The tokenizer of a data set at `file`, which its manifest names; None for a tiktoken encoding.

    Of an encoding there is only the name, and tiktoken need not be installed where the data set is used.

    Raises:
        DataError: the file is missing, or is not the tokenizer that the manifest describes.
    """
    if file.name == TIKTOKEN_FILE:
        encoding_name(file)
        return None
    tokenizer = load_tokenizer(file)
    for problem in differences_from(tokenizer, info):
        raise DataError(problem)
    return tokenizer


def differences_from(tokenizer: Tokenizer, info: TokenizerInfo) -> list[str]:
    """One sentence for each thing in which a data set's copy of its tokenizer is not what the manifest says."""
    return [
        f"{tokenizer.path} has {what} {found}, the manifest says {expected}."
        for what, found, expected in (
            ("fingerprint", tokenizer.fingerprint, info.fingerprint),
            ("vocabulary size", tokenizer.vocab_size, info.vocab_size),
            ("END_OF_DOCUMENT id", tokenizer.eod_id, info.eod_id),
        )
        if found != expected
    ]


def encoding_name(file: Path) -> str:
    """The name of the encoding in a `tiktoken.json`; DataError where there is none."""
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise DataError(f"{file} is missing; copy the tokenizer again.") from None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f'{file}: expected an object with the name of a tiktoken encoding, {{"name": "gpt2"}}.')
    return name
