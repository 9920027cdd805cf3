"""transformers' Trainer with its defaults on random tokens, GPT-2 124M.

python results/peers/trainer.py FOLDER SEQUENCES STEPS [resume]
"""

import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Print the time of each step."""

    def on_step_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        print(f"step took {1000 * (time.perf_counter() - self.begin):.2f} ms", flush=True)


def main(folder: str, sequences: int, steps: int, resume: bool) -> None:
    tokens = torch.randint(50257, (sequences * (steps + 2), 1024))
    rows = [dict(input_ids=row, labels=row) for row in tokens]
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=sequences,
        max_steps=steps,
        save_steps=steps,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    main(
        folder=sys.argv[1],
        sequences=int(sys.argv[2]),
        steps=int(sys.argv[3]),
        resume="resume" in sys.argv,
    )
