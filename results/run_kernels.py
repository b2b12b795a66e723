"""Measure the kernels on this machine: their tests, then the benchmark, as JSON in results/kernels/.

    python results/run_kernels.py             # on a CUDA GPU natively (10 minutes), else on the CPU
    python results/make.py                    # tables in results/README.md and roofline.png from the JSON

In order: test_kernels.py; compute-sanitizer's memcheck over the tests of masks, strides and gradients, where it is
installed; kernels/aot.py (Linux); kernels/bench.py. A failure stops it, and nothing of the old JSON is lost.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def run(*command: str, into: Path | None = None) -> None:
    print("$", *command, *([">", into] if into else []), flush=True)
    if into is None:
        done = subprocess.run(command, cwd=ROOT)
    else:
        partial = into.with_suffix(".partial")
        with partial.open("w") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file)
        if done.returncode == 0:
            os.replace(partial, into)
    if done.returncode:
        sys.exit(f"error: {command[1]} ended with exit code {done.returncode}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=HERE / "kernels", help="folder for the JSON")
    parser.add_argument("--skip-tests", action="store_true", help="benchmark only")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if cuda else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if not args.skip_tests:
        run(python, "-m", "pytest", "-q", "-m", "", "test_kernels.py")
        sanitizer = shutil.which("compute-sanitizer")
        if cuda and sanitizer:
            tests = [
                "-m",
                "pytest",
                "-q",
                "-m",
                "",
                "test_kernels.py",
                "-k",
                "strided or gradients or many_blocks or any_width",
            ]
            run(sanitizer, "--tool", "memcheck", "--error-exitcode", "9", python, *tests)
        elif cuda:
            print("compute-sanitizer is not installed: memcheck not run")
    if sys.platform == "linux":
        run(python, "kernels/aot.py", into=args.out / "aot.json")
    run(python, "kernels/bench.py", into=args.out / f"{name}.json")
