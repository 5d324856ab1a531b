"""Texts on which tokenizers are known to disagree: every kind of character, in every kind of neighbourhood."""

from __future__ import annotations

from collections.abc import Iterator

_SPACES = (
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u2009\u200a\u200b"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_DIGITS = "0129٣९៥²³¹½Ⅷ㊂⓪𝟘𑁯一〇〤\U00011de0\U00016ff4"  # the last two: Unicode 17
_LETTERS = "aZßéǅʰªµπяעعहกあ漢한𐐷𝒜ﬁĳ"
_MARKS = "\u0301\u0308\u093f\u0e34\u20dd\u200d\ufe0f\U000e0100"
_SIGNS = "!'\"-_.,…—‘’“”«»€₿©№☺👍🏽🇩🇪👨‍👩‍👧\x00\x01\x7f\x80\x9f\u00ad\u200e\u202e\ue000\ufffd\uffff\U0010ffff"
_FRAGMENTS = (
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE it's IT'S they’ll",
    "<|endoftext|> <|padding|> </s> <s> <unk> <pad> [SEP] <|im_start|>user",
    "<unk>x</s> <s>y</s><unk>  <s>  </s> \u2581<unk>\u2581 \u2581</s>\u2581\u2581a",
    "1234567890 3.14159 1,000,000 0x1F 1e-9 12:34 2024-02-29 v1.2.3 a1b2c3 1 2  3   4\t5\n6",
    "foo  bar   baz\t\tqux\n\n\nquux \n \t\r\n end  ",
    "def f(x):\n    return x ** 2  # square\n\n\n    if True:\n\t\tpass\n",
    "https://example.org/a/b?c=d&e=%20#f user@example.org C:\\Users\\x",
    "Ω≈ç√∫˜µ≤≥÷ ÅÍÎÏ˝ÓÔ\ufb01ﬀ ＡＢＣ１２３ ｱｲｳ",
    "e\u0301 vs é; A\u030a vs Å; \u1112\u1161\u11ab vs 한",
    "مرحبا بالعالم ١٢٣ שלום עולם नमस्ते दुनिया ๑๒๓ สวัสดี こんにちは世界 你好，世界！안녕하세요",
    "\u202eright to left\u202c \u2066isolated\u2069 zero\u200bwidth\u200cjoin\u200der",
    "\ufeffbyte order mark, \ufffd replacement, \x7f delete, \x1b[31mred\x1b[0m",
    "Z̤̭̯͈͎̮̍ͪ̈́a̗͇͔͖͓ͣ̈l͚̹̈́g͍̞̜ͥo͕̓",
)


def nasty_texts() -> Iterator[str]:
    """A few hundred short texts, the same at every call."""
    yield ""
    yield from _FRAGMENTS
    kinds = (_SPACES, _DIGITS, _LETTERS, _MARKS, _SIGNS)
    for one in "".join(kinds):
        # Each character first, last, alone, doubled, between words, next to digits and next to spaces.
        yield f"{one}a {one} b{one}c {one}{one} 1{one}2  {one}\n{one}'s {one}  7 {one}"
    for space in _SPACES:
        for neighbour in "a1'.é漢٣":
            yield f"x{space}{neighbour}{space}{space}{neighbour}{space} {neighbour} {space}{space}{space}"
    for length in (2, 3, 7, 8, 16, 31, 64, 255, 1000):
        for character in " \n\ta1=-é漢":
            yield f"a{character * length}b{character * length}1{character * length}"
    for code in range(1, 0x110000, 1021):  # a prime, so that every block of Unicode is covered
        if not 0xD800 <= code <= 0xDFFF:
            yield f"{chr(code)} a{chr(code)}1 {chr(code)}{chr(code)}\n"
