"""Prompt -> text.

    python sample.py -p "def "                               the newest checkpoint under out/
    python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
    python sample.py --model out/quickstart -p "class " -p "import " -m 200 --temperature 0.8 --stop "\\n\\n"
    python sample.py --file prompts.jsonl --json             a prompt a line, and a JSON object for each sample
    git log -3 | python sample.py -p -                       the standard input as the prompt
    python sample.py -i                                      write together, line by line; /help says how
    python sample.py --web                                   a page on this machine, with each token's probability

With no checkpoint anywhere, an untrained GPT-2 speaks, so that the program can be tried; its text is noise.
"""

import argparse
import codecs
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import data
import generate
import runtime
import web
from model import GPT, GPTConfig
from pretrained import checkpoints, resolve

HELLO = "Hello, I'm a language model,"
BOLD, LIKELY, UNLIKELY = "1", "38;5;33", "38;5;208"  # ANSI's codes: bold; blue and orange, which most eyes tell apart
BATCH = 64  # samples at once; more wait, so that any number of them fits into memory
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
HELP = """  a line          goes behind the text so far, and the model goes on from there
  /temperature X  0 takes the likeliest token always      /max N    new tokens in an answer
  /top_k K        the K likeliest only; 0 is all          /seed S   where the draws begin
  /top_p P        the nucleus of probability P            /reset    forget the text so far
  /min_p P        at least P times the likeliest's        /help     this
  /repetition_penalty X   above 1: less of what stands there already
  Ctrl-C ends an answer, Ctrl-D the program."""


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description="Continue prompts with a GPT-2.")
    add = parser.add_argument
    about_prompt = f'text to continue, repeatable; "" begins a document, - is the standard input (default: {HELLO})'
    add("-p", "--prompt", action="append", default=[], help=about_prompt)
    add("--file", help='more prompts: a line each, or of a .jsonl file the "prompt" of each object')
    add("-i", "--interactive", action="store_true", help="write together with the model")
    add("-m", "--max_tokens", type=int, default=100, help="new tokens for each sample (default: %(default)s)")
    add("-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)")
    add("--model", help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: the newest under out/)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token always (default: %(default)s)")
    add("--top_k", type=int, default=50, help="draw from the k likeliest tokens only; 0 is all (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="from the fewest with this probability together (default: all)")
    add("--min_p", type=float, default=0.0, help="from those with this share of the likeliest's (default: all)")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: tokens in the text count less (default: none)")
    add("--seed", type=int, default=1337, help="sample number i draws from seed + i (default: %(default)s)")
    add(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text, repeatable; \\n is a newline"
    )
    streaming = "show text as it comes (default: on a terminal, if there is one sample)"
    add("--stream", action=argparse.BooleanOptionalAction, help=streaming)
    as_json = (
        "a JSON object a line: prompt, completion; tokens drawn (a stop text included), their logprob; tokens_per_s"
    )
    add("--json", action="store_true", help=as_json)
    add("--logprobs", action="store_true", help="also each token's log-probability, and the likeliest in its place")
    add("--web", action="store_true", help="serve a page on 127.0.0.1 to sample from (needs Flask)")
    add("--port", type=int, default=8124, help="of that page; 0 is any free one (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="of matrix products (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if wrong := mistake(arguments):
        parser.error(wrong)
    arguments.stop = [stop.replace("\\n", "\n") for stop in arguments.stop if stop]
    return arguments


def mistake(arguments: argparse.Namespace) -> str:
    """What is out of range, in words; nothing if all is well."""
    least = dict(max_tokens=1, samples=1, temperature=0, top_k=0, top_p=0, min_p=0, seed=0, repetition_penalty=0.01)
    most = dict(top_p=1, min_p=1, repetition_penalty=100)
    for name, low in least.items():
        value, high = getattr(arguments, name), most.get(name, 2**62)
        if not low <= value <= high:
            return f"--{name} {value}: it must be at least {low} and at most {high}"
    if arguments.interactive and (arguments.samples > 1 or arguments.file or arguments.json or arguments.logprobs):
        return "-i is for a person: without --file, --samples, --json and --logprobs"
    if arguments.web and (arguments.interactive or arguments.file or arguments.json or arguments.samples > 1):
        return "--web is a page: without -i, --file, --samples and --json"
    return ""


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompt]
    if arguments.file:
        lines = Path(arguments.file).read_text(encoding="utf-8-sig", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                is_json = arguments.file.endswith(".jsonl")
                prompts.append(prompt_of(line, f"{arguments.file}, line {number}") if is_json else line)
        if not any(line.strip() for line in lines):
            raise ValueError(f"{arguments.file}: no prompts in it; write one a line")
    return prompts or [HELLO]


def prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)
        prompt = prompt["prompt"] if isinstance(prompt, dict) else prompt
    except (ValueError, KeyError) as error:
        raise ValueError(f'{where}: not a JSON object with a "prompt" ({type(error).__name__}: {error})') from None
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: the prompt is a {type(prompt).__name__}, not a text")
    return prompt


# ----------------------------------------------------------------------------------------------------------------------
# The model


def newest_checkpoint(out: Path = Path("out")) -> Path | None:
    """The checkpoint written last under out/, of whatever run."""
    found = [runs[-1] for run in out.glob("*") if (runs := checkpoints(run))]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def load_model(name: str | None) -> tuple[GPT, str]:
    """The model asked for, or the newest, or an untrained one; and in words which it is."""
    source = name or newest_checkpoint()
    if source is None:
        model = GPT(GPTConfig())
        where = Path("out").resolve()
        return (
            model,
            f"UNTRAINED GPT-2 124M, as there is no checkpoint under {where}: its text is noise (try --model gpt2)",
        )
    source = resolve(source)
    model = GPT.from_pretrained(source)
    return model, f"{source}, {model.num_params():,} parameters"


# ----------------------------------------------------------------------------------------------------------------------
# Completions


class Completion:
    """A text that grows by tokens and can be shown meanwhile: no half characters, and nothing of a stop text."""

    def __init__(self, tokenizer: data.Tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids: list[int] = []
        # Of each token, if wanted: id, log-probability, and the five likeliest in its place with theirs.
        self.record: list[tuple[int, float, list[tuple[int, float]]]] = []
        self.text, self.held, self.done = "", "", False  # held: it may become a stop text

    def add(self, token: int, logprobs: torch.Tensor | None = None) -> str:
        """Returns what can be shown now and could not before; logprobs (V) are remembered for this token."""
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
            return self.show(len(self.held))
        kept = max((n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self.show(len(self.held) - kept)

    def finish(self) -> str:
        """No token follows: what was held back is text."""
        if not self.done:
            self.held += self.decoder.decode(b"", final=True)
        self.done = True
        return self.show(len(self.held))

    def show(self, n: int) -> str:
        shown, self.held = self.held[:n], self.held[n:]
        self.text += shown
        return shown


def complete(
    model: GPT, prompts: list[list[int]], seeds: list[int], completions: list[Completion], arguments
) -> Iterator[list[str]]:
    """Continue all prompts as one batch, into the completions; yield what can be shown of each after each token."""
    end_of_text = completions[0].tokenizer.end_of_text
    options = {name: getattr(arguments, name) for name in SAMPLING}
    for step in generate.stream(model, prompts, arguments.max_tokens, seeds, end_of_text, **options):
        logprobs = step.logits.log_softmax(dim=-1) if arguments.logprobs or arguments.json else None
        new = []
        for b, (completion, token) in enumerate(zip(completions, step.tokens)):
            seen = logprobs[b] if logprobs is not None else None
            new.append("" if completion.done or token is None else completion.add(token, seen))
        yield new
        if all(completion.done for completion in completions):
            return
    yield [completion.finish() for completion in completions]


def show(text: str) -> None:
    print(data.printable(text), end="", flush=True)


def styled(text: str, style: str) -> str:
    """In bold or a colour (a code of ANSI's) on a terminal; elsewhere as it is."""
    return f"\033[{style}m{data.printable(text)}\033[0m" if sys.stdout.isatty() else data.printable(text)


def sample(arguments: argparse.Namespace) -> None:
    prompts = read_prompts(arguments)
    machine = runtime.start(arguments.device, arguments.dtype)
    model, description = load_model(arguments.model)
    tokenizer = data.get_tokenizer(model.config.vocab_size)
    model = generate.pack(model.to(machine.device), machine.dtype)
    print(f"model: {description}; {', '.join(machine.notes)}", file=sys.stderr)
    if arguments.interactive:
        write_together(model, tokenizer, "".join(prompts) if arguments.prompt else "", arguments)
        return
    if arguments.web:
        serve(model, tokenizer, description, prompts[0], arguments)
        return

    for prompt in prompts:
        if (n := len(tokenizer.encode(prompt))) > model.config.block_size:
            raise ValueError(
                f"the prompt {prompt[:30]!r}... has {n} tokens, the model reads {model.config.block_size}; shorten it"
            )
    # Samples of all prompts go side by side; number i of each draws from the same numbers, whatever is beside it.
    wanted = [(prompt, arguments.seed + i) for prompt in prompts for i in range(arguments.samples)]
    streaming = arguments.stream if arguments.stream is not None else sys.stdout.isatty()
    streaming = streaming and len(wanted) == 1 and not arguments.json
    if streaming:
        print(styled(prompts[0], BOLD), end="", flush=True)
    for first in range(0, len(wanted), BATCH):
        texts, seeds = zip(*wanted[first : first + BATCH])
        ids = [tokenizer.encode(text).tolist() or [tokenizer.end_of_text] for text in texts]
        completions = [Completion(tokenizer, arguments.stop) for _ in texts]
        start = time.perf_counter()
        for new in complete(model, ids, seeds, completions, arguments):
            if streaming:
                show(new[0])
        seconds = time.perf_counter() - start
        for number, (text, completion) in enumerate(zip(texts, completions), first):
            if number and not arguments.json:
                print("-" * 40)
            report(text, completion, seconds, streaming, arguments)


def report(prompt: str, completion: Completion, seconds: float, shown: bool, arguments: argparse.Namespace) -> None:
    """One sample, for people or for programs."""
    spelled = completion.tokenizer.decode
    if arguments.json:
        n, logprob = len(completion.ids), sum(value for _, value, _ in completion.record)
        record = dict(prompt=prompt, completion=completion.text, tokens=n, logprob=logprob, tokens_per_s=n / seconds)
        if arguments.logprobs:
            record["logprobs"] = [(spelled([token]), value) for token, value, _ in completion.record]
        print(json.dumps(record), flush=True)
        return
    print("" if shown else styled(prompt, BOLD) + data.printable(completion.text))
    for token, logprob, likeliest in completion.record:
        instead = "  ".join(f"{spelled([i])!r} {value:.2f}" for i, value in likeliest)
        style = LIKELY if logprob > math.log(0.5) else UNLIKELY if logprob < math.log(0.05) else BOLD
        print(f"{logprob:8.3f}  {styled(f'{spelled([token])!r:16}', style)}  of  {instead}")


# ----------------------------------------------------------------------------------------------------------------------
# The page


def serve(model: GPT, tokenizer: data.Tokenizer, description: str, prompt: str, arguments: argparse.Namespace) -> None:
    defaults = {name: getattr(arguments, name) for name in (*SAMPLING, "max_tokens", "seed")}
    defaults |= dict(prompt=prompt, stop="".join(arguments.stop[:1]))
    web.serve(lambda settings: answer(model, tokenizer, settings, arguments), description, defaults, arguments.port)


def answer(model: GPT, tokenizer: data.Tokenizer, settings: dict, arguments: argparse.Namespace) -> Iterator[dict]:
    """What web.py asks for: after each token, the text that can be shown, and the token with its probability."""
    stops = [settings["stop"].replace("\\n", "\n")] if settings["stop"] else []
    settings = settings | dict(stop=stops, logprobs=True)
    asked = argparse.Namespace(**vars(arguments) | settings)
    if wrong := mistake(asked):
        raise ValueError(wrong)
    ids = tokenizer.encode(asked.prompt).tolist() or [tokenizer.end_of_text]
    ids = ids[-max(model.config.block_size - asked.max_tokens, model.config.block_size // 2, 1) :]  # as with -i
    completion, told = Completion(tokenizer, asked.stop), 0
    for [text] in complete(model, [ids], [asked.seed], [completion], asked):
        tokens = [
            dict(
                token=tokenizer.decode([token]),
                p=math.exp(logprob),
                likely=[[tokenizer.decode([other]), math.exp(value)] for other, value in likeliest],
            )
            for token, logprob, likeliest in completion.record[told:]
        ]
        told = len(completion.record)
        yield dict(text=text, tokens=tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Writing together


def write_together(model: GPT, tokenizer, opening: str, arguments: argparse.Namespace) -> None:
    """Lines of the person's and answers of the model's, one text behind the opening."""
    try:
        import readline  # noqa: F401 (arrow keys and a history in input())
    except ImportError:
        pass
    print("/help says what there is; Ctrl-D ends", file=sys.stderr)
    ids, seed, block_size = tokenizer.encode(opening).tolist(), arguments.seed, model.config.block_size
    show(opening)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            ids, seed = command(line, arguments, ids, seed)
            continue
        ids += tokenizer.encode(line).tolist() or ([] if ids else [tokenizer.end_of_text])
        answer = Completion(tokenizer, arguments.stop)
        # Room for the answer, as far as possible: past the window each token costs the whole window.
        context = ids[-max(block_size - arguments.max_tokens, block_size // 2, 1) :]
        try:
            for new in complete(model, [context], [seed], [answer], arguments):
                show(new[0])
        except KeyboardInterrupt:
            pass
        print()
        ids += tokenizer.encode(answer.text + "\n").tolist()
        seed += 1


def command(line: str, arguments: argparse.Namespace, ids: list[int], seed: int) -> tuple[list[int], int]:
    """Do what a line beginning with / says; returns the text so far, in tokens, and the next seed."""
    name, _, value = line[1:].strip().partition(" ")
    name = "max_tokens" if name == "max" else name
    if name == "reset":
        return [], seed
    if name in (*SAMPLING, "max_tokens", "seed"):
        before = getattr(arguments, name)
        try:
            setattr(arguments, name, type(before)(value))
            wrong = mistake(arguments)
        except ValueError:
            wrong = f"/{name} {value}: {name} takes a number"
        if wrong:
            setattr(arguments, name, before)
            print(wrong, file=sys.stderr)
        elif name == "seed":
            return ids, arguments.seed
        return ids, seed
    print(HELP, file=sys.stderr)
    return ids, seed


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of the model's letters
    try:
        sample(arguments)
    except BrokenPipeError:  # who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except torch.OutOfMemoryError:
        print("sample.py: out of memory; fewer --samples or prompts at once, or --device cpu", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
