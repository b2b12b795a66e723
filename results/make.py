"""README table and figure of stage 1 from the JSON in results/stage1/. Nothing in them is typed by hand.

python results/make.py            # rewrites the README between its markers, and results/stage1.png
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
    tables = {"headline": headline, "adapters": adapters, "real-weights": real_weights, "identity": identity}
    text = README.read_text(encoding="utf-8")
    for name, make in tables.items():
        start, end = f"<!-- stage1-{name} -->", f"<!-- /stage1-{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = "\n".join([before + start, *make(rows), end]) + after
    if args.check:
        sys.exit(text != README.read_text(encoding="utf-8"))
    README.write_text(text, encoding="utf-8", newline="\n")
    draw(rows, HERE / "stage1.png")


if __name__ == "__main__":
    main()
