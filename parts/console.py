"""What a terminal shows, and which signals it sends: exit codes, lines, the progress bar, Ctrl-C,
the profiler.

A run says something in one of two ways, and both take a text: `print_lines` before and after
training, `Console.line` during it, because a plain print would tear the progress bar.
"""

if __name__ == "__main__":
    raise SystemExit("parts/console.py is no command: README.md lists the commands")

import argparse
import contextlib
import errno
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
from typing import Any, NoReturn

# They could move a terminal's cursor or ring its bell. Tab, line feed and carriage return may stay.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

LONGEST_REASON = 600  # characters of an error's only line

# What torch says when the machine's memory is used up, or when no machine could have as much.
NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
    "|numel: integer multiplication overflow|Invalid .*: size too large"
)


# ---- Commands ------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(program: str, save_memory: str = "take less at once") -> Iterator[None]:
    """Decorate the main of a script: a mistake of the user, or a fault of a file or of the machine,
    becomes one line and exit code 2, without a traceback; Ctrl-C becomes exit code 130.

    save_memory: what to do when memory runs out, on a GPU or a CPU.
    """
    open_missing_streams()
    real_stdout = sys.stdout
    sys.stdout = NamedStream(real_stdout, "stdout")  # type: ignore[assignment]
    # A character that the terminal cannot encode, or text in another encoding that comes in, must
    # not end the program. (What replaces stdout in a notebook may have no such method.)
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            yield
        except SystemExit as ended:
            if not ended.code:  # argparse has printed its help
                sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    except (ValueError, OSError, ImportError) as error:
        fail(program, explain(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(program, f"out of memory{requested_memory(error)}; {save_memory}")
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stdout = real_stdout


def fail(program: str, reason: str) -> NoReturn:
    """End the program with exit code 2, and the reason on stderr."""
    rank = os.environ.get("RANK", "0")
    if rank.isdecimal() and int(rank) > 0:
        # All ranks usually fail for the same reason. Rank 0 reports it at once; then torchrun
        # stops the others, before they report it too.
        time.sleep(10)
        reason = f"(rank {rank}) {reason}"
    # Names of files and of what is in them are part of a reason.
    lines = printable(reason.strip().replace("\r", "\ufffd")).split("\n")
    message = "\n".join(f"{program}: {line}" for line in lines)
    # Nobody may be there to read it; the exit code stays.
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()
    # torchrun prints what is in this file at the end of its own report.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps(dict(message=message, timestamp=time.time())))
    sys.exit(2)


def explain(error: Exception) -> str:
    """What an error says, in a line that names what it is about."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error}; install it: pip install {error.name}"
    reason = str(error) or type(error).__name__
    if len(reason) > LONGEST_REASON and "\n" not in reason:  # the name of a file is too long
        reason = f"{reason[:LONGEST_REASON]}..."
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        reason += "; allow more of them: ulimit -n 4096"
    return reason


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, or that of the machine, of which torch says so in several
    ways.
    """
    if isinstance(error, MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # by its name: not every command loads torch
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def requested_memory(error: BaseException) -> str:
    """How much was asked for in vain, such as " (40.00 GB at once)"; empty if it does not say."""
    on_cpu = re.search(r"tried to allocate (\d+) bytes", str(error))
    if on_cpu:
        return f" ({int(on_cpu[1]) / 1e9:,.2f} GB at once)"
    on_gpu = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    if on_gpu:
        return f" ({on_gpu[1]} at once)"
    return ""


def open_missing_streams() -> None:
    """Give a program that was started without stdin, stdout or stderr the null device instead.

    Without it, the next file that is opened would become, say, the stdout of a library in C.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


class NamedStream:
    """A stream whose errors name it: that of a full disk would not say which file is meant."""

    def __init__(self, stream: Any, name: str):
        self.stream = stream
        self.name = name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.stream, attribute)


def discard_stdout() -> None:
    """Send all further output to the null device, once the reader of a pipe (such as head) has
    closed it, or the disk is full. Otherwise Python's own flush at exit would fail again.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class OptionParser(argparse.ArgumentParser):
    """A parser of options whose complaints are one line like any other: it raises ValueError.

    Hyphens are underscores in the names of options: --max-tokens is --max_tokens.
    """

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(self.replace_hyphens, args)), namespace)

    def replace_hyphens(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        replaced = "--" + name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and replaced in self._option_string_actions:
            return f"{replaced}{equals}{value}"
        return argument

    def print_help(self, file: Any = None) -> None:
        # argparse's own ignores that the disk under stdout is full.
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        if len(message) > 300:  # it quotes the option
            message = f"{message[:300]}..."
        raise ValueError(f"{message} (--help shows all options)")


def path_option(text: str) -> str:
    """An option that names a file or folder: never empty, and a leading ~ is the home folder.

    (A shell expands `--out ~/x`, but not `--out=~/x`.)
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; an unset variable?")
    return os.path.expanduser(text)


# ---- Text ----------------------------------------------------------------------------------------


def print_lines(text: str) -> None:
    """Print lines; on a terminal, long ones are broken at words and indented."""
    width = sys.maxsize
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    wrapper = TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    print_or_go_on("\n".join(wrapper.fill(line) for line in printable(text).splitlines()))


def print_or_go_on(text: str) -> None:
    """Print lines. Where nobody reads any more, or the disk under a log file is full, all further
    output is lost, but nothing else: a checkpoint may still have to be saved.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_stdout()
    except OSError as error:
        discard_stdout()
        with contextlib.suppress(OSError):
            reason = error.strerror or error
            print(f"NOTE: stdout: {reason}; the program goes on without it", file=sys.stderr)


def print_note(text: str) -> None:
    """Print lines to stderr, beside a command's output. Nothing ends if nobody can read them."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


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
        text = printable(text)
        if not self.live:
            print_or_go_on(text)
            return
        # A terminal that is gone.
        with contextlib.suppress(OSError):
            self.bar.write(text)

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
    stops it at once. `received` is the number of the last signal, or 0. A signal that is ignored
    stays so.
    """

    # SIGINT is Ctrl-C, SIGTERM comes from torchrun and most systems, SIGHUP from a terminal that is
    # closed, and SIGUSR1 from SLURM before the time limit. Windows has neither of the last two.
    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    MESSAGE = b"\nstopping after this step, then saving; Ctrl-C again stops at once, unsaved\n"

    def __init__(self, is_main: bool):
        self.is_main = is_main
        self.received = 0
        self.old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for name in self.NAMES:
            number = getattr(signal, name, None)
            # nohup ignores SIGHUP, and a shell's script ignores Ctrl-C for what it starts with "&".
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
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
