"""Settings: a dataclass of defaults + config files + --key=value -> one checked object.

    python train.py config/quickstart.py config/mine.py --batch_size=8 --compile=False
    python train.py config/quickstart.py --max-steps 100    # the same as --max_steps=100

A config file is plain Python that assigns settings. It sees the values so far, so that
`min_lr = learning_rate / 10` works. Files are run from left to right; flags come last wherever they
stand. All mistakes are reported together.

A setting is one line of a dataclass: its type, its default, what it means, and, in `setting(...)`,
its bounds and how it counts when a run is resumed.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
import textwrap
import tokenize
import traceback
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

# What many people write, and the setting's name here.
SHORT_NAMES = {"lr": "learning_rate"}

# How a setting counts when a checkpoint is resumed with another value. A setting that says nothing
# changes the losses, so that what is forgotten is refused instead of mixed in silence.
FIXED = "fixed"  # refused: it would be another model, or its tensors would not fit
CHANGES_LOSSES = "changes the losses"  # refused, unless resume_anyway says otherwise
FREE = "free"  # it changes rounding, paths or intervals only


def setting(
    default: Any,
    *,
    resume: str = CHANGES_LOSSES,
    at_least: float | None = None,
    below: float = 2**63,
    is_path: bool = False,
) -> Any:
    """A dataclass field with a default, its bounds (of numbers), and how it counts on a resume.

    A number whose default is not negative may not become negative, unless at_least says otherwise.
    A path is not empty, unless its default is, and a leading ~ is the home folder.
    """
    metadata = dict(resume=resume, at_least=at_least, below=below, is_path=is_path)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, dataclasses.Field]:
    """The fields that can be set, by name; a field with init=False is the program's own."""
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def resume_rules(cls: type) -> dict[str, str]:
    """How each setting counts on a resume. What a class inherits and does not declare is fixed."""
    rules = {}
    for name, field in settings_of(cls).items():
        default = CHANGES_LOSSES if name in cls.__annotations__ else FIXED
        rules[name] = field.metadata.get("resume", default)
    return rules


def out_of_bounds(config: Any) -> list[str]:
    """A sentence for each number outside its setting's bounds."""
    mistakes = []
    for name, field in settings_of(type(config)).items():
        value = getattr(config, name)
        if type(value) not in (int, float):
            continue
        low = field.metadata.get("at_least")
        if low is None:
            default: Any = field.default
            default_is_negative = type(default) in (int, float) and default < 0
            low = -math.inf if default_is_negative else 0
        high = field.metadata.get("below", 2**63)
        if not value >= low:
            mistakes.append(f"{name} is {value}: it must be at least {low}")
        elif not value < high:
            mistakes.append(f"{name} is {value}: it must be below {high}")
    return mistakes


# ---- From the command line to an object ----------------------------------------------------------


def configure(cls: type, argv: list[str]) -> Any:
    """An instance of the dataclass `cls` with the settings of argv (config files and --key=value).

    ValueError has a line for each unknown name, wrong type, file that fails, and sentence of
    `cls.mistakes()`.
    """
    types_of = get_type_hints(cls)
    for name in settings_of(cls):
        if not can_be_set(types_of[name]):
            raise ValueError(
                f"the setting {name} has the type {types_of[name]}; a setting can be "
                "int, float, bool, str, None, a Literal of these, or several of them with |"
            )
    fields = settings_of(cls)
    values: dict[str, Any] = {name: field.default for name, field in fields.items()}
    mistakes: list[str] = []

    files, flags = split_arguments(argv, values)
    for path in files:
        for name, value in run_config_file(path, values, mistakes).items():
            assign(values, types_of, name, value, f"{path}: {name} = {shorten(value)}", mistakes)
    for flag in flags:
        if flag.text is None:
            hint = nearest(flag.name.lstrip("-"), values)
            mistakes.append(f"{shorten_text(flag.typed)}: settings are written --key=value{hint}")
        else:
            value = parse(flag.text, types_of.get(flag.name, str))
            assign(values, types_of, flag.name, value, shorten_text(flag.typed), mistakes)
    for name, field in fields.items():
        if field.metadata.get("is_path") and type(values[name]) is str:
            values[name] = expand_path(name, values[name], field.default, mistakes)

    config = cls(**values)
    mistakes += config.mistakes()
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return config


class Flag(NamedTuple):
    """A setting of the command line."""

    typed: str  # as the person wrote it
    name: str
    text: str | None  # its value; None if there is none, or a dash is missing


def split_arguments(argv: list[str], names: Any) -> tuple[list[str], list[Flag]]:
    """The config files and the flags of a command line.

    As elsewhere, the value may stand behind a space, and hyphens are underscores: --max-steps 100.
    """
    files = []
    flags = []
    rest = list(argv)
    while rest:
        typed = rest.pop(0)
        if not typed.startswith("-"):
            files.append(typed)
            continue
        if not typed.startswith("--"):
            flags.append(Flag(typed, typed.partition("=")[0], None))
            continue
        name, equals, text = typed.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in names:
            name = SHORT_NAMES.get(name, name)
        value: str | None = None
        if equals:
            value = text
        elif rest and is_value(rest[0]):
            value = rest.pop(0)
            typed = f"{typed} {value}"
        flags.append(Flag(typed, name, value))
    return files, flags


def is_value(argument: str) -> bool:
    """Whether it can be the value of the flag before it: no other flag, and no config file."""
    return not argument.startswith("--") and not argument.endswith(".py")


def expand_path(name: str, path: str, default: Any, mistakes: list[str]) -> str:
    """The path with a leading ~ replaced by the home folder, as a shell does it for other words."""
    if not path and default:
        mistakes.append(f"{name} is empty (an unset variable?); the default is {default}")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        mistakes.append(f"{name} is {shorten(path)}: there is no such user; write ./~ for a folder")
    return expanded


def run_config_file(path: str, values: dict, mistakes: list[str]) -> dict:
    """What a config file assigns, run over the values so far; nothing if it fails."""
    if not Path(path).is_file():
        files = [str(file) for file in Path(path).parent.glob("*.py")]
        hint = nearest(path, files) or ". A config file is Python, a setting is --key=value"
        if path.partition("=")[0] in values:
            hint = f": did you mean --{path}?"
        mistakes.append(f"{path}: no such config file{hint}")
        return {}
    namespace = dict(values)
    try:
        source = Path(path).read_bytes()
        program = compile(source, path, "exec")
        idle = find_idle_line(source)
        if idle is not None:
            mistakes.append(
                f"{path}, line {idle}: sets nothing. A config file is Python: n_layer = 3"
            )
            return {}
        exec(program, namespace)
    except BaseException as error:  # a file can raise anything, but Ctrl-C is the person's
        if isinstance(error, KeyboardInterrupt):
            raise
        where = path
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                where = f"{path}, line {frame.lineno}"
        # The text of a SyntaxError names the line itself.
        reason = shorten_text(" ".join(str(error).split()), 300)
        mistakes.append(f"{where}: {type(error).__name__}: {reason}")
        return {}

    # Names with a leading underscore are the file's own, and so is what it imports and defines.
    own = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    assigned = {}
    for name, value in namespace.items():
        unchanged = name in values and values[name] is value
        if not name.startswith("_") and not isinstance(value, own) and not unchanged:
            assigned[name] = value
    return assigned


def find_idle_line(source: bytes) -> int | None:
    """The first line of a Python file that is right and does nothing; None if there is none.

    It is what YAML (`n_layer: 3`), JSON and `n_layer == 3` are to Python.
    """
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and statement.value is None:
            return statement.lineno
        if isinstance(statement, ast.Expr):
            value = statement.value
            is_comment = isinstance(value, ast.Constant) and isinstance(value.value, str)
            if not is_comment and not isinstance(value, ast.Call):
                return statement.lineno
    return None


def assign(
    values: dict, types_of: dict, name: str, value: Any, where: str, mistakes: list[str]
) -> None:
    """Set values[name], or add to the mistakes why not."""
    if name not in values:
        mistakes.append(f"{where}: there is no setting {name!r}" + nearest(name, values))
    elif not accepts(types_of[name], value):
        mistakes.append(f"{where}: {name} takes {describe(types_of[name])}, not {shorten(value)}")
    elif types_of[name] is float:
        values[name] = float(value)
    else:
        values[name] = value


# ---- Types ---------------------------------------------------------------------------------------


def can_be_set(annotation: Any) -> bool:
    """Whether the command line and config files know values of this type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(can_be_set(one) for one in get_args(annotation))
    return get_origin(annotation) is Literal or annotation in (int, float, bool, str, type(None))


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a setting of this type may have this value. int serves as float, bool does not."""
    if get_origin(annotation) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return any(accepts(one, value) for one in get_args(annotation))
    if annotation is float and type(value) is int:
        return abs(value) < 1e300
    return type(value) is annotation or (value is None and annotation is type(None))


def parse(text: str, annotation: Any) -> Any:
    """The text behind --key= as a value.

    Where the setting takes a str the text stays as it is; elsewhere it is a Python literal.
    """
    if text == "None" and accepts(annotation, None):
        return None
    if accepts(annotation, text):
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def describe(annotation: Any) -> str:
    """A type in words: 'an int', "'auto', True or False"."""
    if not get_args(annotation):
        words = {int: "an int", float: "a float", str: "a str", bool: "True or False"}
        return words.get(annotation, "None")
    choices = []
    for one in get_args(annotation):
        choices.append(repr(one) if get_origin(annotation) is Literal else describe(one))
    if len(choices) == 1:
        return choices[0]
    return " or ".join([", ".join(choices[:-1]), choices[-1]])


def shorten(value: Any) -> str:
    """A value as Python writes it, cut where it is too long for a line."""
    try:
        return shorten_text(repr(value))
    except (ValueError, RecursionError):  # an int of thousands of digits; a list in itself
        return f"an unreadable {type(value).__name__}"


def shorten_text(text: str, longest: int = 100) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}... ({len(text):,} characters)"


def nearest(name: str, names: Any) -> str:
    """A hint at the name that was probably meant; empty if none is near."""
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    return f": did you mean {close[0]}?" if close else ""


# ---- Help ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What the source of a dataclass says of a setting."""

    heading: str
    name: str
    default: str
    comment: str


def help_text(cls: type) -> str:
    """Every setting with its default and its comment, by group, as the source has them.

    A heading is a comment such as `# ---- The batch ----`. What a setting means stands behind it,
    or in the comment lines above it.
    """
    types_of = get_type_hints(cls)
    lines: dict[str, Line] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for line in read_source(base):
                lines.pop(line.name, None)  # declared anew in a subclass, it is described there
                lines[line.name] = line

    groups: dict[str, list[str]] = {}
    for line in lines.values():
        if line.name not in settings_of(cls):
            continue
        meaning = line.comment
        if get_origin(types_of[line.name]) is Literal:
            meaning += f" ({describe(types_of[line.name])})"
        shown = f"  --{line.name}={line.default}".ljust(44) + "  "
        # Within 100 columns, indented behind the names.
        text = textwrap.fill(meaning, 100, initial_indent=shown, subsequent_indent=" " * 46)
        groups.setdefault(line.heading, []).append(text)

    blocks = []
    for heading, shown_settings in groups.items():
        blocks.append("\n".join([heading, *shown_settings]))
    return "\n" + "\n\n".join(blocks)


def read_source(cls: type) -> list[Line]:
    """The settings in the source of one dataclass, without those of its bases."""
    source = inspect.getsource(cls)
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if not token.string.startswith("# type:"):
                comments[token.start[0]] = token.string.removeprefix("#").strip()

    settings = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign):
            settings[node.lineno] = node

    lines = []
    heading = cls.__name__
    above: list[str] = []  # the comment lines above the next setting
    for number in range(1, source.count("\n") + 1):
        comment = comments.get(number, "")
        title = re.fullmatch(r"-+ (.+?) -+", comment)
        if number in settings:
            node = settings[number]
            assert isinstance(node.target, ast.Name) and node.value is not None
            value = node.value
            if isinstance(value, ast.Call) and value.args:  # setting(default, ...)
                value = value.args[0]
            default = (ast.get_source_segment(source, value) or "").strip('"')
            comment = comments.get(node.end_lineno or number) or " ".join(above)
            lines.append(Line(heading, node.target.id, default, comment))
            above = []
        elif title:
            heading = title[1]
            above = []
        elif comment:
            above.append(comment)
        else:
            above = []
    return lines


if __name__ == "__main__":
    raise SystemExit("configurator.py is no command: README.md lists the commands")
