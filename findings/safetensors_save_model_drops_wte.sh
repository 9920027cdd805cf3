#!/bin/sh
# safetensors' save_model keeps the alphabetically first of two names of one tensor. Of a GPT-2 it
# keeps lm_head.weight and drops transformer.wte.weight. transformers opens such a file all the same;
# a reader that looks for wte alone does not.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" \
    torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
PYTHONPATH=$site "$PYTHON" - <<'END'
import tempfile

import safetensors
import torch
from safetensors.torch import load_file, save_model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(5, 4)})
        self.lm_head = torch.nn.Linear(4, 5, bias=False)
        self.lm_head.weight = self.transformer.wte.weight


file = tempfile.mkdtemp() + "/model.safetensors"
save_model(Model(), file)
names = sorted(load_file(file))
print(safetensors.__version__, names)
assert names == ["lm_head.weight"]
END
