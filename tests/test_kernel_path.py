"""Which kernels the stages run: CPU tensors go through them here, by Triton's interpreter, and launches are recorded.

A stage that computed its codes or its embeddings in another way, however right, would fail.
"""

import pytest
import torch
from conftest import CPU

import stage1_pca_adapter as stage1
import stage2_encoder as stage2
from common import PCA, fit_pca, load_reader, make_batch
from kernels import adapter as operator

ROW = {"context": "Ann met Ben.", "question": "Who met Ben?", "answers": ["Ann"]}
RMS = torch.tensor(0.05)
# what is launched forward and backward by an adapter of a kind: the codes of tokens are rows of a table
BY_IDS = {"linear": ["ids -> out"], "mlp": ["match_rms"], "codebook": ["match_rms"]}
BY_CODES = {"linear": ["codes -> out"], "mlp": ["match_rms"], "codebook": ["match_rms"]}


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that run, in order; of the fused one, what goes in and what comes out."""
    if not operator.HAVE_TRITON:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(operator, "interpret_on_cpu", True)
    recorded = []

    class Recorder:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(operator.fused, name)

        def __getitem__(self, grid):
            def launch(*args, **options):
                name = self.name.strip("_").removesuffix("_kernel")
                if name == "fused":
                    _, ids, _, _, components, weight, *_ = args
                    source = "x" if components is not None else "ids" if ids is not None else "codes"
                    name = f"{source} -> {'codes' if weight is None else 'out'}"
                recorded.append(name)
                assert args[0].dtype == torch.float32  # of adapter and table, and here of the LLM too
                return self.kernel[grid](*args, **options)

            return launch

    for name in ("_fused_kernel", "_match_rms_kernel", "_unmatch_rms_kernel"):
        monkeypatch.setattr(operator.fused, name, Recorder(name))
    return recorded


@pytest.fixture(scope="module")
def reader(random_llm):
    return load_reader(str(random_llm), CPU, torch.float32)


@pytest.mark.parametrize("kind", BY_IDS)
def test_stage1_projects_once_and_decodes_by_id(launches, reader, kind):
    counts = torch.ones(len(reader.table))
    pca = fit_pca(reader.table, counts).first(8)
    wire = stage1.Wire(reader, pca, RMS)
    assert launches == ["x -> codes"]
    wire.adapter = stage1.Adapter(kind, pca, reader, wire.codes, counts)
    batch, variance = make_batch(reader, [ROW]), torch.tensor(1.0)
    launches.clear()
    sum(stage1.llm_losses(wire, batch, len(batch.targets), int(batch.sent.sum()), variance)).backward()
    assert launches == [*BY_IDS[kind], "unmatch_rms"]
    launches.clear()
    wire.receive(wire.send(stage1.Prompt("", [5, 7, 7], False)))
    assert launches == BY_CODES[kind]


def stage2_wire(reader, kind: str) -> stage2.Wire:
    torch.manual_seed(0)
    codes, pca = torch.randn(len(reader.table), 8), PCA(torch.zeros(32), torch.eye(32)[:, :8], torch.ones(32))
    adapter = stage2.Adapter(kind, pca, reader, codes, torch.ones(len(codes)))
    return stage2.Wire(reader, stage2.Encoder(8).eval(), adapter, codes[[1]], RMS)


@pytest.mark.parametrize("kind", BY_CODES)
def test_stage2_learns_through_the_operator(launches, reader, kind):
    wire, batch = stage2_wire(reader, kind), make_batch(reader, [ROW])
    stage2.answer_loss(wire, [ROW], batch, len(batch.targets)).backward()
    assert launches == [*BY_CODES[kind], "unmatch_rms"]
