"""Files of any kind -> documents, in an order that depends on the files only."""

import glob
import gzip
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

TABLES = (".parquet", ".jsonl", ".jsonl.gz")
Documents = Iterator[tuple[bytes | mmap.mmap, float]]  # UTF-8, its bytes in the file


def documents_of(files: list[Path], column="text") -> Documents:
    """Each row of a table, else the whole file. Empty documents are skipped."""
    for path in files:
        try:
            if path.name.endswith(TABLES):
                rows = (
                    read_parquet(path, column)
                    if path.suffix == ".parquet"
                    else read_jsonl(path, column)
                )
                yield from ((text, in_file) for text, in_file in rows if text)
            elif size := path.stat().st_size:
                with (
                    open(path, "rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
                ):
                    yield text, size
        except (ValueError, OSError, EOFError, zlib.error) as error:  # what a damaged file raises
            raise ValueError(f"{path}: {error}") from None


def read_jsonl(path: Path, column: str) -> Documents:
    with open(path, "rb") as raw:
        before = 0
        for number, line in enumerate(gzip.open(raw) if path.suffix == ".gz" else raw, 1):
            try:
                text = (
                    json.loads(line.decode("utf-8-sig", errors="replace"))[column]
                    if line.strip()
                    else None
                )
                text = b"" if text is None else text.encode("utf-8", errors="replace")
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                wanted = f"not a JSON object with text in the column {column!r} (choose with --text_column)"
                raise ValueError(f"line {number}: {wanted}: {line[:80]!r}") from None
            yield text, raw.tell() - before
            before = raw.tell()


def read_parquet(path: Path, column: str) -> Documents:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        if columns.get(column) not in ("string", "large_string", "string_view"):
            names = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
            raise ValueError(
                f"no text in the column {column!r} among {names}; choose with --text_column"
            )
        in_file = path.stat().st_size / max(1, file.metadata.num_rows)
        for batch in file.iter_batches(1000, columns=[column]):
            for text in (
                batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            ):  # bytes: UTF-8 may be invalid
                yield text or b"", in_file


def find_files(paths: list[str], pattern: str, exclude: list[str], out: Path) -> list[Path]:
    """Files, folders and globs -> files, each once, in the order of their names. Files in `out` are
    skipped.

    Inside a folder, names must match `pattern`; hidden files and folders, and what matches
    `exclude`, are skipped.
    """
    files = {}  # real path -> the first path that leads to it
    for path in paths:
        for top in map(
            Path,
            [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True)) or [path],
        ):
            if not top.exists():
                raise ValueError(f"{top}: no such file or folder")
            found = (
                sorted(p for p in top.rglob("*") if fnmatch(p.name, pattern))
                if top.is_dir()
                else [top]
            )
            for file in found:
                skipped = (
                    fnmatch(p, e) for p in file.relative_to(top).parts for e in [*exclude, ".*"]
                )
                if file.is_file() and out not in file.resolve().parents and not any(skipped):
                    files.setdefault(file.resolve(), file)
    if not files:
        raise ValueError(
            f"{' '.join(paths)}: no files match {pattern!r} (see --glob and --exclude)"
        )
    return list(files.values())
