"""The three figures of results/make.py, from rows that it has read from the JSON."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, RED = "#4c72b0", "#c44e52"


def stage1(path: Path, rows: dict[str, list[dict]]) -> None:
    """F1 of every adapter and code width, by reader."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, (model, bars) in zip(axes, rows.items(), strict=True):
        names = [f"{row['adapter']}\nk = {row['code_dim']}" for row in bars]
        errors = [row["std"]["f1"] for row in bars]
        means, inverse = ([row[key] for row in bars] for key in ("f1", "pca_inverse"))
        drawn = axis.bar(names, means, yerr=errors, color=RED, label="trained adapter (bar: sd over seeds)")
        axis.bar_label(drawn, fmt="%.1f", padding=2)
        axis.bar(names, inverse, width=0.3, color="#55555588", label="PCA inverse, untrained")
        axis.axhline(bars[0]["text_f1"], color="black", linestyle="--", label="text")
        axis.axhline(bars[0]["no_context_f1"], color="grey", linestyle=":", label="no context")
        axis.set(title=model, ylim=(0, 112))
    axes[0].set_ylabel("F1, 1,000 test passages")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)


def frontier(path: Path, points: dict[str, list[dict]], direct: dict[str, list[dict]], texts: dict[str, dict]) -> None:
    """Retention against bytes, and against positions.

    points: of each stage, the rows of both readers; direct: of each reader, the runs of its direct receiver; texts: of
    each reader, a run with the baselines.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    markers = {"stage 0": "x", "stage 2": "s", "stage 1": "^", "stage 3, prompt": "o", "stage 3, context": "D"}
    for (model, run), color in zip(texts.items(), (BLUE, RED), strict=True):
        for label, rows in points.items():
            for row in (row for row in rows if row["model"] == model):
                for axis, key in zip(axes, ("wire_bytes", "positions"), strict=True):
                    axis.plot(row[key], row["retention"], markers[label], color=color, label=f"{label}: {model}")
        xs, ys = ([row[key] for row in direct[model]] for key in ("positions", "retention"))
        axes[1].plot(xs, ys, "-", marker="*", markersize=9, color=color, label=f"stage 3, direct: {model}")
        whole = {"bytes": run["text_bytes"], "positions": run["text_positions"], "f1": run["text_f1"]}
        cuts = [*run["truncated"], whole]
        for axis, key in zip(axes, ("bytes", "positions"), strict=True):
            xs, ys = [cut[key] for cut in cuts], [100 * cut["f1"] / run["text_f1"] for cut in cuts]
            axis.plot(xs, ys, ":", marker=".", color=color, label=f"truncated text: {model}")
        sizes = {f"packed ids: {model}": "packed_token_bytes", f"own prediction: {model}": "llm_bound_bytes"}
        if color == BLUE:  # the same for both readers
            sizes = {"zlib -9": "zlib_bytes", "zlib, dictionary": "zlib_dictionary_bytes"} | sizes
        for label, key in sizes.items():
            axes[0].axvline(run[key], color=color if model in label else "#bbbbbb", linewidth=0.8, linestyle="--")
            axes[0].text(run[key], 3, label, rotation=90, fontsize=7, ha="right")
    axes[0].set(xscale="log", xlabel="bytes on the wire for one prompt or context", ylabel="retention, %")
    axes[1].set(xlabel="positions that the LLM reads")
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def roofline(path: Path, benches: list[dict]) -> None:
    """Speed against FLOPs a byte, under the ceilings of the same run; one picture for each machine."""
    size = (6.4 * len(benches), 4.6)
    figure, axes = plt.subplots(1, len(benches), figsize=size, layout="constrained", squeeze=False)
    styles = {"naive": ("x", "#999999"), "strong": ("^", BLUE), "compiled": ("s", "#55a868"), "ours": ("o", RED)}
    for axis, bench in zip(axes[0], benches, strict=True):
        bandwidth, flops = bench["ceilings"]["bytes_per_second"], bench["ceilings"]["flops_per_second"]
        intensities = [run["flops"] / run["bytes"] for run in bench["operator"]]
        line = [min(intensities) / 2, flops / bandwidth, max(intensities) * 2]
        roof = [min(x * bandwidth, flops) / 1e12 for x in line]
        axis.loglog(line, roof, color="black", label="measured ceilings: copy, matmul")
        for column, (marker, color) in styles.items():
            for what, fill in (("codes", "none"), ("codes, forward + backward", color)):
                chosen = [run for run in bench["operator"] if (run["what"], run["column"]) == (what, column)]
                xs, ys = [run["flops"] / run["bytes"] for run in chosen], [run["tflops"] for run in chosen]
                axis.loglog(xs, ys, marker, color=color, markerfacecolor=fill, label=f"{column}, {what}")
        axis.set(title=f"{bench['device']}, {bench['dtype']}, d 4096, k 512", xlabel="FLOPs a byte that must be moved")
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
