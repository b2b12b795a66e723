"""Tables, figures and a few sentences from the JSON in results/. No number in them is typed by hand.

python results/make.py            # rewrites README.md and results/README.md between their markers, and three figures
python results/make.py --check    # changes nothing; exit code 1 if a file does not say what the JSON says

The lines between <!-- stage1-headline --> and <!-- /stage1-headline --> are those that stage1_headline() returns.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCKS = {
    HERE.parent / "README.md": "ladder stage0-number stage1-number stage2-number stage3-number slots-number",
    HERE / "README.md": (
        "readers-scores readers-depth stage0-collapse stage0-causes stage0-sweep stage1-headline stage1-identity "
        "stage1-adapters stage1-real-weights stage2-encoder stage2-ablations stage2-harder stage2-real-weights "
        "stage2-vocabulary stage3-message stage3-rivals stage3-harder slots-rates slots-harder slots-ceilings "
        "slots-widths slots-costs kernels-operator kernels-codebook kernels-compiled scale-dry scale-steps"
    ),
}
MODELS = ("tiny", "tiny-qwen")
ORDER = (*MODELS, "prompt", "context")  # what comes first in a table

# ---------------------------------------------------------------------------------------------------------------------
# rows: a row is one run, or the runs that differ in their seed alone


def mean_and_std(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def merged(runs: list[dict]) -> dict:
    """One row for all these runs: a number becomes its mean, and row["score"] has texts such as "97.2 ± 0.1"."""
    row = runs[0] | {"score": defaultdict(lambda: "n/a"), "std": {}}
    for key, value in runs[0].items():
        if isinstance(value, int | float):
            values = [run[key] for run in runs]
            row[key], row["score"][key] = statistics.mean(values), mean_and_std(values)
            row["std"][key] = statistics.stdev(values) if len(runs) > 1 else 0
    if len(runs) > 1:
        row["command"] = re.sub(r"(--seed |/seed)\d", r"\1S", row["command"])
    return row | {"seeds": len(runs), "over": "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"}


def flat(run: dict) -> dict:
    """The run with its metrics and its controls beside everything else."""
    return merged([run | run.get("metrics", {}) | run.get("controls", {})])


def load(folder: str) -> list[dict]:
    paths = sorted((HERE / folder).glob("*.json"))
    return [flat(json.loads(path.read_text(encoding="utf-8"))) | {"file": path.stem} for path in paths]


def in_order(runs: list[dict], *keys: str) -> list[dict]:
    """Sorted by these keys: as ORDER says, wide codes before narrow ones, everything else by its value."""

    def rank(value):
        return ORDER.index(value) if value in ORDER else -value if isinstance(value, int) else value

    return sorted(runs, key=lambda run: [rank(run[key]) for key in keys])


def grouped(runs: list[dict], *keys: str) -> list[dict]:
    """A row for all runs that agree in these keys, sorted by them."""
    groups = defaultdict(list)
    for run in in_order(runs, *keys):
        groups[tuple(run[key] for key in keys)].append(run)
    return [merged(group) for group in groups.values()]


def named(runs: list[dict], *files: str) -> list[dict]:
    return [run for file in files for run in runs if run["file"] == file]


FOLDERS = "readers stage0 stage1 stage2 stage3 slots ceilings costs rivals kernels scale".split()
READERS, STAGE0, STAGE1, STAGE2, STAGE3, SLOTS, CEILINGS, COSTS, RIVALS, KERNELS, SCALE = map(load, FOLDERS)
ADAPTERS = [run for run in STAGE1 if run["data"] == "tiny"]
READINGS = [flat(run | other) for run in STAGE3 for other in ({}, *run["others"])]  # one for each receiver
BENCHES = sorted((run for run in KERNELS if "operator" in run), key=lambda bench: bench["device"].startswith("CPU"))


def readers(runs: list[dict]) -> list[dict]:
    """The default run of stage 0 or 2, or of slots, over its seeds: a row for each reader."""
    return grouped([run for run in runs if "-seed" in run["file"]], "model")


def adapter_rows(adapter: str, times: int | None = None) -> list[dict]:
    """Stage 1 with this adapter, over its seeds: a row for each reader and width, or for codes `times` smaller."""
    rows = grouped([run for run in ADAPTERS if run["adapter"] == adapter], "model", "code_dim")
    return [row for row in rows if times in (None, row["embedding_width"] // row["code_dim"])]


def message_rows(carries: str) -> list[dict]:
    """The default run of stage 3, over its seeds: a row for each reader."""
    runs = [run for run in READINGS if run["file"].startswith("seed") and run["wire_carries"] == carries]
    return grouped(runs, "model")


# ---------------------------------------------------------------------------------------------------------------------
# tables: a column is a template that is filled with the row, or a function of the row

Columns = dict[str, str | Callable[[dict], str]]
READER: Columns = {"reader": "{model}"}
F1: Columns = {"F1 from text": "{score[text_f1]}", "F1 through the wire": "{score[f1]}"}
RETENTION: Columns = {"retention, %": "{score[retention]}"}
NLL: Columns = {"NLL (text)": "{nll_wire:.3f} ({nll_text:.3f})"}
TOKENS: Columns = {"token ends, F1": "{boundary_f1:.2f}", "exact tokens, %": "{exact_token:.2f}"}
CONTROLS: Columns = {"no context": "{score[no_context_f1]}", "shuffled": "{score[shuffled_f1]}"}
BYTES: Columns = {"bytes (text)": "{wire_bytes:.0f} ({text_bytes:.0f})"}
POSITIONS: Columns = {"positions (text)": "{positions:.0f} ({text_positions:.0f})"}
RUNS: Columns = {"seeds": "{seeds}", "command": "`{command}`"}
COMMAND: Columns = {"command": "`{command}`"}


def table(rows: list[dict], columns: Columns) -> list[str]:
    if not rows:
        return ["Not measured with these readers."]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [cell.format_map(row) if isinstance(cell, str) else cell(row) for cell in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def in_units(unit: float, *keys: str, form: str = "{:.1f}") -> Callable[[dict], str]:
    """A column of a number, which may lie some keys deep in the row, in another unit."""

    def cell(row: dict) -> str:
        for key in keys:
            row = row[key]
        return form.format(row / unit)

    return cell


def with_minutes(run: dict) -> dict:
    evaluation = run["eval_seconds"] + sum(other["metrics"]["eval_seconds"] for other in run.get("others", []))
    threads = "1 thread, beside other runs" if run["threads"] == 1 else f"{run['threads']} threads"
    return run | {"minutes": (run["train_seconds"] + evaluation) / 60, "tested": evaluation / 60, "on": threads}


def duration(run: dict) -> list[str]:
    line = "`{command}` took {minutes:.1f} minutes with {on}; {tested:.1f} of them were evaluation."
    return ["", line.format_map(with_minutes(run))]


# ---------------------------------------------------------------------------------------------------------------------
# the main README: the ladder, and what to remember of each stage


def ladder() -> list[str]:
    learned = {"stage0": "all at once, from the answer", "stage1": "the adapter: {adapter}"}
    learned |= {"stage2": "+ the encoder", "stage3": "+ the message", "slots": "fewer positions"}
    rows = readers(STAGE0) + adapter_rows("mlp", 8) + readers(STAGE2) + message_rows("prompt")
    columns = {"stage": lambda row: "3, slots" if row["stage"] == "slots" else row["stage"][-1]} | READER
    columns |= {"what is learned": lambda row: learned[row["stage"]].format_map(row)}
    columns |= F1 | RETENTION | BYTES | POSITIONS | {"minutes": in_units(60, "train_seconds", form="{:.0f}")}
    return table(in_order(rows, "stage", "model") + readers(SLOTS), columns | {"seeds": "{seeds}"})


def stage0_number() -> list[str]:
    text = (
        "Through the wire, the LLM scores F1 {score[f1]}. It scores {text_f1:.1f} when it reads the text, and "
        "{no_context_f1:.1f} when it reads the question alone (reader {model}, {examples:,} test passages, {over}"
        "): `{command}`"
    )
    return [text.format_map(readers(STAGE0)[0])]


def stage1_number() -> list[str]:
    row = adapter_rows("mlp", 8)[0]
    text = (
        "With 8x fewer numbers per token, the LLM keeps {score[retention]}% of its F1 from text; before training, with "
        "the inverse of the PCA, it keeps {inverse}% (reader {model}, {examples:,} test passages, {over}): "
        "`{command}`"
    )
    return [text.format_map(row | {"inverse": mean_and_std([100 * row["pca_inverse"] / row["text_f1"]])})]


def stage2_number() -> list[str]:
    text = (
        "The LLM keeps {score[retention]}% of its F1 from text. The encoder finds the ends of the tokens with F1 "
        "{boundary_f1:.2f}, and {exact_token:.2f}% of the tokens are exactly right (reader {model}, {examples:,} test "
        "passages, {over}): `{command}`"
    )
    without = "Where the codes learn from the answers alone, without their known target, F1 is {f1:.1f}: `{command}`"
    (alone,) = named(STAGE2, "tiny-without-code-target")
    shares = listed(f"{run['exact_token']:.1f}" for run in vocabulary())
    steps = listed(f"{run['steps']:,}" for run in vocabulary())
    wanted = (
        f"A real vocabulary wants more steps. With GPT-2's 50,257 tokens on SQuAD, {shares}% of the tokens are exactly "
        f"right after {steps} steps (100 test paragraphs, 1 seed): `python results/run_stages.py stage2 --only gpt2`"
    )
    return [text.format_map(readers(STAGE2)[0]), "", without.format_map(alone) + ".", wanted]


def listed(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}"


def vocabulary() -> list[dict]:
    """Stage 2 with GPT-2's tokenizer, after more and more steps."""
    return sorted((run for run in STAGE2 if run["file"].startswith("gpt2-")), key=lambda run: run["steps"])


def stage3_number() -> list[str]:
    text = (
        "A message has {0[score][wire_bytes]} bytes. The text has {0[text_bytes]:.0f} bytes, or {0[zlib_bytes]:.0f} "
        "after zlib -9. From the same message, {0[model]} keeps {0[score][retention]}% of its F1 from text, and "
        "{1[model]} keeps {1[score][retention]}% ({0[examples]:,} test passages, {0[over]}): `{0[command]}`"
    )
    return [text.format(*message_rows("prompt"))]


def slots_number() -> list[str]:
    text = (
        "With {0[slots]:.0f} latents of 256 numbers for a context of {0[context_tokens]:.0f} tokens, {0[model]} keeps "
        "{0[score][retention]}% of its F1 from text, and {1[model]} {1[score][retention]}%. With scorers "
        "and PCA alone they keep {2[0]:.1f} and {2[1]:.1f}%, and from text cut to as many positions {3[0]:.1f} and "
        "{3[1]:.1f}% ({0[examples]:,} test passages, {0[over]}): `{0[command]}`, or with `--model {1[model]}`. "
        "Stage 0, with latents of the same shape, keeps {4[0]:.1f} and {4[1]:.1f}%."
    )
    rows = readers(SLOTS)
    kept = [[100 * row[key] / row["text_f1"] for row in rows] for key in ("start_f1", "truncated_f1")]
    return [text.format(*rows, *kept, [row["retention"] for row in readers(STAGE0)])]


# ---------------------------------------------------------------------------------------------------------------------
# results/README.md: stage by stage


def readers_scores() -> list[str]:
    """F1 from text on every test set: a row for each, a column for each reader."""
    scores = {run["model"]: run["scores"] for run in in_order(READERS, "model")}
    rows = [[name, *(scores[model][name] for model in MODELS)] for name in scores[MODELS[0]]]
    columns = {"test passages": "{0}", "rows": "{1[examples]:,}"}
    columns |= {f"F1, {model}": f"{{{at}[f1]:.1f}}" for at, model in enumerate(MODELS, 1)}
    columns |= {f"no context, {model}": f"{{{at}[no_context_f1]:.1f}}" for at, model in enumerate(MODELS, 1)}
    lines = table(rows, {title: lambda row, cell=cell: cell.format(*row) for title, cell in columns.items()})
    sizes = " and ".join(
        f"{run['squad_bytes_per_token']:.2f} bytes ({run['model']})" for run in in_order(READERS, "model")
    )
    return [*lines, "", f"A token of SQuAD's passages has {sizes} on average."]


def readers_depth() -> list[str]:
    """What hiding the passage in one layer costs, and what one layer that sees it is worth."""
    columns = READER | {"exact answers, %": "{exact:.1f}"}
    layers = range(max(run["layers"] for run in READERS))
    columns |= {f"hidden in layer {layer}": f"{{exact_hidden_in[{layer}]:.1f}}" for layer in layers}
    alone = in_order(READERS, "model")
    lines = table(alone, columns)
    best = [f"{max(run['exact_hidden_but_in']):.1f}% ({run['model']})" for run in alone]
    return [*lines, "", f"With the passage in sight of one layer alone, at best {' and '.join(best)} are right."]


def stage0_collapse() -> list[str]:
    columns = READER | F1 | {"no context": "{score[no_context_f1]}", "commonest answer, %": "{score[commonest_share]}"}
    columns |= {"different answers, of 1,000": "{score[unique_answers]}", "cosine of latents": "{latent_cosine:.3f}"}
    columns |= {"first token right, %": "{score[first_token_accuracy]}"} | RUNS
    return table(readers(STAGE0), columns) + duration(*named(STAGE0, "tiny-seed0"))


def stage0_causes() -> list[str]:
    """The evidence for each of the four causes, from seed 0 of each reader."""
    evidence = {
        "1: gradient RMS per parameter, encoder (adapter)": "{gradient_encoder:.1e} ({gradient_adapter:.1e})",
        "1: the same in the first steps": "{first_gradient_encoder:.1e} ({first_gradient_adapter:.1e})",
        "1: F1 after a reset of the encoder (adapter)": "{random_encoder_f1:.1f} ({random_adapter_f1:.1f})",
        "2: tokens that linear probes read, % (guessing)": "{probe_accuracy:.1f} ({probe_guess:.1f})",
        "3: latents (tokens of the text)": "32 ({text_positions:.0f})",
        "3: bits offered (needed)": "{bits_offered:.0f} ({bits_needed:.0f})",
        "3: dimensions used, of 8192": "{effective_dimensions:.1f}",
        "4: cosine to the nearest token (random vectors)": "{nearest_cosine:.2f} ({random_nearest_cosine:.2f})",
        "4: RMS (real embeddings)": "{rms:.3f} ({real_rms:.3f})",
        "4: norm of the mean (real embeddings)": "{mean_norm:.2f} ({real_mean_norm:.2f})",
    }
    runs = named(STAGE0, "tiny-seed0", "tiny-qwen-seed0")
    rows = [[title, *(cell.format_map(run) for run in runs)] for title, cell in evidence.items()]
    titles = ("cause: evidence", *MODELS)
    return table(rows, {title: lambda row, at=at: row[at] for at, title in enumerate(titles)})


def stage0_sweep() -> list[str]:
    columns = {"learning rate": "{arguments[lr]:g}", "steps": "{steps}", "F1": "{f1:.1f}"}
    columns |= {"no context": "{no_context_f1:.1f}", "NLL of the answer": "{nll_wire:.2f}"}
    columns |= {"different answers": "{unique_answers}", "test passages": "{examples:,}"}
    runs = [run for run in STAGE0 if run["model"] == "tiny" and run["seed"] == 0]
    return table(sorted(runs, key=lambda run: (run["steps"], run["arguments"]["lr"])), columns)


def stage1_headline() -> list[str]:
    columns = READER | {"code width": "{code_dim} of {embedding_width}"} | F1 | RETENTION
    columns |= {"PCA inverse: F1": "{score[pca_inverse]}"}
    return table(adapter_rows("mlp"), columns | CONTROLS | BYTES | RUNS)


def stage1_identity() -> list[str]:
    runs = [run for run in STAGE1 if "identity_same_answers" in run]
    same, total = (sum(run[key] for run in runs) for key in ("identity_same_answers", "examples"))
    gives = f"gives the same answer as the text to {same} of {total} questions, over all {len(runs)} runs"
    return [f"The identity wire (k = d, with each token's RMS in the message) {gives}."]


def stage1_adapters() -> list[str]:
    columns = READER | {"k": "{code_dim}", "adapter": "{adapter}"}
    columns |= RETENTION | {"F1": "{score[f1]}", "cosine": "{cosine:.3f}"} | NLL | {"seeds": "{seeds}"}
    return table(grouped(ADAPTERS, "model", "code_dim", "adapter"), columns)


def stage1_real_weights() -> list[str]:
    columns = {"adapter": "{adapter}"}
    columns |= {"NLL through the wire": "{nll_wire:.3f}", "NLL from text": "{nll_text:.3f}"}
    columns |= {"PCA inverse": "{pca_inverse:.3f}", "identity wire": "{identity:.3f}"}
    return table([run for run in STAGE1 if run["data"].endswith(".txt")], columns | COMMAND)


def stage2_encoder() -> list[str]:
    columns = READER | F1 | RETENTION | TOKENS | {"code cosine": "{code_cosine:.3f}"}
    columns |= {"true codes: F1": "{score[true_codes]}"} | CONTROLS | BYTES | RUNS
    return table(readers(STAGE2), columns) + duration(*named(STAGE2, "tiny-seed0"))


def stage2_ablations() -> list[str]:
    left_out = {
        "tiny-seed0": "nothing",
        "tiny-without-code-target": "code target",
    }
    columns = {"left out": lambda row: left_out[row["file"]], "F1": "{f1:.1f}"} | RETENTION | NLL | TOKENS | COMMAND
    return table(named(STAGE2, *left_out), columns)


def passages(run: dict) -> str:
    """How the test passages differ: "emoji" of tiny-emoji."""
    return run["data"].removeprefix("tiny-")


def stage2_harder() -> list[str]:
    runs = in_order([run for run in STAGE2 if run["data"].startswith("tiny-")], "model", "data")
    return table(runs, READER | {"passages": passages} | F1 | RETENTION | TOKENS)


def stage2_real_weights() -> list[str]:
    text = (
        "The first half of each window of text travels through the wire, and stories260k predicts the second half "
        "(`{command}`). The NLL is {nll_wire:.3f} nats per token through the wire, {nll_text:.3f} from text, and "
        "{true_codes:.3f} with the true codes. The token ends have F1 {boundary_f1:.2f}, and {exact_token:.2f}% of the "
        "tokens are exactly right."
    )
    return [text.format_map(run) for run in named(STAGE2, "stories260k")]


def stage2_vocabulary() -> list[str]:
    columns = {"steps": "{steps:,}"} | TOKENS | {"code cosine": "{code_cosine:.3f}", "seconds": "{train_seconds:,.0f}"}
    return table(vocabulary(), columns | COMMAND)


def stage3_message() -> list[str]:
    columns = {"what travels": "{wire_carries}"} | READER | F1 | RETENTION | CONTROLS
    columns |= {"bytes": "{score[wire_bytes]}", "text": "{text_bytes:.0f}", "zlib -9": "{zlib_bytes:.0f}"}
    columns |= {"zlib -9, dictionary": "{zlib_dictionary_bytes:.0f}", "packed token ids": "{packed_token_bytes:.0f}"}
    predicted = {"prompt": "{score[llm_bound_bytes]}", "context": ""}
    columns |= {"this LLM's own prediction": lambda row: predicted[row["wire_carries"]].format_map(row)} | RUNS
    runs = [run for run in STAGE3 if run["file"].startswith("seed")]
    arrived, total = (sum(run[key] for run in runs) for key in ("arrived", "examples"))
    lines = table(message_rows("prompt") + message_rows("context"), columns)
    return [*lines, "", f"{arrived} of {total} texts arrive bit for bit.", *duration(*named(STAGE3, "seed0"))]


def stage3_rivals() -> list[str]:
    """A row for each way to make a text small, a column for each kind of text: mean bytes, and percent of the text."""
    (run,) = RIVALS
    kinds, columns = run["kinds"], {"bytes (% of the text)": "{0}"}
    columns |= {f"{kind}, {found['texts']} texts": f"{{{at}}}" for at, (kind, found) in enumerate(kinds.items(), 1)}
    rows = []
    for name in [name for name in next(iter(kinds.values())) if name != "texts"]:
        sizes = [(found[name], 100 * found[name] / found["text"]) for found in kinds.values()]
        rows.append([name, *(f"{size:.1f} ({share:.1f}%)" for size, share in sizes)])
    lines = table(rows, {title: lambda row, cell=cell: cell.format(*row) for title, cell in columns.items()})
    words = (
        "Once loaded, with {threads} thread of a busy machine, a prompt of {text_bytes:.0f} bytes ({latents:.0f} "
        "latents) takes {send_ms:.1f} ms of CPU to send and {read_ms:.1f} ms to read."
    )
    return [*lines, "", words.format_map(run | run["speed"]), "", f"`{run['command']}`"]


def stage3_harder() -> list[str]:
    columns = {"passages": passages} | READER | {"bytes": "{wire_bytes:.0f}", "text": "{text_bytes:.0f}"}
    columns |= {"zlib -9": "{zlib_bytes:.0f}"} | RETENTION
    return table(in_order([run for run in READINGS if run["data"].startswith("tiny-")], "data", "model"), columns)


def slots_rates() -> list[str]:
    """F1 from slots beside scorers alone and scorers with the PCA, and at other rates."""
    columns = READER | F1 | RETENTION | {"before training": "{score[start_f1]}", "selection": "{score[selection_f1]}"}
    columns |= {"text, cut": "{score[truncated_f1]}"} | CONTROLS | POSITIONS
    runs = [run | {f"F1 at rate {rate}": f1 for rate, f1 in run["rates"].items()} for run in SLOTS]
    columns |= {key: f"{{score[{key}]}}" for key in runs[0] if key.startswith("F1 at ")}
    return table(readers(runs), columns | RUNS)


def slots_harder() -> list[str]:
    columns = {"passages": passages} | READER | {"tokens": "{context_tokens:.0f}"} | F1 | RETENTION
    return table(in_order([run for run in SLOTS if run["data"].startswith("tiny-")], "data", "model"), columns)


def ceilings(untrained: bool) -> list[str]:
    """F1: a row for each reader, a column for each way to read a context, of those before training or of the others."""
    kinds = [kind for run in CEILINGS[:1] for kind in run["f1"] if kind.startswith(("PCA", "selection")) == untrained]
    columns = {"reader": "{model}"} | {kind: in_units(1, "f1", kind) for kind in kinds}
    return table(in_order(CEILINGS, "model") if kinds else [], columns | COMMAND)


def slots_ceilings() -> list[str]:
    return ceilings(untrained=False)


def slots_widths() -> list[str]:
    return ceilings(untrained=True)


def slots_costs() -> list[str]:
    """Three ways to answer questions about one context: a row for each."""

    def pays(way: dict, text: dict, once: str, each: str) -> str:
        """After how many questions a way has taken less than reading the text anew."""
        saved = text.get(each, 0) - way.get(each, 0)
        return str(math.ceil(way[once] / saved)) if saved else ""

    def times(key: str, form: Callable[[float], str]) -> Callable[[dict], str]:
        return lambda way: form(way[key]) if key in way else ""

    rows = []
    for run in sorted(COSTS, key=lambda run: run["tokens"]):
        text = run["ways"]["text"]
        for name, way in run["ways"].items():
            more = {"way": name, "flops": pays(way, text, "once", "each")}
            rows.append(run | way | more | {"time": pays(way, text, "once_seconds", "first_seconds")})
    columns = {"LLM, tokens": "{model}, {tokens:,}", "way": "{way}", "positions read for a question": "{prefilled:,}"}
    columns |= {"positions kept": "{kept:,}", "numbers kept, M": in_units(1e6, "numbers", form="{:.1f}")}
    columns |= {"MB kept": in_units(1e6, "cache_bytes", form="{:.1f}"), "KB sent": in_units(1e3, "message_bytes")}
    columns |= {"TFLOPs once": in_units(1e12, "once", form="{:.2f}")}
    columns |= {"TFLOPs for a question": in_units(1e12, "each", form="{:.3f}")}
    columns |= {"s once": times("once_seconds", "{:.1f}".format)}
    columns |= {"s to the first token": times("first_seconds", "{:.2f}".format)}
    columns |= {"tokens/s": times("next_seconds", lambda seconds: f"{1 / seconds:.1f}")}
    pays_after = "questions until it pays, by FLOPs (by time)"
    columns |= {"timed on": lambda way: f"{way['device']}, {way['threads']} threads" if "once_seconds" in way else ""}
    columns |= {pays_after: lambda way: f"{way['flops']} ({way['time']})" if way["time"] else way["flops"]}
    return table(rows, columns | COMMAND)


# ---------------------------------------------------------------------------------------------------------------------
# results/README.md: the kernels, and models of real shapes


def kernels_operator() -> list[str]:
    """Times of our operator, and how many times longer each of the others takes."""

    def ratio(column: str) -> Callable[[dict], str]:
        return lambda row: f"{row['all'][column]['p50_us'] / row['p50_us']:.2f}x" if column in row["all"] else ""

    text = (
        "{device}, {dtype}, {software}, commit {commit}; medians of {repeats} timings. The floor follows from a large "
        "copy and a large matmul, which reached {copy:.0f} GB/s and {matmul:.3g} TFLOP/s in the same run."
    )
    lines = []
    for bench in BENCHES:
        cases = defaultdict(dict)
        for run in bench["operator"]:
            cases[run["what"], run["N"]][run["column"]] = run
        on_cpu, most = bench["device"].startswith("CPU"), max(N for _, N in cases)
        kept = [case for (_, N), case in cases.items() if "ours" in case and (not on_cpu or N in (1, 512, most))]
        rows = [case["ours"] | {"all": case} for case in kept]
        columns = {"input": "{what}", "N": "{N}", "ours, ms": in_units(1e3, "p50_us", form="{:.3f}")}
        columns |= {"floor / ours, %": lambda row: f"{100 * row['floor_us'] / row['p50_us']:.0f}"}
        columns |= {f"{run['column']} / ours": ratio(run["column"]) for run in bench["operator"]}
        del columns["ours / ours"]
        columns |= {"error: ours": lambda row: f"{row['error']:.1e}" if "error" in row else ""}
        copy, matmul = bench["ceilings"]["bytes_per_second"] / 1e9, bench["ceilings"]["flops_per_second"] / 1e12
        software = ", ".join(
            f"{name} {bench['versions'][name]}" for name in ("torch", "triton") if name in bench["versions"]
        )
        about = bench | {"dtype": bench["dtype"] if on_cpu else f"{bench['dtype']}, k {rows[0]['k']}"}
        about |= {"copy": copy, "matmul": matmul, "software": software}
        lines += [text.format_map(about), "", *table(rows, columns), ""]
    if BENCHES[0]["device"].startswith("CPU"):
        lines.append("Not measured on a GPU: `python results/run_kernels.py && python results/make.py` adds the rows.")
    return lines


def kernels_codebook() -> list[str]:
    rows = defaultdict(dict)
    for bench in BENCHES:
        for run in bench["codebook"]:
            rows[bench["device"], run["V"]] |= run | {"device": bench["device"], run["part"]: run["p50_us"]}
    columns = {"machine": "{device}", "V, d, k": "{V}, {d}, {k}"}
    for part in ("scores", "softmax", "values and RMS", "all", "attention"):
        title = "library attention" if part == "attention" else part
        columns[f"{title}, ms"] = in_units(1e3, part, form="{:.2f}")
    return table(list(rows.values()), columns)


def kernels_compiled() -> list[str]:
    def tiles(row: dict) -> str:
        names = [f"{name} {size}" for name, size in row["tiles"].items() if name.startswith("B")]
        return f"{' '.join(names)}, {row['tiles']['num_warps']}, {row['tiles']['num_stages']}"

    (aot,) = named(KERNELS, "aot")
    columns = {"launch": "{launch}", "registers": "{registers}", "stack, spills": "{stack_bytes}, {spill_stores}"}
    columns |= {"shared, KB of 227": in_units(1024, "shared_bytes", form="{:.0f}"), "occupancy": "{occupancy:.2f}"}
    columns |= {"wgmma": lambda row: "yes" if row["wgmma"] else "no", "tiles, warps, stages": tiles}
    rows = [row for row in aot["kernels"] if (row["arch"], row["dtype"]) == ("sm_90", "bfloat16")]
    text = "triton {triton}, bfloat16, sm_90; `results/kernels/aot.json` has the other dtypes, sm_80 and sm_89."
    return [text.format_map(aot), "", *table(rows, columns)]


def scale_dry() -> list[str]:
    training, less = (in_units(1e9, "training_bytes", way) for way in ("without", "with"))
    columns = {"model": "{model}", "adapter": "{adapter}", "k": "{k}"}
    columns |= {"trained, M": in_units(1e6, "trained_parameters"), "weights, GB": in_units(1e9, "held", "weights")}
    columns |= {"evaluation, GB": in_units(1e9, "evaluation_bytes"), "on a GPU of": "{fits[default][0]}"}
    columns |= {"training through the LLM, GB (checkpointing)": lambda row: f"{training(row)} ({less(row)})"}
    columns |= {"on a GPU of (checkpointing)": "{fits[without][0]} ({fits[with][0]})"}
    return table(sorted((run for run in SCALE if "fits" in run), key=lambda run: run["parameters"]), columns)


def scale_steps() -> list[str]:
    wire, plain = (in_units(1e9, "ways", way, "peak_bytes", form="{:.2f}") for way in ("wire", "plain"))
    columns = {"machine": lambda row: f"CPU, {row['threads']} threads" if row["device"] == "cpu" else row["device"]}
    columns |= {"LLM, layers": "{model}, {layers}", "adapter": "{adapter}"}
    columns |= {"checkpointing": lambda row: "yes" if row["gradient_checkpointing"] else "no"}
    columns |= {"batch": "{batch[0]} x {batch[1]}", "step, s": "{ways[wire][seconds]:.1f}"}
    columns |= {"LLM alone, s": "{ways[LLM alone][seconds]:.1f}", "plain, s": "{ways[plain][seconds]:.1f}"}
    columns |= {"the wire's share, %": in_units(0.01, "wire_share"), "plain / wire, time": "{plain_over_wire:.2f}x"}
    columns |= {"wire / plain, memory": "{memory_over_plain:.2f}x", "tokens/s": "{ways[wire][tokens_per_second]:.0f}"}
    columns |= {"MFU, %": in_units(0.01, "ways", "wire", "mfu", form="{:.0f}")}
    columns |= {"peak, GB (plain)": lambda row: f"{wire(row)} ({plain(row)})"} | COMMAND
    return table([run for run in SCALE if "ways" in run], columns)


# ---------------------------------------------------------------------------------------------------------------------
# the two files and the three figures


def filled(path: Path, names: list[str]) -> str:
    """The text of a file, with every block as the JSON has it now."""
    where, text = path.relative_to(HERE.parent).as_posix(), path.read_text(encoding="utf-8")
    markers = re.findall(r"<!-- (/?[\w-]+) -->", text)
    for name in names:
        if " ".join(markers).count(f"{name} /{name}") != 1:
            sys.exit(f"error: {where} must have the marker <!-- {name} --> and, as the next one, <!-- /{name} -->")
    for name in markers:
        if name.strip("/") not in names:
            sys.exit(f"error: {where} has the marker <!-- {name} -->, which results/make.py does not know")
    for name in names:
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = "\n".join([before + start, *globals()[name.replace("-", "_")](), end + after])
    return text


def draw() -> None:
    import figures  # with matplotlib, which --check does without

    groups = grouped(ADAPTERS, "model", "code_dim", "adapter")
    figures.stage1(HERE / "stage1.png", {model: [row for row in groups if row["model"] == model] for model in MODELS})
    points = {"stage 0: all at once": readers(STAGE0), "stage 1: the adapter": adapter_rows("mlp")}
    points |= {"stage 2: + the encoder": readers(STAGE2), "stage 3: + the message": message_rows("prompt")}
    points |= {"stage 3, slots: few positions of a context": readers(SLOTS)}
    texts = {run["model"]: run for run in in_order(named(READINGS, "seed0"), "model")}
    figures.frontier(HERE / "frontier.png", points, texts)
    lines = [bench for bench in BENCHES if len({run["N"] for run in bench["operator"]}) > 1]
    figures.roofline(HERE / "roofline.png", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file is out of date")
    args = parser.parse_args()
    for model in {run["model"] for run in STAGE1}:
        if len({run["fingerprint"] for run in STAGE1 if run["model"] == model}) > 1:
            sys.exit(f"error: results/stage1 holds runs on different weights of {model}: delete the old ones")
    for path, text in {path: filled(path, names.split()) for path, names in BLOCKS.items()}.items():
        if not args.check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif text != path.read_text(encoding="utf-8"):
            sys.exit(f"error: {path.relative_to(HERE.parent).as_posix()} is out of date: run python results/make.py")
    if not args.check:
        draw()


if __name__ == "__main__":
    main()
