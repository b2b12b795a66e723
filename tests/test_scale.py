"""Dry runs and random weights: what is said of a model's size holds when the model is really there."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import HERE, run_stage

import stage1_pca_adapter as stage1
from plumbing import scale

PUBLISHED = {"llama-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496}
SMALL = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, vocab_size=8000)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A directory with nothing but a config.json."""
    directory = tmp_path_factory.mktemp("shape")
    transformers.LlamaConfig(**SMALL).save_pretrained(directory)
    return directory


def arguments(shape, **more):
    return SimpleNamespace(
        model=str(shape), random_weights=0, code_dim=None, adapter="linear", micro_batch_size=8, **more
    )


@pytest.mark.parametrize(
    "model", ("llama-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-3.1-8b", "llama-3.1-70b")))
)
def test_dry_run_counts_what_is_published(model):
    run = run_stage(stage1, "--model", model, "--dry-run", "--dtype", "bfloat16")
    assert run.code == 0, run.stderr
    assert run.result["parameters"] == PUBLISHED[model]
    assert run.result["held"]["weights"] == pytest.approx(2 * PUBLISHED[model], rel=1e-6)  # and small buffers
    assert run.result["activation_bytes"]["with"] < 0.5 * run.result["activation_bytes"]["without"]
    large, fits = ["80 GB", "141 GB"], run.result["fits"]
    if model == "llama-3.1-70b":
        assert all(cards == ["no single one"] for cards in fits.values())
    else:  # by default, no step goes through the LLM
        assert fits == {"default": ["40 GB", *large], "without": large, "with": ["40 GB", *large]}


MEASURE = """
import gc, json, sys, types, torch, stage1_pca_adapter as stage1
from plumbing import models, scale
args = types.SimpleNamespace(**json.loads(sys.argv[1]))
torch.manual_seed(0)
with scale.PeakMemory() as tensors:
    reader = scale.random_reader(args.model, None, torch.device("cpu"), torch.float32)
    if args.checkpointing:
        models.checkpoint_layers(reader.model)
    batch = scale.random_batch(reader, args.micro_batch_size, scale.LENGTH, scale.ANSWER)
    batch.attention[0, 0] = 0  # padding, as text has: else the LLM makes no mask
    step = scale.steps_of(stage1, scale.random_wire(stage1, reader, 32, "linear"), batch)["wire"]
    step()  # makes the optimiser's state
    gc.collect()
    resting = tensors.peak = tensors.now
    step()
gc.collect()
resident = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
print(json.dumps([tensors.peak - resting, scale.peak_bytes(step, reader.device) - resident]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("checkpointing", (False, True))
def test_dry_run_says_what_a_step_takes(shape, checkpointing):
    args = arguments(shape, checkpointing=checkpointing)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(vars(args))],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back at once
    )
    assert done.returncode == 0, done.stderr
    tensors, resident = json.loads(done.stdout)
    said = scale.trace(stage1, args, torch.float32, checkpointing)["activations"]
    assert said == pytest.approx(tensors, rel=0.1)  # what torch really made
    assert said == pytest.approx(resident, rel=0.1)  # what the process really took


def test_random_weights_time_three_ways(shape, monkeypatch):
    monkeypatch.setattr(scale, "LENGTH", 128)
    flags = ("--steps", "2", "--batch-size", "2", "--adapter", "linear", "--gradient-checkpointing")
    run = run_stage(stage1, "--model", shape, "--random-weights", "2", *flags)
    assert run.code == 0, run.stderr
    ways = run.result["ways"]
    assert run.result["layers"] == 2 and run.result["gradient_checkpointing"]
    # a layer's matmuls and attention forward and to its input; the output matrix at the answer, or everywhere
    d, inner, V = (SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    tokens = 2 * scale.LENGTH
    layers = 2 * (2 * tokens * 2 * (4 * d * d + 3 * d * inner) + (4 + 10) * tokens * scale.LENGTH * d)
    head = 2 * 2 * d * V
    assert ways["LLM alone"]["flops"] == layers + head * 2 * scale.ANSWER
    # the adapter's matmul, forward and to its weight, once for each different token
    once = 2 * 2 * d * (d // 8)
    assert ways["wire"]["flops"] - ways["LLM alone"]["flops"] == once * run.result["unique_tokens"]
    everywhere = head * (tokens - 2 * scale.ANSWER) + once * 2 * (scale.LENGTH - scale.ANSWER)
    assert ways["plain"]["flops"] - ways["LLM alone"]["flops"] == everywhere
    assert all(way["seconds"] > 0 and 0 < way["mfu"] for way in ways.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", ("mixtral", "mamba", "gemma2"))
def test_other_architectures_are_counted_and_timed(family, tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "LENGTH", 64)  # mamba's steps are one after another
    shape = dict(vocab_size=500, hidden_size=32, num_hidden_layers=2)
    more = {} if family == "mamba" else dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    transformers.AutoConfig.for_model(family, **shape, **more).save_pretrained(tmp_path)
    run = run_stage(stage1, "--model", tmp_path, "--dry-run", "--micro-batch-size", "1")
    assert run.code == 0 and run.result["layers"] == 2 and run.result["activation_bytes"]["without"] > 0, run.stderr
    run = run_stage(stage1, "--model", tmp_path, "--random-weights", "1", "--steps", "1", "--batch-size", "1")
    assert run.code == 0 and run.result["layers"] == 1, run.stderr
    run = run_stage(stage1, "--model", tmp_path, "--dry-run", "--micro-batch-size", "1", "--dtype", "float32")
    if family == "mixtral":  # its experts' matmul has no rule for float32 tensors without numbers
        assert run.code == 2 and "cannot be counted in float32" in run.stderr and run.stderr.count("\n") == 1
    else:
        assert run.code == 0, run.stderr


def test_the_three_ways_learn_alike(shape):
    """The plain way computes the same gradient as the wire's: unique ids and answer positions change no result."""
    reader = scale.random_reader(str(shape), 2, torch.device("cpu"), torch.float32)
    batch = scale.random_batch(reader, 2, 64, 8)
    gradients = []
    for way in ("wire", "plain"):
        torch.manual_seed(0)
        wire = scale.random_wire(stage1, reader, 32, "linear")
        seen = wire.adapter.weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
        scale.steps_of(stage1, wire, batch)[way]()
        seen.remove()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (("--random-weights", "99"), "has 6 layers"),
        (("--random-weights", "--data", "squad"), "have no data"),
        (("--dry-run", "--resume"), "have no data"),
        (("--dry-run", "--code-dim", "999"), "above the embedding width"),
        (("--dry-run", "--model", "~nosuchuser/x"), "no config.json of it"),
    ),
)
def test_refusals(shape, flags, message):
    run = run_stage(stage1, "--model", shape, *flags)
    assert run.code == 2 and message in run.stderr and run.stderr.count("\n") == 1
