"""The sender: text <-> message, with no LLM. It needs the tensors of a trained stage-3 wire and numpy.

An arithmetic coder works only if sender and receiver agree, bit for bit, on every frequency. Floating-point results
differ between machines; sums of whole numbers do not. So the trained predictor is rounded to integers once, and both
sides use those.
"""

import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from plumbing.launch import UserError
from stage3.message import MAX_TEXT, Decoder, Message, broken, deflate, encode, inflate, pack, unpack

CONTEXT, ORDERS = 8, (4, 2, 1)  # indices that the predictor sees; how many must match for it to see what followed
SEES = CONTEXT + len(ORDERS)
MEMBERS = 64  # pieces of a group
MAX_LATENTS = 1 << 14  # of a message: a receiver needs a second for them. A text with more is deflated


class History:
    """What the predictor sees of the indices so far. Sender and receiver walk through the same ones."""

    def __init__(self, nothing: int):
        self.nothing, self.ids, self.followers, self.keys = nothing, [], {}, ()

    def sees(self) -> list[int]:
        """The last CONTEXT indices, the newest first, and those that followed the last 4, 2, 1 before; or `nothing`."""
        last = self.ids[: -CONTEXT - 1 : -1]
        last += [self.nothing] * (CONTEXT - len(last))
        self.keys = [tuple(last[:n]) for n in ORDERS]
        return last + [self.followers.get(key, self.nothing) for key in self.keys]

    def add(self, index: int) -> None:
        """The index that came behind what `sees` returned."""
        for key in self.keys:
            self.followers[key] = index
        self.ids.append(index)


class IntegerPredictor:
    """The predictor in fixed point: the same frequencies on every machine.

    Weights and activations are whole numbers of 2^-12. They are multiplied as float64, in which sums of whole numbers
    below 2^53 are exact in any order: 16 bits x 22 bits x 512 terms are 2^47.
    """

    ONE = 1 << 12

    def __init__(self, tensors: dict[str, np.ndarray]):
        """tensors: embedding.weight [V+1,W], hidden.weight [H,SEES*W], group.weight [groups+7,H], ..., in int16."""
        whole = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        H = len(tensors["hidden.bias"])
        self.embedding, first = whole["embedding.weight"], whole["hidden.weight"].reshape(H, SEES, -1)
        self.first = first.transpose(1, 0, 2).reshape(SEES * H, -1)
        # what an index adds to the hidden layer in each place: made when it first occurs, for a message has few of them
        self.table = np.zeros((len(self.embedding), SEES, H), np.int32)
        self.made = [False] * len(self.table)
        self.hidden_bias = tensors["hidden.bias"].astype(np.int32)
        self.group, self.group_bias = whole["group.weight"], whole["group.bias"] * self.ONE
        self.members = whole["members.weight"].reshape(-1, MEMBERS, H)
        self.members_bias = whole["members.bias"].reshape(-1, MEMBERS) * self.ONE
        self.groups, self.exponential = len(self.members), tensors["exponential"].astype(np.int64)
        if not 1 <= self.exponential.min() <= self.exponential.max() == self.exponential[0] <= 2**24:
            raise UserError("the wire's predictor.exponential is not a table of exp: it cannot send")
        self.places = np.arange(SEES)

    def ends(self, logits: np.ndarray) -> np.ndarray:
        """Cumulative frequencies, each at least 1, of logits in units of 2^-24 that a softmax would take."""
        steps = ((logits.max() - logits) * 2.0**-18).astype(np.int64)  # of 1/64 nat
        return self.exponential.take(steps, mode="clip").cumsum()

    def walk(self, sees: list[int], seen: np.ndarray) -> Iterator[np.ndarray]:
        """Yields cumulative frequencies of the groups [groups]; when it is sent one, those of its members [MEMBERS].

        sees: of `History`. seen: [groups, MEMBERS] 1 where a piece is in the message already.
        """
        for index in sees:
            if not self.made[index]:
                rows = np.rint(self.first @ self.embedding[index] / self.ONE)
                self.table[index], self.made[index] = rows.reshape(SEES, -1), True
        y = self.table[sees, self.places].sum(0) + self.hidden_bias
        h = y.clip(0, 1 << 22).astype(np.float64)
        logits = self.group @ h + self.group_bias
        groups, copies = logits[: self.groups], [divmod(index, MEMBERS) for index in sees[CONTEXT:]]
        extra = logits[self.groups :].tolist()  # what copies add to a group, to a piece; and what was seen
        for (group, _), more in zip(copies, extra, strict=False):
            if group < self.groups:
                groups[group] += more
        group = yield self.ends(groups)
        logits = self.members[group] @ h + self.members_bias[group] + extra[-1] * seen[group]
        for (other, member), more in zip(copies, extra[len(ORDERS) :], strict=False):
            if other == group:
                logits[member] += more
        yield self.ends(logits)


class Pieces:
    """What a latent can stand for: pieces of text, as bytes."""

    def __init__(self, tensors: dict):
        """tensors: of a wire. Raises UserError if they do not spell every byte."""
        at, spelled, self.pieces = 0, np.asarray(tensors["pieces.spelled"]).tobytes(), []
        for length in tensors["pieces.lengths"].tolist():
            self.pieces.append(spelled[at : at + length])
            at += length
        self.index = {piece: index for index, piece in enumerate(self.pieces) if piece}
        self.longest = max(map(len, self.pieces))
        if at != len(spelled) or not {bytes([byte]) for byte in range(256)} <= self.index.keys():
            raise UserError("the wire's pieces do not spell every byte: it cannot send")

    def split(self, raw: bytes) -> list[int]:
        """Indices [M] of the pieces that spell these bytes: always the longest that fits."""
        at, indices = 0, []
        while at < len(raw):
            size = next(n for n in range(min(self.longest, len(raw) - at), 0, -1) if raw[at : at + n] in self.index)
            indices.append(self.index[raw[at : at + size]])
            at += size
        return indices


class Sender(Pieces):
    """Text <-> message, from the tensors of a trained stage-3 wire."""

    def __init__(self, tensors: dict):
        """tensors: of a wire, in numpy or torch."""
        super().__init__(tensors)
        arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
        predictor = {n.removeprefix("predictor."): a for n, a in arrays.items() if n.startswith("predictor.")}
        self.predictor = IntegerPredictor(predictor)
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(arrays[name].astype(arrays[name].dtype.newbyteorder("<")).tobytes())
        self.fingerprint = digest.digest()[:8]  # of all that sender and receiver must share
        # an evaluation sends and reads each text several times
        self.send, self.text = functools.lru_cache(1024)(self.send), functools.lru_cache(1024)(self.text)

    def intervals(self, indices: list[int]) -> Iterator[tuple[int, int, int]]:
        """The interval [start, end) of a total that the predictor gives each index: two, of its group and in it."""
        history, seen = History(len(self.pieces)), np.zeros((self.predictor.groups, MEMBERS))
        for index in indices:
            place = divmod(index, MEMBERS)
            walk = self.predictor.walk(history.sees(), seen)
            for ends, at in ((next(walk), place[0]), (walk.send(place[0]), place[1])):
                yield (int(ends[at - 1]) if at else 0), int(ends[at]), int(ends[-1])
            history.add(index)
            seen[place] = 1

    def send(self, text: str, carries: str) -> bytes:
        """Text -> message. Raises UserError for half a surrogate pair and for more than MAX_TEXT bytes."""
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            raise UserError("the text holds half a surrogate pair, which is not Unicode text") from None
        if len(raw) > MAX_TEXT:
            raise UserError(f"the text is longer than the {MAX_TEXT} bytes that a message may hold: cut it")
        deflated = pack(Message(carries, 0, deflate(raw)), self.fingerprint)
        indices = self.split(raw)
        if not 0 < len(indices) <= MAX_LATENTS:
            return deflated
        coded = pack(Message(carries, len(indices), encode(self.intervals(indices))), self.fingerprint)
        return min(coded, deflated, key=len)

    def text(self, data: bytes) -> tuple[str, str]:
        """(text, what travels) of a message. Raises UserError for anything but a whole message of this wire."""
        message = unpack(data, self.fingerprint)
        raw = self.read(message) if message.latents else inflate(message.payload)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise broken() from None
        if len(raw) > MAX_TEXT:
            raise broken()
        return text, message.carries

    def read(self, message: Message) -> bytes:
        """The bytes that the latents of a message spell."""
        if message.latents > MAX_LATENTS:
            raise broken()
        bits, parts, size = Decoder(message.payload), [], 0
        history, seen = History(len(self.pieces)), np.zeros((self.predictor.groups, MEMBERS))
        for _ in range(message.latents):
            walk = self.predictor.walk(history.sees(), seen)
            group = bits.next(next(walk))
            member = bits.next(walk.send(group))
            piece = self.pieces[group * MEMBERS + member]
            size += len(piece)
            # a sender's latents end with the message: 16 bytes beyond its end, it is broken
            if not piece or size > MAX_TEXT or bits.read > len(message.payload) + 16:
                raise broken()
            parts.append(piece)
            history.add(group * MEMBERS + member)
            seen[group, member] = 1
        return b"".join(parts)
