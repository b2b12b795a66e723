"""results/run_kernels.py where no GPU is: its parts in order, within their time, whatever becomes of them."""

import json
import sys

import pytest

from results import run_kernels
from results.run_kernels import Part


class Machine:
    """A clock, and parts that take as long as it is told."""

    def __init__(self, takes: dict[str, tuple[float, str, str]]):
        self.now, self.takes, self.given = 0.0, takes, []

    def execute(self, part: Part, seconds: float) -> tuple[str, str]:
        self.given.append(seconds)
        takes, ended, output = self.takes[part.name]
        self.now += min(takes, seconds)
        return ("stopped" if takes > seconds else ended), output


def test_parts_run_within_their_time_and_failures_are_passed_over(tmp_path):
    bench = '{"device": "a GPU"}\n{"tflops": 1.0, "N": 1}\n{"tflops": 2.0, "N": 2}\n{"tflo'  # stopped while it wrote
    machine = Machine(
        {"a": (50, "exit code 1", "x\nbroken"), "b": (99, "ok", bench), "c": (5, "ok", ""), "d": (1, "ok", "")}
    )
    parts = [Part("a", 60, []), Part("b", 40, [], "b.json"), Part("c", 60, [], "c.json"), Part("d", 60, [])]
    rows = run_kernels.run_parts(parts, tmp_path / "log.jsonl", 104, machine.execute, lambda: machine.now)
    assert machine.given == [60, 40, 14]  # the total is 104: 14 are left for c, and 9 for d
    assert [row["ended"] for row in rows] == ["exit code 1", "stopped", "ok", "not started: no time left"]
    assert [row["seconds"] for row in rows] == [50, 40, 5, 0] and rows[0]["last_line"] == "broken"
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows
    kept = json.loads((tmp_path / "b.json").read_text())
    assert kept["device"] == "a GPU" and [row["N"] for row in kept["operator"]] == [1, 2]
    assert not (tmp_path / "c.json").exists()  # it measured nothing: an older file would stay


@pytest.mark.parametrize(
    "code,seconds,ended",
    (
        ("print('done')", 60, "ok"),
        ("print('half', flush=True); import time; time.sleep(60)", 2, "stopped after 2 s"),
        ("import sys; sys.exit(3)", 60, "exit code 3"),
    ),
)
def test_a_part_is_a_process_that_is_stopped_in_time(code, seconds, ended):
    how, output = run_kernels.execute(Part("a part", 60, [sys.executable, "-c", code]), seconds)
    assert how == ended and output == {"ok": "done\n", "exit code 3": ""}.get(ended, "half\n")


def test_a_missing_program_is_said():
    assert run_kernels.execute(Part("memcheck", 60, ["no-such-program"]), 60) == (
        "no-such-program is not installed",
        "",
    )


@pytest.mark.parametrize("no_compile", (False, True))
def test_all_parts_fit_into_ten_minutes(no_compile):
    parts = run_kernels.parts_on_a_gpu("gpu", ["512", "65536"], no_compile)
    names = [part.name.split()[0] for part in parts]
    compiled = [] if no_compile else ["forms"]
    assert names == ["tests", "large", *["forms"] * 3, *["step"] * 3, *compiled, "memcheck"]
    assert parts[-1].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    forms = parts[2].command
    assert forms[forms.index("--sizes") + 1 :][:2] == ["512", "65536"]
    assert sum(part.seconds for part in parts) <= run_kernels.GPU_SECONDS


def test_the_report_of_another_compiler_stays(tmp_path):
    pytest.importorskip("triton")
    path = tmp_path / "aot.json"
    assert run_kernels.compiles_here(path)
    path.write_text('{"triton": "1.0"}')
    assert not run_kernels.compiles_here(path)
