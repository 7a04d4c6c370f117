#!/usr/bin/env python3
"""Runs the sections of scripts/bench_finetune.sh and writes DIR/SECTION-THREADS.json and .md.

Contenders take turns, a few units each, in processes that live through the section and wait while another works, so
that what else the machine does meets them alike. A figure is the median over turns, with the least and the most.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GPT2 = os.environ.get("BENCH_GPT2", "openai-community/gpt2")  # a folder with config.json does
DISTILBERT = "distilbert/distilbert-base-uncased"
BYTES_F32 = 4 * 124_439_808 - 4 * 1024 * 768  # read once a token: everything but the position table


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Contender:
    """A process that does units of work when told to."""

    def __init__(self, name: str, command: list, unit: int, threads: int):
        self.name, self.unit = name, unit
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
        env["TOKENIZERS_PARALLELISM"] = "true"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        self.turns, self.answer = [], None
        self.facts = self.read()
        self.work(1)  # the first unit allocates, and is not counted
        self.turns.clear()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name} ended, exit code {self.process.wait()}")
        return json.loads(line)

    def work(self, units: int):
        cpu, started = cpu_s(self.process.pid), time.perf_counter()
        self.process.stdin.write(f"{units}\n")
        self.process.stdin.flush()
        self.answer = self.read()
        wall = (time.perf_counter() - started) / units
        self.turns.append({"s": wall, "cpu_s": (cpu_s(self.process.pid) - cpu) / units, **self.answer})
        self.turns[-1].pop("ids", None)

    def finish(self) -> dict:
        status = Path(f"/proc/{self.process.pid}/status").read_text().split()
        peak = int(status[status.index("VmHWM:") + 1]) / 2**20
        self.process.stdin.close()
        self.process.wait()
        return {"facts": self.facts, "peak_gib": peak, "turns": self.turns}


def spread(values: list) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def take_turns(contenders: list, rounds: int) -> dict:
    contenders = [c for c in contenders if c]
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            contender.work(contender.unit)
    results = {c.name: c.finish() for c in contenders}
    for result in results.values():
        for key in ["s", "cpu_s"]:
            result[key] = spread([turn[key] for turn in result["turns"]])
    return results


def ratio(results: dict, theirs: str, ours: str) -> dict:
    """How many times faster `ours` is: of the medians, and the spread over rounds."""
    pairs = list(zip(results[theirs]["turns"], results[ours]["turns"]))
    ratios = {}
    for key in ["s", "cpu_s"]:
        of_medians = results[theirs][key]["median"] / results[ours][key]["median"]
        ratios[key] = {**spread([a[key] / b[key] for a, b in pairs]), "of_medians": of_medians}
    return ratios


def three(value: dict) -> str:
    return f"{value['median']:.0f} ({value['min']:.0f} to {value['max']:.0f})"


def times(value: dict) -> str:
    return f"{value['of_medians']:.2f}x ({value['min']:.2f} to {value['max']:.2f})"


def both(value: dict) -> str:
    return f"{times(value['s'])}; processor time {times(value['cpu_s'])}"


class Bench:
    def __init__(self, args):
        self.args = args
        self.threads = args.threads

    def ours(self, name, unit, section, model, *rest):
        command = [self.args.ours, section, model, str(self.threads), *map(str, rest)]
        return Contender(name, command, unit, self.threads)

    def theirs(self, name, unit, section, model, *rest):
        """None where there is no transformers to compare with."""
        if not self.args.python:
            return None
        script = str(HERE / "theirs.py")
        command = [self.args.python, script, section, model, str(self.threads), *map(str, rest)]
        return Contender(name, command, unit, self.threads)

    def train(self):
        results = take_turns(
            [
                self.theirs("theirs", 1, "train", GPT2),
                self.ours("ours", 1, "train", GPT2),
                self.theirs("products", 1, "products", GPT2),
            ],
            self.args.rounds,
        )
        title = "GPT-2 124M, 16 x 64 tokens, f32, dropout on, gradient clipped"
        if not self.args.python:
            tokens_s = spread([1024 / turn["s"] for turn in results["ours"]["turns"]])
            return results, title, [("ours", f"{three(tokens_s)} tokens/s", "")]
        gflop = results["products"]["facts"]["gflop"]
        turns = results["products"]["turns"]
        products = {key: spread([turn[f"products_{key}"] for turn in turns]) for key in ["s", "cpu_s"]}
        results["summary"] = {
            "gflop_per_step": gflop,
            "ceiling_gflop_s": gflop / products["s"]["median"],
            "ceiling_gflop_cpu_s": gflop / products["cpu_s"]["median"],
            "ratio": ratio(results, "theirs", "ours"),
        }
        s = results["summary"]
        text = f"{1024 / products['s']['median']:.0f} tokens/s, {s['ceiling_gflop_s']:.0f} GFLOP/s"
        text += f" ({s['ceiling_gflop_cpu_s']:.0f} a second of processor time), {gflop:.0f} GFLOP a step"
        rows = [("the products alone", text, "")]
        for name in ["theirs", "ours"]:
            share = {key: products[key]["median"] / results[name][key]["median"] for key in products}
            tokens_s, peak = 1024 / results[name]["s"]["median"], results[name]["peak_gib"]
            s[name] = {"tokens_s": tokens_s, "share_of_ceiling": share, "peak_gib": peak}
            text = f"{tokens_s:.0f} tokens/s, {share['s']:.0%} of that; by processor time {share['cpu_s']:.0%}"
            rows.append((name, f"{text}; peak {peak:.2f} GiB", ""))
        rows[-1] = (*rows[-1][:2], "at least 80 %; no higher a peak")
        rows.append(("ours / theirs", both(s["ratio"]), "at least 1.12x"))
        return results, title, rows

    def distill(self):
        results = take_turns(
            [
                self.theirs("theirs", 1, "distill", GPT2),
                self.ours("ours", 1, "distill", GPT2),
                self.theirs("products", 1, "products", GPT2, 256, 1),
            ],
            self.args.rounds,
        )
        title = "Distillation, GPT-2 124M, 4 x 256 tokens, forward KL, f32, dropout on, gradient clipped"
        if not self.args.python:
            tokens_s = spread([1024 / turn["s"] for turn in results["ours"]["turns"]])
            return results, title, [("ours", f"{three(tokens_s)} tokens/s", "")]
        turns = results["products"]["turns"]
        products = {key: spread([turn[f"products_{key}"] for turn in turns]) for key in ["s", "cpu_s"]}
        summary = results["summary"] = {
            "gflop_per_step": results["products"]["facts"]["gflop"],
            "ceiling_tokens_s": 1024 / products["s"]["median"],
            "ratio": ratio(results, "theirs", "ours"),
        }
        rows = [("the products alone", f"{summary['ceiling_tokens_s']:.0f} tokens/s", "")]
        for name in ["theirs", "ours"]:
            share = {key: products[key]["median"] / results[name][key]["median"] for key in products}
            tokens_s = spread([1024 / turn["s"] for turn in results[name]["turns"]])
            above = results[name]["peak_gib"] - results[name]["facts"]["loaded_gib"]
            summary[name] = {"tokens_s": tokens_s, "share_of_ceiling": share, "peak_above_weights_gib": above}
            text = f"{three(tokens_s)} tokens/s, {share['s']:.0%} of that; by processor time {share['cpu_s']:.0%}"
            rows.append((name, f"{text}; peak {above:.2f} GiB above both models' weights", ""))
        memory = summary["ours"]["peak_above_weights_gib"] / summary["theirs"]["peak_above_weights_gib"]
        summary["memory_ratio"] = memory
        rows.append(("ours / theirs", both(summary["ratio"]), "at least 1.5x, aim 1.7x"))
        rows.append(("peak, ours / theirs", f"{memory:.2f}x", "at most 0.5x"))
        return results, title, rows

    def sst2(self):
        n, unit = self.args.rounds * 2, 2
        results = take_turns(
            [
                self.theirs("random", unit, "sst2", DISTILBERT, "random", n),
                self.theirs("grouped", unit, "sst2", DISTILBERT, "grouped", n),
                self.ours("ours", unit, "sst2", DISTILBERT, "f32", n),
            ],
            self.args.rounds,
        )
        per_s, rows = {}, []
        for name in ["random", "grouped", "ours"]:
            facts = results[name]["facts"]
            # Batches differ in length, so it is the mean that a whole pass takes; medians would leave out long ones.
            step_s = statistics.mean(turn["s"] for turn in results[name]["turns"])
            cpu_s = statistics.mean(turn["cpu_s"] for turn in results[name]["turns"])
            pass_s = facts["tokenize_s"] + step_s * facts["batches"]
            per_s[name] = {
                "step_s": step_s,
                "step_cpu_s": cpu_s,
                "pass_s": pass_s,
                "examples_s": facts["examples"] / pass_s,
                "positions_per_example": facts["positions"] / facts["examples"],
            }
            text = f"{facts['examples'] / pass_s:.1f} examples/s: tokenizing {facts['tokenize_s']:.1f} s, "
            text += f"{facts['batches']} steps of {step_s:.3f} s; "
            text += f"{facts['positions'] / facts['examples']:.1f} positions an example; "
            rows.append((name, text + f"peak {results[name]['peak_gib']:.2f} GiB", ""))
        results["summary"] = per_s
        for name, bar in [("random", 2.4), ("grouped", 1.2)]:
            per_s[f"ours / {name}"] = per_s["ours"]["examples_s"] / per_s[name]["examples_s"]
            cpu = per_s[name]["step_cpu_s"] / per_s["ours"]["step_cpu_s"]
            per_s[f"ours / {name}, processor time of steps"] = cpu
            text = f"{per_s[f'ours / {name}']:.2f}x; processor time of steps {cpu:.2f}x"
            rows.append((f"ours / {name}", text, f"at least {bar}x"))
        return results, f"One pass over SST-2, DistilBERT, batch 32, from {n} of its batches", rows

    def generate(self):
        results = take_turns(
            [
                self.theirs("theirs", 1, "generate", GPT2),
                self.ours("ours f32", 1, "generate", GPT2, "f32"),
                self.ours("ours bf16", 1, "generate", GPT2, "bf16"),
                self.theirs("products", 1, "products", GPT2),
            ],
            self.args.rounds,
        )
        title = "generate, GPT-2 124M, greedy, one text, 16 tokens and 64 new ones"
        if not self.args.python:
            rates = {name: spread([64 / turn["s"] for turn in r["turns"]]) for name, r in results.items()}
            return results, title, [(name, f"{three(rate)} tokens/s", "") for name, rate in rates.items()]
        read = spread([turn["read_gb_s"] for turn in results["products"]["turns"]])
        rows = [("memory read", f"{read['median']:.1f} GB/s ({read['min']:.1f} to {read['max']:.1f})", "")]
        summary = {"read_gb_s": read}
        for name, size in [("theirs", 1), ("ours f32", 1), ("ours bf16", 0.5)]:
            tokens_s = 64 / results[name]["s"]["median"]
            gb_s = tokens_s * size * BYTES_F32 / 1e9
            summary[name] = {"tokens_s": tokens_s, "gb_s": gb_s}
            peak = results[name]["peak_gib"]
            rows.append((name, f"{tokens_s:.1f} tokens/s, {gb_s:.1f} GB/s of weights; peak {peak:.2f} GiB", ""))
        for name, bar in [("ours f32", 1.35), ("ours bf16", 2)]:
            summary[f"{name} / theirs"] = ratio(results, "theirs", name)
            rows.append((f"{name} / theirs", both(summary[f"{name} / theirs"]), f"at least {bar}x"))
        results["summary"] = summary
        return results, title, rows

    def start(self):
        """Seconds from the start of the process to its first step, with 64 rows to train on and 8 to report on."""
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "RAYON_NUM_THREADS": str(self.threads)}
        results = {name: {"turns": []} for name in ["theirs", "ours"]}
        with tempfile.TemporaryDirectory() as folder:
            model = f"{folder}/model"
            script = [self.args.python, str(HERE / "theirs.py")]
            save = [*script, "save", DISTILBERT, str(self.threads), model]
            subprocess.run(save, env=env, check=True)
            weights = Path(model, "model.safetensors")
            settings = {
                "model": model,
                "threads": self.threads,
                "examples.limit": 64,
                "examples.report_limit": 8,
                "train.max_steps": 1,
                "train.batch_size": 32,
            }
            for number in range(self.args.rounds):
                run = f"{folder}/run-{number}"
                sets = [f"--set={key}={value}" for key, value in settings.items()]
                config = str(HERE.parent.parent / "configs/finetune/sst2.toml")
                commands = {
                    "theirs": [*script, "start", model, str(self.threads)],
                    "ours": [self.args.attn, "finetune", config, "--out", run, *sets],
                }
                for name, command in commands.items():
                    read_s = time.perf_counter()
                    weights.read_bytes()
                    read_s = time.perf_counter() - read_s
                    results[name]["turns"].append({"read_s": read_s, **self.until_first_step(name, command, env)})
        rows = []
        for name, result in results.items():
            for key in ["s", "cpu_s", "read_s"]:
                result[key] = spread([turn[key] for turn in result["turns"]])
            beyond = spread([turn["s"] - turn["read_s"] for turn in result["turns"]])
            result["beyond_reading_s"] = beyond
            text = f"{result['s']['median']:.2f} s, {beyond['median']:.2f} s "
            text += f"({beyond['min']:.2f} to {beyond['max']:.2f}) beyond reading the weights; "
            text += f"processor time {result['cpu_s']['median']:.2f} s"
            rows.append((name, text, "under 2 s beyond reading" if name == "ours" else ""))
        return results, "From the start of the process to the first step, DistilBERT from a folder", rows

    def until_first_step(self, name: str, command: list, env: dict) -> dict:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said = []
        for line in process.stdout:
            cpu = cpu_s(process.pid)
            said.append([time.perf_counter() - started, cpu, line.strip()])
            if "load_s" in line or re.search(r"training .* parameters, 1 steps?", line):
                process.kill()
                process.communicate()
                return {"s": said[-1][0], "cpu_s": cpu, "said": said}
        lines = "\n".join(line for *_, line in said)
        sys.exit(f"error: {name} did not come to its first step:\n{lines}")

    def run(self, section: str):
        started, load = time.time(), os.getloadavg()
        results, title, rows = getattr(self, section)()
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = {
            "cpu": cpu[1] if cpu else platform.machine(),
            "cpus": os.cpu_count(),
            "device": os.environ.get("BENCH_DEVICE", "cpu"),
            "system": platform.platform(),
            "load_before": load,
            "load_after": os.getloadavg(),
            "seconds": time.time() - started,
        }
        command = f"scripts/bench_finetune.sh --section {section} --threads {self.threads}"
        command += f" --rounds {self.args.rounds}"
        result = {"title": title, "command": command, "machine": machine, **results}
        out = Path(self.args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{section}-{self.threads}.json").write_text(json.dumps(result, indent=1) + "\n")
        lines = [
            f"\n## {title}, {self.threads} thread{'s' if self.threads > 1 else ''}\n",
            f"`{command}`, load {load[0]:.1f} to {machine['load_after'][0]:.1f}\n",
            "| | measured | wanted |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {a} | {b} | {c} |" for a, b, c in rows]
        text = "\n".join(lines) + "\n"
        (out / f"{section}-{self.threads}.md").write_text(text.lstrip())
        print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="Python with torch and transformers; our side alone where it is not given")
    parser.add_argument("--ours", required=True, help="the built example `bench`")
    parser.add_argument("--attn", help="the built program, for `start`")
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--section", action="append", choices=["train", "distill", "sst2", "generate", "start"])
    args = parser.parse_args()
    sections = args.section or ["train", "sst2", "generate", "start"]
    if not args.python and {"sst2", "start"} & set(sections):
        parser.error("`sst2` and `start` compare: name a Python with transformers (--python)")
    bench = Bench(args)
    for section in sections:
        bench.run(section)


if __name__ == "__main__":
    main()
