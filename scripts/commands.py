"""Every command of `attn` that writes something, small enough to be run in a second or two: what the tests of faults and of sameness go
through. `python3 scripts/commands.py` says which commands of `attn --help` are in none."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ROOT / "results/models/wikitext-gpt2"
MLM = ROOT / "results/models/tiny-mlm"
# Only look.
WRITE_NOTHING = ("doctor", "list", "completions", "help")

FILES = {
    "finetune.toml": f"""
model = "{MLM}"
[data]
source = "{{dir}}/data.csv"
text = "text"
label = "label"
split_column = "split"
[examples]
report_limit = 40
[train]
max_steps = 6
batch_size = 8
checkpoint_every = 2
eval_every = 3
""",
    "pretrain.toml": """
objective = "causal"
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
max_steps = 6
batch_size = 8
checkpoint_every = 2
eval_every = 3
""",
    "distill.toml": f"""
model = "{GPT2}"
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
max_steps = 6
batch_size = 8
checkpoint_every = 2
""",
    "sweep.toml": """
base = "{dir}/finetune.toml"
seeds = [1]
[[run]]
name = "a"
[[run]]
name = "b"
train.lr = 1e-4
""",
    "candidates.toml": """
[[candidate]]
attention = { kind = "window", size = 4 }
""",
    "ids.json": '{"input_ids": [[5, 6, 7, 8, 9, 10]]}',
}

ROWS = "--task {dir}/text.txt --split train --limit 8 --max-len 16"
LONG = "--haystack {dir}/long.txt --split train --lengths 96 --trials 1 --depths 2 --max-new-tokens 4"

# What comes first, as other commands read it: name, command, what it writes.
MADE = [
    ("scores", f"score-heads --model {GPT2} {ROWS} --out {{dir}}/scores.json"),
    ("other", f"score-heads --model {GPT2} {ROWS} --method confidence --out {{dir}}/other.json"),
    ("swapped", f"swap --model {GPT2} --attention window --out {{dir}}/swapped"),
    ("runs", "sweep {dir}/distillations.toml --out {dir}/runs"),
    ("tuned", "sweep {dir}/sweep.toml --out {dir}/tuned"),
]
FILES["distillations.toml"] = """
base = "{dir}/distill.toml"
seeds = [1]
[[run]]
name = "near"
"""

# Name, command; `{out}` is what it writes, with the suffix that stands beside.
COMMANDS = [
    ("finetune", "finetune {dir}/finetune.toml --out {out}", ""),
    ("pretrain", "pretrain {dir}/pretrain.toml --out {out}", ""),
    ("distill", "distill {dir}/distill.toml --out {out}", ""),
    ("distill, cached teacher", "distill {dir}/distill.toml --set tune.teacher_cache={out}/teacher --out {out}", ""),
    ("sweep", "sweep {dir}/sweep.toml --out {out}", ""),
    ("eval", f"eval --model {GPT2} {ROWS} --out {{out}}", ".json"),
    ("explain", f"explain --model {{dir}}/swapped --against {GPT2} {ROWS} --prompts 2 --max-new-tokens 4 --out {{out}}", ".json"),
    (
        "leaderboard",
        f"leaderboard {{dir}}/runs --against {GPT2} --task {{dir}}/text.txt --split train --max-len 16 --rows 4 --prompts 2"
        " --blimp-pairs 0 --out {out}",
        ".csv",
    ),
    ("score-heads", f"score-heads --model {GPT2} {ROWS} --out {{out}}", ".json"),
    ("score-heads, needles", f"score-heads --model {GPT2} {LONG} --method retrieval --keep-failures --out {{out}}", ".json"),
    ("ablate", f"ablate --model {GPT2} {ROWS} --out {{out}}", ".json"),
    ("compare-scores", "compare-scores {dir}/scores.json {dir}/other.json --out {out}", ".json"),
    ("prune-curve", f"prune-curve --model {GPT2} --scores {{dir}}/scores.json {ROWS} --remove 4 --draws 20 --out {{out}}", ".json"),
    ("patch", f"patch --model {GPT2} --answer ' film' --wrong ' game' --out {{out}} 'the film' 'the game'", ".json"),
    ("prune", f"prune --model {GPT2} --heads 0-1,2-3 --out {{out}}", ""),
    ("head-roles", f"head-roles --model {GPT2} {ROWS} --out {{out}}", ".json"),
    ("attention-shift", f"attention-shift --before {GPT2} --after {{dir}}/swapped {ROWS} --out {{out}}", ".json"),
    ("needle", f"needle --model {GPT2} {LONG} --out {{out}}", ".json"),
    ("forward", f"forward --model {GPT2} --input-ids {{dir}}/ids.json --attentions --out {{out}}", ".safetensors"),
    ("heatmap", f"heatmap --model {GPT2} --text film --out {{out}}", ""),
    ("compare", "compare {dir}/tuned/a,seed=1 {dir}/tuned/b,seed=1 --format csv --out {out}", ".csv"),
    ("report", f"report {ROOT}/results/2026-11-21-mnli-kshot --out {{out}}", ".html"),
    ("plot", "plot {dir}/scores.json --out {out}", ".svg"),
    ("swap", f"swap --model {GPT2} --attention window --out {{out}}", ""),
    (
        "convert",
        f"convert --model {GPT2} --kv-heads 3 --method aligned --refit --calibration-tokens 1000 --out {{out}}",
        "",
    ),
    ("choose", f"choose {{dir}}/candidates.toml --model {GPT2} {ROWS} --budget state_bytes=50% --out {{out}}", ""),
    ("save", f"save --model {GPT2} --dtype f16 --out {{out}}", ""),
    ("verify", f"verify --model {GPT2} --out {{out}}", ".json"),
]

# Those that write on stdout alone.
SAID = [
    ("generate", f"generate --model {GPT2} --temperature 1 --top-p 0.9 --seed 3 --max-new-tokens 12 'the film'"),
    ("tokenize", f"tokenize --model {GPT2} 'the film' 'a game of two halves'"),
]


def environment(**more):
    """Nothing is fetched, and threads that wait for each other on a busy machine do not slow the tests down."""
    # With RUST_BACKTRACE an error has the whole panic above it.
    own = {name: value for name, value in os.environ.items() if name != "RUST_BACKTRACE"}
    return {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def prepare(attn, folder):
    """Puts into `folder` what the commands read. Raises where a command that makes some of it fails."""
    lines = (ROOT / "data/sample_text.txt").read_text(encoding="utf-8").splitlines()
    (folder / "text.txt").write_text("\n".join(lines[:200]) + "\n", encoding="utf-8")
    (folder / "long.txt").write_text("\n".join(lines[:3000]) + "\n", encoding="utf-8")
    rows = (ROOT / "data/sample_data.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "data.csv").write_text("".join(rows[:201] + [row for row in rows if ",validation," in row][:60]), encoding="utf-8")
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("{dir}", str(folder)), encoding="utf-8")
    for name, command in MADE:
        ran = run(attn, command.format(dir=folder))
        if ran.returncode != 0:
            raise SystemExit(f"cannot make `{name}`: {ran.stderr[-800:]}")


def kill_with_checkpoints(attn, command, out, env):
    """Kills a run that writes to `out` once it has two checkpoints."""
    process = subprocess.Popen(
        [attn, *command.split()], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        try:
            if len([*out.rglob("checkpoints/step-*")]) >= 2:
                break
        except FileNotFoundError:
            pass  # A draft that was there as its folder was read.
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def commit():
    """Of the repository; `-dirty` where something has changed since."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run(attn, command, **how):
    how = {"env": environment(), "timeout": 300, **how}
    return subprocess.run([attn, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, **how)


def main():
    attn = sys.argv[1] if len(sys.argv) > 1 else ROOT / "target/debug/attn"
    text = run(attn, "--help").stdout.split("Commands:")[1].split("Options:")[0]
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].strip()}
    missing = listed - set(WRITE_NOTHING) - {it[1].split()[0] for it in [*COMMANDS, *SAID]}
    print(f"in none: {sorted(missing)}")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
