"""Checkpoints of this project in several versions of transformers: the same ids and texts."""

import json
import subprocess
import sys
from pathlib import Path

from model import open_model
from parts import pretrained
from parts.inference import generate
from parts.tokenizer import (
    CharacterTokenizer,
    Tokenizer,
    get_tokenizer,
    learn_tokenizer,
    parse_tokenizer,
    save_tokenizer,
    tokenizer_of_folder,
)

import pytest
from conftest import clean_environment, make_toy

PROMPTS = ["def main(", "if a != b :\n    print(a , b . c)", " naïve don't\n\n"]
# transformers, tokenizers and huggingface_hub; none: those of this environment.
VERSIONS = {
    "4.44.2": ("0.19.1", "0.24.7"),
    "4.46.3": ("0.20.3", "0.36.0"),
    "4.57.1": ("0.22.1", "0.36.0"),
    "": (),
}
READER = r"""
import json, sys, warnings
warnings.filterwarnings("ignore")
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
transformers.logging.set_verbosity_error()
for line in sys.stdin:
    folder, prompt = json.loads(line)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    options = dict(max_new_tokens=12, do_sample=False)
    write = pipeline("text-generation", model=folder)
    write(prompt)  # the line of the model card, to the end of the context
    print(json.dumps(dict(
        names=sorted(inputs),
        ids=inputs["input_ids"][0].tolist(),
        decoded=tokenizer.decode(inputs["input_ids"][0]),
        by_inputs=model.generate(**inputs, **options)[0].tolist(),
        by_ids=model.generate(inputs["input_ids"], **options)[0].tolist(),
        by_pipeline=write(prompt, **options)[0]["generated_text"],
    )), flush=True)
"""


def make_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    from tokenizers import ByteLevelBPETokenizer

    text = "".join(PROMPTS) * 9
    foreign = ByteLevelBPETokenizer()
    special = ["<pad>", "</s>"]
    foreign.train_from_iterator([text], 300, min_frequency=1, special_tokens=special)
    foreign.save_model(str(folder))
    theirs = tokenizer_of_folder(folder)
    assert theirs is not None
    return {
        "gpt2": get_tokenizer("gpt2"),
        "bytes": get_tokenizer("bytes"),
        "learned": parse_tokenizer(learn_tokenizer([text.encode()], 290)),
        "foreign": theirs,
        "characters": CharacterTokenizer(sorted(set(text))),
    }


@pytest.mark.torture
@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_reads_continues_and_decodes_as_we_do(tmp_path, version):
    environment = clean_environment()
    if version:
        tokenizers, hub = VERSIONS[version]
        site = tmp_path / "site"
        packages = [f"transformers=={version}", f"tokenizers=={tokenizers}"]
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        subprocess.run([*install, *packages, f"huggingface_hub=={hub}", "requests"], check=True)
        environment["PYTHONPATH"] = str(site)

    questions = []
    for name, tokenizer in make_tokenizers(tmp_path).items():
        for block_size in (128, 256):
            folder = tmp_path / f"{name}_{block_size}"
            model = make_toy(vocab_size=tokenizer.vocab_size, block_size=block_size)
            state = pretrained.copy_state(model, departure="")
            pretrained.write(folder, state, tokenizer.end_of_text)
            save_tokenizer(tokenizer, folder, block_size)
            questions += [(str(folder), prompt) for prompt in PROMPTS]
    child = subprocess.run(
        [sys.executable, "-c", READER],
        env=environment,
        input="\n".join(map(json.dumps, questions)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(answers) == len(questions) == 30
    for (folder, prompt), theirs in zip(questions, answers):
        model, tokenizer, _ = open_model(folder)
        ids = tokenizer.encode(prompt).tolist()
        stop = tokenizer.end_of_text
        [continuation] = generate(model.eval(), [ids], 12, temperature=0, stop_token=stop)
        expected = ids + continuation
        if len(continuation) < 12:
            expected.append(stop)
        assert theirs["names"] == ["attention_mask", "input_ids"], folder
        assert theirs["ids"] == ids, (folder, prompt)
        assert theirs["decoded"] == prompt, folder
        assert theirs["by_inputs"] == theirs["by_ids"] == expected, (folder, prompt)
        assert theirs["by_pipeline"] == tokenizer.decode(ids + continuation), (folder, prompt)
