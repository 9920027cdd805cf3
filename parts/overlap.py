"""How much of the validation text stands in the training text too.

A model that has read a passage can recite it. Where validation is partly copies of training, as in
generated files, its loss measures memory there, and says less about text that is new.
"""

if __name__ == "__main__":
    raise SystemExit("parts/overlap.py is no command: README.md lists the commands")

from pathlib import Path

from parts.data import Shard, open_shards
from parts.tokenizer import Tokenizer

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# A passage is about as many bytes: long enough that texts rarely share one by chance.
PASSAGE_BYTES = 128
# So many tokens of each split stand for all of them. Training's take some 24 seconds.
MOST_VALIDATION_TOKENS = 1 << 20
MOST_TRAINING_TOKENS = 1 << 28
PASSAGES_AT_ONCE = 1 << 12  # their tokens and hashes stay in a core's cache
# Any odd number whose bits are mixed: this one is of Knuth's MMIX generator.
MULTIPLIER = 6364136223846793005


def find_copies(data_dir: str | Path, tokenizer: Tokenizer) -> np.ndarray:
    """Which validation tokens stand in the training shards too: bool, one for each of the first
    MOST_VALIDATION_TOKENS.

    The training text is cut into passages of some 128 bytes, which are looked for in validation. A
    copy of 256 bytes or more is found, but for up to 127 bytes at each end, and a shorter one by
    luck: there are at least so many. Passages are compared by hashes of 64 bits. ValueError if the
    folder has no such shards.
    """
    training = first_tokens(open_shards(data_dir, "train"), MOST_TRAINING_TOKENS)
    validation = first_tokens(open_shards(data_dir, "val"), MOST_VALIDATION_TOKENS)
    tokens = np.concatenate(validation)
    length = passage_length(tokens, tokenizer)
    is_copy = np.zeros(len(tokens), dtype=bool)
    if len(tokens) < length:
        return is_copy
    hashes = hash_passages(sliding_window_view(tokens, length))
    starts = np.flatnonzero(np.isin(hashes, find_hashes(hashes, training, length)))
    for offset in range(length):
        is_copy[starts + offset] = True
    return is_copy


def first_tokens(shards: list[Shard], most: int) -> list[np.ndarray]:
    """The first tokens of a split, so many at most: a part of each shard."""
    parts = []
    for shard in shards:
        parts.append(shard.tokens[:most])
        most -= len(parts[-1])
    return parts


def passage_length(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """In tokens."""
    n_bytes = int(tokenizer.byte_counts()[tokens].sum())
    return max(1, round(PASSAGE_BYTES * len(tokens) / max(1, n_bytes)))


def hash_passages(passages: np.ndarray) -> np.ndarray:
    """passages: uint16 tokens of shape (n, length). Returns n hashes, uint64: the polynomial whose
    coefficients are the tokens, at MULTIPLIER, modulo 2^64.
    """
    hashes = np.zeros(len(passages), dtype=np.uint64)
    for column in passages.T:
        hashes *= np.uint64(MULTIPLIER)
        hashes += column
    return hashes


def find_hashes(wanted: np.ndarray, parts: list[np.ndarray], length: int) -> np.ndarray:
    """Those of the hashes that a passage of these parts of a text has."""
    wanted = np.unique(wanted)
    is_found = np.zeros(len(wanted), dtype=bool)
    for tokens in parts:
        n_passages = len(tokens) // length
        passages = tokens[: n_passages * length].reshape(n_passages, length)
        for start in range(0, n_passages, PASSAGES_AT_ONCE):
            hashes = hash_passages(passages[start : start + PASSAGES_AT_ONCE])
            places = np.searchsorted(wanted, hashes)
            places[places == len(wanted)] = 0
            is_found[places[wanted[places] == hashes]] = True
    return wanted[is_found]
