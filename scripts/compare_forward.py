#!/usr/bin/env python3
"""Compares what `attn forward` computed with what transformers computes from the same model and the same ids.

    python3 -m venv /path/to/venv
    /path/to/venv/bin/pip install torch==2.11.0 transformers==5.23.0
    cargo run -p attn-cli -- forward --model DIR --input-ids IDS.json --hidden-states --attentions --out OUT.safetensors
    /path/to/venv/bin/python scripts/compare_forward.py --model DIR --input-ids IDS.json --ours OUT.safetensors

IDS.json is `{"input_ids": [[..]], "attention_mask": [[..]], "position_ids": [[..]], "token_type_ids": [[..]]}`, all but the
first optional.
Transformers runs in f32 with eager attention. Prints one line per tensor of OUT.safetensors (`logits`,
`hidden_states.{i}`, `attentions.{layer}`) with its relative rms, `rms(ours - theirs) / rms(theirs)`, over real
tokens: what stands at padding is unspecified. Exit code 0 if all are within the tolerance, 1 otherwise, 2 where there
is nothing to compare: wrong usage, and a folder whose attention was changed, for which transformers has no model.

Without `position_ids`, `attn` counts real tokens where transformers, left to itself, counts places; transformers is
therefore handed the counted positions. `--positions arange` compares with its bare forward instead; give the same
option to `attn forward`. A BERT or DistilBERT classifier pools the first place in transformers, padding or not: pad
on the right to compare one.
"""

import argparse
import json
import sys
from pathlib import Path


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read `{path}`: {getattr(error, 'strerror', None) or 'it is no text'}")
    except json.JSONDecodeError as error:
        fail(f"`{path}` is not JSON: {error}")
    if not isinstance(value, dict):
        fail(f"`{path}` holds no JSON object")
    return value


def read_config(folder: Path) -> dict:
    """The folder's config.json, of a model that transformers has."""
    if not folder.is_dir():
        fail(f"there is no folder `{folder}`")
    if not (folder / "config.json").is_file():
        inner = folder / "model"
        hint = f"; the model is in `{inner}`" if (inner / "config.json").is_file() else ""
        fail(f"`{folder}` is no model folder, it has no config.json{hint}")
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type"))
    if kind.startswith("attn_"):
        fail(f"`{folder}` is of type `{kind}`: its attention was changed, and transformers has no such model")
    return config


def read_ids(path: Path, vocab_size: int | None) -> dict:
    given = read_json(path)
    if unknown := set(given) - {"input_ids", "attention_mask", "position_ids", "token_type_ids"}:
        fail(f"`{path}` holds {sorted(unknown)}, expected `input_ids`, `attention_mask`, `position_ids`, `token_type_ids`")
    rows = given.get("input_ids")
    is_matrix = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
    if not is_matrix or not all(isinstance(id_, int) for row in rows for id_ in row):
        fail(f"`{path}` has no `input_ids` of the form [[5, 6, 7], ...]")
    if len({len(row) for row in rows}) > 1:
        fail(f"`{path}`: the rows of `input_ids` have different lengths")
    highest = max(max(row) for row in rows)
    if vocab_size is not None and highest >= vocab_size:
        fail(f"`{path}` holds the id {highest}, and the model has ids from 0 to {vocab_size - 1}: other model's ids?")
    return given


def load(folder: Path):
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or ["AutoModel"]
    return (
        getattr(transformers, names[0]).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )


def to_inputs(given: dict, positions: str) -> "dict[str, torch.Tensor]":
    inputs = {key: torch.tensor(value) for key, value in given.items() if value is not None}
    # Always there: positions without a mask make transformers look for several texts in one row.
    mask = inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if positions == "count":
        inputs.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp(min=0))
    return inputs


def run(model, inputs: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    values = {} if "logits" not in out else {"logits": out.logits}
    values |= {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
    return values | {f"attentions.{layer}": weights for layer, weights in enumerate(out.attentions)}


def at_real_tokens(name: str, value: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
    if name.startswith("attentions"):
        return value.transpose(1, 2)[mask == 1]  # [real queries, n_heads, k]
    return value[mask == 1] if value.dim() == 3 else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument(
        "--input-ids", type=Path, required=True, metavar="IDS.json", help="what `attn forward` was given"
    )
    parser.add_argument("--ours", type=Path, required=True, metavar="OUT.safetensors", help="what `attn forward` wrote")
    parser.add_argument("--positions", choices=["count", "arange"], default="count", help="where none are given")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative rms (default: %(default)s)")
    args = parser.parse_args()

    config = read_config(args.model)
    given = read_ids(args.input_ids, config.get("vocab_size"))
    if not args.ours.is_file():
        fail(f"there is no file `{args.ours}`")
    # After what can be wrong without them: they take seconds.
    global torch, transformers
    try:
        import torch
        import transformers
        from safetensors.torch import load_file
    except ImportError as error:
        fail(f"{error}; this script needs torch, transformers and safetensors, see --help")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    inputs = to_inputs(given, args.positions)
    theirs = run(load(args.model), inputs)
    # Our heads go by their numbers, theirs by their places.
    for layer, order in enumerate(config.get("attn_head_order") or []):
        weights = theirs[f"attentions.{layer}"]
        theirs[f"attentions.{layer}"] = weights[:, torch.tensor(order).argsort()]
    try:
        ours = load_file(args.ours)
    except Exception as error:  # Whatever safetensors finds wrong with a file.
        fail(f"`{args.ours}` cannot be read as safetensors: {error}")
    if not ours:
        fail(f"`{args.ours}` holds no tensor")
    if "logits" in ours and "logits" in theirs and ours["logits"].shape != theirs["logits"].shape:
        shapes = [list(values["logits"].shape) for values in (ours, theirs)]
        fail(f"`logits` is {shapes[0]} in `{args.ours}` and {shapes[1]} by transformers: other ids or another model")

    n_bad = 0
    print(f"{'tensor':20} {'shape':22} {'relative rms':>12}")
    # By number, not by text: hidden_states.10 comes after hidden_states.9.
    for name in sorted(ours, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")]):
        shape = str(list(ours[name].shape))
        if name not in theirs or theirs[name].shape != ours[name].shape:
            expected = list(theirs[name].shape) if name in theirs else "no such tensor"
            print(f"{name:20} {shape:22} transformers: {expected}")
            n_bad += 1
            continue
        a, b = (at_real_tokens(name, value, inputs["attention_mask"]).double() for value in (ours[name], theirs[name]))
        error = ((a - b).square().mean().sqrt() / b.square().mean().sqrt()).item()
        bad = not error <= args.tolerance  # A NaN is bad too.
        n_bad += bad
        print(f"{name:20} {shape:22} {error:12.2e}{'  above the tolerance' if bad else ''}")
    print(
        f"transformers {transformers.__version__}, tolerance {args.tolerance:g}: {n_bad} of {len(ours)} tensors differ"
    )
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
