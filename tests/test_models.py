"""Any causal LM: random models of the families that people have, each through the stages that fit it."""

import json
import shutil

import accelerate
import pytest
import torch
import transformers
from conftest import HERE, run_stage, save_random_llm

import common
import stage0_broken as stage0
import stage1_pca_adapter as stage1
import stage2_encoder as stage2
import stage3_full as stage3

V = 2064  # more than either tokenizer knows: real models pad their tables
SMALL = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama, grouped keys, scaled rope": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE
    ),
    "mistral": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL),
}
QUICK = ("--steps", "2", "--batch-size", "2", "--eval-examples", "3")


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def llm(request, tmp_path_factory):
    """Every other family with a byte-fallback tokenizer and a start token, the others with byte-level BPE and none."""
    tokenizer = ("tiny-llama", "tiny-qwen")[list(ARCHITECTURES).index(request.param) % 2]
    directory = tmp_path_factory.mktemp(request.param.split(",")[0])
    return save_random_llm(directory, ARCHITECTURES[request.param](), HERE / "tiny" / tokenizer)


def test_embeddings_give_the_logits_of_ids(llm):
    reader = common.load_reader(str(llm), torch.device("cpu"), torch.float32)
    ids = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            reader.model(inputs_embeds=reader.table[ids]).logits, reader.model(input_ids=ids).logits
        )
    rows = common.load_data("tiny", reader, 4).test
    prompts = [common.make_prompt(reader, row["context"], row["question"]).ids for row in rows]
    from_ids = common.generate(reader, prompts, 2)
    kept = {bytes(str(prompt), "ascii"): reader.table[prompt] for prompt in prompts}
    assert common.generate(reader, list(kept), 2, kept.__getitem__) == from_ids


def test_the_stages_run(llm, tmp_path):
    run_the_stages(llm, tmp_path)


def test_the_stages_run_on_a_chat_model(random_llm, tmp_path):
    llm = shutil.copytree(random_llm, tmp_path / "chat")
    (llm / "chat_template.jinja").write_text(TEMPLATE)
    said = run_the_stages(llm, tmp_path)
    assert f"<|user|>\\n{common.INSTRUCTION}\\n\\n{{context}}\\nQuestion: {{question}}\\n<|assistant|>" in said


def run_the_stages(llm, tmp_path):
    """All four stages, one on the other; returns what stage 1 printed."""
    run = run_stage(stage1, "--model", llm, *QUICK, "--code-dim", "8", "--out", tmp_path / "1")
    assert run.code == 0, run.stderr
    said = run.stdout
    controls = json.loads((tmp_path / "1" / "config.json").read_text())["controls"]
    assert controls["identity_same_answers"] == 3  # the identity wire reads as the text does
    assert abs(run.result["nll_wire"] - run.result["nll_text"]) < 1.0
    run = run_stage(
        stage2, "--model", llm, *QUICK, "--stage1", tmp_path / "1", "--llm-steps", "1", "--out", tmp_path / "2"
    )
    assert run.code == 0, run.stderr
    run = run_stage(
        stage3, "--eval-only", HERE / stage3.SHIPPED, "--stage2", tmp_path / "2", "--eval-examples", "3",
        "--out", tmp_path / "3",
    )  # fmt: skip
    assert run.code == 0, run.stderr
    run = run_stage(
        stage3, "--receiver", "direct", "--wire", tmp_path / "3", "--model", llm, *QUICK, "--out", tmp_path / "4"
    )
    assert run.code == 0, run.stderr
    run = run_stage(stage0, "--model", llm, *QUICK, "--out", tmp_path / "0")
    assert run.code == 0, run.stderr
    return said


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 500})
    directory = save_random_llm(tmp_path / "llm", config, HERE / "tiny" / "tiny-llama")
    run = run_stage(stage1, "--model", directory, "--smoke", "--out", tmp_path / "out")
    assert run.code == 2 and "its tokenizer has 1024 tokens and its embeddings 500" in run.stderr


def test_checkpointing_changes_no_gradient(llm):
    reader = common.load_reader(str(llm), torch.device("cpu"), torch.float32)
    batch = common.make_batch(reader, common.load_data("tiny", reader, 4).train_rows(0, 0, 2))

    def gradient():
        embeddings = reader.table[batch.ids].requires_grad_()
        logits, states = common.answer_logits(reader, batch, embeddings, states=True)
        (logits.square().sum() + sum(state.square().sum() for state in states)).backward()
        return embeddings.grad

    kept = gradient()
    common.checkpoint_layers(reader.model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        saved: list[int] = []
        assert torch.equal(gradient(), kept)
        twice = sum(saved)
        common.checkpoint_layers(reader.model, on=False)
        saved.clear()
        assert torch.equal(gradient(), kept)
    assert twice != sum(saved)


def test_layers_on_several_devices_change_no_gradient_and_no_answer(llm, monkeypatch):
    """accelerate's hooks, which --device split lives from, around every part of the LLM; here all devices are one."""
    reader = common.load_reader(str(llm), torch.device("cpu"), torch.float32)
    data = common.load_data("tiny", reader, 4)
    batch = common.make_batch(reader, data.train_rows(0, 0, 2))
    prompts = [common.make_prompt(reader, row["context"], row["question"]).ids for row in data.test]

    def gradient_and_answers():
        embeddings = reader.table[batch.ids].requires_grad_()
        logits, states = common.answer_logits(reader, batch, embeddings, states=True)
        (logits.square().sum() + sum(state.square().sum() for state in states)).backward()
        return embeddings.grad, common.generate(reader, prompts, 2)

    gradient, answers = gradient_and_answers()
    layers = [
        name for name, part in reader.model.named_modules() if isinstance(part, common.GradientCheckpointingLayer)
    ]
    parts = dict.fromkeys(layers, "cpu")  # and what is in no layer
    for name, part in reader.model.named_modules():
        if (part._parameters or part._buffers) and not name.startswith(tuple(f"{layer}." for layer in layers)):
            parts[name] = "cpu"
    accelerate.dispatch_model(reader.model, parts, force_hooks=True)
    hook, seen = accelerate.hooks.AlignDevicesHook, set()
    move = hook.pre_forward
    monkeypatch.setattr(hook, "pre_forward", lambda self, part, *a, **b: seen.add(part) or move(self, part, *a, **b))
    through = []
    for on in (False, True):
        common.checkpoint_layers(reader.model, on)
        seen.clear()
        again, same_answers = gradient_and_answers()
        assert torch.equal(again, gradient) and same_answers == answers
        through.append(set(seen))
    assert through[0] == through[1] and {reader.model.get_submodule(name) for name in parts} <= through[0]


def test_split_is_the_run_of_one_device(random_llm, tmp_path):
    runs = {}
    for device in ("cpu", "split"):
        out = tmp_path / device
        flags = ("--model", random_llm, *QUICK, "--code-dim", "8", "--gradient-checkpointing", "--dtype", "float32")
        run = run_stage(stage1, *flags, "--device", device, "--out", out)
        assert run.code == 0, run.stderr
        runs[device] = {key: value for key, value in run.result.items() if not key.endswith("_seconds")}
    assert runs["split"] == runs["cpu"]


def test_split_refuses_what_it_cannot_do(random_llm, tmp_path, monkeypatch):
    flags = ("--model", random_llm, "--smoke", "--device", "split", "--out", tmp_path / "out")

    def refused(*more):
        run = run_stage(stage1, *flags, *more)
        assert run.code == 2 and run.stderr.count("\n") == 1
        return run.stderr

    assert "drop --device split" in refused("--random-weights", "1")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(common, "join_processes", lambda: False)
        assert "not torchrun" in refused("--batch-size", "8")
    with monkeypatch.context() as patch:
        patch.setattr(common.importlib.util, "find_spec", lambda name: None)
        assert "pip install accelerate" in refused()

    def too_large(directory, **options):  # as accelerate places a model that is larger than the GPUs
        model, loaded = load(directory, **options)
        model.hf_device_map = {"model.layers.0": 0, "lm_head": "disk"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return model, loaded

    load = common.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(common.AutoModelForCausalLM, "from_pretrained", too_large)
    assert "does not fit into the memory of" in refused()
    assert not (tmp_path / "out").exists()
