"""TensorFlow's checkpoints, PREFIX.index and PREFIX.data-00000-of-00001, without TensorFlow.

Source: the formats of tensorflow/core/util/tensor_bundle (tensor_bundle.proto) and of LevelDB's tables."""

import functools
import math
import struct
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a table
POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
DTYPES = {1: "float32", 2: "float64", 3: "int32", 9: "int64", 10: "bool", 14: "bfloat16", 19: "float16"}
LANE, LANES = 1024, 4096  # at most so many bytes are summed one after the other, in so many rows side by side


def read_bundle(prefix, skip=lambda name: False):
    """The tensors of a checkpoint, every checksum verified.

    Args:
        prefix: path without .index and .data-00000-of-00001.
        skip: function of a name: whether the tensor is not read.

    Returns:
        dict, name -> array.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is truncated, damaged or no checkpoint, or a tensor is in slices or no numbers.
    """
    import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy

    index = Path(f"{prefix}.index")
    try:
        header, entries = _index(index.read_bytes())
    except (IndexError, ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"{index} is truncated, damaged or no checkpoint of TensorFlow: {error}.") from error
    found = {}
    for name, entry in entries.items():
        if skip(name):
            continue
        dtype = DTYPES.get(entry.get(1, 0))
        if dtype is None or 7 in entry:
            what = "saved in slices" if 7 in entry else f"of TensorFlow's type {entry.get(1, 0)}"
            raise ValueError(f"{index}: {name} is {what}; what can be read are whole tensors of numbers.")
        path = Path(f"{prefix}.data-{entry.get(3, 0):05d}-of-{header.get(1, 1):05d}")
        found[name] = _tensor(path, name, entry, np.dtype(dtype))
    return found


def _tensor(path, name, entry, dtype):
    offset, size, shape = entry.get(4, 0), entry.get(5, 0), entry["shape"]
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: {name} {shape} of {dtype} should have another size than {size} bytes.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, and the checkpoint's index says that it has {name}.")
    length = path.stat().st_size
    if offset + size > length:
        raise ValueError(f"{path} is truncated: {name} ends at byte {offset + size} of {length}.")
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if masked(crc32c(data)) != entry.get(6, 0):
        raise ValueError(f"{path} is damaged: {name} does not have the checksum that it was written with.")
    return np.frombuffer(data, dtype.newbyteorder("<") if dtype.kind != "V" else dtype).reshape(shape)


def _index(data):
    """The fields of the header, by number, and those of each tensor's entry, by its name.

    Slices have entries, too, with keys that are no text and begin with a zero byte; they are left out.
    """
    if len(data) < 48 or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ValueError("it does not end as one")
    footer = data[-48:]
    metadata, at = _handle(footer, 0)
    blocks, _ = _handle(footer, at)
    entries = dict(_block(data, metadata))  # none
    for _, value in _block(data, blocks):
        entries |= dict(_block(data, _handle(value, 0)[0]))
    header = dict(_fields(entries.pop(b"", b"")))
    if header.get(2, 0) != 0:
        raise ValueError("its numbers are big-endian")
    return header, {key.decode(): _entry(value) for key, value in entries.items() if key[:1] != b"\0"}


def _entry(data):
    """type 1, shape 2, shard 3, offset 4, size 5, checksum 6, slices 7; "shape" as a tuple."""
    entry = dict(_fields(data))
    dims = [dict(_fields(dim)) for number, dim in _fields(entry.get(2, b"")) if number == 2]
    return {**entry, "shape": tuple(dim.get(1, 0) for dim in dims)}


def _handle(data, at):
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data, handle):
    """(key, value) of each entry of one block of a table; a key is told by what differs from the one before."""
    offset, size = handle
    content, trailer = data[offset : offset + size], data[offset + size : offset + size + 5]
    kind, checksum = struct.unpack("<BI", trailer)
    if masked(crc32c(content + trailer[:1])) != checksum:
        raise ValueError(f"the block at byte {offset} does not have the checksum that it was written with")
    if kind != 0:
        raise ValueError(f"the block at byte {offset} is compressed (kind {kind}), as TensorFlow's are not")
    [restarts] = struct.unpack("<I", content[-4:])
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(content, at)
        fresh, at = _varint(content, at)
        length, at = _varint(content, at)
        key = key[:shared] + content[at : at + fresh]
        at += fresh + length
        yield key, content[at - length : at]


def _fields(data):
    """(number, int or bytes) of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field is of kind {kind}")
        yield tag >> 3, value


def _varint(data, at):
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")


def masked(checksum):
    """A checksum as it is written, so that a sum over data with sums in it is not misled."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data):
    """The CRC-32C of bytes, int; rows of the data are summed side by side in NumPy, 1 GB in some seconds.

    The sum from zero is linear: zeros before the data change nothing, and that of a + b is that of a, moved over as
    many zeros as b has bytes, xor that of b.
    """
    sums, start = np.full(1, 0xFFFFFFFF, "uint32"), 0
    while start < len(data):
        size = (len(data) - start) % (LANE * LANES) or LANE * LANES  # the odd piece comes first
        sums = _moved(sums, size) ^ _from_zero(data[start : start + size])
        start += size
    return int(sums[0]) ^ 0xFFFFFFFF


def _from_zero(data):
    width = min(LANE, max(4, _power(len(data) / LANES)))
    lanes = _power(len(data) / width)
    padded = np.zeros(lanes * width, "uint8")
    padded[len(padded) - len(data) :] = np.frombuffer(data, "uint8")
    words = np.ascontiguousarray(padded.view("<u4").reshape(lanes, -1).T)
    tables, sums = _tables(), np.zeros(lanes, "uint32")
    for word in words:
        sums ^= word
        sums = tables[3][sums & 255] ^ tables[2][sums >> 8 & 255] ^ tables[1][sums >> 16 & 255] ^ tables[0][sums >> 24]
    while len(sums) > 1:
        sums = _moved(sums[0::2], width) ^ sums[1::2]
        width *= 2
    return sums


def _power(x):
    """The least power of 2 that is at least x."""
    return 1 << max(0, math.ceil(x) - 1).bit_length()


@functools.cache
def _tables():
    """What each byte becomes after 1, 2, 3 and 4 bytes: uint32 (4, 256)."""
    first = np.arange(256, dtype="uint32")
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(POLYNOMIAL), first >> 1)
    tables = [first]
    for _ in range(3):
        tables.append(first[tables[-1] & 255] ^ tables[-1] >> 8)
    return np.stack(tables)


def _moved(sums, zeros):
    """Sums after so many zero bytes."""
    for power in range(zeros.bit_length()):
        if zeros >> power & 1:
            sums = _image(_move(power), sums)
    return sums


@functools.cache
def _move(power):
    """What each bit of a sum becomes after 2^power zero bytes: uint32 (32,)."""
    if power == 0:
        bits = np.uint32(1) << np.arange(32, dtype="uint32")
        return _tables()[0][bits & 255] ^ bits >> 8
    half = _move(power - 1)
    return _image(half, half)


def _image(bits, sums):
    is_set = (sums[:, None] >> np.arange(32, dtype="uint32") & 1).astype(bool)
    return np.bitwise_xor.reduce(np.where(is_set, bits, np.uint32(0)), axis=1)
