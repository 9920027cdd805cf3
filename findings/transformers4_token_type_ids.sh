#!/bin/sh
# transformers 4 gives token_type_ids for a tokenizer.json with the class PreTrainedTokenizerFast.
# GPT-2 has no such types: it adds the embedding of token 0 to every position, so that
# model.generate(**tokenizer(text)) continues another text. Version 5 gives none. The cure for both is
# "model_input_names": ["input_ids", "attention_mask"] in tokenizer_config.json.
# Exits non-zero if the behaviour has changed.
set -e
PYTHON=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install -q --target "$site" \
    torch==2.13.0 numpy==2.4.6 transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0
PYTHONPATH=$site "$PYTHON" - <<'END'
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

bpe = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
inputs = tokenizer("abba", return_tensors="pt")
model = GPT2LMHeadModel(GPT2Config(vocab_size=2, n_layer=1, n_head=1, n_embd=8)).eval()
with torch.no_grad():
    model.transformer.wte.weight.normal_(generator=torch.Generator().manual_seed(0))
    difference = (model(**inputs).logits - model(inputs["input_ids"]).logits).abs().max().item()
print(transformers.__version__, sorted(inputs), f"logits differ by {difference:.2g}")
assert "token_type_ids" in inputs and difference > 0.1
END
