#!/bin/sh
# Where config.json has no dtype, transformers 5 loads the whole model in the dtype of the first
# floating tensor of the file: one float16 tensor in front makes a float32 model float16.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0
PYTHONPATH=$site "$PYTHON" - <<'END'
import json
import pathlib
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

folder = pathlib.Path(tempfile.mkdtemp())
model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_layer=1, n_head=1, n_embd=8))
model.save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
first = sorted(tensors)[0]
tensors[first] = tensors[first].half()
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
found = {}
for dtype in (None, "float32"):
    config["dtype"] = dtype
    if dtype is None:
        del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    found[dtype] = GPT2LMHeadModel.from_pretrained(folder).dtype
print(transformers.__version__, "without dtype:", found[None], "| with it:", found["float32"])
assert found == {None: torch.float16, "float32": torch.float32}
END
