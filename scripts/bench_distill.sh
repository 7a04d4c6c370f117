#!/usr/bin/env bash
# Times a step of distillation, GPT-2 124M as its own teacher, against two models of transformers with whole logits, both
# sides in turns, and writes what it found: the section `distill` of scripts/bench_finetune.sh.
#
# Usage: scripts/bench_distill.sh --python PYTHON [--threads N] [--rounds N] [--out DIR]
#   as scripts/bench_finetune.sh; DIR is runs/bench-distill
exec "$(dirname "${BASH_SOURCE[0]}")/bench_finetune.sh" --section distill --out runs/bench-distill "$@"
