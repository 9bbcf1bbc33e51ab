"""File formats of published data sets, with the content that a file must have. Nothing that is read is executed."""

from __future__ import annotations

import hashlib
import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from harness.problem import DataError


def check_sha256(content: bytes, expected: str) -> None:
    """Compare the SHA-256 of a content with the expected one.

    Raises:
        DataError: If they differ.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(f"not the expected content (SHA-256 {found[:12]}..., expected {expected[:12]}...)")


@dataclass(frozen=True)
class IdxFile:
    """Bytes in the IDX format: a magic number and the sizes as big-endian 32-bit integers, then the values.

    Args:
        sha256: Of the whole file, unpacked.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def limit(self) -> int:
        return 4 * (1 + len(self.shape)) + math.prod(self.shape)

    def encode(self, values: np.ndarray) -> bytes:
        header = np.array([0x800 + len(self.shape), *self.shape], dtype=">i4")  # 0x08: unsigned bytes
        return header.tobytes() + values.astype(np.uint8).tobytes()

    def decode(self, content: bytes) -> np.ndarray:
        """Shape ``shape``, uint8.

        Raises:
            DataError: If the file is truncated or not the expected one.
        """
        if len(content) < self.limit:
            raise DataError(f"truncated ({len(content):,} of {self.limit:,} bytes)")
        check_sha256(content, self.sha256)
        return np.frombuffer(content, np.uint8, offset=4 * (1 + len(self.shape))).reshape(self.shape).copy()


@dataclass(frozen=True)
class BinaryTextFile:
    """Binary observations as text (``.amat``): one a line, digits 0 or 1 between blanks.

    Copies differ in white space, so the parsed bits are checked. The rows come back in lexicographic order, whatever
    their order in the copy: they are exchangeable, and every copy then gives the same data.

    Args:
        shape: Of the array, the first number being that of the rows.
        sha256: Of the bits in that order, each row packed to whole bytes.
    """

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def limit(self) -> int:
        return 16 * math.prod(self.shape)  # a digit and the white space around it

    def decode(self, content: bytes) -> np.ndarray:
        """Shape ``shape``, uint8, zeros and ones.

        Raises:
            DataError: If the file is truncated, holds anything but bits, or not the expected ones.
        """
        bits = np.frombuffer(content.translate(None, b" \t\r\n"), np.uint8) - ord("0")
        if bits.size and bits.max() > 1:
            raise DataError("has characters other than 0, 1 and blanks")
        if bits.size != math.prod(self.shape):
            problem = "truncated" if bits.size < math.prod(self.shape) else "too long"
            raise DataError(f"{problem} ({bits.size:,} of {math.prod(self.shape):,} digits)")
        packed = np.packbits(bits.reshape(self.shape[0], -1), axis=1)
        ordered = b"".join(sorted(row.tobytes() for row in packed))
        check_sha256(ordered, self.sha256)
        rows = np.frombuffer(ordered, np.uint8).reshape(packed.shape)
        return np.unpackbits(rows, axis=1, count=math.prod(self.shape[1:])).reshape(self.shape)


# What a pickle of NumPy arrays of numbers, written by Python 2, consists of.
_ARRAY_OPCODES = frozenset(
    "PROTO GLOBAL REDUCE BUILD BINPUT BINGET MARK TUPLE TUPLE1 TUPLE2 TUPLE3 SHORT_BINSTRING BINSTRING "
    "BININT BININT1 BININT2 NONE NEWFALSE STOP".split()
)
_ARRAY_GLOBALS = frozenset(["numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"])


def pickled_buffers(content: bytes) -> Iterator[memoryview]:
    """The raw bytes of the arrays in a pickle (protocol 2, from Python 2), in their order.

    The pickle is taken apart into its opcodes and never run, whatever is in it.

    Raises:
        DataError: If the pickle is malformed or has anything besides plain arrays in it.
    """
    try:
        for opcode, argument, position in pickletools.genops(content):
            name = opcode.name
            if name not in _ARRAY_OPCODES or (name == "GLOBAL" and argument not in _ARRAY_GLOBALS):
                raise DataError(f"refused: a pickle with something besides arrays ({name} {str(argument)[:40]!r})")
            if name == "BINSTRING" and position is not None and isinstance(argument, str):
                start = position + 5  # the opcode and a length of four bytes
                yield memoryview(content)[start : start + len(argument)]
    except ValueError as error:
        raise DataError(f"malformed pickle: {error}") from None
