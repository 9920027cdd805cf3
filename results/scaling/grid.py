"""Which runs the scaling study makes: sizes, budgets of compute, learning rates, and their order.

Budgets are FLOPs of training, counted and never timed: 6 N + 12 L d T a token, where N counts all
parameters without the positions (the head's matrix is the embeddings', and works). Thus a run that
another program slows down is the same run.

Every run reads windows of 256 tokens, 8 of them a step, from 2e13 FLOPs on 16 and from 2e15 on 32
(or as its name says): English books, with a vocabulary of 4,096 tokens learned from them or with
GPT-2's, and some runs Python code. The rates rise over the first twentieth of the steps and fall to
zero as a cosine.
"""

from dataclasses import dataclass
from typing import NamedTuple

BLOCK_SIZE = 256

# Where the shards are, and the rows of the matrix of embeddings (padded to a multiple of 64).
VOCABULARIES = {"books_4096": 4_096, "books": 50_304, "code_4096": 4_096}
# Of another kind: the Python sources of these packages.
CODE = "code_4096"
CODE_PACKAGES = ("torch", "sympy", "pandas", "matplotlib")


class Size(NamedTuple):
    n_layer: int
    n_head: int
    n_embd: int

    @property
    def block_parameters(self) -> int:
        """Weights, biases and LayerNorms of the blocks."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd)

    def flops_per_token(self, rows: int) -> int:
        """As train.py counts them, for a matrix of embeddings of so many rows."""
        counted = self.block_parameters + 2 * self.n_embd + rows * self.n_embd
        attention = 12 * self.n_layer * self.n_embd * BLOCK_SIZE
        return 6 * counted + attention


# 0.03M to 31M parameters in the blocks, each 2 to 4 times the one before.
SIZES = {
    32: Size(2, 1, 32),
    64: Size(2, 2, 64),
    96: Size(3, 2, 96),
    128: Size(4, 2, 128),
    192: Size(5, 3, 192),
    256: Size(6, 4, 256),
    320: Size(6, 5, 320),
    384: Size(7, 6, 384),
    512: Size(10, 8, 512),
}

# Budget in FLOPs -> widths around the best one.
ISO_FLOP = {
    3e12: (32, 64, 96, 128),
    1e13: (32, 64, 96, 128, 192),
    3e13: (64, 96, 128, 192),
    1e14: (96, 128, 192, 256),
}
# The same with GPT-2's vocabulary, whose embeddings are most of a small model.
ISO_FLOP_GPT2 = {
    1e13: (64, 96, 128),
    3e13: (64, 128),
    1e14: (96, 192),
}
# For Muon alone: these are the longest.
ISO_FLOP_MUON = {3e14: (128, 192, 256), 1e15: (256,)}
# Both optimizers at 23.5M parameters with GPT-2's vocabulary, in steps of 8 sequences.
TEN_TIMES = dict(width=320, vocabulary="books", batch=8)
# Sizes and budgets between those of the grid, to test the law by.
BETWEEN = {80: Size(2, 2, 80), 160: Size(4, 4, 160), 224: Size(5, 4, 224)}
BETWEEN_BUDGETS = {80: 2e13, 160: 6e13, 224: 2e14}
# Text that is read so many times, at this width and budget.
REPEATED = (128, 3e13)
EPOCHS = (4, 16)
# The beginning of the books is few of them. The same with pieces from all over them, with 0.1 to 5
# parameters for each token, on a CPU without bf16: width, budget, epochs.
REPEATED_PIECES = (
    (64, 3e12, 4),
    (64, 1e13, 4),
    (64, 1e13, 8),
    (64, 1e13, 16),
    (96, 1e13, 4),
    (128, 1e13, 4),
    (64, 3e13, 4),
    (128, 3e13, 4),
    (128, 3e13, 2),
    (128, 1e14, 4),
)
PIECE = 4_096  # tokens
# The books once and the beginning of them four times, without bf16: width, budget.
REPEATED_FP32 = (64, 1e13)
# How another kind of text is learned: width, budget.
CODE_FP32 = ((64, 1e13), (128, 3e13), (64, 3e13), (128, 1e14))


@dataclass(frozen=True)
class Run:
    """One run of train.py; its name says what it is."""

    width: int
    optimizer: str
    flops: float
    learning_rate: float
    muon_learning_rate: float = 0.0  # of Muon only
    beta2: float = 0.95
    vocabulary: str = "books_4096"
    batch: int = 0  # sequences a step; 0: what the budget says
    epochs: int = 1  # how often the run reads its text; 1 is a text that is longer than the run
    in_pieces: bool = False  # whether such a text is pieces of the whole, or its beginning
    seed: int = 1
    dtype: str = "bf16"

    @property
    def size(self) -> Size:
        return (SIZES | BETWEEN)[self.width]

    @property
    def sequences(self) -> int:
        if self.batch:
            return self.batch
        if self.flops < 2e13:
            return 8
        return 16 if self.flops < 2e15 else 32

    @property
    def tokens_a_step(self) -> int:
        return self.sequences * BLOCK_SIZE

    @property
    def steps(self) -> int:
        rows = VOCABULARIES[self.vocabulary]
        return round(self.flops / self.size.flops_per_token(rows) / self.tokens_a_step)

    @property
    def data_dir(self) -> str:
        """A folder of shards. Where text repeats, as many of its tokens as an epoch has."""
        if self.epochs == 1:
            return f"shards/{self.vocabulary}"
        which = "pieces" if self.in_pieces else "first"
        return f"shards/{self.vocabulary}_{which}_{self.epoch_tokens}"

    @property
    def epoch_tokens(self) -> int:
        """A whole number of steps."""
        return self.steps // self.epochs * self.tokens_a_step

    @property
    def name(self) -> str:
        parts = [self.vocabulary, str(self.width), f"{self.flops:.2g}", self.optimizer]
        parts.append(f"lr{self.learning_rate:.2g}")
        if self.optimizer == "muon":
            parts.append(f"muon{self.muon_learning_rate:.2g}")
        if self.beta2 != 0.95:
            parts.append(f"beta{self.beta2:g}")
        if self.batch:
            parts.append(f"batch{self.batch}")
        if self.epochs != 1:
            parts.append(f"epochs{self.epochs}")
        if self.in_pieces:
            parts.append("pieces")
        if self.dtype != "bf16":
            parts.append(self.dtype)
        parts.append(f"seed{self.seed}")
        return "_".join(parts).replace("+", "")

    def arguments(self) -> list[str]:
        """What train.py is called with."""
        settings = dict(
            data_dir=self.data_dir,
            out_dir=f"out/scaling/{self.name}",
            n_layer=self.size.n_layer,
            n_head=self.size.n_head,
            n_embd=self.size.n_embd,
            block_size=BLOCK_SIZE,
            batch_size=self.sequences,
            total_batch_size=self.tokens_a_step,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            min_lr=0.0,
            warmup_steps=max(5, self.steps // 20),
            max_steps=self.steps,
            beta2=self.beta2,
            seed=self.seed,
            dtype=self.dtype,
            log_every=10,
            eval_every=self.steps,
            eval_tokens=131_072,
            hellaswag_every=0,
            sample_every=0,
            checkpoint_every=200,
            keep_checkpoints=1,
            report=False,
        )
        if self.optimizer == "muon":
            settings.update(muon_learning_rate=self.muon_learning_rate, muon_momentum=0.9)
        return [f"--{name}={value}" for name, value in settings.items()]


def tuning_runs() -> list[Run]:
    """The search for the rates, at two widths; a rule carries them to the others."""
    runs = []
    for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
        runs.append(Run(96, "adamw", 3e12, rate))
    for rate, muon_rate in ((1e-2, 2e-2), (2e-2, 1e-2), (2e-2, 2e-2), (2e-2, 4e-2), (4e-2, 2e-2)):
        runs.append(Run(96, "muon", 3e12, rate, muon_rate))
    for batch in (4, 16):
        runs.append(Run(96, "muon", 3e12, 2e-2, 2e-2, batch=batch))
    for rate in (5e-4, 1e-3, 2e-3, 4e-3):
        runs.append(Run(192, "adamw", 1e13, rate))
    for rate, muon_rate in ((1e-2, 2e-2), (2e-2, 2e-2), (2e-2, 1e-2)):
        runs.append(Run(192, "muon", 1e13, rate, muon_rate))
    return runs


def rates(optimizer: str, width: int) -> tuple[float, float]:
    """The rule that carries the rates from the widths of the search to the others: the learning
    rate, and that of Muon's matrices.
    """
    if optimizer == "muon":
        return 2e-2, min(2e-2, 2e-2 * (96 / width) ** 0.5)
    return min(8e-3, 4e-3 * (96 / width) ** 2), 0.0


def make_grid_run(width: int, optimizer: str, flops: float, **others) -> Run:
    rate, muon_rate = rates(optimizer, width)
    return Run(width, optimizer, flops, rate, muon_rate, **others)


def grid_runs() -> list[Run]:
    """What the law is fitted to: all sizes of a budget, Muon and AdamW, both vocabularies."""
    runs = []
    for flops, widths in ISO_FLOP.items():
        for width in widths:
            for optimizer in ("muon", "adamw"):
                runs.append(make_grid_run(width, optimizer, flops))
        for width in ISO_FLOP_GPT2.get(flops, ()):
            runs.append(make_grid_run(width, "muon", flops, vocabulary="books"))
    for flops, widths in ISO_FLOP_MUON.items():
        for width in widths:
            runs.append(make_grid_run(width, "muon", flops))
    return runs


def ten_times_runs() -> list[Run]:
    """results/muon's question at ten times its size: does Muon with half of the tokens reach AdamW?

    AdamW gets more tries at higher rates, which are what the rule is least sure of here.
    """
    runs = [make_grid_run(optimizer="muon", flops=flops, **TEN_TIMES) for flops in (1.5e14, 3e14)]
    rate, _ = rates("adamw", TEN_TIMES["width"])
    for factor in (1, 2, 4):
        runs.append(Run(optimizer="adamw", flops=3e14, learning_rate=factor * rate, **TEN_TIMES))
    return runs


def repeated_runs() -> list[Run]:
    """Text that is read several times, where another run reads as much new text once."""
    width, flops = REPEATED
    return [make_grid_run(width, "muon", flops, epochs=epochs) for epochs in EPOCHS]


def repeated_pieces_runs() -> list[Run]:
    """Pieces of the whole text, read several times."""
    runs = []
    for width, flops, epochs in REPEATED_PIECES:
        run = make_grid_run(width, "muon", flops, epochs=epochs, in_pieces=True, dtype="fp32")
        runs.append(run)
    width, flops = REPEATED_FP32
    for epochs in (1, 4):
        runs.append(make_grid_run(width, "muon", flops, epochs=epochs, dtype="fp32"))
    return runs


def code_runs() -> list[Run]:
    """Another kind of text, of which the law of the books has seen nothing."""
    runs = []
    for width, flops in CODE_FP32:
        runs.append(make_grid_run(width, "muon", flops, vocabulary=CODE, dtype="fp32"))
    return runs


def checking_runs() -> list[Run]:
    """Second seeds, also of neighbours with the best size between them, and half and twice the
    rates that the rule carries to the largest width.
    """
    runs = [make_grid_run(128, "muon", 1e13, seed=2)]
    for width in (64, 96):
        runs.append(make_grid_run(width, "muon", 3e13, seed=2))
    for width in (96, 128):
        runs.append(make_grid_run(width, "muon", 1e14, seed=2))
    for factor in (0.5, 2):
        for optimizer in ("muon", "adamw"):
            rate, muon_rate = rates(optimizer, 192)
            runs.append(Run(192, optimizer, 3e13, factor * rate, factor * muon_rate))
    return runs


def between_runs() -> list[Run]:
    """What the law predicts without having seen the size or the budget."""
    return [make_grid_run(width, "muon", flops) for width, flops in BETWEEN_BUDGETS.items()]


def last_run() -> Run:
    """The largest, whose loss the law predicts before it is made."""
    return make_grid_run(320, "muon", 3e15)


def all_runs() -> list[Run]:
    """Each once, in the order in which they are made: the cheap ones first, and AdamW's last.

    The largest is predicted from runs of up to a third of its budget.
    """
    runs = tuning_runs() + grid_runs() + repeated_runs() + [last_run()]
    runs += ten_times_runs() + checking_runs() + between_runs()
    runs += repeated_pieces_runs() + code_runs()
    return sorted(dict.fromkeys(runs), key=turn)


def turn(run: Run) -> tuple:
    is_late = run in checking_runs() or run in between_runs()
    return is_late, run.flops, run.optimizer == "adamw"
