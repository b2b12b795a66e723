"""What a run leaves behind: config.json, samples.md, report.png, a table, and the JSON line at the end of stdout."""

from __future__ import annotations

import io
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from plumbing.arguments import saved_arguments
from plumbing.checkpoints import write_atomically
from plumbing.launch import commit, name_of, versions
from plumbing.processes import rank
from plumbing.wires import SavedWire, save_wire

if TYPE_CHECKING:
    from common import Reader
    from plumbing.training import Run

# the keys of the JSON line; what does not apply is null, never left out
RESULT_KEYS = (
    "stage model data seed steps examples text_f1 text_em f1 em retention no_context_f1 shuffled_f1 "
    "truncated_f1 nll_text nll_wire cosine wire_bytes text_bytes zlib_bytes packed_token_bytes positions "
    "text_positions unique_answers train_seconds eval_seconds device dtype versions commit"
).split()


def finish(
    run: Run, reader: Reader, saved: SavedWire | None, title: str, metrics: dict, controls: dict, config: dict,
    rows: list[tuple[str, str, str]], records: list[dict], tensors: dict[str, Tensor] | None,
    out: Path | None = None, bars: dict[str, float] | None = None,
) -> dict:  # fmt: skip
    """Write the run directory, then print the table and, as the last line, the JSON object. Returns the config.

    saved: the wire under --eval-only, whose training is reported. metrics, records: from `evaluate`. controls: the
    stage's own numbers; rows: the same as (name, value, note) for the table. config: the stage's part of config.json.
    tensors: the wire, or None if it is saved elsewhere. out: another directory than the run's. bars: controls for
    report.png, in the unit of the score.
    """
    args, out, now = run.args, out or run.out, time.perf_counter()
    steps, seconds = args.steps, run.seconds
    if args.eval_only:
        steps, seconds = saved.config["arguments"]["steps"], saved.config["metrics"]["train_seconds"]
    this_run = {
        "stage": args.stage, "model": config.get("model", args.model), "data": args.data, "seed": args.seed,
        "steps": steps, "train_seconds": seconds, "eval_seconds": now - run.evaluated_at,
        "device": reader.device.type, "dtype": name_of(reader.dtype), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    run.evaluated_at = now
    metrics = rounded(dict.fromkeys(RESULT_KEYS) | this_run | metrics)
    config = {"stage": args.stage, "model": args.model, "fingerprint": reader.fingerprint} | config
    config |= {"data": args.data, "metrics": metrics, "controls": rounded(controls)}
    config["arguments"] = saved.config["arguments"] if args.eval_only else saved_arguments(args)
    score_part, score_bars, unit = score_rows(metrics, bars or {})
    if tensors is not None:
        save_wire(out, tensors, config)
    write_samples(out / "samples.md", records)
    heading = f"{title} ({metrics['model']})"
    if not rank():
        draw_report(out / "report.png", run.history, heading, score_bars, unit, metrics)
    heading = f"{title}: {metrics['model']} on {args.data}, seed {args.seed}; files in {out}"
    print_table(heading, [*score_part, *rows, *size_rows(metrics)])
    print(json.dumps({key: metrics[key] for key in RESULT_KEYS}), flush=True)
    return config


def shown(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def score_rows(m: dict, more: dict[str, float]) -> tuple[list[tuple[str, str, str]], dict[str, float], str]:
    """(rows of the table, bars of report.png, their unit): the score through the wire and its controls.

    more: the stage's own bars.
    """
    nll_text, nll_wire = shown(m["nll_text"], 4), shown(m["nll_wire"], 4)
    if m["f1"] is None:
        rows = [("NLL from text", nll_text, "nats per token"), ("NLL through the wire", nll_wire, "")]
        return rows, {"text": m["nll_text"], "wire": m["nll_wire"]} | more, "NLL, nats per token"
    rows = [
        ("F1 from text", shown(m["text_f1"]), f"EM {shown(m['text_em'])}, {m['examples']} test rows"),
        ("F1 through the wire", shown(m["f1"]), f"EM {shown(m['em'])}, {m['unique_answers']} different answers"),
        ("retention", shown(m["retention"]), "% of the F1 from text"),
        ("no context: F1", shown(m["no_context_f1"]), "the question alone"),
        ("shuffled: F1", shown(m["shuffled_f1"]), "another prompt's message"),
        ("truncated text: F1", shown(m["truncated_f1"]), f"cut to the wire's {shown(m['positions'])} positions"),
        ("NLL of the answer", nll_wire, f"from text {nll_text}, nats per token"),
    ]
    if m["text_f1"] < 10:
        note = "this LLM does not answer these questions from the text either: retention says little"
        rows.append(("note", "", note))
    bars = {"text": m["text_f1"], "wire": m["f1"]} | more
    bars |= {"no context": m["no_context_f1"], "shuffled": m["shuffled_f1"]}
    if m["positions"] < m["text_positions"]:  # else nothing is cut
        bars["truncated"] = m["truncated_f1"]
    return rows, bars, "F1, %"


def size_rows(m: dict) -> list[tuple[str, str, str]]:
    """Rows of the table: what travels, in bytes and in positions."""
    text, zlib, packed = (shown(m[key], 0) for key in ("text_bytes", "zlib_bytes", "packed_token_bytes"))
    rows = [
        ("cosine to the real embeddings", shown(m["cosine"], 4), ""),
        ("bytes on the wire", shown(m["wire_bytes"], 0), f"text {text}, zlib -9 {zlib}, packed token ids {packed}"),
        ("positions", shown(m["positions"]), f"text {shown(m['text_positions'])}"),
    ]
    if m["wire_bytes"] > m["text_bytes"]:
        larger = m["wire_bytes"] / m["text_bytes"]
        rows.append(("", "", f"in bytes the wire is {larger:.1f}x LARGER than the text"))
    return rows


def rounded(value):
    """Floats to six significant digits, through dicts and lists, so that JSON is readable. NaN becomes null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value


def print_table(title: str, rows: list[tuple[str, str, str]]) -> None:
    """A table of (name, value, note)."""
    width, value_width = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    print(f"\n{title}")
    for name, value, note in rows:
        print(f"  {name:<{width}}  {value:>{value_width}}  {note}".rstrip())
    print(flush=True)


def write_samples(path: Path, records: list[dict], count: int = 20) -> None:
    """samples.md: question, gold, the answer from text, the answer through the wire; or the NLL of windows of text."""
    lines = ["# Samples", "", "| question | gold | from text | through the wire |", "|---|---|---|---|"]
    if "window" in records[0]:
        lines[2:] = ["| a window begins | NLL from text | NLL through the wire |", "|---|---|---|"]
    for record in records[:count]:
        if "window" in record:
            cells = [record["window"][:80], shown(record["text"], 3), shown(record["wire"], 3)]
        else:
            cells = [record["question"], " / ".join(dict.fromkeys(record["answers"])), record["text"], record["wire"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def draw_report(path: Path, history: list[dict], title: str, bars: dict[str, float], unit: str, m: dict) -> None:
    """report.png: the training curves, the score beside its controls, and the bytes beside theirs."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, scores, sizes) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    for key in sorted({key for row in history for key in row if key.startswith("loss_")}):
        points = [(row["step"], row[key]) for row in history if row.get(key)]  # the axis is logarithmic
        if points:
            steps, losses = np.array(points).T
            window = np.ones(1 + len(points) // 10)
            means = np.convolve(losses, window, "same") / np.convolve(np.ones_like(losses), window, "same")
            (line,) = curves.plot(steps, means, linewidth=2, label=key.removeprefix("loss_"))
            curves.plot(steps, losses, linewidth=0.6, alpha=0.5, color=line.get_color())
    curves.set(title="training, with a running mean" if history else "no training in this run")
    curves.set(xlabel="step", ylabel="loss")
    if history:
        curves.set_yscale("log")
        curves.legend()
    names = {"text": "text_bytes", "zlib -9": "zlib_bytes", "packed ids": "packed_token_bytes", "wire": "wire_bytes"}
    byte_bars = {name: m[key] for name, key in names.items()}
    for axis, values, label in ((scores, bars, unit), (sizes, byte_bars, "bytes per prompt")):
        values = {name: value for name, value in values.items() if value is not None}
        colors = ["#c44e52" if "wire" in name else "#8c8c8c" for name in values]
        drawn = axis.barh(list(values), list(values.values()), color=colors)
        axis.bar_label(drawn, [f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values.values()], padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set_xlabel(label)
    scores.axvline(bars["text"] or 0.0, color="black", linewidth=0.8, linestyle=":")
    scores.set_title("answers: higher is better" if unit.startswith("F1") else "NLL of the text: lower is better")
    sizes.set_title("size of one prompt")
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
