"""Settings: precedence, types, and every mistake named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import train
from configurator import configure, help_text, out_of_bounds, parse, setting

import pytest


@dataclass(frozen=True)
class Toy:
    # Numbers
    steps: int = 10  # how many
    learning_rate: float = 0.1  # how fast
    min_lr: float = 0.01  # how slow

    # The rest
    name: str = "toy"  # what it is called
    note: str | None = None  # anything
    fast: bool = False  # whether
    mode: Literal["auto", True, False] = "auto"  # which

    def mistakes(self) -> list[str]:
        return ["steps is odd"] if self.steps % 2 else []


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_files_stack_and_flags_come_last(tmp_path):
    one = write(tmp_path / "one.py", "learning_rate = 1.0\nsteps = 2\nmin_lr = learning_rate / 10")
    two = write(
        tmp_path / "two.py", "import math\n_half = steps / 2\nsteps = int(math.sqrt(4 * _half * 4))"
    )
    assert configure(Toy, []) == Toy()
    assert configure(Toy, ["--steps=8", one, two]) == Toy(steps=8, learning_rate=1.0, min_lr=0.1)
    assert configure(Toy, [one, two]).steps == 4


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--steps=1_000", "steps", 1000),
        ("--name=a=b", "name", "a=b"),
        ("--name='1'", "name", "'1'"),
        ("--name=", "name", ""),
        ("--note=None", "note", None),
        ("--note=1", "note", "1"),
        ("--fast=true", "fast", True),
        ("--mode=False", "mode", False),
        ("--mode=auto", "mode", "auto"),
    ],
)
def test_flags_become_values(flag, name, value):
    got = getattr(configure(Toy, [flag]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--step=4", "--step=4: there is no setting 'step': did you mean steps?"),
        (
            "--learning-rat=1",
            "--learning-rat=1: there is no setting 'learning_rat': did you mean learning_rate?",
        ),
        ("--steps=2.0", "--steps=2.0: steps takes an int, not 2.0"),
        ("--steps=True", "--steps=True: steps takes an int, not True"),
        ("--steps=many", "--steps=many: steps takes an int, not 'many'"),
        ("--learning_rate=True", "--learning_rate=True: learning_rate takes a float, not True"),
        ("--fast=1", "--fast=1: fast takes True or False, not 1"),
        ("--mode=1", "--mode=1: mode takes 'auto', True or False, not 1"),
        ("--steps", "--steps: settings are written --key=value: did you mean steps?"),
        ("-p", "-p: settings are written --key=value"),
        ("--steps=3", "steps is odd"),
        (
            "nowhere.py",
            "nowhere.py: no such config file. A config file is Python, a setting is --key=value",
        ),
    ],
)
def test_each_mistake_is_named(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no file has a similar name
    with pytest.raises(ValueError) as error:
        configure(Toy, argument.split())
    assert str(error.value) == message


def test_mistakes_in_files_are_named_with_the_file(tmp_path):
    path = write(tmp_path / "bad.py", "stepps = 3\nfast = 1\nname = 'ok'")
    with pytest.raises(ValueError) as error:
        configure(Toy, [path, "--zzz=1"])
    assert str(error.value).splitlines() == [
        f"{path}: fast = 1: fast takes True or False, not 1",
        f"{path}: stepps = 3: there is no setting 'stepps': did you mean steps?",
        "--zzz=1: there is no setting 'zzz'",
    ]


def test_files_that_fail_are_named_with_the_line(tmp_path):
    raises = write(tmp_path / "raises.py", "steps = 2\nsteps = 1 / 0\n")
    syntax = write(tmp_path / "syntax.py", "steps = 2\nsteps = = 3\n")
    leaves = write(tmp_path / "leaves.py", "raise SystemExit('two\\nlines')")
    with pytest.raises(ValueError) as error:
        configure(Toy, [raises, syntax, leaves, str(tmp_path)])
    assert str(error.value).splitlines() == [
        f"{raises}, line 2: ZeroDivisionError: division by zero",
        f"{syntax}: SyntaxError: invalid syntax (syntax.py, line 2)",
        f"{leaves}, line 1: SystemExit: two lines",
        f"{tmp_path}: no such config file. A config file is Python, a setting is --key=value",
    ]
    with pytest.raises(ValueError, match=r"did you mean .*syntax.py\?"):
        configure(Toy, [str(tmp_path / "sintax.py")])


def test_help_shows_every_setting_with_its_comment():
    """Help is read from the source of the dataclass: a line that the pattern misses would vanish
    from it.
    """
    text = help_text(train.TrainConfig)
    for name, default in vars(train.TrainConfig()).items():
        line = next(line for line in text.splitlines() if line.startswith(f"  --{name}="))
        shown, meaning = line.split("=", 1)[1].split("  ", 1)
        assert parse(shown.strip(), get_type_hints(train.TrainConfig)[name]) == default, line
        assert len(meaning.strip()) > 5, line


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("config/*.py")), ids=lambda path: path.stem
)
def test_every_config_file_is_right(path):
    config = configure(train.TrainConfig, [str(path)])
    assert train.sequences_per_process(config, world_size=1) >= 1


def test_a_type_that_cannot_be_set_is_refused_at_once():
    @dataclass
    class Scales:
        scales: tuple[float, ...] = (1.0, 0.5)

    with pytest.raises(ValueError, match=r"setting scales has the type tuple.*int, float, bool"):
        configure(Scales, [])


def test_bounds_follow_the_default():
    """A number that is not negative stays so, and only the bound that is broken is named."""

    @dataclass
    class Bounds:
        plain: float = 1.0
        negative: float = -1.0
        share: float = setting(0.9, below=1)

    assert out_of_bounds(Bounds(plain=-1.0)) == ["plain is -1.0: it must be at least 0"]
    assert out_of_bounds(Bounds(negative=-5.0)) == []
    assert out_of_bounds(Bounds(share=1.0)) == ["share is 1.0: it must be below 1"]


@pytest.mark.parametrize(
    "argv, changes",
    [
        (["--steps", "8"], dict(steps=8)),
        (["--learning-rate=2"], dict(learning_rate=2.0)),
        (["--min-lr", "-1"], dict(min_lr=-1.0)),
        (["--lr", "3e-4"], dict(learning_rate=3e-4)),
        (["--name", "a b", "--fast", "true"], dict(name="a b", fast=True)),
        (["--name=a-b", "--note", "c-d=e"], dict(name="a-b", note="c-d=e")),
    ],
)
def test_spaces_hyphens_and_lr_are_understood(argv, changes):
    assert configure(Toy, argv) == Toy(**changes)


def test_a_config_file_is_no_value_and_a_forgotten_dash_is_named(tmp_path):
    file = write(tmp_path / "one.py", "steps = 6")
    assert configure(Toy, ["--name=x", file]).steps == 6
    with pytest.raises(ValueError, match=r"^--fast: settings are written --key=value: did you mea"):
        configure(Toy, ["--fast", file])
    with pytest.raises(
        ValueError, match=r"^steps=4: no such config file: did you mean --steps=4\?"
    ):
        configure(Toy, ["steps=4"])
    with pytest.raises(ValueError, match=r"^--step 4: there is no setting 'step': did you mean st"):
        configure(Toy, ["--step", "4"])
