#!/bin/sh
# A tokenizer.json that transformers 5 opens and saves has other bytes: it gets a post_processor.
# The ids are the same. A tokenizer that is known by the hash of its file is another one then.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" \
    transformers==5.23.0 tokenizers==0.23.3 huggingface_hub==2.4.0
PYTHONPATH=$site "$PYTHON" - <<'END'
import json
import pathlib
import tempfile

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

folder = pathlib.Path(tempfile.mkdtemp())
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False)
bpe.add_special_tokens(["<|endoftext|>"])
bpe.save(str(folder / "tokenizer.json"))
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
(folder / "tokenizer_config.json").write_text(json.dumps(settings))
before = (folder / "tokenizer.json").read_text()
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.save_pretrained(folder)
after = (folder / "tokenizer.json").read_text()
old, new = json.loads(before), json.loads(after)
changed = [key for key in new if new[key] != old.get(key)]
same = tokenizer("a b")["input_ids"] == bpe.encode("a b").ids
print(transformers.__version__, "changed:", changed, "same ids:", same)
assert before != after and same
END
