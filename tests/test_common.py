"""What the stages share: embeddings, PCA, prompts, batches, generation."""

import json
import string
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CPU, HERE
from transformers import AutoModelForCausalLM

import common
from plumbing.data import Data
from plumbing.launch import UserError
from tiny import world

TINY = str(HERE / "tiny" / "tiny-llama")
ROWS = world.make_examples("test", 12)


@pytest.fixture(scope="module")
def reader() -> common.Reader:
    return common.load_reader("tiny", CPU, torch.float32)


# --- models


SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "gemma": transformers.GemmaConfig(**SMALL, head_dim=8, num_key_value_heads=2),  # sqrt(d) in the module
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2),
    "granite": transformers.GraniteConfig(**SMALL, embedding_multiplier=12.0),  # a factor behind the module
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2),  # positions are added behind it
    "opt": transformers.OPTConfig(
        **{**SMALL, "ffn_dim": 24}, word_embed_proj_dim=8
    ),  # the table is narrower than the model
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_is_what_the_model_reads_for_each_token(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()
    ids = torch.tensor([[5, 3, 39, 7, 7]])
    with torch.no_grad():
        table = common.embedding_table(model)
        torch.testing.assert_close(model(inputs_embeds=table[ids]).logits, model(input_ids=ids).logits)


def test_fingerprint_tells_models_apart_but_not_dtypes(reader):
    again = common.load_reader(TINY, CPU, torch.bfloat16)
    other = common.load_reader("tiny-qwen", CPU, torch.float32)
    assert again.fingerprint == reader.fingerprint != other.fingerprint
    for changed in (reader.model.model.norm.weight, reader.model.model.layers[2].self_attn.q_proj.weight[0]):
        kept = changed.clone()
        with torch.no_grad():
            changed[0] += 0.5
            assert common.fingerprint(reader.model) != reader.fingerprint
            changed.copy_(kept)
    assert common.fingerprint(reader.model) == reader.fingerprint


def test_a_models_own_penalties_do_not_bend_greedy_decoding(tmp_path):
    for path in Path(TINY).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 2.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    penal, plain = (common.load_reader(str(name), CPU, torch.float32) for name in (tmp_path, TINY))
    prompts = [common.make_prompt(plain, row["context"], row["question"]).ids for row in ROWS]
    assert common.generate(penal, prompts, 12) == common.generate(plain, prompts, 12)


def test_a_loaded_model_is_frozen(reader):
    assert not any(p.requires_grad for p in reader.model.parameters()) and not reader.model.training


# --- PCA


def test_pca_from_counts_is_the_pca_of_the_corpus():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30, 8, generator=generator) * torch.linspace(3, 0.2, 8)
    ids = torch.randint(0, 20, (5000,), generator=generator)
    pca = common.fit_pca(table, torch.bincount(ids, minlength=30)).first(3)
    corpus = table[ids].double()
    mean = corpus.mean(0)
    _, singular, right = torch.linalg.svd(corpus - mean, full_matrices=False)
    torch.testing.assert_close(pca.mean.double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((pca.components.double() * right[:3].T).sum(0).abs(), torch.ones(3).double())
    assert pca.explained == pytest.approx((singular[:3].square().sum() / singular.square().sum()).item())
    largest = pca.components.abs().argmax(0)
    assert (pca.components[largest, range(3)] > 0).all()


def test_token_counts_are_those_of_the_prompts(reader):
    data = Data("qa", ROWS, [], [])
    counts = common.token_counts(reader, data, seed=0)
    ids = [token for row in ROWS for token in common.make_prompt(reader, row["context"], row["question"]).ids]
    assert torch.equal(counts.long(), torch.bincount(torch.tensor(ids), minlength=len(counts)))


# --- prompts and batches


def test_a_long_context_is_cut_and_the_question_kept(reader):
    row = ROWS[0]
    whole = common.make_prompt(reader, row["context"], row["question"])
    assert not whole.truncated
    cut = common.make_prompt(reader, row["context"], row["question"], len(whole.ids) - 10)
    assert cut.truncated and len(whole.ids) - 14 <= len(cut.ids) <= len(whole.ids) - 10
    kept, _, rest = cut.text.partition("\nQuestion: ")
    assert row["context"].startswith(kept) and rest == f"{row['question']}\nAnswer:"
    long = common.make_prompt(reader, row["context"] * 50, row["question"])
    assert len(long.ids) <= reader.context_tokens - common.MAX_NEW_TOKENS and row["question"] in long.text
    with pytest.raises(UserError, match="does not fit"):
        common.make_prompt(reader, "x", row["question"] * 200)
    with pytest.raises(UserError, match="does not fit"):
        common.check_prompts(reader, Data("qa", None, [], [{**row, "question": row["question"] * 200}]))
    common.check_prompts(reader, Data("qa", ROWS, ROWS, ROWS))
    alone = common.make_prompt(reader, "", row["question"])
    assert common.truncated_prompt(reader, row, 5).ids == alone.ids  # the question is kept even where it does not fit
    assert len(common.truncated_prompt(reader, row, len(alone.ids) + 9).ids) <= len(alone.ids) + 9


def test_labels_are_the_answer_and_eos_and_nothing_else(reader):
    batch = common.make_batch(reader, ROWS)
    assert (batch.attention.sum(1) < batch.ids.shape[1]).any()  # some are padded
    for i, row in enumerate(ROWS):
        length = int(batch.attention[i].sum())
        assert batch.attention[i, :length].all()  # padding is on the right: positions have no gap
        targets = batch.labels[i][batch.labels[i] != common.IGNORE].tolist()
        assert targets[-1] == reader.tokenizer.eos_token_id
        assert reader.tokenizer.bos_token_id not in targets
        assert reader.tokenizer.decode(targets, skip_special_tokens=True).strip() == row["answers"][0]
        sent = int(batch.sent[i].sum())
        assert batch.sent[i, :sent].all() and batch.ids[i, sent:length].tolist() == targets
        # a label stands one before the token that it names
        assert batch.labels[i, sent - 1 : length - 1].tolist() == targets


def test_answer_logits_are_those_of_the_whole_sequence(reader):
    batch = common.make_batch(reader, ROWS[:5])
    logits = common.answer_logits(reader, batch, reader.table[batch.ids])
    at = 0
    for i in range(5):
        length = int(batch.attention[i].sum())
        alone = reader.model(input_ids=batch.ids[i : i + 1, :length]).logits[0]
        own = (batch.labels[i] != common.IGNORE).nonzero()[:, 0]
        torch.testing.assert_close(logits[at : at + len(own)], alone[own], atol=2e-4, rtol=1e-4)
        at += len(own)
    assert at == len(logits)


def test_a_chat_template_writes_the_start_token_once(reader):
    from dataclasses import replace

    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[model]"
    )
    chat = replace(reader, tokenizer=tokenizer)
    prompt = common.make_prompt(chat, ROWS[0]["context"], ROWS[0]["question"])
    assert prompt.ids.count(tokenizer.bos_token_id) == 1 and prompt.text.endswith("[model]")
    assert ROWS[0]["question"] in prompt.text and ROWS[0]["context"] in prompt.text
    answer = common.answer_ids(chat, prompt, "red")
    assert tokenizer.bos_token_id not in answer and answer[-1] == tokenizer.eos_token_id


# --- generation


def test_batched_generation_from_embeddings_equals_a_plain_loop(reader):
    prompts = [common.make_prompt(reader, row["context"], row["question"]).ids for row in ROWS]
    assert len({len(ids) for ids in prompts}) > 3  # of different lengths, so padding and positions matter
    plain = []
    for ids in prompts:
        ids, new = list(ids), []
        while len(new) < common.MAX_NEW_TOKENS:
            token = int(reader.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == reader.tokenizer.eos_token_id:
                break
            ids.append(token)
            new.append(token)
        plain.append(reader.tokenizer.decode(new).strip())
    assert common.generate(reader, prompts, batch_size=5) == plain

    def receive(message: bytes) -> torch.Tensor:
        return reader.table[torch.frombuffer(bytearray(message), dtype=torch.int64)]

    messages = [torch.tensor(ids).numpy().tobytes() for ids in prompts]
    assert common.generate(reader, messages, batch_size=12, receive=receive) == plain
    assert len(set(plain)) > 6


def test_much_padding_changes_nothing(reader):
    """Beside a prompt that fills the context, the others are mostly padding: attended to, it would cost answers."""
    long = common.make_prompt(reader, " ".join(row["context"] for row in ROWS), ROWS[0]["question"]).ids
    prompts = [common.make_prompt(reader, row["context"], row["question"]).ids for row in ROWS]
    assert len(long) > 3 * max(map(len, prompts))
    alone = common.generate(reader, prompts, batch_size=1)
    assert common.generate(reader, [*prompts, long, long[1:]], batch_size=14)[:12] == alone


# --- sizes


def test_byte_baselines(reader):
    texts = ["aaaa" * 10, string.ascii_letters]
    baselines = common.byte_baselines(reader, texts, [[1] * 7, [2] * 8])  # V = 4096: 12 bits a token
    assert baselines["text_bytes"] == (40 + 52) / 2 and baselines["packed_token_bytes"] == (11 + 12) / 2
    assert baselines["zlib_bytes"] < 46
