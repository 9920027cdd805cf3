"""JSON that other programs, and people, have written: one reader, which refuses what would only
fail later.
"""

if __name__ == "__main__":
    raise SystemExit("parts/json_files.py is no command: README.md lists the commands")

import json
import math
from pathlib import Path
from typing import Any

from parts.files import check_is_file

# No file of this project comes near these. A tokenizer.json of 250,000 tokens has 33 MB.
LARGEST_FILE = 256 << 20  # bytes
DEEPEST = 64  # lists and objects inside each other
LARGEST_NUMBER = 2**64  # the first one that 64 bits cannot hold

KINDS: dict[type, str] = {dict: "an object {...}", list: "a list [...]", str: "a text"}


def read_json(path: Path, kind: type = dict, allow_nan: bool = False) -> Any:
    """The content of a JSON file, which must be of this kind. allow_nan: see `parse_json`.

    ValueError names the file and says what is wrong with it; OSError if it cannot be read.
    """
    check_is_file(path)
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{path}: more than {LARGEST_FILE >> 20} MB, too large for a JSON file")
    try:
        return parse_json(content, kind, allow_nan)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(text: str | bytes, kind: type = dict, allow_nan: bool = False) -> Any:
    """The value of a JSON text, which must be of this kind (dict, list or str).

    It holds no NaN, no infinity and no number beyond 64 bits, and is not nested too deeply.
    ValueError says what is wrong. allow_nan: NaN and infinities are taken as Python writes them.
    """
    try:
        # utf-8-sig: some editors put a byte order mark before a text.
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(
            decoded,
            parse_constant=float if allow_nan else refuse_number,
            parse_float=read_float,
            parse_int=read_int,
        )
    except UnicodeDecodeError:
        raise ValueError("not JSON: its text is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"not read: more than {DEEPEST} lists inside each other") from None
    if not isinstance(value, kind):
        raise ValueError(f"not what it should be: JSON, but not {KINDS[kind]}")
    check_depth(value)
    return value


def refuse_number(text: str) -> None:
    shown = text if len(text) <= 20 else f"{text[:20]}..."
    raise ValueError(f"not read: {shown} is not a number that 64 bits can hold")


def read_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e999
        refuse_number(text)
    return number


def read_int(text: str) -> int:
    # The length first: Python refuses thousands of digits in words of its own.
    if len(text) > 20 or abs(int(text)) >= LARGEST_NUMBER:
        refuse_number(text)
    return int(text)


def check_depth(value: Any) -> None:
    """ValueError if lists and objects are nested so deeply that other code would fail on them."""
    level = [value]
    for _ in range(DEEPEST):
        below: list = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            for child in children:
                if isinstance(child, (dict, list)):
                    below.append(child)
        if not below:
            return
        level = below
    raise ValueError(f"not read: more than {DEEPEST} lists inside each other")
