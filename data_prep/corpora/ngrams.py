"""Word n-grams as 64-bit hashes, computed for whole texts at once.

Words are runs of letters, digits and underscores in lower case, so that punctuation, white space and the spaced-out
hyphens of tokenised corpora make no difference, nor does whether accents are characters of their own. In scripts that
put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each letter, with the marks that belong to
it, counts as a word. A word's hash is a polynomial in its UTF-8 bytes modulo 2**64 (Karp and Rabin, 1987), an n-gram's
a polynomial in its words' hashes; both are mixed afterwards. The same on every machine.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

_NOT_IN_WORDS = re.compile(r"\W")
# Scripts that put no spaces between words. Korean does, and Tibetan has a mark between syllables.
_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3021-\u3029\u3031-\u303c"  # marks of repetition and numerals of Chinese and Japanese
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Japanese kana
    "\u3100-\u312f\u31a0-\u31bf"  # Chinese phonetic letters
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "]"
)
# What a code point is to words: not looked up yet, none of one, part of one, or of a script without spaces.
_UNKNOWN, _NO_WORD, _IN_WORD, _LETTER, _MARK = range(5)
_KINDS = np.zeros(sys.maxunicode + 1, np.uint8)
_SPACE = np.uint32(32)
_ASCII_WORDS = bytes(
    code + 32 if 65 <= code <= 90 else code if chr(code).isalnum() or code == 95 else 32 for code in range(128)
) + bytes(range(128, 256))
_BYTE_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
_BYTE_INVERSE = np.uint64(pow(int(_BYTE_BASE), -1, 2**64))
_WORD_BASE = np.uint64(0xD1342543DE82EF95)
_PART = 1 << 19  # bytes hashed at a time: some twenty times as much memory is in use meanwhile


def _powers(base: np.uint64, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


_BYTE_POWERS = _powers(_BYTE_BASE, 2 * _PART)
_BYTE_INVERSES = _powers(_BYTE_INVERSE, 2 * _PART)


def normalized(text: str) -> bytes:
    """The words of `text` in lower case and normal form C, UTF-8, with spaces between them."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS)
    codes = np.frombuffer(composed(text).lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds_of(codes)
    if (kinds >= _LETTER).any():
        # A letter of a script without spaces begins a word, and so does a mark that follows none; both end at the next.
        inside = kinds >= _LETTER
        before = np.concatenate([[False], inside[:-1]])
        edges = np.flatnonzero((kinds == _LETTER) | (inside != before))
        codes, kinds = np.insert(codes, edges, _SPACE), np.insert(kinds, edges, _NO_WORD)
    return np.where(kinds == _NO_WORD, _SPACE, codes).astype(np.uint32).tobytes().decode("utf-32-le").encode()


def words_of(text: str) -> list[str]:
    """The words of `text`, of which n-grams are made."""
    return normalized(text).decode().split()


def composed(text: str) -> str:
    """`text` with accents inside their letters: apart from them, an accent would end a word."""
    if unicodedata.is_normalized("NFC", text):
        return text
    # Sorting a run of marks takes the square of its length in time. No language has long ones, so they are cut with
    # the character made for it (Unicode Standard Annex #15, stream-safe text format).
    return unicodedata.normalize("NFC", _long_run().sub("\\g<0>\u034f", text))


@cache
def _long_run() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{30}}")


def _kinds_of(codes: np.ndarray) -> np.ndarray:
    """What each code point is to words, uint8: looked up once for each character that has been met."""
    kinds = _KINDS[codes]
    if (kinds == _UNKNOWN).any():
        for code in np.unique(codes[kinds == _UNKNOWN]).tolist():
            _KINDS[code] = _kind_of(chr(code))
        kinds = _KINDS[codes]
    return kinds


def _kind_of(character: str) -> int:
    if _UNSPACED.match(character):
        if character.isalnum():
            return _LETTER
        if unicodedata.category(character)[0] == "M":
            return _MARK
    return _NO_WORD if _NOT_IN_WORDS.match(character) else _IN_WORD


def word_hashes(text: str) -> np.ndarray:
    """Hash of each word of `text`, uint64 `[words]`."""
    data = normalized(text)
    if len(data) <= _PART:
        return _hash_part(data)
    parts = []
    start = 0
    while start < len(data):
        end = data.rfind(b" ", start, start + _PART) + 1 if start + _PART < len(data) else len(data)
        if end <= start:  # half a million letters without a space: no word of any language
            end = start + _PART
        parts.append(_hash_part(data[start:end]))
        start = end
    return np.concatenate(parts)


def _hash_part(data: bytes) -> np.ndarray:
    codes = np.frombuffer(data, np.uint8)
    inside = codes != 32
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    # The sum over a word is taken out of a running sum and brought back to the word's own powers by the inverse.
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * _BYTE_POWERS[: len(codes)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * _BYTE_INVERSES[starts])


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Hash of each run of `n` words, uint64 `[max(0, words - n + 1)]`."""
    count = len(words) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = words[:count].copy()
    for offset in range(1, n):
        total *= _WORD_BASE
        total += words[offset : offset + count]
    return mix(total)


def ngrams_of_pieces(pieces: Iterable[str], n: int) -> Iterator[np.ndarray]:
    """`ngram_hashes` of a text that comes in pieces cut between words; together they are those of the whole text."""
    carried = np.empty(0, np.uint64)
    for piece in pieces:
        words = np.concatenate([carried, word_hashes(piece)])
        yield ngram_hashes(words, n)
        carried = words[max(0, len(words) - n + 1) :]


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), in place of the low bits' regularity."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
