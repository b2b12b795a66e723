"""From a prediction to bytes and back, the same on every machine: integer predictor, arithmetic coder, message format.

An arithmetic coder works only if sender and receiver agree, bit for bit, on every frequency. Floating-point results
differ between machines; sums of whole numbers do not. So the trained predictor is rounded to integers once, and both
sides use those.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from plumbing.launch import UserError


class IntegerPredictor:
    """The predictor in fixed point: the same frequencies on every machine.

    Weights and activations are whole numbers of 2^-12. They are multiplied as float64, in which sums of whole numbers
    below 2^53 are exact in any order: 16 bits x 22 bits x 512 terms are 2^47.
    """

    ONE, TOTAL = 1 << 12, 1 << 20

    def __init__(self, tensors: dict[str, Tensor], without: str | None):
        self.without = without
        whole = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
        self.embedding, self.exponential = whole["embedding.weight"], tensors["exponential"].numpy()
        self.layers = [(whole[f"{n}.weight"].T, whole[f"{n}.bias"]) for n in ("hidden", "out")]
        self.vocabulary = len(self.embedding) - 1
        e = self.exponential
        if not len(e) or e[0] != e.max() or not 0 < e[0] <= 2**24 or e.min() < 0:  # 64 bits hold the sums of these
            raise UserError("the wire's sender.predictor.exponential is not a table of exp: it cannot send")

    @classmethod
    def tensors(cls, predictor: nn.Module) -> dict[str, Tensor]:
        """The trained predictor as integers, and exp(-i/64) as integers: a wire's file holds both."""
        state = {
            name: (tensor.detach().cpu().double() * cls.ONE).round().clamp(-32768, 32767).to(torch.int16)
            for name, tensor in predictor.state_dict().items()
        }
        return state | {"exponential": (torch.exp(-torch.arange(1024).double() / 64) * 2**24).round().long()}

    def frequencies(self, contexts: np.ndarray, copies: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """[n,V] int64, each at least 1, of a total that is at most TOTAL."""
        n, V = len(contexts), self.vocabulary
        if self.without == "prediction":
            return np.ones((n, V), np.int64)
        x = self.embedding[np.concatenate([contexts, copies], 1)].reshape(n, -1)
        for number, (weight, bias) in enumerate(self.layers):
            x = np.floor((x @ weight + bias * self.ONE) / self.ONE)  # a power of two: exact
            if number == 0:
                x = x.clip(0, 1 << 22)
        y = x.astype(np.int64)
        logits = np.concatenate([y[:, :V], np.zeros((n, 1), np.int64)], 1)
        for order in range(copies.shape[1]):
            logits[np.arange(n), copies[:, order]] += y[:, V + order]
        logits = logits[:, :V] + y[:, -1:] * seen
        steps = np.minimum((logits.max(1, keepdims=True) - logits) >> 6, len(self.exponential) - 1)  # of 1/64 nat
        weights = self.exponential[steps]
        return 1 + weights * (self.TOTAL - V) // weights.sum(1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# the arithmetic coder of Witten, Neal and Cleary (1987), 32 bits

TOP, HALF, QUARTER = (1 << 32) - 1, 1 << 31, 1 << 30


def narrow(low: int, high: int, start: int, end: int, total: int) -> tuple[int, int]:
    span = high - low + 1
    return low + span * start // total, low + span * end // total - 1


def to_bits(intervals: list[tuple[int, int, int]]) -> bytes:
    """Bytes that name the interval [start, end) of a total, for each of a list of them; without zeros at the end."""
    low, high, waiting, bits = 0, TOP, 0, []
    for start, end, total in intervals:
        low, high = narrow(low, high, start, end, total)
        while True:
            if high < HALF or low >= HALF:
                bit = int(low >= HALF)
                bits += [bit] + [1 - bit] * waiting
                waiting = 0
                low, high = low - bit * HALF, high - bit * HALF
            elif low >= QUARTER and high < 3 * QUARTER:
                waiting += 1
                low, high = low - QUARTER, high - QUARTER
            else:
                break
            low, high = 2 * low, 2 * high + 1
    bit = int(low >= QUARTER)
    bits += [bit] + [1 - bit] * (waiting + 1)
    return np.packbits(np.array(bits, np.uint8)).tobytes().rstrip(b"\0")


class FromBits:
    """The intervals again, one by one. Beyond its end a message is zeros."""

    def __init__(self, data: bytes):
        self.bits = np.unpackbits(np.frombuffer(data, np.uint8)).tolist()
        self.low, self.high, self.read = 0, TOP, 32
        self.value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def next(self, ends: np.ndarray) -> int:
        """ends: cumulative frequencies [V], the last is the total. Returns the index of the interval."""
        total = int(ends[-1])
        at = ((self.value - self.low + 1) * total - 1) // (self.high - self.low + 1)
        index = int(np.searchsorted(ends, at, side="right"))
        start = int(ends[index - 1]) if index else 0
        self.low, self.high = narrow(self.low, self.high, start, int(ends[index]), total)
        while True:
            if self.high < HALF or self.low >= HALF:
                shift = HALF if self.low >= HALF else 0
            elif self.low >= QUARTER and self.high < 3 * QUARTER:
                shift = QUARTER
            else:
                return index
            self.low, self.high, self.value = self.low - shift, self.high - shift, self.value - shift
            bit = self.bits[self.read] if self.read < len(self.bits) else 0
            self.low, self.high, self.value = 2 * self.low, 2 * self.high + 1, 2 * self.value + bit
            self.read += 1


# ---------------------------------------------------------------------------------------------------------------------
# the message: a format of bytes

MAGIC, VERSION = b"LW", 1
MAX_TEXT = 1 << 16  # bytes: a receiver never allocates more, whatever a message claims
CARRIES = ("prompt", "context")  # what a message can hold
BROKEN = "the message is not well formed, though its checksum fits: its sender is at fault"


@dataclass
class Message:
    """What travels. Layout:

    2 bytes   "LW"
    1         version; + 128 if a context travels instead of a prompt; + 64 if the text is deflated instead of coded
    2         fingerprint of the wire that can read it
    varint    M, the number of latents; 7 bits a byte, low ones first, + 128 if more follow (LEB128). Not if deflated
    ...       the latents, arithmetically coded; or the text, deflated
    4         CRC-32 of all this, low byte first
    """

    carries: str
    latents: int  # M; 0: deflated
    payload: bytes


def pack(message: Message, fingerprint: bytes) -> bytes:
    """A message as bytes."""
    flags = VERSION | CARRIES.index(message.carries) << 7 | (message.latents == 0) << 6
    out = bytearray(MAGIC + bytes([flags]) + fingerprint)
    rest = message.latents
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    if message.latents:
        out.append(rest)
    out += message.payload
    return bytes(out) + struct.pack("<I", zlib.crc32(out))


def unpack(data: bytes, fingerprint: bytes) -> Message:
    """The message in `data`. Raises UserError for anything but a whole message of this wire."""
    if data[:2] != MAGIC:
        raise UserError("this is not a LatentWire message: it does not start with LW")
    if len(data) < 10:
        raise UserError(f"the message is cut off: {len(data)} bytes are fewer than its frame")
    if data[2] & 63 != VERSION:
        raise UserError(f"the message has version {data[2] & 63}; this program reads version {VERSION}")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise UserError("the message is damaged or cut off: its checksum does not fit; send it again")
    if data[3:5] != fingerprint:
        raise UserError("the message was made by another wire; receive it with the one that sent it")
    latents, at = 0, 5
    if not data[2] & 64:
        for shift in (0, 7, 14):  # below 2^21, and more than MAX_TEXT
            byte, at = data[at], at + 1  # at worst a byte of the checksum: refused below
            latents |= (byte & 127) << shift
            if byte < 128:
                break
        if not 0 < latents <= MAX_TEXT or at > len(data) - 4:
            raise UserError(BROKEN)
    return Message(CARRIES[data[2] >> 7], latents, data[at:-4])


def inflate(data: bytes) -> bytes:
    """Deflated text, at most MAX_TEXT bytes and one. Raises UserError."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, MAX_TEXT + 1)
    except zlib.error:
        raise UserError(BROKEN) from None
    if not inflater.eof or inflater.unused_data:
        raise UserError(BROKEN)
    return raw


def with_question(message: bytes, question: str) -> bytes:
    """What a receiver has where a context travels: its message, and the question as text."""
    return struct.pack("<I", len(message)) + message + question.encode()


def split_question(received: bytes) -> tuple[bytes, str]:
    """(message, question) of `with_question`."""
    (size,) = struct.unpack_from("<I", received)
    return received[4 : 4 + size], received[4 + size :].decode()
