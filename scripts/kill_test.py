#!/usr/bin/env python3
"""Kills commands at random moments and looks what is left: nothing half-written may pass for whole, and what is run again ends as it
would have without.

    python3 scripts/kill_test.py [--kills 200] [--seed 0] [--attn target/debug/attn] [--out FILE.json]

Commands that go on (finetune, distill, sweep) are killed and resumed until they end; the weights they end with have to be those of an
undisturbed run, to the bit. Commands that write a folder or file in one go (convert, prune, swap, save, score-heads) are killed and run
again: what stands under the name that was given is absent or whole. Exits with 1 where anything else is seen.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUNE = "--set train.max_steps=60 --set train.checkpoint_every=10 --set train.eval_every=20 --set examples.report_limit=60"
DISTILL = "--set tune.train.max_steps=30 --set tune.train.checkpoint_every=5 --set examples.report_hold_out=20"
GPT2 = "results/models/wikitext-gpt2"

# Name, what begins it, what goes on with it, and the file whose bytes have to be those of an undisturbed run.
RESUMED = [
    ("finetune", f"finetune {TUNE} --out {{out}}", "finetune --resume --out {out}", "model/model.safetensors"),
    ("distill", f"distill configs/distill/sample.toml {DISTILL} --out {{out}}", "distill --resume --out {out}", "model/model.safetensors"),
    ("sweep", "sweep {dir}/sweep.toml --out {out}", "sweep {dir}/sweep.toml --out {out}", "a,seed=1/model/model.safetensors"),
]
# Name, the command, and what has to load or parse where it is there.
AT_ONCE = [
    ("convert", f"convert --model {GPT2} --kv-heads 3 --method aligned --refit --calibration-tokens 4000 --out {{out}}", "model.safetensors"),
    ("prune", f"prune --model {GPT2} --heads 0-1,2-3 --out {{out}}", "model.safetensors"),
    ("swap", f"swap --model {GPT2} --attention window --out {{out}}", "model.safetensors"),
    ("save", f"save --model {GPT2} --dtype f16 --out {{out}}", "model.safetensors"),
    ("score-heads", f"score-heads --model {GPT2} --task data/sample_text.txt --split train --limit 40 --max-len 32 --out {{out}}", None),
]
SWEEP = f"""
base = "{ROOT}/configs/finetune/default.toml"
seeds = [1]
[[run]]
name = "a"
train.max_steps = 25
train.checkpoint_every = 5
examples.report_limit = 60
[[run]]
name = "b"
train.max_steps = 25
train.checkpoint_every = 5
train.lr = 1e-4
examples.report_limit = 60
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Trial:
    def __init__(self, args):
        self.attn = Path(args.attn).resolve()
        self.random = random.Random(args.seed)
        self.problems, self.kills = [], {}

    def run(self, command, seconds=None):
        """The exit code and what was said; None where it was killed after `seconds`."""
        process = subprocess.Popen(
            [self.attn, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            # Its children, too: a sweep has some.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""

    def wrong(self, name, what):
        self.problems.append(f"{name}: {what}")
        print(f"WRONG {name}: {what}", flush=True)

    def parses(self, name, folder):
        """No file that is read as whole is half-written."""
        for file in folder.rglob("*.json"):
            if file.is_symlink() or "tmp" in file.name:
                continue
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, FileNotFoundError) as error:
                self.wrong(name, f"{file.relative_to(folder)} is {error}")

    def resumed(self, folder, name, begin, go_on, file, kills):
        begin, go_on = (text.replace("{dir}", str(folder)) for text in (begin, go_on))
        whole = folder / f"{name}-whole"
        started = time.monotonic()
        code, said = self.run(begin.format(out=whole))
        takes = time.monotonic() - started
        if code != 0:
            return self.wrong(name, f"undisturbed it ends with {code}: {said[-300:]}")
        expected = digest(whole / file)
        done, n_killed = 0, 0
        while n_killed < kills:
            out = folder / f"{name}-{done}"
            command = begin
            for _ in range(60):
                limit = self.random.uniform(0.02, takes * 0.8) if n_killed < kills else None
                code, said = self.run(command.format(out=out), limit)
                if code is None:
                    n_killed += 1
                    self.parses(name, out) if out.exists() else None
                    # Before its config is written a run is no run yet.
                    began = (out / "config.toml").exists() or (out / "sweep.toml").exists()
                    command = go_on if began else begin
                    if not began and out.exists():
                        shutil.rmtree(out)
                elif code == 0:
                    break
                else:
                    return self.wrong(name, f"after {n_killed} kills `{command}` ends with {code}: {said[-400:]}")
            else:
                return self.wrong(name, "it does not come to an end")
            if digest(out / file) != expected:
                self.wrong(name, f"{file} is another than of an undisturbed run")
            shutil.rmtree(out)
            done += 1
        self.kills[name] = {"kills": n_killed, "runs": done, "seconds_undisturbed": round(takes, 2)}

    def at_once(self, folder, name, command, file, kills):
        whole = folder / (f"{name}-whole" if file else f"{name}-whole.json")
        started = time.monotonic()
        code, said = self.run(command.format(out=whole))
        takes = time.monotonic() - started
        if code != 0:
            return self.wrong(name, f"undisturbed it ends with {code}: {said[-300:]}")
        expected = digest(whole / file) if file else digest(whole)
        absent, there, n_killed, at = 0, 0, 0, 0
        # One that ends before it is killed says nothing.
        while n_killed < kills and at < 4 * kills:
            at += 1
            out = folder / (f"{name}-{at}" if file else f"{name}-{at}.json")
            # Above all around the moment when it is written.
            limit = self.random.choice([self.random.uniform(0.02, takes), self.random.uniform(0.7, 1.05) * takes])
            killed, _ = self.run(command.format(out=out), limit)
            n_killed += killed is None
            if not out.exists():
                absent += 1
                code, said = self.run(command.format(out=out))
                if code != 0:
                    self.wrong(name, f"run again it ends with {code}: {said[-300:]}")
                    continue
            else:
                there += 1
            found = out / file if file else out
            if not found.exists() or digest(found) != expected:
                self.wrong(name, f"{out.name} is there and is not whole")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        self.kills[name] = {"kills": n_killed, "absent": absent, "whole": there, "seconds_undisturbed": round(takes, 2)}

    def excluded(self, folder):
        """Two runs in one folder."""
        out = folder / "both"
        first = subprocess.Popen(
            [self.attn, *f"finetune --set train.max_steps=400 --out {out}".split()], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (out / "config.toml").exists():
            time.sleep(0.05)
        code, said = self.run(f"finetune --resume --out {out}")
        first.kill()
        first.wait()
        if code == 0 or "error: " not in said:
            self.wrong("two runs", f"the second ends with {code}: {said[-300:]}")
        return said.strip().splitlines()[0] if said.strip() else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attn", default=ROOT / "target/debug/attn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trial = Trial(args)
    each = -(-args.kills // (len(RESUMED) + len(AT_ONCE)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "sweep.toml").write_text(SWEEP, encoding="utf-8")
        for name, begin, go_on, file in RESUMED:
            trial.resumed(folder, name, begin, go_on, file, each)
            print(name, trial.kills.get(name), flush=True)
        for name, command, file in AT_ONCE:
            trial.at_once(folder, name, command, file, each)
            print(name, trial.kills.get(name), flush=True)
        second = trial.excluded(folder)
        known = ("sweep.toml", "both")
        left = [it.name for it in folder.iterdir() if "whole" not in it.name and it.name not in known and it.suffix != ".png"]
    n = sum(it["kills"] for it in trial.kills.values())
    print(f"{n} kills, {len(trial.problems)} wrong; of a second run in one folder: {second}; left behind: {left}")
    if args.out:
        report = {"seed": args.seed, "kills": trial.kills, "wrong": trial.problems, "second_run": second, "left_behind": sorted(left)}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if trial.problems else 0)


main()
