"""A GPT as large as your text and your hours deserve.

    python prepare.py my_texts/ --out shards/mine --tokenizer 4096
    python train.py config/hours.py --hours=2 --data_dir=shards/mine
    python sample.py --model out/hours

train.py times training steps of several sizes on this machine for some seconds. The law of
docs/scaling.md then gives the size, the steps and the rates with the lowest loss that it expects
after so many hours. It prints them as settings that could have been typed, trains, and says what
came of it beside what it expected.
"""

data_dir = "shards/mine"
out_dir = "out/hours"

hours = 1.0

log_every = 10
hellaswag_every = 0  # models of a few hours are at chance
sample_prompt = "The"
sample_tokens = 100
