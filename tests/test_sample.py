"""sample.py as people use it: from a checkpoint, from a hub, from nothing, and wrongly."""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TOY_MODEL, clean_environment
from hypothesis import given
from hypothesis import strategies as st

import data
import sample
import train
from generate import generate, pack
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent


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
    typed = iter(lines)

    def line_or_end(_prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line_or_end)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toy")
    GPT(GPTConfig(vocab_size=257, **TOY_MODEL)).save_pretrained(folder)
    return str(folder)


def test_samples_of_several_prompts(toy, capsys):
    out, err = run(capsys, "--model", toy, "-p", "ab", "-p", "c", "-n", "2", "-m", "5")
    texts = out.split("-" * 40 + "\n")
    assert len(texts) == 4 and [text[:1] for text in texts] == ["a", "a", "c", "c"]
    assert texts[0] != texts[1]
    assert f"model: {toy}" in err


def test_the_same_seed_gives_the_same_text_whatever_the_batch(toy, capsys):
    arguments = ("--model", toy, "-m", "40", "--seed", "3")
    alone, _ = run(capsys, *arguments, "-p", "The fox")
    again, _ = run(capsys, *arguments, "-p", "The fox")
    batch, _ = run(capsys, *arguments, "-p", "A longer prompt", "-p", "The fox", "-n", "3")
    assert alone == again and alone.strip("\n") in batch
    other, _ = run(capsys, "--model", toy, "-m", "40", "--seed", "4", "-p", "The fox")
    assert other != alone
    both, _ = run(capsys, *arguments, "-p", "The fox", "-n", "2")  # sample i draws from seed + i
    assert both == alone + "-" * 40 + "\n" + other


def test_the_newest_checkpoint_and_its_prompt_are_the_default(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name, steps in ((100, "older", 3), (0, "newer", 2)):
        train.train(config(out_dir=f"out/{name}", max_steps=steps, checkpoint_every=1, sample_prompt=f"{name} "))
        folder = Path(f"out/{name}/step_000000{steps}")
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    capsys.readouterr()
    out, err = run(capsys, "-m", "3")
    assert f"model: {Path('out/newer/step_0000002')}" in err and out.startswith("newer ")
    out, err = run(capsys, "-m", "3", "--model", "out/older")
    assert f"model: {Path('out/older/step_0000003')}" in err and out.startswith("older ")
    (folder / "settings.json").write_text("{")  # damaged: the weights can still be tried
    assert run(capsys, "-m", "3", "--model", str(folder))[0].startswith(sample.HELLO)


def test_without_any_model_an_untrained_one_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "GPTConfig", lambda: GPTConfig(vocab_size=257, **TOY_MODEL))
    out, err = run(capsys, "-m", "2")
    assert "UNTRAINED" in err and out.startswith("Hello, I'm a language model,")


def test_an_empty_prompt_begins_a_document(toy, capsys):
    out, _ = run(capsys, "--model", toy, "-p", "", "-m", "5")
    ids = generate(GPT.from_pretrained(toy), [[256]], 5, seeds=[1337], top_k=50, stop_token=256)[0]
    assert out == data.printable(data.get_tokenizer("bytes").decode(ids)) + "\n"


def test_bad_input_is_one_line(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run(capsys, "--model", toy, "-p", "x" * 32, "-m", "3")  # a full window is not too long
    line = fails(capsys, "--model", toy, "-p", "short", "-p", "long " * 20)
    assert "the prompt 'long long long long long long '... has 100 tokens, the model reads 32; shorten it" in line
    assert "not fetched from the Hugging Face hub" in fails(capsys, "--model", "no-such/model")
    assert "gpt2-mediun: no such model; name gpt2, gpt2-medium" in fails(capsys, "--model", "gpt2-mediun")
    nowhere = str(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    assert f"{nowhere}: no such model" in fails(capsys, "--model", nowhere)
    assert "no config.json in this folder" in fails(capsys, "--model", str(tmp_path))
    assert "samples is 0; it must be at least 1" in fails(capsys, "--model", toy, "-n", "0")
    assert "temperature is nan; it must" in fails(capsys, "--model", toy, "--temperature", "nan")
    GPT(GPTConfig(vocab_size=100, **TOY_MODEL)).save_pretrained(tmp_path)
    assert "no tokenizer here is 100" in fails(capsys, "--model", str(tmp_path))


# ---- The hub, played by a server on loopback -------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for a model: the list of its files, then HEAD (size, hash, commit) and GET of each."""

    folder: Path
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        file = self.folder / self.path.rsplit("/", 1)[-1]
        if self.path.startswith("/api/models/openai-community/gpt2"):
            names = [file.name for file in self.folder.iterdir()]
            content = dict(id="openai-community/gpt2", sha="0" * 40, siblings=[dict(rfilename=name) for name in names])
            if "/tree/" in self.path:
                content = [dict(type="file", path=name, size=1, oid="0" * 40) for name in names]
            status, headers, content = 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
        elif self.path.startswith("/openai-community/gpt2/resolve/") and file.is_file():
            content = file.read_bytes()
            status, headers = 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        else:
            status, headers, content = 404, {"X-Error-Code": "RepoNotFound"}, b""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback with one model: a toy with GPT-2's vocabulary, named openai-community/gpt2."""
    torch.manual_seed(0)
    GPT(GPTConfig(**TOY_MODEL | dict(n_layer=1, n_embd=16))).save_pretrained(tmp_path / "hub")
    handler = type("ThisHub", (Hub,), dict(folder=tmp_path / "hub", asked=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    constants = dict(ENDPOINT=url, HUGGINGFACE_CO_URL_TEMPLATE=url + "/{repo_id}/resolve/{revision}/{filename}")
    constants |= dict(HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False)
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    yield handler
    server.shutdown()
    server.server_close()


def test_gpt2_comes_from_the_hub_once(hub, capsys, monkeypatch):
    first, _ = run(capsys, "--model", "gpt2", "-m", "8")
    assert first.startswith(sample.HELLO) and any(path.endswith("model.safetensors") for path in hub.asked)
    line = fails(capsys, "--model", "nobody/nothing")
    assert line.startswith("sample.py: nobody/nothing: not a folder here, and not fetched from the Hugging Face hub")
    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(capsys, "--model", "gpt2", "-m", "8")[0] == first and not hub.asked  # from the cache


# ---- Streaming, stops, JSON, files -----------------------------------------------------------------------------------


def completion(tokens: list[bytes], stops: list[str], end=None) -> tuple[sample.Completion, list[str]]:
    """A completion fed with tokens of these bytes, number `end` ending it, and what it showed after each."""

    class Spelling(data.BytesTokenizer):
        end_of_text = end

        def decode_bytes(self, ids):
            return b"".join(tokens[i] for i in ids)

    grown = sample.Completion(Spelling(), stops)
    shown = []
    for i in range(len(tokens)):
        if not grown.done:
            shown.append(grown.add(i))
    return grown, [*shown, grown.finish()]


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_what_is_shown_is_the_text_up_to_the_first_stop(text, stops, draw):
    """However the text's bytes are cut into tokens: never half a character, never a part of a stop."""
    raw = text.encode("utf-8", errors="replace")
    text = raw.decode()
    stops = [stop for stop in stops if stop.encode("utf-8", errors="replace").decode() == stop]
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    grown, shown = completion(pieces, stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    # With several stops the one that is whole first ends the text; of one, the earliest.
    if len(stops) <= 1:
        assert grown.text == (text[: min(ends)] if ends else text)
    assert "".join(shown) == grown.text and text.startswith(grown.text)
    assert not any(stop in grown.text for stop in stops)


def test_half_a_character_at_the_end_is_shown_as_such():
    grown, shown = completion([b"a\xe6\xbc", b"\xa2b", b"\xe6"], [])
    assert shown == ["a", "漢b", "", "\ufffd"] and grown.text == "a漢b\ufffd"


def test_what_ends_a_text_is_no_part_of_it():
    assert completion([b"a", b"<|endoftext|>"], ["ab"], end=1)[1] == ["", "a", ""]
    assert completion([b"x", b"abc"], ["c", "b"])[1] == ["x", "a", ""]  # of two stops in a token, the first
    assert completion([b"ab\xe6"], ["b"])[1] == ["a", ""]  # nor is half a character behind a stop


def test_streamed_is_whole(toy, capsys, monkeypatch):
    arguments = ("--model", toy, "-p", "The fox", "-m", "60", "--top_k", "0")
    whole, _ = run(capsys, *arguments)
    shown = []
    monkeypatch.setattr(sample, "show", lambda text: (shown.append(text), print(data.printable(text), end=""))[0])
    streamed, _ = run(capsys, *arguments, "--stream")
    assert streamed == whole and sum(map(bool, shown)) > 30
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown.clear()
    assert re.sub(r"\033\[[\d;]*m", "", run(capsys, *arguments, "--no-stream")[0]) == whole and not shown
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    lone, _ = run(capsys, *arguments, "-n", "2", "--stream")  # several samples are not mixed into each other
    assert lone.startswith(whole)


def test_a_stop_text_ends_the_sample(toy, capsys):
    whole, _ = run(capsys, "--model", toy, "-p", "ab", "-m", "80")
    text = whole[2:-1]
    stop = next(text[i : i + 2] for i in range(5, 60) if "\ufffd" not in text[i : i + 2])
    stopped, _ = run(capsys, "--model", toy, "-p", "ab", "-m", "80", "--stop", stop, "--stop", "\\n never \\n")
    assert stopped == "ab" + text[: text.index(stop)] + "\n"
    # Beside one that goes on, it stays ended.
    both, _ = run(capsys, "--model", toy, "-p", "ab", "-p", "x", "-m", "80", "--stop", stop)
    assert both.startswith(stopped + "-" * 40 + "\n")
    # Nothing is computed behind it.
    model, settings = GPT.from_pretrained(toy), sample.parse_arguments(["-m", "80"]).settings
    grown = sample.Completion(data.get_tokenizer("bytes"), [stop])
    assert len(list(sample.complete(model, [list(b"ab")], [1337], [grown], settings))) == len(grown.ids) < 80
    # What begins a stop that does not come is text, and no text is no stop.
    raw = json.loads(run(capsys, "--model", toy, "-p", "ab", "-m", "80", "--json")[0])["completion"]
    assert run(capsys, "--model", toy, "-p", "ab", "-m", "80", "--stop", "", "--stop", raw[-1] + " never")[0] == whole


def test_json_is_for_programs(toy, capsys):
    arguments = ("--model", toy, "-p", "ab", "-p", "The fox", "-n", "2", "-m", "7", "--temperature", "0")
    plain, _ = run(capsys, *arguments)
    out, _ = run(capsys, *arguments, "--json", "--logprobs")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["ab", "ab", "The fox", "The fox"]
    assert [record["prompt"] + data.printable(record["completion"]) for record in records] == plain[:-1].split(
        "\n" + "-" * 40 + "\n"
    )
    # Against a plain sum over the model's own log-probabilities.
    model, tokens = GPT.from_pretrained(toy), data.get_tokenizer("bytes")
    prompt = tokens.encode("The fox").tolist()
    row = torch.tensor([prompt + generate(model, [prompt], 7, temperature=0)[0]])
    logp = model(row[:, :-1]).log_softmax(-1)[0].gather(1, row[0, 1:, None])[len(prompt) - 1 :, 0]
    assert records[2]["logprob"] == pytest.approx(logp.sum().item(), abs=1e-4)
    assert [value for _, value in records[2]["logprobs"]] == pytest.approx(logp.tolist(), abs=1e-4)
    assert records[2]["tokens"] == 7 and records[2]["tokens_per_s"] > 0
    lone, _ = run(capsys, "--model", toy, "-p", "ab", "-m", "7", "--json", "--stream")
    assert set(json.loads(lone)) == {"prompt", "completion", "tokens", "logprob", "tokens_per_s"}


def test_prompts_come_from_files_and_the_standard_input(toy, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("first\n \nsecond\n")
    (tmp_path / "prompts.jsonl").write_text('\ufeff{"prompt": "third\\nline"}\n"fourth\u2028"\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    common = ("--model", toy, "-m", "2", "--json")
    out, _ = run(capsys, *common, "--file", str(tmp_path / "prompts.txt"), "-p", "-")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["from a pipe\n", "first", "second"]
    out, _ = run(capsys, *common, "--file", str(tmp_path / "prompts.jsonl"))
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["third\nline", "fourth\u2028"]
    for name, content, message in (
        ("a.jsonl", '{"text": "x"}\n', 'a.jsonl, line 1: not a JSON object with a text as "prompt"'),
        ("b.jsonl", '"ok"\n[1]\n', "b.jsonl, line 2: not a JSON object with a text"),
        ("b.jsonl", '{"prompt": 1}\n', "b.jsonl, line 1: not a JSON object with a text"),
        ("c.txt", "\n", "c.txt: no prompts in it"),
    ):
        (tmp_path / name).write_text(content)
        assert message in fails(capsys, "--model", toy, "--file", str(tmp_path / name))
    assert "nowhere.txt" in fails(capsys, "--model", toy, "--file", "nowhere.txt")


@pytest.mark.parametrize("option", ["--top_p 1.5", "--min_p -1", "--repetition_penalty 0", "--temperature nan"])
def test_sampling_out_of_range_is_one_line(toy, capsys, option):
    assert "it must be at least" in fails(capsys, "--model", toy, *option.split())


def test_prompts_without_an_option(toy, capsys):
    """A prompt may stand before or behind the options, and beside -p."""
    expected = run(capsys, "-p", "ab", "-p", "c", "--model", toy, "-m", "3")[0]
    assert run(capsys, "ab", "c", "--model", toy, "-m", "3")[0] == expected
    assert run(capsys, "ab", "--model", toy, "-m", "3", "c")[0] == expected
    assert run(capsys, "--model", toy, "-m", "3", "-p", "c", "ab")[0] == expected


def test_writing_together(toy, capsys, monkeypatch):
    """The text grows by lines of both. Commands change what comes after them, mistakes change nothing."""
    type_in(monkeypatch, "/temperature 0", "/max 5", "ab", "/top_p 7", "/seed x", "/nonsense", "cd", "/reset", "ab")
    out, err = run(capsys, "--model", toy, "-i")
    tokens, model = data.get_tokenizer("bytes"), GPT.from_pretrained(toy)

    def continued(text: bytes) -> bytes:
        return bytes(generate(model, [list(text)], 5, temperature=0, stop_token=256)[0])

    first = continued(b"ab")
    second = continued(b"ab" + first + b"\ncd")
    assert (
        out == "".join(data.printable(tokens.decode(list(answer))) + "\n" for answer in (first, second, first)) + "\n"
    )
    mistakes = err.splitlines()[-3:]
    assert mistakes[0] == "/top_p 7: top_p is 7.0; it must be at least 0 and at most 1"
    assert mistakes[1].startswith("/seed x: ") and mistakes[2] == "/nonsense: no such command; /help lists them"
    type_in(monkeypatch, "/help")
    assert set(re.findall(r"^  /(\w+)", run(capsys, "--model", toy, "-i")[1], re.M)) == {*sample.SETTINGS, "reset"}


@pytest.mark.parametrize("mode", ["-i", "--web"])
def test_options_that_exclude_each_other(capsys, mode):
    for other in ("-n 2", "--file x", "--json", "--logprobs", "-i --web"):
        assert "exclude each other" in fails(capsys, mode, *other.split())


def test_an_empty_line_begins_a_document_or_adds_nothing(toy, capsys, monkeypatch):
    contexts = []
    type_in(monkeypatch, "", "")
    monkeypatch.setattr(sample.generate, "stream", lambda _, prompts, *a, **o: contexts.append(prompts[0]) or iter(()))
    run(capsys, "--model", toy, "-i")
    assert contexts == [[256], [256, ord("\n")]]


def test_ctrl_c_ends_an_answer_or_the_program(toy, capsys, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.generate, "stream", interrupted)
    type_in(monkeypatch, "a", "b")
    assert run(capsys, "--model", toy, "-i")[0] == "\n\n\n"  # two answers and the end of the input
    with pytest.raises(SystemExit) as exit_:
        run(capsys, "--model", toy)
    assert exit_.value.code == 130


def test_a_terminal_that_lacks_letters_gets_others(toy, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    sample.main(["--model", toy, "-p", "漢", "-m", "1", "--device", "cpu"])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(b"?")


def test_writing_together_continues_past_the_window(toy, capsys, monkeypatch):
    """-p opens the text; the model reads its end. Each answer has its own seed."""
    asked, stream = [], sample.generate.stream

    def watched(model, prompts, max_tokens, seeds, *args, **options):
        asked.append((bytes(prompts[0]), seeds))
        return stream(model, prompts, max_tokens, seeds, *args, **options)

    monkeypatch.setattr(sample.generate, "stream", watched)
    type_in(monkeypatch, "a line of some length, number one", "another line", "/max 30", "/seed 50", "and on")
    assert run(capsys, "--model", toy, "-i", "-p", "Once ", "-m", "8", "--seed", "7")[0].startswith("Once ")
    (first, second, third), seeds = zip(*asked)
    assert first == b"Once a line of some length, number one"[-24:]  # of 32, with room for the answer
    assert len(second) == 24 and second.endswith(b"\nanother line")
    assert len(third) == 16  # at least half a window
    assert seeds == ([7], [8], [50])


def test_a_model_without_numbers_is_one_line(tmp_path, capsys):
    model = GPT(GPTConfig(vocab_size=257, **TOY_MODEL))
    model.transformer.ln_f.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    for temperature in ("0", "1"):
        line = fails(capsys, "--model", str(tmp_path), "-p", "a", "--temperature", temperature)
        assert line == "sample.py: the model's logits are NaN: it is damaged, or its training diverged"


def test_more_samples_than_fit_at_once_come_in_turn(toy, capsys, monkeypatch):
    arguments = ("--model", toy, "-p", "ab", "-p", "The fox", "-n", "3", "-m", "9")
    whole, _ = run(capsys, *arguments)
    sizes, stream = [], sample.generate.stream
    monkeypatch.setattr(sample, "BATCH", 4)
    monkeypatch.setattr(
        sample.generate,
        "stream",
        lambda self, prompts, *a, **o: (sizes.append(len(prompts)), stream(self, prompts, *a, **o))[1],
    )
    assert run(capsys, *arguments)[0] == whole and sizes == [4, 2]


def test_out_of_memory_is_one_line(toy, capsys, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample.generate, "stream", full)
    assert "out of memory; fewer --samples" in fails(capsys, "--model", toy)


def test_logprobs_show_what_might_have_stood_there(toy, capsys, monkeypatch):
    """Greedy text: the first of the likeliest is the token itself. Colours on a terminal only."""
    arguments = ("--model", toy, "-p", "ab", "-m", "6", "--temperature", "0", "--logprobs")
    plain, _ = run(capsys, *arguments)
    rows = plain.splitlines()[-6:]
    for row in rows:
        value, token, first, its = re.match(r" *(-[\d.]+)  (\S+) +of  (\S+) (-[\d.]+) ", row).groups()
        assert first == token and float(its) == pytest.approx(float(value), abs=0.006)
        assert len(re.findall(r" -\d+\.\d\d(?!\d)", row)) == 5
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured, _ = run(capsys, *arguments, "--no-stream")
    assert "\033[1mab\033[0m" in coloured and "\033" not in plain
    assert re.sub(r"\033\[[\d;]+m", "", coloured) == plain


def test_colours_say_how_likely_a_token_was(toy, capsys, monkeypatch):
    def complete(_model, _ids, _seeds, completions, *_):
        completions[0].record = [(token, value, [(token, value)]) for token, value in zip(b"abc", (-0.1, -1.0, -5.0))]
        return []

    monkeypatch.setattr(sample, "complete", complete)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rows = run(capsys, "--model", toy, "-p", "x", "--logprobs")[0].splitlines()[-3:]
    styles = [re.search(r"\033\[([\d;]+)m", row)[1] for row in rows]
    assert styles == [sample.LIKELY, sample.BOLD, sample.UNLIKELY]


def test_what_the_page_is_given(toy, capsys, monkeypatch):
    """The command's settings at first; its stop text may have \\n, and long prompts are cut as with -i."""
    given, contexts = [], []
    monkeypatch.setattr(sample.web, "serve", lambda *arguments: given.append(arguments))
    run(capsys, "--model", toy, "--web", "-p", "ab", "--stop", "x", "--port", "7", "--top_k", "3")
    [(ask, description, defaults, port)] = given
    assert toy in description and port == 7
    assert (defaults["prompt"], defaults["stop"], defaults["top_k"], defaults["seed"]) == ("ab", "x", 3, 1337)
    monkeypatch.setattr(
        sample, "complete", lambda _model, ids, _seeds, grown, *_, **__: contexts.append((ids, grown)) or []
    )
    list(ask(defaults | dict(stop="\\n.", prompt="x" * 99, max_tokens=30)))
    [([ids], [grown])] = contexts
    assert grown.stops == ["\n."] and ids == [ord("x")] * 16


def test_answers_of_the_page_are_those_of_the_command(toy, capsys):
    model, tokenizer = pack(GPT.from_pretrained(toy), torch.float32), data.get_tokenizer("bytes")
    settings = sample.parse_arguments(["-m", "20", "--seed", "5"]).settings | dict(prompt="The fox", stop="")
    events = list(sample.answer(model, tokenizer, settings))
    record = json.loads(run(capsys, "--model", toy, "-m", "20", "-p", "The fox", "--seed", "5", "--json")[0])
    assert "".join(event["text"] for event in events) == record["completion"]
    tokens = [token for event in events for token in event["tokens"]]
    assert len(tokens) == record["tokens"] and sum(math.log(t["p"]) for t in tokens) == pytest.approx(record["logprob"])
    for token in tokens:
        odds = [p for _, p in token["likely"]]
        assert len(odds) == 5 and odds == sorted(odds, reverse=True) and token["p"] <= odds[0] + 1e-9
    with pytest.raises(ValueError, match="top_p is 3; it must be at least 0"):
        next(sample.answer(model, tokenizer, settings | dict(top_p=3)))


def test_a_closed_pipe_is_no_error(toy):
    """As with `| head -1`: the reader takes a line and leaves."""
    command = [sys.executable, "sample.py", "--model", toy, "-n", "300", "-m", "1", "--json", "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment(), **pipes) as process:
        assert process.stdout.readline().startswith('{"prompt"')
        process.stdout.close()
        assert "Broken pipe" not in process.stderr.read() and process.wait(60) == 0
