#!/usr/bin/env python3
"""The table of a folder of scripts/gqa_experiment.sh: mean and standard deviation over draws of the text that was read, and the interval of
the first draw over the blocks that models were compared on. Then each method against the mean of neighbours: how many times nearer, and the
difference, paired by draw (95 % by Student's t) and, where the files have it, by block (the first draw's).

    python3 scripts/gqa_table.py OUT
"""

import json
import statistics
import sys
from pathlib import Path


def name(method) -> str:
    return method if isinstance(method, str) else next(iter(method))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    files = sorted(Path(sys.argv[1]).glob("*-[0-9].json"))
    if not files:
        sys.exit(f"error: there is no N-SEED.json in `{sys.argv[1]}`")
    by_number: dict[int, list[dict]] = {}
    for file in files:
        by_number.setdefault(int(file.stem.split("-")[0]), []).append(json.loads(file.read_text()))
    print("| heads | cache | method | KL, nats a token | refitted | perplexity | refitted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for number, runs in sorted(by_number.items(), reverse=True):
        first = runs[0]
        share = first["cache_bytes_per_token_after"] / first["cache_bytes_per_token_before"]
        changed = sorted({first["kv_heads_before"][one["layer"]] for one in first["merged"]})
        heads = f"{', '.join(map(str, changed))} → {number}"
        print(f"| {heads} | {share:.3g} | none | 0 | | {first['measured']['perplexity_before']:.2f} | |")
        for method in dict.fromkeys(name(one["method"]) for one in first["compared"]):
            cells = []
            for field in ("kl_nats_per_token", "perplexity"):
                for refit in (False, True):
                    ones = [
                        next(one for one in run["compared"] if name(one["method"]) == method and one["refit"] == refit)
                        for run in runs
                    ]
                    values = [one[field] for one in ones]
                    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                    if field == "perplexity":
                        cells.append(f"{statistics.mean(values):.2f}")
                        continue
                    low, high = (ones[0]["kl_interval_95"][end] for end in ("low", "high"))
                    cells.append(f"{statistics.mean(values):.4f}{spread} ({low:.4f} to {high:.4f})")
            print(f"| {heads} | {share:.3g} | {method} | {' | '.join(cells)} |")
    print()
    print("| heads | method | refitted | times nearer than mean | KL over mean's, by draw | by block |")
    print("| --- | --- | --- | --- | --- | --- |")
    for number, runs in sorted(by_number.items(), reverse=True):
        of = {
            (name(one["method"]), one["refit"]): [
                next(it for it in run["compared"] if (it["method"], it["refit"]) == (one["method"], one["refit"])) for run in runs
            ]
            for one in runs[0]["compared"]
            if name(one["method"]) != "random"
        }
        for (method, refit), ones in of.items():
            means = of["mean", refit]
            if method == "mean" or not any(one["kl_nats_per_token"] > 1e-9 for one in means):
                continue
            apart = [one["kl_nats_per_token"] - mean["kl_nats_per_token"] for one, mean in zip(ones, means)]
            times = statistics.mean(it["kl_nats_per_token"] for it in means) / statistics.mean(
                it["kl_nats_per_token"] for it in ones
            )
            center, n = statistics.mean(apart), len(apart)
            # Of n − 1 degrees of freedom, n from 2 to 5.
            half = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(n)
            reach = half * statistics.stdev(apart) / n**0.5 if half else None
            by_draw = "" if reach is None else f" ({center - reach:.4f} to {center + reach:.4f})"
            block = ones[0].get("kl_over_mean_interval_95")
            by_block = f"{ones[0]['kl_over_mean']:.4f} ({block['low']:.4f} to {block['high']:.4f})" if block else ""
            print(
                f"| {number} | {method} | {'yes' if refit else 'no'} | {times:.2f} | {center:.4f}{by_draw} | {by_block} |"
            )


if __name__ == "__main__":
    main()
