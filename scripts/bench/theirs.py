"""transformers' side of scripts/bench_finetune.sh; not to be run by hand.

    theirs.py train|distill|generate|sst2|products MODEL THREADS [random|grouped] [BATCHES]
    theirs.py save MODEL THREADS FOLDER

Prints a JSON line when ready, then does as many units of work as each line of stdin asks for and prints a line when
they are done. The script measures.
"""

import copy
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download

transformers.utils.logging.set_verbosity_error()
DEVICE = torch.device(os.environ.get("BENCH_DEVICE", "cpu"))


def next_order(answer: dict) -> int:
    print(json.dumps(answer), flush=True)
    line = sys.stdin.readline()
    if not line.strip():
        os._exit(0)  # there is nothing to clean up, and no trainer to return through
    return int(line)


def new_model(kind, name: str, **options):
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(name, **options)
    return kind.from_config(config, attn_implementation="sdpa").to(DEVICE)


def train(name: str):
    """16 x 64 random ids a step, SDPA."""
    model = new_model(transformers.AutoModelForCausalLM, name).train()
    fit(model, (16, 64), lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, {})


def distill(name: str):
    """4 x 256 random ids a step, forward KL between the whole logits of two models."""
    student = new_model(transformers.AutoModelForCausalLM, name).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)

    def loss(ids):
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits
        own = student(input_ids=ids, use_cache=False).logits
        log_q, p = F.log_softmax(own.flatten(0, 1), dim=-1), F.softmax(taught.flatten(0, 1), dim=-1)
        return F.kl_div(log_q, p, reduction="batchmean")

    status = Path("/proc/self/status").read_text().split()
    fit(student, (4, 256), loss, {"loaded_gib": int(status[status.index("VmRSS:") + 1]) / 2**20})


def fit(model, shape: tuple, loss_of, answer: dict):
    """Random ids of `shape` a step; fused AdamW, the gradient clipped, as our loop and their Trainer do it."""
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    decay = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, fused=True)
    tokens = 0
    while True:
        for _ in range(next_order(answer)):
            ids = torch.randint(model.config.vocab_size, shape, device=DEVICE)
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += ids.numel()
        answer = {"loss": loss.item(), "tokens": tokens}


def generate(name: str):
    """One unit is one text: 16 tokens of prompt, 64 new ones."""
    model = new_model(transformers.AutoModelForCausalLM, name).eval()
    ids = torch.arange(16, device=DEVICE)[None] * 37 + 1000
    options = dict(do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0)
    answer = {}
    while True:
        for _ in range(next_order(answer)):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        answer = {"ids": out[0, 16:].tolist()}


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids, labels):
        self.rows = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def sst2(name: str, plan: str, n_batches: int):
    """transformers' Trainer on batches that stand for those of a whole pass, paused from step to step."""
    import pyarrow.parquet
    from transformers.trainer_pt_utils import LengthGroupedSampler

    folder = snapshot_download("stanfordnlp/sst2", repo_type="dataset", local_files_only=True)
    tables = [pyarrow.parquet.read_table(p) for p in sorted(Path(folder).glob("data/train-*.parquet"))]
    texts = [text for table in tables for text in table["sentence"].to_pylist()]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    started = time.perf_counter()
    ids = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    tokenize_s = time.perf_counter() - started

    generator = torch.Generator().manual_seed(0)
    lengths = [len(row) for row in ids]
    if plan == "grouped":
        order = list(LengthGroupedSampler(32, lengths=lengths, generator=generator))
    else:
        order = torch.randperm(len(ids), generator=generator).tolist()
    batches = [order[i : i + 32] for i in range(0, len(order), 32)]

    def positions(batch):
        return max(lengths[row] for row in batch) * len(batch)

    # They stand for the whole pass: evenly spaced when sorted by their positions.
    ranked = sorted((batch for batch in batches if len(batch) == 32), key=positions)
    sample = [ranked[(2 * i + 1) * len(ranked) // (2 * n_batches)] for i in range(n_batches)]
    rows = [row for _ in range(1 + 200 // n_batches) for batch in sample for row in batch]
    facts = {
        "tokenize_s": tokenize_s,
        "examples": len(ids),
        "batches": len(batches),
        "positions": sum(map(positions, batches)),
    }

    class Paused(transformers.TrainerCallback):
        left = 0

        def on_train_begin(self, args, state, control, **_):
            self.left = next_order(facts)

        def on_step_end(self, args, state, control, **_):
            self.left -= 1
            if self.left == 0:
                self.left = next_order({"step": state.global_step})

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return rows

    with tempfile.TemporaryDirectory() as out:
        args = transformers.TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=32,
            num_train_epochs=1,
            use_cpu=DEVICE.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(
            model=new_model(transformers.AutoModelForSequenceClassification, name, num_labels=2),
            args=args,
            train_dataset=Rows(ids, labels),
            processing_class=tokenizer,
            callbacks=[Paused()],
        ).train()


def save(name: str, folder: str):
    """Writes a model folder with random weights, as a cached model."""
    new_model(transformers.AutoModelForMaskedLM, name).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(name).save_pretrained(folder)


def start(folder: str):
    """Ready when the Trainer would take its first step: model and tokenizer loaded, 64 texts tokenized."""
    started = time.perf_counter()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    load_s = time.perf_counter() - started
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["a fine film"] * 64, truncation=True, max_length=512)["input_ids"]

    class Ready(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            next_order({"load_s": load_s})

    with tempfile.TemporaryDirectory() as out:
        args = transformers.TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=32,
            use_cpu=DEVICE.type == "cpu",
            report_to=[],
            disable_tqdm=True,
        )
        transformers.Trainer(
            model=model,
            args=args,
            train_dataset=Rows(ids, [0] * 64),
            processing_class=tokenizer,
            callbacks=[Ready()],
        ).train()


def finish():
    """Waits for what a GPU was told to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def products(_: str, length: int = 64, teachers: int = 0):
    """One unit is all matrix products of one training step of GPT-2 124M on 1024 tokens in rows of `length`, with a
    forward pass of each teacher, and four reads of its weights.

    Forward, the input's gradient, the weight's gradient; attention's own products in its batches of heads.
    """
    torch.set_default_device(DEVICE)
    tokens, hidden, layers, heads = 1024, 768, 12, 12
    passes = 3 + teachers
    operands, n_flop = [], 0
    for k, n, rows, times in [
        (hidden, 3 * hidden, tokens, layers),
        (hidden, hidden, tokens, layers),
        (hidden, 4 * hidden, tokens, layers),
        (4 * hidden, hidden, tokens, layers),
        # The last token of a text predicts nothing, but for a teacher to agree with.
        (hidden, 50257, tokens if teachers else tokens - tokens // length, 1),
    ]:
        # The head's matrix is [out, in], GPT-2's others are [in, out].
        weight = torch.randn(n, k).t() if n == 50257 else torch.randn(k, n)
        operands.append((torch.randn(rows, k), weight, torch.randn(rows, n), times))
        n_flop += passes * 2 * rows * k * n * times
    q = torch.randn(tokens // length * heads, length, hidden // heads)
    scores = torch.randn(tokens // length * heads, length, length)
    n_flop += layers * passes * 2 * 2 * q.shape[0] * length * length * q.shape[2]
    weights = torch.randn(124_000_000)

    answer = {"gflop": n_flop / 1e9}
    while True:
        seconds, cpu_s, n_bytes, read_s = 0.0, 0.0, 0, 0.0
        for _ in range(next_order(answer)):
            started, cpu_started = time.perf_counter(), time.process_time()
            for x, weight, grad, times in operands:
                for _ in range(times):
                    for _ in range(1 + teachers):
                        x @ weight
                    grad @ weight.t()
                    # In the weight's own layout.
                    grad.t() @ x if grad.shape[1] == 50257 else x.t() @ grad
            for _ in range(passes * layers):
                q @ q.transpose(1, 2)
                scores @ q
            finish()
            seconds += time.perf_counter() - started
            cpu_s += time.process_time() - cpu_started
            started = time.perf_counter()
            for _ in range(4):
                weights.sum()
            finish()
            read_s += time.perf_counter() - started
            n_bytes += 4 * 4 * weights.numel()
        answer = {"products_s": seconds, "products_cpu_s": cpu_s, "read_gb_s": n_bytes / 1e9 / read_s}


def main():
    section, name, threads, *rest = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if section == "sst2":
        sst2(name, rest[0], int(rest[1]))
    elif section == "save":
        save(name, rest[0])
    elif section == "products":
        with torch.no_grad():
            products(name, *map(int, rest))
    else:
        {"train": train, "distill": distill, "generate": generate, "start": start}[section](name)


main()
