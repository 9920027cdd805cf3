"""The documents: the lines of code they point at, their links, commands, examples and drawings.

    python tests/test_docs.py        corrects the line numbers, after code has moved

A link such as [`class Block`](../model.py#L281) stands for the line that has the text between the backticks.
"""

import contextlib
import functools
import importlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOREIGN = {"llama.cpp/convert_hf_to_gguf.py"}  # scripts of other projects

TO_CODE = re.compile(r"\[`([^`\n]+)`\]\(([^()\s#]+)#L(\d+)\)")  # what stands there, the file, the line
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)  # language and content
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n *\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
BLOCK = r"((?:(?!```).*\n)*)^```"  # what stands in one, to its end
EXAMPLE = re.compile(rf"^```python\n{BLOCK}\n\n?^```(?:text)?\n{BLOCK}$", re.MULTILINE)
OURS = re.compile(r"(?<![\w./-])(?:config|docs|results|tests)/[\w./-]*\.\w+")  # files of this repository


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "results" / "README.md"])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", "x", match[0])


def prose(text: str) -> str:
    """A document with its code made unreadable, at the same length: no links and headings are found in it."""
    return SPAN.sub(blank, FENCE.sub(blank, text))


def code(text: str) -> Iterator[str]:
    """A document's blocks of code, and its code spans."""
    yield from (content for _, _, content in FENCE.findall(text))
    yield from (" ".join(content.split()) for _, content in SPAN.findall(FENCE.sub("", text)))


def no_mistakes(found: Iterable[str]) -> None:
    found = list(found)
    assert not found, "\n".join(["", *found])


# ---- Links to lines of code ------------------------------------------------------------------------------------------


@functools.cache
def lines_of(file: Path) -> tuple[str, ...]:
    return tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()


def right_line(file: Path, text: str, line: int) -> int | None:
    """The number of the line that has the text, of several the nearest to `line`; None if no line has it."""
    found = [number for number, content in enumerate(lines_of(file), 1) if text in content]
    return min(found, key=lambda number: abs(number - line), default=None)


def wrong_lines(document: Path) -> Iterator[str]:
    for text, target, line in TO_CODE.findall(document.read_text(encoding="utf-8")):
        right = right_line(document.parent / target, text, int(line))
        if right != int(line):
            where = f"it is line {right}: python tests/test_docs.py" if right else "no line of that file has it"
            yield f"{document.name}: `{text}` is not in line {line} of {target}; {where}"


def with_right_lines(document: Path) -> str:
    """The document's text with all line numbers corrected that can be."""

    def correct(link: re.Match) -> str:
        text, target, line = link.groups()
        return f"[`{text}`]({target}#L{right_line(document.parent / target, text, int(line)) or line})"

    return TO_CODE.sub(correct, document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_links_to_code_show_the_line_they_name(document):
    no_mistakes(wrong_lines(document))


# ---- Links -----------------------------------------------------------------------------------------------------------


def targets(text: str) -> list[str]:
    """Where a document's links and images lead, in Markdown and in HTML."""
    text = prose(text)
    found = re.findall(r"\]\(<?([^()\s>]+)>?(?:\s+\"[^\"\n]*\")?\)", text)
    found += re.findall(r"^ {0,3}\[[^\]\n]+\]:\s+<?([^\s>]+)", text, re.MULTILINE)
    for tag in re.findall(r"<(?:img|a|source)\b[^>]*>", text):
        found += re.findall(r"\b(?:src|srcset|href)=\"([^\"\s]+)", tag)
    return found


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings: in lower case, without punctuation, and repeated ones with a number."""
    text = FENCE.sub(blank, text)
    found = set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))
    counts: dict[str, int] = {}
    for heading in re.findall(r"^ {0,3}#{1,6} +(.+?)(?: +#+)? *$", text, re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        unique = name
        while unique in counts:
            counts[name] += 1
            unique = f"{name}-{counts[name]}"
        counts[unique] = 0
        found.add(unique)
    return found


def ignored(files: set[Path], root: Path) -> set[Path]:
    """Those that git leaves out; none where there is no git, or no repository."""
    try:
        command = ["git", "-C", str(root), "check-ignore", "--stdin", "-z"]
        run = subprocess.run(command, input="\0".join(map(str, files)), capture_output=True, text=True)
    except FileNotFoundError:
        return set()
    return {Path(name) for name in run.stdout.split("\0") if name}


def broken(target: str, document: Path, root: Path) -> str:
    """What is wrong with a link, in words; nothing if it leads somewhere."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        address = urlsplit(target)
        well_formed = address.scheme in ("http", "https") and re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", address.netloc)
        return "" if well_formed else "not the address of a page"
    name, _, fragment = unquote(target).partition("#")
    file = (document.parent / name).resolve() if name else document.resolve()
    if not file.is_relative_to(root.resolve()):
        return "outside of the repository"
    if not file.exists():
        return "no such file"
    if ignored({file}, root):
        return "not in the repository, as .gitignore has it"
    if not fragment or re.fullmatch(r"L\d+", fragment):  # for lines see below
        return ""
    known = anchors(file.read_text(encoding="utf-8")) if file.suffix == ".md" else set()
    return "" if fragment in known else "no such heading"


def broken_links(document: Path, root: Path = ROOT) -> Iterator[str]:
    text = document.read_text(encoding="utf-8")
    for target in dict.fromkeys(targets(text)):
        if wrong := broken(target, document, root):
            yield f"{document.name}: {target}: {wrong}"
    checked = {f"{file}#L{line}" for _, file, line in TO_CODE.findall(text)}
    for target in targets(text):
        if re.search(r"#L\d", target) and target not in checked:
            yield f"{document.name}: {target}: say what stands in that line, as [`def f`]({target})"


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_links_lead_somewhere(document):
    no_mistakes(broken_links(document))


# ---- Commands --------------------------------------------------------------------------------------------------------


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """The scripts that a block of code calls, with their arguments. What is two spaces behind a command explains it."""
    for line in block.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:\b(?:python3?|torchrun) +|^(?=\w+\.py\b))(.+)", line.strip())
        command = re.split(r"\s{2,}| [|<>&;#]", found[1])[0] if found else ""
        try:
            words = shlex.split(command)
        except ValueError:  # quotes within an explanation
            words = command.split()
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


def help_for(script: str, arguments: list[str]) -> str:
    """The same, of the command within it that is meant, where it has several; of one that it lacks, nothing."""
    choices = re.search(r"^usage: \S+\s+\[-h\]\s+\{([\w,]+)\}", help_of(script))
    if choices and arguments and not arguments[0].startswith("-"):
        return help_of(script, arguments[0]) if arguments[0] in choices[1].split(",") else ""
    return help_of(script)


def unknown_options(script: str, arguments: list[str], help_for: Callable = help_for) -> list[str]:
    """The options that the script's help does not have; the first word, where that should be a command and is none."""
    text = help_for(script, arguments) if arguments else ""
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text))
    used = [word.split("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)] if text else arguments[:1]
    return [option for option in used if option not in known]


def wrong_commands(text: str, root: Path = ROOT, help_for: Callable = help_for) -> Iterator[str]:
    for block in code(text):
        yield from (f"{file}: no such file" for file in OURS.findall(block) if not (root / file).exists())
        for script, arguments in commands(block):
            if (root / script).exists():
                for option in unknown_options(script, arguments, help_for):
                    # Unless the block shows how the script refuses it.
                    if not re.search(rf"^{script}: .*{option}", block, re.MULTILINE):
                        yield f"{script} has no option {option}"
            elif script not in FOREIGN and f"# {script}\n" not in text:  # nor shown in the document
                yield f"{script}: no such script"


@pytest.mark.parametrize("document", [path for path in documents() if path.name != "LOG.md"], ids=name_of)
def test_commands_exist(document):
    """LOG.md is left out: it has the commands of its days."""
    no_mistakes(wrong_commands(document.read_text(encoding="utf-8")))


# ---- Examples and drawings -------------------------------------------------------------------------------------------


def printed(source: str) -> str:
    out = io.StringIO()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(out):
        exec(compile(source, "example", "exec"), {"__name__": "example"})
    return out.getvalue()


@pytest.mark.parametrize("source, output", EXAMPLE.findall((ROOT / "docs" / "walkthrough.md").read_text()))
def test_examples_print_what_stands_below_them(source, output):
    assert printed(source) == output


@pytest.mark.parametrize("document", documents(), ids=name_of)
def test_python_is_python(document):
    for _, language, content in FENCE.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            compile(content, document.name, "exec")


@pytest.mark.parametrize("drawing", sorted(ROOT.glob("docs/*.svg")), ids=name_of)
def test_drawings_are_whole_and_shown(drawing):
    root = ElementTree.parse(drawing).getroot()
    assert root.get("viewBox") and root.get("aria-label")
    assert any(f"{drawing.name})" in path.read_text() or f'{drawing.name}"' in path.read_text() for path in documents())


# ---- The command -----------------------------------------------------------------------------------------------------


def main() -> None:
    for document in documents():
        before, after = document.read_text(encoding="utf-8"), with_right_lines(document)
        if after != before:
            document.write_text(after, encoding="utf-8")
            n = sum(a != b for a, b in zip(TO_CODE.findall(before), TO_CODE.findall(after)))
            print(f"{name_of(document)}: {n} line numbers corrected")
    lost = [line for document in documents() for line in wrong_lines(document)]
    print("\n".join(lost) or "all links to code are right")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
