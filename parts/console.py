"""What a terminal shows, and which signals it sends: exit codes, lines, the progress bar, Ctrl-C,
the profiler.

A run says something in one of two ways, and both take a text: `print_lines` before and after
training, `Console.line` during it, because a plain print would tear the progress bar.
"""

if __name__ == "__main__":
    raise SystemExit("parts/console.py is no command: README.md lists the commands")

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

# They could move a terminal's cursor or ring its bell. Tab, line feed and carriage return may stay.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


# ---- Commands ------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(program: str) -> Iterator[None]:
    """Decorate the main of a script: a mistake of the user, or a fault of a file or of the machine,
    becomes one line and exit code 2, without a traceback; Ctrl-C becomes exit code 130.
    """
    # A character that the terminal cannot encode must not end the program. (What replaces stdout
    # in a notebook may have no such method.)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    except (ValueError, OSError, ImportError) as error:
        reason = str(error)
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            # All ranks usually fail for the same reason. Rank 0 reports it at once; then torchrun
            # stops the others, before they report it too.
            time.sleep(10)
            reason = f"(rank {rank}) {reason}"
        message = "\n".join(f"{program}: {line}" for line in reason.strip().splitlines())
        print(message, file=sys.stderr)
        # torchrun prints what is in this file at the end of its own report.
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file:
            Path(error_file).write_text(json.dumps(dict(message=message, timestamp=time.time())))
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)


def discard_stdout() -> None:
    """Send all further output to the null device, once the reader of a pipe (such as head) has
    closed it. Otherwise Python's own flush at exit would fail again.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Text ----------------------------------------------------------------------------------------


def print_lines(text: str) -> None:
    """Print lines; on a terminal, long ones are broken at words and indented."""
    width = sys.maxsize
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    wrapper = TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    print("\n".join(wrapper.fill(line) for line in text.splitlines()), flush=True)


def printable(text: str) -> str:
    """The text for a terminal: control characters become U+FFFD."""
    return CONTROL_CHARACTERS.sub("\ufffd", text)


def plural(n: int, noun: str) -> str:
    """plural(1, "thread") is "1 thread", plural(2, "thread") is "2 threads"."""
    if n == 1:
        return f"1 {noun}"
    return f"{n:,} {noun}s"


# ---- A run ---------------------------------------------------------------------------------------


class Console(contextlib.AbstractContextManager):
    """What a training run shows: a progress bar on a terminal, plain lines in a file or a pipe, and
    nothing on ranks above 0.
    """

    BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self, max_steps: int, start_step: int, log_every: int, is_main: bool):
        from tqdm import tqdm

        self.max_steps = max_steps
        self.is_main = is_main
        self.live = is_main and sys.stdout.isatty() and log_every > 0
        self.bar = tqdm(
            total=max_steps,
            initial=start_step,
            bar_format=self.BAR,
            dynamic_ncols=True,
            disable=not self.live,
        )

    def __exit__(self, *_) -> None:
        self.bar.close()

    def line(self, text: str) -> None:
        """Print a line about something other than training, whose duration then does not count in
        the bar's estimate of the time left.
        """
        self.bar.set_postfix_str("", refresh=False)
        self.bar.unpause()
        if not self.is_main:
            return
        try:
            if self.live:
                self.bar.write(text)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            # Nobody reads any more, but a checkpoint may still have to be saved.
            discard_stdout()

    def step(self, step: int, record: dict) -> None:
        """Show one training record, the dict that goes to metrics.jsonl."""
        loss = f"loss {record['loss']:.4f}"
        speed = f"{record['tokens_per_s']:,.0f} tok/s"
        if record["mfu"]:
            speed += f" | mfu {record['mfu']:.1%}"
        self.bar.set_postfix_str(f"{loss} | {speed}", refresh=False)
        if self.live:
            return
        minutes_left = (self.max_steps - 1 - step) * record["ms"] / 60_000
        self.line(
            f"step {step:,}/{self.max_steps:,} | {loss}"
            f" | lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {record['ms']:,.0f} ms"
            f" | {speed} | {minutes_left:.1f} min left"
        )


class StopSignal:
    """While in use, a first signal asks the run to stop after the current step; a second Ctrl-C
    stops it at once. `received` is the number of the last signal, or 0.
    """

    # SIGINT is Ctrl-C, SIGTERM comes from torchrun and most systems, and SIGUSR1 from SLURM before
    # the time limit. Windows has no SIGUSR1.
    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
    MESSAGE = b"\nstopping after this step, then saving; Ctrl-C again stops at once, unsaved\n"

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.received = 0
        self.old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in self.NAMES:
            if hasattr(signal, name):
                number = getattr(signal, name)
                self.old_handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.is_main:
            # os.write, not print: the signal may have interrupted a print, and the reader may be
            # gone.
            with contextlib.suppress(OSError):
                os.write(2, self.MESSAGE)


def profiler(out_dir: Path, steps: int, machine) -> contextlib.AbstractContextManager:
    """A torch profiler of `steps` steps on the main rank, after two steps of warm-up; no profiler
    if there are none.

    It writes profile.txt (operators by their time) and trace.json (for ui.perfetto.dev) to out_dir.
    """
    if not steps or not machine.is_main:
        return contextlib.nullcontext()
    import torch

    kind = "device" if machine.device.type == "cuda" else "cpu"

    def write(profile) -> None:
        averages = profile.key_averages()
        table = averages.table(sort_by=f"self_{kind}_time_total", row_limit=30)
        (out_dir / "profile.txt").write_text(table)
        profile.export_chrome_trace(str(out_dir / "trace.json"))

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
