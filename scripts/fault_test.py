#!/usr/bin/env python3
"""Takes from commands what they need while they run or between two runs: space, the right to write, files, the right time, whole bytes.

    python3 scripts/fault_test.py [--quick] [--attn target/debug/attn] [--only NAME] [--out FILE.json]

Each has to end with exit code 1 and one error that names the file and says what to do, never with a panic or a signal; what was there before
has to be there still, byte for byte, nothing half-written under a final name, nothing left beside it; and a run has to be resumed, once it has
what it needs, to the weights of an undisturbed one. Exits with 1 where anything else is seen. What the machine does not allow (a mount, another
user) is skipped, and said.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import commands
from commands import GPT2, MLM, ROOT
from fake_hub import FakeHub

QUICK = ("finetune", "distill, cached teacher", "sweep", "score-heads", "forward", "prune", "report", "plot")
RUNS = ("finetune", "pretrain", "distill", "distill, cached teacher", "sweep")
NOBODY = 65534
# The clock of a process: $CLOCK_S seconds later than it is.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, at);
    if (id == CLOCK_REALTIME && getenv("CLOCK_S")) at->tv_sec += atoll(getenv("CLOCK_S"));
    return done;
}
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    """What is below a folder, by name."""
    files = (it for it in folder.rglob("*") if it.is_file())
    return {str(it.relative_to(folder)): digest(it) for it in files}


def weights(out):
    """Of a run, and of the runs of a sweep."""
    return {str(it.relative_to(out)): digest(it) for it in out.rglob("model/model.safetensors")}


def largest(path):
    files = [path] if path.is_file() else [it for it in path.rglob("*") if it.is_file()]
    return max(it.stat().st_size for it in files)


def total(path):
    return path.stat().st_size if path.is_file() else sum(it.stat().st_size for it in path.rglob("*") if it.is_file())


class Mount:
    """A file system of its own, or None where the machine allows none."""

    def __init__(self, at, size):
        self.at = at
        at.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True)
        self.works = done.returncode == 0

    def remount(self, how):
        return subprocess.run(["mount", "-o", f"remount,{how}", self.at], capture_output=True).returncode == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.works:
            subprocess.run(["umount", self.at], check=True)
        self.at.rmdir()


class Trial:
    def __init__(self, args, folder):
        self.attn, self.folder = Path(args.attn).resolve(), folder
        self.problems, self.skipped, self.said = [], [], {}
        self.random = random.Random(0)
        self.whole = {}

    def wrong(self, case, name, what):
        self.problems.append(f"{case}, {name}: {what}".replace(str(self.folder), "DIR"))
        print(f"WRONG {self.problems[-1]}", flush=True)

    def skip(self, what):
        self.skipped.append(what)
        print(f"SKIPPED {what}", flush=True)

    def run(self, command, **how):
        return commands.run(self.attn, command, **how)

    def refused(self, case, name, ran, named):
        """Whether it ended as it should: with an error that a user can do something with."""
        said = ran.stderr
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        self.said.setdefault(case, {})[name] = [
            line.replace(str(self.folder), "DIR") for line in said.splitlines() if line.startswith(("error: ", "  caused by: ", "  hint: "))
        ][:6]
        faults = []
        if ran.returncode != 1:
            faults.append(f"it ends with {ran.returncode}")
        if not errors or (len(errors) > 1 and name != "sweep"):
            faults.append(f"{len(errors)} errors")
        if any(word in said for word in ("panicked", "fault of the program", "unwrap()", "RUST_BACKTRACE")):
            faults.append("a panic")
        if "  hint: " not in said:
            faults.append("no hint")
        if not any(str(it) in said for it in named):
            faults.append(f"none of {[str(it) for it in named]} is named")
        if faults:
            self.wrong(case, name, f"{', '.join(faults)}: {said[-500:]}")
        return not faults

    def undisturbed(self, name, command, suffix):
        out = self.folder / "whole" / (name.replace(", ", "-").replace(" ", "-") + suffix)
        ran = self.run(command.format(dir=self.folder, out=out))
        if ran.returncode != 0:
            return self.wrong("undisturbed", name, f"it ends with {ran.returncode}: {ran.stderr[-500:]}")
        self.whole[name] = out
        return out

    def afterwards(self, case, name, command, out, before):
        """What is left of a run can be gone on with; of all else there is what was there before, and nothing besides."""
        if name in RUNS:
            again = command
            if name != "sweep" and (out / "config.toml").exists():
                again = f"{command.split()[0]} --resume --out {{out}}"
            ran = self.run(again.format(dir=self.folder, out=out))
            if ran.returncode != 0:
                self.wrong(case, name, f"then `{again}` ends with {ran.returncode}: {ran.stderr[-500:]}")
            elif weights(out) != weights(self.whole[name]):
                self.wrong(case, name, "resumed, it ends with other weights")
            hidden = [it for it in contents(out.parent) if ".attn-tmp-" in it or Path(it).name.startswith(".tmp")]
            if hidden:
                self.wrong(case, name, f"left behind: {hidden}")
        elif contents(out.parent) != before:
            now = contents(out.parent)
            changed = {it for it in {*now, *before} if now.get(it) != before.get(it)}
            # A folder of pictures, each of which stands for itself.
            if name == "heatmap":
                drawn = contents(self.whole[name])
                changed = {it for it in changed if now.get(it) != drawn.get(it.removeprefix("out/"))}
            if changed:
                self.wrong(case, name, f"changed or left: {sorted(changed)}")

    def place(self, parent, name, suffix):
        """Where the command is to write, in `parent`, where a result stands already if it is a file."""
        whole = self.whole[name]
        out = parent / ("out" + suffix)
        if whole.is_file():
            out.write_bytes(whole.read_bytes()[:-1] + b"!")
        return out

    def full_by_limit(self, name, command, suffix):
        case = "full disk (a limit on files)"
        parent = self.folder / "limit"
        parent.mkdir()
        out = self.place(parent, name, suffix)
        before = contents(parent)
        most = largest(self.whole[name]) // 2
        ran = self.run(
            command.format(dir=self.folder, out=out), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        )
        self.refused(case, name, ran, [parent])
        self.afterwards(case, name, command, out, before)
        shutil.rmtree(parent)

    def full_by_mount(self, name, command, suffix):
        case = "full disk (tmpfs)"
        # Of small results pages are left, in which they would fit.
        size = max(total(self.whole[name]) // 2, 4096) // 4096 * 4096
        with Mount(self.folder / "full", size) as mount:
            if not mount.works:
                return self.skip(f"{case}, {name}: no mount")
            out = self.place(mount.at, name, suffix) if total(self.whole[name]) < 4096 else mount.at / ("out" + suffix)
            filler = mount.at / "filler"
            if not self.whole[name].is_dir():
                # To the last page.
                with filler.open("wb") as file:
                    try:
                        while True:
                            file.write(b"x" * 4096)
                            file.flush()
                    except OSError:
                        pass
                    try:
                        file.close()
                    except OSError:
                        pass
            before = contents(mount.at)
            ran = self.run(command.format(dir=self.folder, out=out))
            self.refused(case, name, ran, [mount.at])
            mount.remount("size=1g")
            self.afterwards(case, name, command, out, before)

    def read_only_mount(self, name, command, suffix):
        case = "read-only file system"
        with Mount(self.folder / "ro", 1 << 20) as mount:
            if not mount.works:
                return self.skip(f"{case}, {name}: no mount")
            out = mount.at / ("out" + suffix)
            if self.whole[name].is_file():
                out.write_bytes(b"before")
            before = contents(mount.at)
            if not mount.remount("ro"):
                return self.skip(f"{case}, {name}: no remount")
            ran = self.run(command.format(dir=self.folder, out=out))
            self.refused(case, name, ran, [mount.at])
            mount.remount("rw,size=1g")
            self.afterwards(case, name, command, out, before)

    def read_only_user(self, name, command, suffix):
        case = "folder of another user"
        parent = self.folder / "others"
        parent.mkdir(mode=0o755)
        out = parent / ("out" + suffix)
        if self.whole[name].is_file():
            out.write_bytes(b"before")
        before = contents(parent)

        def leave_root():
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

        ran = self.run(command.format(dir=self.folder, out=out), preexec_fn=leave_root if os.getuid() == 0 else lambda: parent.chmod(0o555))
        parent.chmod(0o755)
        self.refused(case, name, ran, [parent])
        self.afterwards(case, name, command, out, before)
        shutil.rmtree(parent)

    def begun(self, name, command, out, **how):
        """A run that was killed once it had two checkpoints."""
        commands.kill_with_checkpoints(self.attn, command.format(dir=self.folder, out=out), out, commands.environment(**how))
        found = sorted(out.rglob("checkpoints/step-*"))
        if not found:
            self.wrong("begun", name, "it ended before it could be killed")
        return found

    def resumed(self, case, name, out, **how):
        ran = self.run(f"{name.split(',')[0]} --resume --out {out}", **how)
        if ran.returncode != 0:
            self.wrong(case, name, f"resumed, it ends with {ran.returncode}: {ran.stderr[-500:]}")
        elif weights(out) != weights(self.whole[name]):
            self.wrong(case, name, "resumed, it ends with other weights")
        return ran

    def vanished(self, name, command, named):
        """`named` stands in the folder: between start and resume it is gone, and comes back."""
        case = f"gone before it is resumed: {Path(named).name}"
        out = self.folder / "vanish"
        if not self.begun(name, command, out):
            return
        checkpoints = contents(out)
        gone = Path(named)
        gone.rename(f"{gone}.away")
        ran = self.run(f"{name.split(',')[0]} --resume --out {out}")
        self.refused(case, name, ran, [named])
        Path(f"{gone}.away").rename(gone)
        lost = {it for it, was in checkpoints.items() if "checkpoints/step-" in it and contents(out).get(it) != was}
        if lost:
            self.wrong(case, name, f"the checkpoints have lost {sorted(lost)}")
        self.resumed(case, name, out)
        shutil.rmtree(out)

    def damaged(self, name, command):
        """A checkpoint of which a byte has changed, or a file is gone, is passed over for the one before."""
        out = self.folder / "damage"
        for number in range(1, 7):
            found = self.begun(name, command, out)
            if len(found) < 2:
                return self.wrong("damage", name, "there are fewer than two checkpoints")
            newest = found[-1]
            files = sorted(it for it in newest.iterdir() if it.is_file())
            file = next(it for it in files if it.name == "model.safetensors") if number == 1 else self.random.choice(files)
            all_of_them = number == 6
            how = "one byte" if number % 2 else "gone"
            for checkpoint in found if all_of_them else [newest]:
                path = checkpoint / file.name
                if how == "gone":
                    path.unlink()
                else:
                    content = bytearray(path.read_bytes())
                    content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
                    path.write_bytes(content)
            case = f"{'all checkpoints' if all_of_them else 'a checkpoint'} with {file.name}: {how}"
            if all_of_them:
                unlocked = lambda: {it: was for it, was in contents(out).items() if not it.endswith(".lock")}
                before = unlocked()
                ran = self.run(f"{name} --resume --out {out}")
                self.refused(case, name, ran, [file.name])
                if unlocked() != before:
                    now = unlocked()
                    self.wrong(case, name, f"changed: {[it for it in {*now, *before} if now.get(it) != before.get(it)]}")
            else:
                ran = self.resumed(case, name, out)
                # Without its checksums it is one of an older version.
                is_said = "skipping the checkpoint" in ran.stderr and file.name in ran.stderr
                if not is_said and not (file.name == "SHA256SUMS" and how == "gone" and "has no checksums" in ran.stderr):
                    self.wrong(case, name, f"nothing is said of it: {ran.stderr[:600]}")
                self.said.setdefault(case, {})[name] = [
                    line.replace(str(self.folder), "DIR") for line in ran.stderr.splitlines() if "skipping" in line or "has no checksums" in line
                ]
            shutil.rmtree(out)

    def clock(self, name, command):
        """The run begins ten years from now, and is resumed now; or begins now and is resumed before 1970."""
        source, shim = self.folder / "clock.c", self.folder / "clock.so"
        source.write_text(CLOCK, encoding="utf-8")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler or subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], capture_output=True).returncode:
            return self.skip("the clock: no C compiler")
        years = 365 * 86400
        far, long_ago = ({"LD_PRELOAD": str(shim), "CLOCK_S": str(at * years)} for at in (10, -80))
        for case, first, then in (("clock set back", far, {}), ("a clock before 1970", {}, long_ago)):
            out = self.folder / "clock"
            if not self.begun(name, command, out, **first):
                return
            if first:
                later = time.time() + 10 * years
                for it in [*out.rglob("*"), out]:
                    os.utime(it, (later, later))
                draft = out / "checkpoints/.step-000099.attn-tmp-left"
                draft.mkdir()
                os.utime(draft, (later, later))
            started = json.loads((out / "env.json").read_text(encoding="utf-8"))["started_utc"]
            is_later = int(started[:4]) > time.gmtime().tm_year
            if is_later != bool(first):
                self.wrong(case, name, f"the clock was not set: the run says {started}")
            self.resumed(case, name, out, env=commands.environment(**then))
            if [*out.rglob("*.attn-tmp-*")]:
                self.wrong(case, name, "what a kill left is still there")
            self.said.setdefault(case, {})[name] = [f"begun {started[:4]}, resumed to the same weights"]
            shutil.rmtree(out)

    def while_reading(self, times):
        """Model and data vanish at any moment of a command: it ends well or with an error, never in another way."""
        case, outcomes = "gone while it is read", {"ended well": 0, "refused": 0}
        model = self.folder / "vanishing"
        for _ in range(times):
            shutil.copytree(GPT2, model)
            text = self.folder / "vanishing.txt"
            shutil.copy(self.folder / "text.txt", text)
            out = self.folder / "vanishing.json"
            process = subprocess.Popen(
                [self.attn, *f"score-heads --model {model} --task {text} --split train --limit 8 --max-len 16 --out {out}".split()],
                cwd=ROOT,
                env=commands.environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            time.sleep(self.random.uniform(0, 0.6))
            for file in self.random.sample([*model.iterdir(), text], 5):
                file.unlink()
            said = process.communicate()[1]
            ran = subprocess.CompletedProcess("", process.returncode, "", said)
            if process.returncode == 0:
                outcomes["ended well"] += 1
                if digest(out) != digest(self.whole["score-heads"]) and "vanishing" not in out.read_text(encoding="utf-8"):
                    self.wrong(case, "score-heads", "another result")
            elif self.refused(case, "score-heads", ran, [model, text]):
                outcomes["refused"] += 1
            if process.returncode != 0 and out.exists():
                self.wrong(case, "score-heads", "a result is there")
            shutil.rmtree(model)
            for it in (text, *self.folder.glob("vanishing*")):
                it.unlink(missing_ok=True)
        self.said[case] = {"score-heads": outcomes}

    def hostile(self):
        """What no user means: an error in words, and no panic."""
        case, out = "hostile", self.folder / "hostile"
        out.mkdir()
        config = json.loads((GPT2 / "config.json").read_text(encoding="utf-8"))

        def model(name, **changed):
            folder = out / name
            shutil.copytree(GPT2, folder)
            (folder / "config.json").write_text(json.dumps({**config, **changed}), encoding="utf-8")
            return folder

        ids = out / "ids.json"
        rows = f"--task {self.folder}/text.txt --split train --limit 4 --max-len 16"
        empty, blank, binary, huge = out / "empty.txt", out / "blank.txt", out / "binary.txt", out / "huge.txt"
        empty.write_text("", encoding="utf-8")
        blank.write_text("\n\n \n", encoding="utf-8")
        binary.write_bytes(bytes(range(256)) * 20)
        huge.write_text("x" * 200_000, encoding="utf-8")
        emptied = model("emptied")
        (emptied / "model-00001-of-00002.safetensors").write_bytes(b"")
        no_json = model("no-json")
        (no_json / "config.json").write_text("", encoding="utf-8")
        broken_tokenizer = model("broken-tokenizer")
        (broken_tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
        header = model("header")
        (header / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 8 + b"{}")
        forward = f"forward --input-ids {ids} --out {out}/logits.safetensors"
        random_init = f"--init random {rows} --out {out}/x.json"
        # Name, ids, command; those that end well are marked.
        for name, given, command in (
            ("width of 6·2^40", None, f"eval --model {model('wide', n_embd=6 << 40)} {random_init}"),
            ("width of 6·2^28", None, f"eval --model {model('broad', n_embd=6 << 28)} {random_init}"),
            ("2^31 layers", None, f"eval --model {model('deep', n_layer=1 << 31)} {random_init}"),
            ("10^6 heads of width 0", None, f"eval --model {model('heads', n_head=10**6)} {random_init}"),
            ("no heads", None, f"eval --model {model('none', n_head=0)} {random_init}"),
            ("negative width", None, f"eval --model {model('negative', n_embd=-8)} {random_init}"),
            ("2^62 positions", None, f"eval --model {model('long', n_positions=1 << 62)} {random_init}"),
            ("vocabulary of 2^50", None, f"eval --model {model('vocabulary', vocab_size=1 << 50)} {random_init}"),
            ("vocabulary of 10", None, f"eval --model {model('few', vocab_size=10)} {random_init}"),
            ("vocabulary of another size than the weights", None, f"eval --model {model('other', vocab_size=77)} {rows} --out {out}/x.json"),
            ("weights of no bytes", None, f"eval --model {emptied} {rows} --out {out}/x.json"),
            ("weights with a header of 2^64 bytes", None, f"eval --model {header} {rows} --out {out}/x.json"),
            ("config of no bytes", None, f"eval --model {no_json} {rows} --out {out}/x.json"),
            ("tokenizer of nothing", None, f"eval --model {broken_tokenizer} {rows} --out {out}/x.json"),
            ("empty text", None, f"eval --model {GPT2} --task {empty} --split train --out {out}/x.json"),
            ("ends well: blank text", None, f"eval --model {GPT2} --task {blank} --split train --out {out}/x.json"),
            ("text of any bytes", None, f"eval --model {GPT2} --task {binary} --split train --out {out}/x.json"),
            ("ends well: a line of 200,000 bytes", None, f"eval --model {GPT2} --task {huge} --split train --max-len 16 --limit 2 --out {out}/x.json"),
            ("rows of one token", None, f"eval --model {GPT2} {rows.replace('--max-len 16', '--max-len 1')} --out {out}/x.json"),
            ("ends well: one token", '{"input_ids": [[5]]}', f"{forward} --model {GPT2}"),
            ("no token", '{"input_ids": [[]]}', f"{forward} --model {GPT2}"),
            ("no row", '{"input_ids": []}', f"{forward} --model {GPT2}"),
            ("rows of two lengths", '{"input_ids": [[1, 2], [3]]}', f"{forward} --model {GPT2}"),
            ("an id of -1", '{"input_ids": [[-1]]}', f"{forward} --model {GPT2}"),
            ("an id of 2^62", '{"input_ids": [[4611686018427387904]]}', f"{forward} --model {GPT2}"),
            ("more tokens than positions", json.dumps({"input_ids": [[1] * 5000]}), f"{forward} --model {GPT2}"),
            ("no JSON", "[[", f"{forward} --model {GPT2}"),
            ("a head that is not there", None, f"prune --model {GPT2} --heads 9-9 --out {out}/pruned"),
            ("ends well: all heads of a layer", None, f"prune --model {GPT2} --heads 0-0,0-1,0-2,0-3,0-4,0-5 --out {out}/ends-or-not"),
            ("0 key/value heads", None, f"convert --model {GPT2} --kv-heads 0 --out {out}/converted"),
            ("a seed of 2^64", None, f"eval --model {GPT2} {rows} --seed 18446744073709551616 --out {out}/x.json"),
            ("0 threads", None, f"eval --model {GPT2} {rows} --threads 0 --out {out}/x.json"),
            ("steps of -1", None, f"finetune {self.folder}/finetune.toml --set train.max_steps=-1 --out {out}/run"),
            ("batch of 0", None, f"finetune {self.folder}/finetune.toml --set train.batch_size=0 --out {out}/run"),
            ("rate of nan", None, f"finetune {self.folder}/finetune.toml --set train.lr=nan --out {out}/run"),
            ("rate of 1e300", None, f"finetune {self.folder}/finetune.toml --set train.lr=1e300 --out {out}/run"),
            ("scores that are none", None, f"plot {ids} --out {out}/x.svg"),
        ):
            ids.write_text(given or "{}", encoding="utf-8")
            try:
                # What is absurd is refused before it takes the machine's memory.
                most = 16 << 30
                ran = self.run(command, timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)))
            except subprocess.TimeoutExpired:
                self.wrong(case, name, "it takes more than a minute")
                continue
            said = ran.stderr.replace(str(self.folder), "DIR")
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            self.said.setdefault(case, {})[name] = [line for line in said.splitlines() if line.startswith(("error: ", "  caused by: ", "  hint: "))][:5]
            if name.startswith("ends well") != (ran.returncode == 0) or ran.returncode not in (0, 1, 2):
                self.wrong(case, name, f"it ends with {ran.returncode}: {said[-400:]}")
            if (ran.returncode and len(errors) != 1) or any(word in said for word in ("panicked", "fault of the program", "unwrap()")):
                self.wrong(case, name, f"no error in words: {said[-600:]}")

    def pickles(self):
        """Pickles beside weights are never opened: who opens these pipes waits for ever."""
        case, model = "pickles beside the weights", self.folder / "with-pickles"
        shutil.copytree(GPT2, model)
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "model.ckpt", "data.pkl"):
            os.mkfifo(model / name)
        rows = f"--task {self.folder}/text.txt --split train --limit 4 --max-len 16"
        for command in (
            f"eval --model {model} {rows} --out {{out}}.json",
            f"save --model {model} --dtype f16 --out {{out}}",
            f"prune --model {model} --heads 0-1 --out {{out}}",
            f"verify --model {model} --out {{out}}.json",
            f"distill {self.folder}/distill.toml --set model={model} --set tune.train.max_steps=1 --out {{out}}",
        ):
            name = command.split()[0]
            try:
                ran = self.run(command.format(out=self.folder / f"pickles-{name}"), timeout=60)
                self.said.setdefault(case, {})[name] = [f"ends with {ran.returncode}, none opened"]
                if ran.returncode != 0:
                    self.wrong(case, name, f"it ends with {ran.returncode}: {ran.stderr[-300:]}")
            except subprocess.TimeoutExpired:
                self.wrong(case, name, "it opens one")
        alone = self.folder / "only-pickles"
        alone.mkdir()
        shutil.copy(GPT2 / "config.json", alone)
        shutil.copy(GPT2 / "tokenizer.json", alone)
        os.mkfifo(alone / "pytorch_model.bin")
        try:
            ran = self.run(f"save --model {alone} --dtype f16 --out {self.folder}/none", timeout=60)
            self.refused("pickles in place of weights", "save", ran, [alone])
        except subprocess.TimeoutExpired:
            self.wrong("pickles in place of weights", "save", "it opens one")

    def downloads(self):
        files = {it.name: it.read_bytes() for it in GPT2.iterdir()}
        weights_file = "model-00001-of-00002.safetensors"
        other = lambda file, content: content[:100] + bytes([content[100] ^ 1]) + content[101:] if file == weights_file else content
        longer = lambda file, content: content + b"more" if file == weights_file else content
        page = lambda file, content: b"<html>log in</html>" if file == weights_file else content
        for case, damage, repo in (
            ("a download with one other bit", other, files),
            ("a download that is too long", longer, files),
            ("a page in place of a download", page, files),
        ):
            hub = FakeHub({"o/m": repo}, damage=damage)
            cache, out = self.folder / "hub", self.folder / "downloaded"
            env = commands.environment(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint, HF_HUB_CACHE=str(cache))
            for offline in ("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
                env.pop(offline, None)
            ran = self.run(f"save --model o/m --dtype f16 --out {out}", env=env)
            self.refused(case, "save", ran, [weights_file])
            tag = FakeHub.tag(weights_file, files[weights_file])
            if out.exists() or (cache / "models--o--m/blobs" / tag).exists():
                self.wrong(case, "save", "it is taken for whole")
            hub.damage = None
            ran = self.run(f"save --model o/m --dtype f16 --out {out}", env=env)
            if ran.returncode != 0 or digest(out / "model.safetensors") != digest(self.whole["save"] / "model.safetensors"):
                self.wrong(case, "save", f"then it does not end well: {ran.stderr[-500:]}")
            shutil.rmtree(cache)
            shutil.rmtree(out) if out.exists() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attn", default=ROOT / "target/debug/attn")
    parser.add_argument("--quick", action="store_true", help="eight commands, for CI")
    parser.add_argument("--only", default="", help="cases whose method's name contains this")
    parser.add_argument("--command", default="", help="commands whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        folder.chmod(0o755)
        trial = Trial(args, folder)
        (folder / "whole").mkdir()
        commands.prepare(trial.attn, folder)
        # A model and a teacher that may vanish.
        for name in ("mlm", "gpt2"):
            shutil.copytree(MLM if name == "mlm" else GPT2, folder / name)
        for config, of, at in (("finetune", MLM, "mlm"), ("distill", GPT2, "gpt2")):
            path = folder / f"{config}.toml"
            path.write_text(path.read_text(encoding="utf-8").replace(str(of), str(folder / at)), encoding="utf-8")
        tried = [it for it in commands.COMMANDS if args.command in it[0] and (not args.quick or it[0] in QUICK)]
        for it in tried:
            trial.undisturbed(*it)
        if "save" not in trial.whole:
            trial.undisturbed(*next(it for it in commands.COMMANDS if it[0] == "save"))
        cases = [trial.full_by_limit, trial.full_by_mount, trial.read_only_mount, trial.read_only_user]
        if os.getuid() == 0 and subprocess.run([trial.attn, "--version"], user=NOBODY, capture_output=True).returncode:
            trial.skip("folder of another user: `nobody` cannot read the program")
            cases.pop()
        for case in cases:
            for name, command, suffix in tried:
                if args.only in case.__name__ and name in trial.whole:
                    case(name, command, suffix)
        by_name = {it[0]: it[1] for it in tried}
        for name, named in (
            ("finetune", folder / "mlm"),
            ("finetune", folder / "data.csv"),
            ("distill, cached teacher", folder / "gpt2"),
            ("distill, cached teacher", folder / "text.txt"),
        ):
            if args.only in "vanished" and name in by_name:
                trial.vanished(name, by_name[name], named)
        if args.only in "damaged" and "finetune" in by_name:
            trial.damaged("finetune", by_name["finetune"])
        if args.only in "clock" and "finetune" in by_name:
            trial.clock("finetune", by_name["finetune"])
        if args.only in "while_reading" and "score-heads" in by_name:
            trial.while_reading(5 if args.quick else 30)
        if args.only in "downloads":
            trial.downloads()
        if args.only in "pickles":
            trial.pickles()
        if args.only in "hostile":
            trial.hostile()
    n = sum(len(it) for it in trial.said.values())
    seconds = round(time.monotonic() - started)
    print(f"{n} faults in {seconds} s, {len(trial.problems)} wrong, {len(trial.skipped)} skipped")
    if args.out:
        report = {"commit": commands.commit(), "said": trial.said, "wrong": trial.problems, "skipped": trial.skipped}
        text = json.dumps(report, indent=2, ensure_ascii=False).replace(str(ROOT), "REPOSITORY")
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(1 if trial.problems else 0)


main()
