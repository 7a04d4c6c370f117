#!/usr/bin/env python3
"""Holds what `attn score-heads --method michel` wrote of a classifier against the same gradients in transformers.

    attn score-heads --model DIR --task data.csv --out heads.json ...
    python scripts/compare_head_scores.py DIR data.csv TEXT_COLUMN LABEL_COLUMN heads.json

A CSV's labels are the numbers of the classes. The head's output is what enters the output projection (a hook on its
input); of each row |sum over tokens of z · dL/dz|, mean over rows, one row at a time. Prints the largest relative
difference and both times; exits with 1 above 1e-3.
"""

import argparse
import csv
import json
import sys
import time

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def output_projections(model):
    """The module that each layer's heads go into, in the order of the layers."""
    names = {"gpt2": "attn.c_proj", "distilbert": "attention.out_lin", "bert": "attention.output.dense", "llama": "self_attn.o_proj"}
    end = names[model.config.model_type]
    return [module for name, module in model.named_modules() if name.endswith(end)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["model", "data", "text", "label", "scores"]:
        parser.add_argument(name)
    parser.add_argument("--max-len", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with open(args.scores, encoding="utf-8") as file:
        found = json.load(file)
    expected = torch.tensor(found["scores"], dtype=torch.float64)
    with open(args.data, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: found["limit"]]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that every z has a gradient
    kept = []

    def keep(module, inputs):
        inputs[0].retain_grad()
        kept.append(inputs[0])

    for module in output_projections(model):
        module.register_forward_pre_hook(keep)
    n_heads = expected.shape[1]
    start = time.perf_counter()
    total = torch.zeros_like(expected)
    for row in rows:
        kept.clear()
        inputs = tokenizer(row[args.text], return_tensors="pt", truncation=True, max_length=args.max_len or found["max_len"])
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([int(row[args.label])])).backward()
        for layer, z in enumerate(kept):
            products = (z * z.grad).double().view(-1, n_heads, z.shape[-1] // n_heads)  # [tokens, heads, head_dim]
            total[layer] += products.sum(dim=(0, 2)).abs()
    seconds = time.perf_counter() - start
    scores = total / len(rows)
    difference = ((scores - expected).abs() / scores).max().item()
    print(f"{len(rows)} rows, {scores.numel()} heads: largest relative difference {difference:.1e}, {seconds:.1f} s here")
    if found["n_rows"] != len(rows) or not difference < 1e-3:
        sys.exit("error: the scores differ")


if __name__ == "__main__":
    main()
