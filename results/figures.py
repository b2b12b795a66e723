"""The three figures of results/make.py, from rows that it has read from the JSON."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BLUE, RED, GREEN = "#4c72b0", "#c44e52", "#2a8a57"


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


def frontier(path: Path, points: dict[str, list[dict]], texts: dict[str, dict]) -> None:
    """Retention against bytes, and against positions: one colour a stage, one marker a reader.

    points: of each stage, the rows of both readers; texts: of each reader, a run with the baselines.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    stages = dict(
        zip(points, zip((RED, "#e69f00", BLUE, GREEN, "#8b5fbf"), (9, 5, 10, 15, 9), strict=True), strict=True)
    )
    names = {model: plt.Line2D([], [], color="black", marker=m, ls="") for model, m in zip(texts, "os", strict=True)}
    for model, run in texts.items():
        marker, whole = names[model].get_marker(), {"f1": run["text_f1"]}
        whole |= {"bytes": run["text_bytes"], "positions": run["text_positions"]}
        for axis, key, cut_key in zip(axes, ("wire_bytes", "positions"), ("bytes", "positions"), strict=True):
            cuts = [(cut[cut_key], 100 * cut["f1"] / run["text_f1"]) for cut in (*run["truncated"], whole)]
            axis.plot(*zip(*cuts, strict=True), ":", marker=marker, markersize=2, color="black", linewidth=1)
            for stage, (color, size) in stages.items():  # rings of their own size, where stages lie on one point
                found = [(row[key], row["retention"]) for row in points[stage] if row["model"] == model]
                style = dict(markersize=size, color=color, markerfacecolor="none", markeredgewidth=2)
                axis.plot(*zip(*found, strict=True), marker, **style)
    rivals = {"the LLM's own prediction": ("llm_bound_bytes", -1, 4), "text": ("text_bytes", 1, 4)}
    rivals |= {"zlib, dictionary": ("zlib_dictionary_bytes", -1, 45), "zlib -9": ("zlib_bytes", 1, 4)}
    rivals["packed ids"] = ("packed_token_bytes", 1, 72)
    for label, (key, side, height) in rivals.items():  # a band from one reader to the other
        ends = sorted(run[key] for run in texts.values())
        axes[0].axvspan(*ends, color="#bbbbbb", zorder=0)
        place = dict(xytext=(3 * side, 0), textcoords="offset points", ha="left" if side > 0 else "right")
        axes[0].annotate(label, (ends[side > 0], height), rotation=90, color="#555555", **place)
    axes[0].set(xscale="log", xlabel="bytes on the wire for one prompt", ylabel="retention, %")
    axes[0].xaxis.set_major_formatter("{x:,.0f}")
    axes[1].set(xlabel="positions that the LLM reads")
    figure.suptitle("better: higher, and further to the left")
    entries = {stage: plt.Line2D([], [], color=color, linewidth=6) for stage, (color, _) in stages.items()}
    entries |= {"truncated text": plt.Line2D([], [], color="black", linestyle=":")}
    entries |= {f"reader {model}": line for model, line in names.items()}
    axes[1].legend(entries.values(), entries.keys(), loc="lower right")
    figure.savefig(path, dpi=110)


def roofline(path: Path, benches: list[dict]) -> None:
    """Speed against FLOPs a byte, under the ceilings of the same run; one picture for each machine."""
    size = (6.4 * len(benches), 4.6)
    figure, axes = plt.subplots(1, len(benches), figsize=size, layout="constrained", squeeze=False)
    styles = {"naive": ("x", "#999999"), "strong": ("^", BLUE), "compiled": ("s", "#55a868"), "ours": ("o", RED)}
    for axis, bench in zip(axes[0], benches, strict=True):
        shape = bench["operator"][0]
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
        axis.set(
            title=f"{bench['device']}, {bench['dtype']}, d {shape['d']}, k {shape['k']}",
            xlabel="FLOPs a byte that must be moved",
        )
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
