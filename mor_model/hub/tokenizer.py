"""A run's tokenizer in the files that transformers reads, checked to give the same ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mor_model.errors import ConfigError
from mor_model.model_files import read_json

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
# Spaces and newlines in runs, digits, several scripts, characters outside every vocabulary, combining marks, emoji.
SAMPLES = (
    "The capital of France is Paris.",
    "  two leading spaces,   three inside, one trailing ",
    "\ttabs\tand\n\n\nnewlines \n mixed",
    "def f(x): return x**2 + 3.14159 - 1234567890",
    "naïve café — “quoted” … 你好，世界 здравствуй мир שלום 🙂👩‍👩‍👧",
    "e\u0301 combining, \u00a0no-break, \u200bzero width, \ufeffmark, ﬁ ligature, Ⅷ",
    "antidisestablishmentarianism supercalifragilisticexpialidocious",
    "http://example.org/a_b-c?d=e&f=%20#g",
    "\u2581 \u2581\u2581a literal lower block",
    "",
)


def export_tokenizer(source: Path, out: Path) -> int:
    """Write `tokenizer.json` and `tokenizer_config.json` into `out`.

    Args:
        source: a run's tokenizer folder: `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json`.

    Returns:
        The end-of-text id.

    Raises:
        ConfigError: when there is none of these files, one cannot be read, or what was written would not give the same
            ids.
    """
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
        end = _end_of_text(source)
        if not end:
            raise ConfigError(f"{source}: tokenizer_config.json names no eos_token; add the end-of-text token's name.")
    elif (source / "tokenizer.model").is_file():
        named = _end_of_text(source)
        with _library_errors(source):
            end = _from_sentencepiece(source / "tokenizer.model", named, out / "tokenizer.json")
    else:
        raise ConfigError(
            f"{source}: holds neither tokenizer.json nor tokenizer.model, the two kinds that transformers can be given."
        )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,  # a text begins where another has ended
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    with _library_errors(source):
        token = _load(out).token_to_id(end)
    if token is None:
        raise ConfigError(
            f"{source}: the tokenizer has no token {end!r}, which tokenizer_config.json names as its end."
        )
    return token


def _end_of_text(source: Path) -> str:
    file = source / "tokenizer_config.json"
    if not file.is_file():
        return ""
    found = read_json(file, "copy the tokenizer again").get("eos_token") or ""
    name = found.get("content") if isinstance(found, dict) else found
    if not isinstance(name, str):
        raise ConfigError(f"{file}: eos_token must be the name of a token; copy the tokenizer again.")
    return name


def tokenizer_size(folder: Path) -> int:
    """One more than the highest id of the `tokenizer.json` in `folder`."""
    return int(max(_load(folder).get_vocab().values())) + 1


def _load(folder: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@contextmanager
def _library_errors(source: Path) -> Iterator[None]:
    """Turn what a tokenizer library raises in the block, panics of Rust included, into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of pyo3; it is no Exception, and can be imported nowhere
        if not panic and (not isinstance(error, Exception) or isinstance(error, MemoryError)):
            raise
        raise ConfigError(f"{source}: the tokenizer cannot be read ({error!s:.300}); copy it again.") from None


def _from_sentencepiece(source: Path, end: str, out: Path) -> str:
    """Write a sentencepiece model as `tokenizer.json`; returns the end-of-text piece."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    description: Any = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())  # type: ignore[attr-defined]
    end = end or model.IdToPiece(model.eos_id())
    tokenizer = _equivalent(model, description)
    for sample in SAMPLES:
        ids = model.EncodeAsIds(sample)
        same = tokenizer.encode(sample, add_special_tokens=False).ids == ids
        if not same or tokenizer.decode(ids) != model.DecodeIds(ids):
            raise ConfigError(
                f"{source}: this sentencepiece model has no exact tokenizer.json (it differs on {sample!r}); export it "
                "with a byte-level BPE tokenizer instead."
            )
    out.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    return end


def _equivalent(model: Any, description: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    count = model.GetPieceSize()
    pieces = [model.IdToPiece(token) for token in range(count)]
    if description.trainer_spec.model_type == 1:  # unigram
        scores = [(piece, model.GetScore(token)) for token, piece in enumerate(pieces)]
        inner: Any = models.Unigram(scores, unk_id=model.unk_id(), byte_fallback=description.trainer_spec.byte_fallback)
    else:
        inner = models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=_merges(model, pieces),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=description.trainer_spec.byte_fallback,
        )
    tokenizer = Tokenizer(inner)
    spec = description.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    control = [piece for token, piece in enumerate(pieces) if model.IsControl(token) or model.IsUnknown(token)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer


def _merges(model: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """Pairs that make a piece, best piece first: sentencepiece merges the neighbours whose union scores highest."""
    known = {
        piece: token for token, piece in enumerate(pieces) if not model.IsControl(token) and not model.IsByte(token)
    }
    merges = []
    for piece, token in known.items():
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        parts = [(left, right) for left, right in parts if left in known and right in known]
        parts.sort(key=lambda pair: (known[pair[0]], known[pair[1]]))
        merges += [(-model.GetScore(token), left, right) for left, right in parts]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]
