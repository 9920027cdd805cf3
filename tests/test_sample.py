"""sample.py as people use it: from a checkpoint, from a hub, from nothing, and wrongly."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TOY_MODEL, clean_environment
from transformers import GPT2Config, GPT2LMHeadModel

import sample
import train
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


def test_longer_samples_begin_like_shorter_ones(toy, capsys):
    short, _ = run(capsys, "--model", toy, "-m", "10", "-p", "x")
    long, _ = run(capsys, "--model", toy, "-m", "50", "-p", "x")
    assert long.startswith(short.rstrip("\n\ufffd"))


def test_the_newest_checkpoint_is_the_default(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in ((100, "older"), (0, "newer")):
        train.train(config(out_dir=f"out/{name}", max_steps=2, checkpoint_every=1))
        folder = Path(f"out/{name}/step_0000002")
        os.utime(folder, (folder.stat().st_mtime - age,) * 2)
    assert f"model: {Path('out/newer/step_0000002')}" in run(capsys, "-m", "3")[1]
    assert f"model: {Path('out/older/step_0000002')}" in run(capsys, "-m", "3", "--model", "out/older")[1]


def test_without_any_model_an_untrained_one_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = run(capsys, "-m", "2")
    assert "UNTRAINED" in err and out.startswith("Hello, I'm a language model,")


def test_an_empty_prompt_begins_a_document(toy, capsys):
    out, _ = run(capsys, "--model", toy, "-p", "", "-m", "5")
    assert out


def test_bad_input_is_one_line(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "a prompt of 40 tokens: this model takes 1 to 32; shorten it" in fails(
        capsys, "--model", toy, "-p", "x" * 40
    )
    assert "neither a folder here nor a model" in fails(capsys, "--model", "no-such/model")
    nowhere = str(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    assert f"{nowhere}: no such folder; in {tmp_path} there are run" in fails(capsys, "--model", nowhere)
    assert "no config.json in this folder" in fails(capsys, "--model", str(tmp_path))
    assert "--samples 0: it must be at least 1" in fails(capsys, "--model", toy, "-n", "0")
    assert "--temperature nan" in fails(capsys, "--model", toy, "--temperature", "nan")
    GPT(GPTConfig(vocab_size=100, **TOY_MODEL)).save_pretrained(tmp_path)
    assert "no tokenizer here is 100" in fails(capsys, "--model", str(tmp_path))


# ---- The hub, played by a server on loopback -------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for one file: HEAD for its size, hash and commit, then GET."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        type(self).asked.append(self.path)
        file = self.folder / self.path.rsplit("/", 1)[-1]
        if not self.path.startswith("/openai-community/gpt2/resolve/main/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with one model, a toy with GPT-2's vocabulary under the name of openai-community/gpt2."""
    folder = tmp_path / "hub"
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2))
    theirs.save_pretrained(folder)
    handler = type("ThisHub", (Hub,), dict(folder=folder, asked=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sample_from(hub_url: str, home: Path, *argv: str) -> subprocess.CompletedProcess:
    environment = clean_environment(HF_ENDPOINT=hub_url, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "sample.py", *argv, "-m", "8", "--device", "cpu", "--dtype", "fp32"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_gpt2_comes_from_the_hub_once(hub, tmp_path):
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    first = sample_from(url, tmp_path / "home", "--model", "gpt2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Hello, I'm a language model,")
    downloads = [path for path in hub.RequestHandlerClass.asked if path.endswith("model.safetensors")]
    assert downloads
    # With the hub gone, the cache serves.
    hub.shutdown()
    hub.server_close()
    assert sample_from(url, tmp_path / "home", "--model", "gpt2").stdout == first.stdout


def test_models_that_are_not_on_the_hub_and_hubs_that_are_not_there(hub, tmp_path):
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    for endpoint, name in ((url, "nobody/nothing"), ("http://127.0.0.1:9", "gpt2")):
        run = sample_from(endpoint, tmp_path / "home", "--model", name)
        assert run.returncode == 2
        lines = [line for line in run.stderr.splitlines() if line.startswith("sample.py: ")]
        assert len(lines) == 1 and f"{name!r} is neither a folder here nor a model that could be fetched" in lines[0]
        assert "Traceback" not in run.stderr
