#!/usr/bin/env python3
"""Figures in documents, from the files that they come from.

    python3 scripts/figures.py            # fails where a document says otherwise than its file, and says where
    python3 scripts/figures.py --write    # writes them anew

A figure stands between two comments, the first of which names its file, from the top of the repository, and how it reads:

    <!--fig results/X/summary.json: {before.accuracy:%1} → **{after.accuracy:%1} %**-->50.0 → **96.8 %**<!--/fig-->

`{a.b:3}` is the field `b` of `a` with three decimals, `{a:%1}` a hundred times it with one, `{a}` it as it is. `{a:+3}` has a sign
before what is positive too, `{a:e0}` is 1e-4, and `{a/60:0}` a sixtieth of it. `list[2]` is an element of a list by its place, `list[NAME]` the
one whose `name` (or `kind`) is NAME, `list[a=1,b=x/y]` the first with 1 in its field `a` and the list `x`, `y` in `b`; `a[KEY]` the field of an
object whose name has a dot. `{mean(a.b):3}` is the mean of all numbers of a list, of lists in it too; `max`, `min` and `sum` likewise. `list.a` is
the list of the fields `a` of its elements.

No line begins with such a comment: to Markdown that ends the paragraph.

A folder of `results/` with a `summary.json` or a `sweep.json` that results/README.md names in its table must have a figure of its files there.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURE = re.compile(r"<!--fig ([^\s:]+): (.*?)-->(.*?)<!--/fig-->", re.DOTALL)
FIELD = re.compile(r"\{([^{}:]+?)(?:/(\d+))?(?::(\+?)([%e]?)(\d))?\}")
OVER = re.compile(r"(mean|max|min|sum)\((.*)\)")
STEP = re.compile(r"([^.\[\]]+)|\[([^\]]+)\]")


def matches(element, conditions):
    """Whether an element of a list has these values, given as `a=1,b=x/y`."""
    for condition in conditions.split(","):
        field, _, wanted = condition.partition("=")
        if not wanted or field not in element:
            return False
        found = element[field]
        if "/".join(map(str, found if isinstance(found, list) else [found])) != wanted:
            return False
    return True


def element(value, key):
    """The element of a list, or the field of an object, that `[key]` names."""
    if isinstance(value, dict):
        return value[key]
    if key.isdigit():
        return value[int(key)]
    named = [it for it in value if key in (it.get("name"), it.get("kind"))]
    return named[0] if named else next(it for it in value if matches(it, key))


def look_up(value, path):
    """What stands at `a.b[NAME].c`."""
    for name, key in STEP.findall(path):
        if name and isinstance(value, list):
            value = [it[name] for it in value]
        else:
            value = value[name] if name else element(value, key)
    return value


def numbers(value):
    """All numbers of a list, or of lists in it."""
    return [number for it in value for number in numbers(it)] if isinstance(value, list) else [value]


def over(name, values):
    return sum(values) / len(values) if name == "mean" else {"max": max, "min": min, "sum": sum}[name](values)


def render(path, template):
    data = json.loads((ROOT / path).read_text(encoding="utf-8"))

    def one(match):
        field, divisor, sign, scale, decimals = match.groups()
        named = OVER.fullmatch(field)
        value = over(named[1], numbers(look_up(data, named[2]))) if named else look_up(data, field)
        value = value / int(divisor) if divisor else value
        if decimals is None:
            return str(value)
        if scale == "e":
            digits, exponent = f"{value:{sign}.{decimals}e}".split("e")
            return digits.replace("-", "−") + f"e{int(exponent)}"
        return f"{value * (100 if scale else 1):{sign},.{decimals}f}".replace("-", "−")

    return FIELD.sub(one, template)


def documents():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listed.stdout.splitlines()]


def without_figure(text):
    """Rows of the table whose folder has a summary or a sweep, and no figure of it."""
    for line in text.splitlines():
        named = re.match(r"\| \[[^\]]+\]\(([^)]+?)/?\)", line)
        if not named or f"<!--fig results/{named[1]}/" in line:
            continue
        if any((ROOT / "results" / named[1] / name).exists() for name in ("summary.json", "sweep.json")):
            yield named[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write figures anew in place of checking them")
    args = parser.parse_args()
    wrong, n_figures = [], 0
    for document in documents():
        text = document.read_text(encoding="utf-8")
        name = document.relative_to(ROOT)

        def anew(match):
            nonlocal n_figures
            n_figures += 1
            path, template, found = match.groups()
            try:
                expected = render(path, template)
            except (OSError, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
                wrong.append(f"{name}: `{path}`, {template}: {type(error).__name__} {error}")
                return match[0]
            if found != expected and not args.write:
                wrong.append(f"{name}: says `{found}`, and {path} `{expected}`")
            return f"<!--fig {path}: {template}-->{expected}<!--/fig-->"

        wrong += [
            f"{name}:{at}: a line that begins with a comment ends the paragraph; put a word before it"
            for at, line in enumerate(text.splitlines(), 1)
            if re.match(r" {0,3}<!--fig ", line)
        ]
        changed = FIGURE.sub(anew, text)
        if args.write and changed != text:
            document.write_text(changed, encoding="utf-8")
        if name == Path("results/README.md"):
            wrong += [f"{name}: the row of {folder} has no figure of its files" for folder in without_figure(text)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        print("hint: scripts/figures.py --write, then look at what changed", file=sys.stderr)
        sys.exit(1)
    print(f"{n_figures} figures are those of their files")


main()
