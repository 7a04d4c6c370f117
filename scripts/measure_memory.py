#!/usr/bin/env python3
"""Holds the memory that commands foresee against the most that they held, and writes both as JSON.

Each command runs in a process of its own. What it foresees is the last line `memory foreseen bytes=N` of its log; what it held is the
peak of its resident set (VmHWM, as the system reports it of a child that has ended), less that of a start without a model (`attn list`),
which is LibTorch itself, and the 384 MiB that a command adds for libraries, data and the allocator are taken off what it foresaw. Files that are mapped
count as resident while they are read.

Models: GPT-2's 124 million parameters with random weights, made by the first command, and results/models/wikitext-gpt2. By hand: ten
minutes on two cores, 5 GB of memory and 2 GB of disk.

Usage: scripts/measure_memory.py ATTN OUT.json [NAME...]
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 1 << 20
BESIDE = 384 * MIB
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12}
SMALL = "results/models/wikitext-gpt2"
TEXT = "data/sample_text.txt"


def cases(work):
    """Name, size in words and arguments of each command; `work` is an empty folder."""
    big = f"{work}/big/model"

    def pretrain(name, length, batch, *more):
        init = [f"--set=init.{key}={value}" for key, value in GPT2.items()]
        rates = [f"--set=init.{rate}_pdrop=0.0" for rate in ("resid", "embd", "attn")]
        fixed = ["train.max_steps=2", "train.eval_every=100", f"train.batch_size={batch}", f"examples.max_len={length}"]
        data = ["tokenizer.vocab_size=50257", f"data.source={TEXT}", "data.text=text", "examples.limit=400", "examples.hold_out=0.1"]
        own = ["init.vocab_size=50257", "init.n_positions=1024", f"tokenizer.from={SMALL}"]
        sets = [f"--set={pair}" for pair in fixed + own + data[1:] + list(more)]
        return ["pretrain", f"{work}/pretrain.toml", *init, *rates, *sets, "--out", f"{work}/{name}"]

    def finetune(name, batch, *more):
        fixed = ["train.max_steps=2", f"train.batch_size={batch}", "examples.limit=200", "train.eval_every=100"]
        sets = [f"--set={pair}" for pair in [f"model={big}", *fixed, *more]]
        return ["finetune", *sets, "--out", f"{work}/{name}"]

    def distill(name, model, batch, length):
        fixed = [f"model={model}", f"tune.train.batch_size={batch}", "tune.train.max_steps=2", f"examples.max_len={length}",
                 "examples.limit=400", "examples.report_hold_out=0.1", "attention.size=64"]
        return ["distill", "configs/distill/sample.toml", *[f"--set={pair}" for pair in fixed], "--out", f"{work}/{name}"]

    rows = ["--task", TEXT, "--split", "train"]
    long_text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        ("big", "pretrain, 124M, 2 x 256", pretrain("big", 256, 2)),
        ("pretrain-8x256", "pretrain, 124M, 8 x 256", pretrain("p2", 256, 8)),
        ("pretrain-2x1024", "pretrain, 124M, 2 x 1024", pretrain("p3", 1024, 2)),
        ("pretrain-recompute", "pretrain, 124M, 8 x 256, recomputed",
         pretrain("p4", 256, 8, "train.gradient_checkpointing=true")),
        ("pretrain-small", "pretrain, 3M, 16 x 256",
         pretrain("p5", 256, 16, "init.n_embd=192", "init.n_layer=4", "init.n_head=6", "init.vocab_size=6000")),
        ("finetune-16", "finetune, 124M, 16 rows", finetune("f1", 16)),
        ("finetune-64", "finetune, 124M, 64 rows", finetune("f2", 64)),
        ("finetune-frozen", "finetune, 124M, 16 rows, head alone", finetune("f3", 16, 'train.freeze=["*", "!score*"]')),
        ("distill-small", "distill, 3M, 16 x 256", distill("d1", SMALL, 16, 256)),
        ("distill-big", "distill, 124M, 4 x 256", distill("d2", big, 4, 256)),
        ("eval-small", "eval, 3M", ["eval", "--model", SMALL, *rows, "--out", f"{work}/e1.json"]),
        ("eval-4", "eval, 124M, 4 rows of 256",
         ["eval", "--model", big, *rows, "--limit", "300", "--max-len", "256", "--batch-size", "4", "--out", f"{work}/e2.json"]),
        ("eval-8x1024", "eval, 124M, 8 rows of 1024",
         ["eval", "--model", big, *rows, "--max-len", "1024", "--batch-size", "8", "--limit", "1200", "--out", f"{work}/e3.json"]),
        ("eval-bf16", "eval, 124M in bf16, 4 rows of 256",
         ["eval", "--model", big, *rows, "--limit", "200", "--max-len", "256", "--batch-size", "4", "--dtype", "bf16",
          "--out", f"{work}/e4.json"]),
        ("score-heads-small", "score-heads, 3M", ["score-heads", "--model", SMALL, *rows, "--limit", "600", "--method", "michel",
                                                  "--out", f"{work}/s1.json"]),
        ("score-heads-big", "score-heads, 124M, rows of 256",
         ["score-heads", "--model", big, *rows, "--limit", "300", "--max-len", "256", "--method", "michel", "--out",
          f"{work}/s2.json"]),
        ("ablate-small", "ablate, 3M", ["ablate", "--model", SMALL, *rows, "--limit", "100", "--out", f"{work}/a1.json"]),
        ("heatmap-200", "heatmap, 124M, 200 characters",
         ["heatmap", "--model", big, "--text", long_text[:200], "--layers", "0", "--out", f"{work}/h1"]),
        ("heatmap-2000", "heatmap, 124M, 2,000 characters",
         ["heatmap", "--model", big, "--text", long_text[:2000], "--layers", "0", "--out", f"{work}/h2"]),
        ("generate-64", "generate, 124M, 64 tokens",
         ["generate", "--model", big, "--max-new-tokens", "64", "The film"]),
        ("generate-long", "generate, 124M, after 1,500 characters",
         ["generate", "--model", big, "--max-new-tokens", "64", long_text[:1500]]),
        ("convert-mean", "convert, 124M, by means", ["convert", "--model", big, "--kv-heads", "4", "--method", "mean", "--out",
                                                     f"{work}/c1"]),
        ("convert-aligned", "convert, 3M, by a text", ["convert", "--model", SMALL, "--kv-heads", "2", "--out", f"{work}/c2"]),
        ("prune", "prune, 124M", ["prune", "--model", big, "--heads", "0-1,0-2", "--out", f"{work}/q1"]),
        ("save", "save, 124M in f16", ["save", "--model", big, "--dtype", "f16", "--out", f"{work}/q2"]),
        ("swap", "swap, 124M", ["swap", "--model", big, "--attention", "hedgehog", "--out", f"{work}/q3"]),
        ("verify-small", "verify, 3M", ["verify", "--model", SMALL]),
        ("verify-big", "verify, 124M, quick", ["verify", "--model", big, "--quick"]),
    ]


def run(attn, arguments):
    """The exit code, the log, and the peak of the resident set in bytes."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen([attn, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log,
                                 env={**os.environ, "RUST_LOG": "attn=debug"})
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        return child.returncode, log.read(), usage.ru_maxrss * 1024


def main():
    attn, out, *only = sys.argv[1:]
    attn = str(pathlib.Path(attn).resolve())
    _, _, start = run(attn, ["list"])
    done = []
    with tempfile.TemporaryDirectory() as work:
        pathlib.Path(work, "pretrain.toml").write_text('objective = "causal"\n[init]\nmodel_type = "gpt2"\n', encoding="utf-8")
        for name, what, arguments in cases(work):
            if only and name not in only and name != "big":
                continue
            code, log, peak = run(attn, arguments)
            found = re.findall(r"memory foreseen.*?bytes=(\d+)", re.sub(r"\x1b\[[0-9;]*m", "", log))
            if code != 0 or not found:
                print(f"{name}: exit code {code}\n{log[-1500:]}", file=sys.stderr)
                continue
            foreseen, taken = int(found[-1]) - BESIDE, peak - start
            row = {"name": name, "what": what, "foreseen_mib": round(foreseen / MIB), "taken_mib": round(taken / MIB),
                   "ratio": round(foreseen / max(taken, 1), 2), "whole_ratio": round((foreseen + BESIDE) / max(taken, 1), 2)}
            done.append(row)
            print(json.dumps(row), flush=True)
            pathlib.Path(out).write_text(
                json.dumps({"start_mib": round(start / MIB), "beside_mib": BESIDE // MIB, "commands": done}, indent=1) + "\n",
                encoding="utf-8")


if __name__ == "__main__":
    main()
