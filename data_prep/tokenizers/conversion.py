"""A sentencepiece model in the form of a Hugging Face tokenizer.json, for encoders that read only that."""

from __future__ import annotations

from typing import Any

_BPE = 2  # sentencepiece's ModelType.BPE
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # and its piece types
_SPACE = "\u2581"


def as_tokenizer_json(model: bytes) -> dict[str, Any] | None:
    """The same tokenizer as a BPE with byte fallback, or None where it cannot be said that way.

    A BPE model has no list of merges: any two pieces whose concatenation is a piece can merge, better scores first
    (this is how its own encoder chooses). Models with normalisation, other kinds of pieces or without byte fallback are
    declined. Control pieces get names with a space in them, which no text has once its spaces are replaced.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:  # it needs protobuf
        return None
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    rules, pieces = proto.normalizer_spec, proto.pieces
    plain = not (rules.precompiled_charsmap or rules.remove_extra_whitespaces) and rules.escape_whitespaces
    kinds = {piece.type for piece in pieces}
    if (
        proto.trainer_spec.model_type != _BPE
        or proto.trainer_spec.treat_whitespace_as_suffix
        or not plain
        or not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
        or sum(piece.type == _BYTE for piece in pieces) != 256
    ):
        return None
    names = [f" {piece.piece} " if piece.type in (_UNKNOWN, _CONTROL) else piece.piece for piece in pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    normal = {piece.piece: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = [
        (-score, vocabulary[whole], vocabulary[whole[:at]], vocabulary[whole[at:]], [whole[:at], whole[at:]])
        for whole, score in normal.items()
        for at in range(1, len(whole))
        if whole[:at] in normal and whole[at:] in normal
    ]
    merges.sort(key=lambda merge: merge[:4])
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    if rules.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": names[number], **flags}
            for number, piece in enumerate(pieces)
            if piece.type in (_UNKNOWN, _CONTROL)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(name for name, piece in zip(names, pieces) if piece.type == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [merge[4] for merge in merges],
        },
    }
