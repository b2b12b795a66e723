"""Stage 3: the full pipeline. One message, a fifth of the text's bytes, and every LLM with a stage-2 wire reads it.

    text -> encoder -> index of each code [M] -> predictor, arithmetic coder -> message        the sender: no LLM
            stage 2    its codebook: known       learned: the next index

    message -> indices [M] -> text -> the encoder, codes [L,k] and adapter of this LLM -> frozen LLM       a receiver
                 bit-exact            stage 2: proven                                     the answer

A latent is the index of a code that stage 2 has proven: a number of ten bits, of which most are predictable from the
latents before it. So what is learned here is to predict them, and the target is known: the index that comes next. An
arithmetic coder turns a prediction into bits, a likely index into few. The predictor looks at the last 8 indices, at
what followed when the last 4, 2 and 1 of them stood in this message before (names come back), and at which have been
there at all. It is trained in floating point and used in integers, so that every machine predicts the same.

A code whose token does not spell the bytes it stands for is sent as bytes, so that any text arrives, bit for bit; then
two receivers lose nothing against one, whatever their tokenizers, and a third joins without training the sender again.

A receiver may also read fewer positions than tokens (--receiver direct): positions go where the bits went, and a pooler
tells the tokens that stay what stood around them. Its target is known: the LLM's own states behind the receiver above.

What was tried and lost: latents learned from scratch, fixed spans of 4 or 8 bytes in 4-bit numbers (a fifth of the
bytes wrong at 107 bytes a prompt, after 500 steps of 32); counts of pairs of indices instead of a network (50 bytes a
prompt, against 31; the frame is 10 more); a code nearby where that saves bits (F1 falls from 95 to 83 before a byte is
saved: what is dear is names, and names are what is asked for).

    python stage3_full.py                                                   # both readers; README has the scores
    python stage3_full.py --eval-only tiny/wires/stage3 --model tiny-qwen   # the shipped wire, one receiver
    python stage3_full.py --send "Ada lives in Paris." --wire-carries context > message
    python stage3_full.py --receive message --model tiny-qwen --question "Where does Ada live?"

Letters: N bytes of a text, M latents of a message, V of the sender's codebook, n positions in a batch, L tokens of a
prompt, d LLM embedding width, k code width.
"""

import hashlib
import math
import random
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common
import stage2_encoder as stage2
from stage1_pca_adapter import Adapter

STAGE = "stage3"
SHIPPED = "tiny/wires/stage3"
STAGE2 = ("tiny/wires/stage2", "tiny/wires/stage2-qwen")
CARRIES = ("prompt", "context")
ABLATIONS = ("copies", "context", "prediction")
RECEIVERS = ("unpack", "direct")
DIRECT_ABLATIONS = ("states", "teacher")

# ---------------------------------------------------------------------------------------------------------------------
# arguments


def parse_arguments():
    parser = common.Parser(description=__doc__.split("\n")[0])
    common.add_arguments(parser, STAGE, steps=1200, batch_size=32, lr=2e-3)
    parser.add_argument(
        "--stage2",
        metavar="WIRE_DIR",
        nargs="+",
        help="trained stage-2 wires, one a receiver; the first one's sends. With --eval-only: receivers that join",
    )
    parser.add_argument(
        "--wire-carries", choices=CARRIES, help="what travels: the whole prompt, or all but the question"
    )
    parser.add_argument(
        "--without",
        choices=ABLATIONS + DIRECT_ABLATIONS,
        help="an ablation: leave this out of the predictor, or of what a direct receiver learns from",
    )
    parser.add_argument(
        "--receiver",
        choices=RECEIVERS,
        default="unpack",
        help="what the LLM reads of a context: every token, or fewer positions; 'direct' is trained on top of --wire, "
        "for --model (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", type=common.positive_float, help="of a direct receiver: tokens of a context a position (default: 2)"
    )
    parser.add_argument("--send", metavar="TEXT|FILE", help="write the message of a text to standard output; no LLM")
    parser.add_argument(
        "--receive", metavar="FILE", help="print what --model answers to a message ('-': standard input)"
    )
    parser.add_argument("--question", help="to ask about a context that travels, or to send with one")
    parser.add_argument(
        "--wire", metavar="WIRE_DIR", help=f"for --send, --receive and --receiver direct; default: {SHIPPED}"
    )
    args = common.finish_arguments(parser)
    if args.send is not None and args.receive is not None:
        parser.error("--send and --receive are two processes: give one of them")
    direct, once = args.receiver == "direct", args.send is not None or args.receive is not None
    if args.wire and not once and (args.eval_only or not direct):
        parser.error("--wire belongs to --send, --receive and the training of a --receiver direct; see --eval-only")
    if args.rate is not None and not direct:
        parser.error("--rate belongs to --receiver direct")
    if args.rate is not None and not 1 <= args.rate <= 64:
        parser.error(f"argument --rate: must be from 1 to 64 tokens a position, not {args.rate:g}")
    if direct and args.send is not None:
        parser.error("--receiver direct is the receiver's affair: the message is the same; drop it from --send")
    if direct and args.wire_carries == "prompt":
        parser.error("--receiver direct reads contexts, with the question as text: use --wire-carries context")
    if direct and args.stage2:
        parser.error("--receiver direct is trained on top of a stage-3 wire: give --wire, not --stage2")
    if args.without and direct != (args.without in DIRECT_ABLATIONS):
        parser.error(f"--without {args.without} leaves nothing out of a --receiver {args.receiver}")
    args.untaught = None
    if direct:
        args.rate, args.wire_carries = args.rate or 2.0, "context"
        args.untaught, args.without = args.without, None
    if args.question and args.send is None and args.receive is None:
        parser.error("--question belongs to --send and --receive")
    return args


# what a trained wire fixes: --eval-only reads these from its config.json and refuses other values
NEEDED = ("sender.spelled", "sender.lengths", "sender.predictor.exponential", "receiver0.adapter.keys")
DEFAULTS = {"data": "tiny", "stage2": list(STAGE2), "without": None}

# ---------------------------------------------------------------------------------------------------------------------
# the predictor: which index comes next? Learned in floating point, used in integers.


class History:
    """What the predictor sees of the indices so far. Sender and receiver walk through the same ones."""

    CONTEXT, ORDERS = 8, (4, 2, 1)

    def __init__(self, vocabulary: int, without: str | None):
        self.nothing, self.without, self.ids, self.followers = vocabulary, without, [], {}

    def features(self) -> tuple[list[int], list[int]]:
        """(the last CONTEXT indices, what followed the last 4, 2, 1 of them before); V where there is none."""
        last = self.ids[-self.CONTEXT :]
        last = [self.nothing] * (self.CONTEXT - len(last)) + last
        if self.without == "context":
            last = [self.nothing] * self.CONTEXT
        return last, [self.followers.get(tuple(self.ids[-n:]), self.nothing) for n in self.ORDERS]

    def add(self, index: int) -> None:
        for n in self.ORDERS:
            if len(self.ids) >= n and self.without != "copies":
                self.followers[tuple(self.ids[-n:])] = index
        self.ids.append(index)


def features(ids: list[int], vocabulary: int, without: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(contexts [n,CONTEXT], copies [n,ORDERS], seen [n,V] bool) in front of each of n indices."""
    history, contexts, copies = History(vocabulary, without), [], []
    first = np.full(vocabulary, len(ids))
    for place, index in enumerate(ids):
        context, copy = history.features()
        contexts.append(context)
        copies.append(copy)
        history.add(index)
        first[index] = min(first[index], place)
    seen = (first < np.arange(len(ids))[:, None]) & (without != "copies")
    return np.array(contexts), np.array(copies), seen


class Predictor(nn.Module):
    """An n-gram network with one hidden layer, and with weights for copying from what was already said."""

    WIDTH, HIDDEN = 32, 256

    def __init__(self, vocabulary: int):
        super().__init__()
        seen = History.CONTEXT + len(History.ORDERS)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, self.WIDTH)
        self.hidden = nn.Linear(seen * self.WIDTH, self.HIDDEN)
        self.out = nn.Linear(self.HIDDEN, vocabulary + len(History.ORDERS) + 1)

    def forward(self, contexts: Tensor, copies: Tensor, seen: Tensor) -> Tensor:
        """contexts [n,CONTEXT], copies [n,ORDERS] (V: none), seen [n,V]. Returns logits [n,V]."""
        V = self.vocabulary
        x = self.embedding(torch.cat([contexts, copies], 1)).flatten(1)
        y = self.out(F.relu(self.hidden(x)))
        logits = F.pad(y[:, :V], (0, 1)).scatter_add(1, copies, y[:, V:-1])  # a copy of nothing adds to column V
        return logits[:, :V] + y[:, -1:] * seen


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

    @classmethod
    def tensors(cls, predictor: Predictor) -> dict[str, Tensor]:
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
# the message: a format of bytes, the same on every machine

MAGIC, VERSION = b"LW", 1
MAX_TEXT = 1 << 16  # bytes: a receiver never makes room for more, whatever a message claims


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
    """The message in `data`. Raises UserError, in one line, for whatever is not a whole message of this wire."""
    if data[:2] != MAGIC:
        raise common.UserError("this is no LatentWire message: it does not start with LW")
    if len(data) < 10:
        raise common.UserError(f"the message is cut off: {len(data)} bytes are fewer than its frame")
    if data[2] & 63 != VERSION:
        raise common.UserError(f"the message has version {data[2] & 63}; this program reads version {VERSION}")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise common.UserError("the message is damaged or cut off: its checksum does not fit; send it again")
    if data[3:5] != fingerprint:
        raise common.UserError("the message was made by another wire; receive it with the one that sent it")
    latents, at = 0, 5
    if not data[2] & 64:
        for shift in (0, 7, 14):  # below 2^21, and more than MAX_TEXT
            byte, at = data[at], at + 1  # at worst a byte of the checksum: refused below
            latents |= (byte & 127) << shift
            if byte < 128:
                break
        if not 0 < latents <= MAX_TEXT or at > len(data) - 4:
            raise BROKEN
    return Message(CARRIES[data[2] >> 7], latents, data[at:-4])


BROKEN = common.UserError("the message is not well formed, though its checksum fits: its sender is at fault")

# ---------------------------------------------------------------------------------------------------------------------
# the sender: text -> message, with no LLM and no tokenizer; and its inverse, which every receiver starts with


def pieces_of(reader: common.Reader) -> list[bytes]:
    """What each token of a reader spells; b"" for those that stand for no text. Raises UserError if a byte has none."""
    tokenizer = reader.tokenizer
    if reader.spelling.nfc or reader.spelling.prepend:
        raise common.UserError(f"{reader.name} changes a text before it tokenises it: it can receive, but not send")
    added, pieces = set(tokenizer.get_added_vocab()), []
    letters = {letter: byte for byte, letter in byte_letters().items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    for name in tokenizer.convert_ids_to_tokens(list(range(len(reader.table)))):
        if name is None or name in added:
            pieces.append(b"")
        elif byte_level:
            pieces.append(bytes(letters.get(letter, 0) for letter in name) if set(name) <= set(letters) else b"")
        elif name.startswith("<0x") and len(name) == 6:
            pieces.append(bytes([int(name[3:5], 16)]))
        else:
            pieces.append(name.replace("▁", " ").encode())
    pieces = [piece if len(piece) < 256 else b"" for piece in pieces]  # spelled with shorter ones
    if not {bytes([byte]) for byte in range(256)} <= set(pieces):
        raise common.UserError(f"{reader.name} has no token for some byte: it can receive, but not send")
    return pieces


def byte_letters() -> dict[int, str]:
    """byte -> the letter that stands for it in the tokens of a byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Codec:
    """Text <-> message. Made from a wire's tensors alone: those of the sender, encoder and codebook of receiver 0."""

    def __init__(self, tensors: dict[str, Tensor], without: str | None, device: torch.device):
        own = {name.removeprefix("sender."): t for name, t in tensors.items() if name.startswith("sender.")}
        self.device, self.keys = device, tensors["receiver0.adapter.keys"].to(device)
        self.encoder = stage2.Encoder(self.keys.shape[1]).to(device).eval()
        common.load_module(self.encoder, "receiver0.encoder.", tensors, "the wire")
        at, self.pieces, spelled = 0, [], own["spelled"].numpy().tobytes()
        for length in own["lengths"].tolist():
            self.pieces.append(spelled[at : at + length])
            at += length
        self.index = {piece: index for index, piece in enumerate(self.pieces) if piece}
        self.spells = torch.tensor([bool(piece) for piece in self.pieces], device=device)
        self.predictor, self.without = None, without
        digest = hashlib.sha256(repr(without).encode())
        if "predictor.embedding.weight" in own:
            predictor = {n.removeprefix("predictor."): t for n, t in own.items() if n.startswith("predictor.")}
            self.predictor = IntegerPredictor(predictor, without)
            for name in sorted(predictor):
                array = predictor[name].numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        digest.update(own["lengths"].numpy().tobytes() + spelled)
        self.fingerprint = digest.digest()[:2]  # of all that sender and receiver must share
        self.known: dict[bytes, str] = {}  # an evaluation sends and reads each text several times
        self.sent: dict[tuple[str, str], bytes] = {}
        self.costs: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def latents(self, texts: list[str]) -> list[list[int]]:
        """For each text the indices [M] of codes, whose pieces spell it. Raises UserError for text that is no text."""
        data = common.to_bytes(texts, self.device)
        real = data < 256
        line, real_line = stage2.end_to_end(data, real)
        logits, features = self.encoder(line)
        is_end = torch.zeros_like(real).masked_scatter(real, logits[real_line] > 0)
        is_end[torch.arange(len(data), device=data.device), real.sum(1) - 1] = True
        z = self.encoder.code(features[real_line][is_end[real]])  # [n,k]
        distance = self.keys.square().sum(1) - 2 * z @ self.keys.T  # [n,V], less what is the same for all
        nearest = distance.masked_fill(~self.spells, math.inf).argmin(1).tolist()
        lists, at = [], 0
        for text, ends in zip(texts, is_end, strict=True):
            raw, ids, start = text.encode(), [], 0
            for end in (ends.nonzero()[:, 0] + 1).tolist():
                piece = raw[start:end]
                index = nearest[at] if self.pieces[nearest[at]] == piece else self.index.get(piece)
                ids += [index] if index is not None else [self.index[bytes([byte])] for byte in piece]
                at, start = at + 1, end
            lists.append(ids)
        return lists

    def intervals(self, ids: list[int]) -> list[tuple[int, int, int]]:
        """What the predictor gives each latent: the interval [start, end) of a total."""
        contexts, copies, seen = features(ids, len(self.pieces), self.without)
        intervals = []
        for at in range(0, len(ids), 512):
            part = slice(at, at + 512)
            ends = self.predictor.frequencies(contexts[part], copies[part], seen[part]).cumsum(1)
            for row, index in zip(ends, ids[part], strict=True):
                intervals.append((int(row[index - 1]) if index else 0, int(row[index]), int(row[-1])))
        return intervals

    def surprisal(self, text: str) -> np.ndarray:
        """What each byte of a text costs in a message, in nats [N]: a latent's cost, shared by the bytes it spells."""
        if text in self.costs:
            return self.costs[text]
        ids = self.latents([text])[0] if text else []
        lengths = np.array([len(self.pieces[index]) for index in ids], dtype=int)
        nats = np.array([math.log(total / (end - start)) for start, end, total in self.intervals(ids)])
        if len(self.costs) >= 4096:
            self.costs.clear()
        self.costs[text] = np.repeat(nats / lengths, lengths)
        return self.costs[text]

    def send(self, text: str, carries: str) -> bytes:
        """Text -> message. Raises UserError for half a surrogate pair and for more than MAX_TEXT bytes."""
        if len(text) > MAX_TEXT or len(text.encode(errors="replace")) > MAX_TEXT:
            raise common.UserError(f"the text is longer than the {MAX_TEXT} bytes that a message may hold: cut it")
        if (text, carries) in self.sent:
            return self.sent[text, carries]
        ids = self.latents([text])[0] if text else []
        deflated = pack(Message(carries, 0, zlib.compress(text.encode(), 9)), self.fingerprint)
        coded = pack(Message(carries, len(ids), to_bits(self.intervals(ids))), self.fingerprint) if ids else deflated
        if len(self.sent) >= 4096:
            self.sent.clear()
        self.sent[text, carries] = min(coded, deflated, key=len)
        return self.sent[text, carries]

    def text(self, data: bytes) -> tuple[str, str]:
        """(text, what travels) of a message. Raises UserError for whatever is not a whole message of this wire."""
        message = unpack(data, self.fingerprint)
        if data in self.known:
            return self.known[data], message.carries
        if message.latents == 0:
            inflate = zlib.decompressobj()
            try:
                raw = inflate.decompress(message.payload, MAX_TEXT + 1)
            except zlib.error:
                raise BROKEN from None
            if not inflate.eof or inflate.unused_data:
                raise BROKEN
        else:
            raw = self.decode(message)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise BROKEN from None
        if len(raw) > MAX_TEXT:
            raise BROKEN
        if len(self.known) >= 4096:
            self.known.clear()
        self.known[data] = text
        return text, message.carries

    def decode(self, message: Message) -> bytes:
        history, bits = History(len(self.pieces), self.without), FromBits(message.payload)
        seen, parts, size = np.zeros((1, len(self.pieces)), bool), [], 0
        for _ in range(message.latents):
            context, copy = history.features()
            ends = self.predictor.frequencies(np.array([context]), np.array([copy]), seen)[0].cumsum()
            index = bits.next(ends)
            size += len(self.pieces[index])
            # 64 bits beyond its end there is nothing left that a sender may have meant
            if not self.pieces[index] or size > MAX_TEXT or bits.read > 8 * len(message.payload) + 64:
                raise BROKEN
            parts.append(self.pieces[index])
            history.add(index)
            seen[0, index] = self.without != "copies"
        return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# a receiver: message -> embeddings of its LLM


def plain(prompt: common.Prompt) -> str:
    """A prompt without the chat template of an LLM, which is its receiver's business; or a window of text."""
    if prompt.question is None:
        return prompt.text
    return common.PROMPT.format(context=prompt.context, question=prompt.question)


class Wire:
    """One sender and one of its receivers, as `common.evaluate` wants them.

    Where a context travels, the receiver has the question as text: what it gets is the message and, behind it, that.
    """

    def __init__(self, codec: Codec, receiver: stage2.Wire, carries: str):
        self.codec, self.receiver, self.carries = codec, receiver, carries

    def send(self, prompt: common.Prompt) -> bytes:
        if self.carries == "prompt":
            return self.codec.send(plain(prompt), "prompt")
        message = self.codec.send(prompt.context, "context")
        return struct.pack("<I", len(message)) + message + prompt.question.encode()

    def receive(self, received: bytes) -> Tensor:
        """Message, and question behind it -> embeddings [L,d]."""
        if self.carries == "prompt":
            return self.embeddings(received, None)
        (size,) = struct.unpack_from("<I", received)
        return self.embeddings(received[4 : 4 + size], received[4 + size :].decode())

    def embeddings(self, message: bytes, question: str | None) -> Tensor:
        """Message [bytes], and the question where a context travels -> [L,d]. Raises UserError."""
        text, carries = self.codec.text(message)
        if (question is None) != (carries == "prompt"):
            held = "a whole prompt: give no --question" if carries == "prompt" else "a context: give a --question"
            raise common.UserError(f"the message holds {held}")
        if question is not None:
            text = common.PROMPT.format(context=text, question=question)
        text = common.as_prompt(self.receiver.reader, text)
        return self.receiver.receive(self.receiver.send(common.Prompt(text, [], False)))


# ---------------------------------------------------------------------------------------------------------------------
# a direct receiver: its LLM reads one position where a context has several tokens


class Pooler(nn.Module):
    """Embeddings of a context -> what the LLM reads at the positions that stay. Untrained, the others are just gone."""

    WIDTH, KERNEL, LAYERS = 128, 5, 4

    def __init__(self, d: int, rms: float):
        super().__init__()
        C = self.WIDTH
        self.rms = rms  # of the LLM's embeddings
        self.inner = nn.Linear(d, C)
        self.stays = nn.Embedding(2, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(self.LAYERS))
        self.convolutions = nn.ModuleList(nn.Conv1d(C, 2 * C, self.KERNEL, padding="same") for _ in range(self.LAYERS))
        self.out = nn.Linear(C, d)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, embeddings: Tensor, stays: Tensor, real: Tensor) -> Tensor:
        """embeddings [B,T,d]; stays [B,T] bool; real [B,T] bool, False on padding. Returns [B,T,d]."""
        x = (self.inner(embeddings / self.rms) + self.stays(stays.long())) * real[..., None]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution((norm(x) * real[..., None]).transpose(1, 2)).transpose(1, 2)
            x = x + F.glu(y, -1) * real[..., None]
        return embeddings + self.rms * self.out(x)


@dataclass
class Reading:
    """A prompt as an unpacking receiver reads it, and what a direct one must know of it."""

    embeddings: Tensor  # [L,d]
    first: int  # token of the context
    last: int  # and the first behind it
    nats: Tensor  # [last-first] what each token of the context costs in a message

    def stays(self, rate: float) -> Tensor:
        """Bool [last-first]: positions go where the bits went. The most surprising token of every `rate` stays."""
        chosen = torch.zeros(len(self.nats), dtype=torch.bool)
        order = self.nats.argsort(descending=True, stable=True)
        chosen[order[: math.ceil(len(order) / rate)]] = True
        return chosen.to(self.embeddings.device)


class DirectWire(Wire):
    """A receiver whose LLM reads ceil(n / rate) positions where the context has n tokens, and the question as text."""

    def __init__(self, codec: Codec, receiver: stage2.Wire, pooler: Pooler, rate: float):
        super().__init__(codec, receiver, "context")
        self.pooler, self.rate = pooler, rate

    @torch.no_grad()
    def read(self, context: str, question: str) -> Reading:
        """What unpacking gives: the embeddings of the prompt, and which of them are the context's."""
        receiver = self.receiver
        text = common.as_prompt(receiver.reader, common.PROMPT.format(context=context, question=question))
        at = max(0, text.find(common.PROMPT.split("{question}")[0].format(context=context)))
        spell = receiver.reader.spelling.spell
        begin, end = (len(spell(part).encode()) if part else 0 for part in (text[:at], text[: at + len(context)]))
        ends, codes = receiver.segment(spell(text))
        room, prefix = receiver.reader.prompt_tokens - len(receiver.prefix_codes), receiver.prefix_codes
        ends, codes = ends[-room:].cpu().numpy(), codes[-room:]
        embeddings = receiver.adapter(torch.cat([prefix, codes]).half().float(), receiver.constant_rms)
        first, last = np.searchsorted(ends, (begin, end), side="right")  # tokens that end within the context
        total = np.concatenate([[0.0], self.codec.surprisal(context).cumsum()])
        places = np.clip(np.concatenate([[begin], ends[first:last]]) - begin, 0, len(total) - 1)
        nats = torch.from_numpy(np.diff(total[places]).astype(np.float32))
        return Reading(embeddings, len(prefix) + int(first), len(prefix) + int(last), nats)

    def shorten(self, readings: list[Reading], rates: list[float]) -> tuple[list[Tensor], list[Tensor]]:
        """For each prompt: (embeddings [L',d], which of its L positions they stand at [L'])."""
        pad = nn.utils.rnn.pad_sequence
        stays = [reading.stays(rate) for reading, rate in zip(readings, rates, strict=True)]
        contexts = [reading.embeddings[reading.first : reading.last] for reading in readings]
        real = pad([torch.ones_like(part) for part in stays], batch_first=True)
        pooled = pad(contexts, batch_first=True)
        if pooled.shape[1]:  # not every context is empty
            pooled = self.pooler(pooled, pad(stays, batch_first=True), real)
        parts, places = [], []
        for reading, chosen, new in zip(readings, stays, pooled, strict=True):
            e, first, last = reading.embeddings, reading.first, reading.last
            parts.append(torch.cat([e[:first], new[: len(chosen)][chosen], e[last:]]))
            every = torch.ones(len(e), dtype=torch.bool, device=e.device)
            every[first:last] = chosen
            places.append(every.nonzero()[:, 0])
        return parts, places

    @torch.no_grad()
    def embeddings(self, message: bytes, question: str | None) -> Tensor:
        """Message [bytes] and question -> [L',d]. Raises UserError."""
        text, carries = self.codec.text(message)
        if carries == "prompt" or question is None:
            raise common.UserError("a direct receiver needs a message with a context, and a --question")
        reading = self.read(text, question)
        if reading.first == reading.last:
            return reading.embeddings
        return self.shorten([reading], [self.rate])[0][0]


def direct_losses(
    wire: DirectWire, rows: list[dict], rates: list[float], micro_batch_size: int
) -> Iterator[list[Tensor]]:
    """For each micro-batch [cross-entropy of the answer, KL from the teacher, error of the LLM's states]; scalars.

    The teacher is the same LLM behind the unpacking receiver, which reads every token. So the targets are known: at
    every layer, the states where a token stays, and behind the context, are the teacher's at that token. The error is
    |mine - theirs|^2 / |theirs|^2, its mean over layers and positions. All three by the number in the whole step.
    """
    reader = wire.receiver.reader
    prompts = [common.sent_prompt(reader, row) for row in rows]
    readings = [wire.read(prompt.context, prompt.question) for prompt in prompts]
    batches = [slice(at, at + micro_batch_size) for at in range(0, len(rows), micro_batch_size)]
    targets = positions = 0
    for part in batches:
        batch = common.make_batch(reader, rows[part])
        targets += int((batch.labels != common.IGNORE).sum())
        positions += int(batch.attention.sum() - batch.sent.sum())
    for reading, rate in zip(readings, rates, strict=True):
        positions += math.ceil(len(reading.nats) / rate) + len(reading.embeddings) - reading.last
    for part in common.own_share(batches):  # all of them, unless torchrun started several processes
        batch = common.make_batch(reader, rows[part])
        shorter, places = wire.shorten(readings[part], rates[part])
        with torch.no_grad():
            whole, embeddings = common.splice(reader, batch, [reading.embeddings for reading in readings[part]])
            taught, theirs = common.answer_logits(reader, whole, embeddings, states=True)
        spliced, embeddings = common.splice(reader, batch, shorter)
        logits, mine = common.answer_logits(reader, spliced, embeddings, states=True)
        labels = spliced.labels[spliced.labels != common.IGNORE]
        ce = F.cross_entropy(logits, labels, reduction="sum")
        kl = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="sum")
        at = torch.zeros_like(spliced.attention, dtype=torch.bool)  # [B,L'] whose states have a target
        there = torch.zeros_like(whole.attention, dtype=torch.bool)  # [B,L] where it is
        for i, (reading, place) in enumerate(zip(readings[part], places, strict=True)):
            answer = torch.arange(len(reading.embeddings), int(whole.attention[i].sum()), device=place.device)
            place = torch.cat([place, answer])
            at[i, reading.first : len(place)] = True
            there[i, place[reading.first :]] = True
        error = torch.zeros((), device=at.device)
        for x, y in zip(mine, theirs, strict=True):
            x, y = x[at].float(), y[there].float()
            error = error + ((x - y).square().sum(1) / y.square().sum(1)).sum() / len(mine)
        yield [ce / targets, kl / targets, error / positions]


def load_pooler(pooler: Pooler, tensors: dict[str, Tensor], entry: dict, wire: str) -> None:
    """The trained weights of a direct receiver. Raises UserError."""
    if "direct" not in entry:
        raise common.UserError(f"{wire} has no direct receiver for {entry['model']}: train one with --receiver direct")
    common.load_module(pooler, entry["prefix"] + "pooler.", tensors, wire)


def load_receiver(tensors: dict[str, Tensor], entry: dict, reader: common.Reader, wire: str) -> stage2.Wire:
    """The stage-2 wire that is in a stage-3 wire under a prefix, for a reader. Raises UserError."""
    own = {n.removeprefix(entry["prefix"]): t for n, t in tensors.items() if n.startswith(entry["prefix"])}
    vocabulary, d = reader.table.shape
    mean, components = own["mean"].to(reader.device), own["components"].to(reader.device)
    table_codes = stage2.project(reader.table, mean, components).to(torch.float16).float()
    pca, ones = common.PCA(mean, components, torch.ones(d)), torch.ones(vocabulary, device=reader.device)
    adapter = Adapter(entry["adapter"], pca, reader, table_codes, ones).to(reader.device)
    encoder = stage2.Encoder(entry["code_dim"]).to(reader.device).eval()
    common.load_module(adapter, "adapter.", own, wire)
    common.load_module(encoder, "encoder.", own, wire)
    prefix_codes, rms = own["prefix_codes"].to(reader.device), own["target_rms"].to(reader.device)
    return stage2.Wire(reader, encoder, adapter, prefix_codes, rms)


def spelling_tensors(pieces: list[bytes]) -> dict[str, Tensor]:
    """What each code spells, end to end, and the lengths."""
    spelled = np.frombuffer(b"".join(pieces), np.uint8).copy()
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.uint8)
    return {"sender.spelled": torch.from_numpy(spelled), "sender.lengths": lengths}


def send_once(args) -> None:
    """--send: text or file -> message on standard output."""
    tensors, config = common.load_wire(args.wire or str(common.HERE / SHIPPED), STAGE, ("without",), NEEDED)
    text, path = args.send, Path(args.send)
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise common.UserError(f"--send {args.send}: the file is not UTF-8") from None
    except (OSError, ValueError):
        pass  # too long a name, or a zero in it: a text
    if not text.strip():
        raise common.UserError(f"--send {args.send!r}: there is no text to send")
    if args.wire_carries != "context":
        if not args.question:
            raise common.UserError("--send of a whole prompt needs a --question; or --wire-carries context without one")
        text = common.PROMPT.format(context=text, question=args.question)
    elif args.question:
        raise common.UserError("--wire-carries context leaves the question to the receiver: drop --question")
    codec = Codec(tensors, config["without"], torch.device("cpu"))
    sys.stdout.buffer.write(codec.send(text, args.wire_carries or "prompt"))
    sys.stdout.buffer.flush()


def receive_once(args) -> None:
    """--receive: message -> what the LLM answers."""
    name = args.wire or str(common.HERE / SHIPPED)
    tensors, config = common.load_wire(name, STAGE, ("without", "receivers"), NEEDED)
    if args.receive == "-":
        message = sys.stdin.buffer.read(2 * MAX_TEXT)
    else:
        with open(args.receive, "rb") as file:
            message = file.read(2 * MAX_TEXT)  # more than any message
    codec = Codec(tensors, config["without"], torch.device("cpu"))
    codec.text(message)  # refused before an LLM is loaded
    device, _ = common.pick_device(args.device)
    dtype, _ = common.pick_dtype(args.dtype, device)
    reader = common.load_reader(args.model or config["model"], device, dtype, split=args.device == "split")
    entry = entry_of(config["receivers"], reader, name)
    receiver = load_receiver(tensors, entry, reader, name)
    wire = Wire(codec, receiver, codec.text(message)[1])
    if args.receiver == "direct":
        pooler = Pooler(reader.table.shape[1], receiver.constant_rms.item()).to(device)
        load_pooler(pooler, tensors, entry, name)
        wire = DirectWire(codec, receiver, pooler, args.rate)
    print(common.generate(reader, [message], 1, lambda data: wire.embeddings(data, args.question))[0])


def add_receivers(names: list[str], tensors: dict[str, Tensor], receivers: list[dict]) -> tuple[list[dict], list[str]]:
    """Add trained stage-2 wires to `tensors` and `receivers`. Returns (their entries, sha256 of each). UserError."""
    new, digests = [], []
    for name in names:
        where = common.HERE / name if name in STAGE2 else Path(name)
        needed = ("mean", "components", "prefix_codes", "target_rms")
        own, config = common.load_wire(str(where), "stage2", ("adapter", "code_dim"), needed)
        digests.append(hashlib.sha256((where / "wire.safetensors").read_bytes()).hexdigest())
        if any(entry["fingerprint"] == config["fingerprint"] for entry in receivers):
            raise common.UserError(f"--stage2 {name}: there is a receiver for {config['model']} already")
        entry = {key: config[key] for key in ("model", "fingerprint", "adapter", "code_dim")}
        new.append(entry | {"prefix": f"receiver{len(receivers)}.", "stage2": name})
        receivers.append(new[-1])
        tensors |= {new[-1]["prefix"] + part: tensor for part, tensor in own.items()}
    return new, digests


def entry_of(receivers: list[dict], reader: common.Reader, wire: str) -> dict:
    """The receiver that is for this LLM. Raises UserError."""
    for entry in receivers:
        if entry["fingerprint"] == reader.fingerprint:
            return entry
    names = ", ".join(entry["model"] for entry in receivers)
    raise common.UserError(f"{wire} has no receiver for {reader.name}, only for {names}: train a stage-2 wire for it")


def index_losses(
    predictor: Predictor, lists: list[list[int]], without: str | None, micro_batch_size: int
) -> Iterator[list[Tensor]]:
    """For each micro-batch [cross-entropy (scalar, nats) of the index that comes next, by the step's positions]."""
    device, positions = predictor.embedding.weight.device, sum(map(len, lists))
    batches = [lists[at : at + micro_batch_size] for at in range(0, len(lists), micro_batch_size)]
    for part in common.own_share(batches):  # all of them, unless torchrun started several processes
        seen = [features(ids, predictor.vocabulary, without) for ids in part]
        inputs = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*seen, strict=True))
        targets = torch.tensor([index for ids in part for index in ids], device=device)
        yield [F.cross_entropy(predictor(*inputs), targets, reduction="sum") / positions]


@torch.inference_mode()
def prefill_cost(wire: Wire, messages: list[bytes], questions: list[str]) -> dict[str, float]:
    """What the LLM does and keeps before its first token; means over messages, one at a time.

    FLOPs (the pooler's too), bytes of keys and values, and milliseconds (median) from an unpacked text to that token.
    """
    model, dtype = wire.receiver.reader.model, wire.receiver.reader.dtype

    def first_token(message: bytes, question: str):
        embeddings = wire.embeddings(message, question)
        output = model(inputs_embeds=embeddings[None].to(dtype), use_cache=True, logits_to_keep=1)
        return len(embeddings), output.logits[0, -1].argmax().item(), output.past_key_values

    flops = kept = positions = 0
    seconds = []
    for message, question in zip(messages, questions, strict=True):
        wire.codec.text(message)  # from here on it is unpacked
        with FlopCounterMode(display=False) as counter:
            length, _, cache = first_token(message, question)
        flops, positions = flops + counter.get_total_flops(), positions + length
        kept += sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        started = time.perf_counter()
        first_token(message, question)
        seconds.append(time.perf_counter() - started)
    n = len(messages)
    return {"positions": positions / n, "flops": flops / n, "kv_bytes": kept / n, "ms": 1e3 * float(np.median(seconds))}


@torch.inference_mode()
def bytes_of_nll(reader: common.Reader, id_lists: list[list[int]], batch_size: int) -> float:
    """Mean bytes that an arithmetic coder would need with this LLM's own prediction of its tokens."""
    rows = [{"ids": ids} for ids in id_lists]
    nats = common.mean_nll(reader, rows, batch_size, None, None) * sum(len(ids) - 1 for ids in id_lists)
    return nats / math.log(2) / 8 / len(rows)


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, stage-2 wires, frozen LLMs, data
    args = parse_arguments()
    if args.send is not None:
        return send_once(args)
    if args.receive is not None:
        return receive_once(args)
    saved_tensors, saved_config = {}, None
    direct = args.receiver == "direct"
    base = args.eval_only or (args.wire or str(common.HERE / SHIPPED) if direct else None)  # a trained stage-3 wire
    if base:
        config_keys = ("receivers", *DEFAULTS, "arguments.seed", "metrics.train_seconds")
        saved_tensors, saved_config = common.load_wire(base, STAGE, config_keys, NEEDED)
    joining = args.stage2 if args.eval_only and args.stage2 else []  # receivers that join a trained wire
    args.stage2 = None if args.eval_only else args.stage2
    common.settle_arguments(args, DEFAULTS, saved_config)
    args.wire_carries = args.wire_carries or "prompt"
    if args.eval_only:
        args.seed = saved_config["arguments"]["seed"]
    device, device_reason = common.pick_device(args.device)
    split = args.device == "split"
    common.seed_everything(args.seed, device)
    dtype, dtype_reason = common.pick_dtype(args.dtype, device)
    print(
        f"device {device.type} ({device_reason}), dtype {str(dtype).removeprefix('torch.')} ({dtype_reason})",
        flush=True,
    )
    tensors, receivers = dict(saved_tensors), list(saved_config["receivers"]) if saved_config else []
    if base:
        new, _ = add_receivers(joining, tensors, receivers)
        args.stage2 += joining
        names = [args.model] if args.model else [entry["model"] for entry in new or receivers]
        if direct:  # one LLM at a time; the sender's own, or the only one that has been trained
            able = [entry["model"] for entry in receivers if "direct" in entry]
            names = [args.model or (able[0] if args.eval_only and able else receivers[0]["model"])]
        readers = [common.load_reader(name, device, dtype, args.gradient_checkpointing, split) for name in names]
        chosen = [entry_of(receivers, reader, base) for reader in readers]
        stage2_sha256 = hashlib.sha256((Path(base) / "wire.safetensors").read_bytes()).hexdigest()  # what it stands on
    else:
        chosen, stage2_sha256 = add_receivers(args.stage2, tensors, receivers)
        readers = [common.load_reader(entry["model"], device, dtype, split=split) for entry in receivers]
        for entry, reader in zip(receivers, readers, strict=True):
            common.check_fingerprint(reader, entry, entry["stage2"])
        if receivers[0]["adapter"] != "codebook":
            raise common.UserError(
                f"{args.stage2[0]} has a {receivers[0]['adapter']} adapter: a sender needs a codebook"
            )
        tensors |= spelling_tensors(pieces_of(readers[0]))
        if args.model:  # one receiver is measured; what is trained does not depend on it
            chosen = [entry_of(receivers, common.load_reader(args.model, device, dtype, split=split), "--stage2")]
    datas = [common.load_data(args.data, reader, args.eval_examples) for reader in readers]
    for reader, data in zip(readers, datas, strict=True):
        common.check_questions(reader, data)
        if data.kind == "text":
            if args.wire_carries == "context":
                instead = "a direct receiver" if direct else "use --wire-carries prompt, not context"
                raise common.UserError(f"--data {args.data}: plain text has no questions for {instead}")
            data.train, data.validation, data.test = (
                stage2.halve(reader, part) for part in (data.train, data.validation, data.test)
            )
            if not data.train or not data.test:
                raise common.UserError(f"--data {args.data}: no window's first half is text by itself")
        for row in data.test:
            size = len(plain(common.sent_prompt(reader, row)).encode())
            if size > MAX_TEXT:
                raise common.UserError(
                    f"--data {args.data}: a prompt has {size} bytes, and a message holds {MAX_TEXT}: cut the passages"
                )
    aside = ("out", "resume", "eval_only", "send", "receive", "wire", "question")
    run_arguments = {key: value for key, value in vars(args).items() if key not in aside}
    checkpoint_path = Path(args.out) / "checkpoint.safetensors"
    resumed = None
    if args.resume:
        resumed = common.load_checkpoint(checkpoint_path, run_arguments, readers[0].fingerprint)
        if resumed["stage2_sha256"] != stage2_sha256:
            raise common.UserError(
                f"--resume: {checkpoint_path} was made from other wires than --stage2 names now; start without --resume"
            )
    for reader in readers:
        print(f"receiver {reader.name}: V {len(reader.table)}, fingerprint {reader.fingerprint}", flush=True)
    size = "unlimited" if datas[0].train is None else len(datas[0].train)
    print(f"data {args.data} ({datas[0].kind}): {size} training rows, {len(datas[0].test)} test rows", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # model: the sender's encoder and codebook, proven by stage 2, and the predictor of its indices
    codec = Codec(tensors, args.without, device)
    vocabulary = len(codec.pieces)
    predictor = Predictor(vocabulary).to(device)
    trained, what = predictor, "predictor"
    if direct:
        receiver = load_receiver(tensors, chosen[0], readers[0], base)
        d = readers[0].table.shape[1]
        pooler = Pooler(d, receiver.constant_rms.item()).to(device)
        direct_wire = DirectWire(codec, receiver, pooler, args.rate)
        trained, what = pooler, "pooler"
        goes_on = "direct" in chosen[0]  # the wire has a pooler for this LLM: it is trained further
        if args.eval_only or goes_on:
            load_pooler(pooler, tensors, chosen[0], base)
    out = common.open_out(args.out)
    print(f"{what}: {sum(p.numel() for p in trained.parameters()):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    history: list[dict] = []
    steps = 0 if args.eval_only else args.steps
    step, train_seconds = 0, 0.0
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    if resumed:
        trained.load_state_dict(resumed["trained"])
        optimizer.load_state_dict(resumed["optimizer"])
        step, train_seconds, history = resumed["step"], resumed["train_seconds"], resumed["history"]
        print(f"resumed at step {step}", flush=True)
    else:
        checkpoint_path.unlink(missing_ok=True)  # of an older run: this one must not be taken for it
    common.write_jsonl(out / "metrics.jsonl", history)
    progress = common.Progress(steps, step)
    guard, started = common.Guard(steps, resumed), time.perf_counter() - train_seconds
    while step < steps:
        # warm-up over 5% of the steps, then linearly to zero
        scale = min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        rows = datas[0].train_rows(args.seed, step * args.batch_size, args.batch_size)
        rng = random.Random(f"{args.seed}-{step}")
        if direct:
            # every rate between 1 and the highest, which comes to --rate in the first third of a first training
            top = 1 + (args.rate - 1) * (1.0 if goes_on else min(1.0, 0.1 + 3 * step / steps))
            losses = direct_losses(direct_wire, rows, [rng.uniform(1, top) for _ in rows], args.micro_batch_size)
        else:
            texts = [plain(common.sent_prompt(readers[0], row)) for row in rows]
            # one text in eight is one that no prompt would hold, so that such a text is not much larger than it was
            texts = [stage2.odd_text(rng, text, readers[0]) if i % 8 == 7 else text for i, text in enumerate(texts)]
            losses = index_losses(predictor, codec.latents(texts), args.without, args.micro_batch_size)
        parts = 0.0
        kept = {"states": 2, "teacher": 1}.get(args.untaught, 3)  # the losses that are learned from
        for share in losses:  # of a micro-batch each; the step's loss is their sum
            total = sum(share[:kept])
            if total.requires_grad:  # else no row has a context
                total.backward()
            parts = parts + torch.stack(share).detach()
        parts = common.add_up(trained.parameters(), parts.tolist())
        loss = sum(parts[:kept])
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        if guard.accepts(loss, norm.item(), step + 1):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        train_seconds = time.perf_counter() - started
        if step % 10 == 0 or step in (1, steps):
            named = zip(("answer", "kl", "states") if direct else ("index",), parts, strict=True)
            losses = {f"loss_{name}": value for name, value in named}
            history.append(common.rounded({"step": step, "lr": args.lr * scale} | losses))
            common.append_jsonl(out / "metrics.jsonl", history[-1] | {"seconds": round(train_seconds, 1)})
        progress.show(step, f"loss {loss:.3f}" if direct else f"nats a latent {loss:.3f}")
        if guard.due(step):
            common.save_checkpoint(
                checkpoint_path,
                {
                    "trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                    "train_seconds": train_seconds, "history": history, "arguments": run_arguments,
                    "fingerprint": readers[0].fingerprint, "stage2_sha256": stage2_sha256, "guard": guard.state(),
                },
            )  # fmt: skip
            guard.saved(step)
    guard.close()
    if direct and not args.eval_only:
        state = {f"{chosen[0]['prefix']}pooler.{name}": t.detach().cpu() for name, t in pooler.state_dict().items()}
        tensors |= state
        chosen[0]["direct"] = {"rate": args.rate, "steps": args.steps, "train_seconds": train_seconds}
    elif not args.eval_only:
        whole = IntegerPredictor.tensors(predictor)
        tensors |= {f"sender.predictor.{name}": tensor for name, tensor in whole.items()}
        codec = Codec(tensors, args.without, device)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: each receiver from the same messages, on test passages whose names were never seen
    results = []
    for reader, data in reversed(list(zip(readers, datas, strict=True))):  # the sender's own LLM is the last line
        entry = entry_of(receivers, reader, base or "--stage2")
        if entry not in chosen:
            continue
        print(f"evaluating {reader.name} on {len(data.test)} test rows, the wire carries the {args.wire_carries}")
        eval_started = time.perf_counter()
        batch_size = 2 * args.micro_batch_size
        receiver = load_receiver(tensors, entry, reader, base or entry["stage2"])
        unpacking = Wire(codec, receiver, args.wire_carries)
        wire = direct_wire if direct else unpacking
        metrics, records = common.evaluate(reader, data, batch_size, wire.send, wire.receive)
        prompts = [common.sent_prompt(reader, row) for row in data.test]
        texts = [prompt.context if args.wire_carries == "context" else plain(prompt) for prompt in prompts]
        sent = common.spread(lambda text: codec.send(text, args.wire_carries), texts)
        if args.wire_carries == "context":  # common.evaluate has counted prompts, and turned answers, not messages
            id_lists = [reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
            metrics |= common.byte_baselines(reader, texts, id_lists)
            metrics["wire_bytes"] = sum(map(len, sent)) / len(sent)
            others = sent[1:] + sent[:1]
            swapped = [
                struct.pack("<I", len(other)) + other + prompt.question.encode()
                for other, prompt in zip(others, prompts, strict=True)
            ]
            answers = common.generate(reader, swapped, batch_size, wire.receive) if len(sent) > 1 else []
            metrics["shuffled_f1"] = common.score(answers, data.test)[0] if answers else None
        known = "".join(plain(common.sent_prompt(reader, row)) for row in data.train_rows(args.seed, 0, 200))
        known = known.encode()[-32768:]
        deflated = 0
        for text in texts:
            deflate = zlib.compressobj(9, zdict=known)
            deflated += len(deflate.compress(text.encode()) + deflate.flush())
        truncated = []  # the baseline that is always there: send less of the text
        for share in (0.25, 0.5, 0.75) if data.kind == "qa" else ():
            cut = [
                common.truncated_prompt(reader, row, math.ceil(share * len(prompt.ids)))
                for row, prompt in zip(data.test, prompts, strict=True)
            ]
            answers = common.generate(reader, [prompt.ids for prompt in cut], batch_size)
            sizes = [(len(prompt.text.encode()), len(prompt.ids)) for prompt in cut]
            mean_bytes, mean_tokens = (sum(size) / len(cut) for size in zip(*sizes, strict=True))
            f1, _ = common.score(answers, data.test)
            truncated.append({"share": share, "bytes": mean_bytes, "positions": mean_tokens, "f1": f1})
        arrived = common.spread(lambda data: codec.text(data)[0], sent)
        controls = {
            "truncated": truncated,
            "arrived": sum(text == read for text, read in zip(texts, arrived, strict=True)),
            "latents": sum(unpack(message, codec.fingerprint).latents for message in sent) / len(texts),
            "stored": sum(message[2] >> 6 & 1 for message in sent),
            "zlib_dictionary_bytes": deflated / len(texts),
            "llm_bound_bytes": bytes_of_nll(reader, [prompt.ids for prompt in prompts], batch_size),
        }
        if direct:
            pairs = sent[:100], [prompt.question for prompt in prompts[:100]]
            controls["prefill"] = {"direct": prefill_cost(wire, *pairs), "unpack": prefill_cost(unpacking, *pairs)}
            controls["context_tokens"] = sum(len(ids) for ids in id_lists) / len(id_lists)
        made = {"steps": args.steps, "train_seconds": train_seconds}
        if args.eval_only:
            made = entry["direct"] if direct else saved_config["arguments"] | saved_config["metrics"]
        metrics |= {
            "stage": STAGE, "model": entry["model"], "data": args.data, "seed": args.seed,
            "steps": made["steps"], "train_seconds": made["train_seconds"],
            "eval_seconds": time.perf_counter() - eval_started, "device": device.type,
            "dtype": str(dtype).removeprefix("torch."), "versions": common.versions(), "commit": common.commit(),
        }  # fmt: skip
        results.append((entry, common.rounded(metrics), common.rounded(controls), records))
    for entry, metrics, controls, records in results:
        extra = [
            ("texts that arrive bit for bit", f"{controls['arrived']}", f"of {metrics['examples']}"),
            ("latents", f"{controls['latents']:.1f}", f"{controls['stored']} messages deflated, for it was shorter"),
            ("zlib -9, dictionary", f"{controls['zlib_dictionary_bytes']:.0f}", "bytes, with 32 KB of training text"),
            ("this LLM's own prediction", f"{controls['llm_bound_bytes']:.1f}", "bytes, of its prompt; no frame"),
        ]  # fmt: skip
        if direct:
            for what, key in (("FLOPs", "flops"), ("bytes of keys and values", "kv_bytes")):
                mine, theirs = (controls["prefill"][kind][key] for kind in ("direct", "unpack"))
                extra.append((f"prefill: {what}", f"{mine:.3g}", f"unpacked {theirs:.3g}"))
            mine, theirs = (controls["prefill"][kind]["ms"] for kind in ("direct", "unpack"))
            extra.append(("from text to first token", f"{mine:.1f}", f"ms; unpacked {theirs:.1f}"))
        last = entry is results[-1][0]
        config = {
            "stage": STAGE, "model": entry["model"], "fingerprint": entry["fingerprint"], "receivers": receivers,
            "stage2": args.stage2, "without": args.without, "wire_carries": args.wire_carries, "data": args.data,
            "receiver": args.receiver, "rate": args.rate, "untaught": args.untaught,
            "arguments": saved_config["arguments"] if args.eval_only else run_arguments,
            "metrics": metrics, "controls": controls,
            "others": [{"metrics": m, "controls": c} for _, m, c, _ in results[:-1]] if last else [],
        }  # fmt: skip
        place = out if last else common.open_out(str(out / Path(entry["model"]).name))
        title = f"stage 3: {args.wire_carries} -> {controls['latents']:.0f} latents"
        if direct:
            title += f", read at {args.rate:g} tokens a position"
        common.finish_run(place, tensors if last else None, config, history, records, extra, title)


if __name__ == "__main__":
    common.run(main)
