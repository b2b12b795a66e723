"""Do the fast tests of the kernels see a broken kernel? Each of five faults, planted in a copy, must be caught.

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

# what is wrong -> (text in kernels/adapter.py, what takes its place)
FAULTS = {
    "wrong mask": (
        """            a + source[:, None] * a_row + inner[None, :] * a_col,
            mask=live[:, None] & (inner[None, :] < k)""",
        """            a + source[:, None] * a_row + inner[None, :] * a_col,
            mask=live[:, None] & (inner[None, :] <= k)""",
    ),
    "missing eps": (
        "s = tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d + eps)",
        "s = tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d)",
    ),
    "dropped mean": ("offset = -(mean.float() @", "offset = 0 * (mean.float() @"),
    "stale Gram": (
        "gram = gram_matrix(weight, bias) if gram is None else gram\n            scale = _launch",
        "gram = globals().setdefault('OLD', {}).setdefault(weight.data_ptr(), gram_matrix(weight, bias))\n"
        "            scale = _launch",
    ),
    "wrong stride": ("*codes.stride(), gram.stride(0), *weight.stride(),\n            _target_row", "*codes.stride(), "
                     "gram.stride(0), d, 1,\n            _target_row"),
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
            path, (old, new) = copy / "kernels" / "adapter.py", FAULTS[fault]
            text = path.read_text()
            assert text.count(old) == 1, f"the line to break for {fault!r} is there {text.count(old)} times, not once"
            path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "test_kernels.py"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
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
