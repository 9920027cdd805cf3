"""Files of any kind -> documents, in an order that depends on the files only."""

if __name__ == "__main__":
    raise SystemExit("parts/documents.py is no command: README.md lists the commands")

import glob
import gzip
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

# Files whose rows are documents. Any other file is one document.
TABLES = (".parquet", ".jsonl", ".jsonl.gz")


class Document(NamedTuple):
    """One text, and how much of its file it takes (for the progress bar)."""

    text: bytes | mmap.mmap  # UTF-8
    file_bytes: float  # as the file has it: compressed, with the other columns of the row


def read_documents(files: list[Path], column: str = "text") -> Iterator[Document]:
    """Read the documents of the files: each row of a table, or else the whole file.

    Empty documents are skipped. ValueError, with the file's name, if a file is damaged.
    """
    for path in files:
        try:
            if path.suffix == ".parquet":
                rows = read_parquet(path, column)
            elif path.name.endswith(TABLES):
                rows = read_jsonl(path, column)
            else:
                rows = read_text(path)
            for document in rows:
                if document.text:
                    yield document
        except (ValueError, OSError, EOFError, zlib.error) as error:  # what a damaged file raises
            raise ValueError(f"{path}: {error}") from None


def read_text(path: Path) -> Iterator[Document]:
    """Read a whole file as one document. The text is memory-mapped, valid until the next one."""
    size = path.stat().st_size
    if size == 0:
        return  # An empty file cannot be mapped.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield Document(text, size)


def read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """Read the rows of a .jsonl or .jsonl.gz. ValueError if a row has no text in the column."""
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        bytes_read = 0
        for number, line in enumerate(lines, 1):
            try:
                text = parse_row(line, column)
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                raise ValueError(
                    f"line {number}: not a JSON object with text in the column {column!r} "
                    f"(choose with --text_column): {line[:80]!r}"
                ) from None
            yield Document(text, raw.tell() - bytes_read)
            bytes_read = raw.tell()


def parse_row(line: bytes, column: str) -> bytes:
    """Return the text of a line of JSON, as UTF-8. It is empty for a blank line and for null."""
    if not line.strip():
        return b""
    text = json.loads(line.decode("utf-8-sig", errors="replace"))[column]
    if text is None:
        return b""
    return text.encode("utf-8", errors="replace")


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    """Read the rows of a .parquet. ValueError if the file has no text in the column."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        if types.get(column) not in ("string", "large_string", "string_view"):
            names = ", ".join(f"{name} ({type_})" for name, type_ in types.items())
            raise ValueError(
                f"no text in the column {column!r} among {names}; choose with --text_column"
            )
        bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(1000, columns=[column]):
            # As bytes, because the UTF-8 in a file may be invalid.
            for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                yield Document(text or b"", bytes_per_row)


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Find the files of some files, folders and globs: each once, in the order of their names.

    Files in `out` are skipped. Inside a folder, names must match `pattern`; hidden files and
    folders are skipped, and those that match one of `exclude`. ValueError if nothing is left.
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


def expand_glob(path: str) -> list[Path]:
    """Return what a glob matches, or the path itself if it exists or nothing matches."""
    if os.path.lexists(path):
        return [Path(path)]
    return [Path(match) for match in sorted(glob.glob(path, recursive=True)) or [path]]
