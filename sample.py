"""Prompt -> text.

python sample.py "def main("                # by the newest checkpoint under out/
python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
python sample.py --model out/quickstart -p "class Queue:" -p "import os" -m 200 --top_p 0.9
python sample.py --file prompts.txt --json     # a prompt a line; a JSON object for each sample
python sample.py -i                         # write with the model, line by line; see /help there
python sample.py --web                      # a page on this machine that shows token probabilities
"""

import os

# Before torch loads OpenMP: threads that wait for each other go to sleep soon, and do not spin
# against other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import functools
import json
import math
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import configurator
from model import GPT, GPTConfig, OpenedModel, open_model
from parts import page, runtime
from parts.auto import WEIGHTS, prepare_for_inference
from parts.console import OptionParser, command, path_option, print_note, printable
from parts.encoding import Replacements, check_encoding, decode_text, is_unicode, original_bytes
from parts.files import check_is_file
from parts.inference import SETTINGS, Record, Text, check_settings, complete
from parts.json_files import parse_json, read_json
from parts.pretrained import checkpoints
from parts.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer

HELLO = "Hello, I'm a language model,"
UNTRAINED = Path("untrained")

# ANSI codes: bold; blue and orange, which colour-blind readers can tell apart.
BOLD = "1"
LIKELY = "38;5;33"
UNLIKELY = "38;5;208"

# Samples in one batch. The others wait, so that any number of them fits into memory.
BATCH = 64
MOST_SAMPLES = 1_000_000  # of each prompt: their texts are in memory

COMMANDS = {
    "undo": "take back the last line and its answer",
    "retry": "another answer to the last line",
    "text": "show the text so far",
    "save": "write the text to a file: /save FILE",
    "reset": "forget the text so far",
    "help": "show this, and the values of the settings",
    "quit": "end the program; so does Ctrl-D",
}


# ---- Options, prompts, a model -------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OptionParser(prog="sample.py", description="Continue prompts with a GPT-2.")
    add = parser.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help='texts to continue; "" begins a document, - is the standard input',
    )
    add(
        "-p",
        "--prompt",
        action="append",
        default=[],
        help=f"another one (default: the run's sample_prompt, else {HELLO})",
    )
    add(
        "--file",
        type=path_option,
        help='more prompts: one a line, or the "prompt" of each JSON object, or an array of texts',
    )
    add("--encoding", metavar="NAME", help="of prompts that are not UTF-8, such as cp1252")
    add("--replace", action="store_true", help="take U+FFFD for what cannot be decoded of prompts")
    add("-i", "--interactive", action="store_true", help="write with the model, line by line")
    add(
        "-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)"
    )
    add(
        "--model",
        type=path_option,
        help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder "
        "(default: the newest under out/)",
    )
    for name, setting in SETTINGS.items():
        flags = [f"--{name}"]
        if name == "max_tokens":
            flags.insert(0, "-m")
        add(
            *flags,
            type=type(setting.default),
            help=f"{setting.about} (default: {describe_default(name)})",
        )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable; \\n: newline",
    )
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show text as it comes (default: if there is one sample, and no --json)",
    )
    add(
        "--json",
        action="store_true",
        help="a JSON object a line: prompt, completion, tokens, logprob, tokens_per_s",
    )
    add(
        "--logprobs",
        action="store_true",
        help="also each token's log-probability, and the most likely in its place",
    )
    add("--web", action="store_true", help="serve a page on 127.0.0.1 to sample from (needs Flask)")
    add(
        "--port",
        type=int,
        default=8124,
        help="of that page; 0 is any free one (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", *WEIGHTS],
        help="of matrix products; int8: weights of 8 bits, fastest on a CPU, other text "
        "(default: %(default)s)",
    )
    arguments = parser.parse_intermixed_args(argv)
    for name, setting in SETTINGS.items():
        if getattr(arguments, name) is None:
            default: Any = setting.default
            if arguments.web:
                default = page.FIRST_SETTINGS.get(name, default)
            setattr(arguments, name, default)
    if not all(map(is_unicode, arguments.stop)):
        parser.error("--stop: it is not UTF-8")
    if arguments.encoding == "":
        parser.error("--encoding: must not be empty")
    if not 1 <= arguments.samples <= MOST_SAMPLES:
        parser.error(f"samples must be 1 to {MOST_SAMPLES:,}, not {arguments.samples}")
    is_batch = arguments.samples > 1 or arguments.file or arguments.json or arguments.logprobs
    if [arguments.interactive, arguments.web, bool(is_batch)].count(True) > 1:
        parser.error(
            "-i and --web exclude each other, and --file, --samples, --json and --logprobs"
        )
    return arguments


def describe_default(name: str) -> str:
    """The value of a setting of sampling where the command line has none."""
    default = f"{SETTINGS[name].default}"
    if name in page.FIRST_SETTINGS:
        default += f"; with --web {page.FIRST_SETTINGS[name]}"
    return default


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of the command line, of the standard input, and of the file.

    Raises ValueError if a line of the file has no prompt, none has one, or one is in another
    encoding.
    """
    if arguments.encoding:
        check_encoding(arguments.encoding)
    replacements = Replacements(allowed=arguments.replace)

    def decode(content: bytes, name: str) -> str:
        text = decode_text(content, name, arguments.encoding, replacements)
        # As Python does when it reads a text.
        return text.replace("\r\n", "\n").replace("\r", "\n")

    prompts = []
    for prompt in arguments.prompts + arguments.prompt:
        if prompt == "-":
            # What replaces it in a notebook may have no bytes.
            stream = getattr(sys.stdin, "buffer", None)
            prompt = decode(stream.read(), "the standard input") if stream else sys.stdin.read()
        elif not is_unicode(prompt):
            # Python has kept the bytes that it could not decode.
            prompt = decode(original_bytes(prompt), "a prompt")
        prompts.append(prompt)
    if arguments.file:
        check_is_file(Path(arguments.file))
        prompts += split_prompts(
            decode(Path(arguments.file).read_bytes(), arguments.file), arguments.file
        )
    if replacements.total:
        print_note(replacements.describe())
    if END_OF_TEXT in prompts:
        print(
            f'the prompt {END_OF_TEXT} is read as letters; an empty one, "", begins a document',
            file=sys.stderr,
        )
    return prompts


def split_prompts(text: str, file: str) -> list[str]:
    """The prompts of a file with this text. What it is, the text says:

    a JSON array     its texts, or the "prompt" of each of its objects
    JSON objects     the "prompt" of each, one object a line
    any other text   each line

    A file named .jsonl has objects. Raises ValueError for a row without a prompt, and if there is
    none.
    """
    prompts = []
    array = parse_array(text)
    if array is not None:
        for number, row in enumerate(array, start=1):
            prompts.append(take_prompt(row, f"{file}, row {number}"))
    else:
        lines = text.split("\n")
        first = next(filter(str.strip, lines), "")
        has_objects = file.endswith(".jsonl") or has_prompt(first)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if not has_objects:
                prompts.append(line)
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            prompts.append(take_prompt(row, f"{file}, line {number}"))
    if not prompts:
        raise ValueError(f"{file}: no prompts in it; write one a line")
    return prompts


def parse_array(text: str) -> list | None:
    """The rows of a JSON array of texts, or of objects with a prompt. None for any other text."""
    try:
        rows = parse_json(text, list)
    except ValueError:
        return None
    first = rows[0] if rows else None
    if isinstance(first, str) or (isinstance(first, dict) and "prompt" in first):
        return rows
    return None


def has_prompt(line: str) -> bool:
    """Whether a line is a JSON object with a prompt."""
    with suppress(ValueError):
        return "prompt" in parse_json(line)
    return False


def take_prompt(row: Any, where: str) -> str:
    """The prompt in a row of JSON. Raises ValueError if it has none."""
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: not a JSON object with a text as "prompt"')
    return prompt


def load_model(name: str | None) -> OpenedModel:
    """The model of this name; by default the newest checkpoint, else an untrained GPT-2."""
    if name is not None:
        return open_model(name)
    newest = []
    for run in Path("out").glob("*"):
        newest += checkpoints(run)[-1:]
    if newest:
        return open_model(max(newest, key=lambda folder: folder.stat().st_mtime))
    return OpenedModel(GPT(GPTConfig()), get_tokenizer("gpt2"), UNTRAINED)


def describe(opened: OpenedModel) -> str:
    if opened.source == UNTRAINED:
        return "UNTRAINED GPT-2: no checkpoint under out/; try --model gpt2"
    return f"{opened.source}, {opened.model.num_params():,} parameters"


def choose_prompt(source: Path) -> str:
    """The prompt that the run of this checkpoint sampled from; HELLO for any other model."""
    # A model that was not trained here has no such file. A damaged one does not matter.
    with suppress(OSError, ValueError, KeyError, TypeError):
        prompt = read_json(source / "settings.json")["settings"]["sample_prompt"]
        if isinstance(prompt, str):
            return prompt
    return HELLO


# ---- Text on a terminal --------------------------------------------------------------------------


def show(text: str, style: str = "") -> None:
    """Print the text without a newline; on a terminal, in the ANSI style."""
    text = printable(text)
    if style and sys.stdout.isatty():
        text = f"\033[{style}m{text}\033[0m"
    print(text, end="", flush=True)


def write(
    model: GPT, texts: list[Text], settings: dict, stream: bool, as_json: bool, logprobs: bool
) -> None:
    """Complete the texts and print them. Each depends on its own prompt and seed, not on its
    neighbours.
    """
    stream = stream and len(texts) == 1 and not as_json  # several would mix
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        start = time.perf_counter()
        if stream:
            show(batch[0].prompt, BOLD)
        for shown in complete(model, batch, settings, logprobs or as_json):
            if stream:
                style = ""
                if logprobs and batch[0].record:
                    style = choose_style(batch[0].record[-1].token.logprob)
                show(shown[0], style)
        seconds = time.perf_counter() - start
        for number, text in enumerate(batch, start=first):
            if as_json:
                print(json.dumps(as_object(text, seconds, logprobs)), flush=True)
                continue
            if number > 0:
                print("-" * 40)
            if not stream:
                show(text.prompt, BOLD)
                show(text.text)
            print()
            for record in text.record:
                show_record(record)


def check_lengths(texts: list[Text], block_size: int) -> None:
    """ValueError, before anything is written, for a prompt of more tokens than the model takes."""
    for number, text in enumerate(texts, start=1):
        if len(text.ids) > block_size:
            raise ValueError(
                f"prompt {number} of {len(texts)}, {text.prompt[:30]!r}...: {len(text.ids):,} "
                f"tokens, and this model takes {block_size:,} at most; shorten it"
            )


def as_object(text: Text, seconds: float, logprobs: bool) -> dict:
    """The JSON object of a sample. seconds: how long its batch took."""
    tokens = [(record.token.text, record.token.logprob) for record in text.record]
    row = dict(
        prompt=text.prompt,
        completion=text.text,
        tokens=len(tokens),
        logprob=sum(logprob for _, logprob in tokens),
        tokens_per_s=len(tokens) / seconds,
    )
    if logprobs:
        row["logprobs"] = tokens
    return row


def show_record(record: Record) -> None:
    """Print a token's log-probability, its text, and the most likely tokens in its place, as many
    as fit into the line.
    """
    token = record.token
    beginning = f"{token.logprob:7.3f}  "
    name = f"{token.text!r:12}"
    alternatives = " of"
    width = shutil.get_terminal_size().columns - len(beginning) - len(name)
    for other in record.likely:
        longer = f"{alternatives} {other.text!r} {other.logprob:.2f}"
        if len(longer) > width:
            break
        alternatives = f"{longer} "
    show(beginning)
    show(name, choose_style(token.logprob))
    show(alternatives.rstrip() + "\n")


def choose_style(logprob: float) -> str:
    """How a token of this log-probability looks on a terminal."""
    if logprob > math.log(0.5):
        return LIKELY
    if logprob < math.log(0.05):
        return UNLIKELY
    return BOLD


# ---- Line by line --------------------------------------------------------------------------------


def write_together(
    model: GPT, tokenizer: Tokenizer, story: str, stops: list[str], settings: dict
) -> None:
    """The person's lines and the model's answers continue the story."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and a history in input())
    print("/help lists the commands; Ctrl-D ends", file=sys.stderr)
    show(story)
    turns: list[Turn] = []
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> ")
            if not is_unicode(line):
                print_note("this line is not UTF-8; type it again")
                continue
            name, _, value = line.removeprefix("/").strip().partition(" ")
            if not line.startswith("/"):
                turns.append(Turn(story, line))
                move_to_text(line)
            elif name == "quit":
                break
            elif name == "retry" and turns:
                story, line = turns[-1]
                show(line, BOLD)
            elif name in ("undo", "retry") and not turns:
                print_note(f"{line}: there is no answer yet")
                continue
            elif name == "undo":
                story = turns.pop().before
                show(story)
                continue
            else:
                if name == "reset":
                    story = ""
                    turns.clear()
                settings = obey(name, value, line, story, settings)
                continue
            reply = Text(tokenizer, story + line, settings["seed"], stops)
            with suppress(KeyboardInterrupt):
                for [shown] in complete(model, [reply], settings, cut=True):
                    show(shown)
            print()
            story = f"{reply.prompt}{reply.text}\n"
            settings = settings | dict(seed=settings["seed"] + 1)
    print()


class Turn(NamedTuple):
    """A line of the person's, which the model has answered."""

    before: str  # the text before it
    line: str


def move_to_text(line: str) -> None:
    """On a terminal, show the line in bold in place of what was typed, without its prompt and its
    end: the answer continues it there.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    columns = shutil.get_terminal_size().columns
    rows = math.ceil((len("> ") + len(line)) / columns)
    print(f"\033[{rows}A\r\033[J", end="")
    show(line, BOLD)


def obey(name: str, value: str, line: str, story: str, settings: dict) -> dict:
    """Carry out a command that changes no text; return the settings, which it may change."""
    if name == "text":
        show(story)
    elif name == "save":
        save_story(value, line, story)
    elif name == "help":
        print_help(settings)
    elif name in SETTINGS and value:
        return change_setting(settings, name, value, line)
    elif name in SETTINGS:
        print_note(f"{name} is {settings[name]}")
    elif name != "reset":
        known = [*COMMANDS, *SETTINGS]
        similar = [other for other in known if name and other.startswith(name)]
        hint = configurator.nearest((similar or [name])[0], known)
        print_note(f"{line}: no such command{hint or '; /help lists them'}")
    return settings


def save_story(value: str, line: str, story: str) -> None:
    try:
        path = Path(path_option(value))
        path.write_text(story, encoding="utf-8")
        print_note(f"{path}: {len(story):,} characters")
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        print_note(f"{line}: {error}")


def print_help(settings: dict) -> None:
    print("  A line is appended to the text, and the model continues from there.", file=sys.stderr)
    for name, about in COMMANDS.items():
        print(f"  /{name:19}{about}", file=sys.stderr)
    for name, setting in SETTINGS.items():
        print(f"  /{name:19}{setting.about} (now {settings[name]})", file=sys.stderr)
    print("  Ctrl-C ends an answer; an empty line asks for more", file=sys.stderr)


def change_setting(settings: dict, name: str, value: str, line: str) -> dict:
    """The settings with another value; if it is wrong, say so and return them as they are."""
    try:
        changed = check_settings(settings | {name: configurator.parse(value, None)})
    except ValueError as error:
        print_note(f"{line}: {error}")
        return settings
    print_note(f"{name} is {changed[name]}")
    return changed


# ---- A page --------------------------------------------------------------------------------------


def serve_page(shelf: page.Shelf, tokenizer: Tokenizer, form: dict, port: int) -> None:
    """Serve the page until Ctrl-C. form: what its fields begin with, see main."""
    form = form | dict(
        title=shelf.title,
        checkpoint=shelf.name,
        end_of_text=tokenizer.end_of_text,
        limits={name: [setting.low, setting.high] for name, setting in SETTINGS.items()},
        pinned=form["settings"]["seed"] != SETTINGS["seed"].default,
    )
    answers: dict[str, page.Answer] = {}
    for kind, answer in dict(answer=page.answer, look=page.look_at, read=page.read_tokens).items():
        answers[kind] = functools.partial(answer, shelf, tokenizer)
    page.serve(answers, shelf.progress, form, port)


# ---- The command ---------------------------------------------------------------------------------


@command("sample.py", "fewer --samples or prompts at once, a lower -m, or --device cpu")
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    settings = check_settings(vars(arguments))
    prompts = read_prompts(arguments)
    machine = runtime.start(arguments.device)
    opened = load_model(arguments.model)
    tokenizer = opened.tokenizer
    description = describe(opened)
    default_prompt = choose_prompt(opened.source)
    rows = min(BATCH, max(1, len(prompts)) * arguments.samples)
    prepared = prepare_for_inference(opened.model, machine, arguments.dtype, rows)
    print_note(f"model: {description}\n{machine.note}\n{prepared.note}")
    if arguments.interactive:
        write_together(prepared.model, tokenizer, "".join(prompts), arguments.stop, settings)
    elif arguments.web:
        shelf = page.Shelf(opened.source, prepared.model, prepared.packing, open_model)
        # Only the shelf keeps the model, so that it is gone when another takes its place.
        del opened, prepared
        form = dict(
            about=description,
            settings=settings,
            prompts=[*prompts, default_prompt],
            stop=arguments.stop,
        )
        serve_page(shelf, tokenizer, form, arguments.port)
    else:
        prompts = prompts or [default_prompt]
        texts = []
        for prompt in prompts:
            for i in range(arguments.samples):
                texts.append(Text(tokenizer, prompt, arguments.seed + i, arguments.stop))
        check_lengths(texts[:: arguments.samples], prepared.model.config.block_size)
        write(
            prepared.model,
            texts,
            settings,
            stream=arguments.stream,
            as_json=arguments.json,
            logprobs=arguments.logprobs,
        )


if __name__ == "__main__":
    main()
