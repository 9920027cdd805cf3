"""Text in any encoding -> UTF-8, and how much of a text is not in the encoding it should be in.

What cannot be decoded becomes U+FFFD, the replacement character. It is counted, and too much of it
is refused: text in another encoding would otherwise train as rubbish without a word.
"""

if __name__ == "__main__":
    raise SystemExit("parts/encoding.py is no command: README.md lists the commands")

import codecs
import io
import re
import sys
from typing import IO, NamedTuple

REPLACEMENT = "\ufffd"

# A text with more than one wrong byte in so many is refused.
LIMIT = 1000

# Byte-order marks, at the beginning of a text: mark -> encoding. UTF-32's begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Half a pair, of those that stand for no byte (see Encoded).
HALF_PAIR = re.compile("[\ud800-\udc7f\udd00-\udfff]")

# The beginning of a character of UTF-8 at the end of a block, which cuts the character.
CUT_CHARACTER = re.compile(
    rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
)

# Control characters that text does not have. (It may have tab, line feed, form feed, escape ...)
CONTROLS = bytes([*range(7), *range(14, 27), *range(28, 32), 127])

# Below that, most of chardet's guesses are wrong.
LEAST_CONFIDENCE = 0.1

# From so many bytes on, pyarrow checks UTF-8 ten times as fast as Python does, once it is loaded.
LONG = 1 << 16


def find_mark(head: bytes) -> str:
    """Return the encoding that a byte-order mark at the beginning names, or "" without a mark."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    return ""


def check_encoding(name: str) -> None:
    """Raise ValueError if Python knows no encoding of text with this name."""
    try:
        b"a".decode(name, errors="replace")
    except (LookupError, UnicodeError):
        raise ValueError(
            f"--encoding {name}: no encoding of text; known are utf-8, cp1252, latin-1, gb18030, "
            "shift_jis, utf-16-le and all others of Python's codecs"
        ) from None


def choose_encoding(head: bytes, named: str | None) -> str:
    """Return the encoding of a text: that of its byte-order mark, UTF-8, or the one that is named.

    UTF-8 that has more than ASCII can hardly be anything else, so the name is for other texts.
    ValueError if it is UTF-16 that does not say so.
    """
    marked = find_mark(head)
    if marked:
        return marked
    if not named:
        check_is_not_utf16(head[:4096])
        return "utf-8"
    beginning = drop_cut_character(head)
    if b"\0" not in head and not beginning.isascii() and count_undecodable(beginning) == 0:
        return "utf-8"
    return named


def check_is_not_utf16(beginning: bytes) -> None:
    """Raise ValueError if every second byte is zero, and the others are text."""
    for encoding, first in (("utf-16-le", 0), ("utf-16-be", 1)):
        letters = beginning[first::2]
        zeros = beginning[1 - first :: 2].count(0)
        is_text = letters != b"" and letters.translate(None, CONTROLS) == letters
        if is_text and zeros * 10 >= len(letters) * 8:
            raise ValueError(f"UTF-16 without a byte-order mark: give --encoding {encoding}")


class Encoded(NamedTuple):
    """A text in UTF-8, and how many of its characters are replaced in it."""

    text: bytes
    n_undecodable: int = 0  # because bytes are wrong
    n_halves: int = 0  # because they are half a pair of surrogates


def encode(text: str) -> Encoded:
    """Encode a text of which any byte may have been wrong: one decoded with "surrogateescape".

    That becomes U+FFFD, and so does half a pair of surrogates, which UTF-8 does not have.
    """
    try:
        return Encoded(text.encode())
    except UnicodeEncodeError:
        n_halves = len(HALF_PAIR.findall(text))
        original = original_bytes(text)
        replaced = original.decode(errors="replace").encode()
        return Encoded(replaced, count_undecodable(original), n_halves)


def original_bytes(text: str) -> bytes:
    """Return the bytes of a text that was decoded with "surrogateescape", as Python's arguments."""
    return HALF_PAIR.sub(REPLACEMENT, text).encode(errors="surrogateescape")


def is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates, which stand for bytes or are half a pair."""
    return not re.search("[\ud800-\udfff]", text)


def to_utf8(text: str) -> bytes:
    return encode(text).text


def is_utf8(block: bytes | memoryview) -> bool:
    if len(block) < LONG or "pyarrow" not in sys.modules:
        try:
            str(block, "utf-8")
        except UnicodeDecodeError:
            return False
        return True
    import pyarrow

    offsets = pyarrow.array([0, len(block)], pyarrow.int64()).buffers()[1]
    text = pyarrow.Array.from_buffers(
        pyarrow.large_string(), 1, [None, offsets, pyarrow.py_buffer(block)]
    )
    try:
        text.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def count_undecodable(block: bytes) -> int:
    """Count the replacement characters that decoding UTF-8 adds to those that the text has."""
    if block.isascii() or is_utf8(block):
        return 0
    return block.decode(errors="replace").count(REPLACEMENT) - block.count(REPLACEMENT.encode())


def drop_cut_character(block: bytes) -> bytes:
    """Return a block of UTF-8 without the beginning of a character at its end."""
    cut = CUT_CHARACTER.search(block[-3:])
    if cut:
        return block[: len(block) - len(cut[0])]
    return block


def guess_encoding(sample: bytes) -> str:
    """Return the likely encoding of a text that is not UTF-8, or "" if none is likely.

    Where chardet is not sure, and characters beyond ASCII stand alone or in twos among ASCII, it is
    cp1252, the most frequent one of Latin scripts.
    """
    try:
        import chardet
    except ImportError:  # The environment is older than the requirement.
        return ""
    # Lines of ASCII tell nothing.
    lines = b"".join(re.findall(rb"[^\n]*[\x80-\xff][^\n]*\n?", sample))[:LONG]
    result = chardet.detect(lines)
    guess = result["encoding"]
    if result["confidence"] < LEAST_CONFIDENCE:
        runs = re.findall(rb"[\x80-\xff]+", lines)
        n_in_short_runs = sum(len(run) for run in runs if len(run) <= 2)
        guess = ""
        if n_in_short_runs * 10 > len(b"".join(runs)) * 8:
            guess = "cp1252"
    if not guess or guess.lower() in ("ascii", "utf-8"):
        return ""
    try:
        return codecs.lookup(guess).name
    except LookupError:
        return ""


class Utf8Stream(io.RawIOBase):
    """A stream of text in any encoding, read as UTF-8. What cannot be decoded is U+FFFD."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self.rest = b""  # UTF-8 that no one has read yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        at_end = False
        while not self.rest and not at_end:
            block = self.stream.read(1 << 16)
            at_end = not block
            self.rest = to_utf8(self.decoder.decode(block, final=at_end))
        n_bytes = min(len(buffer), len(self.rest))
        buffer[:n_bytes] = self.rest[:n_bytes]
        self.rest = self.rest[n_bytes:]
        return n_bytes


class Replacements:
    """Counts what is replaced by U+FFFD in some texts (files, mostly).

    A text in another encoding than it should be is refused, unless `allowed`: one with more than
    one character in LIMIT bytes that cannot be decoded.
    """

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.total = 0
        self.first = ""  # the name of the first text that has some
        self.guess = ""  # the likely encoding of the first one that cannot be decoded
        self.n_undecodable = 0  # in the text that is being read
        self.n_bytes = 0  # of it, so far

    def add(self, name: str, text: bytes, n_undecodable: int, n_halves: int = 0) -> None:
        """Count a part of the text `name`."""
        self.n_bytes += len(text)
        n_replaced = n_undecodable + n_halves
        if n_replaced == 0:
            return
        self.n_undecodable += n_undecodable
        if self.total == 0:
            self.first = name
        if n_undecodable and not self.guess:
            self.guess = guess_encoding(text)
        self.total += n_replaced

    def end_text(self, name: str, encoding: str = "utf-8") -> None:
        """Judge the text that ends here. ValueError if too much of it is not in its encoding."""
        is_bad = self.n_undecodable * LIMIT > self.n_bytes and not self.allowed
        numbers = f"{self.n_undecodable:,} characters in {self.n_bytes:,} bytes of text"
        self.n_undecodable = 0
        self.n_bytes = 0
        if not is_bad:
            return
        guess = self.guess
        likely = ""
        if guess:
            likely = f", it is probably {guess}"
        raise ValueError(
            f"{name}: not {encoding}{likely} ({numbers} cannot be decoded); "
            f"give --encoding {guess or 'NAME'}, or --replace to take U+FFFD for them"
        )

    def describe(self, keeps_bytes: bool = False) -> str:
        """Return a line about all texts. keeps_bytes: whether their bytes stay as they are."""
        noun = "character" if self.total == 1 else "characters"
        became = "stay the bytes they are" if keeps_bytes else "became U+FFFD"
        likely = f" (probably {self.guess}: see --encoding)" if self.guess else ""
        return (
            f"{self.total:,} {noun} could not be decoded and {became}, first in "
            f"{self.first}{likely}"
        )


def decode_text(
    content: bytes, name: str, named_encoding: str | None, replacements: Replacements
) -> str:
    """Decode a short text, such as a file of prompts. ValueError if too much of it cannot be."""
    try:
        encoding = choose_encoding(content, named_encoding)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    text = content.decode(encoding, errors="replace")
    if encoding == "utf-8":
        n_undecodable = count_undecodable(content)
    else:
        n_undecodable = text.count(REPLACEMENT)
    replacements.add(name, content, n_undecodable)
    replacements.end_text(name, encoding)
    return text
