"""Prompt -> text.

    python sample.py -p "def "                               the newest checkpoint under out/
    python sample.py --model gpt2 -n 5 -p "Hello, I'm a language model,"
    python sample.py --model out/quickstart -p "class " -p "import " -m 200 --temperature 0.8

With no checkpoint anywhere, an untrained GPT-2 speaks, so that the program can be tried; its text is noise.
"""

import argparse
import sys
from pathlib import Path

import data
import runtime
from model import GPT, GPTConfig, checkpoints, resolve

HELLO = "Hello, I'm a language model,"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample.py", description="Continue prompts with a GPT-2.")
    add = parser.add_argument
    add(
        "-p", "--prompt", action="append", help=f'text to continue, repeatable; "" begins a document (default: {HELLO})'
    )
    add("-m", "--max_tokens", type=int, default=100, help="new tokens for each sample (default: %(default)s)")
    add("-n", "--samples", type=int, default=1, help="samples of each prompt (default: %(default)s)")
    add("--model", help="gpt2 ... gpt2-xl, a hub id, a run or checkpoint folder (default: the newest under out/)")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token always (default: %(default)s)")
    add("--top_k", type=int, default=50, help="draw from the k likeliest tokens only; 0 is all (default: %(default)s)")
    add("--seed", type=int, default=1337, help="sample number i draws from seed + i (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", *runtime.DTYPES], help="of matrix products (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name, least in (("max_tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= getattr(arguments, name) < 2**62:
            parser.error(f"--{name} {getattr(arguments, name)}: it must be at least {least}")
    arguments.prompt = arguments.prompt or [HELLO]
    return arguments


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


def sample(arguments: argparse.Namespace) -> None:
    machine = runtime.start(arguments.device, arguments.dtype)
    model, description = load_model(arguments.model)
    tokenizer = data.get_tokenizer(model.config.vocab_size)
    print(f"model: {description}; {', '.join(machine.notes)}", file=sys.stderr)

    # All samples of all prompts are one batch; sample i of each draws from the same numbers, whatever the batch.
    texts = [prompt for prompt in arguments.prompt for _ in range(arguments.samples)]
    prompts = [tokenizer.encode(text).tolist() or [tokenizer.end_of_text] for text in texts]
    seeds = [arguments.seed + i for i in range(arguments.samples)] * len(arguments.prompt)
    with machine.autocast():
        completions = model.to(machine.device).generate(
            prompts,
            arguments.max_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seeds=seeds,
            stop_token=tokenizer.end_of_text,
        )
    for number, (text, ids) in enumerate(zip(texts, completions)):
        if number:
            print("-" * 40)
        print(data.printable(text + tokenizer.decode([i for i in ids if i != tokenizer.end_of_text])))


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of the model's letters
    try:
        sample(arguments)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
