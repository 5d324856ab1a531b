"""Training a tokenizer, on the documents that `tokenize` will train on and no others."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import xxhash

from data_prep.errors import DataError
from data_prep.files import atomic_write
from data_prep.sources.base import Document
from data_prep.sources.groups import expected_bytes, plan_groups, reader_for
from data_prep.tokenizers.base import Tokenizer
from data_prep.tokenizers.loading import load_tokenizer
from data_prep.tokenizing.shard_plan import Settings

KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe")
END_OF_DOCUMENT = "<|endoftext|>"
_SENTENCE = 4000  # bytes; sentencepiece leaves out what is longer than its limit, so lines are cut below it


def train_tokenizer(
    settings: Settings, out: str | os.PathLike[str], kind: str, vocab_size: int, max_bytes: int
) -> tuple[Tokenizer, dict[str, int]]:
    """Train on the training split of `settings.sources` and write the tokenizer to `out`.

    Where the sources hold more than `max_bytes` of text, documents are sampled by the hash of their text.

    Returns:
        The tokenizer, and what it was trained on: documents, bytes, left_out (rejects and filtered), held_out.

    Raises:
        DataError: an unknown kind, a wrong ending of `out`, or too little text for the vocabulary.
    """
    if kind not in KINDS:
        raise DataError(f"--kind must be one of {', '.join(KINDS)}, found {kind!r}.")
    suffix = ".json" if kind == "byte-bpe" else ".model"
    if Path(out).suffix != suffix:
        raise DataError(f"a {kind} tokenizer is a {suffix} file; --out {out} has another ending.")
    if vocab_size < 260:
        raise DataError(f"a vocabulary of {vocab_size} is too small: 256 single bytes and control tokens come first.")
    counts = {"documents": 0, "bytes": 0, "left_out": 0, "held_out": 0}
    texts = training_texts(settings, max_bytes, counts)
    if kind == "byte-bpe":
        data = _train_byte_bpe(texts, vocab_size)
    else:
        data = _train_sentencepiece(texts, kind.removeprefix("sentencepiece-"), vocab_size, counts)
    with atomic_write(out) as stream:
        stream.write(data)
    return load_tokenizer(out), counts


def training_texts(settings: Settings, max_bytes: int, counts: dict[str, int]) -> Iterator[str]:
    """Texts of the training split, a sample of about `max_bytes` of them; `counts` is kept up to date."""
    groups = plan_groups(settings.sources, settings.options)
    expected = sum(map(expected_bytes, groups))
    held_out = settings.validation + settings.test
    # A hash of its own: the splits' hash would tie the sample to the splits.
    keep = min(1.0, max_bytes / expected) if max_bytes and expected else 1.0
    for group in groups:
        with closing(reader_for(group, settings.options)) as reader:
            for item in reader.all_items():
                if not isinstance(item, Document):
                    counts["left_out"] += 1
                elif xxhash.xxh3_64_intdigest(item.data, settings.split_seed) / 2**64 < held_out:
                    counts["held_out"] += 1
                elif xxhash.xxh3_64_intdigest(item.data, settings.split_seed + 1) / 2**64 < keep:
                    counts["documents"] += 1
                    counts["bytes"] += len(item.data)
                    yield item.text
                    if max_bytes and counts["bytes"] >= 2 * max_bytes:
                        return


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if not line:
                continue
            if len(line) * 4 <= _SENTENCE:
                yield line
                continue
            data = line.encode("utf-8", "ignore")
            while data:
                cut = data.rfind(b" ", _SENTENCE // 2, _SENTENCE) if len(data) > _SENTENCE else len(data)
                if cut < 0:
                    cut = _SENTENCE
                    while data[cut] & 0xC0 == 0x80:
                        cut -= 1
                yield data[:cut].decode()
                data = data[cut:]


def _train_sentencepiece(texts: Iterator[str], model_type: str, vocab_size: int, counts: dict[str, int]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",  # the text comes back as it was
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2 * _SENTENCE,
            num_threads=4,  # written into the model file, so it must not depend on the machine
            train_extremely_large_corpus=model_type == "unigram",
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"sentencepiece could not train a vocabulary of {vocab_size} on {counts['bytes']:,} bytes of text: {error} "
            "A smaller --vocab-size or more text helps."
        ) from None
    return model.getvalue()


def _train_byte_bpe(texts: Iterator[str], vocab_size: int) -> bytes:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=False).encode()
