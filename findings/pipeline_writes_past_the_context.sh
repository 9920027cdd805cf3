#!/bin/sh
# pipeline("text-generation") of transformers 5 writes 256 tokens by default. A GPT-2 with a context
# of 128 ends in an IndexError, unless its generation_config.json has a max_length.
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

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

folder = pathlib.Path(tempfile.mkdtemp())
bpe = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False)
PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
shape = dict(vocab_size=2, n_positions=128, n_layer=1, n_head=1, n_embd=8)
GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)


def write() -> str:
    try:
        text = pipeline("text-generation", model=str(folder))("ab")[0]["generated_text"]
        return f"a text that ends after {len(text)} characters"
    except IndexError as error:
        return f"IndexError: {error}"


(folder / "generation_config.json").write_text("{}")
plain = write()
(folder / "generation_config.json").write_text(json.dumps({"max_length": 128}))
limited = write()
print(transformers.__version__, "by default:", plain, "| with max_length 128:", limited)
assert plain.startswith("IndexError") and limited.startswith("a text")
END
