"""What the four stages share and a reader should know: a frozen LLM, prompts, batches, generation, PCA, evaluation.

Nothing here learns; every idea of the ladder is in the stage files. Read `stage1_pca_adapter.py` first. plumbing/ holds
the rest, which no stage is about: arguments, loading and checking models, data files, checkpoints, reports.

A *reader* is a frozen LLM that answers questions about a passage. A *prompt* is passage and question. A *wire* turns a
prompt into a *message* of bytes and a message into the embeddings that the LLM reads in place of the prompt.

Letters: B batch, T padded length, N padded length in bytes, L tokens of a prompt, V vocabulary, d LLM embedding width,
k code width.
"""

import functools
import hashlib
import itertools
import math
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plumbing import hub
from plumbing.data import Data
from plumbing.launch import UserError
from plumbing.models import check_embeddings, checkpoint_layers, load_llm
from plumbing.processes import map_over_processes
from plumbing.spelling import Spelling, tokenize

if TYPE_CHECKING:
    import transformers

IGNORE = -100  # a label that the loss skips
MAX_NEW_TOKENS = 32  # of an answer
TOKEN_CHARACTERS = 16  # no text has more a token on average: what lies beyond is not even tokenised

# ---------------------------------------------------------------------------------------------------------------------
# the reader: a frozen LLM, and its embeddings


@dataclass
class Reader:
    """A frozen causal LM and what the stages need to know of it."""

    name: str  # as the user gave it
    model: torch.nn.Module
    tokenizer: "transformers.PreTrainedTokenizerBase"
    table: Tensor  # [V, d] float32: what the LLM takes as inputs_embeds for each token
    context_tokens: int
    fingerprint: str
    device: torch.device
    dtype: torch.dtype

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt that leaves room for the answer."""
        return self.context_tokens - MAX_NEW_TOKENS

    @property
    def context_characters(self) -> int:
        """What a context can hold: of a passage of megabytes, no more is looked at."""
        return TOKEN_CHARACTERS * self.context_tokens

    @functools.cached_property
    def values(self) -> Tensor:
        """[V, d] the table in the LLM's own dtype, which holds its numbers exactly; a codebook blends its rows."""
        module = self.model.get_input_embeddings()
        if type(module) is torch.nn.Embedding and module.weight.dtype == self.dtype:  # Gemma's module also scales
            return module.weight.detach()  # no second copy
        return self.table.to(self.dtype)

    @functools.cached_property
    def spelling(self) -> Spelling:
        return Spelling.of(self.tokenizer)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end an answer (an instruct model may have several)."""
        listed = self.model.generation_config.eos_token_id
        listed = listed if isinstance(listed, list) else [listed]
        return sorted({i for i in [*listed, self.tokenizer.eos_token_id] if i is not None})

    def answer(self, ids: list[int]) -> str:
        """The answer in generated tokens: up to the first end, and of that the first line."""
        end = next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))
        answer = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        # base models often run on into another question
        return answer.strip().split("\n")[0].strip()


def load_reader(
    name: str, device: torch.device, dtype: torch.dtype, checkpointing: bool = False, split: bool = False
) -> Reader:
    """Load and freeze a causal LM: an alias, a hub id or a local directory.

    checkpointing: compute layers twice to save memory; split: the layers over all GPUs. Raises UserError for a model
    that is not there, does not load or fit, or cannot have a wire put before it (plumbing/models.py).
    """
    tokenizer, model = load_llm(name, hub.find_model(name), device, dtype, split)
    # greedy means greedy: a repetition penalty from the model's own file would punish copying, but only from text
    model.generation_config = hub.GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.requires_grad_(False).eval()  # frozen: only what a stage builds itself is ever trained
    if checkpointing:
        checkpoint_layers(model)
    table = embedding_table(model)
    if tokenizer.vocab_size > len(table):  # a table with more rows than tokens is common: it is padded
        raise UserError(
            f"--model {name}: its tokenizer has {tokenizer.vocab_size} tokens and its embeddings {len(table)}: "
            "the tokenizer is another model's"
        )
    context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    device = table.device if split else device
    reader = Reader(name, model, tokenizer, table, context_tokens, fingerprint(model), device, dtype)
    check_embeddings(reader, tokenize(reader, as_prompt(reader, PROMPT)))
    return reader


@torch.no_grad()
def embedding_table(model: torch.nn.Module) -> Tensor:
    """[V, d] float32: for every token id, what the model accepts as `inputs_embeds` in place of that id.

    The embedding *module* is called, not its weight read: Gemma scales by sqrt(d) inside that module (so inputs_embeds
    must be scaled), Granite scales behind it (so they must not be).
    """
    module = model.get_input_embeddings()
    device = next(module.parameters()).device
    ids = torch.arange(module.weight.shape[0], device=device)
    return torch.cat([module(part).float() for part in ids.split(8192)])


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that tell one LLM from another: the token embeddings, and the first 4096 numbers of every tensor.

    Hashed as bfloat16, so that a float32 and a bfloat16 load of the same weights agree.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    parts = [p.flatten()[:4096] for _, p in sorted(model.named_parameters())]
    for tensor in [model.get_input_embeddings().weight, *parts]:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# prompts: passage and question as the text and tokens that the LLM wants

PROMPT = "{context}\nQuestion: {question}\nAnswer:"
INSTRUCTION = "Answer the question with a short phrase copied from the text, and nothing else."


@dataclass
class Prompt:
    text: str
    ids: list[int]  # L
    truncated: bool
    context: str = ""  # as far as it fits
    question: str | None = None  # None: a window of text

    @property
    def plain(self) -> str:
        """Passage and question without an LLM's chat template; or the window of text."""
        return self.text if self.question is None else PROMPT.format(context=self.context, question=self.question)


def prompt_text(reader: Reader, context: str, question: str) -> str:
    """The prompt as text: the model's chat template where it has one, else passage, question and "Answer:"."""
    return as_prompt(reader, PROMPT.format(context=context, question=question))


def as_prompt(reader: Reader, plain: str) -> str:
    """PROMPT, filled in, as this model wants it."""
    if not reader.tokenizer.chat_template:
        return plain
    chat = [{"role": "user", "content": f"{INSTRUCTION}\n\n{plain.removesuffix(chr(10) + 'Answer:')}"}]
    # some templates write today's date into the prompt: a fixed one keeps runs comparable
    return reader.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024"
    )


def make_prompt(reader: Reader, context: str, question: str, max_tokens: int | None = None) -> Prompt:
    """Prompt of at most max_tokens tokens (default: the model's context less the answer).

    Only the context is ever cut, from its end. Raises UserError if the question alone does not fit.
    """
    limit = reader.prompt_tokens if max_tokens is None else max_tokens
    whole, context, asked = context, context[: reader.context_characters], question[: reader.context_characters]
    text = prompt_text(reader, context, asked)
    ids = tokenize(reader, text)
    if len(ids) <= limit and asked == question:
        return Prompt(text, ids, context != whole, context, question)
    low, high = 0, len(context)  # the longest prefix of the context that fits, by bisection over characters
    if asked != question or len(tokenize(reader, prompt_text(reader, "", question))) > limit:
        raise UserError(f"a question of {len(question)} characters does not fit into {limit} tokens: {question[:60]!r}")
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenize(reader, prompt_text(reader, context[:middle], question))) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    text = prompt_text(reader, context[:low], question)
    return Prompt(text, tokenize(reader, text), True, context[:low], question)


def truncated_prompt(reader: Reader, row: dict, max_tokens: int) -> Prompt:
    """The prompt of a row in max_tokens tokens, or its question alone where not even that fits."""
    question = make_prompt(reader, "", row["question"])
    if len(question.ids) >= max_tokens:
        return question
    return make_prompt(reader, row["context"], row["question"], max_tokens)


def sent_prompt(reader: Reader, row: dict) -> Prompt:
    """The part of a data row that travels: the prompt, or a window of text (its first half, in stages 2 and 3)."""
    if "ids" not in row:
        return make_prompt(reader, row["context"], row["question"])
    ids = row["ids"][: row.get("sent")]
    return Prompt(reader.tokenizer.decode(ids, skip_special_tokens=True), ids, False)


def check_prompts(reader: Reader, data: Data) -> None:
    """Print the reader, how its prompts look, and the data. Raises UserError if a question alone does not fit."""
    vocabulary, d = reader.table.shape
    print(f"model {reader.name}: V {vocabulary}, d {d}, fingerprint {reader.fingerprint}")
    size = "unlimited" if data.train is None else len(data.train)
    print(f"data ({data.kind}): {size} training rows, {len(data.test)} test rows", flush=True)
    if data.kind == "text":
        return
    print(f"prompt of {reader.name}: {as_prompt(reader, PROMPT)!r}", flush=True)
    for row in itertools.chain(data.train or [], data.validation, data.test):
        if 2 * len(row["question"].encode()) > reader.prompt_tokens:  # a token is at least a byte
            make_prompt(reader, "", row["question"])


def answer_ids(reader: Reader, prompt: Prompt, answer: str) -> list[int]:
    """Ids of the answer as it continues this prompt, and EOS. Never a second start token."""
    glue = "" if reader.tokenizer.chat_template else " "
    joint = tokenize(reader, prompt.text + glue + answer)
    if joint[: len(prompt.ids)] == prompt.ids:
        ids = joint[len(prompt.ids) :]
    else:  # the tokenizer merges across the joint
        ids = reader.tokenizer(glue + answer, add_special_tokens=False)["input_ids"]
    return ids + ([] if reader.tokenizer.eos_token_id is None else [reader.tokenizer.eos_token_id])


def to_bytes(texts: list[str], device: torch.device) -> Tensor:
    """[B, N] bytes of UTF-8, padded with 256. Raises UserError for an empty text and for half a surrogate pair."""
    try:
        raw = [text.encode() for text in texts]
    except UnicodeEncodeError:
        raise UserError("the prompt holds half a surrogate pair, which is not Unicode text") from None
    if not all(raw):
        raise UserError("the prompt is empty: there are no bytes to send")
    padded = np.full((len(raw), max(map(len, raw))), 256)
    for row, data in zip(padded, raw, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(padded).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# batches: prompt and answer for teacher forcing, and the logits at the answer


@dataclass
class Batch:
    """Sequences for teacher forcing, padded on the right so that positions have no gaps."""

    ids: Tensor  # [B, T]
    attention: Tensor  # [B, T] 1 on real tokens
    sent: Tensor  # [B, T] bool: the tokens that travel as a message (the prompt); the rest is the answer
    labels: Tensor  # [B, T] the next token where it counts (answer and EOS, or a whole text), else IGNORE

    @property
    def targets(self) -> Tensor:
        """The labels that count, in order."""
        return self.labels[self.labels != IGNORE]


def make_batch(reader: Reader, rows: list[dict]) -> Batch:
    """Teacher-forcing batch of data rows: prompt + first answer + EOS, or a window of text."""
    sequences = []  # (ids, how many are sent, which is the first target)
    for row in rows:
        if "sent" in row:  # a window of text: its start travels, the rest is predicted
            sequences.append((row["ids"], row["sent"], row["sent"]))
        elif "ids" in row:
            sequences.append((row["ids"], len(row["ids"]), 1))
        else:
            prompt = make_prompt(reader, row["context"], row["question"])
            answer = row["answers"][0][: TOKEN_CHARACTERS * MAX_NEW_TOKENS]
            answer = answer_ids(reader, prompt, answer)[:MAX_NEW_TOKENS]
            sequences.append((prompt.ids + answer, len(prompt.ids), len(prompt.ids)))
    ids = pad_sequence([torch.tensor(sequence) for sequence, _, _ in sequences], batch_first=True)  # [B, T]
    attention, sent = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    labels = torch.full_like(ids, IGNORE)
    for i, (sequence, sent_tokens, first_target) in enumerate(sequences):
        attention[i, : len(sequence)], sent[i, :sent_tokens] = 1, True
        labels[i, first_target - 1 : len(sequence) - 1] = ids[i, first_target : len(sequence)]
    return Batch(*(tensor.to(reader.device) for tensor in (ids, attention, sent, labels)))


def splice(reader: Reader, batch: Batch, received: list[Tensor]) -> tuple[Batch, Tensor]:
    """(batch, embeddings [B,T',d]) with the sent tokens of row i replaced by received[i] [positions,d].

    Labels behind the sent tokens stay. Labels among them (of a text) stay where positions and tokens are equally many.
    """
    parts, rows = [], []
    for i, part in enumerate(received):
        sent, length = int(batch.sent[i].sum()), int(batch.attention[i].sum())
        parts.append(torch.cat([part, reader.table[batch.ids[i, sent:length]]]))
        head = batch.labels[i, : sent - 1]
        if len(part) != sent:
            head = head.new_full((len(part) - 1,), IGNORE)
        rows.append(torch.cat([head, batch.labels[i, sent - 1 : length]]))
    lengths = torch.tensor([len(part) for part in parts], device=batch.ids.device)
    attention = (torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]).long()
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE)
    spliced = Batch(attention, attention, attention.bool(), labels)  # ids mean nothing any more
    return spliced, pad_sequence(parts, batch_first=True)


def answer_logits(reader: Reader, batch: Batch, embeddings: Tensor, states: bool = False) -> Tensor | tuple:
    """Logits [targets, V] in float32 at the labelled positions of a batch, from inputs_embeds [B,T,d].

    Only columns with a label meet the output matrix: at V = 128k the others would be most of the memory.
    With `states`, (logits, what each layer of the LLM makes of the batch: [B,T,d] each).
    """
    labelled = batch.labels != IGNORE  # [B, T]
    columns = labelled.any(0).nonzero()[:, 0]
    output = reader.model(
        inputs_embeds=embeddings.to(reader.dtype),
        attention_mask=batch.attention,
        use_cache=False,
        logits_to_keep=columns.cpu(),  # an index on the CPU meets a last layer on any device
        output_hidden_states=states,
    )
    logits = output.logits[labelled[:, columns]].float()  # of [B, columns, V]
    return (logits, output.hidden_states[1:]) if states else logits


# ---------------------------------------------------------------------------------------------------------------------
# answers


class Wire(Protocol):
    """What a stage trains: it carries a prompt, as bytes, to the LLM of `reader`."""

    reader: Reader

    def send(self, prompt: Prompt) -> bytes:
        """Prompt -> message."""

    def receive(self, message: bytes) -> Tensor:
        """Message -> embeddings [positions, d]."""


@torch.inference_mode()
def generate(
    reader: Reader, prompts: list, batch_size: int, receive: Callable[[bytes], Tensor] | None = None
) -> list[str]:
    """Greedy answers to prompts given as token ids, or as messages and a receiver; in the order of the prompts.

    Padded on the left and masked, so that every prompt ends where its answer begins; transformers derives positions
    from the mask, and returns only the new tokens when it is given inputs_embeds.
    """
    fill = reader.tokenizer.pad_token_id
    fill = fill if fill is not None else (reader.eos_ids or [0])[0]
    settings = hub.GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=fill, eos_token_id=reader.eos_ids or None
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together; the largest first

    def answers_of(chosen: list[int]) -> list[str]:
        parts = [torch.tensor(prompts[i]) if receive is None else receive(prompts[i]) for i in chosen]
        real = [torch.ones(len(part), dtype=torch.long) for part in parts]
        mask = pad_sequence(real, batch_first=True, padding_side="left").to(reader.device)  # [B, L]
        padded = pad_sequence(parts, True, fill if receive is None else 0.0, "left").to(reader.device)
        inputs = {"input_ids": padded} if receive is None else {"inputs_embeds": padded.to(reader.dtype)}
        new = reader.model.generate(**inputs, attention_mask=mask, generation_config=settings)
        new = new[:, mask.shape[1] :] if receive is None else new
        return [reader.answer(ids) for ids in new.tolist()]

    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found = [answer for answers in map_over_processes(answers_of, batches) for answer in answers]
    return [answer for _, answer in sorted(zip(order, found, strict=True))]


@torch.inference_mode()
def show_samples(wire: Wire, data: Data) -> None:
    """Print the same three validation questions at every call: gold, answer from text, answer through the wire."""
    rows, reader = data.validation[:3], wire.reader
    if data.kind == "text":
        return
    prompts = [sent_prompt(reader, row) for row in rows]
    from_text = generate(reader, [prompt.ids for prompt in prompts], len(rows))
    from_wire = generate(reader, [wire.send(prompt) for prompt in prompts], len(rows), wire.receive)
    for row, text, answer in zip(rows, from_text, from_wire, strict=True):
        print(f"    {row['question']}  gold: {row['answers'][0]} | text: {text} | wire: {answer}")


# ---------------------------------------------------------------------------------------------------------------------
# SQuAD v1.1 scorer, as in the official evaluate-v1.1.py (Rajpurkar et al. 2016)

PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, golds: list[str]) -> float:
    """1.0 if the normalised answer equals any normalised gold, else 0.0."""
    return float(any(normalize_answer(answer) == normalize_answer(gold) for gold in golds))


def f1_score(answer: str, golds: list[str]) -> float:
    """Best F1 over the golds of the bags of normalised words; 0.0 where nothing is shared, two empty bags included."""
    best = 0.0
    words = normalize_answer(answer).split()
    for gold in golds:
        gold_words = normalize_answer(gold).split()
        shared = sum((Counter(words) & Counter(gold_words)).values())
        if shared:
            precision, recall = shared / len(words), shared / len(gold_words)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def score(answers: list[str], rows: list[dict]) -> tuple[float, float]:
    """(F1, EM) in percent."""
    pairs = list(zip(answers, rows, strict=True))
    f1 = 100 * sum(f1_score(answer, row["answers"]) for answer, row in pairs) / len(pairs)
    return f1, 100 * sum(exact_match(answer, row["answers"]) for answer, row in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# PCA of the frozen embeddings


@dataclass
class PCA:
    mean: Tensor  # [d] float32
    components: Tensor  # [d, k] float32, orthonormal columns, by falling variance
    variances: Tensor  # [d] float64, of all d components, falling

    def first(self, k: int) -> "PCA":
        return PCA(self.mean, self.components[:, :k].contiguous(), self.variances)

    @property
    def explained(self) -> float:
        """Share of the variance that the k components hold."""
        return (self.variances[: self.components.shape[1]].sum() / self.variances.sum()).item()


def fit_pca(table: Tensor, counts: Tensor) -> PCA:
    """Exact PCA (all d components) of the embeddings of a corpus, from its token counts, in passes over V rows.

    table: [V, d]; counts: [V] occurrences in the training split. Equal to the PCA of the [corpus, d] matrix of all its
    embeddings, at a cost that does not grow with the corpus. float64 on the CPU; the sign of a component makes its
    largest entry positive. Returned on the table's device.
    """
    weights = counts.cpu().double() / counts.sum().item()
    used = weights.nonzero()[:, 0]  # tokens that never occur weigh nothing
    mean = torch.zeros(table.shape[1], dtype=torch.float64)
    covariance = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows in used.split(8192):
        mean += weights[rows] @ table[rows.to(table.device)].cpu().double()
    for rows in used.split(8192):
        centred = table[rows.to(table.device)].cpu().double() - mean
        covariance += (centred * weights[rows, None]).T @ centred
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    variances, vectors = variances.flip(0).clamp_min(0), vectors.flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return PCA(mean.float().to(table.device), vectors.float().to(table.device), variances)


def token_counts(reader: Reader, data: Data, seed: int, passages: int = 2000) -> Tensor:
    """[V] occurrences of each token in the prompts of the training split.

    In `passages` of them if it is unlimited, in 100,000 evenly spread ones if it is larger than that.
    """
    rows = data.train if data.train is not None else data.train_rows(seed, 0, passages)
    chosen = range(len(rows)) if len(rows) <= 100_000 else np.linspace(0, len(rows) - 1, 100_000).astype(int)
    counts, cut = torch.zeros(len(reader.table), dtype=torch.long), 0
    for at in range(0, len(chosen), 1000):
        part = [rows[int(i)] for i in chosen[at : at + 1000]]
        if data.kind == "text":
            lists = [row["ids"] for row in part]
        else:
            longest = reader.context_characters
            prompts = [prompt_text(reader, row["context"][:longest], row["question"]) for row in part]
            special = not reader.tokenizer.chat_template
            lists = reader.tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"]
            cut += sum(len(ids) > reader.prompt_tokens for ids in lists)
        flat = torch.tensor([token for ids in lists for token in ids], dtype=torch.long)
        counts += torch.bincount(flat, minlength=len(counts))
    if cut:
        print(f"note: {cut} of {len(chosen)} training prompts exceed {reader.prompt_tokens} tokens: context cut")
    return counts.to(reader.device)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the score through the wire, and every control beside it


@torch.inference_mode()
def mean_nll(reader: Reader, rows: list[dict], batch_size: int, wire: Wire | None = None) -> float:
    """Mean NLL in nats per target token: from the real embeddings, or with the prompt through a wire."""

    def sum_and_count(part: list[dict]) -> tuple[float, int]:
        batch = make_batch(reader, part)
        embeddings = reader.table[batch.ids]  # [B, T, d]
        if wire is not None:
            received = [wire.receive(wire.send(sent_prompt(reader, row))) for row in part]  # [positions, d] each
            batch, embeddings = splice(reader, batch, received)
        logits = answer_logits(reader, batch, embeddings)
        return F.cross_entropy(logits, batch.targets, reduction="sum").item(), len(batch.targets)

    found = map_over_processes(sum_and_count, [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)])
    return sum(total for total, _ in found) / sum(count for _, count in found)


def score_wire(wire: Wire, data: Data, batch_size: int) -> tuple[float, list[str]]:
    """(F1 in percent, answers) through a wire; of plain text (NLL, no answers)."""
    if data.kind == "text":
        return mean_nll(wire.reader, data.test, batch_size, wire), []
    messages = [wire.send(sent_prompt(wire.reader, row)) for row in data.test]
    answers = generate(wire.reader, messages, batch_size, wire.receive)
    return score(answers, data.test)[0], answers


def byte_baselines(reader: Reader, texts: list[str], id_lists: list[list[int]]) -> dict[str, float]:
    """Mean bytes per prompt of the text itself, of zlib -9, and of token ids packed at ceil(log2 V) bits."""
    bits = math.ceil(math.log2(len(reader.table)))
    raw = [text.encode() for text in texts]
    return {
        "text_bytes": sum(map(len, raw)) / len(raw),
        "zlib_bytes": sum(len(zlib.compress(text, 9)) for text in raw) / len(raw),
        "packed_token_bytes": sum(math.ceil(len(ids) * bits / 8) for ids in id_lists) / len(raw),
    }


def received_cosines(wire: Wire, message: bytes, ids: list[int]) -> tuple[int, list[float]]:
    """(positions of a message, cosine of each to the real embedding if there is one position per token)."""
    embeddings = wire.receive(message).float()  # [positions, d]
    if len(embeddings) != len(ids):
        return len(embeddings), []
    return len(embeddings), F.cosine_similarity(embeddings, wire.reader.table[ids], dim=-1).tolist()


@torch.inference_mode()
def evaluate(wire: Wire, data: Data, batch_size: int) -> tuple[dict, list[dict]]:
    """(metrics named as in the JSON line, one record per test row for samples.md; of plain text, 20 windows).

    Every prompt really becomes a message of bytes and is rebuilt from those bytes alone: wire_bytes is their length.
    """
    reader, rows = wire.reader, data.test
    prompts = test_prompts(reader, rows)
    id_lists = [prompt.ids for prompt in prompts]
    messages = map_over_processes(wire.send, prompts)
    pairs = list(zip(messages, id_lists, strict=True))
    found = map_over_processes(lambda pair: received_cosines(wire, *pair), pairs)
    positions, cosines = [count for count, _ in found], [cosine for _, part in found for cosine in part]
    metrics = {"wire_bytes": sum(map(len, messages)) / len(rows)}
    metrics["cosine"] = sum(cosines) / len(cosines) if positions == list(map(len, id_lists)) else None
    print("  NLL from text and through the wire", flush=True)
    metrics["nll_wire"] = mean_nll(reader, rows, batch_size, wire)
    answers = []
    if data.kind == "qa":
        print("  answers through the wire", flush=True)
        answers = generate(reader, messages, batch_size, wire.receive)
    compared, records = beside_text(reader, rows, prompts, positions, answers, batch_size)
    if data.kind == "text":
        nlls = [(mean_nll(reader, [row], 1), mean_nll(reader, [row], 1, wire)) for row in rows[:20]]
        texts = [prompt.text for prompt in prompts]
        records = [{"window": text, "text": a, "wire": b} for text, (a, b) in zip(texts, nlls, strict=False)]
    return metrics | compared, records


def test_prompts(reader: Reader, rows: list[dict]) -> list[Prompt]:
    """What is sent of the test rows; says how many there are, and how many are cut."""
    print(f"evaluating on {len(rows)} test rows", flush=True)
    prompts = [sent_prompt(reader, row) for row in rows]
    cut = sum(prompt.truncated for prompt in prompts)
    if cut:
        print(f"note: {cut} of {len(rows)} test prompts exceed {reader.prompt_tokens} tokens: context cut at its end")
    return prompts


def beside_text(
    reader: Reader, rows: list[dict], prompts: list[Prompt], positions: list[int], answers: list[str], batch_size: int
) -> tuple[dict, list[dict]]:
    """(metrics, records) of answers through a wire beside those from the text and the other controls.

    positions: that the wire takes, for each prompt; answers: through the wire, or none of plain text.
    """
    id_lists = [prompt.ids for prompt in prompts]
    metrics = byte_baselines(reader, [prompt.text for prompt in prompts], id_lists)
    metrics["examples"] = len(rows)
    metrics["positions"] = sum(positions) / len(rows)
    metrics["text_positions"] = sum(map(len, id_lists)) / len(rows)
    metrics["nll_text"] = mean_nll(reader, rows, batch_size)
    if not answers:
        return metrics, []
    print("  answers from text", flush=True)
    text_answers = generate(reader, id_lists, batch_size)
    print("  answers without context", flush=True)
    no_context = generate(reader, [make_prompt(reader, "", row["question"]).ids for row in rows], batch_size)
    metrics["f1"], metrics["em"] = score(answers, rows)
    metrics["text_f1"], metrics["text_em"] = score(text_answers, rows)
    metrics["retention"] = 100 * metrics["f1"] / metrics["text_f1"] if metrics["text_f1"] > 0 else None
    metrics["no_context_f1"] = score(no_context, rows)[0]
    # another prompt's message answers that other prompt: the receiver sees nothing of this one, so no new run is needed
    metrics["shuffled_f1"] = score(answers[1:] + answers[:1], rows)[0] if len(rows) > 1 else None
    # text cut to as many positions as the message takes; where nothing is cut, that is the text itself
    cut_rows = [i for i, ids in enumerate(id_lists) if positions[i] < len(ids)]
    shorter = [truncated_prompt(reader, rows[i], positions[i]).ids for i in cut_rows]
    truncated = dict(zip(cut_rows, generate(reader, shorter, batch_size), strict=True)) if cut_rows else {}
    metrics["truncated_f1"] = score([truncated.get(i, text_answers[i]) for i in range(len(rows))], rows)[0]
    metrics["unique_answers"] = len(set(answers))
    records = [row | {"text": text, "wire": wire} for row, text, wire in zip(rows, text_answers, answers, strict=True)]
    return metrics, records
