"""Wires and directories that a stranger gives: what is read is never overwritten, what does not fit is refused."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import QUICK, ladder_flags, run_stage, succeed


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("stage", "flag"),
    (("stage0", "--eval-only"), ("stage1", "--model"), ("stage1", "--eval-only"), ("stage2", "--stage1"),
     ("stage3", "--stage2"), ("stage3", "--eval-only"), ("direct", "--wire")),
)  # fmt: skip
def test_a_directory_that_is_read_is_not_written(stage, flag, random_llm, ladder, tmp_path, no_picture):
    module, flags = ladder_flags(random_llm, ladder)[stage]
    flags = [*map(str, flags)]
    if flag == "--eval-only":
        flags = [flag, str(ladder / stage)]
    read = flags[flags.index(flag) + 1]
    copied = shutil.copytree(read, tmp_path / "read")
    (tmp_path / "link").symlink_to(copied)
    flags = [str(copied) if value == read else value for value in flags]
    before = files(copied)
    for out in (copied, tmp_path / "link"):
        run = run_stage(module, *flags, *QUICK, "--out", out)
        assert run.code == 2 and "this run reads that directory" in run.stderr, run.stderr
        assert run.stderr.count("\n") == 1 and files(copied) == before


@pytest.mark.parametrize("stage", ("stage1", "direct"))
def test_an_unfinished_run_is_not_discarded_without_being_told(stage, random_llm, ladder, tmp_path, no_picture):
    module, flags = ladder_flags(random_llm, ladder)[stage]
    out = shutil.copytree(ladder / stage, tmp_path / "out")
    os.utime(out / "wire.safetensors", (0, 0))  # of an older run: the last one was killed after its checkpoint
    before = files(out)
    evaluation = ("--eval-only", ladder / stage, *(("--receiver", "direct") if stage == "direct" else ()))
    for started in (flags, evaluation):
        run = run_stage(module, *started, *QUICK, "--out", out)
        assert run.code == 2 and "the checkpoint of an unfinished run is there" in run.stderr, run.stderr
        assert run.stderr.count("\n") == 1 and files(out) == before
    run = run_stage(module, *flags, "--out", out, "--resume", "--overwrite")
    assert run.code == 2 and "drop one of them" in run.stderr
    succeed(module, *flags, *QUICK, "--out", out, "--overwrite")
    succeed(module, *flags, *QUICK, "--out", out)  # that one ended: nothing is lost
