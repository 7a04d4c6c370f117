#!/usr/bin/env python3
"""Kills commands at random moments and looks what is left: nothing half-written may pass for whole, and what is run again ends as it
would have without.

    python3 scripts/kill_test.py [--kills 200] [--seed 0] [--attn target/debug/attn] [--out FILE.json]

Commands that go on (finetune, pretrain, distill with and without a teacher's predictions on disk, sweep) are killed and resumed until
they end; the weights they end with have to be those of an undisturbed run, to the bit, and so have the names of all files. Commands that
write a folder or file in one go (convert, prune, swap, save, report, score-heads, verify) are killed and run again: what stands under the name
that was given is absent or whole. Downloads, from a slow Hub in this process, are killed and run again on the same cache: a content has its
name there once its hash is right. When all is done, no file may be left that an undisturbed command does not leave. Exits with 1 where
anything else is seen.
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

from commands import commit
from fake_hub import FakeHub

ROOT = Path(__file__).resolve().parent.parent
TUNE = "--set train.max_steps=60 --set train.checkpoint_every=10 --set train.eval_every=20 --set examples.report_limit=60"
DISTILL = "--set tune.train.max_steps=30 --set tune.train.checkpoint_every=5 --set examples.report_hold_out=20"
GPT2 = "results/models/wikitext-gpt2"

# Name, what begins it, what goes on with it, and the file whose bytes have to be those of an undisturbed run.
RESUMED = [
    ("finetune", f"finetune {TUNE} --out {{out}}", "finetune --resume --out {out}", "model/model.safetensors"),
    ("distill", f"distill configs/distill/sample.toml {DISTILL} --out {{out}}", "distill --resume --out {out}", "model/model.safetensors"),
    ("pretrain", "pretrain {dir}/pretrain.toml --out {out}", "pretrain --resume --out {out}", "model/model.safetensors"),
    (
        "distill, cached teacher",
        "distill {dir}/cached.toml --set tune.teacher_cache={out}-cache --out {out}",
        "distill --resume --out {out}",
        "model/model.safetensors",
    ),
    ("sweep", "sweep {dir}/sweep.toml --out {out}", "sweep {dir}/sweep.toml --out {out}", "a,seed=1/model/model.safetensors"),
]
# Name, the command, and what has to load or parse where it is there.
AT_ONCE = [
    ("report", "report results/2026-11-21-mnli-kshot --out {out}", "html"),
    ("convert", f"convert --model {GPT2} --kv-heads 3 --method aligned --refit --calibration-tokens 4000 --out {{out}}", "folder"),
    ("prune", f"prune --model {GPT2} --heads 0-1,2-3 --out {{out}}", "folder"),
    ("swap", f"swap --model {GPT2} --attention window --out {{out}}", "folder"),
    ("save", f"save --model {GPT2} --dtype f16 --out {{out}}", "folder"),
    ("score-heads", f"score-heads --model {GPT2} --task data/sample_text.txt --split train --limit 40 --max-len 32 --out {{out}}", "json"),
    ("verify", f"verify --model {GPT2} --out {{out}}", "json"),
]
# Name and command; the cache is `{out}-hub`.
DOWNLOADS = [
    ("download of a model", "save --model o/m --dtype f16 --out {out}"),
    ("download of a data set", f"score-heads --model {GPT2} --task o/d --split train --limit 10 --max-len 16 --out {{out}}"),
]
PRETRAIN = """
objective = "causal"
threads = 1
[init]
model_type = "gpt2"
n_embd = 32
n_layer = 2
n_head = 2
n_positions = 32
[tokenizer]
vocab_size = 400
[data]
source = "{dir}/text.txt"
[examples]
max_len = 24
hold_out = 20
[train]
lr = 1e-3
max_steps = 40
batch_size = 8
checkpoint_every = 6
eval_every = 10
"""
CACHED = f"""
model = "{ROOT}/{GPT2}"
[data]
source = "{{dir}}/text.txt"
[examples]
max_len = 16
report_hold_out = 10
[attention]
kind = "window"
size = 4
[tune]
loss = {{ top_k_kl = 1.0, top_k = 8 }}
[tune.train]
lr = 1e-3
max_steps = 12
batch_size = 8
checkpoint_every = 3
"""
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


def result(path):
    """A file's bytes, without what was typed where it is a result that says so: the path is another in each run."""
    content = path.read_bytes()
    if path.suffix in ("", ".json"):
        value = json.loads(content)
        value.pop("arguments", None)
        content = json.dumps(value).encode()
    return hashlib.sha256(content).hexdigest()


def whole_result(path, file, expected):
    """Whether what stands there is whole, and the one that is expected."""
    try:
        return (digest(path / file) if path.is_dir() else result(path)) == expected
    except (ValueError, FileNotFoundError):
        return False


def names(folder):
    """The files in a folder, but for the number that TensorBoard's files begin with."""
    found = (str(it.relative_to(folder)) for it in folder.rglob("*") if not it.is_dir() or it.is_symlink())
    return {"tensorboard" if name.split("/")[-1].startswith("events.") else name for name in found}


class Trial:
    def __init__(self, args):
        self.attn = Path(args.attn).resolve()
        self.random = random.Random(args.seed)
        self.problems, self.kills = [], {}

    def run(self, command, seconds=None, env=None):
        """The exit code and what was said; None where it was killed after `seconds`."""
        process = subprocess.Popen(
            [self.attn, *command.split()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # One thread: several that wait for each other on a busy machine take any time.
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
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

    def undisturbed(self, name, command, env=None):
        """How long it takes; None where it fails."""
        started = time.monotonic()
        code, said = self.run(command, env=env)
        if code != 0:
            return self.wrong(name, f"undisturbed it ends with {code}: {said[-300:]}")
        return time.monotonic() - started

    def parses(self, name, folder):
        """No file that is read as whole is half-written."""
        for file in folder.rglob("*.json"):
            # What is hidden is a draft, of a file or in a folder.
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_symlink() or hidden:
                continue
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, FileNotFoundError) as error:
                self.wrong(name, f"{file.relative_to(folder)} is {error}")
        # Checkpoints and the shards of a teacher's predictions have theirs.
        for sums in [*folder.rglob("SHA256SUMS"), *folder.rglob("*.sha256")]:
            hidden = any(part.startswith(".") for part in sums.relative_to(folder).parts)
            for line in [] if hidden else sums.read_text(encoding="utf-8").splitlines():
                expected, file = line.split()
                path = sums.parent / file
                if not path.exists() or digest(path) != expected:
                    self.wrong(name, f"{sums.parent.name}/{file} is another than its checksum says")

    def same_names(self, name, found, whole):
        if names(found) != names(whole):
            self.wrong(name, f"left: {sorted(names(found) - names(whole))}, missing: {sorted(names(whole) - names(found))}")

    def resumed(self, folder, name, begin, go_on, file, kills):
        begin, go_on = (text.replace("{dir}", str(folder)) for text in (begin, go_on))
        slug = name.replace(", ", "-").replace(" ", "-")
        whole = folder / f"{slug}-whole"
        takes = self.undisturbed(name, begin.format(out=whole))
        if takes is None:
            return
        expected = digest(whole / file)
        done, n_killed = 0, 0
        while n_killed < kills:
            out = folder / f"{slug}-{done}"
            cache = folder / f"{out.name}-cache"
            command = begin
            for attempt in range(60):
                limit = self.random.uniform(0.02, takes * 0.8) if n_killed < kills else None
                started = time.monotonic()
                code, said = self.run(command.format(out=out), limit)
                # The first run may have had the machine to share.
                takes = min(takes, time.monotonic() - started) if code == 0 and attempt == 0 else takes
                if code is None:
                    n_killed += 1
                    for it in (out, cache):
                        self.parses(name, it) if it.exists() else None
                    # Before its config is written a run is no run yet, and begins anew in the same folder.
                    began = (out / "config.toml").exists() or (out / "sweep.toml").exists()
                    command = go_on if began else begin
                elif code == 0:
                    break
                else:
                    return self.wrong(name, f"after {n_killed} kills `{command}` ends with {code}: {said[-400:]}")
            else:
                return self.wrong(name, "it does not come to an end")
            if digest(out / file) != expected:
                self.wrong(name, f"{file} is another than of an undisturbed run")
            self.same_names(name, out, whole)
            shutil.rmtree(out)
            if cache.exists():
                self.same_names(name, cache, folder / f"{whole.name}-cache")
                shutil.rmtree(cache)
            done += 1
        self.kills[name] = {"kills": n_killed, "runs": done, "seconds_undisturbed": round(takes, 2)}

    def at_once(self, folder, name, command, kind, kills):
        suffix, file = ("", "model.safetensors") if kind == "folder" else (f".{kind}", "")
        whole = folder / f"{name}-whole{suffix}"
        takes = self.undisturbed(name, command.format(out=whole))
        if takes is None:
            return
        expected = digest(whole / file) if file else result(whole)
        absent, there, n_killed, at = 0, 0, 0, 0
        # One that ends before it is killed says nothing.
        while n_killed < kills and at < 4 * kills:
            at += 1
            # A folder of its own, to see what is left.
            inside = folder / f"{name}-{at}"
            inside.mkdir()
            out = inside / whole.name
            # Above all around the moment when it is written.
            limit = self.random.choice([self.random.uniform(0.02, takes), self.random.uniform(0.7, 1.05) * takes])
            killed, _ = self.run(command.format(out=out), limit)
            n_killed += killed is None
            if out.exists() and not whole_result(out, file, expected):
                self.wrong(name, f"{out.name} is there and is not whole")
            absent, there = (absent, there + 1) if out.exists() else (absent + 1, there)
            if killed is None:
                # A folder that is whole is not written a second time.
                refused = out.is_dir()
                code, said = self.run(command.format(out=out))
                if refused != ("is there already" in said) or code != refused:
                    self.wrong(name, f"run again it ends with {code}: {said[-300:]}")
                elif not whole_result(out, file, expected):
                    self.wrong(name, f"run again {out.name} is another")
            left = [it.name for it in inside.iterdir() if it.name.startswith(".")]
            if left:
                self.wrong(name, f"left behind: {left}")
            shutil.rmtree(inside)
        self.kills[name] = {"kills": n_killed, "absent": absent, "whole": there, "seconds_undisturbed": round(takes, 2)}

    def whole_contents(self, name, cache):
        """How many contents the cache has under their names, of which the hash has to be right, and how many parts."""
        n_whole, n_parts = 0, 0
        for blob in cache.glob("*/blobs/*"):
            if blob.suffix == ".incomplete":
                n_parts += 1
            else:
                n_whole += 1
                if blob.name != FakeHub.tag("x.parquet" if len(blob.name) == 64 else "x", blob.read_bytes()):
                    self.wrong(name, f"the content {blob.name} is not what its name says")
        for link in cache.glob("*/snapshots/*/**/*"):
            if link.is_symlink() and not link.exists():
                self.wrong(name, f"{link.name} leads to no content")
        for ref in cache.glob("*/refs/*"):
            if len(ref.read_text(encoding="utf-8")) != 40:
                self.wrong(name, f"{ref.name} is no commit")
        return n_whole, n_parts

    def download(self, folder, name, command, kills):
        files = {it.name: it.read_bytes() for it in (ROOT / GPT2).iterdir()}
        rows = {"data/train-00000-of-00001.parquet": (ROOT / "data/sample_data.parquet").read_bytes()}
        repos = {"o/m": files, "datasets/o/d": rows}
        slug = name.replace(" ", "-")

        def env(hub, out):
            known = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": f"{out}-hub", "HF_HUB_OFFLINE": "0"}
            return {**known, "TRANSFORMERS_OFFLINE": "", "HF_DATASETS_OFFLINE": ""}

        # Two to three seconds of it are the network.
        size = sum(map(len, (files if "o/m" in command else rows).values()))
        hub = FakeHub(repos, size / 2)
        whole = folder / f"{slug}-whole"
        takes = self.undisturbed(name, command.format(out=whole), env(hub, whole))
        if takes is None:
            return
        expected = digest(whole / "model.safetensors") if whole.is_dir() else result(whole)
        undisturbed_cache = Path(f"{whole}-hub")
        done, n_killed, n_parts, n_continued = 0, 0, 0, 0
        while n_killed < kills:
            out = folder / f"{slug}-{done}"
            cache = Path(f"{out}-hub")
            for _ in range(60):
                limit = self.random.uniform(0.02, takes) if n_killed < kills else None
                hub.requests.clear()
                code, said = self.run(command.format(out=out), limit, env(hub, out))
                n_continued += any(asked for _, _, asked in hub.requests)
                if code is None:
                    n_killed += 1
                    n_parts += self.whole_contents(name, cache)[1]
                    # A folder that is whole is not written a second time; who is refused removes what was left beside it.
                    if out.is_dir():
                        self.run(command.format(out=out), env=env(hub, out))
                        break
                elif code == 0:
                    break
                else:
                    return self.wrong(name, f"after {n_killed} kills it ends with {code}: {said[-400:]}")
            else:
                return self.wrong(name, "it does not come to an end")
            if not whole_result(out, "model.safetensors", expected):
                self.wrong(name, "the result is another than of an undisturbed run")
            self.whole_contents(name, cache)
            self.same_names(name, cache, undisturbed_cache)
            left = [it.name for it in folder.glob(f".{out.name}.*")]
            if left:
                self.wrong(name, f"left behind: {left}")
            for it in (out, cache):
                shutil.rmtree(it) if it.is_dir() else it.unlink()
            done += 1
        if not n_continued and kills > 5:
            self.wrong(name, "no download was gone on with: each began anew")
        self.kills[name] = {
            "kills": n_killed,
            "runs": done,
            "parts_after_kills": n_parts,
            "continued": n_continued,
            "seconds_undisturbed": round(takes, 2),
        }

    def excluded(self, folder):
        """Two runs in one folder."""
        out = folder / "both"
        first = subprocess.Popen(
            [self.attn, *f"finetune --set train.max_steps=400 --out {out}".split()], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (out / "config.toml").exists() and first.poll() is None:
            time.sleep(0.05)
        code, said = self.run(f"finetune --resume --out {out}")
        first.kill()
        first.wait()
        if code == 0 or "another process is running" not in said:
            self.wrong("two runs", f"the second ends with {code}: {said[-300:]}")
        return said.strip().splitlines()[0].replace(str(folder), "DIR") if said.strip() else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attn", default=ROOT / "target/debug/attn")
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trial = Trial(args)
    kinds = [(trial.resumed, RESUMED), (trial.at_once, AT_ONCE), (trial.download, DOWNLOADS)]
    tried = [(how, it) for how, list_ in kinds for it in list_ if args.only in it[0]]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lines = (ROOT / "data/sample_text.txt").read_text(encoding="utf-8").splitlines()[:1000]
        (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
        for name, text in (("sweep", SWEEP), ("pretrain", PRETRAIN), ("cached", CACHED)):
            (folder / f"{name}.toml").write_text(text.replace("{dir}", str(folder)), encoding="utf-8")
        for number, (how, it) in enumerate(tried):
            # As many each, and the first ones one more.
            each = args.kills // len(tried) + (number < args.kills % len(tried))
            if each:
                how(folder, *it, each)
                print(it[0], trial.kills.get(it[0]), flush=True)
        second = trial.excluded(folder)
    n = sum(it["kills"] for it in trial.kills.values())
    seconds = round(time.monotonic() - started)
    print(f"{n} kills in {seconds} s, {len(trial.problems)} wrong; of a second run in one folder: {second}")
    if n < args.kills:
        trial.wrong("kills", f"only {n} of {args.kills} commands could be killed before they ended")
    if args.out:
        report = {"commit": commit(), "seed": args.seed, "kills": trial.kills, "wrong": trial.problems, "second_run": second}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if trial.problems else 0)


main()
