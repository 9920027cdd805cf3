"""Prompt -> text.

python sample.py "def main("                             the newest checkpoint under out/
python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
python sample.py --model out/quickstart -p "class Queue:" -p "import os" -m 200 --top_p 0.9
python sample.py --file prompts.jsonl --json             one prompt a line; one JSON object for each sample
python sample.py -i                                      write with the model, line by line; /help lists commands
python sample.py --web                                   a page on this machine that shows token probabilities
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
import run
import runtime
import vocabulary
import web
from model import GPT, GPTConfig
from pretrained import checkpoints, locate, resolve

HELLO = "Hello, I'm a language model,"
BOLD, LIKELY, UNLIKELY = "1", "38;5;33", "38;5;208"  # ANSI codes: bold; blue and orange, safe for colour-blind readers
BATCH = 64  # samples in one batch; the others wait, so that any number of them fits into memory
# Name: default, smallest and largest value, meaning. The default's type is the setting's.
SETTINGS = {
    "max_tokens": (100, 1, 2**62, "new tokens for each sample"),
    "temperature": (1.0, 0, 2**62, "0 always takes the most likely token"),
    "top_k": (50, 0, 2**62, "draw from the k most likely tokens; 0 is all"),
    "top_p": (1.0, 0, 1, "draw from the fewest tokens that together have this probability; 1 is all"),
    "min_p": (0.0, 0, 1, "draw from the tokens with this share of the top token's probability; 0 is all"),
    "repetition_penalty": (1.0, 0.01, 100, "above 1: tokens that are in the text become less likely"),
    "seed": (1337, 0, 2**62, "sample number i draws from seed + i"),
}
HELP = """  A line is appended to the text, and the model continues from there.
  /reset              forget the text so far
  Ctrl-C ends an answer, Ctrl-D the program
""" + "\n".join(f"  /{name:19}{about}" for name, (_, _, _, about) in SETTINGS.items())


# ---- Settings, prompts, a model --------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description="Continue prompts with a GPT-2.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help='texts to continue; "" begins a document, - is the standard input')
    add("-p", "--prompt", action="append", default=[], help=f"more (default: the run's sample_prompt, else {HELLO})")
    add("--file", help='more prompts: one a line, or the "prompt" of each object in a .jsonl file')
    add("-i", "--interactive", action="store_true", help="write with the model, line by line")
    add("-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)")
    add("--model", help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: the newest under out/)")
    for name, (default, _, _, about) in SETTINGS.items():
        flags = ["-m"] * (name == "max_tokens") + [f"--{name}"]
        add(*flags, type=type(default), default=default, help=f"{about} (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable; \\n: newline")
    stream = "show text as it comes (default: if there is one sample, and no --json)"
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help=stream)
    add("--json", action="store_true", help="a JSON object a line: prompt, completion, tokens, logprob, tokens_per_s")
    add("--logprobs", action="store_true", help="also each token's log-probability, and the most likely in its place")
    add("--web", action="store_true", help="serve a page on 127.0.0.1 to sample from (needs Flask)")
    add("--port", type=int, default=8124, help="of that page; 0 is any free one (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="of matrix products (default: %(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.samples < 1:
        parser.error(f"samples must be 1 or more, not {arguments.samples}")
    for_programs = arguments.samples > 1 or arguments.file or arguments.json or arguments.logprobs
    if arguments.interactive + arguments.web + bool(for_programs) > 1:
        parser.error("-i and --web exclude each other, and --file, --samples, --json and --logprobs")
    return arguments


def checked(values: dict) -> dict:
    """The settings among these values. ValueError if one is missing, not a number, or out of range."""
    for name, (default, low, high, _) in SETTINGS.items():
        value = values.get(name)
        if type(value) not in (int, type(default)):
            raise ValueError(f"{name} must be a {'whole ' if type(default) is int else ''}number")
        if not low <= value <= high:
            raise ValueError(f"{name} must be {f'at most {high}' if value > high else f'{low} or more'}")
    return {name: values[name] for name in SETTINGS}


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """Prompts from the command line, then those of a file. ValueError if a line of it has no prompt."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in given]
    lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").split("\n") if file else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                prompts.append(json.loads(line)["prompt"] + "" if file.endswith(".jsonl") else line)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file}, line {number}: not a JSON object with a text as "prompt"') from None
    if file and len(prompts) == len(given):
        raise ValueError(f"{file}: no prompts in it; write one a line")
    return prompts


def load_model(name: str | None) -> tuple[GPT, data.Tokenizer, Path, str, str]:
    """A model (default: the newest checkpoint, else an untrained GPT-2), its tokenizer, name, description, prompt."""
    newest = [found[-1] for folder in Path("out").glob("*") if (found := checkpoints(folder))]
    source = resolve(name) if name else max(newest, key=lambda folder: folder.stat().st_mtime, default=None)
    if source is None:
        model, about = GPT(GPTConfig()), "UNTRAINED GPT-2: no checkpoint under out/; try --model gpt2"
        return model, data.get_tokenizer(model.config.vocab_size), Path("untrained"), about, HELLO
    folder = locate(source)
    model, prompt = GPT.from_pretrained(folder), HELLO
    tokenizer = vocabulary.of_folder(folder, model.config.vocab_size)
    with suppress(OSError, ValueError, KeyError, TypeError):  # a model that was not trained here has no such file
        prompt = json.loads((Path(source) / "settings.json").read_text())["settings"]["sample_prompt"]
    return model, tokenizer, Path(source), f"{source}, {model.num_params():,} parameters", prompt


class Shelf:
    """The page's models: the checkpoints of a run, of which one at a time is open, or one model that is no run's."""

    def __init__(self, source: Path, model: GPT, machine: runtime.Runtime):
        folder = source.resolve()
        self.run_folder, self.is_run = folder.parent, folder in checkpoints(folder.parent)
        self.title = folder.parent.name if self.is_run else folder.name
        self.name, self.opened, self.machine = folder.name, model, machine

    def names(self) -> list[str]:
        """Oldest first. A run that is still going adds checkpoints and deletes old ones."""
        return [folder.name for folder in checkpoints(self.run_folder)] if self.is_run else []

    def model(self, name: str) -> GPT:
        """The model of a name that `names` gave. ValueError if it is not there, or damaged."""
        if name != self.name or self.opened is None:
            if name not in self.names():
                raise ValueError(f"there is no checkpoint {name} (any more); choose another")
            self.name, self.opened = name, None  # two at once may need too much memory
            found = GPT.from_pretrained(self.run_folder / name).to(self.machine.device)
            self.opened = generate.pack(found, self.machine.dtype)
        return self.opened

    def progress(self) -> dict:
        """The checkpoints' names, and the losses in nats a token as pairs (steps, loss), 300 at most."""
        records = run.read_metrics(self.run_folder / "metrics.jsonl") if self.is_run else []
        curves = {kind: run.evenly(run.of_kind(records, kind, "loss"), 300) for kind in ("train", "val")}
        pairs = {kind: [(run.updates(record), record["loss"]) for record in curve] for kind, curve in curves.items()}
        return dict(checkpoints=self.names(), **pairs)


# ---- Texts, and three ways to ask for them: as a command, line by line, with a page ----------------------------------


class Text:
    """A prompt's continuation, token by token. It shows no incomplete characters and no part of a stop text."""

    def __init__(self, tokenizer: data.Tokenizer, prompt: str, seed: int, stops: list[str]):
        self.tokenizer, self.prompt, self.seed = tokenizer, prompt, seed
        self.ids = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]  # of the prompt
        self.stops = [stop.replace("\\n", "\n") for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text, self.held, self.done = "", "", False  # shown; held back, as it may become a stop text; complete
        # If wanted, for each token: its text, log-probability and id, and those of the five most likely in its place.
        self.record: list[tuple[str, float, int, list[tuple[str, float, int]]]] = []

    def add(self, token: int | None, logprobs: torch.Tensor | None = None) -> str:
        """Append a token (None: no more come) and return what is ready to show; logprobs (V) are those of its place."""
        if logprobs is not None:
            values, ids = logprobs.topk(min(5, len(logprobs)))
            likely = [(self.tokenizer.decode([i]), value, i) for i, value in zip(ids.tolist(), values.tolist())]
            self.record.append((self.tokenizer.decode([token]), logprobs[token].item(), token, likely))
        last = token in (None, self.tokenizer.end_of_text)
        self.held += self.decoder.decode(b"" if last else self.tokenizer.decode_bytes([token]), final=last)
        ends = [at for at in map(self.held.find, self.stops) if at >= 0]
        starts = [n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])]
        self.done = last or bool(ends)
        end = min(ends) if ends else len(self.held) - (0 if last else max(starts, default=0))
        shown, self.held = self.held[:end], self.held[end:]
        self.text += shown
        return shown

    def take(self, tokens: list[int]) -> list[str]:
        """Append tokens that stand already; returns what each of them shows. Neither stop text nor id ends the text."""
        stops, self.stops = self.stops, []
        shown = [self.add(token) for token in tokens]
        self.ids, self.stops, self.done = self.ids + tokens, stops, False
        return shown


def complete(model: GPT, texts: list[Text], settings: dict, logprobs=False, cut=False) -> Iterator[list[str]]:
    """Continue the texts as one batch; after each token, yield what each of them can show.

    cut: of a long prompt, the model reads the end. New tokens get room, because generation past the window is slow.
    """
    max_tokens, block_size = settings["max_tokens"], model.config.block_size
    longest = max(block_size - max_tokens, block_size // 2)
    prompts, seeds = [text.ids[-longest:] if cut else text.ids for text in texts], [text.seed for text in texts]
    sampling = {name: value for name, value in settings.items() if name not in ("max_tokens", "seed")}
    for step in generate.stream(model, prompts, max_tokens, seeds, texts[0].tokenizer.end_of_text, **sampling):
        rows = step.logits.log_softmax(dim=-1) if logprobs else [None] * len(texts)
        yield ["" if text.done else text.add(token, row) for text, token, row in zip(texts, step.tokens, rows)]
        if all(text.done for text in texts):
            return
    yield ["" if text.done else text.add(None) for text in texts]


def show(text: str, style: str = "") -> None:
    """Print the text without a newline; on a terminal, in the ANSI style."""
    text = data.printable(text)
    print(f"\033[{style}m{text}\033[0m" if style and sys.stdout.isatty() else text, end="", flush=True)


def write(model: GPT, texts: list[Text], settings: dict, stream: bool, as_json: bool, logprobs: bool) -> None:
    """Complete the texts and print them. Each depends on its own prompt and seed, not on its neighbours."""
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
                row = dict(prompt=text.prompt, completion=text.text, tokens=n, logprob=total, tokens_per_s=n / seconds)
                each = dict(logprobs=[(token, value) for token, value, *_ in text.record]) if logprobs else {}
                print(json.dumps(row | each), flush=True)
                continue
            if number:
                print("-" * 40)
            if not stream:
                show(text.prompt, BOLD)
                show(text.text)
            print()
            for token, logprob, _, likely in text.record:
                style = LIKELY if logprob > math.log(0.5) else UNLIKELY if logprob < math.log(0.05) else BOLD
                show(f"{logprob:7.3f}  ")
                show(f"{token!r:12}", style)
                show(" of " + "  ".join(f"{other!r} {value:.2f}" for other, value, _ in likely) + "\n")


def write_together(model: GPT, tokenizer: data.Tokenizer, story: str, stops: list[str], settings: dict) -> None:
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
                print(HELP if name == "help" else f"{line}: no such command; /help lists them", file=sys.stderr)
    print()


def answer(shelf: Shelf, tokenizer: data.Tokenizer, asked: dict) -> Iterator[dict]:
    """The events of web.py: after each token, the text that can be shown, and the token with its probability."""
    settings, taken, model = checked(asked), asked["taken"], shelf.model(asked["checkpoint"])
    if not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in taken):
        raise ValueError("taken must be the ids of tokens")
    text = Text(tokenizer, asked["prompt"], settings["seed"] + len(taken), [asked["stop"]])  # other draws than before
    yield dict(taken=text.take(taken))
    for [new] in complete(model, [text], settings, logprobs=True, cut=True):
        tokens = [
            dict(token=token, p=math.exp(p), id=i, likely=[dict(token=t, p=math.exp(q), id=j) for t, q, j in likely])
            for token, p, i, likely in text.record
        ]
        text.record.clear()
        yield dict(text=new, tokens=tokens)


@configurator.command("sample.py")
def main(argv: list[str] | None = None) -> None:
    given = parse_arguments(argv)
    settings, prompts = checked(vars(given)), read_prompts(given.prompts + given.prompt, given.file)
    machine = runtime.start(given.device)
    model, tokenizer, source, description, default_prompt = load_model(given.model)
    try:
        rows = min(BATCH, max(1, len(prompts)) * given.samples)
        model, machine, note = generate.ready(model, machine, given.dtype, rows)
        print(f"model: {description}\n{machine.note}\n{note}", file=sys.stderr)
        if given.interactive:
            write_together(model, tokenizer, "".join(prompts), given.stop, settings)
            return
        if given.web:
            shelf = Shelf(source, model, machine)
            del model  # the shelf drops it when another checkpoint takes its place
            form = dict(title=shelf.title, about=description, checkpoint=shelf.name, settings=settings)
            form |= dict(prompts=[*prompts, default_prompt], stop=given.stop)
            form |= dict(limits={name: limits for name, (_, *limits, _) in SETTINGS.items()})
            form |= dict(pinned=given.seed != SETTINGS["seed"][0], end_of_text=tokenizer.end_of_text)
            web.serve(lambda asked: answer(shelf, tokenizer, asked), shelf.progress, form, given.port)
            return
        prompts = prompts or [default_prompt]
        wanted = [(prompt, given.seed + i) for prompt in prompts for i in range(given.samples)]
        texts = [Text(tokenizer, prompt, seed, given.stop) for prompt, seed in wanted]
        write(model, texts, settings, given.stream, given.json, given.logprobs)
    except torch.OutOfMemoryError:
        raise ValueError("out of memory; fewer --samples or prompts at once, or --device cpu") from None


if __name__ == "__main__":
    main()
