"""Measure stage 1: every run behind the README's table, as JSON in results/stage1/. Runs that are there are kept.

    python results/run_stage1.py              # all of it, two runs at a time with one thread each
    python results/make.py                    # README table and results/stage1.png from the JSON

The real-weights rows need a directory with models/stories260k, data/text/tinystories_sample.txt and
data/squad/dev-v1.1.json beside the checkout (--shared); without it they are left out and said to be.
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
WIDTHS = {"tiny": (24, 12), "tiny-qwen": (20, 10)}  # 8x and 16x fewer dimensions than 192 and 160


def planned(shared: str) -> dict[str, list[str]]:
    """name of the result -> flags, the headline first."""
    runs = {}
    for seed in (0, 1, 2):
        for model, widths in WIDTHS.items():
            for k in widths:
                runs[f"{model}-k{k}-codebook-seed{seed}"] = [
                    "--model",
                    model,
                    "--code-dim",
                    str(k),
                    "--seed",
                    str(seed),
                ]
    if (ROOT / shared).is_dir():
        stories = ["--model", f"{shared}/models/stories260k", "--code-dim", "8"]
        text = ["--data", f"{shared}/data/text/tinystories_sample.txt"]
        for adapter in ("codebook", "linear", "mlp"):
            runs[f"stories260k-k8-{adapter}"] = [*stories, *text, "--adapter", adapter]
        runs["stories260k-k8-codebook-sent"] = [*stories, *text, "--rms", "sent"]
        runs["stories260k-squad"] = [
            *stories, "--data", f"{shared}/data/squad/dev-v1.1.json", "--steps", "50", "--eval-examples", "500",
        ]  # fmt: skip
    else:
        print(f"{shared} is not there: the rows on real weights are left out")
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


def measure(name: str, flags: list[str]) -> bool:
    """Run one stage 1 and keep its config.json, metrics included; False if it failed."""
    target = HERE / "stage1" / f"{name}.json"
    if target.exists():
        return True
    out = ROOT / "out" / "results" / name
    command = [sys.executable, "stage1_pca_adapter.py", *flags, "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(f"{name}: FAILED\n{done.stderr}", flush=True)
        return False
    config = json.loads((out / "config.json").read_text())
    row = {"command": " ".join(["python stage1_pca_adapter.py", *flags]), "threads": 1} | config
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(row, indent=2) + "\n")
    print(name, done.stdout.strip().split("\n")[-1][:400], flush=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shared", default="../shared", help="directory with the real weights and data")
    parser.add_argument("--only", default="", help="run only names that contain this")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(measure, n, flags) for n, flags in planned(args.shared).items() if args.only in n]
        sys.exit(not all([job.result() for job in jobs]))
