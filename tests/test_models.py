"""Any causal LM can be the reader: random models of the families that people have go through the stages."""

import json
import os
import shutil
import subprocess
import sys

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from conftest import CPU, HERE, run_stage, save_random_llm, succeed

import plumbing.launch
import plumbing.models
import stage0_broken as stage0
import stage1_pca_adapter as stage1
import stage2_encoder as stage2
import stage3_full as stage3
from common import INSTRUCTION, PROMPT, answer_logits, as_prompt, generate, load_reader, make_batch, make_prompt
from plumbing.data import load_data
from plumbing.hub import AutoModelForCausalLM, GradientCheckpointingLayer
from plumbing.launch import UserError
from plumbing.models import check_embeddings, checkpoint_layers, weight_bytes
from plumbing.spelling import tokenize
from stage3 import slots

V = 4112  # more than either tokenizer knows: real models pad their tables
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


# families with experts, states instead of attention, other positions, or embeddings narrower than the layers
MORE = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
    "falcon, alibi": lambda: transformers.FalconConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt-j": lambda: transformers.GPTJConfig(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4, bos_token_id=1, eos_token_id=2
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL, num_key_value_heads=2),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL, num_key_value_heads=2),
    "granite": lambda: transformers.GraniteConfig(**SMALL, num_key_value_heads=2, embedding_multiplier=12.0),
    "opt-350m": lambda: transformers.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
}  # fmt: skip


# the fast tests take these families: both tokenizers, and several kinds of embeddings, positions and layers
FAST = ("llama", "gemma", "gpt2", "opt", "gpt-oss", "mamba", "granite", "opt-350m")
FAST_THROUGH_THE_STAGES = ("gemma",)  # beside the chat model, which is a Llama with the other tokenizer


def families(names, fast=FAST):
    """The families as parameters of a test; all but the fast ones are slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", params=families(ARCHITECTURES))
def llm(request, tmp_path_factory):
    """Every other family has a byte-fallback tokenizer and a start token, the others have byte-level BPE and none."""
    tokenizer = ("tiny-llama", "tiny-qwen")[list(ARCHITECTURES).index(request.param) % 2]
    directory = tmp_path_factory.mktemp(request.param.split(",")[0])
    return save_random_llm(directory, ARCHITECTURES[request.param](), HERE / "tiny" / tokenizer)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_embeddings_give_the_logits_of_ids(llm, dtype):
    reader = load_reader(str(llm), CPU, dtype)
    if "gemma2" not in str(llm):  # it caps its attention scores, which the library's fused attention cannot do
        assert reader.model.config._attn_implementation == "sdpa"
    ids = torch.randint(V, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        from_embeddings = reader.model(inputs_embeds=reader.table[ids].to(dtype)).logits
        torch.testing.assert_close(from_embeddings, reader.model(input_ids=ids).logits, rtol=0, atol=0)
    rows = load_data("tiny", reader, 4).test
    prompts = [make_prompt(reader, row["context"], row["question"]).ids for row in rows]
    from_ids = generate(reader, prompts, 2)
    kept = {bytes(str(prompt), "ascii"): reader.table[prompt] for prompt in prompts}
    assert generate(reader, list(kept), 2, kept.__getitem__) == from_ids


@pytest.mark.parametrize("name", families(MORE))
def test_more_families_read_and_answer_from_embeddings(name, tmp_path):
    directory = save_random_llm(tmp_path / "llm", MORE[name](), HERE / "tiny" / "tiny-qwen")
    reader = load_reader(str(directory), CPU, torch.float32, checkpointing=True)
    data = load_data("tiny", reader, 4)
    prompts = [make_prompt(reader, row["context"], row["question"]).ids for row in data.test]
    kept = {bytes(str(prompt), "ascii"): reader.table[prompt] for prompt in prompts}
    assert generate(reader, list(kept), 2, kept.__getitem__) == generate(reader, prompts, 1)
    batch = make_batch(reader, data.train_rows(0, 0, 2))
    embeddings = reader.table[batch.ids].requires_grad_()
    answer_logits(reader, batch, embeddings).square().sum().backward()
    assert (embeddings.grad.abs().sum(-1) > 0)[batch.sent].all()  # every token of a prompt bears on its answer


@pytest.mark.parametrize("llm", families(ARCHITECTURES, FAST_THROUGH_THE_STAGES), indirect=True)
def test_the_stages_run(llm, tmp_path, no_picture):
    run_the_stages(llm, tmp_path)


def test_the_stages_run_on_a_chat_model(random_llm, tmp_path, no_picture):
    llm = shutil.copytree(random_llm, tmp_path / "chat")
    (llm / "chat_template.jinja").write_text(TEMPLATE)
    said = run_the_stages(llm, tmp_path)
    assert f"<|user|>\\n{INSTRUCTION}\\n\\n{{context}}\\nQuestion: {{question}}\\n<|assistant|>" in said


def run_the_stages(llm, tmp_path):
    """All four stages and slots run, one on top of the other. Returns what stage 1 printed."""
    on = ("--model", llm, *QUICK)
    run = succeed(stage1, *on, "--code-dim", "8", "--out", tmp_path / "1")
    said = run.stdout
    controls = json.loads((tmp_path / "1" / "config.json").read_text())["controls"]
    assert controls["identity_same_answers"] == 3  # the identity wire reads as the text does
    assert abs(run.result["nll_wire"] - run.result["nll_text"]) < 1.0
    succeed(stage2, *on, "--stage1", tmp_path / "1", "--out", tmp_path / "2")
    result = succeed(stage3, *on, "--out", tmp_path / "3").result
    assert result["nll_wire"] == result["nll_text"] and result["f1"] == result["text_f1"]
    succeed(slots, *on, "--out", tmp_path / "4")
    succeed(stage0, *on, "--smoke", "--out", tmp_path / "0")  # --smoke: linear probes of 10 prompts, not of 1000
    return said


# no wire can be put before these models: (config, what the refusal says, a change of the weights)
UNFIT = {
    "a second embedding for each token": (
        lambda: transformers.Gemma4TextConfig(
            **{**SMALL, "pad_token_id": 0}, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=V,
            hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"],
        ),
        "does not run from embeddings alone",
        None,
    ),
    "padding changes its state": (
        lambda: transformers.RwkvConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=2, context_length=256, bos_token_id=1, eos_token_id=2
        ),
        "does not ignore masked padding",
        None,
    ),
    "no answers from embeddings": (
        lambda: transformers.BambaConfig(
            **{**SMALL, "pad_token_id": 0}, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8,
            mamba_d_head=8, mamba_d_state=8,
        ),
        "does not run from embeddings alone",
        None,
    ),
    "looks ahead": (
        lambda: transformers.MegatronBertConfig(**SMALL, is_decoder=False),
        "looks at tokens that come later",
        None,
    ),
    "logits everywhere": (
        lambda: transformers.TrOCRConfig(
            vocab_size=V, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
            max_position_embeddings=256,
        ),
        "makes logits at every position",
        None,
    ),
    "a short context": (
        lambda: transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 40}),
        "of 40 tokens has no room for a prompt and an answer",
        None,
    ),
    "weights that are no numbers": (
        lambda: transformers.LlamaConfig(**SMALL),
        "makes NaN or infinite logits",
        lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ("float32", pytest.param("bfloat16", marks=pytest.mark.slow)))
@pytest.mark.parametrize("why", UNFIT)
def test_an_llm_that_no_wire_fits_is_refused(why, dtype, tmp_path):
    config, expected, change = UNFIT[why]
    llm = save_random_llm(tmp_path / "llm", config(), HERE / "tiny" / "tiny-llama")
    if change:
        tensors = safetensors.torch.load_file(llm / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    run = run_stage(stage1, "--model", llm, "--smoke", "--dtype", dtype, "--out", tmp_path / "out")
    assert run.code == 2 and expected in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "out").exists()


def test_an_llm_that_reads_more_of_a_token_than_its_embedding_is_refused(random_llm):
    reader = load_reader(str(random_llm), CPU, torch.float32)
    prompt = tokenize(reader, as_prompt(reader, PROMPT))
    check_embeddings(reader, prompt)
    table = reader.table
    reader.table = table * 1.2
    with pytest.raises(UserError, match="reads more of a token than its embedding"):
        check_embeddings(reader, prompt)
    reader.table = table[:20]
    with pytest.raises(UserError, match="has 20 embeddings and its prompts the token"):
        check_embeddings(reader, prompt)


LOAD = """
import sys, threading, time, torch
from common import load_reader
from plumbing import hub

hub.AutoModelForCausalLM, hub.AutoTokenizer, hub.GradientCheckpointingLayer  # importing transformers is not loading

def anonymous():  # not the file's pages, which the machine takes back when it needs them
    return 1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

before, done = anonymous(), False
peak = [before]
watcher = threading.Thread(target=watch)
watcher.start()
reader = load_reader(sys.argv[1], torch.device("cpu"), torch.bfloat16)
done = True
watcher.join()
assert all(p.dtype == torch.bfloat16 for p in reader.model.parameters())
print(peak[0] - before, sum(p.numel() for p in reader.model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("saved_as", (torch.bfloat16, torch.float32))
def test_weights_are_loaded_with_no_second_copy(saved_as, tmp_path):
    config = {**SMALL, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 10}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config), dtype=saved_as)
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    transformers.AutoTokenizer.from_pretrained(HERE / "tiny" / "tiny-llama").save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", LOAD, tmp_path], cwd=HERE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    taken, numbers = map(int, run.stdout.split())
    assert numbers > 70e6  # 150 MB
    # weights saved in bfloat16 stay pages of the file; others are converted once. check_embeddings takes the rest
    assert taken < 2 * numbers * (saved_as == torch.float32) + 50e6


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 500})
    directory = save_random_llm(tmp_path / "llm", config, HERE / "tiny" / "tiny-llama")
    run = run_stage(stage1, "--model", directory, "--smoke", "--out", tmp_path / "out")
    assert run.code == 2 and "its tokenizer has 4096 tokens and its embeddings 500" in run.stderr


def test_checkpointing_changes_no_gradient(llm):
    reader = load_reader(str(llm), CPU, torch.float32)
    batch = make_batch(reader, load_data("tiny", reader, 4).train_rows(0, 0, 2))

    def gradient():
        embeddings = reader.table[batch.ids].requires_grad_()
        logits, states = answer_logits(reader, batch, embeddings, states=True)
        (logits.square().sum() + sum(state.square().sum() for state in states)).backward()
        return embeddings.grad

    kept = gradient()
    checkpoint_layers(reader.model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        saved: list[int] = []
        assert torch.equal(gradient(), kept)
        twice = sum(saved)
        checkpoint_layers(reader.model, on=False)
        saved.clear()
        assert torch.equal(gradient(), kept)
    assert twice != sum(saved)


def test_layers_on_several_devices_change_no_gradient_and_no_answer(llm, monkeypatch):
    """accelerate's hooks, which --device split needs, are around every part of the LLM; here all devices are one."""
    reader = load_reader(str(llm), CPU, torch.float32)
    data = load_data("tiny", reader, 4)
    batch = make_batch(reader, data.train_rows(0, 0, 2))
    prompts = [make_prompt(reader, row["context"], row["question"]).ids for row in data.test]

    def gradient_and_answers():
        embeddings = reader.table[batch.ids].requires_grad_()
        logits, states = answer_logits(reader, batch, embeddings, states=True)
        (logits.square().sum() + sum(state.square().sum() for state in states)).backward()
        return embeddings.grad, generate(reader, prompts, 2)

    gradient, answers = gradient_and_answers()
    layers = [name for name, part in reader.model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
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
        checkpoint_layers(reader.model, on)
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
        run = succeed(stage1, *flags, "--device", device, "--out", out)
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
        patch.setattr(plumbing.launch, "join_processes", lambda: False)
        assert "not torchrun" in refused("--batch-size", "8")
    with monkeypatch.context() as patch:
        patch.setattr(plumbing.models.importlib.util, "find_spec", lambda name: None)
        assert "pip install accelerate" in refused()

    def too_large(directory, **options):  # as accelerate places a model that is larger than the GPUs
        model, loaded = load(directory, **options)
        model.hf_device_map = {"model.layers.0": 0, "lm_head": "disk"}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return model, loaded

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_large)
    assert "does not fit into the memory of" in refused()
    assert not (tmp_path / "out").exists()


def save_in_few_bits(directory, saved, **bits):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**bits)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, device_map="cpu")
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(saved).save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_weights_in_8_bits_stay_so_and_go_through_every_stage(tmp_path):
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 96})
    whole = save_random_llm(tmp_path / "whole", config, HERE / "tiny" / "tiny-llama")
    llm = save_in_few_bits(tmp_path / "llm", whole, load_in_8bit=True)
    gradients = []
    for directory in (whole, llm):
        reader = load_reader(str(directory), CPU, torch.float32)
        batch = make_batch(reader, load_data("tiny", reader, 4).train_rows(0, 0, 2))
        embeddings = reader.table[batch.ids].requires_grad_()
        answer_logits(reader, batch, embeddings).square().sum().backward()
        gradients.append(embeddings.grad.flatten())
    assert reader.model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert 0.99 < torch.cosine_similarity(*gradients, dim=0) < 1
    held = sum(tensor.numel() * tensor.element_size() for tensor in reader.model.state_dict().values())
    assert weight_bytes(llm, torch.float32)[0] == pytest.approx(held, rel=0.01)
    run_the_stages(llm, tmp_path)
    again = load_reader(str(llm), CPU, torch.float32)
    assert again.fingerprint == reader.fingerprint


@pytest.mark.slow
def test_a_trained_llm_in_8_bits_still_answers(tmp_path):
    llm = save_in_few_bits(tmp_path / "llm", HERE / "tiny" / "tiny-llama", load_in_8bit=True)
    run = succeed(stage1, "--model", llm, "--smoke", "--adapter", "codebook", "--out", tmp_path / "out")
    assert run.result["text_f1"] > 65 and run.result["retention"] > 95


def test_weights_in_4_bits_are_refused_on_a_cpu(random_llm, tmp_path):
    """bitsandbytes runs its kernel for inference there, which has no gradient, and autograd only warns."""
    llm = save_in_few_bits(tmp_path / "llm", random_llm, load_in_4bit=True)
    run = run_stage(stage1, "--model", llm, "--smoke", "--out", tmp_path / "out")
    assert run.code == 2 and "wrong gradients for weights in 4 bits on a CPU" in run.stderr
    assert run.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_another_package_called_kernels_is_not_in_the_way(tmp_path):
    """transformers imports Hugging Face's kernels where it is installed, and would find this project's folder."""
    version = getattr(transformers.utils.import_utils, "KERNELS_MIN_VERSION", "1.0")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    (tmp_path / f"kernels-{version}.dist-info").mkdir()
    (tmp_path / f"kernels-{version}.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import stage1_pca_adapter as s; print(s.adapt.__module__)"]
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "kernels.adapter\n", run.stderr
