"""Fine-tune any GPT-2 on any text.

    python prepare.py my_texts/ --out shards/mine
    python train.py config/finetune.py --init_from=gpt2 --data_dir=shards/mine
    python sample.py --model out/finetune

--init_from takes gpt2, gpt2-medium, gpt2-large or gpt2-xl (OpenAI's weights, fetched once from the
Hugging Face hub: 0.5 GB for gpt2), another GPT-2 on the hub, a checkpoint of nanoGPT, or a run of
your own such as out/books. If that model has a context shorter than 1,024 tokens, add --block_size;
train.py names the number. If it has a vocabulary of its own, make the shards with it:

    python prepare.py my_texts/ --out shards/mine --tokenizer out/anytext

A run is 60 steps of 32,768 tokens: six times through 1.1 MB of text (0.3M tokens, the size of Tiny
Shakespeare). Set --max_steps for a longer text. The model soon learns a small text by heart,
so the checkpoint with the lowest validation loss is kept beside the newest one, and train.py names
it at the end. Give a second fine-tuning a folder of its own: --out_dir=out/NAME.
"""

out_dir = "out/finetune"
init_from = "gpt2"
data_dir = "shards/mine"

batch_size = 4
total_batch_size = 32 * block_size
dropout = 0.1

learning_rate = 3e-5
min_lr = 3e-6
warmup_steps = 10
max_steps = 60

eval_every = 10
hellaswag_every = 0
eval_tokens = 32_768
checkpoint_every = 10
sample_every = 20
sample_prompt = ""  # begins a document
