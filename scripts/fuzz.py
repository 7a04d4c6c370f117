#!/usr/bin/env python3
"""Feeds the readers of files that strangers wrote with bytes that reach new code (libFuzzer, by way of cargo-fuzz), and keeps what did.

    python3 scripts/fuzz.py [--seconds 600] [--readers safetensors,parquet] [--jobs 1]

Needs a nightly toolchain and `cargo install cargo-fuzz --locked`. Corpora stand in fuzz/corpus, one file a reader, one input a line in
base64: as few as reach all the code that was reached so far. fuzz/time.json adds up the processor time that each was given. What breaks a
reader is kept under target/fuzz/broken; once it is mended, `--add FILE --readers NAME` puts it into fuzz/mended for good. `cargo test -p
attn-fuzz` runs all of them again, on stable, as CI does.
Exits with 1 where something broke.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "fuzz/corpus"
MENDED = ROOT / "fuzz/mended"
WORK = ROOT / "target/fuzz"
TIME = ROOT / "fuzz/time.json"
FREE = ["safetensors", "index", "section", "tokenizer", "tokenizer_config", "chat", "parquet", "rows", "needles"]
LINKED = ["model_config", "settings", "scores", "input", "result"]
# What a reader may hold, in MiB, beyond what the program holds itself.
MEMORY = 512
# The largest input, in bytes: what is longer says nothing new and is slow.
LONGEST = {"parquet": 16384, "tokenizer": 16384, "result": 16384}
LOCK = threading.Lock()


def packed(folder, reader):
    """The inputs of a reader in a file of base64, a line each."""
    file = folder / f"{reader}.base64"
    return [base64.b64decode(line) for line in file.read_text().splitlines()] if file.exists() else []


def pack(folder, reader, inputs):
    """Writes them, the short ones first, and says how many they are."""
    lines = {base64.b64encode(it).decode() for it in inputs if it}
    folder.mkdir(exist_ok=True)
    (folder / f"{reader}.base64").write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda it: (len(it), it))))
    return len(lines)


def unpack(reader):
    folder = WORK / "corpus" / reader
    folder.mkdir(parents=True, exist_ok=True)
    for data in packed(CORPUS, reader) + packed(MENDED, reader):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return folder


def build(linked):
    features = ["--features", "commands"] if linked else []
    target, program = WORK / "build", WORK / ("read-linked" if linked else "read")
    command = ["cargo", "+nightly", "fuzz", "build", "--fuzz-dir", "fuzz/libfuzzer", "--sanitizer", "none", "--target-dir", target, *features, "read"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        sys.exit("error: the fuzzer was not built\nhint: rustup toolchain install nightly; cargo install cargo-fuzz --locked")
    # One that runs stays as it is.
    program.unlink(missing_ok=True)
    shutil.copy(next(target.glob("*/release/read")), program)
    return program


def fuzz(reader, program, seconds):
    """Processor time, runs, and whether it broke."""
    folder, broken = unpack(reader), WORK / "broken" / reader
    broken.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ATTN_READER": reader, "RUST_BACKTRACE": "0", "OMP_NUM_THREADS": "1"}
    environment["LD_LIBRARY_PATH"] = str(ROOT / ".libtorch/lib")
    command = [
        program, folder, f"-artifact_prefix={broken}/", f"-rss_limit_mb={MEMORY + 600}",
        "-timeout=10", f"-max_len={LONGEST.get(reader, 4096)}", "-print_final_stats=1",
    ]
    log, used, runs, status = WORK / f"{reader}.log", 0, 0, 0
    # A busy machine gives less processor time than time goes by.
    while status == 0 and used < 0.98 * seconds:
        with log.open("w") as out:
            limit = f"-max_total_time={math.ceil(seconds - used)}"
            process = subprocess.Popen([*command, limit], cwd=ROOT, env=environment, stdout=out, stderr=out)
            _, status, usage = os.wait4(process.pid, 0)
        used += usage.ru_utime + usage.ru_stime
        ran = re.search(r"number_of_executed_units: (\d+)", log.read_text(errors="replace"))
        runs += int(ran[1]) if ran else 0
    return used, runs, status != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=600, help="of processor time, for each reader")
    parser.add_argument("--readers", default=",".join(FREE + LINKED))
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--add", nargs="+", type=Path, help="files that go into the corpora of --readers; nothing is run")
    args = parser.parse_args()
    readers = args.readers.split(",")
    if unknown := set(readers) - set(FREE + LINKED):
        sys.exit(f"error: no reader {', '.join(sorted(unknown))}: expected some of {', '.join(FREE + LINKED)}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if args.add:
        for reader in readers:
            added = [file.read_bytes() for file in args.add]
            print(f"{reader}: {pack(MENDED, reader, packed(MENDED, reader) + added)} inputs kept")
        return
    programs = {linked: build(linked) for linked in (False, True) if any((it in LINKED) == linked for it in readers)}

    def one(reader):
        used, runs, is_broken = fuzz(reader, programs[reader in LINKED], args.seconds)
        n_kept = pack(CORPUS, reader, minimized(reader, programs[reader in LINKED]))
        with LOCK:
            note(reader, used, runs, n_kept)
        print(f"{reader}: {used:.0f} s of processor time, {runs} runs, {n_kept} inputs kept{', BROKEN: ' + str(WORK / 'broken' / reader) if is_broken else ''}", flush=True)
        return is_broken

    with ThreadPoolExecutor(args.jobs) as pool:
        sys.exit(1 if any(list(pool.map(one, readers))) else 0)


def note(reader, used, runs, n_kept):
    """Adds up the processor time of each reader."""
    times = json.loads(TIME.read_text()) if TIME.exists() else {}
    before = times.get(reader, {"cpu_seconds": 0, "runs": 0})
    times[reader] = {"cpu_seconds": round(before["cpu_seconds"] + used), "runs": before["runs"] + runs, "inputs": n_kept}
    TIME.write_text(json.dumps(dict(sorted(times.items())), indent=2) + "\n")


def minimized(reader, program):
    """As few inputs as reach the code that all of them reach."""
    folder, small = WORK / "corpus" / reader, WORK / "small" / reader
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    environment = {**os.environ, "ATTN_READER": reader, "LD_LIBRARY_PATH": str(ROOT / ".libtorch/lib"), "OMP_NUM_THREADS": "1"}
    # Without counters: which code, and not how often.
    command = [program, "-set_cover_merge=1", "-use_counters=0", f"-rss_limit_mb={MEMORY + 600}", small, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        sys.exit(f"error: the corpus of {reader} was not minimized\n{done.stderr[-800:]}")
    return [it.read_bytes() for it in small.iterdir()]


main()
