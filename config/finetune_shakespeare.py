"""Fine-tune OpenAI's GPT-2 (124M) on Shakespeare.

    python prepare.py tinyshakespeare.txt --out shards/shakespeare_gpt2 --val_fraction 0.1
    python train.py config/finetune_shakespeare.py                  fetches 0.5 GB from the Hugging Face hub, once
    python sample.py --model out/finetune_shakespeare/step_00000NN -p "ROMEO:"   the best one; train.py prints its name

The text has 0.3M GPT-2 tokens: at 32,768 a step, 10 steps are one epoch. After a few epochs the
model overfits, so the checkpoint with the best validation loss is kept. --init_from also takes
gpt2-medium, gpt2-large, gpt2-xl, any GPT-2 on the hub, or your own checkpoint folder.
"""

data_dir = "shards/shakespeare_gpt2"
out_dir = "out/finetune_shakespeare"
init_from = "gpt2"

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
sample_prompt = "ROMEO:"
