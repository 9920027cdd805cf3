"""How much of the validation text stands in the training text too, against a search by hand."""

import random
from pathlib import Path

import prepare
from parts import data, overlap
from parts.tokenizer import get_tokenizer

import numpy as np
import pytest

BYTES = get_tokenizer("bytes")


def write_shards(folder: Path, **splits: list[np.ndarray]) -> None:
    for split, parts in splits.items():
        for number, tokens in enumerate(parts, 1):
            data.write_shard(folder / f"text_{split}_{number:06d}.bin", tokens.astype(np.uint16))


def find_by_hand(
    training: list[np.ndarray], validation: list[np.ndarray], length: int
) -> np.ndarray:
    """Compare every passage of training with every place of validation."""
    passages = set()
    for tokens in training:
        for start in range(0, len(tokens) - length + 1, length):
            passages.add(tuple(tokens[start : start + length]))
    text = np.concatenate(validation)
    is_copy = np.zeros(len(text), dtype=bool)
    for start in range(len(text) - length + 1):
        if tuple(text[start : start + length]) in passages:
            is_copy[start : start + length] = True
    return is_copy


@pytest.mark.parametrize("passages_at_once", [1, 3, 4096])
def test_copies_are_found_as_by_hand(tmp_path, monkeypatch, passages_at_once):
    """Several shards a split, copies at any place and of any length, also of the last passage."""
    monkeypatch.setattr(overlap, "PASSAGES_AT_ONCE", passages_at_once)
    generator = np.random.default_rng(3)
    training = [generator.integers(32, 127, n) for n in (5000, 4096, 100)]
    validation = [generator.integers(32, 127, n) for n in (3000, 1500)]
    for length, source, place in ((700, 1000, 200), (255, 0, 1200), (90, 300, 2000)):
        validation[0][place : place + length] = training[0][source : source + length]
    validation[1][600:984] = training[1][-384:]
    write_shards(tmp_path, train=training, val=validation)
    copies = overlap.find_copies(tmp_path, BYTES)
    expected = find_by_hand(training, validation, 128)
    assert np.array_equal(copies, expected)
    assert 0.2 < expected.mean() < 0.3


def test_only_the_beginnings_of_long_texts_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "MOST_VALIDATION_TOKENS", 1280)
    monkeypatch.setattr(overlap, "MOST_TRAINING_TOKENS", 1536)
    generator = np.random.default_rng(4)
    training = [generator.integers(32, 127, 1024), generator.integers(32, 127, 1024)]
    validation = [generator.integers(32, 127, 512), training[1], training[0]]
    write_shards(tmp_path, train=training, val=validation)
    copies = overlap.find_copies(tmp_path, BYTES)
    assert copies.tolist() == [False] * 512 + [True] * 512 + [False] * 256


def test_a_passage_is_longer_than_the_text(tmp_path):
    text = np.full(100, 65)
    write_shards(tmp_path, train=[text], val=[text])
    assert overlap.find_copies(tmp_path, BYTES).tolist() == [False] * 100


def test_a_passage_has_as_many_bytes_with_any_tokens():
    text = "The quick brown fox jumps over the lazy dog. " * 100
    for name in ("bytes", "gpt2"):
        tokenizer = get_tokenizer(name)
        tokens = np.array(tokenizer.encode(text.encode()))
        length = overlap.passage_length(tokens, tokenizer)
        n_bytes = len(tokenizer.decode_bytes(tokens[:length].tolist()))
        assert n_bytes == pytest.approx(overlap.PASSAGE_BYTES, rel=0.05)


def test_prepare_says_that_validation_is_copied(tmp_path, capsys):
    """Twenty documents are for validation; then five of them are copies of one for training."""
    generator = random.Random(5)
    (tmp_path / "text").mkdir()
    copied = "".join(generator.choices("abcdefgh ", k=2000))
    for i in range(400):
        other = "".join(generator.choices("abcdefgh ", k=2000))
        (tmp_path / "text" / f"{i:03d}.txt").write_text(other)
    arguments = [str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--tokenizer", "bytes"]
    prepare.main(arguments)
    assert "copies" not in capsys.readouterr().err
    [shard] = data.open_shards(tmp_path / "out", "val")
    text = BYTES.decode(shard.tokens.tolist())
    names = sorted((tmp_path / "text").iterdir())
    kept = [path for path in names if path.read_text() in text]
    assert len(kept) == 20
    for path in [*kept[:5], next(path for path in names if path not in kept)]:
        path.write_text(copied)
    prepare.main([*arguments[:2], str(tmp_path / "again"), *arguments[3:]])
    assert "24% of the validation tokens are copies" in capsys.readouterr().err
