"""Learned vocabularies: a byte-level BPE from the text itself, in a tokenizer.json beside shards and in checkpoints."""

import functools
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import data

FILE = "tokenizer.json"
SMALLEST, LARGEST = 300, 65_535  # tokens, with end of text
SAMPLE_BYTES = 16_000_000  # of text to learn from, at most; it takes seconds
CHUNK = 1000  # characters that the trainer gets at once: its time grows with the square of a run without white space

# How text is split before tokens are merged: a word with the space or sign before it | a number | signs, with the end
# of their line and the next line's indentation | the same without signs | other white space, but a space before a word
# goes with the word. Against GPT-2's, with 4,096 tokens: 8 % more bytes a token in Python, 11 % in Shakespeare. No long
# run makes it go back a million characters, which tiktoken refuses.
PATTERN = (
    r"(?: |[^\s\p{L}\p{M}\p{N}])?[\p{L}\p{M}]++| ?\p{N}++| ?[^\s\p{L}\p{M}\p{N}]++(?:(?<=[!-~])\r?\n\s*+)?"
    r"|[^\S\n]*+\n\s*+|\s{1,1000}(?!\S)|\s"
)
# data.BREAK, but not between an ASCII sign and a newline.
BREAK = re.compile(data.BREAK.pattern + rb"(?!(?<=[!-/:-@\[-`{-~])\n)")


class LearnedTokenizer(data.BPETokenizer):
    """The tokens and the pattern of a tokenizer.json, in tiktoken.

    tiktoken merges the pair whose token has the lowest rank, `tokenizers` the pair that was learned first. This is the
    same, because each token comes from one merge, and their order is that of the tokens.
    """

    breaks = BREAK
    hf_class = "PreTrainedTokenizerFast"  # it takes tokenizer.json as it is; a GPT2Tokenizer would have GPT-2's pattern

    def __init__(self, content: str):
        """content: of a tokenizer.json. ValueError, LookupError or TypeError if it is not one that `learn` writes."""
        import tiktoken

        file, self.content = json.loads(content), content
        vocab, merges, alphabet = file["model"]["vocab"], file["model"]["merges"], data.byte_alphabet()
        [special], pattern = file["added_tokens"], file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        tokens = [*alphabet, *("".join(merge) for merge in merges), special["content"]]
        if [*vocab, data.END_OF_TEXT] != tokens or [*vocab.values(), special["id"]] != list(range(len(tokens))):
            raise ValueError("its tokens do not follow from its merges")
        self.vocab_size, self.end_of_text = len(tokens), special["id"]
        self.name = f"bpe{self.vocab_size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        ranks = {bytes(alphabet[char] for char in token): rank for token, rank in vocab.items()}
        special = {data.END_OF_TEXT: self.end_of_text}
        self.encoding = tiktoken.Encoding(self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def hf_files(self) -> dict[str, str]:
        return {FILE: self.content}


def load(name_or_file: str | Path) -> data.Tokenizer:
    """The tokenizer of this name, or of a tokenizer.json. ValueError if that is missing or damaged."""
    if name_or_file in data.TOKENIZERS:
        return data.get_tokenizer(name_or_file)
    try:
        return learned(Path(name_or_file).read_bytes().decode())
    except FileNotFoundError:
        reason = "not there, and neither gpt2 nor bytes fits; copy the folder whole, or make it again"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"damaged, or not learned by prepare.py ({type(error).__name__}: {error})"
    raise ValueError(f"{name_or_file}: {reason}")


learned = functools.cache(LearnedTokenizer)


def of_folder(folder: str | Path, known: str | int) -> data.Tokenizer:
    """The tokenizer of shards, which meta.json names, or of a model with so many tokens. ValueError without it."""
    if known in data.KNOWN:
        return data.get_tokenizer(known)
    tokenizer = load(Path(folder) / FILE)
    if known not in (tokenizer.name, tokenizer.vocab_size):
        raise ValueError(f"{Path(folder) / FILE}: is {tokenizer.name}, but what is beside it was made with {known}")
    return tokenizer


# ---- Learning --------------------------------------------------------------------------------------------------------


def choose(wanted: str) -> data.Tokenizer | int:
    """prepare.py's --tokenizer: a tokenizer, or the number of tokens to learn. ValueError if it is neither."""
    if wanted.isdecimal() and SMALLEST <= int(wanted) <= LARGEST and int(wanted) not in data.KNOWN:
        return int(wanted)
    if wanted in data.TOKENIZERS or (Path(wanted) / FILE).exists():
        return load(wanted if wanted in data.TOKENIZERS else Path(wanted) / FILE)
    number = f"a number from {SMALLEST} to {LARGEST} (not {data.GPT2Tokenizer.vocab_size}, which is GPT-2's)"
    raise ValueError(f"--tokenizer {wanted}: must be gpt2, bytes, {number}, or a folder with a {FILE}")


def provide(chosen: data.Tokenizer | int, file: Path, texts: Iterator[bytes], seed: int) -> str:
    """Learn or copy what was chosen to the file, if it is not there yet. Returns the name or file for `load`."""
    if not isinstance(chosen, (int, LearnedTokenizer)):
        return chosen.name
    if isinstance(chosen, LearnedTokenizer):
        data.write_whole(file, chosen.content.encode())
    elif not file.exists():
        drawn = sample(texts, seed)
        data.write_whole(file, learn(drawn, chosen).encode())
        print(f"vocabulary: {summary(load(file), drawn)}")
    return str(file)


def sample(texts: Iterator[bytes], seed: int) -> list[bytes]:
    """Texts drawn evenly from all, with SAMPLE_BYTES at most: when there are more, every second one is dropped."""
    rng, drawn, n_bytes, share = random.Random(seed), [], 0, 1.0
    for text in texts:
        if rng.random() < share:
            drawn.append(text)
            n_bytes += len(text)
        if n_bytes > SAMPLE_BYTES:
            drawn, share = drawn[::2], share / 2
            n_bytes = sum(map(len, drawn))
    return drawn


def learn(texts: list[bytes], size: int) -> str:
    """The content of a tokenizer.json with `size` tokens, in GPT-2's order: bytes, then merges, then end of text.

    The same texts give the same content, on any number of threads. ValueError if they have too few pairs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    # A pair that stands only once in the sample is no rule of the language.
    options = dict(min_frequency=2, initial_alphabet=list(data.byte_alphabet()), show_progress=sys.stderr.isatty())
    texts = [text.decode("utf-8", errors="replace") for text in texts]
    chunks = [text[start : start + CHUNK] for text in texts for start in range(0, len(text), CHUNK)]
    bpe.train_from_iterator(chunks, trainers.BpeTrainer(vocab_size=size - 1, **options), length=len(chunks))
    if (found := bpe.get_vocab_size() + 1) < size:
        advice = f"--tokenizer {found}" if found >= SMALLEST else "--tokenizer bytes"
        raise ValueError(f"--tokenizer {size}: the text has enough for {found} only; take more text, or {advice}")
    bpe.add_special_tokens([data.END_OF_TEXT])
    return bpe.to_str(pretty=True)


def summary(tokenizer: LearnedTokenizer, texts: list[bytes]) -> str:
    """One line: tokens, bytes a token in the texts' first megabyte, the ten longest (not runs of a sign or space)."""
    some = b"".join(texts)[:1_000_000]
    tokens = {tokenizer.decode_bytes([i]).strip() for i in range(tokenizer.end_of_text)}
    words = sorted((token for token in tokens if len(set(token)) > 2), key=lambda token: (len(token), token))
    longest = b" ".join(words[:-11:-1]).decode(errors="replace")
    each = len(some) / len(tokenizer.encode(some))
    return f"{tokenizer.vocab_size:,} tokens, {each:.2f} bytes a token; the longest: {data.printable(longest)}"
