#!/usr/bin/env python3
"""Feeds the readers of files that strangers wrote with bytes that reach new code (libFuzzer, by way of cargo-fuzz), and keeps what did.

    python3 scripts/fuzz.py [--seconds 600] [--readers safetensors,parquet] [--jobs 1]

Needs a nightly toolchain and `cargo install cargo-fuzz --locked`. Corpora stand in fuzz/corpus, one file a reader, one input a line in
base64; fuzz/time.json adds up the processor time that each was given. What breaks a reader is kept under target/fuzz/broken; once it is
mended, `--add FILE --readers NAME` puts it into the corpus. `cargo test -p attn-fuzz` runs all of them again, on stable, as CI does.
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
WORK = ROOT / "target/fuzz"
TIME = ROOT / "fuzz/time.json"
FREE = ["safetensors", "index", "section", "tokenizer", "tokenizer_config", "chat", "parquet", "rows", "needles"]
LINKED = ["model_config", "settings", "scores", "input", "result"]
# What a reader may hold, in MiB, beyond what the program holds itself.
MEMORY = 512
# The largest input, in bytes: what is longer says nothing new and is slow.
LONGEST = {"parquet": 16384, "tokenizer": 16384, "result": 16384}
MOST_KEPT = 250
KEPT_BYTES = 250_000
LOCK = threading.Lock()


def unpack(reader):
    folder = WORK / "corpus" / reader
    folder.mkdir(parents=True, exist_ok=True)
    packed = CORPUS / f"{reader}.base64"
    for line in packed.read_text().splitlines() if packed.exists() else []:
        data = base64.b64decode(line)
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    return folder


def pack(reader, folder, all_of_them=False):
    """What was kept before, and the smallest of the other inputs up to a bound on number and size, or all of them."""
    packed = CORPUS / f"{reader}.base64"
    before = packed.read_text().splitlines() if packed.exists() else []
    kept, size = dict.fromkeys(before), sum(map(len, before))
    for file in sorted(folder.iterdir(), key=lambda it: (it.stat().st_size, it.name)):
        line = base64.b64encode(file.read_bytes()).decode()
        if line in kept or not line:
            continue
        if not all_of_them and (len(kept) >= MOST_KEPT or size + len(line) > KEPT_BYTES):
            break
        kept[line], size = None, size + len(line)
    CORPUS.mkdir(exist_ok=True)
    packed.write_text("".join(f"{line}\n" for line in sorted(kept, key=lambda it: (len(it), it))))
    return len(kept)


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
            folder = WORK / "added" / reader
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file in args.add:
                (folder / hashlib.sha1(file.read_bytes()).hexdigest()).write_bytes(file.read_bytes())
            print(f"{reader}: {pack(reader, folder, all_of_them=True)} inputs kept")
        return
    programs = {linked: build(linked) for linked in (False, True) if any((it in LINKED) == linked for it in readers)}

    def one(reader):
        used, runs, is_broken = fuzz(reader, programs[reader in LINKED], args.seconds)
        n_kept = pack(reader, minimized(reader, programs[reader in LINKED]))
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
    """As few inputs as reach what all of them reach."""
    folder, small = WORK / "corpus" / reader, WORK / "small" / reader
    subprocess.run(["rm", "-rf", small], check=True)
    small.mkdir(parents=True)
    environment = {**os.environ, "ATTN_READER": reader, "LD_LIBRARY_PATH": str(ROOT / ".libtorch/lib"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([program, "-merge=1", "-rss_limit_mb=2000", small, folder], env=environment, capture_output=True)
    return small if done.returncode == 0 else folder


main()
