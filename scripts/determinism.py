#!/usr/bin/env python3
"""Runs every command that writes a result twice, with the same seed and threads, and holds the results against each other bit for bit.

    python3 scripts/determinism.py [--attn target/debug/attn] [--only NAME] [--threads 1 2] [--out FILE.json]

The second pass goes through the commands backwards, into another folder. Runs are also killed after their second checkpoint and resumed.
Compared are all bytes of all files, and what `generate` and `tokenize` say, but for the path of the folder, the fields that `TIMES` names, and when TensorBoard's records were written.
That the comparison sees something is tried too: another seed has to give another result. Exits with 1 where two results differ.
"""

import argparse
import json
import re
import struct
import sys
import tempfile
import time
from pathlib import Path

import commands
from commands import ROOT

# What is measured with a clock or of the machine's memory, and what was typed, which names the folder; by command, `""` for all.
TIMES = {
    "": {"arguments", "started_utc", "elapsed_s", "peak_memory_mib"},
    "finetune": {"tokens_per_s"},
    "pretrain": {"tokens_per_s"},
    "distill": {"tokens_per_s"},
    "distill, cached teacher": {"tokens_per_s"},
    "sweep": {"tokens_per_s"},
}
# Columns of tables, likewise.
TIMED_COLUMNS = {"leaderboard": {"decode_tokens_per_s"}, "sweep": {"elapsed_s"}}
# The suffix of what a command says.
SAID = ".stdout"
RESUMED = ("finetune", "pretrain", "distill", "distill, cached teacher")


def without(value, left_out):
    if isinstance(value, dict):
        return {key: without(it, left_out) for key, it in value.items() if key not in left_out}
    if isinstance(value, list):
        # A line of metrics.jsonl.
        return [without(it, left_out) for it in value]
    return value


def events(content):
    """TensorBoard's records without the time that each begins with, and without the checksums over it."""
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 12 + 9 : at + 12 + length])
        at += 16 + length
    return found


def comparable(name, path, folder):
    """What of a file has to be the same."""
    left_out = TIMES[""] | TIMES.get(name, set())
    content = path.read_bytes()
    if path.name.startswith("events."):
        return events(content)
    if path.suffix in (".json", ".jsonl", ".csv", ".toml", ".html", ".svg"):
        text = content.decode().replace(str(folder), "DIR")
        if path.suffix == ".json":
            return without(json.loads(text), left_out)
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            return [line for line in lines if line.get("metric") not in left_out]
        if path.suffix == ".csv" and name in TIMED_COLUMNS:
            rows = [re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', line) for line in text.splitlines()]
            kept = [at for at, column in enumerate(rows[0]) if column not in TIMED_COLUMNS[name]]
            return [[row[at] for at in kept] for row in rows]
        return text
    return content


def first_difference(one, other, at=""):
    """Where two values differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if one.get(key) != other.get(key):
                return first_difference(one.get(key), other.get(key), f"{at}.{key}")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other)):
            if pair[0] != pair[1]:
                return first_difference(*pair, f"{at}[{number}]")
    return f"{at or 'content'}: {str(one)[:60]} and {str(other)[:60]}"


class Trial:
    def __init__(self, attn, folder):
        self.attn, self.folder = Path(attn).resolve(), folder
        self.problems, self.compared = [], {}

    def written(self, base, slug):
        """What a command has written: its result and the pictures beside it."""
        found = {}
        for it in sorted(base.rglob("*")):
            relative = str(it.relative_to(base))
            if it.is_file() and not it.name.endswith(".lock"):
                # The name has the second in which the run began.
                found[re.sub(r"events\.out\.tfevents\.\d+", "events", relative)] = it
        return found

    def same(self, name, one, other, how):
        """Whether two folders hold the same, and says where not."""
        slug = ""
        first, second = self.written(one, slug), self.written(other, slug)
        differences = [f"{it} is in one of them" for it in sorted(first.keys() ^ second.keys())]
        for it in sorted(first.keys() & second.keys()):
            a, b = comparable(name, first[it], one), comparable(name, second[it], other)
            if a != b:
                differences.append(f"{it}: {first_difference(a, b)}")
        self.compared.setdefault(how, {})[name] = {"files": len(first), "differences": differences}
        return differences

    def run(self, name, command, suffix, base, threads):
        base.mkdir(parents=True)
        out = base / ("out" + suffix)
        ran = commands.run(
            self.attn,
            command.format(dir=self.folder, out=out),
            env=commands.environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)),
        )
        if ran.returncode != 0:
            self.wrong(name, f"it ends with {ran.returncode}: {ran.stderr[-400:]}")
        if suffix == SAID:
            out.write_text(ran.stdout, encoding="utf-8")
        return out

    def wrong(self, name, what):
        self.problems.append(f"{name}: {what}".replace(str(self.folder), "DIR"))
        print(f"WRONG {self.problems[-1]}", flush=True)

    def kill_and_resume(self, name, command, base, threads):
        base.mkdir(parents=True)
        out = base / "out"
        env = commands.environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        commands.kill_with_checkpoints(self.attn, command.format(dir=self.folder, out=out), out, env)
        if (out / "summary.json").exists():
            return self.wrong(name, "it ended before it could be killed")
        ran = commands.run(self.attn, f"{command.split()[0]} --resume --out {out}", env=env)
        if ran.returncode != 0:
            self.wrong(name, f"resumed it ends with {ran.returncode}: {ran.stderr[-400:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attn", default=ROOT / "target/debug/attn")
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    tried = [it for it in [*commands.COMMANDS, *((name, said, SAID) for name, said in commands.SAID)] if args.only in it[0]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        trial = Trial(args.attn, folder)
        commands.prepare(trial.attn, folder)
        place = lambda threads, turn, name: folder / f"{turn}-{threads}" / name.replace(", ", "-").replace(" ", "-")
        for threads in args.threads:
            how = f"{threads} thread{'s' if threads > 1 else ''}"
            for turn, list_ in (("one", tried), ("two", tried[::-1])):
                for name, command, suffix in list_:
                    trial.run(name, command, suffix, place(threads, turn, name), threads)
            for name, command, _ in tried:
                one, two = place(threads, "one", name), place(threads, "two", name)
                for it in trial.same(name, one, two, how):
                    trial.wrong(name, f"{how}: {it}")
                if name in RESUMED and threads == args.threads[0]:
                    killed = place(threads, "killed", name)
                    trial.kill_and_resume(name, command, killed, threads)
                    for it in trial.same(name, one, killed, f"{how}, killed and resumed"):
                        trial.wrong(name, f"killed and resumed: {it}")
        # What the comparison is worth.
        for name, command, suffix in tried:
            if name in ("finetune", "pretrain", "distill"):
                other = place(args.threads[0], "other", name)
                trial.run(name, f"{command} --set {'' if name == 'distill' else 'train.'}seed=12345", suffix, other, args.threads[0])
                found = trial.same(name, place(args.threads[0], "one", name), other, "another seed")
                if not any("model.safetensors" in it for it in found):
                    trial.wrong(name, "another seed gives the same weights")
    n = sum(len(it) for it in trial.compared.values())
    files = sum(it["files"] for how in trial.compared.values() for it in how.values())
    seconds = round(time.monotonic() - started)
    print(f"{n} comparisons of {files} files in {seconds} s, {len(trial.problems)} wrong")
    if args.out:
        report = {
            "commit": commands.commit(),
            "left_out": {"fields": {key or "all": sorted(it) for key, it in TIMES.items()}, "columns": {k: sorted(v) for k, v in TIMED_COLUMNS.items()}},
            "compared": trial.compared,
            "wrong": trial.problems,
        }
        text = json.dumps(report, indent=2).replace(str(folder), "DIR")
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if trial.problems else 0)


main()
