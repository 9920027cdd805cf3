"""Learned vocabularies: a byte-level BPE from the text itself, in a tokenizer.json beside shards and in checkpoints."""

import functools
import hashlib
import json
import random
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


class LearnedTokenizer(data.BPETokenizer):
    """The tokens and the pattern of a tokenizer.json, in tiktoken.

    tiktoken merges the pair whose token has the lowest rank, `tokenizers` the pair that was learned first. This is the
    same, because each token comes from one merge, and their order is that of the tokens.
    """

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


learned = functools.cache(LearnedTokenizer)


def load(name_or_file: str | Path) -> data.Tokenizer:
    """The tokenizer of this name, or of a tokenizer.json. ValueError if that is missing or damaged."""
    if name_or_file in data.TOKENIZERS:
        return data.get_tokenizer(name_or_file)
    try:
        return learned(Path(name_or_file).read_bytes().decode())
    except FileNotFoundError:
        raise ValueError(f"{name_or_file}: not there; copy its folder whole, or make it again") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"damaged, or not learned by prepare.py ({type(error).__name__}: {error})"
        raise ValueError(f"{name_or_file}: {reason}") from None


def of_shards(folder: str | Path) -> data.Tokenizer:
    """The tokenizer that made the shards in a folder. ValueError if the one there is not what meta.json names."""
    name = data.read_meta(folder).get("tokenizer", "gpt2")  # published shards have no meta.json
    if not name.startswith("bpe"):
        return data.get_tokenizer(name)
    tokenizer = load(Path(folder) / FILE)
    if tokenizer.name != name:
        raise ValueError(f"{Path(folder) / FILE}: is {tokenizer.name}, but the shards were made with {name}")
    return tokenizer


def of_model(folder: str | Path, vocab_size: int) -> data.Tokenizer:
    """The tokenizer of a model with vocab_size tokens: a known one, or that in its folder. ValueError without one."""
    if vocab_size in data.VOCAB_SIZES or not (Path(folder) / FILE).exists():
        return data.get_tokenizer(vocab_size)
    tokenizer = load(Path(folder) / FILE)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"{Path(folder) / FILE}: has {tokenizer.vocab_size} tokens, but the model has {vocab_size}")
    return tokenizer


# ---- Learning --------------------------------------------------------------------------------------------------------


def identity(wanted: str) -> str:
    """What decides the ids of prepare.py's --tokenizer: a name, or a number of tokens. ValueError if it is neither."""
    sizes = f"a number of tokens from {SMALLEST} to {LARGEST} (not {data.GPT2Tokenizer.vocab_size}: GPT-2's)"
    if wanted in data.TOKENIZERS:
        return wanted
    if wanted.isdecimal() and SMALLEST <= int(wanted) <= LARGEST and int(wanted) not in data.VOCAB_SIZES:
        return str(int(wanted))
    if not (Path(wanted) / FILE).exists():
        raise ValueError(f"--tokenizer {wanted}: must be gpt2, bytes, {sizes}, or a folder with a {FILE}")
    return load(Path(wanted) / FILE).name


def provide(wanted: str, folder: Path, texts: Iterator[bytes], seed: int) -> str:
    """The tokenizer of `identity`, as `load` takes it; learned from the texts, if it is not yet in the folder."""
    if wanted in data.TOKENIZERS:
        return wanted
    file = folder / FILE
    if not wanted.isdecimal():
        data.write_whole(file, load(Path(wanted) / FILE).content.encode())
    elif not file.exists():
        drawn = sample(texts, seed)
        data.write_whole(file, learn(drawn, int(wanted)).encode())
        print(f"{file}: {summary(load(file), drawn)}")
    return str(file)


def sample(texts: Iterator[bytes], seed: int) -> list[bytes]:
    """Texts drawn evenly from all, with SAMPLE_BYTES at most; when there are more, half of those drawn are dropped."""
    rng, drawn, share = random.Random(seed), [], 1.0
    for text in texts:
        if rng.random() < share:
            drawn.append(text)
        while sum(map(len, drawn)) > SAMPLE_BYTES and len(drawn) > 1:
            drawn, share = [text for text in drawn if rng.random() < 0.5], share / 2
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
    bpe.train_from_iterator(chunks(texts), trainers.BpeTrainer(vocab_size=size - 1, **options))
    if (found := bpe.get_vocab_size() + 1) < size:
        raise ValueError(f"--tokenizer {size}: the text has only enough for {found}; take more text, or that many")
    bpe.add_special_tokens([data.END_OF_TEXT])
    return bpe.to_str(pretty=True)


def chunks(texts: list[bytes]) -> Iterator[str]:
    for text in (text.decode("utf-8", errors="replace") for text in texts):
        yield from (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def summary(tokenizer: LearnedTokenizer, texts: list[bytes]) -> str:
    """One line: tokens, bytes a token in the first megabyte of the texts, and the longest tokens."""
    some = b"".join(texts)[:1_000_000]
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.end_of_text)]
    longest = " ".join(ascii(token.decode(errors="replace")) for token in sorted(tokens, key=len)[:-11:-1])
    each = len(some) / max(1, len(tokenizer.encode(some)))
    return f"{tokenizer.vocab_size:,} tokens learned, {each:.2f} bytes a token; the longest: {longest}"
