"""Do the fast tests of the kernels see a broken kernel? Each of these faults, planted in a copy, must be caught.

python tests/test_planted_faults.py        # says which test caught which fault; pytest -m slow runs the same
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent

# what is wrong -> (file in kernels/, text in it, what takes its place)
FAULTS = {
    "wrong mask": (
        "fused.py",
        "mask = live[:, None] & (inner[None, :] < k)\n        z = tl.load",
        "mask = live[:, None] & (inner[None, :] <= k)\n        z = tl.load",
    ),
    "missing eps": (
        "fused.py",
        "tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d + eps)",
        "tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d)",
    ),
    "eps added to the sum": ("fused.py", "tl.sum(squares, axis=0) / d + eps", "(tl.sum(squares, axis=0) + eps) / d"),
    "eps added to the fused sum": ("fused.py", "tl.rsqrt(squares / d + eps)", "tl.rsqrt((squares + eps) / d)"),
    "only the last block's squares": ("fused.py", "squares += part * part", "squares = part * part"),
    "only the last block's products": ("fused.py", "products += grad * value", "products = grad * value"),
    "dropped mean": ("fused.py", "part.to(tl.float32) - centre", "part.to(tl.float32) - 0 * centre"),
    "wrong stride": ("fused.py", "else weight.stride())", "else (width, 1))"),
    "contiguous gradients assumed": ("fused.py", "dy, d, *g.stride()", "dy, d, d, 1"),
    "contiguous components assumed": ("fused.py", '% tiles["BK"])).contiguous()', '% tiles["BK"]))'),
    "contiguous bias assumed": ("fused.py", "else vector.contiguous() for", "else vector for"),
    "a row's offset in 32 bits": (
        "fused.py",
        "rows = tl.program_id(0).to(tl.int64) * BM",
        "rows = tl.program_id(0) * BM",
    ),
    "a row's offset in 32 bits, norm": (
        "fused.py",
        "row = tl.program_id(0).to(tl.int64)\n    squares",
        "row = tl.program_id(0)\n    squares",
    ),
    "a row's offset in 32 bits, backward": (
        "fused.py",
        "row = tl.program_id(0).to(tl.int64)\n    products",
        "row = tl.program_id(0)\n    products",
    ),
    "an id's offset in 32 bits": ("fused.py", "other=0).to(tl.int64)", "other=0).to(tl.int32)"),
    "blocks below 16": ("fused.py", "max(16, triton.next_power_of_2(k))", "triton.next_power_of_2(k)"),
    "a kernel for every N": ("fused.py", '@triton.jit(do_not_specialize=["N"])', "@triton.jit"),
    "zero targets divide": ("fused.py", "tl.where(t == 0, 0.0, ", "tl.where(t != t, 0.0, "),
    "codes not divided": ("fused.py", "z.to(tl.float32) / tl.load(code_scale)", "z.to(tl.float32) / tl.load(x)"),
    "ids ignored in the backward": (
        "adapter.py",
        "_codes(*source).T",
        "_codes(source[0][: len(dy)], None, *source[2:]).T",
    ),
    "a fake scale of the codes' dtype": ("adapter.py", "dtype=target.dtype)", "dtype=x.dtype)"),
    "the fused form everywhere": ("adapter.py", " and d * k * itemsize <= SMALL_WEIGHT", ""),
}  # fmt: skip
pytestmark = pytest.mark.slow


def first_failure(fault: str | None) -> str | None:
    """Plant a fault in a copy of the kernels and run their fast tests: the name of the first that fails, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(HERE / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("test_kernels.py", "pyproject.toml"):
            shutil.copy(HERE / name, copy)
        if fault:
            name, old, new = FAULTS[fault]
            path = copy / "kernels" / name
            text = path.read_text()
            assert text.count(old) == 1, f"the line to break for {fault!r} is there {text.count(old)} times, not once"
            path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "test_kernels.py"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if run.returncode < 0:  # a kernel that reads where no memory is ends the process
            return re.findall(r"^test_kernels\.py::(\S+)", run.stdout, re.MULTILINE)[-1]
        assert run.returncode in (0, 1), run.stdout + run.stderr
        failed = re.search(r"^FAILED test_kernels\.py::(.+?)(?: - |$)", run.stdout, re.MULTILINE)
        assert (failed is not None) == (run.returncode == 1), run.stdout
        return failed and failed[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    assert first_failure(fault)


if __name__ == "__main__":
    for fault in (None, *FAULTS):
        print(f"{fault or 'nothing planted'}: {first_failure(fault) or 'all tests pass'}", flush=True)
