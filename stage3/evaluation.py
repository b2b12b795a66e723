"""What a message costs and keeps beside other ways to make a text small, and what slots keep beside their start."""

import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from common import (
    Prompt,
    Reader,
    beside_text,
    byte_baselines,
    evaluate,
    generate,
    mean_nll,
    score,
    sent_prompt,
    test_prompts,
    truncated_prompt,
)
from plumbing.checkpoints import write_atomically
from plumbing.data import Data
from plumbing.processes import map_over_processes, rank
from plumbing.training import micro_batches
from stage3.cache import Layout, Passage, answers_behind, nll_behind
from stage3.message import unpack, with_question
from stage3.sender import Sender


def measure(wire, data: Data, batch_size: int, seed: int, place: Path) -> tuple[dict, dict, list[dict]]:
    """(metrics, controls, records) of one receiver: `evaluate`, and more about its messages. wire: stage 3's.

    Draws message.png, the first message, in the directory `place`.
    """
    sender, reader, carries = wire.sender, wire.reader, wire.carries
    metrics, records = evaluate(wire, data, batch_size)
    prompts = [sent_prompt(reader, row) for row in data.test]
    texts = [prompt.context if carries == "context" else prompt.plain for prompt in prompts]
    sent = map_over_processes(lambda text: sender.send(text, carries), texts)
    if carries == "context":
        # evaluate() measured whole prompts; here only the context travels, so bytes and the shuffled control are
        # computed again
        id_lists = [reader.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        metrics |= byte_baselines(reader, texts, id_lists) | {"wire_bytes": sum(map(len, sent)) / len(sent)}
        others = zip(sent[1:] + sent[:1], prompts, strict=True)
        swapped = [with_question(other, prompt.question) for other, prompt in others]
        answers = generate(reader, swapped, batch_size, wire.receive) if len(sent) > 1 else []
        metrics["shuffled_f1"] = score(answers, data.test)[0] if answers else None
    known = [sent_prompt(reader, row).plain for row in data.train_rows(seed, 0, 200)]
    arrived = map_over_processes(lambda message: sender.text(message)[0], sent)
    controls = {
        "truncated": truncation_curve(reader, data, prompts, batch_size) if data.kind == "qa" else [],
        "arrived": sum(text == read for text, read in zip(texts, arrived, strict=True)),
        "latents": sum(unpack(message, sender.fingerprint).latents for message in sent) / len(texts),
        "stored": sum(not unpack(message, sender.fingerprint).latents for message in sent),
        "zlib_dictionary_bytes": zlib_with_dictionary(texts, "".join(known).encode()),
        "llm_bound_bytes": bytes_of_nll(reader, [prompt.ids for prompt in prompts], batch_size),
    }
    if not rank():
        draw_message(place / "message.png", sender, texts[0], len(sent[0]))
    return metrics, controls, records


def message_rows(controls: dict, examples: int) -> list[tuple[str, str, str]]:
    """The controls of `measure` as rows (name, value, note) of the table."""
    return [
        ("texts that arrive bit for bit", f"{controls['arrived']}", f"of {examples}"),
        ("latents", f"{controls['latents']:.1f}", f"{controls['stored']} messages are deflated, where that is shorter"),
        ("zlib -9, dictionary", f"{controls['zlib_dictionary_bytes']:.0f}", "bytes, with 32 KB of training text"),
        ("this LLM's own prediction", f"{controls['llm_bound_bytes']:.1f}", "bytes, of its prompt; no frame"),
    ]


def draw_message(path: Path, sender: Sender, text: str, size: int) -> None:
    """message.png: a text, each piece of it on a background that is the darker the more bits it costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    indices = sender.split(text.encode())
    bits = [math.log2(total / (end - start)) for start, end, total in sender.intervals(indices)]
    costs = [sum(pair) for pair in zip(bits[::2], bits[1::2], strict=True)]  # of the group, and of the piece in it
    figure, axis = plt.subplots(figsize=(11, 5), constrained_layout=True)
    colours, row, column, lines = plt.get_cmap("Reds"), 0, 0, 24
    for index, cost in zip(indices, costs, strict=True):
        piece = sender.pieces[index].decode(errors="replace")
        for letter in piece:
            if letter == "\n" or column == 100:
                row, column = row + 1, 0
            axis.add_patch(plt.Rectangle((column, row), 1, 1, color=colours(min(cost / len(piece) / 6, 1)), lw=0))
            axis.text(column + 0.5, row + 0.5, letter.strip(), ha="center", va="center", family="monospace", size=9)
            column += letter != "\n"
        if row > lines:
            break
    axis.set(xlim=(0, 100), ylim=(min(row, lines) + 1, 0))
    axis.axis("off")
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 6), colours)
    figure.colorbar(scale, ax=axis, label="bits a letter", shrink=0.6)
    axis.set_title(f"a message of {size} bytes: {len(indices)} latents for {len(text.encode())} bytes of text")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def truncation_curve(reader: Reader, data: Data, prompts: list[Prompt], batch_size: int) -> list[dict]:
    """F1 where a quarter, a half or three quarters of the text are sent: the baseline that is always there."""
    curve = []
    for share in (0.25, 0.5, 0.75):
        pairs = zip(data.test, prompts, strict=True)
        cut = [truncated_prompt(reader, row, math.ceil(share * len(prompt.ids))) for row, prompt in pairs]
        f1, _ = score(generate(reader, [prompt.ids for prompt in cut], batch_size), data.test)
        mean_bytes = sum(len(prompt.text.encode()) for prompt in cut) / len(cut)
        positions = sum(len(prompt.ids) for prompt in cut) / len(cut)
        curve.append({"share": share, "bytes": mean_bytes, "positions": positions, "f1": f1})
    return curve


def zlib_with_dictionary(texts: list[str], known: bytes) -> float:
    """Mean bytes of texts by zlib -9 when both sides know the last 32 KB of `known`."""
    total = 0
    for text in texts:
        deflate = zlib.compressobj(9, zdict=known[-32768:])
        total += len(deflate.compress(text.encode()) + deflate.flush())
    return total / len(texts)


@torch.inference_mode()
def bytes_of_nll(reader: Reader, id_lists: list[list[int]], batch_size: int) -> float:
    """Mean bytes that an arithmetic coder would need with this LLM's own prediction of its tokens."""
    rows = [{"ids": ids} for ids in id_lists]
    nats = mean_nll(reader, rows, batch_size) * sum(len(ids) - 1 for ids in id_lists)
    return nats / math.log(2) / 8 / len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# slots: what few positions of a context keep, beside the same before training


def answers_to(layout: Layout, passages: list[Passage], given: list, receive: Callable, batch_size: int) -> list[str]:
    """The answer to the first question about each passage; receive: some of what is `given` for them -> Memory."""
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].tails[0]))  # like lengths together

    def answers_of(part: list[int]) -> list[str]:
        return answers_behind(layout, receive([given[i] for i in part]), [passages[i].tails[0] for i in part])

    found = map_over_processes(answers_of, micro_batches(order, batch_size))
    answers = [answer for part in found for answer in part]
    return [answer for _, answer in sorted(zip(order, answers, strict=True))]


@torch.inference_mode()
def measure_slots(wire, start, data: Data, batch_size: int, rates: tuple[float, ...]) -> tuple[dict, dict, list[dict]]:
    """(metrics, controls, records): named as in the JSON line; the stage's own; for samples.md.

    wire: of slots; start: the same before training; rates: tokens a slot, at which F1 is measured, too.
    """
    reader, layout, rows = wire.reader, wire.slots.layout, data.test
    prompts = test_prompts(reader, rows)
    passages = [Passage(reader, [row]) for row in rows]

    def through(wire, messages: list[bytes]) -> list[str]:
        return answers_to(layout, passages, messages, wire.receive, batch_size)

    def f1_of(wire) -> float:
        return score(through(wire, map_over_processes(wire.send, passages)), rows)[0]

    messages = map_over_processes(wire.send, passages)
    print("  answers through the wire", flush=True)
    answers = through(wire, messages)
    counts = [wire.latents_in(message) for message in messages]
    pairs = zip(passages, counts, strict=True)
    positions = [passage.opening + count + len(passage.tails[0]) for passage, count in pairs]
    metrics, records = beside_text(reader, rows, prompts, positions, answers, batch_size)
    metrics["wire_bytes"] = sum(map(len, messages)) / len(rows)

    def nll_of(part: list[int]) -> float:
        memory = wire.receive([messages[i] for i in part])
        return nll_behind(layout, memory, [passages[i] for i in part]).item()

    nlls = map_over_processes(nll_of, micro_batches(range(len(rows)), batch_size))
    metrics["nll_wire"] = sum(nlls) / sum(len(passage.answers[0]) for passage in passages)
    # only the context travels: another passage's message, with this question
    swapped = through(wire, messages[1:] + messages[:1]) if len(rows) > 1 else []
    metrics["shuffled_f1"] = score(swapped, rows)[0] if swapped else None
    print("  controls: scorers alone, scorers and PCA, other numbers of slots", flush=True)
    selected = answers_to(layout, passages, passages, start.selected, batch_size)
    controls = {
        "slots": sum(counts) / len(counts),
        "context_tokens": sum(len(passage.ids) - passage.opening for passage in passages) / len(passages),
        "selection_f1": score(selected, rows)[0],
        "start_f1": f1_of(start),
        "rates": {f"{rate:g}": f1_of(wire.at_rate(rate)) for rate in rates},
    }
    return metrics, controls, records


def slot_rows(controls: dict) -> list[tuple[str, str, str]]:
    """The controls of `measure_slots` as rows (name, value, note) of the table."""
    tokens = f"for {controls['context_tokens']:.1f} tokens of a context"
    held = f"the same through the PCA, which holds {100 * controls['explained_variance']:.1f}% of the variance"
    return [
        ("slots", f"{controls['slots']:.1f}", tokens),
        ("selection alone: F1", f"{controls['selection_f1']:.1f}", "the scorer's tokens, as the frozen LLM keeps them"),
        ("before training: F1", f"{controls['start_f1']:.1f}", held),
        *(
            (f"F1 at rate {rate}", f"{f1:.1f}", "tokens of a context for each slot")
            for rate, f1 in controls["rates"].items()
        ),
    ]
