"""From intervals to bytes and back, and the frame around them: what travels, the same on every machine.

The arithmetic coder is a range coder in Python's integers, which do not overflow, so no carry needs care.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from plumbing.launch import UserError

# ---------------------------------------------------------------------------------------------------------------------
# the arithmetic coder

LEAST, WHOLE = 1 << 40, 1 << 48  # the width of an interval, in units of the last byte, lies between them


def encode(intervals: Iterable[tuple[int, int, int]]) -> bytes:
    """The shortest bytes from which a `Decoder` reads these intervals: each is [start, end) of a total."""
    low, width, size = 0, WHOLE, 6  # the interval so far is [low, low + width) of 256^size
    for start, end, total in intervals:
        width //= total
        low, width = low + start * width, (end - start) * width
        while width < LEAST:
            low, width, size = low << 8, width << 8, size + 1
    for zeros in range(8 * size, -1, -8):
        value = -(-low >> zeros) << zeros  # the first number that is not below `low` and ends in so many zeros
        if value < low + width:
            break
    data = value.to_bytes(size, "big")
    return data[: max(size - 8, len(data.rstrip(b"\0")))]  # a reader refuses more than 16 bytes beyond the end


class Decoder:
    """The intervals again, one by one. Beyond its end a message is zeros."""

    def __init__(self, data: bytes):
        self.value, self.width = int.from_bytes(data[:6].ljust(6, b"\0"), "big"), WHOLE
        self.data, self.read = data, 6

    def next(self, ends: np.ndarray) -> int:
        """ends: cumulative frequencies [n], the last is the total. Returns the index of the interval."""
        total = int(ends[-1])
        self.width //= total
        index = int(ends.searchsorted(min(self.value // self.width, total - 1), "right"))
        start = int(ends[index - 1]) if index else 0
        self.value, self.width = self.value - start * self.width, (int(ends[index]) - start) * self.width
        while self.width < LEAST:
            byte = self.data[self.read] if self.read < len(self.data) else 0
            self.value, self.width, self.read = self.value << 8 | byte, self.width << 8, self.read + 1
        return index


# ---------------------------------------------------------------------------------------------------------------------
# the message: a format of bytes

VERSION = 2
MAX_TEXT = 1 << 16  # bytes: a receiver never allocates more, whatever a message claims
CARRIES = ("prompt", "context")  # what a message can hold


def broken() -> UserError:
    """A new one each time: an exception keeps the frames, and with them the messages, of every time it was raised."""
    return UserError("the message is not well formed, though its checksum fits: its sender is at fault")


@dataclass
class Message:
    """What travels. Layout:

    1 byte    128, which starts no UTF-8 text, + 4 * version, + 2 if a context travels instead of a prompt, + 1 if the
              text is deflated instead of coded
    varint    M, the number of latents; 7 bits a byte, low ones first, + 128 if more follow (LEB128). Not if deflated
    ...       the latents, arithmetically coded; or the text, deflated
    4         CRC-32 of the fingerprint of the wire that can read it and of all this, low byte first
    """

    carries: str
    latents: int  # M; 0: deflated
    payload: bytes


def pack(message: Message, fingerprint: bytes) -> bytes:
    """A message as bytes."""
    out = bytearray([128 | VERSION << 2 | CARRIES.index(message.carries) << 1 | (message.latents == 0)])
    rest = message.latents
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    if message.latents:
        out.append(rest)
    out += message.payload
    return bytes(out) + zlib.crc32(fingerprint + out).to_bytes(4, "little")


def unpack(data: bytes, fingerprint: bytes) -> Message:
    """The message in `data`. Raises UserError for anything but a whole message of this wire."""
    if not data or data[0] >> 6 != 2:
        raise UserError("this is not a LatentWire message: it does not start like one")
    if len(data) < 6:
        raise UserError(f"the message is cut off: {len(data)} bytes are fewer than its frame")
    if data[0] >> 2 & 15 != VERSION:
        raise UserError(f"the message has version {data[0] >> 2 & 15}; this program reads version {VERSION}")
    if zlib.crc32(fingerprint + data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise UserError(
            "the message is damaged or cut off, or another wire sent it: its checksum does not fit; send it again, or "
            "receive it with the wire that sent it"
        )
    latents, at = 0, 1
    if not data[0] & 1:
        for shift in (0, 7, 14):  # below 2^21, and more than MAX_TEXT
            byte, at = data[at], at + 1  # at worst a byte of the checksum: refused below
            latents |= (byte & 127) << shift
            if byte < 128:
                break
        if not 0 < latents <= MAX_TEXT or at > len(data) - 4:
            raise broken()
    return Message(CARRIES[data[0] >> 1 & 1], latents, data[at:-4])


def inflate(data: bytes) -> bytes:
    """Deflated text, at most MAX_TEXT bytes and one. Raises UserError."""
    inflater = zlib.decompressobj(-15)
    try:
        raw = inflater.decompress(data, MAX_TEXT + 1)
    except zlib.error:
        raise broken() from None
    if not inflater.eof or inflater.unused_data:
        raise broken()
    return raw


def deflate(data: bytes) -> bytes:
    """zlib at its best, without its own header and checksum, which a message has already."""
    deflater = zlib.compressobj(9, wbits=-15)
    return deflater.compress(data) + deflater.flush()


def with_question(message: bytes, question: str) -> bytes:
    """What a receiver has where a context travels: its message, and the question as text."""
    return len(message).to_bytes(4, "little") + message + question.encode()


def split_question(received: bytes) -> tuple[bytes, str]:
    """(message, question) of `with_question`."""
    size = int.from_bytes(received[:4], "little")
    return received[4 : 4 + size], received[4 + size :].decode()
