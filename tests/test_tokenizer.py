"""Learned vocabularies: ids, what a text becomes, where they travel, and what damages them."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOY_MODEL, clean_environment
from hypothesis import given, settings
from hypothesis import strategies as st

import hellaswag
import prepare
import sample
import train
from model import GPT, GPTConfig
from parts import checkpoint, data
from parts import tokenizer as tokenizer_room
from parts.inference import Text, complete
from parts.metrics import read_metrics, select
from parts.pretrained import checkpoints
from parts.report import write_markdown
from parts.tokenizer import (
    END_OF_TEXT,
    TOKENIZERS,
    LearnedTokenizer,
    get_tokenizer,
    learn_tokenizer,
    sample_texts,
    segments,
    tokenizer_of_model,
)

CODE = (
    "class Shape:\n    def __init__(self, name, n=12):\n        self.name = name\n\n    def area(self):\n"
    "        if self.n > 3:\n            return self.name, [x_1 for x_1 in range(self.n)]\n"
    "        raise Error('no')\n\n\n"
)


def drawn(words: list[str], joint: str, n: int, seed=0) -> str:
    rng = random.Random(seed)
    return joint.join(rng.choice(words) for _ in range(n))


GERMAN = "Die Straßenbahn fährt über die große Brücke zum Bahnhof, während Gäste im Wirtshaus Brötchen essen.".split()
JAPANESE = [
    "私は",
    "東京に",
    "住んで",
    "います。",
    "昨日、",
    "図書館で",
    "本を",
    "読みました。",
    "とても",
    "面白かった\n",
]
GENES = [drawn("ACGT", "", 12, seed) for seed in range(40)]
TEXTS = {
    "code": CODE * 20,
    "German": drawn(GERMAN, " ", 3000),
    "Japanese": drawn(JAPANESE, "", 3000),
    "DNA": drawn(GENES, "", 3000),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, LearnedTokenizer]:
    return {
        name: LearnedTokenizer(learn_tokenizer([text.encode()], 330))
        for name, text in TEXTS.items()
    }


# ---- Ids -----------------------------------------------------------------------------------------

SPACE = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\n    ",
    "\x85",
    "\xa0",
    "\u2009",
    "\u2028",
    "\u3000",
]
WORDS = [
    "word",
    "def",
    "self.name",
    "don't",
    "naïve",
    "e\u0301",
    "नमस्ते",
    "漢字。",
    "☃",
    "12",
    "! ?",
    "):",
    "_",
    "<|endoftext|>",
]
some_text = st.one_of(
    st.text(), st.lists(st.sampled_from([*WORDS, *SPACE, *GENES[:3], *JAPANESE])).map("".join)
)


@settings(max_examples=300)
@given(some_text)
def test_ids_equal_those_of_the_tokenizers_library(tokenizers, text):
    from tokenizers import Tokenizer

    text = text.encode("utf-8", errors="replace").decode()  # lone surrogates are no text
    for ours in tokenizers.values():
        theirs, ids = Tokenizer.from_str(ours.content), ours.encode(text)
        if END_OF_TEXT not in text:  # there it is our token; here, what stands in a text is text
            assert ids.tolist() == theirs.encode(text).ids
        assert (
            ids.dtype == np.uint16
            and (ids < ours.end_of_text).all()
            and ours.decode(ids.tolist()) == text
        )


@settings(max_examples=30)
@given(st.data())
def test_ids_are_equal_for_vocabularies_of_few_characters(draw):
    """Runs and repetitions, where one token could come from several merges."""
    from tokenizers import Tokenizer

    characters = draw.draw(st.sampled_from(["ab", "a ", "=\n a", "AC GT", "あ。\n", "aa aab"]))
    words = st.text(characters, min_size=1, max_size=9)
    text = "".join(
        random.Random(0).choices(draw.draw(st.lists(words, min_size=1, max_size=8)), k=4000)
    )
    try:
        content = learn_tokenizer([text.encode()], 330)
    except ValueError as error:
        content = learn_tokenizer(
            [text.encode()], int(re.search(r"enough for (\d+)", str(error))[1])
        )
    ours, theirs = LearnedTokenizer(content), Tokenizer.from_str(content)
    for other in draw.draw(st.lists(st.text(characters, max_size=50), max_size=20)):
        assert ours.encode(other).tolist() == theirs.encode(other).ids


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*WORDS, *SPACE])), st.integers(2, 30))
def test_segments_tokenise_as_the_whole(tokenizers, parts, size):
    text, code = "".join(parts), tokenizers["code"]
    raw, encode = text.encode(), code.encoding.encode_ordinary
    breaks = [match.start() for match in code.breaks.finditer(raw)]
    signs = [
        i
        for i in range(1, len(text))
        if text[i] == "\n" and re.fullmatch(r"[!-/:-@\[-`{-~]", text[i - 1])
    ]
    places = [
        i
        for i in range(1, len(text))
        if text[i] in " \n" and not text[i - 1].isspace() and i not in signs
    ]
    assert breaks == [len(text[:i].encode()) for i in places]
    for at in breaks:
        assert encode(raw[:at].decode()) + encode(raw[at:].decode()) == encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_room, "PIECE_BYTES", 2 * size)
        pieces, ids = (
            list(segments(raw, 0, len(raw), code.breaks, size)),
            code.encode(text).tolist(),
        )
    assert b"".join(pieces) == raw and code.decode(ids) == text
    if {sum(map(len, pieces[:n])) for n in range(1, len(pieces))} <= set(breaks):
        assert ids == encode(text)


@pytest.mark.parametrize(
    "run", ["a", " ", "\n", " \t", "漢", "e\u0301", "=-", "=\n", "ACGT", " " * 999 + "x"], ids=ascii
)
def test_long_runs_neither_panic_nor_stall(tokenizers, run):
    """More than a segment in one run, also with another character at its end."""
    for text in (
        run * (1_100_000 // len(run.encode())),
        run * (1_000_000 // len(run.encode())) + "x",
    ):
        assert tokenizers["code"].decode(tokenizers["code"].encode(text).tolist()) == text


def test_the_same_text_gives_the_same_vocabulary_on_any_number_of_threads(tmp_path):
    (tmp_path / "text").write_text(TEXTS["German"] + TEXTS["code"], encoding="utf-8")
    script = "import sys; from parts.tokenizer import *; print(end=learn_tokenizer([open(sys.argv[1], 'rb').read()], 330))"
    made = set()
    for threads in ("1", "5"):
        environment = clean_environment() | dict(RAYON_NUM_THREADS=threads)
        command = [sys.executable, "-c", script, str(tmp_path / "text")]
        made.add(
            subprocess.run(
                command, env=environment, capture_output=True, check=True
            ).stdout.decode()
        )
    assert made == {learn_tokenizer([(tmp_path / "text").read_bytes()], 330)}


# ---- What a text becomes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["German", "Japanese", "DNA"])
def test_any_script_takes_fewer_tokens_than_with_gpt2(tokenizers, name):
    """Lossless, and more bytes a token than GPT-2's 50,257 tokens, with 330."""
    text, ours = TEXTS[name], tokenizers[name]
    ids = ours.encode(text)
    assert ours.decode(ids.tolist()) == text
    assert len(ids) < 0.8 * len(get_tokenizer("gpt2").encode(text))


def test_a_new_line_and_its_indentation_are_one_token(tokenizers):
    code = tokenizers["code"]
    tokens = [code.decode([i]) for i in code.encode(CODE).tolist()]
    assert {"):\n        ", "\n\n    ", "self", ".name", ":\n            "} <= set(tokens)


def test_the_sample_is_even_and_bounded(monkeypatch):
    monkeypatch.setattr(tokenizer_room, "SAMPLE_BYTES", 1000)
    texts = [b"%04d" % i for i in range(5000)]
    found = sample_texts(iter(texts), 1)
    assert found == sample_texts(iter(texts), 1) != sample_texts(iter(texts), 2)
    assert 100 < len(found) <= 250 and 2000 < np.mean([int(text) for text in found]) < 3000
    assert sample_texts(iter(texts[:250]), 1) == texts[:250]


# ---- prepare.py ----------------------------------------------------------------------------------


def shards(tmp_path: Path, *options: str, text=None, name="shards") -> Path:
    folder = tmp_path / f"{name}_text"
    folder.mkdir(exist_ok=True)
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(text or f"{CODE}# number {i}\n", encoding="utf-8")
    prepare.main([str(folder), "--out", str(tmp_path / name), "--val_fraction", "0.1", *options])
    return tmp_path / name


def fails(capsys, command, *argv: str) -> str:
    """Run a command, which must end with one line and exit code 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command(list(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"\w+\.py: ", line)]
    assert exit_.value.code == 2 and len(lines) == 1
    return lines[0]


def test_it_is_learned_from_training_documents_only(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        prepare,
        "learn_tokenizer",
        lambda texts, size: seen.extend(texts) or learn_tokenizer(texts, size),
    )
    out = shards(tmp_path, "--tokenizer", "320")
    tokenizer = data.tokenizer_of_shards(out)
    [shard] = data.open_shards(out, "train")
    documents = tokenizer.decode(shard.tokens.tolist()).split(END_OF_TEXT)[1:]
    assert [text.decode() for text in seen] == documents and len(documents) == 27
    said = capsys.readouterr().out
    assert re.search(r"vocabulary: 320 tokens, \d\.\d\d bytes a token; the longest: \S+ \S+", said)


def test_a_folder_gives_the_vocabulary_it_has(tmp_path, capsys):
    first = shards(tmp_path, "--tokenizer", "320")
    second = shards(tmp_path, "--tokenizer", str(first), text=TEXTS["German"], name="second")
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    names = [data.read_meta(out)["tokenizer"] for out in (first, second)]
    assert names[0] == names[1] == data.read_meta(second)["source"]["tokenizer"]
    other = shards(tmp_path, "--tokenizer", "325", name="other")
    again = [
        str(tmp_path / "second_text"),
        "--out",
        str(second),
        "--val_fraction",
        "0.1",
        "--tokenizer",
        str(other),
    ]
    assert f"another source (tokenizer {names[0]} -> bpe325-" in fails(capsys, prepare.main, *again)


def test_too_little_text_says_how_many_tokens_it_has(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(CODE * 9)
    command = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer"]
    line = fails(capsys, prepare.main, *command, "5000")
    found = re.search(
        r"--tokenizer 5000: the text has enough for (\d+) only; take more text, or --tokenizer \1",
        line,
    )
    prepare.main([*command, found[1]])  # nothing is made yet, so it may
    assert data.read_meta(tmp_path / "out")["vocab_size"] == int(found[1]) > 300
    (tmp_path / "a.txt").write_text("ab" * 40)
    line = fails(
        capsys, prepare.main, command[0], "--out", str(tmp_path / "small"), "--tokenizer", "300"
    )
    assert "take more text, or --tokenizer bytes" in line


@pytest.mark.parametrize("wanted", ["299", "65536", "50257", "0", "nowhere"])
def test_what_the_option_takes(tmp_path, capsys, wanted):
    (tmp_path / "a.txt").write_text(CODE * 9)
    line = fails(
        capsys,
        prepare.main,
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "out"),
        "--tokenizer",
        wanted,
    )
    assert f"--tokenizer {wanted}: must be gpt2, bytes, a number from 300 to 65535" in line
    assert not (tmp_path / "out").exists()


# ---- Into a run, and out of it -------------------------------------------------------------------

SETTINGS = TOY_MODEL | dict(
    batch_size=4,
    total_batch_size=4 * 32,
    learning_rate=1e-2,
    min_lr=1e-3,
    warmup_steps=1,
    max_steps=4,
    log_every=1,
)
SETTINGS |= dict(
    eval_every=2,
    eval_tokens=200,
    hellaswag_every=0,
    sample_every=4,
    sample_prompt="def ",
    sample_tokens=8,
)
SETTINGS |= dict(
    checkpoint_every=2, keep_checkpoints=0, device="cpu", dtype="fp32", compile=False, report=False
)


def flags(**changes) -> list[str]:
    return [f"--{name}={value}" for name, value in (SETTINGS | changes).items()]


@pytest.fixture
def trained(tmp_path) -> tuple[Path, Path]:
    """Shards with a vocabulary of 320 tokens, and a run on them."""
    made = shards(tmp_path, "--tokenizer", "320"), tmp_path / "run"
    train.main(flags(data_dir=made[0], out_dir=made[1]))
    return made


def test_a_checkpoint_opens_in_transformers(trained):
    from transformers import AutoTokenizer, pipeline

    folder = checkpoints(trained[1])[-1]
    assert (folder / "tokenizer.json").read_bytes() == (trained[0] / "tokenizer.json").read_bytes()
    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer_of_model(folder, 320)
    text = "def f(x):\n\treturn x  # naïve ☃ 𝄞 \x00 don't   stop\n\n    if a:\r\n   x"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text).tolist()) == text
    assert (
        theirs.eos_token_id == theirs.bos_token_id == 319 == ours.end_of_text and len(theirs) == 320
    )
    assert theirs.model_max_length == 32
    written = pipeline("text-generation", model=str(folder))(
        "def ", max_new_tokens=8, do_sample=False
    )
    [text] = [Text(ours, "def ", 0, [])]
    list(
        complete(
            GPT.from_pretrained(folder).eval(), [text], dict(max_tokens=8, temperature=0, seed=0)
        )
    )
    assert written[0]["generated_text"] == "def " + text.text


def test_the_commands_take_it_from_the_checkpoint(trained, tmp_path, capsys):
    sample.main(["--model", str(trained[1]), "-m", "5", "-p", "def ", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("def ")
    task = dict(ctx="def", label=1, endings=["a", "b", "c", "d"])
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    hellaswag.main(
        [
            "--model",
            str(trained[1]),
            "--data",
            str(tmp_path / "tasks.jsonl"),
            "--device",
            "cpu",
            "--json",
        ]
    )
    assert json.loads(capsys.readouterr().out)["n"] == 1


def test_bits_per_byte_are_those_of_the_validation_text(trained, tmp_path):
    """Against the UTF-8 of the tokens that are predicted; end of text has no bytes."""
    tokenizer = data.tokenizer_of_shards(trained[0])
    [shard] = data.open_shards(trained[0], "val")
    n = (min(200, len(shard.tokens) - 1) // 32) * 32
    predicted = shard.tokens[1 : n + 1].tolist()
    n_bytes = len(tokenizer.decode(predicted).replace(END_OF_TEXT, "").encode())
    for record in select(read_metrics(trained[1] / "metrics.jsonl"), "val"):
        assert record["val_bpb"] == pytest.approx(
            record["loss"] * n / n_bytes / np.log(2), rel=1e-6
        )
    assert (
        f"| validation, bits a byte | {record['val_bpb']:.4f} (bpe320-"
        in write_markdown(trained[1]).read_text()
    )
    for name in TOKENIZERS:
        known = get_tokenizer(name)
        ids = known.encode("naïve ☃\n" * 50)
        assert known.byte_counts()[[*ids.tolist(), known.end_of_text]].sum() == len(
            ("naïve ☃\n" * 50).encode()
        )


def test_shards_and_model_must_have_the_same_by_content(trained, tmp_path, capsys):
    other = shards(tmp_path, "--tokenizer", "320", text=TEXTS["German"], name="other")
    wrong = dict(out_dir=tmp_path / "fine", init_from=checkpoints(trained[1])[-1])
    line = fails(capsys, train.main, *flags(data_dir=other, **wrong))
    assert (
        "has 320 other tokens, but the shards in" in line
        and "make them with the model's tokenizer" in line
    )
    line = fails(
        capsys,
        train.main,
        *flags(data_dir=other, out_dir=trained[1], max_steps=6, resume_anyway=True),
    )
    assert "has 320 other tokens" in line
    train.main(
        flags(data_dir=trained[0], **wrong)
    )  # a copy of the shards, another folder: the content counts
    assert len(checkpoints(tmp_path / "fine")) == 2


def test_a_damaged_or_missing_vocabulary_is_one_line(trained, tmp_path, capsys):
    made, folder = trained[0], checkpoints(trained[1])[-1]
    whole = (made / "tokenizer.json").read_text(encoding="utf-8")
    edited = json.loads(whole)
    edited["model"]["merges"][5:7] = edited["model"]["merges"][6:4:-1]
    for content in (whole[:5000], "[]", "{}", json.dumps(edited), "\0" * 100):
        (made / "tokenizer.json").write_text(content, encoding="utf-8")
        line = fails(capsys, train.main, *flags(data_dir=made, out_dir=tmp_path / "x"))
        assert "tokenizer.json: damaged, or not learned by prepare.py (" in line
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        assert "tokenizer.json: damaged" in fails(capsys, sample.main, "--model", str(folder))
        with pytest.raises(ValueError, match=r"tokenizer.json is not as it was written"):
            checkpoint.verify(folder)
    other = learn_tokenizer([TEXTS["German"].encode()], 320)
    (made / "tokenizer.json").write_text(other, encoding="utf-8")
    line = fails(capsys, train.main, *flags(data_dir=made, out_dir=tmp_path / "x"))
    assert re.search(
        r"tokenizer.json: is bpe320-\w+, but the shards beside it were made with bpe320-\w+", line
    )
    (folder / "tokenizer.json").write_text(
        learn_tokenizer([TEXTS["German"].encode()], 325), encoding="utf-8"
    )
    line = fails(capsys, sample.main, "--model", str(folder))
    assert re.search(r"tokenizer.json: is bpe325-\w+, but the model beside it has 320 tokens", line)
    for command, arguments in (
        (train.main, flags(data_dir=made, out_dir=tmp_path / "x")),
        (sample.main, ["--model", str(folder)]),
    ):
        for file in (made / "tokenizer.json", folder / "tokenizer.json"):
            file.unlink(missing_ok=True)
        assert "tokenizer.json: not there" in fails(capsys, command, *arguments)


def test_a_model_of_a_known_size_needs_no_file(tmp_path):
    """As before: also where a folder from elsewhere has a tokenizer.json of its own."""
    GPT(GPTConfig(vocab_size=257, **TOY_MODEL)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (
        tokenizer_of_model(tmp_path, 257).name == "bytes"
        and tokenizer_of_model(tmp_path, 50257).name == "gpt2"
    )
