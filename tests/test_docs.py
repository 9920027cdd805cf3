"""The documents: the lines of code they point at, their links, commands, examples and drawings.

    python tests/test_docs.py        corrects the line numbers, after code has moved

A link such as [`class Block`](../model.py#L281) stands for the line that has the text between the
backticks.
"""

import contextlib
import functools
import importlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "results" / "README.md"])
FOREIGN = {"llama.cpp/convert_hf_to_gguf.py"}  # scripts of other projects

TO_CODE = re.compile(
    r"\[`([^`\n]+)`\]\(([^()\s#]+)#L(\d+)\)"
)  # what stands there, the file, the line
FENCE = re.compile(
    r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL
)  # language and content
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n *\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
BLOCK = r"((?:(?!```).*\n)*)^```"  # content up to the closing fence
EXAMPLE = re.compile(rf"^```python\n{BLOCK}\n\n?^```(?:text)?\n{BLOCK}$", re.MULTILINE)
OURS = re.compile(
    r"(?<![\w./-])(?:config|docs|results|tests)/[\w./-]*\.\w+"
)  # files of this repository


each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def code(text: str) -> Iterator[str]:
    """A document's blocks of code, and its code spans."""
    yield from (content for _, _, content in FENCE.findall(text))
    yield from (" ".join(content.split()) for _, content in SPAN.findall(FENCE.sub("", text)))


# ---- Links to lines of code ----------------------------------------------------------------------


def right_line(file: Path, text: str, line: int) -> int | None:
    """The number of the line that has the text, of several the nearest to `line`; None if no line
    has it.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    found = [number for number, content in enumerate(lines, 1) if text in content]
    return min(found, key=lambda number: abs(number - line), default=None)


def wrong_lines(document: Path) -> Iterator[str]:
    for text, target, line in TO_CODE.findall(document.read_text(encoding="utf-8")):
        right = right_line(document.parent / target, text, int(line))
        if right != int(line):
            where = (
                f"it is line {right}: python tests/test_docs.py"
                if right
                else "no line of that file has it"
            )
            yield f"{document.name}: `{text}` is not in line {line} of {target}; {where}"


@each_document
def test_links_to_code_show_the_line_they_name(document):
    assert list(wrong_lines(document)) == []


# ---- Links ---------------------------------------------------------------------------------------


def targets(text: str) -> list[str]:
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


def broken(target: str, document: Path) -> str:
    """What is wrong with a link, in words; empty if it leads somewhere."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        address = urlsplit(target)
        well_formed = address.scheme in ("http", "https") and re.fullmatch(
            r"[\w.-]+\.\w+(:\d+)?", address.netloc
        )
        return "" if well_formed else "not the address of a page"
    name, _, fragment = unquote(target).partition("#")
    file = (document.parent / name).resolve() if name else document
    if not file.is_relative_to(ROOT.resolve()) or not file.exists() or is_ignored(file):
        return "no such file in the repository"
    if re.fullmatch(r"L\d+", fragment):
        links = {
            f"{code_file}#L{line}"
            for _, code_file, line in TO_CODE.findall(document.read_text(encoding="utf-8"))
        }
        return "" if target in links else f"say what stands in that line, as [`def f`]({target})"
    return (
        "no such heading"
        if fragment and fragment not in anchors(file.read_text(encoding="utf-8"))
        else ""
    )


@each_document
def test_links_lead_somewhere(document):
    found = dict.fromkeys(targets(document.read_text(encoding="utf-8")))
    assert [f"{target}: {wrong}" for target in found if (wrong := broken(target, document))] == []


# ---- Commands ------------------------------------------------------------------------------------


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """The scripts that a block of code calls, with their arguments. Two spaces after a command
    begin a comment.
    """
    for line in block.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:\b(?:python3?|torchrun) +|^(?=\w+\.py\b))(.+)", line.strip())
        words = re.split(r"\s{2,}| [|<>&;#]", found[1])[0].split() if found else []
        while words and words[0].startswith("-") and words[0] not in ("-c", "-m"):  # torchrun's own
            words.pop(0)
        if words and words[0].endswith(".py"):
            yield words[0], words[1:]


@functools.cache
def help_of(script: str, *arguments: str) -> str:
    """What `python script ARGUMENTS --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(Path(script).stem).main([*arguments, "--help"])
    return out.getvalue()


def unknown_options(script: str, arguments: list[str]) -> list[str]:
    """The options that the script's help lacks; or the first word, if it should be a subcommand and
    is not.
    """
    text = (
        help_of(script) if arguments and "/" not in script else ""
    )  # those in folders have no options
    choices = re.search(r"^usage: \S+\s+\[-h\]\s+\{([\w,]+)\}", text)
    if choices and not arguments[0].startswith("-"):
        if arguments[0] not in choices[1].split(","):
            return arguments[:1]
        text = help_of(script, arguments[0])
    known = re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text)
    used = (word.split("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word))
    return [option for option in used if option not in known]


def wrong_commands(text: str) -> Iterator[str]:
    for block in code(text):
        yield from (
            f"{file}: no such file" for file in OURS.findall(block) if not (ROOT / file).exists()
        )
        for script, arguments in commands(block):
            if (ROOT / script).exists():
                for option in unknown_options(script, arguments):
                    # Unless the block shows how the script refuses it.
                    if not re.search(rf"^{script}: .*{option}", block, re.MULTILINE):
                        yield f"{script} has no option {option}"
            elif script not in FOREIGN and f"# {script}\n" not in text:  # nor shown in the document
                yield f"{script}: no such script"


@each_document
def test_commands_exist(document):
    """LOG.md is left out: it has the commands of its days."""
    if document.name != "LOG.md":
        assert list(wrong_commands(document.read_text(encoding="utf-8"))) == []


# ---- Examples, drawings, length ------------------------------------------------------------------


def printed(source: str) -> str:
    out = io.StringIO()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(out):
        exec(compile(source, "example", "exec"), {"__name__": "example"})
    return out.getvalue()


@pytest.mark.parametrize(
    "source, output", EXAMPLE.findall((ROOT / "docs" / "walkthrough.md").read_text())
)
def test_examples_print_what_stands_below_them(source, output):
    assert printed(source) == output


@each_document
def test_python_is_python(document):
    for _, language, content in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            compile(content, document.name, "exec")


def test_drawings_are_whole_and_shown():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for drawing in ROOT.glob("docs/*.svg"):
        root = ElementTree.parse(drawing).getroot()
        assert root.get("viewBox") and root.get("aria-label") and f"{drawing.name})" in text, (
            drawing.name
        )


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 330 and max(map(len, lines)) <= 120


def main() -> None:
    for document in DOCUMENTS:

        def correct(link: re.Match, folder: Path = document.parent) -> str:
            text, target, line = link.groups()
            return f"[`{text}`]({target}#L{right_line(folder / target, text, int(line)) or line})"

        document.write_text(
            TO_CODE.sub(correct, document.read_text(encoding="utf-8")), encoding="utf-8"
        )
    lost = [line for document in DOCUMENTS for line in wrong_lines(document)]
    print("\n".join(lost) or "all links to code are right")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
