"""What a file is, and its documents: kinds, compressions, encodings, and what is refused."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from pathlib import Path

import prepare
from parts import data, encoding
from parts.documents import InputFile, ReadOptions, find_files, identify, read_documents, zstd
from parts.encoding import Replacements, count_undecodable, drop_cut_character, is_utf8, to_utf8
from parts.tokenizer import get_tokenizer

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

TEXTS = [f'Text {i}: "quick", brown; fox|\n\tjumps é漢 {i * i}.' for i in range(60)]
ROWS = [
    {"id": i, "text": text, "meta": {"lang": "en", "lines": [text, "x"]}, "lines": [text, "", None]}
    for i, text in enumerate(TEXTS)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path, **options) -> list[str]:
    """The documents of a file."""
    reading = ReadOptions(**options)
    return [
        document.text[:].decode() for document in read_documents([identify(path, reading)], reading)
    ]


def write_csv(delimiter: str, **options) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, **options)
    writer.writerow(["id", "text", "z"])
    writer.writerows([i, text, "z"] for i, text in enumerate(TEXTS))
    return file.getvalue()


def write_arrow(write) -> bytes:
    sink = pa.BufferOutputStream()
    write(sink)
    return sink.getvalue().to_pybytes()


def write_parquet(table: pa.Table, **options) -> bytes:
    return write_arrow(lambda sink: pa.parquet.write_table(table, sink, **options))


def write_stream(table: pa.Table) -> bytes:
    def write(sink) -> None:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=9)

    return write_arrow(write)


def zstd_in_two_frames(content: bytes) -> bytes:
    """As parallel programs write it: a reader that stops after the first frame loses the rest."""
    middle = len(content) // 2
    return zstd.compress(content[:middle]) + zstd.compress(content[middle:])


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_in_two_frames,
}
TABLE = pa.Table.from_pylist(ROWS)
CONTENTS = {
    "rows.jsonl": LINES,
    "rows.NDJSON": LINES,
    "c4-train.00000-of-01024.json": LINES,
    "rows": LINES,
    "array.json": json.dumps(ROWS),
    "indented.json": json.dumps(ROWS, indent=2),
    "strings.json": json.dumps(TEXTS),
    "one_after_another.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "comma.csv": write_csv(","),
    "semicolon.CSV": write_csv(";"),
    "bar.csv": write_csv("|", quoting=csv.QUOTE_ALL),
    "other.csv": write_csv("^"),
    "tab.tsv": write_csv("\t", lineterminator="\n"),
    "excel.csv": write_csv(",").encode("utf-8-sig"),
    "excel_says_sep.csv": "sep=;\n" + write_csv(";"),
    "old_mac.csv": write_csv(",", lineterminator="\r"),
    "excel.txt.csv": write_csv("\t").encode("utf-16"),
    "wide.jsonl": LINES.encode("utf-16"),
    "groups.parquet": write_parquet(TABLE, row_group_size=7),
    "pandas.parquet.gzip": write_parquet(TABLE, compression="gzip"),
    "no_name": write_parquet(TABLE),
    "file.feather": write_arrow(lambda sink: pa.feather.write_feather(TABLE, sink)),
    "data-00000-of-00001.arrow": write_stream(TABLE),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_the_content_says_what_a_file_is(tmp_path, name):
    """Law 13 of CONTRIBUTING.md: the same rows in any container, under any compression and name."""
    content = CONTENTS[name]
    if isinstance(content, str):
        content = content.encode()
    for ending, pack in PACKERS.items():
        packed = pack(content)
        for path in (tmp_path / f"{name}{ending}", tmp_path / f"packed_{name}"):
            path.write_bytes(packed)
            assert read(path) == TEXTS, path.name
            documents = list(read_documents([identify(path)]))
            # The progress bar arrives at its end.
            assert sum(document.file_bytes for document in documents) == pytest.approx(
                len(packed), rel=0.2
            )


TEXT_TYPES = [
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.binary(),
    pa.large_binary(),
    pa.json_(pa.string()),
]


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
def test_any_type_of_text_in_columns(tmp_path, type_):
    texts = pa.array(TEXTS)
    if pa.types.is_dictionary(type_):
        texts = texts.dictionary_encode()
    elif isinstance(type_, pa.BaseExtensionType):
        texts = pa.ExtensionArray.from_storage(type_, texts)
    else:
        texts = texts.cast(type_)
    # json_normalize of pandas writes such names.
    table = pa.table({"text.lang": ["en"] * 60, "text": texts})
    (tmp_path / "a").write_bytes(write_parquet(table))
    (tmp_path / "b").write_bytes(write_stream(table))
    for name in "ab":
        assert read(tmp_path / name) == TEXTS
        assert read(tmp_path / name, text_column="text.lang") == ["en"] * 60


def test_categories_as_polars_writes_them(tmp_path):
    """Arrow with a dictionary of string_view, which pyarrow cannot cast, nor write to Parquet."""
    plain = pa.array([*TEXTS, None]).dictionary_encode()
    texts = pa.DictionaryArray.from_arrays(
        plain.indices.cast(pa.uint32()), plain.dictionary.cast(pa.string_view())
    )
    (tmp_path / "a").write_bytes(write_stream(pa.table({"text": texts})))
    assert read(tmp_path / "a") == TEXTS


@pytest.mark.parametrize(
    "name", ["groups.parquet", "data-00000-of-00001.arrow", "rows", "array.json"]
)
def test_fields_of_columns_and_lists_of_texts(tmp_path, name):
    content = CONTENTS[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert read(path, text_column="meta.lang") == ["en"] * 60
    assert read(path, text_column="meta.lines") == [f"{text}\nx" for text in TEXTS]
    assert read(path, text_column="lines") == [f"{text}\n" for text in TEXTS]


def test_fields_of_a_list_are_lines(tmp_path):
    """As chats have them."""
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": text}]}
        for text in TEXTS
    ]
    (tmp_path / "a").write_bytes(write_parquet(pa.Table.from_pylist(rows)))
    (tmp_path / "b").write_text(json.dumps(rows))
    for name in "ab":
        documents = read(tmp_path / name, text_column="messages.content")
        assert documents == [f"Hi\n{text}" for text in TEXTS]


def test_only_the_column_that_is_asked_for_counts(tmp_path):
    """Others may change their type, come and go; a later row may lack the text."""
    rows = [dict(text=text, meta=None) for text in TEXTS]
    rows[5]["meta"] = "a text"
    rows[6]["meta"] = 7
    rows[7]["another"] = [1]
    del rows[8]["text"]
    rows[9]["text"] = None
    expected = [row["text"] for row in rows if row.get("text")]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert read(tmp_path / "a.json") == read(tmp_path / "b.json") == expected


def test_a_row_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    from parts import documents

    for name in ("HEAD_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(documents, name, 1000)
    rows = [{"text": "long " * 5000}, {"text": "short"}, {"text": "é" * 3001}]
    texts = [row["text"] for row in rows]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False))
    (tmp_path / "c.json").write_text(json.dumps(texts))
    for name in "abc":
        assert read(tmp_path / f"{name}.json") == texts


PROSE = {
    "commas.txt": "Call me Ishmael, text, and more.\nSome years ago, never mind how long, text.\n",
    "package.json": '{\n  "name": "x",\n  "text": 5,\n  "version": "1.0"\n}\n'.replace(
        "text", "txt"
    ),
    "minified.json": '{"name": "x"}',
    "notes.md": '[a link](x)\n["quoted"] text, {"a": 1}\n',
    "code.js": '["a", "b"].forEach(print)\n',
    "braces.txt": "{}\n{% if x %}\n",
    "list.py": "[\n  'a',\n]\n",
    "control.txt": "\x1b[31mred\x1b[0m\f\n",
}


@pytest.mark.parametrize("name", PROSE)
def test_text_stays_text(tmp_path, name):
    (tmp_path / name).write_text(PROSE[name])
    assert read(tmp_path / name) == [PROSE[name]]
    assert read(tmp_path / name, text_column="text") == [PROSE[name]]


def test_a_csv_under_another_name_has_the_column_that_is_asked_for(tmp_path):
    path = tmp_path / "dump.txt"
    path.write_text(write_csv("\t"))
    assert read(path, text_column="text") == TEXTS
    assert len(read(path)) == 1
    # And any table may be read as text.
    path = path.rename(tmp_path / "dump.csv")
    assert read(path, as_text=True) == [write_csv("\t").replace("\r\n", "\r\n")]


def test_one_column_of_csv_may_have_commas(tmp_path):
    (tmp_path / "a.csv").write_text('text\nHello, world\n"quoted, ""too"""\n\n')
    assert read(tmp_path / "a.csv") == ["Hello, world", 'quoted, "too"']


# ---- Separators ----------------------------------------------------------------------------------


def test_separators(tmp_path):
    stories = [f"Once upon a time {i}.\nHe ran." for i in range(9)]
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    assert identify(path).end_of_text_marks == 9
    assert read(path, separator="<|endoftext|>") == stories
    assert len(read(path, separator="\n")) == 27
    path.write_bytes(b"\n  one\r\n\r\n \t\r\n\r\ntwo\nlines\n\n\nthree")
    assert read(path, separator="blank-line") == ["  one", "two\nlines", "three"]
    (tmp_path / "packed").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "packed", separator="blank-line") == ["  one", "two\nlines", "three"]


# ---- Encodings -----------------------------------------------------------------------------------

FRENCH = "Les élèves étaient déjà là; où est l'oeuvre? Ça coûte 20 £.\n" * 20


@given(st.binary(max_size=40))
@example("\ud800".encode("utf-8", "surrogatepass"))
@example("é\ufffd☃🙂".encode())
def test_utf8_is_what_python_says(block):
    text = block.decode(errors="replace")
    assert count_undecodable(block) == text.count("\ufffd") - block.count(b"\xef\xbf\xbd")
    long = b"a" * encoding.LONG + block
    assert is_utf8(long) == is_utf8(block)
    assert count_undecodable(long) == count_undecodable(block)


@given(st.text(max_size=9), st.integers(0, 30))
def test_only_a_cut_character_is_dropped(text, n):
    block = text.encode()[:n]
    whole = drop_cut_character(block)
    assert whole == block.decode(errors="ignore").encode()


def test_half_a_pair_of_surrogates_is_one_replacement_character(tmp_path):
    assert to_utf8("a\ud83db\udc00") == "a\ufffdb\ufffd".encode()
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.decode(tokenizer.encode("a\ud83d").tolist()) == "a\ufffd"
    (tmp_path / "a.jsonl").write_text(r'{"text": "half \ud83d, and a pair \ud83d\ude42"}')
    replacements = Replacements()
    [document] = read_documents([identify(tmp_path / "a.jsonl")], replacements=replacements)
    assert document.text == "half \ufffd, and a pair 🙂".encode()
    assert replacements.total == 1


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_goes_and_is_obeyed(tmp_path, name):
    (tmp_path / "a.txt").write_bytes(FRENCH.encode(name))
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.txt", encoding="cp1252") == [FRENCH]


def test_an_encoding_that_is_named(tmp_path):
    for name in ("latin-1", "utf-16-le", "cp037"):
        (tmp_path / "a.txt").write_bytes(FRENCH.encode(name))
        assert read(tmp_path / "a.txt", encoding=name) == [FRENCH]
    (tmp_path / "a.csv").write_bytes(f"id;text\n1;{FRENCH[:20]}\n".encode("latin-1"))
    assert read(tmp_path / "a.csv", encoding="latin-1") == [FRENCH[:20]]
    # What is UTF-8 and not ASCII can be nothing else.
    (tmp_path / "b.txt").write_text(FRENCH)
    assert read(tmp_path / "b.txt", encoding="latin-1") == [FRENCH]


def run(capsys, tmp_path: Path, *argv: str, code: int = 0) -> str:
    """Run prepare.py; return what it prints."""
    try:
        prepare.main(
            [*argv, "--out", str(tmp_path / "out"), "--val_fraction", "0", "--workers", "1"]
        )
    except SystemExit as exit_:
        assert exit_.code == code
    else:
        assert code == 0
    return "".join(capsys.readouterr())


def decode_shards(out: Path) -> list[str]:
    [shard] = data.open_shards(out, "train")
    tokenizer = data.tokenizer_of_shards(out)
    starts = np.flatnonzero(shard.tokens == tokenizer.end_of_text)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(shard.tokens, starts[1:])]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv", "a.jsonl"])
def test_text_in_another_encoding_is_refused(tmp_path, capsys, name):
    content = f"text\n{FRENCH}"
    if name == "a.jsonl":
        content = json.dumps({"text": FRENCH}, ensure_ascii=False)
    content = content.encode("latin-1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    printed = run(capsys, tmp_path, str(path), code=2)
    assert f"{path}: not utf-8" in printed and "--encoding" in printed and "--replace" in printed
    assert not list(tmp_path.glob("out/*.bin"))
    printed = run(capsys, tmp_path, str(path), "--replace")
    assert "200 characters could not be decoded and became U+FFFD, first in" in printed
    run(capsys, tmp_path / "b", str(path), "--encoding", "latin-1")
    assert "".join(decode_shards(tmp_path / "b" / "out")).startswith(
        "\ufeffLes élèves"[1:] if "txt" not in name else "text\nLes élèves"
    )


@pytest.mark.parametrize(
    "name, pack", [("a.txt", gzip.compress), ("a.txt", zstd.compress), ("a.jsonl", zstd.compress)]
)
def test_wrong_bytes_that_come_late_in_a_compressed_text(tmp_path, capsys, name, pack):
    """Only its beginning is judged before the work is done. Nothing that was made until then stays
    in the way of the command with another option.
    """
    lines = ["plain words " * 20] * 6_000 + ["Größe"] * 5_000
    if name == "a.jsonl":
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    path = tmp_path / name
    path.write_bytes(pack("\n".join(lines).encode("cp1252")))
    command = [str(path), "--shard_tokens", "100000"]
    printed = run(capsys, tmp_path, *command, code=2)
    assert f"{path}: not utf-8" in printed and "(10,000 characters in" in printed
    assert not data.read_meta(tmp_path / "out")["complete"]

    printed = run(capsys, tmp_path, *command, "--replace")
    assert f"10,000 characters could not be decoded and became U+FFFD, first in {path}" in printed
    run(capsys, tmp_path / "2", *command, "--encoding", "cp1252")
    assert read(path, encoding="cp1252")[-1].endswith("Größe")


def test_a_few_wrong_characters_are_counted(tmp_path, capsys):
    pytest.importorskip("chardet")
    (tmp_path / "a.txt").write_text("plain\n" * 1000)
    (tmp_path / "b.txt").write_bytes(b"plain\n" * 1000 + "Les élèves du café\n".encode("cp1252"))
    printed = run(capsys, tmp_path, str(tmp_path))
    assert (
        f"3 characters could not be decoded and became U+FFFD, first in {tmp_path / 'b.txt'}"
        in printed
    )
    (tmp_path / "b.txt").write_bytes(b"plain\n" * 300 + "Les élèves du café\n".encode("cp1252"))
    printed = run(capsys, tmp_path / "2", str(tmp_path / "b.txt"), code=2)
    assert "not utf-8, it is probably cp1252" in printed or "iso8859" in printed


@pytest.mark.parametrize(
    "line",
    [
        "Les élèves étaient là; n° 5, à côté",
        "plain “quoted” text – it’s fine",
        "a temperature of 25° and 20 £",
        "über Größe, Maß und Fluß",
    ],
)
def test_text_in_latin_letters_is_probably_cp1252(line):
    pytest.importorskip("chardet")
    sample = f"{line}\n".encode("cp1252")
    for n_lines in (1, 60):
        assert (sample * n_lines).decode(encoding.guess_encoding(sample)) == f"{line}\n" * n_lines


@pytest.mark.parametrize("name", ["latin-1", "gb18030", "shift_jis", "cp1251"])
def test_the_likely_encoding(name):
    pytest.importorskip("chardet")
    text = {
        "latin-1": FRENCH,
        "gb18030": "这是一个很长的中文句子，用来测试编码检测。",
        "shift_jis": "これは日本語の文章です。今日は天気がいいですね。",
        "cp1251": "Привет, как дела у вас сегодня вечером?",
    }[name]
    sample = b"plain text\n" * 9000 + text.encode(name)
    assert text.encode(name).decode(encoding.guess_encoding(sample)) == text


# ---- What is refused, and what is left out -------------------------------------------------------


def test_binary_files_are_left_out_of_folders_and_refused_by_name(tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("my notes\n" * 50)
    binary = {
        "photo.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "doc.pdf": b"%PDF-1.4\n",
        "x.zip": b"PK\x03\x04junk",
        "noise": bytes(range(1, 256)) * 9,
        "pickled": pickle.dumps(["text"]),
        "table.xlsx.csv": b"PK\x03\x04junk",
        "v1.feather": b"FEA1\0\0\0\0text",
        "twice.gz": gzip.compress(gzip.compress(b"text")),
    }
    for name, content in binary.items():
        (notes / name).write_bytes(content)
        assert f"{name}: binary (" in run(capsys, tmp_path, str(notes / name), code=2)
    printed = run(capsys, tmp_path, str(notes))
    assert f"left out 8 files that are not text, first {notes / 'doc.pdf'} (a PDF" in printed
    assert decode_shards(tmp_path / "out") == ["my notes\n" * 50]


REFUSED = {
    "lfs.parquet": ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html.parquet": ("<html>not found", "damaged"),
    "u16": ("plain words".encode("utf-16-le") * 9, "give --encoding utf-16-le"),
    "cut.json": ('[{"text": "a"}, {"text": "b"', "row 2: damaged JSON"),
    "after.json": ('[{"text": "a"}] x', "after the end"),
    "fields.csv": ("id,text\n1,Hello, with a comma\n", "line 2: 3 fields under 2 columns"),
    "fewer.csv": ("id,text\n1,a text\nof lines\n", "line 3: 1 fields under 2 columns"),
    "quotes.csv": ('id,text\n1,"a\n2,b\n', "see its quotation marks"),
    "no_header.csv": ("1,a\n2,b\n", "line 1: no text in the column 'text' among 1, a;"),
    "other.json": (
        '{"body": "x"}\n{"body": "y"}\n',
        "text in the column 'text' among body;",
    ),
    "number.json": (
        '[{"text": 5}]',
        "row 1: not a JSON object with text in the column 'text' among text;",
    ),
    "lines.csv": ('1,"a\nb"\n2,c\n', "line 2: no text in the column 'text' among 1, a b;"),
    "n.parquet": (
        write_parquet(pa.table({"n": [1], "a": [{"b": 1}]})),
        "'text' among n (int64), a (struct",
    ),
    "cut.bz2": (bz2.compress(b"text" * 999)[:-9], "Compressed file ended before"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named(tmp_path, capsys, name):
    content, message = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    printed = run(capsys, tmp_path, str(path), code=2)
    assert f"prepare.py: {path}: " in printed and message in printed


def test_options_that_cannot_apply_are_errors(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some text\n" * 90)
    rows = tmp_path / "a.csv"
    rows.write_text(write_csv(","))
    assert "has no columns" in run(capsys, tmp_path, str(text), "--text_column", "text", code=2)
    assert "has rows" in run(capsys, tmp_path, str(rows), "--separator", "x", code=2)
    assert "no encoding" in run(capsys, tmp_path, str(text), "--encoding", "rot13", code=2)
    (tmp_path / "b.txt").write_text(FRENCH)
    printed = run(capsys, tmp_path, str(tmp_path / "b.txt"), "--encoding", "cp1252", code=2)
    assert "are UTF-8" in printed
    # Together they can.
    printed = run(
        capsys, tmp_path, str(text), str(rows), "--text_column", "z", "--separator", "\\n"
    )
    assert "150 documents" in printed
    # Another separator is another source; none is too.
    command = [str(text), str(rows), "--text_column", "z"]
    assert "separator \n -> None" in run(capsys, tmp_path, *command, code=2).replace(
        "prepare.py: ", ""
    )


def test_a_line_where_json_has_no_rows(tmp_path, capsys):
    """As pandas' to_json(orient="split") and SQuAD have it."""
    (tmp_path / "split.json").write_text(json.dumps({"columns": ["text"], "data": [["a b"]] * 99}))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a b"}]))
    printed = run(capsys, tmp_path, str(tmp_path))
    assert f"1 JSON file without rows read as text: {tmp_path / 'split.json'} first" in printed
    assert "without rows" not in run(capsys, tmp_path / "2", str(tmp_path / "rows.json"))
    printed = run(capsys, tmp_path / "3", str(tmp_path / "split.json"), "--as_text")
    assert "without rows" not in printed


def test_a_hint_where_a_text_has_the_end_of_text_in_letters(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n" * 9)
    assert "give --separator '<|endoftext|>'" in run(capsys, tmp_path, str(tmp_path / "a.txt"))


def test_folders_of_save_to_disk(tmp_path, capsys):
    import datasets

    datasets.disable_progress_bars()
    parts = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(9)])
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "train" / "cache-1234.arrow").write_bytes(b"not of the data")
    files = find_files([str(tmp_path / "saved" / "train")], "*", [], tmp_path / "out")
    assert [file.name for file in files] == ["data-00000-of-00001.arrow"]
    assert read(files[0]) == [f"train {i}" for i in range(9)]
    printed = run(capsys, tmp_path, str(tmp_path / "saved"))
    assert "18 documents" in printed and f"{tmp_path / 'saved'}: all its splits are read" in printed


def test_what_is_read_as_before_has_the_same_source(tmp_path, capsys):
    """So the folders of earlier versions are recognised, finished or not."""
    for name, content in {"a.txt": FRENCH, "b.jsonl": LINES, "c.csv": "text\nx\n"}.items():
        (tmp_path / name).write_text(content)
    run(capsys, tmp_path, str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    source = data.read_meta(tmp_path / "out")["source"]
    assert list(source) == [
        *("tokenizer", "shard_tokens", "val_fraction", "text_column", "seed"),
        *("files", "bytes", "sha256"),
    ]
    run(capsys, tmp_path / "2", str(tmp_path / "c.csv"))
    assert data.read_meta(tmp_path / "2" / "out")["source"]["kinds"] == {"csv": 1}
    assert InputFile(tmp_path / "c.csv", "text").has_default_kind()
