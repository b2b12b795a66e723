"""Stage 3: the full pipeline. One message, a sixth of the text's bytes, and every causal LM reads it.

    text -> pieces -> index of each [M] -> predictor, arithmetic coder -> message                    the sender: no LLM
            known     known: what comes next   learned: the next index

    message -> the same indices [M] -> the same text -> the LLM's own tokenizer -> frozen LLM        a receiver
               bit-exact               bit-exact        known                      the answer

A latent is the index of a piece of text: a number of thirteen bits, most of them predictable from the latents before
it. So this stage learns to predict them, and the target is known: the index that comes next. An arithmetic coder turns
a prediction into bits, a likely index into few. The predictor sees the last 8 indices, the indices that followed the
last 4, 2 and 1 of them where they stood in this message before (names come back), and whether a piece was in the
message already. It is trained in floating point and used in integers, so that every machine predicts the same.

The pieces are the sender's own, learned from its training texts; among them is every byte, so any text arrives, bit for
bit. What arrives is text, so an LLM reads it as it reads any: nothing is trained for a receiver, two lose nothing
against one, and F1 through the wire is F1 from text.

    python stage3_full.py                                                   # both readers; README has the scores
    python stage3_full.py --corpus squad FILE.txt                           # a sender that knows English, too
    python stage3_full.py --eval-only tiny/wires/stage3 --model tiny-qwen   # the shipped wire, one receiver
    python stage3_full.py --send "Pergalan sells olive oil." > message
    python stage3_full.py --receive message --model tiny-qwen --question "What does Pergalan sell?"
    python stage3_full.py --receiver slots                                   # few positions: stage3/slots.py

Letters: M latents of a message, V pieces, G groups of them, n positions in a batch, L tokens of a prompt, d LLM
embedding width.
"""

import plumbing.early  # noqa: F401

# isort: split
import base64
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import PROMPT, Prompt, Reader, check_prompts, generate, load_reader, make_prompt, sent_prompt
from plumbing.arguments import Parser, add_arguments, finish_arguments, merge_with_saved
from plumbing.data import Data, halve_windows, load_data, read_texts
from plumbing.kinds import ANYTHING, TEXT, Many, one_of
from plumbing.launch import UserError, launch, pick_device, pick_dtype, set_up
from plumbing.processes import my_share
from plumbing.report import finish
from plumbing.spelling import learn_pieces, odd_text, tokenize, words_of
from plumbing.training import Run, micro_batches, must_match
from plumbing.wires import Contents, SavedWire, check_shapes, load_wire, open_out
from stage3 import slots
from stage3.evaluation import measure, message_rows
from stage3.message import CARRIES, MAX_TEXT, split_question, with_question
from stage3.sender import CONTEXT, MEMBERS, ORDERS, SEES, History, Pieces, Sender

# ---------------------------------------------------------------------------------------------------------------------
# configuration: lower case are flags (--help), upper case are fixed

STAGE = "stage3"
CONFIG = dict(
    model="both readers",  # what is trained does not depend on it; --model NAME measures one receiver
    data="tiny",  # questions about invented passages; or squad, or a file
    corpus=[],  # other texts that the sender learns: a third of each step
    steps=16000,  # half an hour with one thread, evaluation included
    batch_size=16,  # texts a step, one of them odd: words joined at random, letters or case changed
    lr=2e-3,  # peak
)
FIXED_BY_WIRE = ("data", "corpus")  # --eval-only reads these from the wire
BOTH = ("tiny", "tiny-qwen")
SHIPPED = "tiny/wires/stage3"
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.01
PIECES, PIECE_TEXTS = 8192, 8_000  # V; texts that they are learned from
LONGEST = 4000  # characters of a text that is learned
WIDTH, HIDDEN = 96, 384  # of an index's embedding; of the predictor's only hidden layer
OTHER = {"metrics": {"model": TEXT, "*": ANYTHING}, "controls": ANYTHING}  # the results of one more receiver
# what is saved; anything else is refused. u: V + 1; W, H: WIDTH, HIDDEN; S: SEES * W; o: outputs of `group`
WIRE = Contents(
    config={"corpus": Many(TEXT), "wire_carries": one_of(*CARRIES), "others": Many(OTHER)},
    tensors={
        "pieces.lengths": "V uint8", "pieces.spelled": "n uint8", "predictor.embedding.weight": "u W int16",
        "predictor.hidden.weight": "H S int16", "predictor.hidden.bias": "H int16",
        "predictor.group.weight": "o H int16", "predictor.group.bias": "o int16",
        "predictor.members.weight": "V H int16", "predictor.members.bias": "V int16",
        "predictor.exponential": "E int32",
    },
)  # fmt: skip


def parse_arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGE, CONFIG)
    add = parser.add_argument
    add("--corpus", metavar="FILE", nargs="+", help="other texts to learn: .txt, .json, .jsonl as --data, or squad")
    slots.add_receiver(parser)
    add("--wire-carries", choices=CARRIES, help="what travels: the whole prompt, or all but the question")
    add("--send", metavar="TEXT|FILE|-", help="write the message of a text to standard output; no LLM")
    add("--send-lines", metavar="FILE|-", help="write the message of each line, in base64, as a line; no LLM")
    add("--receive", metavar="FILE|-", help="print what --model answers to a message ('-': standard input)")
    add("--question", nargs="+", help="to ask about a context that travels (several times), or to send with one")
    add("--wire", metavar="WIRE_DIR", help=f"for --send, --send-lines and --receive; default: {SHIPPED}")
    args = finish_arguments(parser)
    once = [flag for flag in ("send", "send_lines", "receive") if getattr(args, flag) is not None]
    if args.receiver == "text" and (args.latents or args.rate):
        parser.error(f"{'--latents' if args.latents else '--rate'} belongs to --receiver slots: a text has no slots")
    if len(once) > 1:
        parser.error("--send, --send-lines and --receive are separate processes: give one of them")
    if once and args.eval_only:
        parser.error("--eval-only measures a wire; to send or receive with one, give it as --wire")
    if not once and (args.wire or args.question):
        flag = "--wire" if args.wire else "--question"
        parser.error(f"{flag} belongs to --send, --send-lines and --receive; to measure a wire, see --eval-only")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# the predictor: which index comes next? Learned in floating point, used in integers (stage3/sender.py).


class Predictor(nn.Module):
    """An n-gram network with one hidden layer, and with weights for copying earlier pieces of the message.

    An index is group * MEMBERS + member, so that a latent costs two softmaxes, over the groups and over the members of
    one, whatever the number of pieces (Goodman 2001). Pieces in alphabetical order make the groups.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.nothing, self.groups = vocabulary, vocabulary // MEMBERS
        self.embedding = nn.Embedding(vocabulary + 1, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.hidden = nn.Linear(SEES * WIDTH, HIDDEN)
        # the groups; what each of the copies adds to its group, and to itself there; what having been seen adds
        self.group = nn.Linear(HIDDEN, self.groups + 2 * len(ORDERS) + 1)
        self.members = nn.Linear(HIDDEN, vocabulary)

    def forward(self, sees: Tensor, seen: Tensor, targets: Tensor) -> Tensor:
        """sees [n,SEES] of `History`, seen [n,MEMBERS] of the target's group, targets [n]. Returns NLL [n] in nats."""
        h = F.relu(self.hidden(self.embedding(sees).flatten(1)))
        groups, to_group, to_member, to_seen = self.group(h).split([self.groups, *2 * [len(ORDERS)], 1], 1)
        copies = sees[:, CONTEXT:]
        groups = F.pad(groups, (0, 1)).scatter_add(1, copies // MEMBERS, to_group)[:, :-1]  # a copy of nothing is cut
        group, member = targets // MEMBERS, targets % MEMBERS
        order = group.argsort()
        parts = h[order].split(group.bincount(minlength=self.groups).tolist())
        weights = self.members.weight.view(-1, MEMBERS, HIDDEN)
        logits = torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])[order.argsort()]
        logits = logits + self.members.bias.view(-1, MEMBERS)[group] + to_seen * seen
        same = copies // MEMBERS == group[:, None]
        logits = logits.scatter_add(1, copies % MEMBERS, to_member * same)
        return F.cross_entropy(groups, group, reduction="none") + F.cross_entropy(logits, member, reduction="none")

    @torch.no_grad()
    def integers(self) -> dict[str, Tensor]:
        """Weights as whole numbers of 2^-12, and exp(-i/64) as whole numbers of 2^-20: a wire's file holds both."""
        whole = {
            f"predictor.{name}": (tensor.cpu().double() * 2**12).round().clamp(-32768, 32767).to(torch.int16)
            for name, tensor in self.state_dict().items()
        }
        exponential = torch.exp(-torch.arange(1024).double() / 64) * 2**20
        return whole | {"predictor.exponential": exponential.round().clamp(min=1).int()}


def features(indices: list[int], nothing: int) -> tuple[np.ndarray, np.ndarray]:
    """What is known before each of M indices: sees [M,SEES] of `History`; seen [M,MEMBERS], 1 for each piece of the
    index's own group that the message has already."""
    history, sees = History(nothing), []
    first = {}
    seen = np.zeros((len(indices), MEMBERS), np.float32)
    for place, index in enumerate(indices):
        sees.append(history.sees())
        history.add(index)
        members = first.setdefault(index // MEMBERS, set())
        seen[place, list(members)] = 1
        members.add(index % MEMBERS)
    return np.array(sees), seen


def index_loss(predictor: Predictor, lists: list[list[int]], positions: int) -> Tensor:
    """Cross-entropy (scalar, nats) of the index that comes next, summed and divided by the step's positions."""
    device = predictor.embedding.weight.device
    found = [features(indices, predictor.nothing) for indices in lists]
    sees, seen = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*found, strict=True))
    targets = torch.tensor([index for indices in lists for index in indices], device=device)
    return predictor(sees, seen, targets).sum() / positions


# ---------------------------------------------------------------------------------------------------------------------
# the wire: one sender, and any causal LM


class Wire:
    """A message, and behind it, where only a context travels, the question, which the receiver has as text."""

    def __init__(self, sender: Sender, reader: Reader, carries: str):
        self.sender, self.reader, self.carries = sender, reader, carries

    def send(self, prompt: Prompt) -> bytes:
        if self.carries == "prompt":
            return self.sender.send(prompt.plain, "prompt")
        return with_question(self.sender.send(prompt.context, "context"), prompt.question)

    def receive(self, received: bytes) -> Tensor:
        """Message, and question behind it -> embeddings [L,d]."""
        message, question = (received, None) if self.carries == "prompt" else split_question(received)
        return self.reader.table[arrived(self.sender, self.reader, message, question).ids]


def arrived(sender: Sender, reader: Reader, message: bytes, question: str | None) -> Prompt:
    """The prompt that an LLM reads from a message, and from the question where a context travels. Raises UserError."""
    text, carries = sender.text(message)
    if (question is None) != (carries == "prompt"):
        held = "a whole prompt: give no --question" if carries == "prompt" else "a context: give a --question"
        raise UserError(f"the message holds {held}")
    if question is None:
        before, after = PROMPT.removeprefix("{context}").split("{question}")
        context, asked, question = text.removesuffix(after).rpartition(before)
        if not (asked and text.endswith(after)):  # a window of plain text
            return Prompt(text, tokenize(reader, text)[: reader.context_tokens], False)
        text = context
    return make_prompt(reader, text, question)


def load_sender(wire: SavedWire) -> Sender:
    """The sender of a trained wire. Raises UserError for tensors that do not fit together."""
    V = len(wire.tensors["pieces.lengths"])
    sizes = dict(V=V, u=V + 1, W=WIDTH, H=HIDDEN, S=SEES * WIDTH, o=V // MEMBERS + 2 * len(ORDERS) + 1, E=1024)
    check_shapes(wire.name, wire.tensors, WIRE.tensors, **sizes)
    if V % MEMBERS:
        raise UserError(f"{wire.name}: {V} pieces do not make groups of {MEMBERS}")
    return Sender(wire.tensors)


def text_of(name: str, flag: str) -> str:
    """The text of a file, of standard input ("-"), or the argument itself. Raises UserError."""
    path = Path(name)
    try:
        if name == "-":
            if sys.stdin is None:
                raise UserError(f"{flag} -: standard input is closed; give the text there, or a file")
            return sys.stdin.buffer.read().decode()
        if path.is_file():
            return path.read_bytes().decode()  # line ends stay as they are
    except UnicodeDecodeError:
        raise UserError(f"{flag} {name}: it is not UTF-8; convert it first, e.g. with iconv") from None
    except (OSError, ValueError):
        pass  # a path cannot be so long or hold a zero: it is a text
    return name


def send_once(args) -> None:
    """--send and --send-lines: text -> message, or each line -> a line of base64, on standard output."""
    wire = load_wire(args.wire or SHIPPED, STAGE, WIRE)
    flag = "--send-lines" if args.send is None else "--send"
    if args.question and len(args.question) > 1:
        raise UserError(f"{flag} takes one --question: it travels with the text; a receiver may ask several")
    (question,) = args.question or [None]
    carries = args.wire_carries or ("prompt" if question else "context")
    if carries == "prompt" and not question:
        raise UserError(f"{flag} of a whole prompt needs a --question; without one, a context travels")
    if carries == "context" and question:
        raise UserError("--wire-carries context leaves the question to the receiver: drop --question")
    if args.send is None and args.send_lines != "-" and not Path(args.send_lines).is_file():
        raise UserError(f"--send-lines {args.send_lines}: no such file")
    text = text_of(args.send_lines if args.send is None else args.send, flag)
    if not text.strip():
        raise UserError(f"{flag} {text[:60]!r}: there is no text to send")
    if sys.__stdout__ is None:
        raise UserError(f"{flag}: standard output is closed, so the message has nowhere to go; redirect it to a file")
    sender, lines = load_sender(wire), [text] if args.send is not None else text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        message = sender.send(PROMPT.format(context=line, question=question) if question else line, carries)
        sys.stdout.buffer.write(message if args.send is not None else base64.b64encode(message) + b"\n")
        if number % 1000 == 0:
            print(f"{number} of {len(lines)} lines", file=sys.stderr, flush=True)
    sys.stdout.buffer.flush()


def receive_once(args) -> None:
    """--receive: message -> what the LLM answers, a line for each question."""
    saved = load_wire(args.wire or SHIPPED, STAGE, WIRE)
    if args.receive == "-" and sys.stdin is None:
        raise UserError("--receive -: standard input is closed; give the message there, or its file")
    if args.receive == "-":
        message = sys.stdin.buffer.read(2 * MAX_TEXT)  # more than any message
    else:
        with open(args.receive, "rb") as file:
            message = file.read(2 * MAX_TEXT)
    sender = load_sender(saved)
    text, carries = sender.text(message)  # refused before an LLM is loaded
    device, _ = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.receiver == "slots":
        if carries == "prompt":
            raise UserError("the message holds a whole prompt, not a context: for slots, send it without --question")
        if not args.question:
            raise UserError("the message holds a context: give a --question")
        slots_wire = slots.load_slots(args.wire or SHIPPED, args.model or BOTH[0])
    reader = load_reader(args.model or BOTH[0], device, dtype, split=args.device == "split")
    if args.receiver == "slots":
        answers, cut = slots.ask(reader, slots_wire, args, text, args.question)
    else:
        prompts = [arrived(sender, reader, message, question) for question in args.question or [None]]
        answers = generate(reader, [prompt.ids for prompt in prompts], 8)
        cut = any(prompt.truncated for prompt in prompts)
    if cut:
        print(f"note: the prompt exceeds {reader.prompt_tokens} tokens: the context is cut at its end", file=sys.stderr)
    print("\n".join(answers))


# ---------------------------------------------------------------------------------------------------------------------
# texts to learn from


def load_texts(args, reader: Reader) -> Data:
    """The data of a receiver. Raises UserError if something in it cannot travel."""
    data = load_data(args.data, reader, args.eval_examples)
    if data.kind == "text" and args.wire_carries == "context":
        raise UserError(f"--data {args.data}: plain text has no questions, so no context can travel without one; use "
                        "--wire-carries prompt")  # fmt: skip
    halve_windows(args.data, data, reader)
    check_prompts(reader, data)
    for row in data.test:
        size = len(sent_prompt(reader, row).plain.encode())
        if size > MAX_TEXT:
            raise UserError(
                f"--data {args.data}: a prompt has {size} bytes, and a message holds {MAX_TEXT}: cut the passages"
            )
    return data


def some_sentences(rng: random.Random, text: str) -> str:
    """The text, or one to three sentences of it, so that short messages are learned, too."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    if rng.random() < 0.5 or not sentences:
        return text[:LONGEST]
    at = rng.randrange(len(sentences))
    return " ".join(sentences[at : at + rng.randint(1, 3)])[:LONGEST]


def step_texts(args, step: int, data: Data, reader: Reader, corpus: list[str], count: int) -> list[str]:
    """The texts of a step: a third of them from the corpus if there is one, one in sixteen odd."""
    rng, learned = random.Random(f"{args.seed}-{step}"), count // 3 if corpus else 0
    rows = data.train_rows(args.seed, step * (count - learned), count - learned)
    texts = [sent_prompt(reader, row).plain if "ids" in row else PROMPT.format(**row)[:LONGEST] for row in rows]
    texts += [some_sentences(rng, rng.choice(corpus)) for _ in range(learned)]
    words = words_of(texts)
    return [odd_text(rng, text, words) if i % 16 == 15 else text for i, text in enumerate(texts)]


def main() -> None:
    # slots are a stage of their own, stage3/slots.py; a message is received here, whoever answers
    chosen = Parser(add_help=False)
    slots.add_receiver(chosen)
    chosen.add_argument("--receive")
    known, _ = chosen.parse_known_args()
    if known.receiver == "slots" and known.receive is None:
        return slots.main()
    args = parse_arguments()
    if args.receive is not None:
        return receive_once(args)
    if args.send is not None or args.send_lines is not None:
        return send_once(args)

    # -----------------------------------------------------------------------------------------------------------------
    # setup: frozen LLMs, which only read, and texts
    saved = load_wire(args.eval_only, STAGE, WIRE) if args.eval_only else None
    merge_with_saved(args, {key: CONFIG[key] for key in FIXED_BY_WIRE}, saved)
    args.wire_carries = args.wire_carries or "prompt"
    device, dtype = set_up(args)
    names = [args.model] if args.model else BOTH
    if saved and not args.model:
        names = [saved.config["model"], *(other["metrics"]["model"] for other in saved.config["others"])]
    readers = [load_reader(name, device, dtype, split=args.device == "split") for name in names]
    args.model = args.model or CONFIG["model"]
    datas = [load_texts(args, reader) for reader in readers]
    corpus = [] if saved else [text for name in args.corpus for text in read_texts(name, PROMPT)]
    out = open_out(args)
    places = [out, *(open_out(args, Path(reader.name).name) for reader in readers[1:])]

    # -----------------------------------------------------------------------------------------------------------------
    # model: the sender's pieces, and the predictor of their indices
    if saved:
        tensors = dict(saved.tensors)
        load_sender(saved)  # refused before anything else
    else:
        pieces = learn_pieces(step_texts(args, 0, datas[0], readers[0], corpus, PIECE_TEXTS), PIECES)
        pieces += [b""] * (-len(pieces) % MEMBERS)
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.uint8)
        spelled = torch.from_numpy(np.frombuffer(b"".join(pieces), np.uint8).copy())
        tensors = {"pieces.lengths": lengths, "pieces.spelled": spelled}
    predictor = Predictor(len(tensors["pieces.lengths"])).to(device)
    split = Pieces(tensors).split
    print(f"predictor: {sum(p.numel() for p in predictor.parameters()):,} trained parameters", flush=True)

    # -----------------------------------------------------------------------------------------------------------------
    # training
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    run = Run(args, out, {"predictor": predictor}, optimizer, must_match(args, readers[0].fingerprint))
    for step in run.steps():  # resumes where it stopped; after the body: log, checkpoint, stop if told to
        # warm-up over 5% of the steps, then linearly to zero
        warmth = min(1.0, (step + 1) / (0.05 * args.steps), (args.steps - step) / (0.95 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        lists = [split(text.encode()) for text in step_texts(args, step, datas[0], readers[0], corpus, args.batch_size)]
        # the loss is a mean over the whole step, so that the micro-batch size changes nothing
        positions = sum(map(len, lists))
        for part in my_share(micro_batches(lists, args.micro_batch_size)):  # all, unless torchrun started several
            index = index_loss(predictor, part, positions)
            index.backward()
            run.add(index=index)
        run.reduce()  # gradients and losses, summed over the processes
        norm = torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        if run.accepts(norm):  # neither NaN nor a spike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not saved:
        tensors |= predictor.integers()

    # -----------------------------------------------------------------------------------------------------------------
    # evaluation: each receiver from the same messages, on test passages whose names were never seen
    sender, others = Sender(tensors), []  # the results of the receivers before the last one
    for reader, data, place in reversed(list(zip(readers, datas, places, strict=True))):
        print(f"receiver {reader.name}, the wire carries the {args.wire_carries}")
        wire = Wire(sender, reader, args.wire_carries)
        metrics, controls, records = measure(wire, data, 2 * args.micro_batch_size, args.seed, place)
        rows, last = message_rows(controls, metrics["examples"]), place == out
        config = {"corpus": args.corpus, "wire_carries": args.wire_carries, "others": others if last else []}
        config["model"] = reader.name
        title = f"stage 3: {args.wire_carries} -> {controls['latents']:.0f} latents"
        wire_tensors = tensors if last else None  # saved once
        config = finish(run, reader, saved, title, metrics, controls, config, rows, records, wire_tensors, place)
        others.append({key: config[key] for key in ("metrics", "controls")})


if __name__ == "__main__":
    launch(main)
