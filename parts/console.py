"""What a terminal shows and which signals it sends: exit codes, lines, the progress bar, Ctrl-C,
the profiler.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill


@contextlib.contextmanager
def command(program: str) -> Iterator[None]:
    """Decorates main of a script: what a person, a file or the machine got wrong is one line, and
    exit code 2.
    """
    with contextlib.suppress(AttributeError):  # stdout is no terminal, file or pipe
        sys.stdout.reconfigure(
            errors="replace"
        )  # a character that cannot be encoded must not end the program
    try:
        yield
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # the reader has closed the pipe, like head; Python must not write to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        if rank := int(os.environ.get("RANK", 0)):
            time.sleep(
                10
            )  # a mistake of all ranks is said by the main one; then torchrun ends the others
            error = f"(rank {rank}) {error}"
        message = "\n".join(f"{program}: {line}" for line in str(error).strip().splitlines())
        print(message, file=sys.stderr)
        if file := os.environ.get(
            "TORCHELASTIC_ERROR_FILE"
        ):  # torchrun ends its own report with it
            Path(file).write_text(json.dumps(dict(message=message, timestamp=time.time())))
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def print_lines(text: str) -> None:
    """Print lines; a terminal gets them broken at words, with an indent."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    style = dict(subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(*(fill(line, width, **style) for line in text.splitlines()), sep="\n", flush=True)


def printable(text: str) -> str:
    """Text for a terminal: control characters, which move its cursor and ring its bell, become
    U+FFFD.
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\r\t" else c for c in text
    )


class Console(contextlib.AbstractContextManager):
    """A progress bar on a terminal, plain lines in a file, nothing on ranks above 0."""

    def __init__(self, max_steps: int, start_step: int, log_every: int, is_main: bool):
        from tqdm import tqdm

        self.max_steps, self.is_main = max_steps, is_main
        self.live = is_main and sys.stdout.isatty() and log_every > 0
        form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(
            total=max_steps,
            initial=start_step,
            bar_format=form,
            dynamic_ncols=True,
            disable=not self.live,
        )

    def __exit__(self, *_) -> None:
        self.bar.close()

    def line(self, text: str) -> None:
        """Print what was done besides training. The bar's time left does not count it."""
        self.bar.set_postfix_str("", refresh=False)
        self.bar.unpause()
        if self.is_main:
            try:
                self.bar.write(text) if self.live else print(text, flush=True)
            except (
                BrokenPipeError
            ):  # the reader of a pipe is gone, but a checkpoint may still have to be saved
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, step: int, record: dict) -> None:
        """Show one training record (the dict that goes to metrics.jsonl)."""
        loss = f"loss {record['loss']:.4f}"
        speed = f"{record['tokens_per_s']:,.0f} tok/s" + (
            f" | mfu {record['mfu']:.1%}" if record["mfu"] else ""
        )
        self.bar.set_postfix_str(f"{loss} | {speed}", refresh=False)
        if not self.live:
            minutes = (self.max_steps - 1 - step) * record["ms"] / 60_000
            update = (
                f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {record['ms']:,.0f} ms"
            )
            self.line(
                f"step {step:,}/{self.max_steps:,} | {loss} | {update} | {speed} | {minutes:.1f} min left"
            )


class StopSignal:
    """While in use, a first signal asks the run to stop after its step; a second Ctrl-C stops it at
    once.
    """

    # Ctrl-C; from torchrun and most systems; from SLURM before the time limit (not on Windows)
    NUMBERS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, is_main: bool):
        self.is_main, self.received = is_main, 0  # received: the signal's number

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in self.NUMBERS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.is_main:
            # os.write, not print: the signal may have interrupted a print, and the reader may be
            # gone.
            with contextlib.suppress(OSError):
                os.write(
                    2,
                    b"\nstopping after this step, then saving; Ctrl-C again stops at once, unsaved\n",
                )


def profiler(out_dir: Path, steps: int, machine) -> contextlib.AbstractContextManager:
    """On the main rank, after two steps of warm-up: profile.txt (operators by time), trace.json
    (ui.perfetto.dev).
    """
    if not (steps and machine.is_main):
        return contextlib.nullcontext()
    import torch

    def write(profile) -> None:
        order = f"self_{'device' if machine.device.type == 'cuda' else 'cpu'}_time_total"
        (out_dir / "profile.txt").write_text(
            profile.key_averages().table(sort_by=order, row_limit=30)
        )
        profile.export_chrome_trace(str(out_dir / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
