"""The HellaSwag score against one that is as plain as can be; in a run; and with files as they
come.
"""

import dataclasses
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hellaswag
import train
from hellaswag import Example, Rendered
from model import GPT, CausalSelfAttention, GPTConfig
from parts.files import sha256
from parts.inference import pack
from parts.metrics import PUBLISHED
from parts.runtime import Runtime
from parts.tokenizer import Tokenizer, get_tokenizer

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from conftest import TOY_MODEL, clean_environment, flags, losses, metrics
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parent.parent
CPU = Runtime(torch.device("cpu"))

TASKS = [
    Example(
        "A man is sitting on a roof. he",
        ("is using wrap.", "rips level tiles off.", "holds a cube.", "x"),
        3,
    ),
    Example(
        "She bends down",
        ("and", "x", "and lifts the weight over her head, slowly.", "and lets go."),
        0,
    ),
    Example(
        "[header] Wie man Äpfel schält [title] 漢字 ☃\n", ("naïve", "é", "日本語のテキスト", "…"), 1
    ),
    Example("", ("no context", "at all", "is here", "to go on from"), 2),
    Example("word " * 300, ("a " * 40, "b " * 7, "c", "the end."), 0),  # longer than the window
    Example("A short one", ("x" * 500, "word " * 200, "y", "z"), 3),  # an ending that is
    *(
        Example(
            f"The number {i} is",
            tuple(f"{(i * k) % 13} and" + " more" * k for k in range(4)),
            i % 4,
        )
        for i in range(30)
    ),
]


def toy(tokenizer: str, block_size: int = 128) -> GPT:
    torch.manual_seed(0)
    vocab_size = get_tokenizer(tokenizer).vocab_size
    model = GPT(GPTConfig(**TOY_MODEL | dict(block_size=block_size), vocab_size=vocab_size))
    for parameter in model.parameters():
        parameter.data *= 4  # so that predictions differ
    return model


@torch.no_grad()
def plain_losses(model: GPT, task: Example, tokenizer: Tokenizer) -> list[float]:
    """One ending at a time, the context with it each time, logits for everything."""
    window = model.config.block_size
    endings = [tokenizer.encode(" " + ending).tolist()[:window] for ending in task.endings]
    longest = max(map(len, endings))
    context = tokenizer.encode(task.context).tolist() or [tokenizer.end_of_text]
    context = context[-(window + 1 - longest) :]
    sums = []
    for ending in endings:
        row = torch.tensor([context + ending])
        logp = F.log_softmax(model(row[:, :-1]), dim=-1)
        sums.append(
            -sum(logp[0, len(context) - 1 + i, token].item() for i, token in enumerate(ending))
        )
    return sums


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_losses_and_predictions_equal_the_plain_way(tokenizer, batch_tokens, monkeypatch):
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", batch_tokens)
    model, tokens = toy(tokenizer).eval(), get_tokenizer(tokenizer)
    rendered = [hellaswag.render(task, tokens, model.config.block_size) for task in TASKS]
    expected = np.array([plain_losses(model, task, tokens) for task in TASKS])
    for batch in hellaswag.make_batches(rendered, batch_tokens):
        sums = hellaswag.ending_losses(model, [rendered[i] for i in batch], CPU)
        np.testing.assert_allclose(sums, expected[batch], rtol=1e-5, atol=1e-4)
    labels = np.array([task.label for task in TASKS])
    lengths = np.array([[len(ending) for ending in one.endings] for one in rendered])
    right, right_norm = (
        (expected.argmin(1) == labels).sum(),
        ((expected / lengths).argmin(1) == labels).sum(),
    )
    result = hellaswag.evaluate(model, tokens, CPU, TASKS)
    assert (result["n"], result["acc"], result["acc_norm"]) == (
        len(TASKS),
        right / len(TASKS),
        right_norm / len(TASKS),
    )
    p = result["acc_norm"]
    assert result["acc_norm_stderr"] == pytest.approx((p * (1 - p) / len(TASKS)) ** 0.5)


@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=4, max_size=4)),
        max_size=20,
    ),
    st.data(),
)
def test_batches_take_each_task_once_and_keep_the_budget(sizes, draw):
    rendered = [Rendered(np.zeros(n), tuple(np.zeros(k) for k in ends)) for n, ends in sizes]
    budget = draw.draw(st.integers(1, 400))
    batches = hellaswag.make_batches(rendered, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rendered[i]) for i in batch) <= budget


def test_bf16_and_both_attentions_agree():
    model = toy("gpt2").eval()
    rendered = [hellaswag.render(task, get_tokenizer("gpt2"), 128) for task in TASKS]
    exact = hellaswag.ending_losses(model, rendered, CPU)
    rounded = hellaswag.ending_losses(model, rendered, CPU, torch.bfloat16)
    np.testing.assert_allclose(rounded, exact, rtol=0.03)
    assert not np.array_equal(rounded, exact)
    for block in model.transformer.h:
        block.attn.flash = False
    np.testing.assert_allclose(hellaswag.ending_losses(model, rendered, CPU), exact, rtol=1e-5)


# ---- Models that are not GPT-2 -------------------------------------------------------------------


class ChangedAttention(CausalSelfAttention):
    """Attention that tells tokens apart by their columns."""

    def forward(self, x, layout):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        column = torch.arange(T)
        distance = column[:, None] - column
        mask = distance >= 0 if layout.mask is None else layout.mask
        bias = self.bias(distance).masked_fill(~mask, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(B, 1, T, T))
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Alibi(ChangedAttention):
    def bias(self, distance: torch.Tensor) -> torch.Tensor:
        return -0.1 * distance.abs()


class Window(ChangedAttention):
    """A row of 64 tokens is as without a window; a row of four endings may be longer."""

    def bias(self, distance: torch.Tensor) -> torch.Tensor:
        return torch.zeros(distance.shape).masked_fill(distance >= 64, float("-inf"))


class WithoutPositions(GPT):
    def hidden(self, idx):
        return super().hidden(idx)


class WithAlibi(GPT):
    attention: type = Alibi

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn = self.attention(config, block.attn.layer)
        self.init_weights()


class WithWindow(WithAlibi):
    attention = Window


def toy_of(cls: type) -> GPT:
    """A model of this class with the toy's weights."""
    weights = toy("bytes")
    model = cls(weights.config)
    model.load_state_dict(weights.state_dict())
    return model.eval()


@pytest.mark.parametrize("change", [WithAlibi, WithWindow, WithoutPositions])
def test_a_model_that_counts_columns_is_scored_in_separate_rows(change, capsys):
    """Its score is that of one ending at a time, and the note is printed once."""
    model, tokens = toy_of(change), get_tokenizer("bytes")
    hellaswag.note_separate_rows.cache_clear()
    results = [hellaswag.evaluate(model, tokens, CPU, TASKS) for _ in range(2)]
    assert capsys.readouterr().err.count("Each ending gets a row of its own") == 1
    expected = np.array([plain_losses(model, task, tokens) for task in TASKS])
    rendered = [hellaswag.render(task, tokens, model.config.block_size) for task in TASKS]
    sums = hellaswag.ending_losses(model, rendered, CPU, share_rows=False)
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-4)
    labels = np.array([task.label for task in TASKS])
    lengths = np.array([[len(ending) for ending in task.endings] for task in rendered])
    for result in results:
        assert result["acc"] == np.mean(expected.argmin(1) == labels)
        assert result["acc_norm"] == np.mean((expected / lengths).argmin(1) == labels)
    # Shared rows would have been wrong, by more than the comparison tolerates.
    if change is not WithoutPositions:
        shared = hellaswag.ending_losses(model, rendered, CPU)
        assert np.abs(shared / expected - 1).max() > 0.01


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_a_gpt2_is_scored_in_shared_rows(tokenizer, capsys):
    """Also with weights in bf16, and in a run, where the model has float32 weights and dropout."""
    tokens = get_tokenizer(tokenizer)
    model = toy(tokenizer)
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.2
    hellaswag.note_separate_rows.cache_clear()
    assert hellaswag.can_share_rows(GPT, model.config)
    hellaswag.evaluate(model, tokens, CPU, TASKS)
    hellaswag.evaluate(pack(toy(tokenizer), torch.bfloat16), tokens, CPU, TASKS, torch.bfloat16)
    assert model.training and capsys.readouterr().err == ""


# ---- The harness style ---------------------------------------------------------------------------


def line(activity_label: str, ctx_a: str, ctx_b: str, label: int, *endings: str) -> dict:
    """A task in the official file's fields."""
    ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    return dict(
        activity_label=activity_label,
        ctx_a=ctx_a,
        ctx_b=ctx_b,
        ctx=ctx,
        label=label,
        endings=endings,
    )


LINES = [
    line(
        "Roofing",
        "A man sits on a roof.",
        "he",
        3,
        "is using wrap.",
        "rips level tiles off.",
        "holds a cube.",
        "x",
    ),
    line(
        *("Home and Garden", "[header] How to peel [title] Wash it.  [step] Use water.", "", 0),
        *(
            "[step] Rub it. [title] Cut it. [step] Eat.",
            " [substeps] Go on.",
            "[title] No mark",
            "a  b",
        ),
    ),
    line(
        " Canoeing",
        "It rains   hard.",
        "the OLD lady",
        1,
        " runs.",
        "Runs  far   away.",
        "RUNS",
        "waits [for",
    ),
    line("Health", "Eat well. [title]", "[step]", 2, "[header]", "…", "日本語", "☃"),
    line(
        "Äpfel",
        "漢字 [x [y] z]",
        "",
        0,
        "one [a]\n two",
        "[a] [b] three",
        "\tfour",
        "日本語 [title]",
    ),
    line("", "", "", 1, "and sleep.", "日本語 is longer in bytes.", "日本語のテキスト", "éééé"),
]
# What lm-evaluation-harness 0.4.13 makes of them: the context, which may end in a space, and the
# endings.
CLEAN = [
    (
        "Roofing: A man sits on a roof. He",
        "is using wrap.",
        "rips level tiles off.",
        "holds a cube.",
        "x",
    ),
    (
        "Home and Garden: How to peel. Wash it.  Use water.",
        " Rub it.. Cut it. Eat.",
        " Go on.",
        " No mark",
        "a b",
    ),
    ("Canoeing: It rains  hard. The old lady", "runs.", "Runs far  away.", "RUNS", "waits [for"),
    ("Health: Eat well.. ", "", "…", "日本語", "☃"),
    ("Äpfel: 漢字 z]", "one \n two", " three", "four", "日本語. "),
    (":", "and sleep.", "日本語 is longer in bytes.", "日本語のテキスト", "éééé"),
]


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    return path


def test_the_harness_cleans_the_texts(tmp_path):
    tasks = hellaswag.examples(write_lines(tmp_path / "tasks.jsonl", LINES), style="harness")
    assert [(task.context, *task.endings) for task in tasks] == CLEAN
    assert [task.label for task in tasks] == [3, 0, 1, 2, 0, 1]


@torch.no_grad()
def harness_sum(model: GPT, context: str, ending: str, tokenizer: Tokenizer) -> float:
    """The definition: context, space and ending are encoded together. What follows the context's
    tokens is judged.

    White space at the end of the context counts as the ending's.
    """
    whole = torch.from_numpy(tokenizer.encode(context + " " + ending).astype(np.int64))
    n = len(tokenizer.encode(context.rstrip()))
    logp = F.log_softmax(model(whole[None, :-1])[0], dim=-1)
    return -logp[n - 1 :].gather(1, whole[n:, None]).sum().item()


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_the_harness_style_equals_its_definition(tokenizer, tmp_path):
    """acc_norm divides by the characters of the ending alone; an empty one is never chosen."""
    tasks = hellaswag.examples(write_lines(tmp_path / "tasks.jsonl", LINES), style="harness")
    model, tokens = toy(tokenizer).eval(), get_tokenizer(tokenizer)
    expected = np.array(
        [
            [harness_sum(model, context, ending, tokens) for ending in ends]
            for context, *ends in CLEAN
        ]
    )
    means = [
        [each / len(ending) if ending else np.inf for each, ending in zip(row, ends)]
        for row, (_, *ends) in zip(expected, CLEAN)
    ]
    rendered = [hellaswag.render(task, tokens, model.config.block_size) for task in tasks]
    np.testing.assert_allclose(hellaswag.ending_losses(model, rendered, CPU), expected, rtol=1e-5)
    # Each choice, one task at a time: with the label at it, the task is right.
    for task, sums, mean in zip(tasks, expected, means):
        for name, chosen in (("acc", np.argmin(sums)), ("acc_norm", np.argmin(mean))):
            scores = [
                hellaswag.evaluate(model, tokens, CPU, [dataclasses.replace(task, label=label)])[
                    name
                ]
                for label in range(4)
            ]
            assert scores == [float(label == chosen) for label in range(4)]
    result = hellaswag.evaluate(model, tokens, CPU, tasks)
    labels = [task.label for task in tasks]
    right, right_norm = (np.sum(np.argmin(each, axis=1) == labels) for each in (expected, means))
    assert (result["style"], result["acc"], result["acc_norm"]) == (
        "harness",
        right / 6,
        right_norm / 6,
    )


@pytest.mark.parametrize(
    "change, message", [({}, "KeyError: 'ctx_a'"), (dict(ctx_a="a", ctx_b=None), "AttributeError")]
)
def test_the_harness_needs_its_fields(tmp_path, change, message):
    record = {
        name: value for name, value in LINES[0].items() if name not in ("ctx_a", "ctx_b")
    } | change
    path = write_lines(tmp_path / "tasks.jsonl", [record])
    assert len(hellaswag.examples(path)) == 1
    with pytest.raises(ValueError, match=f"line 1: not a HellaSwag task .{message}"):
        hellaswag.examples(path, style="harness")


# ---- Files ---------------------------------------------------------------------------------------


def write_tasks(path: Path, tasks=TASKS, label=int) -> Path:
    records = [
        dict(ind=i, ctx=t.context, label=label(t.label), endings=list(t.endings))
        for i, t in enumerate(tasks)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_tasks_come_back_from_a_file(tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", label=str)  # some copies have labels as texts
    assert hellaswag.examples(path) == TASKS
    assert hellaswag.examples(path, limit=3) == TASKS[:3]


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "no tasks in it"),
        ("{", "not JSON"),
        ('{"ctx": "a", "label": 0}', "KeyError: 'endings'"),
        ('{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}', "label must be 0 to 3"),
        ('{"ctx": "a", "label": 0, "endings": ["a", "b", "c"]}', "endings a list of four strings"),
        ('{"ctx": 1, "label": 0, "endings": ["a", "b", "c", "d"]}', "ctx must be a string"),
    ],
)
def test_a_broken_line_is_named(tmp_path, capsys, line, message):
    path = write_tasks(tmp_path / "tasks.jsonl", TASKS[:1])
    path.write_text(path.read_text() + line + "\n" if line else "")
    with pytest.raises(SystemExit) as exit_:
        hellaswag.main(["--data", str(path), "--model", "out/none", "--device", "cpu"])
    error = capsys.readouterr().err
    start = (
        f"hellaswag.py: {path}, line 2: not a HellaSwag task" if line else f"hellaswag.py: {path}: "
    )
    assert (
        exit_.value.code == 2
        and error.startswith(start)
        and message in error
        and error.count("\n") == 1
    )


class Server(BaseHTTPRequestHandler):
    """Serves one file; `wrong` is what goes wrong with each request."""

    def do_GET(self):
        type(self).asked += 1
        if isinstance(self.wrong, int):
            return self.send_error(self.wrong)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        cut = {"drop": self.content[:99], "corrupt": self.content[::-1]}
        self.wfile.write(cut.get(self.wrong, self.content))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    content = write_tasks(tmp_path / "source.jsonl").read_bytes()
    handler = type("ThisServer", (Server,), dict(content=content, wrong=None, asked=0))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        hellaswag, "URL", f"http://127.0.0.1:{http.server_address[1]}/hellaswag_val.jsonl"
    )
    monkeypatch.setattr(hellaswag, "SHA256", sha256(tmp_path / "source.jsonl"))
    monkeypatch.setattr(hellaswag, "FILE", tmp_path / "kept" / "hellaswag_val.jsonl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield handler
    http.shutdown()
    http.server_close()


def test_the_file_is_fetched_once(server):
    assert hellaswag.examples() == TASKS
    assert hellaswag.examples(limit=5) == TASKS[:5] and server.asked == 1


def test_what_a_kill_left_of_the_file_is_deleted(server):
    hellaswag.FILE.parent.mkdir()
    leftover = hellaswag.FILE.with_name("hellaswag_val.jsonl.0123abcd.tmp")
    leftover.write_text("half of it")
    hellaswag.examples()
    assert hellaswag.FILE.exists() and not leftover.exists()


def test_two_that_start_together_fetch_the_file_once(server):
    with ThreadPoolExecutor(2) as pool:
        for tasks in pool.map(lambda _: hellaswag.examples(), range(2)):
            assert tasks == TASKS
    assert server.asked == 1


@pytest.mark.parametrize(
    "wrong, message", [(404, "404"), ("corrupt", "SHA-256"), ("drop", "IncompleteRead")]
)
def test_what_cannot_be_fetched_is_one_line(server, wrong, message):
    server.wrong = wrong
    with pytest.raises(
        ValueError,
        match=f"HellaSwag could not be fetched from http.*{message}.*{hellaswag.HUB}.*copy",
    ):
        hellaswag.examples()
    assert not hellaswag.FILE.exists()


# ---- The command, and a run ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> str:
    toy("bytes").save_pretrained(tmp_path / "toy")
    return str(tmp_path / "toy")


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    path = write_tasks(tmp_path / "tasks.jsonl")
    arguments = ["--model", folder, "--device", "cpu", "--dtype", "fp32"]
    hellaswag.main([*arguments, "--data", str(path), "--json"])
    result = json.loads(capsys.readouterr().out)
    expected = hellaswag.evaluate(toy("bytes"), get_tokenizer("bytes"), CPU, TASKS)
    assert result["style"] == "completion" and expected.items() <= result.items()
    # Published figures stand beside those of the official tasks, if all of them were scored.
    monkeypatch.setitem(PUBLISHED["completion"], folder, (0.2859, 0.2955))
    monkeypatch.setitem(PUBLISHED["harness"], folder, (0.2892, 0.3114))
    monkeypatch.setattr(hellaswag, "fetch", lambda: path)
    hellaswag.main(arguments)
    out = capsys.readouterr().out
    score = f"{result['acc_norm']:.4f} +- {result['acc_norm_stderr']:.4f}"
    assert f"acc_norm {score}  (lowest mean a token)" in out
    assert (
        "HellaSwag, completion style, 36 tasks" in out
        and "published: 0.2955" in out
        and "tasks/s" in out
    )
    path = write_lines(tmp_path / "tasks.jsonl", LINES)
    hellaswag.main([*arguments, "--style", "harness"])
    out = capsys.readouterr().out
    assert (
        "harness style, 6 tasks" in out and "(lowest mean a character)   published: 0.3114" in out
    )
    for partly in (["--limit", "3"], ["--data", str(path)]):
        hellaswag.main([*arguments, *partly])
        assert "published" not in capsys.readouterr().out


def test_a_model_with_its_own_tokenizer_is_scored_with_that(tmp_path, capsys):
    """As transformers computes it, from vocab.json and merges.txt beside the model."""
    text = "".join(task.context + "".join(task.endings) for task in TASKS)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], 400, min_frequency=1, special_tokens=["</s>"])
    bpe.save_model(str(tmp_path))
    torch.manual_seed(1)
    size = bpe.get_vocab_size()
    shape = dict(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=size)
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in theirs.parameters():
        parameter.data *= 8
    theirs.save_pretrained(tmp_path)

    hits = 0
    tasks = [task for task in TASKS if task.context]
    for task in tasks:
        means = []
        endings = [bpe.encode(" " + ending).ids[:64] for ending in task.endings]
        longest = max(map(len, endings))
        context = bpe.encode(task.context).ids[-(65 - longest) :]
        for ending in endings:
            ids = torch.tensor([context + ending])
            with torch.no_grad():
                logits = theirs(ids[:, :-1]).logits[0, len(context) - 1 :]
            means.append(F.cross_entropy(logits, torch.tensor(ending)).item())
        hits += means.index(min(means)) == task.label
    path = write_tasks(tmp_path / "tasks.jsonl", tasks)
    options = ["--model", str(tmp_path), "--device", "cpu", "--dtype", "fp32", "--json"]
    hellaswag.main([*options, "--data", str(path)])
    assert json.loads(capsys.readouterr().out)["acc_norm"] == hits / len(tasks)


def test_a_model_without_numbers_has_no_score():
    model = toy("bytes")
    model.transformer.ln_f.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not numbers"):
        hellaswag.evaluate(model, get_tokenizer("bytes"), CPU, TASKS[:4])


def test_ranks_share_the_tasks_and_agree(folder, tmp_path):
    """36 tasks in batches that do not divide; the counts are those of one process."""
    path = write_tasks(tmp_path / "tasks.jsonl")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=3",
        "hellaswag.py",
    ]
    command += ["--model", folder, "--data", str(path), "--dtype", "fp32", "--json"]
    run = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
    expected = hellaswag.evaluate(toy("bytes"), get_tokenizer("bytes"), CPU, TASKS)
    assert expected.items() <= json.loads(line).items()


def test_a_run_scores_itself_and_is_not_disturbed(config, tmp_path):
    """Law 4 of CONTRIBUTING.md, with dropout on. The score in the metrics is that of the
    checkpoint.
    """
    path = write_tasks(tmp_path / "tasks.jsonl")
    settings = dict(dropout=0.2, max_steps=6, checkpoint_every=6)
    scoring = dict(hellaswag_every=3, hellaswag_data=str(path), hellaswag_limit=30)
    plain = losses(config(out_dir=str(tmp_path / "plain"), **settings))
    assert losses(config(out_dir=str(tmp_path / "scored"), **settings, **scoring)) == plain
    records = metrics(tmp_path / "scored", "hellaswag")
    assert [record["step"] for record in records] == [3, 6] and records[0]["n"] == 30
    model = GPT.from_pretrained(tmp_path / "scored" / "step_0000006")
    expected = hellaswag.evaluate(model, get_tokenizer("bytes"), CPU, TASKS[:30])
    assert expected.items() <= records[-1].items()


def test_a_run_scores_in_the_style_of_its_setting(config, tmp_path):
    scoring = dict(
        hellaswag_every=4, hellaswag_data=str(write_lines(tmp_path / "tasks.jsonl", LINES))
    )
    train.train(
        config(max_steps=4, checkpoint_every=4, report=True, hellaswag_style="harness", **scoring)
    )
    (score,) = metrics(tmp_path / "run", "hellaswag")
    model = GPT.from_pretrained(tmp_path / "run" / "step_0000004")
    tasks = hellaswag.examples(scoring["hellaswag_data"], style="harness")
    assert hellaswag.evaluate(model, get_tokenizer("bytes"), CPU, tasks).items() <= score.items()
    assert "(GPT-2 124M: 0.3114)" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_goes_on_where_the_tasks_cannot_be_fetched(config, server, tmp_path, capsys):
    server.wrong = 404
    train.train(config(hellaswag_every=2, max_steps=4))
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("hellaswag: ")
    ]
    assert (
        len(lines) == 1
        and "off" in lines[0]
        and "404" in lines[0]
        and "set hellaswag_data" in lines[0]
    )
    assert len(metrics(tmp_path / "run")) == 4 and metrics(tmp_path / "run", "hellaswag") == []
    with pytest.raises(
        SystemExit
    ) as exit_:  # but a file that was named and is not there is a mistake
        train.main(flags(config(hellaswag_every=2, hellaswag_data="nowhere.jsonl", resume="never")))
    assert exit_.value.code == 2 and "nowhere.jsonl" in capsys.readouterr().err
