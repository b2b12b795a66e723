"""README tables and figures from the JSON in results/. Nothing in them is typed by hand.

python results/make.py            # rewrites the README between its markers, results/stage1.png and results/roofline.png
python results/make.py --check    # exit code 1 if the README does not say what the JSON says
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
ORDER = ("tiny", "tiny-qwen")


def load(folder: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((HERE / folder).glob("*.json"))]


def benchmarks() -> list[dict]:
    """What kernels/bench.py measured, by machine; GPUs first."""
    return sorted(
        (row for row in load("kernels") if "operator" in row), key=lambda row: row["device"].startswith("CPU")
    )


def spread(rows: list[dict], key: str) -> str:
    """mean, or mean and sample standard deviation over seeds."""
    values = [row["metrics"][key] if key in row["metrics"] else row["controls"][key] for row in rows]
    if any(value is None for value in values):
        return "n/a"
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def grouped(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(sorted(groups.items(), key=lambda pair: (ORDER.index(pair[0][0]), -pair[0][1], *map(str, pair[0][2:]))))


def without_seed(command: str) -> str:
    words = command.split()
    if "--seed" in words:
        at = words.index("--seed")
        words[at + 1] = "S"
    return " ".join(words)


def headline(rows: list[dict]) -> list[str]:
    lines = [
        "| reader | code width | F1 from text | F1 through the wire | retention, % | untrained codebook: F1 | "
        "PCA inverse: F1 | no context | shuffled | bytes: wire / text | seeds | command |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for r in rows if r["data"] == "tiny" and r["adapter"] == "codebook" and r["rms"] == "constant"]
    for (model, k), group in grouped(chosen, "model", "code_dim").items():
        metrics = group[0]["metrics"]
        times = group[0]["embedding_width"] / k
        lines.append(
            f"| {model} | {k} ({times:g}x fewer) | {spread(group, 'text_f1')} | {spread(group, 'f1')} | "
            f"{spread(group, 'retention')} | {spread(group, 'untrained')} | {spread(group, 'pca_inverse')} | "
            f"{spread(group, 'no_context_f1')} | "
            f"{spread(group, 'shuffled_f1')} | {metrics['wire_bytes']:.0f} / {metrics['text_bytes']:.0f} | "
            f"{len(group)} | `{without_seed(group[0]['command'])}` |"
        )
    return lines


def adapters(rows: list[dict]) -> list[str]:
    lines = [
        "| reader | k | adapter | RMS | KD weight | retention, % | F1 | cosine | NLL (text) | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for r in rows if r["data"] == "tiny"]
    keys = ("model", "code_dim", "adapter", "rms", "kd_weight")
    for (model, k, adapter, rms, kd), group in grouped(chosen, *keys).items():
        cosine, nll, text = (
            statistics.mean(r["metrics"][key] for r in group) for key in ("cosine", "nll_wire", "nll_text")
        )
        lines.append(
            f"| {model} | {k} | {adapter} | {rms} | {kd:g} | {spread(group, 'retention')} | {spread(group, 'f1')} | "
            f"{cosine:.3f} | {nll:.3f} ({text:.3f}) | {len(group)} |"
        )
    return lines


def real_weights(rows: list[dict]) -> list[str]:
    lines = [
        "| adapter | RMS | NLL through the wire | NLL from text | untrained | PCA inverse | identity wire | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in rows if r["data"].endswith(".txt")):
        metrics, controls = row["metrics"], row["controls"]
        lines.append(
            f"| {row['adapter']} | {row['rms']} | {metrics['nll_wire']:.3f} | {metrics['nll_text']:.3f} | "
            f"{controls['untrained']:.3f} | {controls['pca_inverse']:.3f} | {controls['identity']:.3f} | "
            f"`{row['command']}` |"
        )
    for row in (r for r in rows if r["data"].endswith(".json")):
        metrics = row["metrics"]
        lines += [
            "",
            f"On SQuAD questions (`{row['command']}`, {metrics['examples']} questions) the same model scores F1 "
            f"{metrics['text_f1']:.2f} from the text and {metrics['f1']:.2f} through the wire: a language model of "
            "260K parameters cannot answer questions, so retention says nothing there.",
        ]
    return lines


def identity(rows: list[dict]) -> list[str]:
    runs = [r for r in rows if "identity_same_answers" in r["controls"]]
    same = sum(r["controls"]["identity_same_answers"] for r in runs)
    total = sum(r["metrics"]["examples"] for r in runs)
    what = "answers are those from text"
    return [f"Identity wire (k = d, the RMS sent): {same} of {total} {what}, over all {len(runs)} runs."]


def by_seed(stage: str) -> dict[str, list[dict]]:
    """model -> its runs with the default flags, one per seed."""
    groups = defaultdict(list)
    for path in sorted((HERE / stage).glob("*-seed*.json")):
        row = json.loads(path.read_text())
        groups[row["model"]].append(row)
    return {model: groups[model] for model in ORDER if model in groups}


def duration(groups: dict[str, list[dict]]) -> list[str]:
    """How long the default run took; preferably where it had two threads (--workers 1: nothing ran beside it)."""
    rows = sorted((row for group in groups.values() for row in group), key=lambda row: -row["threads"])
    if not rows:
        return []
    m, threads = rows[0]["metrics"], rows[0]["threads"]
    beside = "two threads" if threads == 2 else "one thread, and another run beside it"
    others = sum(other["metrics"]["eval_seconds"] for other in rows[0].get("others", []))
    evaluation = m["eval_seconds"] + others
    return [
        "",
        f"`{rows[0]['command']}` with {beside}: {(m['train_seconds'] + evaluation) / 60:.1f} minutes, of which "
        f"{evaluation / 60:.1f} evaluation.",
    ]


def collapse(rows: list[dict]) -> list[str]:
    lines = [
        "| reader | F1 from text | F1 through the wire | no context | commonest answer, % | different "
        "answers to 1,000 | "
        "latents' cosine | first token right, % | seeds | command |",
        "|---" * 10 + "|",
    ]
    for model, group in by_seed("stage0").items():
        lines.append(
            f"| {model} | {spread(group, 'text_f1')} | {spread(group, 'f1')} | {spread(group, 'no_context_f1')} | "
            f"{spread(group, 'commonest_share')} | {spread(group, 'unique_answers')} | "
            f"{statistics.mean(row['controls']['latent_cosine'] for row in group):.3f} | "
            f"{spread(group, 'first_token_accuracy')} | {len(group)} | `{without_seed(group[0]['command'])}` |"
        )
    return lines + duration(by_seed("stage0"))


def causes(rows: list[dict]) -> list[str]:
    """One line of evidence for each cause, of seed 0 on each reader."""
    lines = []
    for model, group in by_seed("stage0").items():
        c, m = group[0]["controls"], group[0]["metrics"]
        lines += [
            f"- **{model}.** Too many unknowns: gradient RMS {c['gradient_encoder']:.1e} a parameter of the encoder, "
            f"{c['gradient_adapter']:.1e} of the adapter (in the first steps {c['first_gradient_encoder']:.1e} and "
            f"{c['first_gradient_adapter']:.1e}); F1 {c['random_encoder_f1']:.1f} with the encoder "
            "random again, "
            f"{c['random_adapter_f1']:.1f} with the adapter. No supervision: linear probes read "
            f"{c['probe_accuracy']:.1f}% "
            f"of the tokens off the latents, guessing {c['probe_guess']:.1f}%. Compression: 32 positions for "
            f"{m['text_positions']:.0f} tokens; {c['bits_offered']:.0f} bits offered, {c['bits_needed']:.0f} needed, "
            f"{c['effective_dimensions']:.1f} of 8192 dimensions used. Mismatch: cosine "
            f"{c['nearest_cosine']:.2f} to the nearest token (random vectors: {c['random_nearest_cosine']:.2f}), "
            f"RMS {c['rms']:.3f} against {c['real_rms']:.3f}, norm of the mean "
            f"{c['mean_norm']:.2f} against "
            f"{c['real_mean_norm']:.2f}."
        ]
    return lines


def sweep(rows: list[dict]) -> list[str]:
    lines = ["| learning rate | steps | F1 | no context | NLL of the answer | different answers |", "|---" * 6 + "|"]
    for row in sorted(load("stage0"), key=lambda row: (row["arguments"]["steps"], row["arguments"]["lr"])):
        if row["model"] == "tiny" and row["arguments"]["seed"] == 0:
            m = row["metrics"]
            lines.append(
                f"| {row['arguments']['lr']:g} | {row['arguments']['steps']} | {m['f1']:.1f} | "
                f"{m['no_context_f1']:.1f} | "
                f"{m['nll_wire']:.2f} | {m['unique_answers']} |"
            )
    return lines


def encoder(rows: list[dict]) -> list[str]:
    lines = [
        "| reader | F1 from text | F1 through the wire | retention, % | token ends, F1 | exact tokens, "
        "% | code cosine | "
        "true codes: F1 | no context | shuffled | bytes: wire / text | seeds | command |",
        "|---" * 13 + "|",
    ]
    for model, group in by_seed("stage2").items():
        m = group[0]["metrics"]
        ends, tokens, cosine = (
            statistics.mean(row["controls"][key] for row in group)
            for key in ("boundary_f1", "exact_token", "code_cosine")
        )
        lines.append(
            f"| {model} | {spread(group, 'text_f1')} | {spread(group, 'f1')} | {spread(group, 'retention')} "
            f"| {ends:.2f} | "
            f"{tokens:.2f} | {cosine:.3f} | {spread(group, 'true_codes')} | {spread(group, 'no_context_f1')} | "
            f"{spread(group, 'shuffled_f1')} | {m['wire_bytes']:.0f} / {m['text_bytes']:.0f} | {len(group)} | "
            f"`{without_seed(group[0]['command'])}` |"
        )
    return lines + duration(by_seed("stage2"))


def ablations(rows: list[dict]) -> list[str]:
    lines = [
        "| left out | F1 | retention, % | NLL (text) | token ends, F1 | exact tokens, % | command |",
        "|---" * 7 + "|",
    ]
    names = [path for path in sorted((HERE / "stage2").glob("tiny-without-*.json"))]
    for path in [HERE / "stage2" / "tiny-seed0.json", *names]:
        row = json.loads(path.read_text())
        m, c = row["metrics"], row["controls"]
        left = path.stem.removeprefix("tiny-without-").replace("-", " ") if path in names else ""
        left = {
            "boundary target": "boundary and code targets", "nothing": "nothing, at a rate of 1e-3", "": "nothing",
        }.get(left, left)  # fmt: skip
        lines.append(
            f"| {left} | {m['f1']:.1f} | {m['retention']:.1f} | {m['nll_wire']:.3f} ({m['nll_text']:.3f}) | "
            f"{c['boundary_f1']:.2f} | {c['exact_token']:.2f} | `{row['command']}` |"
        )
    if not names:
        lines.append("\nThe ablations are not measured yet: `python results/run_stages.py stage2 --only without`.")
    return lines


def harder(rows: list[dict]) -> list[str]:
    found = [row for row in load("stage2") if "harder-" in row["data"]]
    if not found:
        return ["Not measured yet: `python results/run_stages.py stage2`."]
    lines = [
        "| reader | passages | F1 from text | F1 through the wire | retention, % | token ends, F1 | exact tokens, % |",
        "|---" * 7 + "|",
    ]
    for row in sorted(found, key=lambda row: (ORDER.index(row["model"]), row["data"])):
        m, c = row["metrics"], row["controls"]
        kind = Path(row["data"]).stem.removeprefix("harder-")
        retention = "n/a" if m["retention"] is None else f"{m['retention']:.1f}"  # nothing to retain
        lines.append(
            f"| {row['model']} | {kind} | {m['text_f1']:.1f} | {m['f1']:.1f} | {retention} | "
            f"{c['boundary_f1']:.2f} | {c['exact_token']:.2f} |"
        )
    return lines


def encoder_real_weights(rows: list[dict]) -> list[str]:
    found = [row for row in load("stage2") if row["data"].endswith(".txt")]
    if not found:
        return ["On stories260k: not measured yet."]
    m, c = found[0]["metrics"], found[0]["controls"]
    return [
        f"On stories260k (`{found[0]['command']}`), the second half of a window of text, with its first "
        "half read through "
        f"the wire: {m['nll_wire']:.3f} nats per token, against {m['nll_text']:.3f} from text and "
        f"{c['true_codes']:.3f} "
        f"with the true codes; token ends {c['boundary_f1']:.2f}, exact tokens {c['exact_token']:.2f}%."
    ]


def readings(row: dict) -> list[dict]:
    """A stage-3 row as one for each receiver, in ORDER."""
    parts = [{**row, "metrics": row["metrics"], "controls": row["controls"]}, *({**row, **o} for o in row["others"])]
    return sorted(parts, key=lambda part: ORDER.index(part["metrics"]["model"]))


def full(pattern: str) -> dict[tuple[str, str], list[dict]]:
    """(what travels, reader) -> stage-3 measurements of the runs whose names fit."""
    groups = defaultdict(list)
    for path in sorted((HERE / "stage3").glob(pattern)):
        for part in readings(json.loads(path.read_text())):
            groups[part["wire_carries"], part["metrics"]["model"]].append(part)
    return dict(sorted(groups.items(), key=lambda pair: (pair[0][0] != "prompt", ORDER.index(pair[0][1]))))


def ladder(rows: list[dict]) -> list[str]:
    lines = [
        "| stage | reader | what is learned | F1 from text | F1 through the wire | retention, % | bytes (text) | "
        "positions (text) | seeds |",
        "|---" * 9 + "|",
    ]
    learned = {
        "stage0": "all at once, from the answer",
        "stage1": "the adapter",
        "stage2": "+ the encoder",
        "stage3": "+ the message",
    }
    groups = {(stage, model): rows for stage in ("stage0", "stage2") for model, rows in by_seed(stage).items()}
    for model, width in (("tiny", 24), ("tiny-qwen", 20)):
        groups["stage1", model] = [
            row for row in rows if (row["model"], row["code_dim"], row["adapter"]) == (model, width, "codebook")
            and row["rms"] == "constant" and row["data"] == "tiny"
        ]  # fmt: skip
    groups |= {("stage3", model): parts for (what, model), parts in full("seed*.json").items() if what == "prompt"}
    for (stage, model), group in sorted(groups.items(), key=lambda pair: (pair[0][0], ORDER.index(pair[0][1]))):
        mean = {
            key: statistics.mean(row["metrics"][key] for row in group)
            for key in ("wire_bytes", "text_bytes", "positions", "text_positions")
        }
        lines.append(
            f"| {stage[-1]} | {model} | {learned[stage]} | {spread(group, 'text_f1')} | {spread(group, 'f1')} | "
            f"{spread(group, 'retention')} | {mean['wire_bytes']:.0f} ({mean['text_bytes']:.0f}) | "
            f"{mean['positions']:.0f} ({mean['text_positions']:.0f}) | {len(group)} |"
        )
    return lines


def message(rows: list[dict]) -> list[str]:
    lines = [
        "| what travels | reader | F1 from text | F1 through the wire | retention, % | no context | shuffled | "
        "bytes | text | zlib -9 | zlib -9, dictionary | packed token ids | this LLM's own prediction | "
        "seeds | command |",
        "|---" * 15 + "|",
    ]
    groups = full("seed*.json")
    if not groups:
        return ["Not measured yet: `python results/run_stages.py stage3`."]
    for (what, model), group in groups.items():
        bound = spread(group, "llm_bound_bytes") if what == "prompt" else ""
        lines.append(
            f"| {what} | {model} | {spread(group, 'text_f1')} | {spread(group, 'f1')} | {spread(group, 'retention')} | "
            f"{spread(group, 'no_context_f1')} | {spread(group, 'shuffled_f1')} | **{spread(group, 'wire_bytes')}** | "
            f"{group[0]['metrics']['text_bytes']:.0f} | {group[0]['metrics']['zlib_bytes']:.0f} | "
            f"{group[0]['controls']['zlib_dictionary_bytes']:.0f} | {group[0]['metrics']['packed_token_bytes']:.0f} | "
            f"{bound} | {len(group)} | `{without_seed(group[0]['command']).replace('/seed0', '/seedS')}` |"
        )
    arrived = sum(row["controls"]["arrived"] for group in groups.values() for row in group)
    total = sum(row["metrics"]["examples"] for group in groups.values() for row in group)
    return [
        *lines,
        "",
        f"Texts that arrive bit for bit: {arrived} of {total}.",
        *duration({"": groups["prompt", "tiny"]}),
    ]


def message_ablations(rows: list[dict]) -> list[str]:
    lines = ["| left out | bytes of a prompt | retention, % | command |", "|---" * 4 + "|"]
    names = {"seed0": "nothing", "one-receiver": "the second receiver", "without-copies": "copying from the message"}
    names |= {"without-context": "the last 8 indices", "without-prediction": "any prediction: 10 bits an index"}
    for name, what in names.items():
        path = HERE / "stage3" / f"{name}.json"
        if path.exists():
            row = json.loads(path.read_text())
            m = readings(row)[0]["metrics"]
            lines.append(f"| {what} | {m['wire_bytes']:.1f} | {m['retention']:.1f} | `{row['command']}` |")
    return lines


def direct_runs(short: bool = False) -> list[dict]:
    """Stage-3 measurements of direct receivers, by reader and rate; or the short runs that compare what they learn."""
    steps = 300 if short else 1600  # the 2,000 before those 1,600 only made the wire that they start from
    chosen = [row for row in load("stage3") if row.get("receiver") == "direct" and row["metrics"]["steps"] == steps]
    return sorted(chosen, key=lambda row: (ORDER.index(row["metrics"]["model"]), row["rate"]))


def message_direct(rows: list[dict]) -> list[str]:
    lines = [
        "| reader | tokens of a context a position | F1 from text | F1 through the wire | retention, % | no context | "
        "shuffled | text cut to as many positions | positions (text) | prefill: MFLOPs (unpacked) | "
        "keys and values, KB (unpacked) | text to first token, ms (unpacked) | command |",
        "|---" * 13 + "|",
    ]
    for row in direct_runs():
        m, cost = row["metrics"], row["controls"]["prefill"]
        new, old = cost["direct"], cost["unpack"]
        lines.append(
            f"| {m['model']} | {row['rate']:g} | {m['text_f1']:.1f} | {m['f1']:.1f} | {m['retention']:.1f} | "
            f"{m['no_context_f1']:.1f} | {m['shuffled_f1']:.1f} | {m['truncated_f1']:.1f} | "
            f"{m['positions']:.0f} ({m['text_positions']:.0f}) | "
            f"{new['flops'] / 1e6:.0f} ({old['flops'] / 1e6:.0f}) | "
            f"{new['kv_bytes'] / 1e3:.0f} ({old['kv_bytes'] / 1e3:.0f}) | {new['ms']:.0f} ({old['ms']:.0f}) | "
            f"`{row['command']}` |"
        )
    return lines if len(lines) > 2 else ["Not measured yet: `python results/run_stages.py stage3 --only direct`."]


def message_direct_ablations(rows: list[dict]) -> list[str]:
    lines = ["| learns from | F1 through the wire | retention, % | command |", "|---" * 4 + "|"]
    learns = {None: "the answer, the teacher's answer, the teacher's states"}
    learns |= {"states": "the answer, the teacher's answer", "teacher": "the answer"}
    for row in sorted(direct_runs(short=True), key=lambda row: list(learns).index(row["untaught"])):
        m = row["metrics"]
        lines.append(f"| {learns[row['untaught']]} | {m['f1']:.1f} | {m['retention']:.1f} | `{row['command']}` |")
    return lines


def message_harder(rows: list[dict]) -> list[str]:
    lines = ["| passages | reader | bytes | text | zlib -9 | retention, % |", "|---" * 6 + "|"]
    for row in (row for row in load("stage3") if "harder-" in row["data"]):
        for part in readings(row):
            m, kind = part["metrics"], Path(row["data"]).stem.removeprefix("harder-")
            retention = "n/a" if m["retention"] is None else f"{m['retention']:.1f}"
            lines.append(
                f"| {kind} | {m['model']} | {m['wire_bytes']:.0f} | {m['text_bytes']:.0f} | {m['zlib_bytes']:.0f} | "
                f"{retention} |"
            )
    return lines


def draw_frontier(rows: list[dict], path: Path) -> None:
    """Retention against bytes, and against positions: every stage, both readers, and the baselines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True, sharey=True)
    for model, color in zip(ORDER, ("#4c72b0", "#c44e52"), strict=True):
        points = []  # (label, marker, rows)
        for stage, marker in (("stage0", "x"), ("stage2", "s")):
            points.append((f"{stage[:-1]} {stage[-1]}", marker, by_seed(stage).get(model, [])))
        chosen = [r for r in rows if r["model"] == model and r["data"] == "tiny" and r["adapter"] == "codebook"]
        for group in grouped([r for r in chosen if r["rms"] == "constant"], "model", "code_dim").values():
            points.append(("stage 1", "^", group))
        for (what, name), group in full("seed*.json").items():
            if name == model:
                points.append((f"stage 3, {what}", {"prompt": "o", "context": "D"}[what], group))
        for label, marker, group in points:
            if not group:
                continue
            m = {k: statistics.mean(r["metrics"][k] for r in group) for k in ("retention", "wire_bytes", "positions")}
            for axis, key in zip(axes, ("wire_bytes", "positions"), strict=True):
                axis.plot(m[key], m["retention"], marker, color=color, label=f"{label}: {model}")
        direct = [r for r in direct_runs() if r["metrics"]["model"] == model]
        if direct:
            xs, ys = zip(*((r["metrics"]["positions"], r["metrics"]["retention"]) for r in direct), strict=True)
            axes[1].plot(xs, ys, "-", marker="*", markersize=9, color=color, label=f"stage 3, direct: {model}")
        group = full("seed0.json").get(("prompt", model), [])
        if not group:
            continue
        m, c = group[0]["metrics"], group[0]["controls"]
        cuts = [*c["truncated"], {"bytes": m["text_bytes"], "positions": m["text_positions"], "f1": m["text_f1"]}]
        for axis, key in zip(axes, ("bytes", "positions"), strict=True):
            xs, ys = [cut[key] for cut in cuts], [100 * cut["f1"] / m["text_f1"] for cut in cuts]
            axis.plot(xs, ys, ":", marker=".", color=color, label=f"truncated text: {model}")
        for value, label in (
            (m["zlib_bytes"], "zlib -9"),
            (c["zlib_dictionary_bytes"], "zlib, dictionary"),
            (m["packed_token_bytes"], f"packed ids: {model}"),
            (c["llm_bound_bytes"], f"own prediction: {model}"),
        ):
            if model == ORDER[0] or model in label:
                axes[0].axvline(value, color=color if model in label else "#bbbbbb", linewidth=0.8, linestyle="--")
                axes[0].text(value, 3, label, rotation=90, fontsize=7, ha="right")
    axes[0].set(xscale="log", xlabel="bytes on the wire for one prompt or context", ylabel="retention, %")
    axes[1].set(xlabel="positions that the LLM reads")
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def provenance(bench: dict) -> str:
    versions = bench["versions"]
    with_triton = f", triton {versions['triton']}" if "triton" in versions else ""
    return f"{bench['device']}, {bench['dtype']}, torch {versions['torch']}{with_triton}, commit {bench['commit']}"


def operator(rows: list[dict]) -> list[str]:
    """Times of every column, and how many times faster ours is than each of the others, at every N."""
    lines = []
    for bench in benchmarks():
        ceiling = bench["ceilings"]
        columns = list(dict.fromkeys(row["column"] for row in bench["operator"] if row["column"] != "ours"))
        lines += [
            f"{provenance(bench)}; ceilings of the same run: {ceiling['bytes_per_second'] / 1e9:.0f} GB/s copy, "
            f"{ceiling['flops_per_second'] / 1e12:.3g} TFLOP/s matmul. Medians of {bench['repeats']}.",
            "",
            f"| from | N | ours, ms | of the floor, % | {' | '.join(f'{c} / ours' for c in columns)} | error: ours |",
            "|---" * (5 + len(columns)) + "|",
        ]
        groups = defaultdict(dict)
        for row in bench["operator"]:
            groups[row["what"], row["N"]][row["column"]] = row
        shown = {1, 512, max(N for _, N in groups)} if bench["device"].startswith("CPU") else {N for _, N in groups}
        for (what, N), group in ((key, group) for key, group in groups.items() if key[1] in shown):
            ours = group["ours"]
            ratios = [f"{group[c]['p50_us'] / ours['p50_us']:.2f}x" if c in group else "" for c in columns]
            error = f"{ours['error']:.1e}" if "error" in ours else ""
            lines.append(
                f"| {what} | {N} | {ours['p50_us'] / 1e3:.3f} | {100 * ours['floor_us'] / ours['p50_us']:.0f} | "
                f"{' | '.join(ratios)} | {error} |"
            )
        lines.append("")
    if all(bench["device"].startswith("CPU") for bench in benchmarks()):
        lines.append("On a GPU: not measured. `python results/run_kernels.py && python results/make.py` adds the rows.")
    return lines


def step(rows: list[dict]) -> list[str]:
    lines = [
        "| machine | LLM | layers | d -> k | adapter | batch | unique tokens | step, ms | without a wire, ms | "
        "the wire's share, % |",
        "|---" * 10 + "|",
    ]
    for bench in benchmarks():
        for row in bench["step"]:
            lines.append(
                f"| {bench['device']} | {row['reader']} | {row['layers']} | {row['d']} -> {row['k']} | "
                f"{row['adapter']} | "
                f"{' x '.join(map(str, row['batch']))} | {row['unique_tokens']} | {row['step']['p50_us'] / 1e3:.0f} | "
                f"{row['without_wire']['p50_us'] / 1e3:.0f} | {100 * row['wire_share']:.1f} |"
            )
    return lines


def codebook(rows: list[dict]) -> list[str]:
    lines = [
        "| machine | V, d, k | scores, ms | softmax, ms | values and RMS, ms | all, ms | library attention, ms |",
        "|---" * 7 + "|",
    ]
    for bench in benchmarks():
        groups = defaultdict(dict)
        for row in bench["codebook"]:
            groups[row["V"], row["d"], row["k"]][row["part"]] = f"{row['p50_us'] / 1e3:.2f}"
        for sizes, parts in groups.items():
            cells = [parts[part] for part in ("scores", "softmax", "values and RMS", "all", "attention")]
            lines.append(f"| {bench['device']} | {', '.join(map(str, sizes))} | {' | '.join(cells)} |")
    return lines


def compiled(rows: list[dict]) -> list[str]:
    aot = next(row for row in load("kernels") if "kernels" in row)
    lines = [
        f"triton {aot['triton']}, bfloat16, sm_90. The other dtypes, sm_80 and sm_89: `results/kernels/aot.json`.",
        "",
        "| launch | registers | stack, spills | shared, KB of 227 | occupancy | wgmma | tiles, warps, stages |",
        "|---" * 7 + "|",
    ]
    for row in aot["kernels"]:
        if (row["arch"], row["dtype"]) == ("sm_90", "bfloat16"):
            tiles = dict(row["tiles"])
            warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
            lines.append(
                f"| {row['launch']} | {row['registers']} | {row['stack_bytes']}, {row['spill_stores']} | "
                f"{row['shared_bytes'] / 1024:.0f} | {row['occupancy']:.2f} | {'yes' if row['wgmma'] else 'no'} | "
                f"{' '.join(f'{name} {size}' for name, size in tiles.items())}, {warps}, {stages} |"
            )
    return lines


def scale_steps(rows: list[dict]) -> list[str]:
    lines = [
        "| machine | LLM, layers | adapter | checkpointing | batch | step, s | LLM alone, s | plain, s | "
        "the wire's share, % | plain / wire, time | wire / plain, memory | tokens/s | MFU, % | "
        "peak, GB (plain) | command |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in load("scale") if "ways" in r):
        wire, alone, plain = (row["ways"][name] for name in ("wire", "LLM alone", "plain"))
        cells = [
            f"CPU, {row['threads']} threads" if row["device"] == "cpu" else row["device"],
            f"{row['model']}, {row['layers']}",
            row["adapter"],
            "yes" if row["gradient_checkpointing"] else "no",
            f"{row['batch'][0]} x {row['batch'][1]}",
            *(f"{way['seconds']:.1f}" for way in (wire, alone, plain)),
            f"{100 * row['wire_share']:.1f}",
            f"{row['plain_over_wire']:.2f}x",
            f"{row['memory_over_plain']:.2f}x",
            f"{wire['tokens_per_second']:.0f}",
            f"{100 * wire['mfu']:.0f}",
            f"{wire['peak_bytes'] / 1e9:.2f} ({plain['peak_bytes'] / 1e9:.2f})",
            f"`{row['command']}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def scale_dry(rows: list[dict]) -> list[str]:
    lines = [
        "| model | adapter | k | trained, M | weights, GB | training, GB (checkpointing) | evaluation, GB | "
        "fits a GPU of (checkpointing) | PCA, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((r for r in load("scale") if "fits" in r), key=lambda r: r["parameters"]):
        training = row["training_bytes"]
        smallest = {name: cards[0] for name, cards in row["fits"].items()}
        lines.append(
            f"| {row['model']} | {row['adapter']} | {row['k']} | {row['trained_parameters'] / 1e6:.1f} | "
            f"{row['held']['weights'] / 1e9:.1f} | {training['without'] / 1e9:.1f} ({training['with'] / 1e9:.1f}) | "
            f"{row['evaluation_bytes'] / 1e9:.1f} | {smallest['without']} ({smallest['with']}) | "
            f"{row['pca_seconds']:.0f} |"
        )
    return lines


def draw_roofline(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    benches = benchmarks()
    figure, axes = plt.subplots(1, len(benches), figsize=(6.4 * len(benches), 4.6), squeeze=False, layout="constrained")
    for axis, bench in zip(axes[0], benches, strict=True):
        ceiling = bench["ceilings"]
        intensities = [row["flops"] / row["bytes"] for row in bench["operator"]]
        line = [min(intensities) / 2, ceiling["flops_per_second"] / ceiling["bytes_per_second"], max(intensities) * 2]
        roof = [min(x * ceiling["bytes_per_second"], ceiling["flops_per_second"]) / 1e12 for x in line]
        axis.loglog(line, roof, color="black", label="measured ceilings: copy, matmul")
        styles = {
            "naive": ("x", "#999999"),
            "strong": ("^", "#4c72b0"),
            "compiled": ("s", "#55a868"),
            "ours": ("o", "#c44e52"),
        }
        for column, (marker, color) in styles.items():
            for what, fill in (("codes", "none"), ("codes, forward + backward", color)):
                chosen = [r for r in bench["operator"] if (r["what"], r["column"]) == (what, column)]
                axis.loglog(
                    [r["flops"] / r["bytes"] for r in chosen], [r["tflops"] for r in chosen], marker, color=color,
                    markerfacecolor=fill, label=f"{column}, {what}",
                )  # fmt: skip
        axis.set(title=f"{bench['device']}, {bench['dtype']}, d 4096, k 512", xlabel="FLOPs a byte that must be moved")
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [r for r in rows if r["data"] == "tiny" and r["rms"] == "constant" and not r["kd_weight"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True, sharey=True)
    for axis, model in zip(axes, ORDER, strict=True):
        groups = grouped([r for r in chosen if r["model"] == model], "model", "code_dim", "adapter")
        bars = {f"{adapter}\nk = {k}": group for (_, k, adapter), group in groups.items()}
        means = [statistics.mean(r["metrics"]["f1"] for r in group) for group in bars.values()]
        errors = [statistics.stdev([r["metrics"]["f1"] for r in g]) if len(g) > 1 else 0 for g in bars.values()]
        drawn = axis.bar(list(bars), means, yerr=errors, color="#c44e52", label="trained adapter (bar: sd over seeds)")
        axis.bar_label(drawn, fmt="%.1f", padding=2)
        inverse = [statistics.mean(r["controls"]["pca_inverse"] for r in group) for group in bars.values()]
        axis.bar(list(bars), inverse, width=0.3, color="#55555588", label="PCA inverse, untrained")
        text = statistics.mean(r["metrics"]["text_f1"] for group in bars.values() for r in group)
        blind = statistics.mean(r["metrics"]["no_context_f1"] for group in bars.values() for r in group)
        axis.axhline(text, color="black", linestyle="--", label="text")
        axis.axhline(blind, color="grey", linestyle=":", label="no context")
        axis.set(title=model, ylim=(0, 112))
    axes[0].set_ylabel("F1, 1,000 test passages")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the README is out of date")
    args = parser.parse_args()
    rows = load("stage1")
    for model in {row["model"] for row in rows}:
        if len({row["fingerprint"] for row in rows if row["model"] == model}) > 1:
            sys.exit(f"error: results/stage1 holds runs on different weights of {model}: delete the old ones")
    tables = {
        "stage0-collapse": collapse,
        "stage0-causes": causes,
        "stage0-sweep": sweep,
        "stage2-encoder": encoder,
        "stage2-ablations": ablations,
        "stage2-harder": harder,
        "stage2-real-weights": encoder_real_weights,
        "stage3-message": message,
        "stage3-ablations": message_ablations,
        "stage3-direct": message_direct,
        "stage3-direct-ablations": message_direct_ablations,
        "stage3-harder": message_harder,
        "ladder": ladder,
        "stage1-headline": headline,
        "stage1-adapters": adapters,
        "stage1-real-weights": real_weights,
        "stage1-identity": identity,
        "kernels-operator": operator,
        "kernels-step": step,
        "kernels-codebook": codebook,
        "kernels-compiled": compiled,
        "scale-steps": scale_steps,
        "scale-dry": scale_dry,
    }
    text = README.read_text(encoding="utf-8")
    for name, make in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = "\n".join([before + start, *make(rows), end]) + after
    if args.check:
        sys.exit(text != README.read_text(encoding="utf-8"))
    README.write_text(text, encoding="utf-8", newline="\n")
    draw(rows, HERE / "stage1.png")
    draw_frontier(rows, HERE / "frontier.png")
    draw_roofline(HERE / "roofline.png")


if __name__ == "__main__":
    main()
