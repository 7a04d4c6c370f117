#!/usr/bin/env python3
"""Runs the sections of scripts/bench_heads.sh and writes DIR/SECTION-THREADS.json and a table of all."""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

from run import Contender, both, ratio, spread, take_turns

HERE = Path(__file__).resolve().parent
GPT2 = {  # GPT-2 124M
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
    "n_embd": 768, "n_layer": 12, "n_head": 12, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
BERT = {  # BERT base, whose heads can be chosen for whole texts
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "max_position_embeddings": 512,
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
}  # fmt: skip
LLAMA = {  # 8 layers, 512 wide
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "max_position_embeddings": 32768,
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {"routed": BERT, "retrieval": LLAMA}
SECTIONS = ["ablate", "ablate_last", "michel", "layers", "routed", "retrieval"]


def cpu() -> str:
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python")
    parser.add_argument("--ours", required=True)
    parser.add_argument("--section", action="append", choices=SECTIONS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["| section | unit | theirs (s) | ours (s) | times faster |", "| --- | --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for section in args.section or SECTIONS:
            Path(folder, "config.json").write_text(json.dumps(CONFIGS.get(section, GPT2)))
            results, rows = run(section, folder, args)
            results["machine"] = {"cpu": cpu(), "cores": os.cpu_count(), "threads": args.threads}
            Path(args.out, f"{section}-{args.threads}.json").write_text(json.dumps(results, indent=2))
            lines += rows
            Path(args.out, f"heads-{args.threads}.md").write_text("\n".join(lines) + "\n")
            print("\n".join(rows), flush=True)


def run(section: str, folder: str, args):
    threads = args.threads

    def ours(units):
        return Contender("ours", [args.ours, section, folder, str(threads)], units, threads)

    def theirs(name, units=1):
        command = [args.python, str(HERE / "heads.py"), name, folder, str(threads)]
        return Contender(name, command, units, threads)

    def seconds(result):
        return f"{result['median']:.2f} ({result['min']:.2f} to {result['max']:.2f})"

    if section in ("layers", "routed"):
        results = take_turns([ours(20 if section == "layers" else 4)], args.rounds)
        turns, (whole, half) = results["ours"]["turns"], results["ours"]["facts"]["flops"]
        saved = [1 - turn["half_s"] / turn["all_s"] for turn in turns]
        promised = 1 - half / whole
        share = spread([one / promised for one in saved])
        results["summary"] = {"saved": spread(saved), "promised": promised, "share": share}
        all_s, half_s = (spread([turn[key] for turn in turns]) for key in ["all_s", "half_s"])
        text = f"saves {100 * share['median']:.0f} % ({100 * share['min']:.0f} to {100 * share['max']:.0f}) of what operations promise"
        what = "half" if section == "layers" else "a half that each text chooses"
        n = 64 if section == "layers" else 256
        return results, [f"| {section} | 16 x {n} tokens, attention layers, all heads and {what} | {seconds(all_s)} all | {seconds(half_s)} half | {text} |"]
    names = {"michel": ["michel", "michel_frozen"], "ablate_last": ["ablate_last", "ablate_kept"]}.get(section, [section])
    unit = {"michel": 5}.get(section, 1)
    results = take_turns([*(theirs(name, unit) for name in names), ours(unit)], args.rounds)
    rows = []
    results["summary"] = {}
    for name in names:
        found = ratio(results, name, "ours")
        results["summary"][name] = found
        what = {
            "ablate": "144 heads left out in turn, 8 x 64 tokens, loss of every token",
            "ablate_last": "the same, loss at the last token, hook loop with all logits",
            "ablate_kept": "the same, hook loop of a classifier",
            "michel": "a batch of 8 x 64 tokens, a classifier, gates by row in hooks",
            "michel_frozen": "the same, weights frozen",
            "retrieval": "16 tokens behind 4,096, eager attention returned",
        }[name]
        rows.append(f"| {name} | {what} | {seconds(results[name]['s'])} | {seconds(results['ours']['s'])} | {both(found)} |")
    return results, rows


main()
