"""Prompt -> text.

    python sample.py "def "                                  the newest checkpoint under out/
    python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
    python sample.py --model out/quickstart -p "class " -p "import " -m 200 --temperature 0.8 --stop "\\n\\n"
    python sample.py --file prompts.jsonl --json             one prompt a line; one JSON object for each sample
    git log -3 | python sample.py -                          the standard input is the prompt
    python sample.py -i                                      write with the model, line by line; /help lists commands
    python sample.py --web                                   a page on this machine that shows token probabilities

Where there is no checkpoint, an untrained GPT-2 is used, so that the program can be tried; its text is noise.
"""

import argparse
import codecs
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

import configurator
import data
import generate
import runtime
import web
from model import GPT, GPTConfig
from pretrained import checkpoints, resolve

HELLO = "Hello, I'm a language model,"
BOLD, LIKELY, UNLIKELY = "1", "38;5;33", "38;5;208"  # ANSI codes: bold; blue and orange, safe for colour-blind readers
BATCH = 64  # samples in one batch; the others wait, so that any number of them fits into memory
# Name: default, smallest and largest value, meaning.
SETTINGS = {
    "max_tokens": (100, 1, 2**62, "new tokens for each sample"),
    "temperature": (1.0, 0, 2**62, "0 always takes the most likely token"),
    "top_k": (50, 0, 2**62, "draw from the k most likely tokens; 0 is all"),
    "top_p": (1.0, 0, 1, "draw from the fewest tokens that together have this probability; 1 is all"),
    "min_p": (0.0, 0, 1, "draw from the tokens with this share of the top token's probability; 0 is all"),
    "repetition_penalty": (1.0, 0.01, 100, "above 1: tokens that are in the text become less likely"),
    "seed": (1337, 0, 2**62, "sample number i draws from seed + i"),
}


# ----------------------------------------------------------------------------------------------------------------------
# What is asked for: settings, prompts, a model


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description="Continue prompts with a GPT-2.")
    add = parser.add_argument
    about = 'text to continue; several are allowed; "" begins a document, - is the standard input '
    add("prompts", nargs="*", metavar="PROMPT", help=f"{about} (default: the run's sample_prompt, else {HELLO})")
    add("-p", "--prompt", action="append", default=[], help="the same")
    add("--file", help='more prompts: one a line, or the "prompt" of each object in a .jsonl file')
    add("-i", "--interactive", action="store_true", help="write with the model, line by line")
    add("-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)")
    add("--model", help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: the newest under out/)")
    for name, (default, _, _, about) in SETTINGS.items():
        flags = ["-m"] * (name == "max_tokens") + [f"--{name}"]
        add(*flags, type=type(default), default=default, help=f"{about} (default: %(default)s)")
    about = "end before this text, repeatable; \\n is a newline"
    add("--stop", action="append", default=[], metavar="TEXT", help=about)
    about = "show text as it comes (default: on a terminal, if there is one sample)"
    add("--stream", action=argparse.BooleanOptionalAction, help=about)
    about = "a JSON object a line: prompt, completion, tokens (with a stop text), their logprob, tokens_per_s"
    add("--json", action="store_true", help=about)
    add("--logprobs", action="store_true", help="also each token's log-probability, and the most likely in its place")
    add("--web", action="store_true", help="serve a page on 127.0.0.1 to sample from (needs Flask)")
    add("--port", type=int, default=8124, help="of that page; 0 is any free one (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="of matrix products (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.samples < 1:
        parser.error(f"samples is {arguments.samples}; it must be at least 1")
    for_programs = arguments.samples > 1 or arguments.file or arguments.json or arguments.logprobs
    if arguments.interactive + arguments.web + bool(for_programs) > 1:
        parser.error("-i and --web exclude each other, and --file, --samples, --json and --logprobs")
    try:
        arguments.stop = [stop.replace("\\n", "\n") for stop in arguments.stop if stop]
        arguments.settings = checked({name: getattr(arguments, name) for name in SETTINGS})
    except ValueError as error:
        parser.error(str(error))
    return arguments


def checked(settings: dict) -> dict:
    """The settings as they are. ValueError if one is out of range."""
    for name, (_, low, high, _) in SETTINGS.items():
        if not low <= settings[name] <= high:
            raise ValueError(f"{name} is {settings[name]}; it must be at least {low} and at most {high}")
    return settings


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """Prompts from the command line, then those of a file. ValueError if a line of it has no prompt."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in given]
    if not file:
        return prompts
    lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    if not any(map(str.strip, lines)):
        raise ValueError(f"{file}: no prompts in it; write one a line")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() and file.endswith(".jsonl"):
                record = json.loads(line)
                prompts.append(record if isinstance(record, str) else record["prompt"] + "")
            elif line.strip():
                prompts.append(line)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f'{file}, line {number}: not a JSON object with a text as "prompt" ({reason})') from None
    return prompts


def load_model(name: str | None) -> tuple[GPT, str, str]:
    """The named model, else the newest checkpoint under out/, else an untrained one; its description; a prompt for it.

    The prompt is the run's sample_prompt, from the settings.json of its checkpoint, or else HELLO.
    """
    newest = [runs[-1] for run in Path("out").glob("*") if (runs := checkpoints(run))]
    source = name or max(newest, key=lambda folder: folder.stat().st_mtime, default=None)
    if source is None:
        where = Path("out").resolve()
        return GPT(GPTConfig()), f"UNTRAINED GPT-2 124M: no checkpoint under {where}; try --model gpt2", HELLO
    source = resolve(source)
    model = GPT.from_pretrained(source)
    try:
        prompt = json.loads((Path(source) / "settings.json").read_text())["settings"]["sample_prompt"]
    except (OSError, ValueError, KeyError, TypeError):  # a model that was not trained here
        prompt = HELLO
    return model, f"{source}, {model.num_params():,} parameters", prompt


# ----------------------------------------------------------------------------------------------------------------------
# Completions


class Completion:
    """A text that grows token by token. What it shows has no incomplete characters and no part of a stop text."""

    def __init__(self, tokenizer: data.Tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids: list[int] = []
        # For each token, if wanted: id, log-probability, and the five most likely tokens in its place with theirs.
        self.record: list[tuple[int, float, list[tuple[int, float]]]] = []
        self.text, self.held, self.done = "", "", False  # held: it may become a stop text

    def add(self, token: int, logprobs: torch.Tensor | None = None) -> str:
        """Returns the text that this token makes ready to show; logprobs (V) of its place go into the record."""
        self.ids.append(token)
        if logprobs is not None:
            values, ids = logprobs.topk(min(5, len(logprobs)))
            self.record.append((token, logprobs[token].item(), list(zip(ids.tolist(), values.tolist()))))
        if token == self.tokenizer.end_of_text:
            return self.finish()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [at for at in map(self.held.find, self.stops) if at >= 0]
        if found:
            self.held, self.done = self.held[: min(found)], True
            return self.release(len(self.held))
        kept = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self.release(len(self.held) - kept)

    def finish(self) -> str:
        """No token follows: the rest of the held text is shown."""
        if not self.done:
            self.held += self.decoder.decode(b"", final=True)
        self.done = True
        return self.release(len(self.held))

    def release(self, n: int) -> str:
        released, self.held = self.held[:n], self.held[n:]
        self.text += released
        return released


def complete(
    model: GPT, prompts: list[list[int]], seeds, completions: list[Completion], settings: dict, logprobs: bool = False
) -> Iterator[list[str]]:
    """Continue all prompts as one batch, into the completions; yield what each can show after each token."""
    end_of_text = completions[0].tokenizer.end_of_text
    sampling = {name: value for name, value in settings.items() if name not in ("max_tokens", "seed")}
    for step in generate.stream(model, prompts, settings["max_tokens"], seeds, end_of_text, **sampling):
        rows = step.logits.log_softmax(dim=-1) if logprobs else [None] * len(prompts)
        yield [
            "" if completion.done or token is None else completion.add(token, row)
            for completion, token, row in zip(completions, step.tokens, rows)
        ]
        if all(completion.done for completion in completions):
            return
    yield [completion.finish() for completion in completions]


def newest_tokens(ids: list[int], model: GPT, max_tokens: int) -> list[int]:
    """The end of a text, with room for max_tokens but at least half a window: generation past the window is slow."""
    block_size = model.config.block_size
    return ids[-max(block_size - max_tokens, block_size // 2, 1) :]


def show(text: str) -> None:
    print(data.printable(text), end="", flush=True)


def styled(text: str, style: str) -> str:
    """The text in an ANSI style on a terminal, and plain elsewhere."""
    return f"\033[{style}m{data.printable(text)}\033[0m" if sys.stdout.isatty() else data.printable(text)


def write_batch(
    model: GPT, tokenizer: data.Tokenizer, wanted: list[tuple[str, int]], stops, settings, stream, as_json, logprobs
) -> None:
    """Print a sample for each (prompt, seed). A sample depends on its own prompt and seed, not on its neighbours."""
    prompts, seeds = zip(*wanted)
    ids = [tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text] for prompt in prompts]
    completions = [Completion(tokenizer, stops) for _ in prompts]
    if stream:
        print(styled(prompts[0], BOLD), end="", flush=True)
    start = time.perf_counter()
    for new in complete(model, ids, seeds, completions, settings, logprobs or as_json):
        if stream:
            show(new[0])
    seconds = time.perf_counter() - start
    for number, (prompt, completion) in enumerate(zip(prompts, completions)):
        if as_json:
            print_json(prompt, completion, seconds, logprobs)
            continue
        if number:
            print("-" * 40)
        print("" if stream else styled(prompt, BOLD) + data.printable(completion.text))
        for token, logprob, likeliest in completion.record:
            instead = "  ".join(f"{tokenizer.decode([i])!r} {value:.2f}" for i, value in likeliest)
            style = LIKELY if logprob > math.log(0.5) else UNLIKELY if logprob < math.log(0.05) else BOLD
            print(f"{logprob:8.3f}  {styled(f'{tokenizer.decode([token])!r:16}', style)}  of  {instead}")


def print_json(prompt: str, completion: Completion, seconds: float, logprobs: bool) -> None:
    n, total = len(completion.ids), sum(value for _, value, _ in completion.record)
    record = dict(prompt=prompt, completion=completion.text, tokens=n, logprob=total, tokens_per_s=n / seconds)
    if logprobs:
        record["logprobs"] = [(completion.tokenizer.decode([token]), value) for token, value, _ in completion.record]
    print(json.dumps(record), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The three ways to ask: with a page, line by line, and as a command


def answer(model: GPT, tokenizer: data.Tokenizer, settings: dict) -> Iterator[dict]:
    """The events of web.py: after each token, the text that can be shown, and the token with its probability."""
    settings = checked(dict(settings))
    ids = tokenizer.encode(settings.pop("prompt")).tolist() or [tokenizer.end_of_text]
    ids = newest_tokens(ids, model, settings["max_tokens"])
    stop = settings.pop("stop").replace("\\n", "\n")
    completion, sent = Completion(tokenizer, [stop] if stop else []), 0
    for [text] in complete(model, [ids], [settings["seed"]], [completion], settings, logprobs=True):
        tokens = []
        for token, logprob, likeliest in completion.record[sent:]:
            likely = [[tokenizer.decode([other]), math.exp(value)] for other, value in likeliest]
            tokens.append(dict(token=tokenizer.decode([token]), p=math.exp(logprob), likely=likely))
        sent = len(completion.record)
        yield dict(text=text, tokens=tokens)


def write_together(model: GPT, tokenizer: data.Tokenizer, opening: str, stops: list[str], settings: dict) -> None:
    """The person's lines and the model's answers make one text that starts with the opening."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and a history in input())
    print("/help lists the commands; Ctrl-D ends", file=sys.stderr)
    ids = tokenizer.encode(opening).tolist()
    show(opening)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            ids, settings = command(line, ids, settings)
            continue
        ids += tokenizer.encode(line).tolist() or ([] if ids else [tokenizer.end_of_text])
        reply = Completion(tokenizer, stops)
        context = newest_tokens(ids, model, settings["max_tokens"])
        with suppress(KeyboardInterrupt):
            for new in complete(model, [context], [settings["seed"]], [reply], settings):
                show(new[0])
        print()
        ids += tokenizer.encode(reply.text + "\n").tolist()
        settings = settings | dict(seed=settings["seed"] + 1)


def command(line: str, ids: list[int], settings: dict) -> tuple[list[int], dict]:
    """Obey a line that begins with /: the text's ids and the settings after it. A mistake changes nothing."""
    name, _, value = line[1:].strip().partition(" ")
    name = "max_tokens" if name == "max" else name
    if name == "reset":
        return [], settings
    if name == "help":
        rows = [f"  /{setting:19}{about}" for setting, (_, _, _, about) in SETTINGS.items()]
        rows += ["  /reset              forget the text so far", "  Ctrl-C ends an answer, Ctrl-D the program"]
        print(
            "\n".join(["  A line is appended to the text, and the model continues from there.", *rows]), file=sys.stderr
        )
    elif name not in SETTINGS:
        print(f"/{name}: no such command; /help lists them", file=sys.stderr)
    else:
        try:
            return ids, checked(settings | {name: type(SETTINGS[name][0])(value)})
        except ValueError as error:
            print(f"/{name} {value}: {error}", file=sys.stderr)
    return ids, settings


def sample(arguments: argparse.Namespace) -> None:
    settings, prompts = arguments.settings, read_prompts(arguments.prompts + arguments.prompt, arguments.file)
    machine = runtime.start(arguments.device)
    model, description, default_prompt = load_model(arguments.model)
    tokenizer = data.get_tokenizer(model.config.vocab_size)
    rows = 1 if arguments.interactive or arguments.web else min(BATCH, max(1, len(prompts)) * arguments.samples)
    model, machine, note = generate.ready(model, machine, arguments.dtype, rows)
    print(f"model: {description}; {machine.note}; {note}", file=sys.stderr)
    if arguments.interactive:
        write_together(model, tokenizer, "".join(prompts), arguments.stop, settings)
        return
    prompts = prompts or [default_prompt]
    if arguments.web:
        form = settings | dict(prompt=prompts[0], stop="".join(arguments.stop[:1]))
        web.serve(lambda asked: answer(model, tokenizer, asked), description, form, arguments.port)
        return
    longest = max(prompts, key=lambda prompt: len(tokenizer.encode(prompt)))
    if (n := len(tokenizer.encode(longest))) > (size := model.config.block_size):
        raise ValueError(f"the prompt {longest[:30]!r}... has {n} tokens, the model reads {size}; shorten it")
    wanted = [(prompt, arguments.seed + i) for prompt in prompts for i in range(arguments.samples)]
    stream = sys.stdout.isatty() if arguments.stream is None else arguments.stream
    stream = stream and len(wanted) == 1 and not arguments.json
    for first in range(0, len(wanted), BATCH):
        if first and not arguments.json:
            print("-" * 40)
        batch = wanted[first : first + BATCH]
        write_batch(model, tokenizer, batch, arguments.stop, settings, stream, arguments.json, arguments.logprobs)


@configurator.command("sample.py")
def main(argv: list[str] | None = None) -> None:
    try:
        sample(parse_arguments(argv))
    except torch.OutOfMemoryError:
        raise ValueError("out of memory; fewer --samples or prompts at once, or --device cpu") from None


if __name__ == "__main__":
    main()
