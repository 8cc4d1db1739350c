"""The bytes of a .npy file from a stranger, read without believing its header.

numpy allocates what a header claims before it looks for the payload, and evaluates the header as Python. Here the header must be,
character for character, what ``numpy.save`` writes of a plain array, and the payload exactly as long as it says.
"""

import math
import re

import numpy as np
import numpy.typing as npt

MAGIC = b"\x93NUMPY\x01\x00"
MAX_HEADER = 1024
MAX_DIMENSIONS = 8
MAX_EMPTY = 2**40
DTYPES = {code: np.dtype(code) for code in ("|b1", "|u1", "|i1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8")}
"""What an array may be made of: plain numbers in little-endian order."""
_SIZE = r"(?:0|[1-9]\d{0,18})"
_SHAPE = rf"{_SIZE},|{_SIZE}(?:, {_SIZE})+"
_HEADER = re.compile(rf"\{{'descr': '([^'\\]{{1,20}})', 'fortran_order': (True|False), 'shape': \(((?:{_SHAPE})?)\), \}} *\n")


class NpyError(ValueError):
    """Bytes that are no plain .npy array; the text is the end of a sentence that begins with what must be one."""


def header(data: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    """Dtype, shape and first byte of the payload; allocates nothing of what is claimed.

    Raises:
        NpyError: no header as ``numpy.save`` writes it, a dtype other than plain numbers, Fortran order, too many dimensions, or
            a payload of another length.
    """
    if not data.startswith(MAGIC) or len(data) < len(MAGIC) + 2:
        raise NpyError("must be the bytes of a .npy file, version 1.0, got others")
    length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 2], "little")
    start = len(MAGIC) + 2 + length
    if length > MAX_HEADER or len(data) < start:
        raise NpyError(f"must have a header of at most {MAX_HEADER} bytes, got {length} claimed of {len(data)} in all")
    found = _HEADER.fullmatch(data[len(MAGIC) + 2 : start].decode("latin-1"))
    if found is None:
        raise NpyError("must have a header as numpy.save writes it for a plain array, got another")
    if found[1] not in DTYPES:
        raise NpyError(f"must be of plain little-endian numbers, got dtype {found[1]!r}")
    if found[2] == "True":
        raise NpyError("must be in C order, got Fortran order")
    dtype, shape = DTYPES[found[1]], tuple(int(size) for size in found[3].split(",") if size)
    if len(shape) > MAX_DIMENSIONS:
        raise NpyError(f"must have at most {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != len(data) - start:
        raise NpyError(f"must hold the {claimed} bytes that its header claims, got {len(data) - start}")
    return dtype, shape, start


def read(data: bytes) -> npt.NDArray[np.generic]:
    """The array in the bytes: a view of them that cannot be written to, so that nothing is allocated.

    >>> import io
    >>> file = io.BytesIO()
    >>> np.save(file, np.arange(6.0).reshape(2, 3))
    >>> read(file.getvalue()).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]

    Raises:
        NpyError: as `header`, or truth values other than 0 and 1.
    """
    dtype, shape, start = header(data)
    count = math.prod(shape)
    if not count:
        # numpy multiplies the other sizes all the same.
        if math.prod(size for size in shape if size) > MAX_EMPTY:
            raise NpyError(f"must have dimensions that numpy can hold, got {shape}")
        return np.empty(shape, dtype)
    if dtype.kind == "b" and np.frombuffer(data, np.uint8, count, start).max() > 1:
        raise NpyError("must hold truth values of 0 and 1, got others")
    return np.frombuffer(data, dtype, count, start).reshape(shape)
