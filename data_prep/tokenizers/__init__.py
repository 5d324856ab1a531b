"""Tokenizers behind one interface: sentencepiece models, Hugging Face `tokenizer.json`, tiktoken encodings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import atomic_write, write_json
from data_prep.tokenizers.base import Tokenizer

__all__ = ["Tokenizer", "copy_tokenizer", "load_tokenizer"]

_NAMES = ("tokenizer.model", "tokenizer.json", "tiktoken.json")


def load_tokenizer(path: str | os.PathLike[str], eod_token: str = "") -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a `.model` or `.json` file, a folder with `tokenizer.model` or `tokenizer.json`, or `tiktoken:NAME`.
        eod_token: END_OF_DOCUMENT; by default what the tokenizer (or the `tokenizer_config.json` beside it) says.

    Raises:
        DataError: missing, not a tokenizer, or without END_OF_DOCUMENT.
    """
    name = os.fspath(path)
    if name.startswith("tiktoken:"):
        from data_prep.tokenizers.tiktoken_encoding import TiktokenTokenizer

        return TiktokenTokenizer(name.removeprefix("tiktoken:"), eod_token)
    file = Path(name)
    if file.is_dir():
        file = next((file / known for known in _NAMES if (file / known).is_file()), file)
    if not file.is_file():
        raise DataError(
            f"no tokenizer at {path}; expected a sentencepiece .model, a Hugging Face tokenizer.json, a folder with "
            "one of them, or tiktoken:NAME. `python -m data_prep tokenizer train` makes one."
        )
    if file.name == "tiktoken.json":
        return load_tokenizer("tiktoken:" + json.loads(file.read_text(encoding="utf-8"))["name"], eod_token)
    if file.suffix == ".json":
        from data_prep.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file, eod_token)
    from data_prep.tokenizers.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(file, eod_token or _recorded_eod(file))


def copy_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> str:
    """Copy the tokenizer into `folder` so that `load_tokenizer(folder)` gives it back, END_OF_DOCUMENT included.

    Returns:
        Name of the file inside `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.kind == "tiktoken":
        write_json(folder / "tiktoken.json", {"name": str(tokenizer.path).removeprefix("tiktoken:")})
        name = "tiktoken.json"
    else:
        name = "tokenizer.model" if tokenizer.kind == "sentencepiece" else "tokenizer.json"
        with atomic_write(folder / name) as target, tokenizer.path.open("rb") as source:
            shutil.copyfileobj(source, target)
    classes = {"huggingface": "PreTrainedTokenizerFast", "sentencepiece": "LlamaTokenizer"}
    config: dict[str, object] = {"eos_token": tokenizer.eod_token}
    if tokenizer.kind in classes:
        config["tokenizer_class"] = classes[tokenizer.kind]
    write_json(folder / "tokenizer_config.json", config)
    return name


def _recorded_eod(file: Path) -> str:
    try:
        found = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else ""
