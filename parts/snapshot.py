"""Tensors as they are after a step, written to files while training goes on.

Weights and moments change only when the optimizer makes its next step. Until then the writer reads
them where they are. What it has not read by then is copied first: all of it takes 1.5 GB for
GPT-2 124M, so that nothing is copied which need not be.
"""

if __name__ == "__main__":
    raise SystemExit("parts/snapshot.py is no command: README.md lists the commands")

import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

# A tensor is written in pieces of about so many bytes. An update waits for one of them at most.
PIECE_BYTES = 2**24

# The types of numbers by their names in safetensors' format.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Snapshot:
    """The values that some tensors have now.

    A thread writes the tensors, or views of them, each once. Another one calls `preserve` before it
    changes them. Tensors that are not the snapshot's are written as they are.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        self.versions = [(tensor, tensor._version) for tensor in tensors]
        # By the address of their memory, which several tensors may share: the memory itself, how
        # many of its tensors are not written yet, and its copy, once `preserve` has made one.
        self.live: dict[int, torch.UntypedStorage] = {}
        self.unwritten: Counter[int] = Counter()
        self.copies: dict[int, torch.UntypedStorage] = {}
        for tensor, _ in self.versions:
            memory = tensor.untyped_storage()
            self.live[memory.data_ptr()] = memory
            self.unwritten[memory.data_ptr()] += 1
        self.reading = threading.Lock()  # held while a piece is read
        self.next_turn = threading.Lock()  # so that `preserve` is next after that piece

    def preserve(self) -> None:
        """Copy the tensors that are not written yet. Call it before they change.

        ValueError if one of them has changed already.
        """
        self.check_unchanged()
        # The writer goes on meanwhile: both only read.
        copies = {address: memory.clone() for address, memory in list(self.live.items())}
        with self.next_turn, self.reading:
            for address in self.live:
                self.copies[address] = copies[address]
            self.live.clear()
            self.versions.clear()

    def check_unchanged(self) -> None:
        """ValueError if a tensor has changed before it was copied. (Not every kernel leaves traces:
        torch's fused optimizers leave none.)
        """
        for tensor, version in self.versions:
            if tensor._version != version:
                raise ValueError(
                    "weights or moments have changed outside of the optimizer's step, while a "
                    "checkpoint was written: call the Saver's `preserve` before that"
                )

    def write(self, tensor: torch.Tensor, file: BinaryIO) -> None:
        """Write the numbers that a tensor had when the snapshot was made, row by row."""
        address = tensor.untyped_storage().data_ptr()
        if tensor.dim() == 0:
            tensor = tensor[None]
        n_rows = max(1, PIECE_BYTES // max(1, tensor[:1].nbytes))
        for first in range(0, len(tensor), n_rows):
            with self.next_turn:
                pass
            with self.reading:
                source = tensor
                if address in self.copies:
                    source = torch.empty(0, dtype=tensor.dtype).set_(
                        self.copies[address],
                        tensor.storage_offset(),
                        tensor.size(),
                        tensor.stride(),
                    )
                piece = source[first : first + n_rows].contiguous()
                file.write(memoryview(piece.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        with self.reading:
            self.unwritten[address] -= 1
            if self.unwritten[address] == 0:
                self.live.pop(address, None)
                self.copies.pop(address, None)

    # ---- Files -----------------------------------------------------------------------------------

    def write_safetensors(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        """Write what safetensors.torch.save_file writes, without its copy of what is transposed."""
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor = tensors[name]
            begin = end
            end += tensor.nbytes
            header[name] = dict(
                dtype=SAFETENSORS_DTYPES[tensor.dtype],
                shape=list(tensor.shape),
                data_offsets=[begin, end],
            )
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in names:
                self.write(tensors[name], file)

    def write_pt(self, content: dict, path: Path) -> None:
        """Write what torch.save writes, without the numbers' CRC-32, which torch.load ignores.

        torch.save leaves gaps for the numbers, which are filled in afterwards.
        """
        with torch.serialization.skip_data():
            torch.save(content, path)
        # As torch.save has it: each piece of memory once, even if tensors share it.
        tensors = {}
        for tensor in tensors_in(content):
            memory = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(memory)
            tensors[memory.data_ptr()] = whole
        with zipfile.ZipFile(path) as archive:
            gaps = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        gaps.sort(key=lambda entry: int(entry.filename.rpartition("/")[2]))
        assert [entry.file_size for entry in gaps] == [tensor.nbytes for tensor in tensors.values()]
        with open(path, "r+b") as file:
            for entry, tensor in zip(gaps, tensors.values()):
                # A header of 30 bytes, which ends with the lengths of two fields that follow it.
                file.seek(entry.header_offset + 26)
                name_length = int.from_bytes(file.read(2), "little")
                extra_length = int.from_bytes(file.read(2), "little")
                file.seek(name_length + extra_length, 1)
                self.write(tensor, file)


def tensors_in(content: dict) -> list[torch.Tensor]:
    """The tensors in a dict of dicts, in the order in which torch.save comes to them."""
    tensors = []
    for value in content.values():
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            tensors += tensors_in(value)
    return tensors
