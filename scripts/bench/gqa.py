"""What users run instead, for scripts/bench_gqa.sh; not to be run by hand.

    gqa.py FOLDER THREADS

As theirs.py: a JSON line when ready, then as many tokens as each line of stdin asks for.
"""

import json
import os
import sys

import torch
import transformers

transformers.utils.logging.set_verbosity_error()
ROWS, TOKENS, CHUNK = 8, 4096, 512


def next_order(answer: dict) -> int:
    print(json.dumps(answer), flush=True)
    line = sys.stdin.readline()
    if not line.strip():
        os._exit(0)
    return int(line)


@torch.no_grad()
def main(folder: str, threads: int):
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = (torch.arange(ROWS * TOKENS) % (model.config.vocab_size - 7)).view(ROWS, TOKENS)
    cache = transformers.DynamicCache()

    def step(ids):
        return model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)

    for at in range(0, TOKENS, CHUNK):
        found = step(ids[:, at : at + CHUNK])
    answer = {"first": found[0, 0].item()}
    while True:
        for _ in range(next_order(answer)):
            found = step(found)
        answer = {"last": found[0, 0].item()}


main(sys.argv[1], int(sys.argv[2]))
