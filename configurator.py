"""Settings: a dataclass of defaults + config files + --key=value -> one checked object. And a
script's exit code.

    python train.py config/quickstart.py config/mine.py --batch_size=8 --compile=False

A config file is plain Python that assigns settings; it sees the values so far, so `min_lr =
learning_rate / 10` works. Files are run from left to right, flags come last wherever they stand.
Every mistake is found before any is reported.
"""

import ast
import difflib
import inspect
import re
import traceback
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def configure(cls: type, argv: list[str]) -> Any:
    """An instance of the dataclass `cls` with the settings of argv (config files and --key=value).

    ValueError has a line for each unknown name, wrong type, file that fails, and sentence of
    `cls.mistakes()`.
    """
    types_of, values, mistakes = get_type_hints(cls), vars(cls()).copy(), []
    flags = [argument for argument in argv if argument.startswith("-")]
    for path in (argument for argument in argv if argument not in flags):
        for name, value in run_config_file(path, values, mistakes).items():
            assign(values, types_of, name, value, f"{path}: {name} = {value!r}", mistakes)
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals:
            mistakes.append(
                f"{flag}: settings are written --key=value" + nearest(name.lstrip("-"), values)
            )
        else:
            assign(values, types_of, name, parse(text, types_of.get(name, str)), flag, mistakes)

    config = cls(**values)
    if mistakes := mistakes + config.mistakes():
        raise ValueError("\n".join(mistakes))
    return config


def run_config_file(path: str, values: dict, mistakes: list[str]) -> dict:
    """What a config file assigns, run over the values so far; nothing, and a mistake, if it
    fails.
    """
    if not Path(path).is_file():
        files = [str(file) for file in Path(path).parent.glob("*.py")]
        hint = nearest(path, files) or ". A config file is Python, a setting is --key=value"
        mistakes.append(f"{path}: no such config file{hint}")
        return {}
    namespace = dict(values)
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        where = (
            f"{path}, line {lines[-1]}" if lines else path
        )  # the text of a SyntaxError has the line itself
        mistakes.append(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}")
        return {}
    # Names with a leading underscore are the file's own; so are what it imports and defines.
    own = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {n: v for n, v in namespace.items() if not n.startswith("_") and not isinstance(v, own)}


def assign(
    values: dict, types_of: dict, name: str, value: Any, where: str, mistakes: list[str]
) -> None:
    """Set values[name], or add to the mistakes why not."""
    if name not in values:
        mistakes.append(f"{where}: there is no setting {name!r}" + nearest(name, values))
    elif not accepts(types_of[name], value):
        mistakes.append(f"{where}: {name} takes {describe(types_of[name])}, not {value!r}")
    else:
        values[name] = float(value) if types_of[name] is float else value


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a setting of this type may have this value. int serves as float; bool is never a
    number.
    """
    if get_origin(annotation) is Literal:
        return any(
            value == choice and type(value) is type(choice) for choice in get_args(annotation)
        )
    if get_origin(annotation) in (Union, types.UnionType):
        return any(accepts(one, value) for one in get_args(annotation))
    if annotation is float:
        return type(value) is float or (type(value) is int and abs(value) < 1e300)
    return type(value) is annotation


def parse(text: str, annotation: Any) -> Any:
    """The text behind --key= as a value: as it stands where the setting takes a str, else as a
    Python literal.
    """
    if text == "None" and accepts(annotation, None):
        return None
    if accepts(annotation, text):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def describe(annotation: Any) -> str:
    """A type in words: 'an int', "'auto', True or False"."""
    if not get_args(annotation):
        return {int: "an int", float: "a float", str: "a str", bool: "True or False"}.get(
            annotation, "None"
        )
    say = repr if get_origin(annotation) is Literal else describe
    words = [say(one) for one in get_args(annotation)]
    return " or ".join([", ".join(words[:-1]), words[-1]])


def nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    return f": did you mean {close[0]}?" if close else ""


def help_text(cls: type) -> str:
    """Every setting with its default and its comment, by group, as the source of the dataclass has
    them.
    """
    types_of, lines = get_type_hints(cls), []
    for line in inspect.getsource(cls).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            lines += ["", heading[1]]
        elif setting := re.fullmatch(r"    (\w+): .+? = (.+?)  # (.+)", line):
            name, default, meaning = setting.groups()
            choices = (
                f" ({describe(types_of[name])})" if get_origin(types_of[name]) is Literal else ""
            )
            lines.append(f"  --{name + '=' + default.strip(chr(34)):<40}  {meaning}{choices}")
    return "\n".join(lines)
