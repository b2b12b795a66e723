"""Stage 3: the full pipeline. One message, a quarter of the text's bytes, and every LLM with a stage-2 wire reads it.

    text -> encoder -> index of each code [M] -> predictor, arithmetic coder -> message        the sender: no LLM
            stage 2    its codebook: known       learned: the next index

    message -> indices [M] -> text -> the encoder, codes [L,k] and adapter of this LLM -> frozen LLM       a receiver
                 bit-exact            stage 2: proven                                     the answer

A latent is the index of a code that stage 2 has proven: a number of twelve bits, most of them predictable from the
latents before it. So this stage learns to predict them, and the target is known: the index that comes next. An
arithmetic coder turns a prediction into bits, a likely index into few. The predictor looks at the last 8 indices, at
the index that followed when the last 4, 2 and 1 of them stood in this message before (names come back), and at which
indices the message has held at all. It is trained in floating point and used in integers, so that every machine
predicts the same.

A code whose token differs from the bytes it stands for is sent as those bytes. So any text arrives, bit for bit: two
receivers lose nothing against one, whatever their tokenizers, and a third joins without training the sender again.

A receiver may also read fewer positions than tokens (--receiver direct): see stage3/direct.py.

Tried with earlier readers, and lost: latents learned from scratch, fixed spans of 4 or 8 bytes in 4-bit numbers (a
fifth of the bytes wrong at 107 bytes a prompt, after 500 steps of 32); counts of pairs of indices instead of a
network (50 bytes a prompt, the network needs 30, and the frame is 10 more); a nearby code where that saves bits (F1
falls from 95 to 83 before a byte is saved: names cost most of the bytes, and questions ask for names).

    python stage3_full.py                                                   # both readers; README has the scores
    python stage3_full.py --eval-only tiny/wires/stage3 --model tiny-qwen   # the shipped wire, one receiver
    python stage3_full.py --send "Pergalan sells olive oil." --wire-carries context > message
    python stage3_full.py --receive message --model tiny-qwen --question "What does Pergalan sell?"

Letters: N bytes of a text, M latents of a message, V of the sender's codebook, n positions in a batch, L tokens of a
prompt, d LLM embedding width, k code width.
"""

import plumbing.early  # noqa: F401

# isort: split
import functools
import hashlib
import math
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    PROMPT,
    Prompt,
    Reader,
    as_prompt,
    check_prompts,
    generate,
    load_reader,
    sent_prompt,
    to_bytes,
)
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved, positive_float
from plumbing.data import Data, halve_windows, load_data
from plumbing.kinds import ANYTHING, FLAG, TEXT, Many, one_of
from plumbing.launch import UserError, launch, pick_device, pick_dtype, set_up
from plumbing.models import check_fingerprint
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.spelling import odd_text, pieces_of, words_of
from plumbing.training import Run, identity, micro_batches
from plumbing.wires import Contents, check_shapes, load_module, load_wire, open_out
from stage2_encoder import Encoder, pack_texts
from stage2_encoder import Wire as Stage2Wire
from stage3.evaluation import measure, message_rows
from stage3.message import (
    BROKEN,
    CARRIES,
    MAX_TEXT,
    FromBits,
    IntegerPredictor,
    Message,
    inflate,
    pack,
    split_question,
    to_bits,
    unpack,
    with_question,
)
from stage3.receivers import RECEIVER, add_receivers, entry_of, load_receiver, spelling_tensors

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage3"
CONFIG = dict(
    model="both readers",  # what is trained does not depend on it; --model NAME measures one receiver
    data="tiny",  # questions about invented passages; or squad, or a file
    steps=1200,  # 25 minutes with one thread, evaluation included
    batch_size=32,  # texts a step, one in eight of them odd
    lr=2e-3,  # peak
    stage2=["tiny/wires/stage2", "tiny/wires/stage2-qwen"],  # one wire a receiver; the first one's encoder sends
    without=None,  # an ablation: the part of the predictor that is left out
)
FIXED_BY_WIRE = ("data", "stage2", "without")  # --eval-only reads these from the wire
SHIPPED = "tiny/wires/stage3"
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01
CONTEXT, ORDERS = 8, (4, 2, 1)  # indices that the predictor sees; how many must match for it to see what followed
WIDTH, HIDDEN = 32, 256  # of an index's embedding; of the predictor's only hidden layer
ABLATIONS = ("copies", "context", "prediction")
DIRECT_ABLATIONS = ("states", "teacher")
WIRE = Contents(  # what is saved; anything else is refused
    config={
        "receivers": Many(RECEIVER, 1), "stage2": Many(TEXT, 1), "without": one_of(None, *ABLATIONS),
        "wire_carries": one_of(*CARRIES), "receiver?": one_of("unpack", "direct"), "rate?": FLAG,
        "untaught?": FLAG, "others?": Many(ANYTHING),
    },
    tensors={
        "sender.lengths": "V uint8", "sender.spelled": "n uint8", "sender.predictor.embedding.weight": "u W int16",
        "receiver0.adapter.keys": "V k float32",
    },
)  # fmt: skip
PREDICTOR = {  # the predictor in integers: u, W of the embedding, H of the hidden layer, S and o of its ends
    "embedding.weight": "u W int16", "hidden.weight": "H S int16", "hidden.bias": "H int16",
    "out.weight": "o H int16", "out.bias": "o int16", "exponential": "E int64",
}  # fmt: skip


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    add = parser.add_argument
    joining = "trained stage-2 wires, one a receiver; the first one's sends. With --eval-only: receivers that join"
    add("--stage2", metavar="WIRE_DIR", nargs="+", help=joining)
    add("--wire-carries", choices=CARRIES, help="what travels: the whole prompt, or all but the question")
    add("--without", choices=ABLATIONS + DIRECT_ABLATIONS, help="an ablation: leave this part of the training out")
    direct = "the LLM reads every token of a context, or fewer positions: trained on top of --wire, for --model"
    add("--receiver", choices=("unpack", "direct"), default="unpack", help=direct)
    add("--rate", type=positive_float, help="of a direct receiver: tokens of a context a position (default: 2)")
    add("--send", metavar="TEXT|FILE", help="write the message of a text to standard output; no LLM")
    add("--receive", metavar="FILE", help="print what --model answers to a message ('-': standard input)")
    add("--question", help="to ask about a context that travels, or to send with one")
    add("--wire", metavar="WIRE_DIR", help=f"for --send, --receive and --receiver direct; default: {SHIPPED}")
    args = finish_arguments(parser)
    direct, once = args.receiver == "direct", args.send is not None or args.receive is not None
    if args.send is not None and args.receive is not None:
        parser.error("--send and --receive are two processes: give one of them")
    if args.wire and not once and (args.eval_only or not direct):
        parser.error("--wire belongs to --send, --receive and the training of a --receiver direct; see --eval-only")
    if args.rate is not None and not direct:
        parser.error("--rate belongs to --receiver direct")
    if args.without and direct != (args.without in DIRECT_ABLATIONS):
        parser.error(f"--without {args.without} leaves nothing out of a --receiver {args.receiver}")
    if args.question and not once:
        parser.error("--question belongs to --send and --receive")
    if direct:
        from stage3.direct import check_arguments

        check_arguments(args, parser)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the predictor: which index comes next? Learned in floating point, used in integers (stage3/message.py).


class History:
    """What the predictor sees of the indices so far. Sender and receiver walk through the same ones."""

    def __init__(self, vocabulary: int, without: str | None):
        self.nothing, self.without, self.ids, self.followers = vocabulary, without, [], {}

    def features(self) -> tuple[list[int], list[int]]:
        """(the last CONTEXT indices, the ones that followed the last 4, 2, 1 earlier); V where there is none."""
        last = self.ids[-CONTEXT:]
        last = [self.nothing] * (CONTEXT - len(last)) + last
        if self.without == "context":
            last = [self.nothing] * CONTEXT
        return last, [self.followers.get(tuple(self.ids[-n:]), self.nothing) for n in ORDERS]

    def add(self, index: int) -> None:
        for n in ORDERS:
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
    """An n-gram network with one hidden layer, and with weights for copying earlier indices of the message."""

    def __init__(self, vocabulary: int):
        super().__init__()
        seen = CONTEXT + len(ORDERS)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, WIDTH)
        self.hidden = nn.Linear(seen * WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, vocabulary + len(ORDERS) + 1)

    def forward(self, contexts: Tensor, copies: Tensor, seen: Tensor) -> Tensor:
        """contexts [n,CONTEXT], copies [n,ORDERS] (V: none), seen [n,V]. Returns logits [n,V]."""
        V = self.vocabulary
        x = self.embedding(torch.cat([contexts, copies], 1)).flatten(1)
        y = self.out(F.relu(self.hidden(x)))
        logits = F.pad(y[:, :V], (0, 1)).scatter_add(1, copies, y[:, V:-1])  # a copy of nothing adds to column V
        return logits[:, :V] + y[:, -1:] * seen


def index_loss(predictor: Predictor, lists: list[list[int]], without: str | None, positions: int) -> Tensor:
    """Cross-entropy (scalar, nats) of the index that comes next, summed and divided by the step's positions."""
    device = predictor.embedding.weight.device
    seen = [features(ids, predictor.vocabulary, without) for ids in lists]
    inputs = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*seen, strict=True))
    targets = torch.tensor([index for ids in lists for index in ids], device=device)
    return F.cross_entropy(predictor(*inputs), targets, reduction="sum") / positions


# ---------------------------------------------------------------------------------------------------------------------
# the sender: text -> message, with no LLM and no tokenizer; and back, which every receiver starts with


class Codec:
    """Text <-> message. Made from a wire's tensors alone: those of the sender, encoder and codebook of receiver 0."""

    def __init__(self, tensors: dict[str, Tensor], without: str | None, device: torch.device):
        own = {name.removeprefix("sender."): t for name, t in tensors.items() if name.startswith("sender.")}
        self.device, self.keys = device, tensors["receiver0.adapter.keys"].to(device)
        self.encoder = Encoder(self.keys.shape[1]).to(device).eval()
        load_module(self.encoder, "receiver0.encoder.", tensors, "the wire")
        at, self.pieces, spelled = 0, [], own["spelled"].numpy().tobytes()
        for length in own["lengths"].tolist():
            self.pieces.append(spelled[at : at + length])
            at += length
        self.index = {piece: index for index, piece in enumerate(self.pieces) if piece}
        if at != len(spelled) or not {bytes([byte]) for byte in range(256)} <= self.index.keys():
            raise UserError("the wire's sender.lengths and sender.spelled do not spell every byte: it cannot send")
        self.spells = torch.tensor([bool(piece) for piece in self.pieces], device=device)
        self.predictor, self.without = None, without
        digest = hashlib.sha256(repr(without).encode())
        if "predictor.embedding.weight" in own:
            predictor = {n.removeprefix("predictor."): t for n, t in own.items() if n.startswith("predictor.")}
            V = len(self.pieces)
            sizes = dict(u=V + 1, W=WIDTH, H=HIDDEN, S=(CONTEXT + len(ORDERS)) * WIDTH, o=V + len(ORDERS) + 1)
            check_shapes("the wire", predictor, PREDICTOR, **sizes)
            self.predictor = IntegerPredictor(predictor, without)
            for name in sorted(predictor):
                array = predictor[name].numpy()
                digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        digest.update(own["lengths"].numpy().tobytes() + spelled)
        self.fingerprint = digest.digest()[:2]  # of all that sender and receiver must share
        # an evaluation sends and reads each text several times
        self.send, self.text = functools.lru_cache(4096)(self.send), functools.lru_cache(4096)(self.text)

    @torch.no_grad()
    def latents(self, texts: list[str]) -> list[list[int]]:
        """For each text the indices [M] of codes, whose pieces spell it. Raises UserError for half a surrogate pair."""
        data = to_bytes(texts, self.device)
        real = data < 256
        line, real_line = pack_texts(data, real)
        logits = self.encoder(line)
        is_end = torch.zeros_like(real).masked_scatter(real, logits[real_line] > 0)
        is_end[torch.arange(len(data), device=data.device), real.sum(1) - 1] = True
        z = self.encoder.codes(data, is_end)  # [n,k]
        distance = self.keys.square().sum(1) - 2 * z @ self.keys.T  # [n,V], without the part that all keys share
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

    def send(self, text: str, carries: str) -> bytes:
        """Text -> message. Raises UserError for half a surrogate pair and for more than MAX_TEXT bytes."""
        if len(text) > MAX_TEXT or len(text.encode(errors="replace")) > MAX_TEXT:
            raise UserError(f"the text is longer than the {MAX_TEXT} bytes that a message may hold: cut it")
        ids = self.latents([text])[0] if text else []
        deflated = pack(Message(carries, 0, zlib.compress(text.encode(), 9)), self.fingerprint)
        coded = pack(Message(carries, len(ids), to_bits(self.intervals(ids))), self.fingerprint) if ids else deflated
        return min(coded, deflated, key=len)

    def text(self, data: bytes) -> tuple[str, str]:
        """(text, what travels) of a message. Raises UserError for anything but a whole message of this wire."""
        message = unpack(data, self.fingerprint)
        raw = self.decode(message) if message.latents else inflate(message.payload)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise UserError(BROKEN) from None
        if len(raw) > MAX_TEXT:
            raise UserError(BROKEN)
        return text, message.carries

    def decode(self, message: Message) -> bytes:
        """The bytes that the latents of a message spell."""
        history, bits = History(len(self.pieces), self.without), FromBits(message.payload)
        seen, parts, size = np.zeros((1, len(self.pieces)), bool), [], 0
        for _ in range(message.latents):
            context, copy = history.features()
            ends = self.predictor.frequencies(np.array([context]), np.array([copy]), seen)[0].cumsum()
            index = bits.next(ends)
            size += len(self.pieces[index])
            # a sender's latents end with the message: 64 bits beyond its end, it is broken
            if not self.pieces[index] or size > MAX_TEXT or bits.read > 8 * len(message.payload) + 64:
                raise UserError(BROKEN)
            parts.append(self.pieces[index])
            history.add(index)
            seen[0, index] = self.without != "copies"
        return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# the wire: one sender and one of its receivers


class Wire:
    """A message, and behind it, where only a context travels, the question, which the receiver has as text."""

    def __init__(self, codec: Codec, receiver: Stage2Wire, carries: str):
        self.codec, self.receiver, self.carries, self.reader = codec, receiver, carries, receiver.reader

    def send(self, prompt: Prompt) -> bytes:
        if self.carries == "prompt":
            return self.codec.send(prompt.plain, "prompt")
        return with_question(self.codec.send(prompt.context, "context"), prompt.question)

    def receive(self, received: bytes) -> Tensor:
        """Message, and question behind it -> embeddings [L,d]."""
        if self.carries == "prompt":
            return self.embeddings(received, None)
        return self.embeddings(*split_question(received))

    def embeddings(self, message: bytes, question: str | None) -> Tensor:
        """Message [bytes], and the question where a context travels -> [L,d]. Raises UserError."""
        text, carries = self.codec.text(message)
        if (question is None) != (carries == "prompt"):
            held = "a whole prompt: give no --question" if carries == "prompt" else "a context: give a --question"
            raise UserError(f"the message holds {held}")
        if question is not None:
            text = PROMPT.format(context=text, question=question)
        text = as_prompt(self.reader, text)
        return self.receiver.receive(self.receiver.send(Prompt(text, [], False)))


def send_once(args) -> None:
    """--send: text or file -> message on standard output."""
    wire = load_wire(args.wire or SHIPPED, STAGE, WIRE)
    text, path = args.send, Path(args.send)
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--send {args.send}: the file is not UTF-8") from None
    except (OSError, ValueError):
        pass  # a path cannot be so long or hold a zero: it is a text
    if not text.strip():
        raise UserError(f"--send {args.send!r}: there is no text to send")
    if args.wire_carries != "context":
        if not args.question:
            raise UserError("--send of a whole prompt needs a --question; or --wire-carries context without one")
        text = PROMPT.format(context=text, question=args.question)
    elif args.question:
        raise UserError("--wire-carries context leaves the question to the receiver: drop --question")
    codec = Codec(wire.tensors, wire.config["without"], torch.device("cpu"))
    if sys.__stdout__ is None:
        raise UserError("--send: standard output is closed, so the message has nowhere to go; redirect it to a file")
    sys.stdout.buffer.write(codec.send(text, args.wire_carries or "prompt"))
    sys.stdout.buffer.flush()


def receive_once(args) -> None:
    """--receive: message -> what the LLM answers."""
    saved = load_wire(args.wire or SHIPPED, STAGE, WIRE)
    if args.receive == "-" and sys.stdin is None:
        raise UserError("--receive -: standard input is closed; give the message there, or its file")
    if args.receive == "-":
        message = sys.stdin.buffer.read(2 * MAX_TEXT)  # more than any message
    else:
        with open(args.receive, "rb") as file:
            message = file.read(2 * MAX_TEXT)
    codec = Codec(saved.tensors, saved.config["without"], torch.device("cpu"))
    _, carries = codec.text(message)  # refused before an LLM is loaded
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    reader = load_reader(args.model or saved.config["model"], device, dtype, split=args.device == "split")
    entry = entry_of(saved.config["receivers"], reader, saved.name)
    wire = Wire(codec, load_receiver(saved.tensors, entry, reader, saved.name), carries)
    if args.receiver == "direct":
        from stage3.direct import DirectWire

        wire = DirectWire.of(wire, saved.tensors, entry, args.rate, saved.name)
    print(generate(reader, [message], 1, lambda data: wire.embeddings(data, args.question))[0])


def load_texts(args, reader: Reader) -> Data:
    """The data of a receiver. Raises UserError if something in it cannot travel."""
    data = load_data(args.data, reader, args.eval_examples)
    if data.kind == "text" and args.wire_carries == "context":
        raise UserError(f"--data {args.data}: plain text has no questions, so no context can travel without one; use "
                        "--wire-carries prompt, and no --receiver direct")  # fmt: skip
    halve_windows(args.data, data, reader)
    check_prompts(reader, data)
    for row in data.test:
        size = len(sent_prompt(reader, row).plain.encode())
        if size > MAX_TEXT:
            raise UserError(
                f"--data {args.data}: a prompt has {size} bytes, and a message holds {MAX_TEXT}: cut the passages"
            )
    return data


def main() -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # setup: arguments, stage-2 wires, frozen LLMs, data
    args = parse_arguments()
    if args.send is not None:
        return send_once(args)
    if args.receive is not None:
        return receive_once(args)
    if args.receiver == "direct":
        from stage3 import direct

        return direct.main(args)
    saved, joining = None, []
    if args.eval_only:
        saved = load_wire(args.eval_only, STAGE, WIRE)
        joining, args.stage2 = args.stage2 or [], None  # receivers that join a trained wire
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    args.stage2, args.wire_carries = [*args.stage2, *joining], args.wire_carries or "prompt"
    device, dtype = set_up(args)
    tensors, receivers = (dict(saved.tensors), list(saved.config["receivers"])) if saved else ({}, [])
    new, below = add_receivers(joining if saved else args.stage2, tensors, receivers)
    names = [args.model] if saved and args.model else [entry["model"] for entry in new or receivers]
    split, where = args.device == "split", saved.name if saved else "--stage2"
    readers = [load_reader(name, device, dtype, args.gradient_checkpointing, split) for name in names]
    if not saved:
        for entry, reader in zip(receivers, readers, strict=True):
            check_fingerprint(reader, entry, entry["stage2"])
        if receivers[0]["adapter"] != "codebook":
            raise UserError(f"{args.stage2[0]} has a {receivers[0]['adapter']} adapter: a sender needs a codebook")
        tensors |= spelling_tensors(pieces_of(readers[0]))
    measured = entries = [entry_of(receivers, reader, where) for reader in readers]
    if args.model and not saved:  # one receiver is measured; what is trained does not depend on it
        measured = [entry_of(receivers, load_reader(args.model, device, dtype, split=split), where)]
    datas = [load_texts(args, reader) for reader in readers]

    # -----------------------------------------------------------------------------------------------------------------
    # model: the sender's encoder and codebook, proven by stage 2, and the predictor of its indices
    codec = Codec(tensors, args.without, device)
    predictor = Predictor(len(codec.pieces)).to(device)
    receiving = [parts for parts in zip(entries, readers, datas, strict=True) if parts[0] in measured]
    out = open_out(args)
    places = [out, *(open_out(args, Path(entry["model"]).name) for entry, _, _ in receiving[1:])]
    print(f"predictor: {sum(p.numel() for p in predictor.parameters()):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    run = Run(args, out, {"predictor": predictor}, optimizer, identity(args, readers[0].fingerprint, below))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        rng = random.Random(f"{args.seed}-{step}")
        rows = datas[0].train_rows(args.seed, step * args.batch_size, args.batch_size)
        texts = [sent_prompt(readers[0], row).plain for row in rows]
        # one text in eight is odd, so that the messages of odd texts are not much longer than the texts
        words = words_of(texts)
        texts = [odd_text(rng, text, words, readers[0]) if i % 8 == 7 else text for i, text in enumerate(texts)]
        lists = codec.latents(texts)
        # the loss is a mean over the whole step, so that the micro-batch size changes nothing
        positions = sum(map(len, lists))
        for part in my_share(micro_batches(lists, args.micro_batch_size)):  # all, unless torchrun started several
            index = index_loss(predictor, part, args.without, positions)
            index.backward()
            run.add(index=index)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not saved:
        whole = IntegerPredictor.tensors(predictor)
        tensors |= {f"sender.predictor.{name}": tensor for name, tensor in whole.items()}
        codec = Codec(tensors, args.without, device)

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: each receiver from the same messages, on test passages whose names were never seen
    others = []  # the results of the receivers before the last one, the sender's own LLM
    for (entry, reader, data), place in reversed(list(zip(receiving, places, strict=True))):
        print(f"receiver {reader.name}, the wire carries the {args.wire_carries}")
        wire = Wire(codec, load_receiver(tensors, entry, reader, where), args.wire_carries)
        metrics, controls, records = measure(wire, data, 2 * args.micro_batch_size, args.seed)
        rows, last = message_rows(controls, metrics["examples"]), place == out
        config = {
            "model": entry["model"], "receivers": receivers, "stage2": args.stage2, "without": args.without,
            "wire_carries": args.wire_carries, "receiver": "unpack", "rate": None, "untaught": None,
            "others": others if last else [],
        }  # fmt: skip
        title = f"stage 3: {args.wire_carries} -> {controls['latents']:.0f} latents"
        wire_tensors = tensors if last else None  # saved once
        config = finish(run, reader, saved, title, metrics, controls, config, rows, records, wire_tensors, place)
        others.append({key: config[key] for key in ("metrics", "controls")})


if __name__ == "__main__":
    launch(main)
