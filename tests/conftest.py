"""What the tests share: a tiny random LLM for cheap runs, a stage run inside this process, one small wire per stage."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests compare bits, which are the CPU's; before torch is imported
os.environ["OMP_NUM_THREADS"] = "1"  # a sum of more threads has other last bits, which Adam's first steps magnify
os.environ.setdefault("TRITON_INTERPRET", "1")  # test_kernels.py may run in this process, after kernels/ is imported

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent
SHARED = HERE.parent / "shared"  # real data and models beside the project, where there are any
sys.path.insert(0, str(HERE))

import plumbing.report  # noqa: E402
import stage0_broken as stage0  # noqa: E402
import stage1_pca_adapter as stage1  # noqa: E402
import stage2_encoder as stage2  # noqa: E402
import stage3_full as stage3  # noqa: E402
from plumbing.checkpoints import CHECKPOINT, read_checkpoint  # noqa: E402
from plumbing.launch import launch  # noqa: E402
from plumbing.wires import load_wire  # noqa: E402
from stage3 import scorers, slots  # noqa: E402

CPU = torch.device("cpu")
stage3.PIECES, stage3.PIECE_TEXTS = 512, 100  # to learn 8,192 pieces from 8,000 texts takes ten seconds
slots.KNOWN, scorers.STEPS = 20, 10  # before the first step
QUICK = ("--steps", "4", "--batch-size", "4", "--eval-examples", "8")


def need(path: Path) -> Path:
    """Skip with a reason where shared data is absent."""
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    return path


class Run:
    """A finished run of a stage: exit code, stdout, stderr."""

    def __init__(self, code: int, stdout: str, stderr: str):
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def result(self) -> dict:
        """The JSON line."""
        return json.loads(self.stdout.strip().split("\n")[-1])


def run_stage(module, *flags: str) -> Run:
    """A stage as its command line runs it, but without the seconds that importing torch takes."""
    stdout, stderr, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{module.STAGE}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            launch(module.main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return Run(code, stdout.getvalue(), stderr.getvalue())


def succeed(module, *flags: str) -> Run:
    """`run_stage` of a run that must end well."""
    run = run_stage(module, *flags)
    assert run.code == 0, run.stderr
    return run


def run_script(module, *flags: str) -> Run:
    """A stage in a process of its own, as its users start it."""
    command = [sys.executable, module.__file__, *map(str, flags)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, encoding="utf-8")
    return Run(done.returncode, done.stdout, done.stderr)


def save_random_llm(directory: Path, config, tokenizer_from: Path) -> Path:
    """A random LLM of this config, with the tokenizer of another directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def random_llm(tmp_path_factory) -> Path:
    """A random Llama of one layer with the tokenizer of tiny-llama: runs in milliseconds, answers nothing."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return save_random_llm(tmp_path_factory.mktemp("llm"), config, HERE / "tiny" / "tiny-llama")


def ladder_flags(llm: Path, wires: Path) -> dict:
    """name -> (module, flags) of every stage on an LLM, each on top of the wire of the one before, in `wires`."""
    on = ("--model", llm)
    return {
        "stage0": (stage0, (*on, "--smoke")),  # its linear probes are then fitted on 10 prompts, not on 1000
        "stage1": (stage1, (*on, "--code-dim", "8", "--adapter", "codebook", "--llm-steps", "2")),
        "stage2": (stage2, (*on, "--stage1", wires / "stage1")),
        "stage3": (stage3, on),
        "slots": (slots, ("--receiver", "slots", *on)),
    }


LADDER = ("stage0", "stage1", "stage2", "stage3", "slots")


@pytest.fixture(scope="session")
def ladder(random_llm, tmp_path_factory) -> Path:
    """A folder with one small trained wire per stage, each on top of the other."""
    wires = tmp_path_factory.mktemp("ladder")
    for name, (module, flags) in ladder_flags(random_llm, wires).items():
        (wires / f"{name}.txt").write_text(succeed(module, *flags, *QUICK, "--out", wires / name).stdout)
    return wires


@pytest.fixture
def no_picture(monkeypatch):
    """A third of the time of so short a run is its report.png."""
    monkeypatch.setattr(plumbing.report, "draw_report", lambda *_: None)


@pytest.fixture(scope="session")
def sender() -> stage3.Sender:
    """The sender of the shipped stage-3 wire."""
    return stage3.load_sender(load_wire(stage3.SHIPPED, "stage3", stage3.WIRE))


def assert_same_gradients(out: Path, other: Path) -> None:
    """Two runs ended with the same means of their gradients, which the optimiser keeps in the checkpoint.

    Weights say less: Adam's steps forgive a wrong scale of the gradient, and follow even one that is rounding.
    """
    mine, theirs = (read_checkpoint(folder / CHECKPOINT)[0] for folder in (out, other))
    assert mine.keys() == theirs.keys()
    means = [name for name in theirs if name.endswith((".exp_avg", ".momentum_buffer"))]
    assert means
    for name in means:
        atol = 5e-3 * theirs[name].abs().max().item()
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=atol, msg=lambda t, n=name: f"{n}: {t}")
