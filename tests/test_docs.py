"""The documents: their links, commands, figures, examples and drawings.

    python tests/test_docs.py      # corrects line numbers and counted lines, after code has moved

A link such as [`class Block`](../model.py#L281) stands for the line that has the text between the
backticks.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "results" / "README.md"])
README = ROOT / "README.md"

# A link to a line of code: the text in that line, the file, the number of the line.
TO_CODE = re.compile(r"\[`([^`\n]+)`\]\(([^()\s#]+)#L(\d+)\)")
# A block of code: its indentation, language and content.
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n *\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
# The lines of a block of code.
BLOCK = r"((?:(?!```).*\n)*)^```"


each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def strip_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def blocks(text: str, language: str) -> list[str]:
    """A document's blocks of code in this language."""
    return [content for _, name, content in FENCE.findall(text) if name == language]


# ---- Links to lines of code ----------------------------------------------------------------------


def right_line(file: Path, text: str, line: int) -> int | None:
    """The number of the line that has the text, the nearest to `line` if several have it; None if
    no line has it.
    """
    if not file.is_file():
        return None
    lines = enumerate(read(file).splitlines(), 1)
    numbers = [number for number, content in lines if text in content]
    return min(numbers, key=lambda number: abs(number - line), default=None)


def wrong_lines(document: Path) -> Iterator[str]:
    for text, target, line in TO_CODE.findall(read(document)):
        right = right_line(document.parent / target, text, int(line))
        if right is None:
            yield f"{document.name}: no line of {target} has `{text}`"
        elif right != int(line):
            advice = "run python tests/test_docs.py"
            yield f"{document.name}: `{text}` is in line {right} of {target}, not {line}; {advice}"


@each_document
def test_links_to_code_show_the_line_they_name(document):
    assert list(wrong_lines(document)) == []


# ---- Links ---------------------------------------------------------------------------------------


def link_targets(text: str) -> list[str]:
    """Where a document's links and images lead, except for those in code."""
    return re.findall(r"\]\(([^()\s]+)\)", SPAN.sub("", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings: in lower case and without punctuation. No two headings of
    ours are the same.
    """
    headings = re.findall(r"^#{1,6} +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_ignored(file: Path) -> bool:
    """Whether git leaves it out; False where there is no git, or no repository."""
    command = ["git", "-C", str(ROOT), "check-ignore", "-q", str(file)]
    return bool(shutil.which("git")) and subprocess.run(command).returncode == 0


def what_is_wrong(target: str, document: Path) -> str:
    """What is wrong with a link, as a sentence; empty if it leads somewhere."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        address = urlsplit(target)
        is_host = re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", address.netloc)
        if address.scheme in ("http", "https") and is_host:
            return ""
        return "not the address of a page"
    name, _, fragment = unquote(target).partition("#")
    file = document
    if name:
        file = (document.parent / name).resolve()
    if not file.is_relative_to(ROOT.resolve()) or not file.exists() or is_ignored(file):
        return "no such file in the repository"
    if re.fullmatch(r"L\d+", fragment):
        known = [f"{path}#L{line}" for _, path, line in TO_CODE.findall(read(document))]
        if target not in known:
            return f"the text of the link must be what stands in that line: [`def f`]({target})"
    elif fragment and fragment not in anchors(read(file)):
        return "no such heading"
    return ""


@each_document
def test_links_lead_somewhere(document):
    wrong = []
    for target in link_targets(read(document)):
        sentence = what_is_wrong(target, document)
        if sentence:
            wrong.append(f"{target}: {sentence}")
    assert wrong == []


# ---- Commands ------------------------------------------------------------------------------------

# What a line of a shell block may begin with, beside python and torchrun.
OTHER_PROGRAMS = set("git cd source curl export pip ruff mypy hf vllm lm_eval".split())
FOREIGN_SCRIPTS = {"llama.cpp/convert_hf_to_gguf.py"}
COMMAND = re.compile(r"\$ |(?:python3?|torchrun|make|bash|sbatch) ")
OURS = re.compile(r"(?<![\w./-])(?:config|docs|results|tests)/[\w./-]*\.\w+")


def shell_commands(block: str) -> Iterator[list[str]]:
    """The commands of a block as a shell reads them: words, without comments and redirections.
    ValueError if a quote is not closed.
    """
    for line in block.replace("\\\n", " ").splitlines():
        # In a notebook, "!" runs a command, and "%cd" is the notebook's own.
        line = line.removeprefix("!").removeprefix("%")
        lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&;")
        lexer.whitespace_split = True
        command = []
        skip = False
        for word in lexer:
            if re.fullmatch(r"[|&;]+", word):
                yield command
                command = []
            elif re.fullmatch(r"[<>]+", word):
                skip = True
            elif skip:
                skip = False
            else:
                command.append(word)
        if command:
            yield command


class ParsedError(BaseException):
    """Raised in place of what follows a command's parser, when its arguments are right."""


def parse(program: str, main, arguments: list[str]) -> str:
    """Give the arguments to the parser in `main`, and stop there. Returns the parser's complaint,
    or "" if it has none.
    """

    def stop(method):
        def parse_and_stop(*arguments, **options):
            method(*arguments, **options)
            raise ParsedError

        return parse_and_stop

    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            method = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, stop(method))
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                main(arguments)
        except ParsedError:
            return ""
        except SystemExit as end:
            if not end.code:  # --help
                return ""
    return f"{program}: {errors.getvalue().strip()}"


def configure(arguments: list[str]) -> str:
    """What train.py says against these arguments; "" if they are right."""
    import configurator
    import train

    if "--help" in arguments:
        return ""
    try:
        configurator.configure(train.TrainConfig, arguments)
    except ValueError as error:
        return f"train.py: {error}"
    return ""


def complaint(command: list[str]) -> str:
    """What is wrong with a command, in the words of its program; "" if nothing is."""
    while command and re.match(r"\w+=", command[0]):  # a variable of the environment
        command = command[1:]
    if not command:
        return ""
    program, *arguments = command
    program = program.removeprefix(".venv/bin/")
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser()
        wrong = parse("torchrun", lambda arguments: launch.parse_args(arguments), arguments)
        if wrong:
            return wrong
        parsed = launch.parse_args(arguments)
        program = "python"
        arguments = [parsed.training_script, *parsed.training_script_args]
    if program == "sbatch":
        program = "python"
        arguments = ["train.py", *arguments[1:]]
    if program == "make":
        missing = [name for name in arguments if f"\n{name}:" not in read(ROOT / "Makefile")]
        return f"make: no such target: {missing}" if missing else ""
    if program == "bash" and arguments[0] != "-c":
        return "" if (ROOT / arguments[0]).is_file() else f"{arguments[0]}: no such script"
    if program not in ("python", "python3"):
        return "" if program in OTHER_PROGRAMS else f"{program}: unknown"
    script, *arguments = arguments
    if script in ("-c", "-m") or script in FOREIGN_SCRIPTS:
        return ""
    if not (ROOT / script).is_file():
        return f"{script}: no such script"
    if script == "train.py":
        return configure(arguments)
    if "/" in script:  # the scripts in tests/ and results/ have no options
        return ""
    return parse(script, importlib.import_module(Path(script).stem).main, arguments)


def wrong_commands(block: str) -> Iterator[str]:
    """What the shell and the programs themselves say against a block of commands."""
    for line in block.splitlines():
        # sample.py would take the words of a comment for prompts.
        if re.search(r"\S\s{2,}(?!#)\S", line):
            yield f"{line}\n    a comment must begin with #"
    if shutil.which("bash"):
        script = re.sub(r"^[!%]", "", block, flags=re.MULTILINE)
        run = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        if run.returncode:
            yield run.stderr
    for command in shell_commands(block):
        wrong = complaint(command)
        if wrong:
            yield f"{' '.join(command)}\n    {wrong}"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with our config files and the course, to which a document's own can be added."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copytree(ROOT / "docs" / "course", tmp_path / "docs" / "course")
    (tmp_path / "config" / "mine.py").touch()  # the reader's own
    monkeypatch.chdir(tmp_path)
    return tmp_path


@each_document
def test_commands_paste_and_are_understood(document, workplace):
    """Each line is read by a shell's parser, then its arguments by the program's own. LOG.md is
    left out: it has the commands of its days.
    """
    if document.name == "LOG.md":
        return
    text = read(document)
    for content in blocks(text, "python"):
        named = re.match(r"# (\w+\.py)\n", content)
        if named:
            (workplace / named[1]).write_text(content, encoding="utf-8")
    wrong = []
    for language in ("bash", "ipython"):
        for block in blocks(text, language):
            wrong += wrong_commands(block)
    assert wrong == []


@each_document
def test_commands_are_marked_as_such(document):
    """A block that shows both a command and what it prints cannot be pasted."""
    text = read(document)
    for language in ("", "text"):
        for block in blocks(text, language):
            assert not [line for line in block.splitlines() if COMMAND.match(line)]


@each_document
def test_options_and_files_in_sentences_exist(document, workplace):
    """Sentences may leave out what a command needs beside the options that they speak of."""
    if document.name == "LOG.md":
        return
    text = read(document)
    wrong = [name for name in OURS.findall(text) if not (ROOT / name).exists()]
    for _, span in SPAN.findall(FENCE.sub("", text)):
        span = " ".join(span.split())
        if COMMAND.match(span) and "..." not in span:
            (command,) = shell_commands(span)
            sentence = complaint(command)
            if not re.search("^$|are required|expected one argument", sentence):
                wrong.append(f"{span}: {sentence}")
    assert wrong == []


def docstring_blocks(path: Path) -> Iterator[str]:
    """The paragraphs of a file's docstring that are commands."""
    docstring = ast.get_docstring(ast.parse(read(path))) or ""
    for paragraph in re.split(r"\n\s*\n", docstring):
        block = inspect.cleandoc(paragraph)
        if COMMAND.match(re.sub(r"\A(#.*\n)+", "", block)):
            yield block


WITH_DOCSTRINGS = sorted(
    [
        *ROOT.glob("*.py"),
        *ROOT.glob("config/*.py"),
        *ROOT.glob("docs/course/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("results/**/*.py"),
    ]
)


@pytest.mark.parametrize("path", WITH_DOCSTRINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_docstrings_paste(path, workplace):
    wrong = []
    for block in docstring_blocks(path):
        wrong += wrong_commands(block)
    assert wrong == []


def test_what_make_prints_pastes(workplace):
    makefile = read(ROOT / "Makefile")
    wrong = [*wrong_commands("\n".join(re.findall(r"^#     (make .+)$", makefile, re.MULTILINE)))]
    after = makefile.partition("== next:")[2].partition("\n\n")[0]
    printed = re.findall(r'^\t@echo "(.+)"$', after, re.MULTILINE)
    assert len(printed) >= 4
    wrong += wrong_commands("\n".join(printed))
    assert wrong == []


@pytest.mark.parametrize(
    "block",
    [
        "python sample.py -i      write with the model",
        "python train.py config/quickstart.py      what it does",
        "python train.py config/quickstart.py --learning_rte=1e-3",
        "python bench.py plan --gpu",
        "python bench.py plot",
        "python hellaswag.py --style harnes",
        "torchrun --standalone --nproc_per_machine=8 train.py",
        "torchrun --standalone --nproc_per_node=8 train.py config/nothing.py",
        "python nothing.py",
        "make everything",
        'python sample.py -p "Hello',
        "it trains a model",
    ],
)
def test_a_wrong_command_is_seen(block, workplace):
    try:
        assert list(wrong_commands(block))
    except ValueError:
        assert block.count('"') == 1


def test_the_mistakes_that_readme_shows(workplace):
    """The arguments in the sentence above the block give the messages in the block."""
    text = read(README)
    (shown,) = [block for block in blocks(text, "text") if block.startswith("train.py: ")]
    arguments = re.search(r"`(--learning_rte.+?)`", text)[1].split()
    said = configure(arguments).removeprefix("train.py: ")
    assert said.splitlines() == shown.replace("train.py: ", "").splitlines()


# ---- Figures -------------------------------------------------------------------------------------


@functools.cache
def records(file: str, kind: str) -> list[dict]:
    """The records of this kind in a file of results/, in their order."""
    everything = [json.loads(line) for line in read(ROOT / "results" / file).splitlines()]
    return [record for record in everything if record.get("kind", "train") == kind]


def losses(run: str) -> list[dict]:
    """A run's records of validation."""
    return records(f"{run}/metrics.jsonl", "val")


def measured(name: str) -> dict:
    """The rows of a result of bench.py."""
    return json.loads(read(ROOT / "results" / name))["rows"]


def peers_sentences() -> Iterator[str]:
    """The rows of README's tables of speed, from results/peers/cpu.json. The best is bold."""
    rows = measured("peers/cpu.json")
    trained = ["ours", "nanoGPT", "nanoGPT, bf16", "build-nanogpt", "transformers"]

    def line(label: str, column: str, decimals: int, per: float = 1, best=min) -> str:
        figures = {name: rows[name][column] / per for name in trained if column in rows[name]}
        cells = []
        for name in trained:
            cell = ""
            if name in figures:
                cell = f"{figures[name]:.{decimals}f}"
                if figures[name] == best(figures.values()):
                    cell = f"**{cell}**"
                if column == "GB" and name == "build-nanogpt":
                    cell += ", no save"
            cells.append(cell)
        return f"| {label} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")

    yield line("a training step of 1,024 tokens, s", "ms a step", 2, per=1000)
    yield line("start of the program to the end of a step, s", "start s", 1)
    yield line("the same, resumed, s", "resume s", 1)
    yield line("most memory, with a save, GB", "GB", 2)
    yield line("HellaSwag, tasks/s", "tasks/s", 1, best=max)
    yield line("text to token files, MB/s", "MB/s", 1, best=max)

    rates = {name: row["tokens/s"] for name, row in rows.items() if "tokens/s" in row}
    for name, rate in rates.items():
        shown = f"**{rate:.0f}**" if rate == max(rates.values()) else f"{rate:.0f}"
        yield f"| {GENERATES[name]} | {shown} |"
    llama = rates["ours"] / rates["llama.cpp"]
    openvino = rates["ours"] / rates["OpenVINO"]
    int8 = rates["ours, int8"] / rates["CTranslate2, int8"]
    yield f"generates {llama:.1f} times as fast as llama.cpp and {openvino:.1f} times as fast as"
    yield f"with 8-bit weights {int8:.1f} times as fast as CTranslate2"


# The programs that generate, and how README names them.
GENERATES = {
    "ours": "here, bf16",
    "ours, int8": "here, `--dtype=int8`",
    "nanoGPT": "nanoGPT, fp32, without a cache",
    "transformers": "`transformers`, bf16",
    "llama.cpp": "llama.cpp, bf16",
    "CTranslate2": "CTranslate2, fp32",
    "CTranslate2, int8": "CTranslate2, int8",
    "ONNX Runtime": "ONNX Runtime, fp32 (optimum)",
    "OpenVINO": "OpenVINO, as it chooses (optimum)",
}


def readme_sentences() -> Iterator[str]:
    quickstart = losses("quickstart")
    for record in (quickstart[0], quickstart[-1]):
        bits = record["val_bpb"]
        yield f"step {record['step']} | val loss {record['loss']:.4f} ({bits:.4f} bits a byte)"
    yield f"| {quickstart[-1]['val_bpb'] * math.log(2):.3f} a byte, Python |"
    yield f"| {losses('shakespeare')[-1]['loss']:.3f} a byte |"
    yield f"ends at {losses('shakespeare')[-1]['loss']:.2f} nats a byte"

    run = records("books/metrics.jsonl", "run")[0]
    score = records("books/metrics.jsonl", "hellaswag")[-1]
    tokens = losses("books")[-1]["step"] * run["settings"]["total_batch_size"]
    yield (
        f"| [books](results/books/report.md), {run['parameters'] / 1e6:.1f}M | "
        f"{tokens / 1e6:.1f}M | {losses('books')[-1]['loss']:.3f} a token | "
        f"{score['acc_norm']:.3f} of {score['n']:,} |"
    )
    yield f"reads {tokens / 1e6:.1f}M tokens of old books"

    tuned = losses("finetune_books")
    yield f"before: {tuned[0]['loss']:.2f} "
    yield f"after: {tuned[-1]['loss']:.2f}"
    yield from peers_sentences()


def course_sentences() -> Iterator[tuple[str, str]]:
    """Sentences of the course: the chapter, and what must stand in it."""
    yield "05-loss.md", f"its first validation loss is {losses('quickstart')[0]['loss']:.3f}"
    settings = records("quickstart/metrics.jsonl", "run")[0]["settings"]
    variance = 0.02**2 * settings["n_embd"]
    yield "05-loss.md", f"= {math.log(4096) + variance / 2:.3f}$"
    ladder = measured("cpu/ladder.json")
    rungs = {"1,000 ms": "float32", "300 ms": "bf16 autocast", "90 ms": "fused AdamW"}
    for a100, name in rungs.items():
        yield "07-speed.md", f"| {a100} | {ladder[name]['ms']:,.0f} ms |"
    compiled = records("books/metrics.jsonl", "train")
    seconds = (compiled[0]["ms"] - compiled[1]["ms"]) / 1000
    yield "07-speed.md", f"compiling took {seconds:.0f} s at the first step of the [run on books]"
    yield (
        "09-large-batches.md",
        f"Four micro-steps took {ladder['4 micro-steps']['ms'] / 1000:.1f} s where one took "
        f"{ladder['fused AdamW']['ms'] / 1000:.1f}",
    )
    step = measured("cpu/train_8.json")
    yield (
        "11-memory.md",
        f"takes {step['ours']['ms'] / 1000:.1f} s, where `transformers` takes "
        f"{step['transformers']['ms'] / 1000:.1f}",
    )
    half = [losses(f"muon/final_muon_500_{seed}")[-1]["loss"] for seed in (1, 2, 3)]
    full = [losses(f"muon/final_adamw_1000_{seed}")[-1]["loss"] for seed in (1, 2, 3)]
    yield (
        "12-muon.md",
        f"it ends at {min(half):.2f} to {max(half):.2f}, "
        f"AdamW with all of them at {min(full):.2f} to {max(full):.2f}",
    )


def other_sentences() -> Iterator[tuple[str, str]]:
    """Sentences of other files: the file, and what must stand in it."""
    books = records("books/metrics.jsonl", "run")[0]["data"]
    yield "config/books.py", f"{books['documents']} books of Project Gutenberg"
    yield "config/books.py", f"{books['train_tokens'] / 1e6:.0f}M training tokens"
    loss = losses("shakespeare")[-1]["loss"]
    yield "config/shakespeare.py", f"validation loss of {loss:.2f} nats a byte"
    ours = records("curves/ours.jsonl", "train")
    theirs = records("curves/transformers.jsonl", "train")
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    row = f"| `transformers` and torch | AdamW, 1e-3 | {largest:.1e} |".replace("e-0", "e-")
    yield "results/README.md", row


def test_figures_are_those_of_the_results():
    """A sentence is built from the figures in results/ and must stand in the document."""
    expected = list(other_sentences())
    for sentence in readme_sentences():
        expected.append(("README.md", sentence))
    for chapter, sentence in course_sentences():
        expected.append((f"docs/course/{chapter}", sentence))
    missing = []
    for name, sentence in expected:
        if sentence not in " ".join(read(ROOT / name).split()):
            missing.append(f"{name}: {sentence}")
    assert missing == []


def test_tables_of_results_are_what_bench_prints(capsys):
    """Below `python bench.py show FILE` stands what it prints."""
    import bench

    text = read(ROOT / "docs" / "speed.md")
    shown = re.findall(rf"^python bench.py show (\S+)\n```\n```text\n{BLOCK}$", text, re.MULTILINE)
    assert len(shown) == 4
    for file, table in shown:
        bench.main(["show", str(ROOT / file)])
        printed = capsys.readouterr().out
        assert strip_lines(printed) == strip_lines(table), file


# ---- Counted lines -------------------------------------------------------------------------------

LOADED = re.compile(r"(\| what `train.py` loads \| )(\d+) files, ([\d,]+) lines")


def loaded_files(script: str) -> set[Path]:
    """A script and all files of ours that it imports, directly or not, also inside functions."""
    files = set()
    waiting = [ROOT / script]
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        names = []
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names.append(node.module)
                names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            module = ROOT / name.replace(".", "/")
            for file in (module.with_suffix(".py"), module / "__init__.py"):
                if file.is_file():
                    waiting.append(file)
    return files


def count_lines(files: set[Path]) -> int:
    return sum(len(read(path).splitlines()) for path in files)


def test_readme_counts_what_train_loads():
    """To within 3 %, so that not every commit must change README."""
    files = loaded_files("train.py")
    _, n_files, n_lines = LOADED.search(read(README)).groups()
    assert int(n_files) == len(files), "run python tests/test_docs.py"
    assert int(n_lines.replace(",", "")) == pytest.approx(count_lines(files), rel=0.03)


def test_each_row_of_survival_names_tests_that_exist():
    existing = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        existing |= set(re.findall(r"^def test_(\w+)", read(path), re.MULTILINE))
    table = read(ROOT / "docs" / "survival.md").split("tests: `test_` and |")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(\w+)`", re.split(r"(?<!\\)\|", row)[4])
        assert names, row
        assert set(names) <= existing, row


def test_readme_names_every_file():
    section = read(README).partition("\n## Files\n")[2].partition("\n## ")[0]
    table = "\n".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("parts/[a-z]*")]:
        assert path.relative_to(ROOT).as_posix() in table


# ---- Python, drawings, width -------------------------------------------------------------------


@each_document
def test_python_is_python(document):
    for content in blocks(read(document), "python"):
        compile(content, document.name, "exec")


def test_drawings_are_whole_and_shown():
    text = "".join(read(document) for document in DOCUMENTS)
    for drawing in ROOT.glob("docs/**/*.svg"):
        root = ElementTree.parse(drawing).getroot()
        assert root.get("viewBox"), drawing.name
        assert root.get("aria-label"), drawing.name
        assert f"{drawing.name})" in text, drawing.name


def test_readme_is_not_wider_than_a_page():
    assert max(len(line) for line in read(README).splitlines()) <= 120


def main() -> None:
    for document in DOCUMENTS:

        def correct(link: re.Match, folder: Path = document.parent) -> str:
            text, target, line = link.groups()
            right = right_line(folder / target, text, int(line)) or line
            return f"[`{text}`]({target}#L{right})"

        text = TO_CODE.sub(correct, read(document))
        if document == README:
            files = loaded_files("train.py")
            count = f"{len(files)} files, {count_lines(files):,} lines"
            text = LOADED.sub(rf"\g<1>{count}", text)
        document.write_text(text, encoding="utf-8")
    lost = [line for document in DOCUMENTS for line in wrong_lines(document)]
    print("\n".join(lost) or "all links to code are right")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
