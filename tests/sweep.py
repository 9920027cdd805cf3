"""Kills a small piece of work at every call that changes the disk, or lets each such call fail.

    python tests/sweep.py train kill          # a sample of the calls: every kind, first and last
    python tests/sweep.py prepare fail --all  # every single call

After each, the same command must end with the same bytes. It prints a line of JSON, and one for
each problem. Exit code 1 if there are any, 77 where this cannot be done: it needs Linux on x86-64,
and the permission to trace a process of one's own.

A process that has imported everything once forks a child for each trial. The child asks the kernel
(by a seccomp filter) to stop at the calls in CALLS, and this process (by ptrace) decides what comes
of each. Unlike a count of calls, "the second write to step_0000004/config.json" is the same call
in every trial, whatever threads do meanwhile.
"""

import argparse
import contextlib
import ctypes
import errno
import importlib
import json
import os
import platform
import re
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

CANNOT = 77  # the exit code of "skipped" that automake has, too

# ---- Which calls change the disk -----------------------------------------------------------------


# A decision about a call, and the exit code of a process that it came to.
KILL = -signal.SIGKILL


class Target(NamedTuple):
    """Where a system call has what it changes: the numbers of its arguments."""

    name: str
    descriptor: int | None = None  # of an open file, or of the folder that a path is relative to
    path: int | None = None
    flags: int | None = None  # those of open


# The numbers are x86-64's.
CALLS = {
    1: Target("write", descriptor=0),
    2: Target("open", path=0, flags=1),
    18: Target("pwrite64", descriptor=0),
    20: Target("writev", descriptor=0),
    40: Target("sendfile", descriptor=0),
    74: Target("fsync", descriptor=0),
    75: Target("fdatasync", descriptor=0),
    76: Target("truncate", path=0),
    77: Target("ftruncate", descriptor=0),
    82: Target("rename", path=0),
    83: Target("mkdir", path=0),
    84: Target("rmdir", path=0),
    85: Target("creat", path=0),
    86: Target("link", path=1),
    87: Target("unlink", path=0),
    88: Target("symlink", path=1),
    90: Target("chmod", path=0),
    91: Target("fchmod", descriptor=0),
    257: Target("openat", descriptor=0, path=1, flags=2),
    258: Target("mkdirat", descriptor=0, path=1),
    263: Target("unlinkat", descriptor=0, path=1),
    264: Target("renameat", descriptor=0, path=1),
    265: Target("linkat", descriptor=2, path=3),
    266: Target("symlinkat", descriptor=1, path=2),
    268: Target("fchmodat", descriptor=0, path=1),
    285: Target("fallocate", descriptor=0),
    316: Target("renameat2", descriptor=0, path=1),
    326: Target("copy_file_range", descriptor=2),
}
# What each may fail with: a disk that is full, breaks, or may not be written to.
ERRORS = {
    "open": (errno.ENOSPC, errno.EIO, errno.EACCES),
    "mkdir": (errno.ENOSPC, errno.EACCES),
    "write": (errno.ENOSPC, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EIO, errno.EACCES),
    "unlink": (errno.EIO, errno.EACCES),
}
# What is random in a name: that of files.write_whole, or of safetensors.
RANDOM = re.compile(r"(?<=\.)[0-9a-f]{8}(?=\.tmp$)|(?<=/\.tmp)\w{6}$")


class Call(NamedTuple):
    """A call as it is the same in each trial."""

    name: str
    path: str  # within the work's folder, without what is random in it
    number: int  # of the calls with this name and path, from 1


def choose_error(call: Call, number: int) -> int:
    """One of those it may fail with, another for each number."""
    for part, errors in ERRORS.items():
        if part in call.name:
            return errors[number % len(errors)]
    return errno.EIO


# ---- ptrace and seccomp --------------------------------------------------------------------------

TRACEME, CONTINUE, GET_REGISTERS, SET_REGISTERS, SET_OPTIONS = 0, 7, 12, 13, 0x4200
# Fork, vfork, clone, exec and seccomp are events; the children die with this process.
OPTIONS = 0x02 | 0x04 | 0x08 | 0x10 | 0x80 | 0x100000
SECCOMP_EVENT = 7
ALL_THREADS = 0x40000000  # __WALL of waitpid
AT_FDCWD = -100

if sys.platform == "linux":
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Registers(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp "
            "ss fs_base gs_base ds es fs gs"
        ).split()
    ]

    def arguments(self) -> tuple[int, ...]:
        return self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9


class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]


def stop_at_calls() -> None:
    """Ask the kernel to stop this process at each of CALLS, for the process that traces it."""
    load_number, jump_if_equal, give_back = 0x20, 0x15, 0x06
    allow, trace = 0x7FFF0000, 0x7FF00000
    code = struct.pack("<HBBI", load_number, 0, 0, 0)
    for index, number in enumerate(CALLS):
        to_trace = len(CALLS) - index  # instructions to skip
        code += struct.pack("<HBBI", jump_if_equal, to_trace, 0, number)
    code += struct.pack("<HBBI", give_back, 0, 0, allow)
    code += struct.pack("<HBBI", give_back, 0, 0, trace)
    buffer = ctypes.create_string_buffer(code)
    program = Filter(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        set_seccomp, by_filter, ctypes.byref(program), 0, 0
    ):
        os._exit(CANNOT)


def read_text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(address)
        return os.fsdecode(memory.read1(4096).split(b"\0")[0])


class Tracer:
    """Follows one child and its threads and processes to their end."""

    def __init__(self, folder: Path, decide: Callable[[Call], int | None]):
        """decide: for each call within the folder, an error number, KILL, or None."""
        self.folder = folder
        self.decide = decide
        self.calls: list[Call] = []
        self.counts: dict[tuple[str, str], int] = {}

    def follow(self, child: int) -> int:
        """The child's exit code; that of a signal is negative."""
        os.waitpid(child, 0)
        libc.ptrace(SET_OPTIONS, child, None, OPTIONS)
        libc.ptrace(CONTINUE, child, None, None)
        known = {child}
        code = -1
        while True:
            try:
                pid, status = os.waitpid(-1, ALL_THREADS)
            except ChildProcessError:  # all are gone
                return code
            if not os.WIFSTOPPED(status):
                if pid == child:
                    code = os.waitstatus_to_exitcode(status)
                continue
            number = os.WSTOPSIG(status)
            event = status >> 16
            if event == SECCOMP_EVENT:
                self.meet(pid, child)
            is_new = pid not in known
            known.add(pid)
            if event or (is_new and number == signal.SIGSTOP):
                number = 0
            libc.ptrace(CONTINUE, pid, None, number)

    def meet(self, pid: int, child: int) -> None:
        """Let a call happen, fail, or be the last one."""
        registers = Registers()
        libc.ptrace(GET_REGISTERS, pid, None, ctypes.byref(registers))
        call = self.name_call(pid, registers)
        if call is None:
            return
        self.calls.append(call)
        decision = self.decide(call)
        if decision is None:
            return
        if decision == KILL:
            os.kill(child, signal.SIGKILL)
            return
        registers.orig_rax = 2**64 - 1  # no such call, so that nothing is done
        registers.rax = 2**64 - decision
        libc.ptrace(SET_REGISTERS, pid, None, ctypes.byref(registers))

    def name_call(self, pid: int, registers: Registers) -> Call | None:
        """None if it changes nothing within the folder."""
        target = CALLS[registers.orig_rax]
        arguments = registers.arguments()
        if target.flags is not None:
            changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            if not arguments[target.flags] & changing:
                return None
        try:
            path = self.find_path(pid, target, arguments)
        except OSError:  # it is closed or gone: the call fails by itself
            return None
        if not path.startswith(f"{self.folder}/"):
            return None
        name = RANDOM.sub("*", path.removeprefix(f"{self.folder}/"))
        key = (target.name, name)
        self.counts[key] = self.counts.get(key, 0) + 1
        return Call(target.name, name, self.counts[key])

    def find_path(self, pid: int, target: Target, arguments: tuple[int, ...]) -> str:
        folder = f"/proc/{pid}/cwd"
        if target.descriptor is not None:
            descriptor = ctypes.c_int(arguments[target.descriptor]).value
            if descriptor != AT_FDCWD:
                folder = f"/proc/{pid}/fd/{descriptor}"
        path = ""
        if target.path is not None:
            path = read_text(pid, arguments[target.path])
        if not path.startswith("/"):
            path = os.path.join(os.readlink(folder), path).rstrip("/")
        return os.path.normpath(path)


# ---- The work ------------------------------------------------------------------------------------


@dataclass
class Work:
    """A command, what it starts with, and how to see whether it has ended as it should."""

    command: str  # "train" or "prepare"
    arguments: list[str]
    # What stands in its folder before; None if that is nothing.
    begun: Path | None = None
    # Files whose content may not be lost, wherever they are afterwards.
    precious: dict[str, bytes] = field(default_factory=dict)


class Ending(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[Call]


class Bench:
    """A folder for the trials, one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.place = folder / "place"

    def run(self, work: Work, decide: Callable[[Call], int | None] = lambda call: None) -> Ending:
        """Run the command in a child, in the place as it is."""
        tracer = Tracer(self.place, decide)
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        child = os.fork()
        if child == 0:
            self.be_the_child(work, out, err)
        code = tracer.follow(child)
        return Ending(code, out.read_text(), err.read_text(), tracer.calls)

    def be_the_child(self, work: Work, out: Path, err: Path) -> None:
        if libc.ptrace(TRACEME, 0, None, None):
            os._exit(CANNOT)
        os.kill(os.getpid(), signal.SIGSTOP)
        signal.alarm(120)  # a wait without end is a problem, and no wait here
        os.chdir(self.place)
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        sys.argv = [f"{work.command}.py", *work.arguments]
        draw_nothing()
        stop_at_calls()
        code = 0
        try:
            importlib.import_module(work.command).main(work.arguments)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)

    def lay_out(self, work: Work) -> None:
        """Give the place what the work begins with, and nothing else."""
        shutil.rmtree(self.place, ignore_errors=True)
        if work.begun is None:
            self.place.mkdir()
        else:
            shutil.copytree(work.begun, self.place, symlinks=True)


def draw_nothing() -> None:
    """Pictures take ten times as long as the rest of such a run. They are files as before."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda figure, file, **options: file.write(b"a picture")


def read_result(place: Path) -> dict[str, bytes | list]:
    """What must be the same after every trial: files -> content, without times and speeds."""
    result: dict[str, bytes | list] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if not path.is_file() or path.name == ".lock" or ".old" in name.split("/")[0]:
            continue
        if path.name == "metrics.jsonl":
            result[name] = read_losses(path)
        elif path.suffix in (".md", ".png", ".svg"):
            result[name] = b""  # speeds are in them
        else:
            result[name] = path.read_bytes()
    return result


def read_losses(path: Path) -> list:
    """Each record once, in its order. A checkpoint's is written before it, so a kill repeats it."""
    records = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in ("train", "val", "sample"):
            values = (record["kind"], record["step"], record.get("loss"), record.get("text"))
            records.append(list(values))
    return records


def compare(expected: dict, result: dict) -> list[str]:
    problems = []
    for name in sorted(expected.keys() | result.keys()):
        if name not in result:
            problems.append(f"{name} is missing")
        elif name not in expected:
            problems.append(f"{name} is left over")
        elif result[name] != expected[name]:
            problems.append(f"{name} differs")
    return problems


TRAIN = [
    *("--data_dir=shards", "--out_dir=run", "--device=cpu", "--dtype=fp32", "--compile=False"),
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--dropout=0.1"),
    *("--batch_size=2", "--total_batch_size=32", "--warmup_steps=1", "--max_steps=6"),
    *("--learning_rate=1e-2", "--min_lr=1e-3", "--eval_tokens=64", "--eval_every=3"),
    *("--checkpoint_every=2", "--keep_checkpoints=1", "--sample_every=3", "--sample_tokens=4"),
    "--hellaswag_every=0",
]
PREPARE = ["text.txt", "--out", "made", "--tokenizer", "300", "--shard_tokens", "3000"]


def make_text() -> str:
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew potions".split()
    lines = []
    for n in range(600):
        lines.append(" ".join(words[(n * k) % len(words)] for k in range(1, 9)))
    return "\n".join(lines)


def prepare_work(name: str, bench: Bench) -> Work:
    """The work of this name, with all that it begins with."""
    begun = bench.folder / "begun"
    begun.mkdir()
    (begun / "text.txt").write_text(make_text())
    if name == "prepare":
        return Work("prepare", [*PREPARE, "--workers", "1"], begun)
    make = Work("prepare", ["text.txt", "--out", "shards", "--tokenizer", "bytes"], begun)
    bench.lay_out(make)
    made = bench.run(make)
    assert made.code == 0, made
    shutil.rmtree(begun)
    shutil.copytree(bench.place, begun)
    train = Work("train", TRAIN, begun)
    if name == "train":
        return train
    # The same command once more, after a kill in the last checkpoint but one; or a new beginning.
    bench.lay_out(train)
    is_last = Call("rename", "run/.step_0000004.tmp", 1)
    ended = bench.run(train, lambda call: KILL if call == is_last else None)
    assert (ended.code == KILL) and name in ("resume", "anew"), (name, ended)
    if name == "resume":
        begun = bench.folder / "resumed"
        shutil.copytree(bench.place, begun)
        return Work("train", TRAIN, begun)
    begun = bench.folder / "anew"
    shutil.copytree(bench.place, begun)
    precious = {}
    for path in (begun / "run").rglob("*"):
        if path.is_file() and "/.step_" not in str(path) and path.name != ".lock":
            precious[path.name] = path.read_bytes()
    return Work("train", [*TRAIN, "--resume=never"], begun, precious)


# ---- The sweep -----------------------------------------------------------------------------------


def choose(calls: list[Call]) -> list[Call]:
    """Of each kind of call, on each kind of file, the first and the last."""
    kinds: dict[tuple, list[Call]] = {}
    for call in calls:
        kind = (call.name, re.sub(r"\d+", "*", call.path), call.number == 1)
        kinds.setdefault(kind, []).append(call)
    chosen = []
    for of_a_kind in kinds.values():
        chosen += {of_a_kind[0]: None, of_a_kind[-1]: None}
    return chosen


def try_once(bench: Bench, work: Work, call: Call, decision: int, expected: dict) -> list[str]:
    """The problems after this call has been the last one, or has failed."""
    bench.lay_out(work)
    met = []

    def decide(other: Call) -> int | None:
        if other == call and not met:
            met.append(other)
            return decision
        return None

    ended = bench.run(work, decide)
    if not met:
        return [f"the call did not come: {ended.err[-300:]}"]
    problems = []
    if decision == KILL:
        if ended.code != KILL:
            problems.append(f"exit code {ended.code} after a kill")
    else:
        problems += check_answer(work, ended)
    again = bench.run(work)
    if again.code != 0:
        problems.append(f"the same command ends with {again.code}: {again.err[-500:]}")
    for word in ("WARNING", "Traceback"):
        if word in again.out + again.err:
            problems.append(f"the same command: {(again.out + again.err)[-500:]}")
    for problem in compare(expected, read_result(bench.place)):
        if not (problem.endswith("README.md is missing") and "has no card" in ended.out):
            problems.append(problem)
    there = {path.read_bytes() for path in bench.place.rglob("*") if path.is_file()}
    for name, content in work.precious.items():
        if content not in there:
            problems.append(f"what was in {name} before is lost")
    return problems


def check_answer(work: Work, ended: Ending) -> list[str]:
    """A call that fails is survived, or ends the command with one line and exit code 2."""
    if "Traceback" in ended.err:
        return [f"traceback: {ended.err[-700:]}"]
    if ended.code == 0:
        return []
    lines = ended.err.splitlines()
    said = [line for line in lines if line.startswith(f"{work.command}.py: ")]
    if ended.code != 2 or len(said) != 1:
        return [f"exit code {ended.code}: {ended.err[-500:]}"]
    return []


def sweep(name: str, how: str, every_call: bool, folder: Path) -> dict:
    bench = Bench(folder)
    work = prepare_work(name, bench)
    bench.lay_out(work)
    straight = bench.run(work)
    assert straight.code == 0, straight
    expected = read_result(bench.place)
    calls = straight.calls if every_call else choose(straight.calls)
    problems = []
    for number, call in enumerate(calls):
        decision = KILL
        what = "kill"
        if how == "fail":
            decision = choose_error(call, number)
            what = errno.errorcode[decision]
        for problem in try_once(bench, work, call, decision, expected):
            problems.append(f"{what} at {call.name} {call.number} of {call.path}: {problem}")
            print(problems[-1], flush=True)
    return dict(work=name, how=how, calls=len(straight.calls), trials=len(calls), problems=problems)


def import_what_is_needed(name: str) -> None:
    """Import what the command will import, so that no child has to."""
    for command in ("prepare", "train"):
        importlib.import_module(command)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder).resolve())
        work = prepare_work(name, bench)
        bench.lay_out(work)
        names = bench.folder / "names.json"
        child = os.fork()
        if child == 0:
            os.chdir(bench.place)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            importlib.import_module(work.command).main(work.arguments)
            names.write_text(json.dumps(list(sys.modules)))
            os._exit(0)
        os.waitpid(child, 0)
        for module in json.loads(names.read_text()):
            if module not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(module)


def can_trace() -> bool:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    child = os.fork()
    if child == 0:
        if libc.ptrace(TRACEME, 0, None, None):
            os._exit(CANNOT)
        stop_at_calls()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=["train", "resume", "anew", "prepare"])
    parser.add_argument("how", choices=["kill", "fail"])
    parser.add_argument("--all", action="store_true", help="every call, and not a sample of them")
    arguments = parser.parse_args()
    if not can_trace():
        print("this needs Linux on x86-64, and the permission to trace a process of one's own")
        sys.exit(CANNOT)
    # Before torch loads OpenMP: threads do not survive a fork.
    os.environ["OMP_NUM_THREADS"] = "1"
    import_what_is_needed(arguments.work)
    # Files in memory, if there are such: a real disk takes most of the time to sync.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        result = sweep(arguments.work, arguments.how, arguments.all, Path(folder).resolve())
    problems = result.pop("problems")
    print(json.dumps(result | dict(problems=len(problems))))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
