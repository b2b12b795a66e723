"""Measure the stages: every run behind the tables, as JSON in results/<stage>/. Runs that are there are kept.

    python results/run_stages.py stage2               # one stage; two at a time
    python results/run_stages.py scale --workers 1    # timed rows run alone; --device cuda: the same on a GPU
    python results/make.py                            # tables in both READMEs, and figures, from the JSON

The real-weights rows need a directory with models/stories260k, tokenizers/gpt2, data/text/tinystories_sample.txt
and data/squad/ beside the checkout (--shared); without it they are left out and said to be.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from plumbing.data import TINY  # noqa: E402

SCRIPTS = {
    "stage0": "stage0_broken.py",
    "stage1": "stage1_pca_adapter.py",
    "stage2": "stage2_encoder.py",
    "stage3": "stage3_full.py",
    "slots": "stage3_full.py",
    "scale": "stage1_pca_adapter.py",
}
WIDTHS = {"tiny": (24, 12), "tiny-qwen": (20, 10)}  # 8x and 16x fewer dimensions than 192 and 160
# linear needs the LLM to choose what it gets right; a codebook starts where it should end
ADAPTERS = {"mlp": [], "linear": ["--steps", "200", "--llm-steps", "200"], "codebook": ["--steps", "20"]}
STORIES_WIRE = "out/results/stage1/stories260k-k8-codebook"  # not shipped: made when it is not there
GPT2, GPT2_WIRE = "out/results/gpt2-random", "out/results/stage1/gpt2-random-k32-codebook"  # so are these
CHECKPOINTING = "--gradient-checkpointing"
# test sets of the world: relations and forms that training never saw, everyday texts, and five ways of writing
TESTS = [name for name in TINY if name not in ("tiny", "tiny-plain")]
HARDEST = ("tiny-unseen", "tiny-everyday", "tiny-upper", "tiny-accents")  # for wires that lose something


def stage0(shared: str) -> dict[str, list[str]]:
    runs = {f"tiny-seed{seed}": ["--model", "tiny", "--seed", str(seed)] for seed in (0, 1, 2)}
    runs["tiny-qwen-seed0"] = ["--model", "tiny-qwen", "--seed", "0"]
    for lr in ("3e-4", "3e-3"):  # the default is 1e-3
        runs[f"tiny-lr{lr}"] = ["--model", "tiny", "--lr", lr, "--eval-examples", "300"]
    return runs


def stage1(shared: str) -> dict[str, list[str]]:
    """name of the result -> flags, the headline first."""
    runs = {}
    for seed in (0, 1, 2):
        for model, widths in WIDTHS.items():
            for k in widths:
                flags = ["--model", model, "--code-dim", str(k), "--seed", str(seed)]
                runs[f"{model}-k{k}-mlp-seed{seed}"] = flags
    if (ROOT / shared).is_dir():
        stories = ["--model", f"{shared}/models/stories260k", "--code-dim", "8"]
        text = ["--data", f"{shared}/data/text/tinystories_sample.txt"]
        for adapter, more in ADAPTERS.items():
            runs[f"stories260k-k8-{adapter}"] = [*stories, *text, "--adapter", adapter, *more]
    for model, widths in WIDTHS.items():  # one seed: these explain the headline, they are not it
        for k in widths:
            for adapter in ("linear", "codebook"):
                flags = ["--model", model, "--code-dim", str(k), "--adapter", adapter, *ADAPTERS[adapter]]
                runs[f"{model}-k{k}-{adapter}-seed0"] = [*flags, "--seed", "0"]
    return runs


def stage2(shared: str) -> dict[str, list[str]]:
    runs = {f"{model}-seed{seed}": ["--model", model, "--seed", str(seed)] for seed in (0, 1, 2) for model in WIDTHS}
    # its steps go through the LLM, and take three times as long
    runs["tiny-without-code-target"] = ["--model", "tiny", "--without", "code-target", "--steps", "1000"]
    for model, wire in (("tiny", "stage2"), ("tiny-qwen", "stage2-qwen")):
        for data in HARDEST:
            flags = ["--eval-only", f"tiny/wires/{wire}", "--data", data, "--eval-examples", "300"]
            runs[f"{model}-{data.removeprefix('tiny-')}"] = flags
    if (ROOT / shared).is_dir():
        stories = ["--model", f"{shared}/models/stories260k", "--data", f"{shared}/data/text/tinystories_sample.txt"]
        runs["stories260k"] = [*stories, "--stage1", STORIES_WIRE]
        for steps in ("300", "1000", "3000"):  # GPT-2's vocabulary; the LLM behind it answers nothing
            flags = ["--model", GPT2, "--data", f"{shared}/data/squad/train-subset.json", "--stage1", GPT2_WIRE]
            runs[f"gpt2-{steps}"] = [*flags, "--steps", steps, "--eval-examples", "100"]
    return runs


def stage3(shared: str) -> dict[str, list[str]]:
    runs = {}
    if (ROOT / shared).is_dir():
        corpus = [f"{shared}/data/squad/train-subset.json", f"{shared}/data/text/tinystories_sample.txt"]
        for seed in (0, 1, 2):
            runs[f"seed{seed}"] = ["--corpus", *corpus, "--seed", str(seed)]
            runs[f"seed{seed}-context"] = ["--eval-only", f"out/results/stage3/seed{seed}", "--wire-carries", "context"]
    for data in TESTS:
        runs[data] = ["--eval-only", "tiny/wires/stage3", "--data", data, "--eval-examples", "300"]
    return runs


def slots(shared: str) -> dict[str, list[str]]:
    """The slots of both readers. Those of seed 0 are shipped."""
    runs = {}
    for model in WIDTHS:
        on = ["--receiver", "slots", "--model", model]
        shipped = [*on, "--eval-only", "tiny/wires/stage3"]
        runs[f"{model}-seed0"] = shipped
        for seed in ("1", "2"):
            trained = f"{model}-trained{seed}"
            runs[trained] = [*on, "--seed", seed, "--eval-examples", "200"]
            runs[f"{model}-seed{seed}"] = [*on, "--eval-only", f"out/results/slots/{trained}"]
        for data in HARDEST:
            runs[f"{model}-{data.removeprefix('tiny-')}"] = [*shipped, "--data", data, "--eval-examples", "300"]
    return runs


def scale(shared: str) -> dict[str, list[str]]:
    """Steps of models with random weights, two layers deep and one whole, and dry runs of whole ones."""
    runs = {}
    for model in ("llama-7b", "llama-3.1-8b", "llama-3.1-70b"):
        for adapter in ("mlp", "codebook"):
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


def make_gpt2(shared: str) -> None:
    """GPT-2's tokenizer with a small random LLM behind it, and a stage-1 codebook for it."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=1, n_head=2)).save_pretrained(ROOT / GPT2)
    AutoTokenizer.from_pretrained(ROOT / shared / "tokenizers/gpt2").save_pretrained(ROOT / GPT2)
    flags = ["--model", GPT2, "--data", f"{shared}/data/squad/train-subset.json", "--adapter", "codebook"]
    flags += ["--code-dim", "32", "--steps", "2", "--llm-steps", "0", "--micro-batch-size", "4"]
    flags += ["--eval-examples", "8", "--device", "cpu", "--out", GPT2_WIRE]
    subprocess.run([sys.executable, SCRIPTS["stage1"], *flags], cwd=ROOT, check=True)


def measure(stage: str, name: str, flags: list[str], threads: int, device: str) -> bool:
    """Run a stage once and keep its config.json, metrics included; False if it failed."""
    target = HERE / stage / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")
    if target.exists():
        return True
    out = ROOT / "out" / "results" / stage / name
    # an interrupted run begins anew, so that its row has the time of a whole one
    command = [sys.executable, SCRIPTS[stage], *flags, "--device", device, "--out", str(out), "--overwrite"]
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
    runs = {"stage0": stage0, "stage1": stage1, "stage2": stage2, "stage3": stage3, "slots": slots, "scale": scale}[
        args.stage
    ](args.shared)
    runs = {name: flags for name, flags in runs.items() if args.only in name}
    if args.device != "cpu":  # a dry run has no device
        runs = {name: flags for name, flags in runs.items() if "--dry-run" not in flags}
    if args.stage == "stage2" and "stories260k" in runs and not (ROOT / STORIES_WIRE).exists():
        flags = [*stage1(args.shared)["stories260k-k8-codebook"], "--device", "cpu", "--out", STORIES_WIRE]
        subprocess.run([sys.executable, SCRIPTS["stage1"], *flags], cwd=ROOT, check=True)
    if args.stage == "stage2" and any(name.startswith("gpt2") for name in runs) and not (ROOT / GPT2_WIRE).exists():
        make_gpt2(args.shared)
    threads = max(1, os.cpu_count() // args.workers)
    # what evaluates a wire comes after what trains it
    order = (lambda f: "--eval-only" not in f, lambda f: "--eval-only" in f)
    done = []
    for chosen in order:
        half = {name: flags for name, flags in runs.items() if chosen(flags)}
        with ThreadPoolExecutor(args.workers) as pool:
            jobs = [pool.submit(measure, args.stage, n, flags, threads, args.device) for n, flags in half.items()]
            done += [job.result() for job in jobs]
    sys.exit(not all(done))
