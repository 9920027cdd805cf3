"""Files of any kind -> documents, in an order that depends on the files only.

What a file is, its content says: first its magic bytes, then the beginning of its text, and its
name comes last. Any file may be compressed, with gzip, bzip2, xz or zstd. Three kinds have rows,
which are documents:

    JSON      one object a line, one after another, or an array of objects or of strings
    csv       with a header, and any delimiter
    columns   Parquet, and Arrow's files and streams (which `datasets` writes by save_to_disk)

Any other text is one document, or as many as --separator makes of it.
"""

if __name__ == "__main__":
    raise SystemExit("parts/documents.py is no command: README.md lists the commands")

import bz2
import csv
import glob
import gzip
import importlib
import io
import json
import lzma
import mmap
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, NamedTuple

from parts.encoding import (
    CONTROLS,
    REPLACEMENT,
    Encoded,
    Replacements,
    Utf8Stream,
    choose_encoding,
    count_undecodable,
    drop_cut_character,
    encode,
    to_utf8,
)
from parts.tokenizer import END_OF_TEXT

# It belongs to Python from 3.14 on.
zstd: Any = importlib.import_module(
    "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
)

# How much of a file is read to tell what it is.
HEAD_BYTES = 1 << 20

# A first line of JSON may be longer than that.
LINE_BYTES = 64 << 20

# What is counted at a time, and what is read at a time of a JSON array.
BLOCK_BYTES = 1 << 20

# To check a text of so many bytes takes Python as long as it takes to load pyarrow.
LONG_TEXT = 128 << 20

# A field of csv may have so many characters. More is a quotation mark that is not closed.
FIELD_CHARACTERS = 1 << 28

# What a damaged file raises. pyarrow's errors are some of these; NotImplementedError is what it
# cannot read.
DAMAGE = (
    *(ValueError, OSError, EOFError, NotImplementedError),
    *(zlib.error, lzma.LZMAError, zstd.ZstdError, csv.Error),
)


class Document(NamedTuple):
    """One text, and how much of its file it takes (for the progress bar)."""

    text: bytes | mmap.mmap  # UTF-8
    file_bytes: float  # as the file has it: compressed, with the other columns of the row
    n_undecodable: int = 0  # characters of a row, see Encoded
    n_halves: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """What the options of a command say about the files."""

    text_column: str | None = None  # of rows; None is "text"
    separator: str | None = (
        None  # between the documents of a text; BLANK_LINE is any number of them
    )
    encoding: str | None = None  # of text that is not UTF-8 and has no byte-order mark
    as_text: bool = False  # no file has rows
    delimiter: str | None = None  # of csv, where it is known

    @property
    def column(self) -> str:
        return self.text_column or "text"


DEFAULT_OPTIONS = ReadOptions()
BLANK_LINE = "blank-line"


# ---- What a file is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputFile:
    """A file, and what it is."""

    path: Path
    kind: str  # "text", "json lines", "json", "csv", "parquet", "arrow", or "binary"
    compression: str = ""  # a key of OPENERS
    encoding: str = "utf-8"
    delimiter: str = ","  # of csv
    about: str = ""  # of a binary file: what it is
    has_columns: bool = False  # whether --text_column says which text is meant
    end_of_text_marks: int = 0  # in the beginning of a text
    is_named_json: bool = False  # a text whose name promises JSON, but which has no rows

    def describe(self) -> str:
        """Describe what decides its documents: "csv in gzip", "text of utf-16"."""
        words = self.kind
        if self.encoding != "utf-8":
            words += f" of {self.encoding}"
        if self.compression:
            words += f" in {self.compression}"
        return words

    def has_default_kind(self) -> bool:
        """Return whether the file is what earlier versions took it for, by its name alone."""
        name = self.path.name
        if name.endswith(".parquet"):
            expected = "parquet"
        elif name.endswith(".jsonl"):
            expected = "json lines"
        elif name.endswith(".jsonl.gz"):
            expected = "json lines in gzip"
        else:
            expected = "text"
        return self.describe() == expected


OPENERS: dict[str, Callable] = {
    "": lambda raw: raw,
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstd": zstd.open,
}
COMPRESSIONS = {
    rb"\x1f\x8b\x08": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": "zstd",
}
COMPRESSED_NAME = re.compile(r"\.(gz|gzip|bz2|xz|zst|zstd)$")

# What cannot be read, but is worth a word: a pattern of its beginning -> what it is.
PACKED = {
    rb"PK\x03\x04": "a zip archive, or an office document; unpack it, or save it as text",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    rb"Rar!\x1a\x07": "a rar archive; unpack it",
    rb"(?s).{257}ustar": "a tar archive; unpack it",
    rb"%PDF-": "a PDF; save it as text",
    rb"Obj\x01": "an Avro file; save it as Parquet",
    rb"(?s)ORC.{0,200}\x00": "an ORC file; save it as Parquet",
    rb"(?s)FEA1.{0,200}\x00": "a Feather file of version 1; save it as Parquet",
    rb"SQLite format 3\x00": "a database of SQLite; save the text as csv",
    rb"\x93NUMPY": "an array of numpy",
    rb"\x80[\x02-\x05].": "a pickle, which could run code; save it as Parquet or JSON",
    rb"\x04\x22\x4d\x18": "compressed with lz4; unpack it",
    rb"\x5d\x00\x00": "compressed with lzma; unpack it",
    rb"\x1f[\x9d\xa0]": "compressed with compress; unpack it",
    rb"\x1f\x8b\x08|BZh[1-9]1AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd": "compressed twice; unpack it",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"

COLUMN_NAMES = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
JSON_LINES_NAMES = (".jsonl", ".ndjson", ".jsonlines")
CSV_NAMES = (".csv", ".tsv", ".tab", ".psv")
COMMON_DELIMITERS = ",\t;|"
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n')  # for Excel, before the header
NO_DELIMITER = "\x1f"  # of a csv with one column, whose text may have any of the others


def identify(path: Path, options: ReadOptions = DEFAULT_OPTIONS) -> InputFile:
    """Tell what a file is. ValueError if it is damaged, or is not what its name promises."""
    try:
        return identify_content(path, options)
    except DAMAGE as error:
        raise ValueError(f"{path}: {error}") from None


def identify_content(path: Path, options: ReadOptions) -> InputFile:
    with open(path, "rb") as raw:
        compression = find_compression(raw.read(16))
        raw.seek(0)
        with OPENERS[compression](raw) as content:
            head = content.read(HEAD_BYTES)
            if head[:1] == b"{" and b"\n" not in head:  # perhaps a long line of JSON
                head += content.readline(LINE_BYTES) + content.read(HEAD_BYTES)
    if head.startswith(LFS_POINTER):
        raise ValueError("a pointer of Git LFS, not the file itself: git lfs pull fetches it")

    name = COMPRESSED_NAME.sub("", path.name.lower())
    promised = COLUMN_NAMES.get(Path(name).suffix)
    if not options.as_text:
        if head.startswith(b"PAR1"):
            return InputFile(path, "parquet", compression, has_columns=True)
        if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            return InputFile(path, "arrow", compression, has_columns=True)
        if promised and not head.startswith(b"FEA1"):
            raise ValueError(f"damaged: a file of {promised} does not begin like this")

    encoding = choose_encoding(head, options.encoding)
    if encoding != "utf-8":
        head = to_utf8(head.decode(encoding, errors="replace"))
    about = describe_binary(head)
    if about:
        return InputFile(path, "binary", compression, about=about)

    n_marks = head.count(END_OF_TEXT.encode())
    file = InputFile(path, "text", compression, encoding, end_of_text_marks=n_marks)
    if options.as_text:
        return file
    return find_rows(file, name, head, options)


def find_compression(magic: bytes) -> str:
    for pattern, compression in COMPRESSIONS.items():
        if re.match(pattern, magic):
            return compression
    return ""


def describe_binary(head: bytes) -> str:
    """Return what is binary about a file that begins like this, or "" for text."""
    for pattern, about in PACKED.items():
        if re.match(pattern, head):
            return about
    beginning = head[:4096]
    n_controls = len(beginning) - len(beginning.translate(None, CONTROLS))
    if b"\0" not in head:
        # More than one in a hundred; some texts have a stray one.
        return "control characters" if n_controls * 100 > len(beginning) else ""
    return "NUL bytes"


def find_rows(file: InputFile, name: str, head: bytes, options: ReadOptions) -> InputFile:
    """Return the file as a table if its beginning is that of one, or else as it is."""
    is_named_csv = name.endswith(CSV_NAMES)
    may_be_json = name.endswith(JSON_LINES_NAMES) or re.match(rb"\s*[{\[]", head)
    if not (may_be_json or is_named_csv or options.text_column):
        return file
    text = drop_cut_character(head).decode(errors="replace")
    if may_be_json:
        kind = find_json(name, text, options.column)
        if kind:
            has_columns = not re.match(r'\s*\[\s*"', text)
            return replace(file, kind=kind, has_columns=has_columns, end_of_text_marks=0)

    if is_named_csv:
        named = SEPARATOR_LINE.match(text)
        if named:
            delimiter = named[1]
        else:
            delimiter = options.delimiter or find_delimiter(text, options.column)
        return replace(file, kind="csv", delimiter=delimiter, has_columns=True, end_of_text_marks=0)
    # Prose has commas too, so any other name is a csv only if it has the column that is asked for.
    for delimiter in COMMON_DELIMITERS:
        if options.text_column and is_csv_with(options.text_column, text, delimiter):
            return replace(
                file, kind="csv", delimiter=delimiter, has_columns=True, end_of_text_marks=0
            )
    return replace(file, is_named_json=name.endswith(".json"))


def is_csv_with(column: str, text: str, delimiter: str) -> bool:
    """Return whether a text begins with a header that has the column, and a row of as many fields.

    A header has no space after a comma; prose has.
    """
    rows = read_beginning(text, delimiter, n_rows=2)
    return column in rows[0] and len(rows[0]) > 1 and len(rows[0]) == len(rows[-1])


def find_json(name: str, text: str, column: str) -> str:
    """Return "json lines", "json", or "" for a text that does not begin as rows of JSON.

    Rows are an array that begins with an object or a string; lines of which the first two are
    objects; or one object, on a line or on several, that has the column.
    """
    if name.endswith(JSON_LINES_NAMES):
        has_rows = re.match(r'\s*\[\s*["{]', text) and begins_with_array(text)
        return "json" if has_rows else "json lines"
    if text.lstrip().startswith("["):
        return "json" if begins_with_array(text) else ""
    lines = [line for line in text.split("\n", 20) if line.strip()]
    if not is_object(lines[0]):
        return "json" if has_column(parse_beginning(text, 0), column) else ""
    goes_on = len(lines) > 1 and lines[1].lstrip().startswith("{")
    if goes_on or has_column(json.loads(lines[0]), column):
        return "json lines"
    return ""


def begins_with_array(text: str) -> bool:
    """Return whether a text begins with a JSON array of objects or strings, or is an empty one."""
    if len(text) < HEAD_BYTES // 4:  # It is all there.
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError):
            # A damaged array of objects is no text.
            return bool(re.match(r'\s*\[\s*\{\s*"[^"\n]*"\s*:', text))
        return isinstance(rows, list) and (not rows or isinstance(rows[0], str | dict))
    return bool(re.match(r'\s*\[\s*(\{\s*"[^"\n]*"\s*:|"(\\.|[^"\\\n])*("\s*,|\Z))', text))


def is_object(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and bool(row)


def parse_beginning(text: str, start: int) -> Any:
    """Return the JSON value that begins in a text at `start`, or None if none is whole there."""
    begins = re.compile(r"\s*").match(text, start)
    assert begins
    try:
        return json.JSONDecoder().raw_decode(text, begins.end())[0]
    except (ValueError, RecursionError):
        return None


def find_delimiter(text: str, column: str) -> str:
    """Return the delimiter of a csv that begins like this: one by which its header has the column.

    If there is none, the one by which the header has the most fields.
    """
    headers = {delimiter: read_header(text, delimiter) for delimiter in COMMON_DELIMITERS}
    if not any(column in header for header in headers.values()):
        with suppress(csv.Error):
            delimiter = csv.Sniffer().sniff(text[:4096]).delimiter
            headers[delimiter] = read_header(text, delimiter)

    def rate(delimiter: str) -> tuple[bool, int]:
        return column in headers[delimiter], len(headers[delimiter])

    best = max(headers, key=rate)
    return best if len(headers[best]) > 1 else NO_DELIMITER


def read_header(text: str, delimiter: str) -> list[str]:
    """Return the names of the columns of a csv that begins like this."""
    return [name.strip() for name in read_beginning(text, delimiter, n_rows=1)[0]]


def read_beginning(text: str, delimiter: str, n_rows: int) -> list[list[str]]:
    """Return the first rows of a csv, without blank lines. There is at least one, if empty."""
    rows: list[list[str]] = []
    with suppress(csv.Error):
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            if row:
                rows.append(row)
            if len(rows) == n_rows:
                break
    return rows or [[]]


# ---- Documents -----------------------------------------------------------------------------------


def read_documents(
    files: Iterable[InputFile],
    options: ReadOptions = DEFAULT_OPTIONS,
    replacements: Replacements | None = None,
) -> Iterator[Document]:
    """Read the documents of the files: each row of a table, or else the text.

    Empty documents are skipped. `replacements` counts what cannot be decoded. ValueError, with the
    file's name, if a file is damaged or too much of it cannot be decoded.
    """
    for file in files:
        try:
            for document in READERS[file.kind](file, options):
                if replacements:
                    count_document(file, document, replacements)
                if document.text:
                    yield document
            if replacements:
                replacements.end_text(str(file.path), file.encoding)
        except DAMAGE as error:
            message = str(error)
            if not message.startswith(f"{file.path}: "):
                message = f"{file.path}: {message}"
            raise ValueError(message) from None


def count_document(file: InputFile, document: Document, replacements: Replacements) -> None:
    """Count the characters of a document that could not be decoded."""
    name = str(file.path)
    text = document.text
    if file.kind != "text" and file.encoding == "utf-8":
        assert isinstance(text, bytes)
        replacements.add(name, text, document.n_undecodable, document.n_halves)
        return
    if len(text) > LONG_TEXT:
        import pyarrow  # noqa: F401 (is_utf8 is faster with it)
    start = 0
    while start < len(text):
        block = text[start : start + BLOCK_BYTES]
        if len(block) == BLOCK_BYTES:
            block = drop_cut_character(block)
        start += len(block)
        if file.encoding == "utf-8":
            replacements.add(name, block, count_undecodable(block))
        else:  # The text may have the character itself, so this may be too many.
            replacements.add(name, block, block.count(REPLACEMENT.encode()))


def check_encoding_of(file: InputFile, replacements: Replacements) -> None:
    """Judge a text before any work is done: all of it, or the beginning if it is long to read.

    ValueError if too much of it cannot be decoded, unless the replacements are allowed.
    """
    judged = Replacements(replacements.allowed)
    if file.kind == "text" and not file.compression and file.encoding == "utf-8":
        for _ in read_documents([file], replacements=judged):
            pass
    elif file.kind not in ("parquet", "arrow"):
        with open_text(file) as opened:
            beginning = opened.content.read(HEAD_BYTES)
        beginning = drop_cut_character(beginning)
        n_undecodable = count_undecodable(beginning)
        if file.encoding != "utf-8":
            n_undecodable = beginning.count(REPLACEMENT.encode())
        judged.add(str(file.path), beginning, n_undecodable)
        judged.end_text(str(file.path), file.encoding)


class OpenedText(NamedTuple):
    raw: IO[bytes]  # as it is on the disk; its position is for the progress bar
    content: IO[bytes]  # unpacked, in UTF-8, without a byte-order mark


@contextmanager
def open_text(file: InputFile) -> Iterator[OpenedText]:
    with open(file.path, "rb") as raw, OPENERS[file.compression](raw) as content:
        if file.encoding != "utf-8":
            content = io.BufferedReader(Utf8Stream(content, file.encoding), BLOCK_BYTES)
        yield OpenedText(raw, content)


@contextmanager
def open_plain(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file, or a temporary copy of it: unpacked and, if it is text, in UTF-8."""
    if not file.compression and file.encoding == "utf-8":
        with open(file.path, "rb") as plain:
            yield plain
        return
    with tempfile.TemporaryFile() as plain:
        with open_text(file) as opened:
            shutil.copyfileobj(opened.content, plain, BLOCK_BYTES)
        plain.seek(0)
        yield plain


# ---- Texts ---------------------------------------------------------------------------------------


def read_text(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read a text as one document or, with a separator, as several.

    A whole text is memory-mapped, and valid until the next document.
    """
    file_bytes = file.path.stat().st_size
    with open_plain(file) as plain:
        size = os.fstat(plain.fileno()).st_size
        if size == 0:
            return  # An empty file cannot be mapped.
        with mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if options.separator is None:
                yield Document(text, file_bytes)
                return
            for start, end, next_start in cut_at_separators(text, options.separator):
                document = text[start:end].strip(b"\r\n")
                yield Document(document, file_bytes * (next_start - start) / size)


class Part(NamedTuple):
    start: int
    end: int
    next_start: int  # after the separator


def cut_at_separators(text: mmap.mmap, separator: str) -> Iterator[Part]:
    if separator == BLANK_LINE:
        pattern = rb"\n(?:[ \t\r]*\n)+"
    else:
        pattern = re.escape(to_utf8(separator))
    start = 0
    for match in re.finditer(pattern, text):
        yield Part(start, match.start(), match.end())
        start = match.end()
    yield Part(start, len(text), len(text))


# ---- Rows of JSON --------------------------------------------------------------------------------


def read_json_lines(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read the rows of a file that has a JSON object a line. ValueError if a row has no text."""
    is_first = True
    with open_text(file) as opened:
        bytes_read = 0
        for number, line in enumerate(opened.content, 1):
            text = Encoded(b"")
            if line.strip():
                text = parse_row(line, number, options.column, is_first)
                is_first = False
            yield Document(
                text.text, opened.raw.tell() - bytes_read, text.n_undecodable, text.n_halves
            )
            bytes_read = opened.raw.tell()


def parse_row(line: bytes, number: int, column: str, is_first: bool) -> Encoded:
    """Return the text of a line of JSON."""
    try:
        row = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError):
        raise ValueError(
            f"line {number}: not a JSON object with text in the column {column!r} "
            f"(choose with --text_column): {line[:80]!r}"
        ) from None
    return take_text(row, column, f"line {number}", is_first)


def read_json(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read JSON objects that stand one after another, or in an array, or an array of strings.

    ValueError if one has no text.
    """
    with open_text(file) as opened:
        bytes_read = 0
        for number, row in enumerate(parse_values(opened.content), 1):
            if isinstance(row, str):
                text = encode(row)
            else:
                text = take_text(row, options.column, f"row {number}", is_first=number == 1)
            yield Document(
                text.text, opened.raw.tell() - bytes_read, text.n_undecodable, text.n_halves
            )
            bytes_read = opened.raw.tell()


def parse_values(content: IO[bytes]) -> Iterator[Any]:
    """Parse JSON values one after another, or those of an array, with few in memory at a time."""
    stream = io.TextIOWrapper(content, "utf-8", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder()
    text = stream.read(BLOCK_BYTES).lstrip()
    is_array = text.startswith("[")
    between = re.compile(r"[\s,]*" if is_array else r"\s*")
    position = 1 if is_array else 0
    number = 1
    while True:
        position = skip(between, text, position)
        if is_array and text.startswith("]", position):
            if text[position + 1 :].strip() or stream.read(BLOCK_BYTES).strip():
                raise ValueError("damaged: there is something after the end of its array")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except RecursionError:
            raise ValueError(f"row {number}: nested too deep") from None
        except ValueError as error:
            # The value may go on.
            more = stream.read(max(BLOCK_BYTES, len(text) - position))
            if more and len(text) - position < FIELD_CHARACTERS:
                text = text[position:] + more
                position = 0
                continue
            if position == len(text) and not is_array:
                return
            raise ValueError(f"row {number}: damaged JSON: {error}") from None
        yield value
        number += 1


def skip(pattern: re.Pattern, text: str, start: int) -> int:
    """Return where a pattern, which may match nothing, ends in a text."""
    match = pattern.match(text, start)
    assert match
    return match.end()


def take_text(row: Any, column: str, where: str, is_first: bool) -> Encoded:
    """Return the text of a row. It is empty for null, and for a later row without the column.

    ValueError if the row has no text there.
    """
    wanted = f"{where}: not a JSON object with text in the column {column!r}"
    if not isinstance(row, dict):
        raise ValueError(f"{wanted} (choose with --text_column): {str(row)[:80]}")
    if not is_first and not has_column(row, column):
        return encode("")
    if has_column(row, column):
        text = join_texts(find_value(row, column))
        if text is not None:
            return encode(text)
    raise ValueError(f"{wanted} among {', '.join(row)}; choose with --text_column")


def say_no_text(column: str, columns: Iterable[str]) -> str:
    names = []
    for name in columns:
        # What is no header may be long, and have line breaks.
        names.append(shorten(" ".join(str(name).split()), 200, placeholder=" ..."))
    listed = ", ".join(names)
    return f"no text in the column {column!r} among {listed}; choose with --text_column"


def has_column(row: Any, column: str) -> bool:
    try:
        find_value(row, column)
    except LookupError:
        return False
    return True


def find_value(row: Any, column: str) -> Any:
    """Return the value of a column of a row; a.b is the field b of the column a.

    Of a list, it is the list of the fields b. LookupError if there is none.
    """
    if isinstance(row, list):
        return [find_value(item, column) for item in row]
    if row is None:
        return None
    if not isinstance(row, dict):
        raise LookupError(column)
    if column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    if not dot or first not in row:
        raise LookupError(column)
    return find_value(row[first], rest)


def join_texts(value: Any) -> str | None:
    """Return a text, or the lines of a list of texts. None if the value is neither."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if isinstance(value, list):
        lines = [item for item in value if item is not None]
        if all(isinstance(line, str) for line in lines):
            return "\n".join(lines)
    return None


# ---- Rows of csv ---------------------------------------------------------------------------------


def read_csv(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read the rows of a csv with a header. ValueError if a row has more or fewer fields than it.

    Such rows come from a text with the delimiter in it, or a line break, and no quotation marks.
    """
    csv.field_size_limit(FIELD_CHARACTERS)
    with open_text(file) as opened:
        stream = io.TextIOWrapper(opened.content, "utf-8", errors="surrogateescape", newline="")
        rows = csv.reader(stream, delimiter=file.delimiter, strict=True)
        header: list[str] = []
        bytes_read = 0
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(
                    f"line {rows.line_num}: {error}; see its quotation marks"
                ) from None
            if row is None:
                return
            if not row:
                continue  # a blank line
            if not header and file.delimiter.join(row) == f"sep={file.delimiter}":
                continue  # SEPARATOR_LINE
            if not header:
                header = [name.strip() for name in row]
                if options.column not in header:
                    no_text = say_no_text(options.column, header)
                    raise ValueError(f"line {rows.line_num}: {no_text}")
                index = header.index(options.column)
                continue
            if len(row) != len(header) and any(row[len(header) :] or ["fewer"]):
                raise ValueError(
                    f"line {rows.line_num}: {len(row)} fields under {len(header)} columns; "
                    "a text with the delimiter or a line break in it needs quotation marks"
                )
            text = encode(row[index])
            yield Document(
                text.text, opened.raw.tell() - bytes_read, text.n_undecodable, text.n_halves
            )
            bytes_read = opened.raw.tell()


# ---- Rows of Parquet and Arrow -------------------------------------------------------------------

# Rows that are in memory at a time, and their bytes where rows are long. Larger batches are slower:
# they join the row groups of the file, which are copied, and their memory is fetched anew.
BATCH_ROWS = 1000
BATCH_BYTES = 16_000_000


def read_parquet(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read the rows of a Parquet file. ValueError if it has no text in the column."""
    import pyarrow.parquet

    file_bytes = file.path.stat().st_size
    with open_plain(file) as plain:
        # A file on the disk is read faster by its name.
        table = pyarrow.parquet.ParquetFile(plain if file.compression else file.path)
        column = ArrowColumn(table.schema_arrow, options.column)
        n_rows = max(1, table.metadata.num_rows)
        bytes_per_row = file_bytes / n_rows
        groups = range(table.metadata.num_row_groups)
        plain_bytes = sum(table.metadata.row_group(i).total_byte_size for i in groups)
        batch_rows = int(BATCH_BYTES * n_rows / max(1, plain_bytes))
        batch_rows = min(max(1, batch_rows), BATCH_ROWS)
        for batch in table.iter_batches(batch_rows, columns=[column.top]):
            yield from column.read(batch, bytes_per_row)


def read_arrow(file: InputFile, options: ReadOptions) -> Iterator[Document]:
    """Read the rows of a file or stream of Arrow. ValueError if it has no text in the column."""
    import pyarrow.ipc

    file_bytes = file.path.stat().st_size
    with open_plain(file) as plain:
        size = os.fstat(plain.fileno()).st_size
        has_index = plain.read(6) == b"ARROW1"
        plain.seek(0)
        content = plain if file.compression else pyarrow.memory_map(str(file.path))
        if has_index:
            table = pyarrow.ipc.open_file(content)
            n_batches = table.num_record_batches
            batches = (table.get_batch(number) for number in range(n_batches))
        else:
            table = pyarrow.ipc.open_stream(content)
            batches = iter(table)
        column = ArrowColumn(table.schema, options.column)
        bytes_read = 0
        for batch in batches:
            if has_index:
                share = 1 / n_batches
            else:
                share = (content.tell() - bytes_read) / size
                bytes_read = content.tell()
            bytes_per_row = share * file_bytes / max(1, batch.num_rows)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from column.read(batch.slice(start, BATCH_ROWS), bytes_per_row)


class ArrowColumn:
    """The column of a table that has the texts: a column `top`, or the field `rest` of it."""

    def __init__(self, schema, column: str):
        """Find the column. ValueError if it is not there, or has no texts."""
        names = column.split(".")
        for n_names in range(len(names), 0, -1):
            self.top = ".".join(names[:n_names])
            self.rest = names[n_names:]
            self.through_list = False
            if self.top in schema.names:
                type_ = schema.field(schema.names.index(self.top)).type
                if self.has_texts(type_, self.rest):
                    return
        columns = [f"{field.name} ({field.type})" for field in schema]
        raise ValueError(say_no_text(column, columns))

    def has_texts(self, type_, rest: list[str]) -> bool:
        """Return whether the field `rest` of a type is text, or a list of texts."""
        from pyarrow import BaseExtensionType, types

        if isinstance(type_, BaseExtensionType):
            return self.has_texts(type_.storage_type, rest)
        if is_list(type_) and rest:
            self.through_list = True
            return self.has_texts(type_.value_type, rest)
        if rest:
            if not types.is_struct(type_) or type_.get_field_index(rest[0]) < 0:
                return False
            return self.has_texts(type_.field(rest[0]).type, rest[1:])
        if is_list(type_) or types.is_dictionary(type_):
            type_ = type_.value_type
        return is_text(type_)

    def read(self, batch, bytes_per_row: float) -> Iterator[Document]:
        """Read the texts of a batch."""
        import pyarrow
        import pyarrow.compute

        array = batch.column(batch.schema.names.index(self.top))
        if isinstance(array.type, pyarrow.BaseExtensionType):
            array = array.storage
        if self.through_list:
            column = ".".join(self.rest)
            for row in array.to_pylist():
                text = encode(join_texts(find_value(row, column)) or "")
                yield Document(text.text, bytes_per_row, text.n_undecodable, text.n_halves)
            return
        if self.rest:
            array = pyarrow.compute.struct_field(array, self.rest)
        if is_list(array.type):
            array = array.cast(pyarrow.list_(pyarrow.large_binary()))
            for lines in array.to_pylist():
                joined = b"\n".join(line for line in lines or [] if line is not None)
                yield Document(joined, bytes_per_row, count_undecodable(joined))
            return

        # As bytes, because the UTF-8 in a file may be invalid.
        if pyarrow.types.is_dictionary(array.type):
            # Of a string_view, as polars has, pyarrow's cast cannot do both steps.
            binary = array.dictionary.cast(pyarrow.large_binary()).take(array.indices)
        else:
            binary = array.cast(pyarrow.large_binary())
        is_valid = True
        try:
            binary.view(pyarrow.large_string()).validate(full=True)
        except pyarrow.ArrowInvalid:
            is_valid = False
        for value in binary.to_pylist():
            n_undecodable = 0 if is_valid or not value else count_undecodable(value)
            yield Document(value or b"", bytes_per_row, n_undecodable)


def is_list(type_) -> bool:
    from pyarrow import types

    return types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)


def is_text(type_) -> bool:
    """Return whether a type of Arrow is text, bytes, or null (which has no text, but could)."""
    return str(type_).removeprefix("large_").removesuffix("_view") in ("string", "binary", "null")


# How each kind of file is read.
READERS: dict[str, Callable[[InputFile, ReadOptions], Iterator[Document]]] = {
    "text": read_text,
    "json lines": read_json_lines,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}


# ---- Which files ---------------------------------------------------------------------------------


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Find the files of some files, folders and globs: each once, in the order of their names.

    Files in `out` are skipped. Inside a folder, names must match `pattern`; hidden files and
    folders are skipped, and those that match one of `exclude`, and what `datasets` writes beside
    its data. ValueError if nothing is left.
    """
    exclude = [*exclude, ".*"]

    def is_excluded(path: Path) -> bool:
        return any(fnmatch(name, unwanted) for name in path.parts for unwanted in exclude)

    first_paths: dict[Path, Path] = {}  # the real path of a file -> the first path that leads to it
    for path in paths:
        for top in expand_glob(path):
            if not top.exists():
                raise ValueError(f"{top}: no such file or folder")
            candidates = [top]
            if top.is_dir():
                candidates = list_files(top, pattern, exclude)
                candidates = [file for file in candidates if not is_beside_data(file)]
            for file in candidates:
                real_path = file.resolve()
                is_output = out in real_path.parents
                if file.is_file() and not is_output and not is_excluded(file.relative_to(top)):
                    first_paths.setdefault(real_path, file)
    if not first_paths:
        raise ValueError(
            f"{' '.join(paths)}: no files match {pattern!r} (see --glob and --exclude)"
        )
    return list(first_paths.values())


def list_files(top: Path, pattern: str, exclude: list[str]) -> list[Path]:
    """List the files under a folder whose names match the pattern, in the order of their paths.

    Folders that match one of `exclude` are not entered. ValueError for one that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename}: {error.strerror}; leave it out with --exclude"
        ) from None

    files = []
    for folder, subfolders, names in os.walk(top, onerror=refuse):
        entered = []
        for name in subfolders:
            if not any(fnmatch(name, unwanted) for unwanted in exclude):
                entered.append(name)
        # os.walk goes where this list says.
        subfolders[:] = entered
        files += [Path(folder, name) for name in names if fnmatch(name, pattern)]
    return sorted(files)


def is_beside_data(file: Path) -> bool:
    """Return whether a file in a folder of save_to_disk is none of its data."""
    if file.suffix not in (".json", ".arrow"):
        return False
    if file.name == "dataset_dict.json":
        return any(file.parent.glob("*/state.json"))
    state = file.parent / "state.json"
    if not state.exists() or not (file.parent / "dataset_info.json").exists():
        return False
    try:
        data_files = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (ValueError, LookupError, TypeError):
        return False  # They have the names, but are something else.
    return file.name not in data_files


def is_saved_split(file: Path) -> bool:
    """Return whether a file is of one split of several that save_to_disk has written."""
    return file.suffix == ".arrow" and (file.parent.parent / "dataset_dict.json").exists()


def expand_glob(path: str) -> list[Path]:
    """Return what a glob matches, or the path itself if it exists or nothing matches."""
    if os.path.lexists(path):
        return [Path(path)]
    return [Path(match) for match in sorted(glob.glob(path, recursive=True)) or [path]]
