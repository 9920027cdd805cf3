"""Measured speed. Each figure comes from the functions that the scripts themselves call, and from interleaved rounds.

python bench.py tokenize                               the source of Python's own library
python bench.py tokenize text.parquet --workers 8      files that data.py or fineweb.py take
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import data


def say(line: str) -> None:
    print(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: data.py's pipeline, from files to shards, against tiktoken alone


def documents_of(files: list[Path], column: str) -> list[str]:
    parts = (part for piece in data.pieces_of(files, column) for part, _ in piece.documents())
    return [part.decode("utf-8", errors="replace") for part in parts]


def plain_tiktoken(files: list[Path], column: str) -> tuple[float, float]:
    """When a loop over documents in memory, with nothing but tiktoken in it, began and ended."""
    texts, encoding = documents_of(files, column), data.get_tokenizer("gpt2").encoding
    encoding.encode_to_numpy("warm")
    start = time.time()
    for text in texts:
        encoding.encode_to_numpy(text, disallowed_special=())
    return start, time.time()


def side_by_side(files: list[Path], column: str, n: int) -> float:
    """Seconds of that loop in n processes at once: the most that this machine's cores can give to n workers."""
    with multiprocessing.get_context(data.START_METHOD).Pool(n) as pool:
        times = pool.starmap(plain_tiktoken, [(files, column)] * n, chunksize=1)
    return statistics.mean(end - start for start, end in times)


def shard(files: list[Path], column: str, workers: int) -> tuple[float, int]:
    """Seconds from files to fsynced shards, without the start of the workers; and the tokens."""
    with tempfile.TemporaryDirectory() as folder, data.tokenising("gpt2", workers) as tokenise_all:
        warm = list(tokenise_all(data.Texts(1, [(b"warm", True)]) for _ in range(8 * workers)))
        assert len(warm) == 8 * workers
        (Path(folder) / "progress").mkdir()
        section = data.Section(
            Path(folder) / "progress" / "all.json",
            {"train": lambda n: Path(folder) / f"bench_train_{n:06d}.bin"},
            {"train": 100_000_000},
        )
        route, _ = data.split_for(files, 0.0, 0)
        size = sum(path.stat().st_size for path in files)
        start = time.time()
        with data.Bar(size, f"{workers} workers") as bar:
            section.write(data.pieces_of(files, column), tokenise_all, route, bar)
        return time.time() - start, sum(row["tokens"] for row in section.record["shards"]["train"])


def bench_tokenize(arguments: argparse.Namespace) -> dict:
    files = [Path(path) for path in arguments.files] or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    column, workers = arguments.text_column, arguments.workers or data.available_cpus()
    megabytes = sum(len(text.encode()) for text in documents_of(files, column)) / 1e6
    say(f"{len(files)} files, {megabytes:.1f} MB of text, {arguments.rounds} rounds")
    rounds = []
    for _ in range(arguments.rounds):
        start, end = plain_tiktoken(files, column)
        one, tokens = shard(files, column, 1)
        many, _ = shard(files, column, workers)
        at_once = side_by_side(files, column, workers) / workers
        rounds.append({"tiktoken": end - start, "one": one, "many": many, "at_once": at_once})
        say("  ".join(f"{name} {seconds:.2f} s" for name, seconds in rounds[-1].items()))
    seconds = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    ratios = {
        "1 worker / tiktoken alone": statistics.median(row["tiktoken"] / row["one"] for row in rounds),
        f"{workers} workers / ({workers} x tiktoken alone)": statistics.median(
            row["tiktoken"] / row["many"] / workers for row in rounds
        ),
        f"{workers} workers / tiktoken in {workers} processes at once": statistics.median(
            row["at_once"] / row["many"] for row in rounds
        ),
    }
    speeds = {name: {"MB/s": megabytes / s, "tokens/s": tokens / s} for name, s in seconds.items()}
    return {"workers": workers, "megabytes": megabytes, "tokens": tokens, "speed": speeds, "ratio": ratios}


def show_tokenize(result: dict) -> None:
    what = {
        "tiktoken": "tiktoken alone, one process",
        "one": "files to shards, 1 worker",
        "many": f"files to shards, {result['workers']} workers",
        "at_once": f"tiktoken alone, {result['workers']} processes at once",
    }
    for name, speed in result["speed"].items():
        print(f"{what[name]:42} {speed['MB/s']:8.1f} MB/s {speed['tokens/s'] / 1e6:8.2f}M tokens/s")
    for name, ratio in result["ratio"].items():
        print(f"{name:52} {ratio:.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measure speed on this machine; medians of rounds.")
    benches = parser.add_subparsers(dest="bench", required=True)
    tokenize = benches.add_parser(
        "tokenize",
        help="text to shards, against tiktoken alone",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tokenize.add_argument("files", nargs="*", help="as data.py takes them (none: the source of Python's own library)")
    tokenize.add_argument("--text_column", default="text", help="of .jsonl and .parquet files")
    tokenize.add_argument("--workers", type=int, help="processes (default: as many as there are CPUs)")
    for bench in (tokenize,):
        bench.add_argument("--rounds", type=int, default=3, help="how often everything is measured, in turn")
        bench.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    measure, show = {"tokenize": (bench_tokenize, show_tokenize)}[arguments.bench]
    try:
        result = measure(arguments)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result)) if arguments.json else show(result)


if __name__ == "__main__":
    main()
