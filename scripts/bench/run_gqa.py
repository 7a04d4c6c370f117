#!/usr/bin/env python3
"""Runs the sections of scripts/bench_gqa.sh and writes DIR/SECTION-THREADS.json and a table."""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

from run import Contender, both, ratio, spread, take_turns

HERE = Path(__file__).resolve().parent
LLAMA = {  # 8 layers, 512 wide
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "max_position_embeddings": 32768,
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
SECTIONS = ["decode", "convert"]


def cpu() -> str:
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python")
    parser.add_argument("--ours", required=True)
    parser.add_argument("--attn", required=True)
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--convert", action="append", help="flags of `attn convert`, --model and all but --out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for section in args.section or SECTIONS:
        if section == "convert" and not args.convert:
            continue
        results, lines = (decode if section == "decode" else convert)(args)
        results["machine"] = {"cpu": cpu(), "cores": os.cpu_count(), "threads": args.threads}
        Path(args.out, f"{section}-{args.threads}.json").write_text(json.dumps(results, indent=2))
        Path(args.out, f"{section}-{args.threads}.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines), flush=True)


def decode(args):
    units = 8
    with tempfile.TemporaryDirectory() as place:
        Path(place, "config.json").write_text(json.dumps(LLAMA))
        contenders = []
        for n in args.heads:
            folder = str(Path(place, str(n)))
            subprocess.run([args.ours, "make", place, folder, str(n)], check=True)
            command = [args.ours, "decode", folder, str(args.threads)]
            contenders.append(Contender(f"ours-{n}", [*command, "4096"], units, args.threads))
            contenders.append(Contender(f"ours-{n}-no-context", [*command, "1"], units, args.threads))
            if args.python:
                command = [args.python, str(HERE / "gqa.py"), folder, str(args.threads)]
                contenders.append(Contender(f"theirs-{n}", command, units, args.threads))
        results = take_turns(contenders, args.rounds)
    title = "8 rows of 4,096 tokens, f32"
    lines = [
        f"| key/value heads ({title}) | cache, MiB | ours, tokens/s | times {args.heads[0]} heads | cache bytes allow | share of it | against transformers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    results["summary"] = {}
    whole = f"ours-{args.heads[0]}"
    for n in args.heads:
        name = f"ours-{n}"
        faster = ratio(results, whole, name)
        # A step without a context, whose weights are fewer with fewer heads, and the time that the context takes of all heads, for
        # the bytes that are left of it.
        left = results[name]["facts"]["cache_bytes"] / results[whole]["facts"]["cache_bytes"]
        floor = lambda whole_bare, whole, bare: bare + (whole - whole_bare) * left
        which = (f"{whole}-no-context", whole, f"{name}-no-context", name)
        turns = zip(*(results[one]["turns"] for one in which))
        share = spread([floor(*(turn["s"] for turn in three)) / one["s"] for *three, one in turns])
        medians = [results[one]["s"]["median"] for one in which]
        share["of_medians"] = floor(*medians[:3]) / medians[3]
        allowed = medians[1] / floor(*medians[:3])
        rate = spread([8 / turn["s"] for turn in results[name]["turns"]])
        against = ratio(results, f"theirs-{n}", name) if args.python else None
        results["summary"][name] = {"faster": faster, "allowed": allowed, "share": share, "against": against, "tokens_s": rate}
        # Both wrote the same tokens.
        same = not args.python or results[name]["turns"][-1]["last"] == results[f"theirs-{n}"]["turns"][-1]["last"]
        lines.append(
            f"| {n} | {results[name]['facts']['cache_bytes'] / 2**20:.0f} | {rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f}) "
            f"| {faster['s']['of_medians']:.2f} | {allowed:.2f} | {share['of_medians']:.2f} ({share['min']:.2f} to {share['max']:.2f}) "
            f"| {both(against) if against else '-'}{'' if same else '; other tokens'} |"
        )
    return results, lines


def convert(args):
    results, lines = {}, ["| attn convert | seconds | most memory, GiB |", "| --- | --- | --- |"]
    for flags in args.convert:
        turns = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as place:
                command = [args.attn, "convert", *flags.split(), "--threads", str(args.threads), "--out", f"{place}/out"]
                before = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                said = process.stdout.read()
                _, status, used = os.wait4(process.pid, 0)
                if status != 0:
                    raise SystemExit(f"error: {' '.join(command)} failed")
                turns.append({"s": time.perf_counter() - before, "peak_gib": used.ru_maxrss / 2**20, "said": said})
        s, peak = (spread([turn[key] for turn in turns]) for key in ("s", "peak_gib"))
        results[flags] = {"turns": turns, "s": s, "peak_gib": peak}
        lines.append(f"| `{flags}` | {s['median']:.0f} ({s['min']:.0f} to {s['max']:.0f}) | {peak['max']:.2f} |")
    return results, lines


main()
