#!/usr/bin/env python3
"""Reads a folder of runs into data frames, with pandas and pyarrow alone, and prints a table.

    python scripts/read_results.py results

A run is a folder with a `summary.json`, however deep. results/SCHEMA.md says what the fields mean.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet

SCHEMA = 1


def _check(path, version):
    if version > SCHEMA:
        raise ValueError(f"`{path}` has schema {version}, expected at most {SCHEMA}: this script is older than the file")


def _json(path):
    """An object of a version that is understood."""
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    _check(path, found.get("schema", 0))
    return found


def folders(root):
    """The folders of all finished runs below `root`."""
    return sorted(path.parent for path in Path(root).rglob("summary.json"))


def _name(folder, root):
    return folder.relative_to(root).as_posix() if folder != Path(root) else folder.name


def runs(root):
    """A row a run: the fields of `summary.json` and, as `env.*`, of `env.json`; nested ones with dots."""
    rows = []
    for folder in folders(root):
        row = {"run": _name(folder, root), **_json(folder / "summary.json")}
        if (folder / "env.json").is_file():
            row["env"] = _json(folder / "env.json")
        rows.append(row)
    return pd.json_normalize(rows)


def _lines(root, name):
    frames = []
    for folder in folders(root):
        path = folder / name
        if path.is_file() and path.stat().st_size > 0:
            # Blocks larger than the file, so that types are inferred from all of it.
            options = pyarrow.json.ReadOptions(block_size=path.stat().st_size + 1)
            frame = pyarrow.json.read_json(path, read_options=options).to_pandas()
            frame.insert(0, "run", _name(folder, root))
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def metrics(root):
    """A row a line of `metrics.jsonl`: run, step, metric, value, unit, seed."""
    return _lines(root, "metrics.jsonl")


def predictions(root):
    """A row a line of `predictions.jsonl`: run, index, label, predicted, probabilities, text."""
    return _lines(root, "predictions.jsonl")


def sweeps(root):
    """A row a run of a sweep, from `sweep.json`: sweep, setting, seed, accuracy before and after (of distillations the
    distance to the teacher), what was set."""
    rows = []
    for path in sorted(Path(root).rglob("sweep.json")):
        for setting in _json(path)["settings"]:
            head = {"sweep": _name(path.parent, root), "setting": setting["name"]}
            rows += [{**head, **run, **setting["set"]} for run in setting["runs"]]
    return pd.DataFrame(rows)


def spread(root):
    """A row a setting of a sweep: seeds, then mean and standard deviation over them of the accuracy in percent, or of the KL
    to the teacher in nats per token."""
    found = sweeps(root)
    if found.empty:
        return pd.DataFrame()
    groups = found.groupby(["sweep", "setting"], sort=False)
    columns = {"seeds": groups["seed"].count()}
    for when in ["before", "after"]:
        if when not in found:
            continue
        columns[f"{when} %"] = (100 * groups[when].mean()).round(1)
        columns[f"{when} std"] = (100 * groups[when].std()).round(1)
    for when in ["kl_at_swap", "kl"]:
        if when in found:
            columns[f"{when} nats"] = groups[when].mean().round(4)
            columns[f"{when} std"] = groups[when].std().round(4)
    return pd.DataFrame(columns)


def leaderboard(path):
    """A row a model, of what `attn leaderboard` wrote: the teacher, then each student, nearest first."""
    found = pd.read_csv(path)
    if "kl" not in found:  # Of an earlier program.
        found["kl"] = found["kl_after_tune"].fillna(found["kl_after_transfer"]).fillna(found["kl_at_swap"])
    return found.sort_values("kl", na_position="first", ignore_index=True)


def attention(path):
    """A row a query: `row`, `layer`, `head`, `query` and `weights`, of a file of `attn forward --attention-table`."""
    found = pyarrow.ipc.open_file(path).read_all()
    _check(path, int(found.schema.metadata[b"schema"]))
    return found.to_pandas()


def scores(path):
    """A row a head: `layer`, `head`, `score`, `low` and `high`, of what `attn score-heads` wrote, JSON or parquet."""
    if Path(path).suffix == ".parquet":
        found = pyarrow.parquet.read_table(path)
        _check(path, int(found.schema.metadata[b"schema"]))
        return found.to_pandas()
    found = _json(path)
    none = [[{"low": None, "high": None} for _ in layer] for layer in found["heads"]]
    intervals = found["interval_95"] or none
    rows = [
        {"layer": layer, "head": head, "score": score, **interval}
        for layer, columns in enumerate(zip(found["heads"], found["scores"], intervals))
        for head, score, interval in zip(*columns)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "score", "low", "high"])


def table(root):
    """A row a run: accuracy before and after in percent, or loss in nats per token, and seconds."""
    found = runs(root)
    columns = {
        "run": "run",
        "source": "data",
        "seed": "seed",
        "before.accuracy": "before %",
        "after.accuracy": "after %",
        "after.interval_95.low": "low %",
        "after.interval_95.high": "high %",
        "before.loss_nats_per_token": "before nats",
        "after.loss_nats_per_token": "after nats",
        "elapsed_s": "seconds",
    }
    shown = found[[column for column in columns if column in found]].rename(columns=columns)
    percent = [column for column in shown if column.endswith("%")]
    shown[percent] = (100 * shown[percent]).round(1)
    return shown.dropna(axis="columns", how="all").round(3)


def main():
    parser = argparse.ArgumentParser(description="Prints a table of the runs in a folder.")
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    if not folders(root) and sweeps(root).empty:
        sys.exit(f"error: no run below `{root}` has finished: there is no `summary.json`")
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_rows", None):
        if folders(root):
            print(table(root).to_string(index=False, na_rep=""))
        if not sweeps(root).empty:
            print()
            print(spread(root).to_string(na_rep=""))


if __name__ == "__main__":
    main()
