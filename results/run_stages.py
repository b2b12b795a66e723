"""Measure the stages: every run behind the tables, as JSON in results/<stage>/. Runs that are there are kept.

    python results/run_stages.py stage2               # one stage; two at a time
    python results/run_stages.py scale --workers 1    # timed rows run alone; --device cuda: the same on a GPU
    python results/make.py                            # tables in both READMEs, and figures, from the JSON

The real-weights rows need a directory with models/stories260k, data/text/tinystories_sample.txt and
data/squad/dev-v1.1.json beside the checkout (--shared); without it they are left out and said to be.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tiny import world  # noqa: E402

SCRIPTS = {
    "stage0": "stage0_broken.py",
    "stage1": "stage1_pca_adapter.py",
    "stage2": "stage2_encoder.py",
    "stage3": "stage3_full.py",
    "scale": "stage1_pca_adapter.py",
}
WIDTHS = {"tiny": (24, 12), "tiny-qwen": (20, 10)}  # 8x and 16x fewer dimensions than 192 and 160
ACCENTS = str.maketrans("aeioucnAEIOUCN", "áéíöüçñÁÉÍÖÜÇÑ")
STORIES_WIRE = "out/results/stage1/stories260k-k8-codebook"  # not shipped: made when it is not there
CHECKPOINTING = "--gradient-checkpointing"
EMOJI = "😀🚀🌍🎉🐟🍞"
# passages that no training passage looks like: name -> what becomes of a text
HARDER = {
    "upper": str.upper,
    "lower": str.lower,
    # the same name has the same number everywhere: the question must still name what the passage names
    "digits": lambda text: re.sub(r"\b[A-Z][a-z]+\b", lambda m: f"{m[0]}{zlib.crc32(m[0].encode()) % 1000}", text),
    "accents": lambda text: text.translate(ACCENTS),
    "emoji": lambda text: re.sub(r"[.?] ?", lambda m: f"{m[0].strip()} {EMOJI[m.start() % len(EMOJI)]} ", text).strip(),
}


def stage0(shared: str) -> dict[str, list[str]]:
    runs = {f"tiny-seed{seed}": ["--model", "tiny", "--seed", str(seed)] for seed in (0, 1, 2)}
    runs["tiny-qwen-seed0"] = ["--model", "tiny-qwen", "--seed", "0"]
    for lr in ("1e-4", "3e-4", "3e-3"):  # the default is 1e-3
        runs[f"tiny-lr{lr}"] = ["--model", "tiny", "--lr", lr]
    runs["tiny-steps6400"] = ["--model", "tiny", "--steps", "6400"]
    return runs


def stage1(shared: str) -> dict[str, list[str]]:
    """name of the result -> flags, the headline first."""
    runs = {}
    for seed in (0, 1, 2):
        for model, widths in WIDTHS.items():
            for k in widths:
                flags = ["--model", model, "--code-dim", str(k), "--seed", str(seed)]
                runs[f"{model}-k{k}-codebook-seed{seed}"] = flags
    if (ROOT / shared).is_dir():
        stories = ["--model", f"{shared}/models/stories260k", "--code-dim", "8"]
        text = ["--data", f"{shared}/data/text/tinystories_sample.txt"]
        for adapter in ("codebook", "linear", "mlp"):
            runs[f"stories260k-k8-{adapter}"] = [*stories, *text, "--adapter", adapter]
        runs["stories260k-k8-codebook-sent"] = [*stories, *text, "--rms", "sent"]
        runs["stories260k-squad"] = [
            *stories, "--data", f"{shared}/data/squad/dev-v1.1.json", "--steps", "50", "--eval-examples", "500",
        ]  # fmt: skip
    for model, (k, narrow) in WIDTHS.items():  # one seed: these explain the headline, they are not it
        for width in (k, narrow):
            for adapter in ("linear", "mlp"):
                flags = ["--model", model, "--code-dim", str(width), "--adapter", adapter]
                runs[f"{model}-k{width}-{adapter}-seed0"] = [*flags, "--seed", "0"]
        base = ["--model", model, "--code-dim"]
        runs[f"{model}-k{k}-codebook-sent"] = [*base, str(k), "--rms", "sent"]
        runs[f"{model}-k{k}-linear-sent"] = [*base, str(k), "--adapter", "linear", "--rms", "sent"]
        runs[f"{model}-k{narrow}-linear-kd"] = [*base, str(narrow), "--adapter", "linear", "--kd-weight", "1"]
    return runs


def stage2(shared: str) -> dict[str, list[str]]:
    runs = {f"{model}-seed{seed}": ["--model", model, "--seed", str(seed)] for seed in (0, 1, 2) for model in WIDTHS}
    runs["tiny-without-pca"] = ["--model", "tiny", "--without", "pca"]
    for without in ("stage1-adapter", "code-target", "boundary-target"):  # through the LLM the default, 3e-3, diverges
        runs[f"tiny-without-{without}"] = ["--model", "tiny", "--without", without, "--lr", "1e-3"]
    runs["tiny-without-nothing"] = ["--model", "tiny", "--lr", "1e-3"]  # beside those
    runs["tiny-without-llm-steps"] = ["--model", "tiny", "--llm-steps", "0"]
    for model, wire in (("tiny", "stage2"), ("tiny-qwen", "stage2-qwen")):
        for name in HARDER:
            file = f"out/results/harder-{name}.jsonl"
            runs[f"{model}-{name}"] = ["--eval-only", f"tiny/wires/{wire}", "--data", file, "--eval-examples", "300"]
    if (ROOT / shared).is_dir():
        stories = ["--model", f"{shared}/models/stories260k", "--data", f"{shared}/data/text/tinystories_sample.txt"]
        runs["stories260k"] = [*stories, "--stage1", STORIES_WIRE]
    return runs


def stage3(shared: str) -> dict[str, list[str]]:
    runs = {}
    for seed in (0, 1, 2):
        runs[f"seed{seed}"] = ["--seed", str(seed)]
        runs[f"seed{seed}-context"] = ["--eval-only", f"out/results/stage3/seed{seed}", "--wire-carries", "context"]
    for without in ("copies", "context"):
        runs[f"without-{without}"] = ["--model", "tiny", "--without", without]
    runs["without-prediction"] = ["--model", "tiny", "--without", "prediction", "--steps", "1"]  # learns nothing
    runs["one-receiver"] = ["--stage2", "tiny/wires/stage2"]
    # a direct receiver, trained twice: at rates up to 3, then up to 2.5. What evaluates it comes last
    direct, batch = ["--receiver", "direct"], ["--batch-size", "16"]
    first = [*direct, "--rate", "3", "--steps", "2000", *batch, "--lr", "1.5e-3"]
    then = [*direct, "--seed", "1", "--rate", "2.5", "--steps", "1600", *batch, "--lr", "1e-3"]
    for model in WIDTHS:
        wire = f"out/results/stage3/direct-{model}"
        runs[f"direct-{model}"] = ["--model", model, *first]
        runs[f"direct-{model}-more"] = ["--model", model, "--wire", wire, *then]
        for rate in ("1.5", "2", "3", "4"):
            runs[f"direct-{model}-rate{rate}"] = ["--eval-only", f"{wire}-more", *direct, "--rate", rate]
    short = ["--model", "tiny", *direct, "--rate", "2", "--steps", "300", *batch, "--lr", "1.5e-3"]
    for name, more in (("", []), ("-without-states", ["states"]), ("-without-teacher", ["teacher"])):
        runs[f"direct-short{name}"] = [*short, *(["--without", *more] if more else [])]
    for name in HARDER:
        file = f"out/results/harder-{name}.jsonl"
        runs[name] = ["--eval-only", "tiny/wires/stage3", "--data", file, "--eval-examples", "300"]
    return runs


def scale(shared: str) -> dict[str, list[str]]:
    """Steps of models with random weights, two layers deep and one whole, and dry runs of whole ones."""
    runs = {}
    for model in ("llama-7b", "llama-3.1-8b", "llama-3.1-70b"):
        for adapter in ("linear", "codebook"):
            runs[f"dry-{model}-{adapter}"] = ["--model", model, "--adapter", adapter, "--dry-run"]
    for name, model, layers, rows, steps, more in (
        ("llama-7b-linear", "llama-7b", ["2"], "8", "5", ["--adapter", "linear"]),
        ("llama-7b-codebook", "llama-7b", ["2"], "8", "5", ["--adapter", "codebook"]),
        ("llama-7b-linear-checkpointing", "llama-7b", ["2"], "8", "5", ["--adapter", "linear", CHECKPOINTING]),
        ("llama-3.1-8b-linear", "llama-3.1-8b", ["2"], "4", "5", ["--adapter", "linear"]),
        ("llama-3.1-8b-codebook", "llama-3.1-8b", ["2"], "4", "3", ["--adapter", "codebook"]),
        ("llama-7b-whole-codebook", "llama-7b", [], "2", "3", ["--adapter", "codebook"]),
    ):
        shape = ["--random-weights", *layers, "--dtype", "bfloat16", "--steps", steps]
        runs[name] = ["--model", model, *shape, "--micro-batch-size", rows, "--batch-size", rows, *more]
    return runs


def write_harder(folder: Path) -> None:
    """Each file: 3,400 test passages, changed. A tenth of a file is its test set, so that about 340 are."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = world.make_examples("test", 3400)
    for name, change in HARDER.items():
        with (folder / f"harder-{name}.jsonl").open("w", encoding="utf-8") as file:
            for example in examples:
                row = {key: change(example[key]) for key in ("context", "question")}
                row["answers"] = [change(answer) for answer in example["answers"]]
                assert any(answer in row["context"] for answer in row["answers"]), (name, row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(stage: str, name: str, flags: list[str], threads: int, device: str) -> bool:
    """Run a stage once and keep its config.json, metrics included; False if it failed."""
    target = HERE / stage / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")
    if target.exists():
        return True
    out = ROOT / "out" / "results" / stage / name
    command = [sys.executable, SCRIPTS[stage], *flags, "--device", device, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{name}: FAILED\n{done.stderr}", flush=True)
        return False
    if stage == "scale":  # saves nothing: its last line is the result
        config = json.loads(done.stdout.strip().split("\n")[-1])
    else:
        config = json.loads((out / "config.json").read_text())
    row = {"command": " ".join([f"python {SCRIPTS[stage]}", *flags]), "threads": threads} | config
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(row, indent=2) + "\n")
    print(name, done.stdout.strip().split("\n")[-1][:400], flush=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("stage", choices=SCRIPTS)
    parser.add_argument("--shared", default="../shared", help="directory with the real weights and data")
    parser.add_argument("--only", default="", help="run only names that contain this")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; they share the cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: for the stage `scale` alone")
    args = parser.parse_args()
    if args.device != "cpu" and args.stage != "scale":
        parser.error("--device cuda: the rows of the stages are a CPU's, bit for bit; only `scale` is timed on a GPU")
    if not (ROOT / args.shared).is_dir():
        print(f"{args.shared} is not there: the rows on real weights are left out")
    if args.stage in ("stage2", "stage3"):
        write_harder(ROOT / "out" / "results")
    runs = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "stage3": stage3, "scale": scale}[args.stage](
        args.shared
    )
    runs = {name: flags for name, flags in runs.items() if args.only in name}
    if args.device != "cpu":  # a dry run has no device
        runs = {name: flags for name, flags in runs.items() if "--dry-run" not in flags}
    if args.stage == "stage2" and "stories260k" in runs and not (ROOT / STORIES_WIRE).exists():
        flags = [*stage1(args.shared)["stories260k-k8-codebook"], "--device", "cpu", "--out", STORIES_WIRE]
        subprocess.run([sys.executable, SCRIPTS["stage1"], *flags], cwd=ROOT, check=True)
    threads = max(1, os.cpu_count() // args.workers)
    # what evaluates a wire, or trains it further, comes after what trains it
    order = [
        lambda f: "--wire" not in f and "--eval-only" not in f,
        lambda f: "--wire" in f,
        lambda f: "--eval-only" in f,
    ]
    done = []
    for chosen in order:
        half = {name: flags for name, flags in runs.items() if chosen(flags)}
        with ThreadPoolExecutor(args.workers) as pool:
            jobs = [pool.submit(measure, args.stage, n, flags, threads, args.device) for n, flags in half.items()]
            done += [job.result() for job in jobs]
    sys.exit(not all(done))
