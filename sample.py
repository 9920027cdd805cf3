"""Prompt -> text.

python sample.py "def main("                             the newest checkpoint under out/
python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
python sample.py --model out/quickstart -p "class Queue:" -p "import os" -m 200 --top_p 0.9
python sample.py --file prompts.jsonl --json             one prompt a line; one JSON object for each sample
python sample.py -i                                      write with the model, line by line; /help lists commands
python sample.py --web                                   a page on this machine that shows token probabilities
"""

import argparse
import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

import configurator
from model import GPT, GPTConfig
from parts import page, runtime
from parts.auto import prepare_for_inference
from parts.console import command, printable
from parts.inference import SETTINGS, Text, checked, complete
from parts.page import Shelf, answer
from parts.pretrained import checkpoints, locate, resolve
from parts.tokenizer import Tokenizer, get_tokenizer, of_folder

HELLO = "Hello, I'm a language model,"
BOLD, LIKELY, UNLIKELY = (
    "1",
    "38;5;33",
    "38;5;208",
)  # ANSI codes: bold; blue and orange, safe for colour-blind readers
BATCH = 64  # samples in one batch; the others wait, so that any number of them fits into memory
HELP = """  A line is appended to the text, and the model continues from there.
  /reset              forget the text so far
  Ctrl-C ends an answer, Ctrl-D the program
""" + "\n".join(f"  /{name:19}{about}" for name, (_, _, _, about) in SETTINGS.items())


# ---- Settings, prompts, a model ------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description="Continue prompts with a GPT-2.")
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
        help=f"more (default: the run's sample_prompt, else {HELLO})",
    )
    add("--file", help='more prompts: one a line, or the "prompt" of each object in a .jsonl file')
    add("-i", "--interactive", action="store_true", help="write with the model, line by line")
    add(
        "-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)"
    )
    add(
        "--model",
        help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: the newest under out/)",
    )
    for name, (default, _, _, about) in SETTINGS.items():
        flags = ["-m"] * (name == "max_tokens") + [f"--{name}"]
        add(*flags, type=type(default), default=default, help=f"{about} (default: %(default)s)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable; \\n: newline",
    )
    stream = "show text as it comes (default: if there is one sample, and no --json)"
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help=stream)
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
        choices=["auto", *runtime.DTYPES],
        help="of matrix products (default: %(default)s)",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.samples < 1:
        parser.error(f"samples must be 1 or more, not {arguments.samples}")
    for_programs = arguments.samples > 1 or arguments.file or arguments.json or arguments.logprobs
    if arguments.interactive + arguments.web + bool(for_programs) > 1:
        parser.error(
            "-i and --web exclude each other, and --file, --samples, --json and --logprobs"
        )
    return arguments


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """Prompts from the command line, then those of a file. ValueError if a line of it has no
    prompt.
    """
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in given]
    lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").split("\n") if file else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                prompts.append(json.loads(line)["prompt"] + "" if file.endswith(".jsonl") else line)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{file}, line {number}: not a JSON object with a text as "prompt"'
            ) from None
    if file and len(prompts) == len(given):
        raise ValueError(f"{file}: no prompts in it; write one a line")
    return prompts


def load_model(name: str | None) -> tuple[GPT, Tokenizer, Path, str, str]:
    """A model (default: the newest checkpoint, else an untrained GPT-2), its tokenizer, name,
    description, prompt.
    """
    newest = [found[-1] for folder in Path("out").glob("*") if (found := checkpoints(folder))]
    source = (
        resolve(name)
        if name
        else max(newest, key=lambda folder: folder.stat().st_mtime, default=None)
    )
    if source is None:
        model, about = (
            GPT(GPTConfig()),
            "UNTRAINED GPT-2: no checkpoint under out/; try --model gpt2",
        )
        return model, get_tokenizer(model.config.vocab_size), Path("untrained"), about, HELLO
    folder = locate(source)
    model, prompt = GPT.from_pretrained(folder), HELLO
    tokenizer = of_folder(folder, model.config.vocab_size)
    with suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # a model that was not trained here has no such file
        prompt = json.loads((Path(source) / "settings.json").read_text())["settings"][
            "sample_prompt"
        ]
    return model, tokenizer, Path(source), f"{source}, {model.num_params():,} parameters", prompt


# ---- Texts, and three ways to ask for them: as a command, line by line, with a page --------------


def show(text: str, style: str = "") -> None:
    """Print the text without a newline; on a terminal, in the ANSI style."""
    text = printable(text)
    print(
        f"\033[{style}m{text}\033[0m" if style and sys.stdout.isatty() else text, end="", flush=True
    )


def write(
    model: GPT, texts: list[Text], settings: dict, stream: bool, as_json: bool, logprobs: bool
) -> None:
    """Complete the texts and print them. Each depends on its own prompt and seed, not on its
    neighbours.
    """
    stream = stream and len(texts) == 1 and not as_json  # several would mix
    for first in range(0, len(texts), BATCH):
        batch, start = texts[first : first + BATCH], time.perf_counter()
        if stream:
            show(batch[0].prompt, BOLD)
        for new in complete(model, batch, settings, logprobs or as_json):
            if stream:
                show(new[0])
        seconds = time.perf_counter() - start
        for number, text in enumerate(batch, first):
            if as_json:
                total, n = sum(value for _, value, *_ in text.record), len(text.record)
                row = dict(
                    prompt=text.prompt,
                    completion=text.text,
                    tokens=n,
                    logprob=total,
                    tokens_per_s=n / seconds,
                )
                each = (
                    dict(logprobs=[(token, value) for token, value, *_ in text.record])
                    if logprobs
                    else {}
                )
                print(json.dumps(row | each), flush=True)
                continue
            if number:
                print("-" * 40)
            if not stream:
                show(text.prompt, BOLD)
                show(text.text)
            print()
            for token, logprob, _, likely in text.record:
                style = (
                    LIKELY
                    if logprob > math.log(0.5)
                    else UNLIKELY
                    if logprob < math.log(0.05)
                    else BOLD
                )
                show(f"{logprob:7.3f}  ")
                show(f"{token!r:12}", style)
                show(
                    " of "
                    + "  ".join(f"{other!r} {value:.2f}" for other, value, _ in likely)
                    + "\n"
                )


def write_together(
    model: GPT, tokenizer: Tokenizer, story: str, stops: list[str], settings: dict
) -> None:
    """The person's lines and the model's answers continue the story."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and a history in input())
    print("/help lists the commands; Ctrl-D ends", file=sys.stderr)
    show(story)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("> ")
            name, _, value = line.removeprefix("/").strip().partition(" ")
            if not line.startswith("/"):
                reply = Text(tokenizer, story + line, settings["seed"], stops)
                with suppress(KeyboardInterrupt):
                    for [new] in complete(model, [reply], settings, cut=True):
                        show(new)
                print()
                story = f"{reply.prompt}{reply.text}\n"
                settings = settings | dict(seed=settings["seed"] + 1)
            elif name == "reset":
                story = ""
            elif name in SETTINGS:
                try:
                    settings = checked(settings | {name: configurator.parse(value, None)})
                except ValueError as error:
                    print(f"{line}: {error}", file=sys.stderr)
            else:
                print(
                    HELP if name == "help" else f"{line}: no such command; /help lists them",
                    file=sys.stderr,
                )
    print()


@command("sample.py")
def main(argv: list[str] | None = None) -> None:
    given = parse_arguments(argv)
    settings, prompts = checked(vars(given)), read_prompts(given.prompts + given.prompt, given.file)
    machine = runtime.start(given.device)
    model, tokenizer, source, description, default_prompt = load_model(given.model)
    try:
        rows = min(BATCH, max(1, len(prompts)) * given.samples)
        model, machine, note = prepare_for_inference(model, machine, given.dtype, rows)
        print(f"model: {description}\n{machine.note}\n{note}", file=sys.stderr)
        if given.interactive:
            write_together(model, tokenizer, "".join(prompts), given.stop, settings)
            return
        if given.web:
            shelf = Shelf(source, model, machine, GPT.from_pretrained)
            del model  # the shelf drops it when another checkpoint takes its place
            form = dict(
                title=shelf.title, about=description, checkpoint=shelf.name, settings=settings
            )
            form |= dict(prompts=[*prompts, default_prompt], stop=given.stop)
            form |= dict(limits={name: limits for name, (_, *limits, _) in SETTINGS.items()})
            form |= dict(
                pinned=given.seed != SETTINGS["seed"][0], end_of_text=tokenizer.end_of_text
            )
            page.serve(
                lambda asked: answer(shelf, tokenizer, asked), shelf.progress, form, given.port
            )
            return
        prompts = prompts or [default_prompt]
        wanted = [(prompt, given.seed + i) for prompt in prompts for i in range(given.samples)]
        texts = [Text(tokenizer, prompt, seed, given.stop) for prompt, seed in wanted]
        write(model, texts, settings, given.stream, given.json, given.logprobs)
    except torch.OutOfMemoryError:
        raise ValueError(
            "out of memory; fewer --samples or prompts at once, or --device cpu"
        ) from None


if __name__ == "__main__":
    main()
