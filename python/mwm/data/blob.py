"""One array per file, for caches: a fixed header, a checksum, the values. No pickle, nothing to execute, no names.

Layout: b"MWM1" · dtype code u8 · packed u8 · dimensions u8 · 0 u8 · dimensions × u32 little-endian · BLAKE2b-16 of header
and payload · payload (row-major, deflated where `packed`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .limits import MAX_PIXELS

_MAGIC = b"MWM1"
_DTYPES = {1: np.dtype("u1"), 2: np.dtype("<u2"), 3: np.dtype("<f2"), 4: np.dtype("<f4")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DIGEST = 16
_MAX_PAYLOAD = 4 * MAX_PIXELS
_MAX_BYTES = _MAX_PAYLOAD + (_MAX_PAYLOAD >> 8) + 4096  # deflating may add a little; the header


class CorruptEntry(Exception):
    """A cache file is not what was written; it is to be made again."""


def key(*parts: str | bytes) -> str:
    """BLAKE2b of the parts, each preceded by its length, so that no two lists of parts run together. 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else bytes(part)
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.hexdigest()


def write_array(path: Path, array: NDArray, *, packed: bool, durable: bool = True) -> None:
    """Write atomically: a temporary file in the same folder, fsync, rename. Several processes may write one path.

    Args:
        path: Target; its folder is made.
        array: uint8, uint16, float16 or float32, at most 4 dimensions.
        packed: Deflate (regions shrink some 50-fold; images hardly).
        durable: Wait for the disk. Without it a power cut may leave a damaged entry, which the checksum finds; a killed process leaves none.

    Raises:
        OSError: the disk is full or not writable; the target is as before.
    """
    array = np.ascontiguousarray(array)
    code = _CODES[array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype]
    head = struct.pack(f"<4sBBBB{array.ndim}I", _MAGIC, code, packed, array.ndim, 0, *array.shape)
    payload = array.astype(_DTYPES[code], copy=False).tobytes()
    if packed:
        payload = zlib.compress(payload, 1)  # level 3 takes 3.5 times as long on soft maps for a tenth of the size, and masks are as small
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, head + hashlib.blake2b(head + payload, digest_size=_DIGEST).digest() + payload, durable=durable)


def read_array(path: Path) -> NDArray:
    """Read what `write_array` wrote.

    Raises:
        FileNotFoundError: there is no such entry.
        CorruptEntry: the file is damaged, or no regular file of a possible size (a pipe would be waited for, a device read for ever).
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
        raise CorruptEntry
    data = path.read_bytes()
    try:
        magic, code, packed, ndim, _ = struct.unpack_from("<4sBBBB", data)
        if magic != _MAGIC or code not in _DTYPES or not 1 <= ndim <= 4:
            raise CorruptEntry
        size = 8 + 4 * ndim
        shape = struct.unpack_from(f"<{ndim}I", data, 8)
        payload = data[size + _DIGEST :]
        if hashlib.blake2b(data[:size] + payload, digest_size=_DIGEST).digest() != data[size : size + _DIGEST]:
            raise CorruptEntry
        wanted = int(np.prod(shape, dtype=np.int64)) * _DTYPES[code].itemsize
        if wanted > _MAX_PAYLOAD:
            raise CorruptEntry
        if packed:
            payload = zlib.decompressobj().decompress(payload, wanted + 1)
        if len(payload) != wanted:
            raise CorruptEntry
    except (struct.error, zlib.error) as error:
        raise CorruptEntry from error
    return np.frombuffer(payload, _DTYPES[code]).reshape(shape)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file atomically and, unless told otherwise, durably.

    Raises:
        OSError: as `write_array`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
