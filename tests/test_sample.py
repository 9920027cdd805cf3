"""sample.py as people use it: from a checkpoint, from a hub, from nothing, and wrongly."""

import functools
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import sample
import train
from model import GPT, GPTConfig
from parts import inference, pretrained
from parts import page as page_part
from parts.console import printable
from parts.inference import SETTINGS, Text, check_settings, complete, generate
from parts.tokenizer import BytesTokenizer, get_tokenizer

import pytest
import torch
from conftest import TOY_MODEL, clean_environment, make_toy
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
RULE = "-" * 40 + "\n"


def run(capsys, *argv: str) -> tuple[str, str]:
    sample.main([*argv, "--device", "cpu", "--dtype", "fp32"])
    captured = capsys.readouterr()
    return captured.out, captured.err


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        sample.main([*argv, "--device", "cpu"])
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def type_in(monkeypatch, *lines: str) -> None:
    """What the person types with -i; then the input ends."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def watch(monkeypatch, owner, name: str) -> Mock:
    """Record the calls of a function, which works as it did."""
    watched = Mock(wraps=getattr(owner, name))
    monkeypatch.setattr(owner, name, watched)
    return watched


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    model = make_toy(**TOY_MODEL)
    model.transformer.wte.weight.data *= 2  # so that some tokens are likely
    model.save_pretrained(folder)
    return str(folder)


# ---- Prompts, seeds, models ----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_whatever_the_batch(toy, capsys, monkeypatch):
    arguments = ("--model", toy, "-m", "40", "--seed", "3")
    alone, err = run(capsys, *arguments, "-p", "The fox")
    assert f"model: {toy}" in err
    other, _ = run(capsys, "--model", toy, "-m", "40", "--seed", "4", "-p", "The fox")
    assert other != alone
    batch, _ = run(capsys, *arguments, "-p", "A longer prompt", "-p", "The fox", "-n", "2")
    texts = [text.rstrip("\n") for text in batch.split(RULE)]
    assert [text[:5] for text in texts] == ["A lon", "A lon", "The f", "The f"]
    assert texts[2:] == [alone.rstrip("\n"), other.rstrip("\n")]  # sample i draws from seed + i
    stream = watch(monkeypatch, inference, "stream")
    monkeypatch.setattr(sample, "BATCH", 3)
    assert run(capsys, *arguments, "-p", "A longer prompt", "-p", "The fox", "-n", "2")[0] == batch
    assert [len(call.args[1]) for call in stream.call_args_list] == [3, 1]


def test_prompts_come_from_arguments_files_and_the_standard_input(
    toy, tmp_path, capsys, monkeypatch
):
    def prompts(*argv: str) -> list[str]:
        out, _ = run(capsys, "--model", toy, "-m", "2", "--json", *argv)
        return [json.loads(line)["prompt"] for line in out.splitlines()]

    assert prompts("ab", "-p", "c", "--seed", "2", "d", "-p", "") == ["ab", "d", "c", ""]
    (tmp_path / "prompts.txt").write_text("first\n \nsecond\n")
    (tmp_path / "prompts.jsonl").write_text(
        '\ufeff{"prompt": "third\\nline"}\n{"prompt": "fourth\u2028"}\n'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert prompts("--file", str(tmp_path / "prompts.txt"), "-p", "-") == [
        "from a pipe\n",
        "first",
        "second",
    ]
    assert prompts("--file", str(tmp_path / "prompts.jsonl")) == ["third\nline", "fourth\u2028"]
    wrong = 'bad.jsonl, line 2: not a JSON object with a text as "prompt"'
    for content, says in (
        ('\n{"text": ""}', wrong),
        ('\n{"prompt": 1}', wrong),
        ("\n", "bad.jsonl: no prompts in"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        assert says in fails(capsys, "--model", toy, "--file", str(tmp_path / "bad.jsonl"))
    assert "nowhere.txt" in fails(capsys, "--model", toy, "--file", "nowhere.txt")


def test_the_content_of_a_file_of_prompts_says_what_it_is(tmp_path):
    """Law 13 of CONTRIBUTING.md, for prompts."""
    expected = ["one\ntwo", "", "[3]"]
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(expected)]
    contents = [
        "\n".join(map(json.dumps, rows)),
        json.dumps(rows, indent=2),
        json.dumps(expected),
    ]
    for content in contents:
        for name in ("a.jsonl", "a.json", "a.txt", "prompts"):
            (tmp_path / name).write_text(content)
            arguments = sample.parse_arguments(["--file", str(tmp_path / name)])
            assert sample.read_prompts(arguments) == expected, name
    # What has no prompts in it is lines of text.
    for lines in (['{"text": "a"}', "b"], ["[1, 2]"], ["[", "]"], ["{", '"prompt"}'], ["[[a]]"]):
        (tmp_path / "a.txt").write_text("\n".join(lines))
        arguments = sample.parse_arguments(["--file", str(tmp_path / "a.txt")])
        assert sample.read_prompts(arguments) == lines


def test_prompts_in_any_encoding(tmp_path, capsys, monkeypatch):
    """As files of prompts, the standard input and a terminal may have them."""

    def read(*argv: str) -> list[str]:
        return sample.read_prompts(sample.parse_arguments(list(argv)))

    file = tmp_path / "prompts.txt"
    text = "Les élèves\nétaient là\n"
    lines = ["Les élèves", "étaient là"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # PowerShell's > writes the last one
        file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert read("--file", str(file)) == lines
    file.write_bytes(text.encode("cp1252"))
    assert read("--file", str(file), "--encoding", "cp1252") == lines
    with pytest.raises(ValueError, match=r"prompts\.txt: not utf-8.*--encoding"):
        read("--file", str(file))
    capsys.readouterr()
    assert read("--file", str(file), "--replace")[1] == "\ufffdtaient l\ufffd"
    assert "4 characters could not be decoded" in capsys.readouterr().err
    file.write_bytes(text.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"prompts\.txt: UTF-16 without a byte-order mark"):
        read("--file", str(file))

    argument = os.fsdecode("élève".encode("latin-1"))  # by a terminal that is not UTF-8
    assert read(argument, "--encoding", "latin-1") == ["élève"]
    with pytest.raises(ValueError, match="a prompt: not utf-8"):
        read(argument)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode("utf-16"))))
    assert read("-") == ["é\n"]


def test_end_of_text_in_letters_gets_a_line(capsys):
    assert sample.read_prompts(sample.parse_arguments(["<|endoftext|>"])) == ["<|endoftext|>"]
    assert 'an empty one, "", begins a document' in capsys.readouterr().err


def test_the_newest_checkpoint_and_its_prompt_are_the_default(
    config, tmp_path, capsys, monkeypatch
):
    """Without any, an untrained model says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "GPTConfig", lambda: GPTConfig(**TOY_MODEL))
    out, err = run(capsys, "-m", "2")
    assert "UNTRAINED" in err and out.startswith(sample.HELLO)
    for age, name, steps in ((100, "older", 3), (0, "newer", 2)):
        run_settings = dict(out_dir=f"out/{name}", sample_prompt=f"{name} ")
        train.train(config(max_steps=steps, checkpoint_every=1, **run_settings))
        folder = Path(f"out/{name}/step_000000{steps}")
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    capsys.readouterr()
    out, err = run(capsys, "-m", "3")
    assert f"model: {Path('out/newer/step_0000002')}" in err and out.startswith("newer ")
    out, err = run(capsys, "-m", "3", "--model", "out/older")
    assert f"model: {Path('out/older/step_0000003')}" in err and out.startswith("older ")
    (folder / "settings.json").write_text("{")  # damaged: the weights can still be tried
    assert run(capsys, "-m", "3", "--model", str(folder))[0].startswith(sample.HELLO)


class Hub(SimpleHTTPRequestHandler):
    """A hub on loopback, as files: /api/models/NAME/revision/main and /NAME/resolve/COMMIT/FILE."""

    def end_headers(self):
        self.send_header("ETag", f'"{os.path.basename(self.path)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    log_message = staticmethod(lambda *_: None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """It has one model: a toy with GPT-2's vocabulary, named openai-community/gpt2."""
    torch.manual_seed(0)
    folder = tmp_path / "openai-community/gpt2/resolve"
    about = tmp_path / "api/models/openai-community/gpt2"
    GPT(GPTConfig(**TOY_MODEL | dict(n_layer=1, n_embd=16))).save_pretrained(folder / ("0" * 40))
    files = [dict(rfilename=file.name) for file in folder.glob("*/*")]
    entries = []
    for file in files:
        entries.append(dict(type="file", path=file["rfilename"], size=1, oid="0" * 40))
    answers = {
        "revision/main": dict(id="openai-community/gpt2", sha="0" * 40, siblings=files),
        "tree/" + "0" * 40: entries,
    }
    for name, content in answers.items():
        (about / name).parent.mkdir(parents=True)
        (about / name).write_text(json.dumps(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    constants = dict(
        ENDPOINT=url,
        HUGGINGFACE_CO_URL_TEMPLATE=url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(tmp_path / "cache"),
        HF_HUB_DISABLE_XET=True,
        HF_HUB_OFFLINE=False,
    )
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    yield server
    server.shutdown()
    server.server_close()


def test_gpt2_comes_from_the_hub_once(hub, capsys, monkeypatch):
    first, _ = run(capsys, "--model", "gpt2", "-m", "8")
    assert first.startswith(sample.HELLO)
    line = fails(capsys, "--model", "nobody/nothing")
    assert line.startswith(
        "sample.py: nobody/nothing: not a folder here, and not fetched from the Hugging Face hub"
    )
    hub.shutdown()
    hub.server_close()
    assert run(capsys, "--model", "gpt2", "-m", "8")[0] == first  # from the cache
    # A network that accepts connections and never answers.
    with socket.create_server(hub.server_address):
        monkeypatch.setattr(pretrained.fetch, "__defaults__", (0.1,))
        assert run(capsys, "--model", "gpt2", "-m", "8")[0] == first
        assert "ReadTimeout" in fails(capsys, "--model", "nobody/nothing")


# ---- What is wrong is one line -------------------------------------------------------------------


def test_bad_models_and_prompts_are_one_line(toy, capsys, tmp_path, monkeypatch):
    run(capsys, "--model", toy, "-p", "x" * 32, "-m", "3")  # a full window is not too long
    line = fails(capsys, "--model", toy, "-p", "short", "-p", "long " * 20)
    assert "prompt 2 of 2, 'long long long long long long '...: 100 tokens" in line
    assert "this model takes 32 at most; shorten it" in line
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n" * sample.BATCH + "long " * 20)
    with pytest.raises(SystemExit):
        sample.main(["--model", toy, "--file", str(prompts), "-m", "3", "--device", "cpu"])
    assert capsys.readouterr().out == ""  # no work before the mistake is found
    assert "gpt2-mediun: no such model; name gpt2, gpt2-medium" in fails(
        capsys, "--model", "gpt2-mediun"
    )
    assert "no config.json in this folder" in fails(capsys, "--model", str(tmp_path))
    GPT(GPTConfig(vocab_size=100, **TOY_MODEL)).save_pretrained(tmp_path)
    assert "no tokenizer beside it says which; copy its tokenizer.json" in fails(
        capsys, "--model", str(tmp_path)
    )
    model = GPT.from_pretrained(toy)
    model.transformer.ln_f.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    assert "logits are not finite: it is damaged, or its training diverged" in fails(
        capsys, "--model", str(tmp_path)
    )
    monkeypatch.setattr(inference, "stream", Mock(side_effect=torch.OutOfMemoryError))
    assert "out of memory; fewer --samples" in fails(capsys, "--model", toy)


EXCLUDE_EACH_OTHER = (
    "-i -n 2",
    "-i --json",
    "-i --web",
    "-i --file x",
    "-i --logprobs",
    "--web -n 2",
    "--web --json",
)
BAD_OPTIONS = dict.fromkeys(EXCLUDE_EACH_OTHER, "exclude each other") | {
    "--temperature nan": "temperature must be 0 or more",
    "--top_p 1.5": "top_p must be at most 1",
    "--repetition_penalty 0": "repetition_penalty must be 0.01 or more",
    "--stop \udce9": "--stop: it is not UTF-8",
    "-n 0": "samples must be 1 to 1,000,000, not 0",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_one_line(capsys, options):
    assert BAD_OPTIONS[options] in fails(capsys, *options.split())


# ---- What is shown: characters, stops, streams, JSON, colours ------------------------------------


def grow(tokens: list[bytes], stops: list[str], end=None) -> tuple[Text, list[str]]:
    """A text that grew by tokens of these bytes, number `end` ending it, and what it showed after
    each.
    """
    tokenizer = BytesTokenizer()
    tokenizer.end_of_text = end
    tokenizer.decode_bytes = lambda ids: b"".join(tokens[i] for i in ids)
    text = Text(tokenizer, "x", 0, stops)
    shown = [text.add(i) for i in range(len(tokens)) if not text.done]
    return text, shown if text.done else [*shown, text.add(None)]


@given(st.text(max_size=20), st.lists(st.text(max_size=3), max_size=3), st.data())
def test_what_is_shown_is_the_text_up_to_the_first_stop(text, stops, draw):
    """However the text's bytes are cut into tokens: never half a character, never a part of a
    stop.
    """
    raw = text.encode("utf-8", errors="replace")
    text = raw.decode()
    stops = [stop for stop in stops if stop.encode("utf-8", errors="replace").decode() == stop]
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    grown, shown = grow([raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])], stops)
    ends = [text.find(stop) for stop in grown.stops if stop in text]
    # With several stops the one that is whole first ends the text; of one, the earliest.
    if len(grown.stops) <= 1:
        assert grown.text == (text[: min(ends)] if ends else text)
    assert "".join(shown) == grown.text and text.startswith(grown.text)
    assert not any(stop in grown.text for stop in grown.stops)


def test_what_ends_a_text():
    # Half a character at the end.
    assert grow([b"a\xe6\xbc", b"\xa2b", b"\xe6"], [])[1] == ["a", "漢b", "", "\ufffd"]
    assert grow([b"a", b"<|endoftext|>"], ["ab"], end=1)[1] == ["", "a"]  # is no part of it
    assert grow([b"x", b"abc"], ["c", "b"])[1] == ["x", "a"]  # of two stops in a token, the first
    assert grow([b"ab\xe6"], ["b"])[1] == ["a"]  # nor is half a character behind a stop
    assert grow([b"a", b"\n", b"\n"], ["", "\\n\\n"])[1] == ["a", "", ""]  # no text is no stop


def test_a_stop_text_ends_the_sample(toy, capsys):
    arguments = ("--model", toy, "-p", "ab", "-m", "80")
    text = run(capsys, *arguments)[0][2:-1]
    stop = next(text[i : i + 2] for i in range(5, 60) if "\ufffd" not in text[i : i + 2])
    stopped, _ = run(capsys, *arguments, "--stop", stop, "--stop", "\\n never \\n")
    assert stopped == "ab" + text[: text.index(stop)] + "\n"
    # It stays ended beside one that goes on.
    assert run(capsys, *arguments, "-p", "x", "--stop", stop)[0].startswith(stopped + RULE)
    # Nothing is computed behind it.
    model = GPT.from_pretrained(toy)
    settings = check_settings(vars(sample.parse_arguments(["-m", "80"])))
    grown = Text(get_tokenizer("bytes"), "ab", 1337, [stop])
    assert len(list(complete(model, [grown], settings, logprobs=True))) == len(grown.record) < 80


def test_a_single_sample_is_shown_as_it_comes(toy, capsys, monkeypatch):
    arguments = ("--model", toy, "-p", "The fox", "-m", "60", "--top_k", "0")
    first = run(capsys, *arguments, "-n", "2")[0].split(RULE)[0]  # several at once would mix
    show = watch(monkeypatch, sample, "show")
    assert run(capsys, *arguments)[0] == first
    assert sum(call.args[0] != "" for call in show.call_args_list) > 30


def test_json_is_for_programs(toy, capsys):
    arguments = f"--model {toy} -p ab -p The_fox -n 2 -m 7 --temperature 0".split()
    whole, _ = run(capsys, *arguments)
    out, _ = run(capsys, *arguments, "--json", "--logprobs")
    records = [json.loads(line) for line in out.splitlines()]
    assert (
        RULE.join(f"{record['prompt']}{printable(record['completion'])}\n" for record in records)
        == whole
    )
    # Against a plain sum over the model's own log-probabilities.
    model, prompt = GPT.from_pretrained(toy), list(b"The_fox")
    row = torch.tensor([prompt + generate(model, [prompt], 7, temperature=0)[0]])
    logp = model(row[:, :-1]).log_softmax(-1)[0].gather(1, row[0, 1:, None])[len(prompt) - 1 :, 0]
    assert records[2]["logprob"] == pytest.approx(logp.sum().item(), abs=1e-4)
    assert [value for _, value in records[2]["logprobs"]] == pytest.approx(logp.tolist(), abs=1e-4)
    assert records[2]["tokens"] == 7 and records[2]["tokens_per_s"] > 0
    lone, _ = run(capsys, "--model", toy, "-p", "ab", "-m", "7", "--json")
    assert set(json.loads(lone)) == {"prompt", "completion", "tokens", "logprob", "tokens_per_s"}


def test_logprobs_show_what_might_have_stood_there(toy, capsys, monkeypatch):
    """Colours, on a terminal only, say how likely the token was itself."""
    arguments = ("--model", toy, "-p", "ab", "-m", "40", "--logprobs", "--temperature", "2")
    whole, _ = run(capsys, *arguments)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured, _ = run(capsys, *arguments)
    assert coloured.startswith("\033[1mab\033[0m") and "\033" not in whole
    text = coloured.partition("\n ")[0]  # it has the tokens' colours too
    assert sample.LIKELY in text or sample.UNLIKELY in text
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == whole
    styles = set()
    for row in coloured.splitlines()[-40:]:
        value, style, likely = re.match(
            r" *(-[\d.]+)  \033\[([\d;]+)m.*\033\[0m of (.*)$", row
        ).groups()
        likely = [float(other) for other in re.findall(r" (-\d+\.\d\d)(?:  |$)", likely)]
        assert 2 <= len(likely) <= 5 and likely == sorted(likely, reverse=True)
        assert len(re.sub(r"\033\[[\d;]*m", "", row)) <= 80
        assert likely[0] >= float(value) - 0.006
        p = math.exp(float(value))
        assert style == (sample.LIKELY if p > 0.5 else sample.UNLIKELY if p < 0.05 else sample.BOLD)
        styles.add(style)
    assert len(styles) == 3


def test_a_pipe_that_lacks_letters_and_closes_early_is_no_error(toy):
    """As with `| head -1`: the reader takes a line and leaves."""
    options = f"--model {toy} -p 漢 -n 300 -m 1 --device cpu".split()
    command = [sys.executable, "sample.py", *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = clean_environment(PYTHONIOENCODING="ascii")
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout.readline().startswith("?")
        process.stdout.close()
        assert "Broken pipe" not in process.stderr.read() and process.wait(60) == 0


# ---- Writing together ----------------------------------------------------------------------------


def test_writing_together(toy, capsys, monkeypatch):
    """The text grows by lines of both. A command counts from the next line on, a mistake changes
    nothing.
    """
    commands = ["/temperature 0", "/max_tokens 5", "ab", "/top_p 7", "/seed x", "/hi"]
    type_in(monkeypatch, *commands, "/save a\0b", "caf\udce9", "cd", "/reset", "ab")
    out, err = run(capsys, "--model", toy, "-i")
    tokens, model = get_tokenizer("bytes"), GPT.from_pretrained(toy)

    def continued(text: str) -> str:
        [ids] = generate(model, [list(text.encode())], 5, temperature=0, stop_token=256)
        return tokens.decode(ids)

    first = continued("ab")
    second = continued(f"ab{first}\ncd")
    lines = [printable(text) + "\n" for text in (first, second, first, "")]
    assert out.replace("> ", "") == "".join(lines)
    mistakes = err.splitlines()[-5:]
    assert mistakes[0] == "/top_p 7: top_p must be at most 1"
    assert mistakes[1].startswith("/seed x: ")
    assert mistakes[2] == "/hi: no such command; /help lists them"
    assert "null" in mistakes[3]
    assert mistakes[4] == "this line is not UTF-8; type it again"
    type_in(monkeypatch, "/help")
    help_lines = run(capsys, "--model", toy, "-i")[1]
    assert set(re.findall(r"^  /(\w+)", help_lines, re.M)) == {*SETTINGS, *sample.COMMANDS}
    assert "0 always takes the most likely token (now 1.0)" in help_lines


def test_an_answer_can_be_taken_back_tried_again_shown_and_saved(
    toy, capsys, monkeypatch, tmp_path
):
    stream = watch(monkeypatch, inference, "stream")
    file = tmp_path / "story.txt"
    lines = ["/undo", "ab", "/retry", "cd", "/undo", "/text", f"/save {file}", "/save", "/temp 1"]
    type_in(monkeypatch, *lines, "/seed", "/tempratur 2", "/seed 9", "/quit", "never read")
    out, err = run(capsys, "--model", toy, "-i", "-m", "5", "--seed", "7")
    prompts = [bytes(call.args[1][0]) for call in stream.call_args_list]
    assert prompts[:2] == [b"ab", b"ab"] and prompts[2].endswith(b"\ncd") and len(prompts) == 3
    assert [call.args[3] for call in stream.call_args_list] == [[7], [8], [9]]
    story = file.read_text()
    assert story.startswith("ab") and "cd" not in story and story.endswith("\n")
    assert out.count(printable(story)) == 3  # as it was written, taken back to, and shown
    assert err.splitlines()[-7:] == [
        "/undo: there is no answer yet",
        f"{file}: {len(story)} characters",
        "/save: is empty; an unset variable?",
        "/temp 1: no such command: did you mean temperature?",
        "seed is 10",
        "/tempratur 2: no such command: did you mean temperature?",
        "seed is 9",
    ]


def test_writing_together_continues_past_the_window(toy, capsys, monkeypatch):
    """-p opens the text; the model reads its end. Each answer has its own seed."""
    stream = watch(monkeypatch, inference, "stream")
    line = "a line of some length, number one"
    type_in(monkeypatch, line, "next", "/max_tokens 30", "/seed 50", "on", "/reset", "")
    out, _ = run(capsys, "--model", toy, "-i", "-p", "Once ", "-m", "8", "--seed", "7")
    assert out.startswith("Once ")
    [first], [second], [third], [fourth] = (call.args[1] for call in stream.call_args_list)
    assert bytes(first) == f"Once {line}".encode()[-24:]  # of 32: the answer has 8
    assert len(second) == 24 and bytes(second).endswith(b"\nnext")
    assert len(third) == 16  # at least half a window
    assert fourth == [256]  # nothing at all begins a document
    assert [call.args[3] for call in stream.call_args_list] == [[7], [8], [50], [51]]


def test_ctrl_c_ends_an_answer_or_the_program(toy, capsys, monkeypatch):
    monkeypatch.setattr(inference, "stream", Mock(side_effect=KeyboardInterrupt))
    type_in(monkeypatch, "a", "b")
    # Two answers and the end of the input.
    assert run(capsys, "--model", toy, "-i")[0] == "> \n> \n> \n"
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "--model", toy)
    assert exit_.value.code == 130


# ---- The page ------------------------------------------------------------------------------------


@pytest.fixture
def page(toy, monkeypatch):
    """What the command with these arguments gives page.serve."""

    def page(*argv: str, model: str = toy) -> list:
        serve = Mock()
        monkeypatch.setattr(page_part, "serve", serve)
        sample.main(["--model", str(model), "--web", *argv, "--device", "cpu", "--dtype", "fp32"])
        answers, *rest = serve.call_args.args
        return [answers["answer"], *rest]

    return page


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Three checkpoints, each of another model, and how the training went."""
    folder, settings = tmp_path / "small", dict(settings=dict(sample_prompt="ROMEO:"))
    for step in (100, 200, 300):
        make_toy(n_layer=step // 100).save_pretrained(folder / f"step_{step:07d}")
        (folder / f"step_{step:07d}" / "settings.json").write_text(json.dumps(settings))
    train = [dict(kind="train", step=step, loss=4 - step / 1000) for step in range(1000)]
    val = [dict(kind="val", step=0, loss=4.2), dict(kind="val", step=100, loss=None)]
    lines = [json.dumps(record) for record in [*train, *val]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    return folder


def make_request(form: dict, **changes) -> dict:
    """The request that the page sends with the form as it is."""
    fields = dict(prompt=form["prompts"][0], checkpoint=form["checkpoint"], stop="", taken=[])
    return form["settings"] | fields | changes


def shown(pieces: list[dict]) -> str:
    return "".join(piece["text"] for piece in pieces)


def test_a_long_prompt_is_cut_and_the_page_is_told_where(page):
    answer, _, form, _ = page("-m", "4")
    prompt = 20 * "0" + "\N{LLAMA}" + 27 * "a"
    first, *_ = answer(make_request(form, prompt=prompt, taken=[65]))
    # Of its 52 tokens 28 are read, and 4 of 32 are left for new ones; one was taken.
    assert (first["start"], first["length"]) == (24, 51)
    assert shown(first["prompt"]) == 27 * "a"
    first, *_ = answer(make_request(form, prompt=prompt[1:] + "b"))
    assert shown(first["prompt"]) == 27 * "a" + "b"
    first, *_ = answer(make_request(form, prompt=prompt[:-2]))  # the cut is within the character
    assert shown(first["prompt"]) == 3 * "\N{REPLACEMENT CHARACTER}" + 25 * "a"
    first, *_ = answer(make_request(form, prompt=""))
    assert (first["prompt"], first["length"], first["start"]) == ([], 1, 0)


def test_hyphens_in_the_names_of_options_are_underscores():
    arguments = sample.parse_arguments(["--max-tokens", "5", "--top-p=0.5", "a-b", "--stop=-x-"])
    assert (arguments.max_tokens, arguments.top_p) == (5, 0.5)
    assert (arguments.prompts, arguments.stop) == (["a-b"], ["-x-"])
    with pytest.raises(ValueError, match="unrecognized arguments: --max-tokns"):
        sample.parse_arguments(["--max-tokns=5"])


def test_the_first_text_of_the_page_has_settings_of_its_own(page):
    settings = page()[2]["settings"]
    assert (settings["temperature"], settings["top_p"]) == (0.8, 0.9)
    settings = page("--temperature", "1.0")[2]["settings"]  # who names one means it
    assert (settings["temperature"], settings["top_p"]) == (1.0, 0.9)
    arguments = sample.parse_arguments([])
    assert (arguments.temperature, arguments.top_p) == (1.0, 1.0)


def test_the_page_begins_with_the_settings_of_the_command_and_answers_like_it(toy, capsys, page):
    arguments = ("-p", "The fox", "-m", "20", "--seed", "5", "--top_k", "9")
    arguments += ("--temperature", "1.0", "--top_p", "1.0")
    answer, progress, form, port = page(*arguments, "--stop", "\\n", "--port", "7")
    assert toy in form["about"] and form["title"] == Path(toy).name and port == 7
    assert progress() == dict(checkpoints=[], train=[], val=[])  # it is no run's
    assert (form["prompts"], form["stop"]) == (["The fox", sample.HELLO], ["\\n"])
    assert (form["settings"]["top_k"], form["settings"]["seed"], form["pinned"]) == (9, 5, True)
    assert form["limits"]["top_p"] == [0, 1] and not page()[2]["pinned"]
    first, *events = answer(make_request(form))
    record = json.loads(run(capsys, "--model", toy, *arguments, "--json")[0])
    # A token a byte.
    assert first["prompt"] == [dict(id=byte, text=chr(byte)) for byte in b"The fox"]
    assert (first["taken"], first["start"], first["context"], first["length"]) == ([], 0, 32, 7)
    assert "".join(event["text"] for event in events) == record["completion"]
    tokens = [token for event in events for token in event["tokens"]]
    assert len(tokens) == record["tokens"]
    logprob = sum(math.log(token["p"]) for token in tokens)
    assert logprob == pytest.approx(record["logprob"])
    assert bytes(token["id"] for token in tokens).decode(errors="replace") == record["completion"]
    for token in tokens:
        likely = [other["p"] for other in token["likely"]]
        assert len(likely) == 5 and likely == sorted(likely, reverse=True)
        assert token["p"] <= likely[0] + 1e-9


def test_an_answer_goes_on_behind_what_was_taken(page):
    answer, _, form, _ = page("-m", "12", "--seed", "5", "--temperature", "0")
    [_, *events] = answer(make_request(form, prompt="The "))
    ids = [token["id"] for event in events for token in event["tokens"]]
    texts = [event["text"] for event in events]
    for n in (1, 7, 12):  # always the most likely token: so the continuation is the same
        first, *rest = answer(make_request(form, prompt="The ", taken=ids[:n], max_tokens=12))
        assert shown(first["taken"]) == "".join(texts[:n])
        assert [token["id"] for event in rest for token in event["tokens"]][: 12 - n] == ids[n:]
    answer = page("-m", "12")[0]
    continuations = set()
    for taken in ([], list(b"The ")):  # other draws behind what was taken
        request = make_request(form, prompt="The ", taken=taken, temperature=1.0)
        continuations.add("".join(event["text"] for event in list(answer(request))[1:]))
    assert len(continuations) == 2


def test_taken_tokens_are_shown_whole_whatever_ends_a_text(page):
    answer, _, form, _ = page("-m", "1")
    llama = "\N{LLAMA}".encode()
    first, *rest = answer(make_request(form, taken=[*b"a STOP", 256, *llama[:2]], stop="STOP"))
    taken = [piece["text"] for piece in first["taken"]]
    assert taken == [*"a STOP", "", "", ""]  # half a character waits for the rest
    assert len(rest[0]["tokens"]) == 1
    first, _, *rest = answer(make_request(form, taken=[*b"b", *llama, *b"c"]))
    assert shown(first["taken"]) == "b\N{LLAMA}c"


def test_what_the_page_may_ask(page):
    answer, _, form, _ = page("-m", "30")
    wrong = dict(temperature=-(10**400), min_p=False, top_k=None, max_tokens=2.5, seed="1")
    for name, value in wrong.items():
        message = rf"^{name} must be (a number|a whole number|0 or more)$"
        with pytest.raises(ValueError, match=message):
            list(answer(make_request(form, **{name: value})))
    for taken in ([257], [-1], [1.0], ["a"], [None]):
        with pytest.raises(ValueError, match=r"^taken must be the ids of tokens$"):
            list(answer(make_request(form, taken=taken)))
    for prompt in ("x" * 99, "half a character \ud800"):  # long ones are cut as with -i
        assert list(answer(make_request(form, prompt=prompt)))


def test_the_page_opens_the_checkpoints_of_its_run(page, run_folder):
    answer, progress, form, _ = page("-m", "20", "--seed", "3", model=run_folder)
    assert (form["title"], form["checkpoint"]) == ("small", "step_0000300")
    assert form["prompts"] == ["ROMEO:"]
    told = progress()
    assert told["checkpoints"] == ["step_0000100", "step_0000200", "step_0000300"]
    assert told["val"] == [(0, 4.2)] and len(told["train"]) == 300
    # A loss counts as of after its update.
    assert (told["train"][0], told["train"][-1]) == ((1, 4), (1000, 4 - 0.999))

    def text(answer, name: str) -> str:
        return "".join(
            event.get("text", "") for event in answer(make_request(form, checkpoint=name))
        )

    texts = {name: text(answer, name) for name in told["checkpoints"]}
    assert len(set(texts.values())) == 3
    # As if the page had been started with it, and again when another was open.
    for name in reversed(texts):
        alone = page("-m", "20", "--seed", "3", model=run_folder / name)[0]
        assert text(answer, name) == text(alone, name) == texts[name]


def test_checkpoints_are_opened_by_a_name_on_the_list_only(page, run_folder):
    answer, progress, form, _ = page("-m", "2", model=run_folder)
    shutil.copytree(run_folder / "step_0000100", run_folder / "other")
    shutil.rmtree(run_folder / "step_0000200")  # by keep_checkpoints
    assert progress()["checkpoints"] == ["step_0000100", "step_0000300"]
    path = str(run_folder / "step_0000100")
    for name in ("other", "step_0000200", path, "./step_0000100", "step_0000100/", "", None, [], 7):
        message = r"^there is no checkpoint .* \(any more\); choose another$"
        with pytest.raises(ValueError, match=message):
            next(answer(make_request(form, checkpoint=name)))
    (run_folder / "step_0000100" / "model.safetensors").write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model\.safetensors: not a file of weights"):
            list(answer(make_request(form, checkpoint="step_0000100")))
    assert list(answer(make_request(form)))  # the first opens again
