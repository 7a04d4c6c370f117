#!/usr/bin/env python3
"""Slides from a Markdown document, as one HTML file that opens from disk.

    python3 scripts/slides.py docs/report.md --out slides.html
    python3 scripts/slides.py --check docs/report.md     # writes nothing; fails where a slide is empty or would not fit

A comment on a line of its own starts a slide, with what follows it: paragraphs, lists, tables, a picture. The slide ends with the
next one, with the next heading, or where `/slide` stands:

    <!-- slide: Short title -->
    What to show.
    <!-- /slide -->

Pictures become part of the file. Links on the web stay links; those to other files become text, as a copied page has no files beside
it. Keys: arrows, page up and down, space, Home, End. Printed, it has one slide a page. What Markdown the document uses beyond headings,
paragraphs, bold, italic, code, `$...$` (shown as typed), links, lists, tables and pictures is an error.
"""

import argparse
import base64
import html
import math
import re
import sys
from pathlib import Path

MOST_WORDS = 110
MOST_ROWS = 9
MOST_LINES = 16.5  # below the title, measured in Chromium at 1280 by 720
LINE = 96  # characters in one of them
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}

INLINE = re.compile(
    r"(?P<code>`[^`]+`)|(?P<math>\$[^$\s][^$]*\$)|\*\*(?P<bold>.+?)\*\*|\*(?P<italic>[^*\s][^*]*)\*"
    r"|(?<!!)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<target>[^()\s]+)\)|<(?P<address>https?://[^<>\s]+)>"
)
LEFT_OVER = re.compile(r"\*|`|~~|!\[|\]\(|\]\[|\[\^|\\|</?[A-Za-z!]|&#?\w+;|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)")


class Failure(Exception):
    """What is wrong, and in which line."""

    def __init__(self, line, what):
        super().__init__(what)
        self.line, self.what = line, what


class Slide:
    def __init__(self, line, title, section):
        self.line, self.title, self.section = line, title, section
        self.blocks = []


# Inline text


def plain(text, line):
    """A piece without markup, escaped."""
    found = LEFT_OVER.search(text)
    if found:
        raise Failure(line, f"cannot read `{found[0]}` in `{text.strip()[:60]}`")
    return html.escape(text, quote=False)


def inline(text, line):
    out, at = [], 0
    for match in INLINE.finditer(text):
        out.append(plain(text[at : match.start()], line))
        at = match.end()
        if match["code"]:
            out.append(f"<code>{html.escape(match['code'][1:-1], quote=False)}</code>")
        elif match["math"]:
            out.append(f'<span class="math">{html.escape(match["math"], quote=False)}</span>')
        elif match["bold"]:
            out.append(f"<strong>{inline(match['bold'], line)}</strong>")
        elif match["italic"]:
            out.append(f"<em>{inline(match['italic'], line)}</em>")
        elif match["address"]:
            address = html.escape(match["address"])
            out.append(f'<a href="{address}">{address}</a>')
        elif re.match(r"https?://", match["target"]):
            out.append(f'<a href="{html.escape(match["target"])}">{inline(match["text"], line)}</a>')
        elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", match["target"]):
            raise Failure(line, f"a link to `{match['target']}` is neither on the web nor a file")
        else:
            out.append(inline(match["text"], line))
    out.append(plain(text[at:], line))
    return "".join(out)


def bare(markup):
    """The text of some markup, as it is read."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def n_words(text):
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


# Blocks


def cells(row, line):
    row = row.strip()
    if not (row.startswith("|") and row.endswith("|") and len(row) > 1):
        raise Failure(line, "a row of a table starts and ends with `|`")
    # A bar in code stays.
    parts = re.findall(r"((?:`[^`]*`|[^|`])*)\|", row[1:])
    return [part.strip() for part in parts]


def read_table(rows):
    line = rows[0][0]
    if len(rows) < 3:
        raise Failure(line, "a table needs a header, a line of dashes and a row")
    head = cells(rows[0][1], line)
    if not all(re.fullmatch(r":?-+:?", cell) for cell in cells(rows[1][1], rows[1][0])):
        raise Failure(rows[1][0], "the second line of a table is of dashes")
    table = []
    for number, row in rows[2:]:
        found = cells(row, number)
        if len(found) != len(head):
            raise Failure(number, f"this row has {len(found)} cells, the header {len(head)}")
        table.append([inline(cell, number) for cell in found])
    return {"kind": "table", "line": line, "head": [inline(cell, line) for cell in head], "rows": table}


def read_list(lines, marker):
    items = []
    for number, text in lines:
        found = re.match(marker, text)
        if found:
            items.append((number, text[found.end() :]))
        elif re.match(r" +([-*+]|\d+[.)]) ", text):
            raise Failure(number, "a list within a list is not read")
        else:
            items[-1] = (items[-1][0], f"{items[-1][1]} {text.strip()}")
    return [inline(text, number) for number, text in items]


def read_block(lines):
    """A run of lines between empty ones, which is one or more blocks."""
    while lines:
        number, first = lines[0]
        if first.startswith("|"):
            n = next((i for i, (_, text) in enumerate(lines) if not text.startswith("|")), len(lines))
            yield read_table(lines[:n])
        elif re.match(r"(- |\d+\. )", first):
            ordered = first[0] != "-"
            marker = r"\d+\. " if ordered else r"- "
            n = len(lines)
            yield {"kind": "ol" if ordered else "ul", "line": number, "items": read_list(lines, marker)}
        elif re.match(r"!\[", first):
            found = re.fullmatch(r"!\[([^\]]*)\]\(([^()\s]+)\)", first.strip())
            if not found:
                raise Failure(number, "a picture stands alone in its line: `![what it shows](file)`")
            n = 1
            yield {"kind": "picture", "line": number, "alt": found[1], "file": found[2]}
        else:
            for at, text in lines:
                if re.match(r"(```|~~~|>|    |\t|<|[*+] |#|={3,}$|-{3,}$|\[\^)", text) and not re.match(r"<https?://", text):
                    raise Failure(at, f"cannot read `{text.strip()[:40]}`: no heading, paragraph, list, table or picture")
                if at != number and re.match(r"(- |\d+\. |\||!\[)", text):
                    raise Failure(at, "an empty line is missing before this one")
            n = len(lines)
            yield {"kind": "p", "line": number, "text": inline(" ".join(text.strip() for _, text in lines), number)}
        lines = lines[n:]


def read(text):
    """All slides of a document. What is on none is read as well, so that nothing unknown hides."""
    # Comments of scripts/figures.py go, their lines stay.
    text = re.sub(r"<!--/?fig\b.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    slides, slide, section, run = [], None, "", []

    def end():
        blocks = list(read_block(run))
        run.clear()
        if slide:
            slide.blocks.extend(blocks)

    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip() and line.endswith("  "):
            raise Failure(number, "two spaces at the end of a line break it elsewhere, and are not read")
        line = line.rstrip()
        comment = re.match(r"\s*<!--(.*)", line)
        heading = re.match(r"(#{1,3}) (.+)", line)
        if comment:
            end()
            found = re.fullmatch(r"\s*<!-- (?:slide: (\S.*?)|(/slide)) -->", line)
            if not found:
                raise Failure(number, f"an unknown comment `{line.strip()[:50]}`: `<!-- slide: Title -->` and `<!-- /slide -->` are read")
            if found[2] and not slide:
                raise Failure(number, "`/slide` without a slide")
            slide = Slide(number, found[1], section) if found[1] else None
            if slide:
                slides.append(slide)
        elif heading:
            end()
            slide, section = None, bare(inline(heading[2], number))
        elif not line:
            end()
        else:
            run.append((number, line))
    if not slides:
        raise Failure(1, "no slide: put `<!-- slide: Title -->` before what is to be shown")
    return slides


# What fits


def n_lines(block):
    """About how many lines of a slide a block takes, with the space around it."""
    if block["kind"] == "p":
        return math.ceil(len(bare(block["text"])) / LINE) + 0.5
    if block["kind"] in ("ul", "ol"):
        return sum(math.ceil(len(bare(item)) / (LINE - 3)) + 0.2 for item in block["items"]) + 0.3
    if block["kind"] == "table":
        # Text of a table is smaller. Columns share the width as browsers do: each has its longest word, the rest goes by need.
        table = [[bare(cell) for cell in row] for row in (block["head"], *block["rows"])]
        least = [max(len(word) for cell in column for word in cell.split() or [""]) + 2 for column in zip(*table)]
        wanted = [max(map(len, column)) + 2 for column in zip(*table)]
        share = min(1, (LINE * 1.24 - sum(least)) / max(sum(wanted) - sum(least), 1))
        if share < 0:
            return math.inf
        width = [a + (b - a) * share for a, b in zip(least, wanted)]
        wraps = [max(max(1, math.ceil((len(cell) + 2) / w - 1e-9)) for cell, w in zip(row, width)) for row in table]
        return sum(1.13 + 0.75 * (n - 1) for n in wraps) + 0.5
    return 0


def faults(slide, folder):
    """Why a slide cannot be shown, with the line."""
    if not slide.blocks:
        yield slide.line, f"the slide `{slide.title}` is empty"
        return
    words = n_words(bare(" ".join(b.get("text", "") + " ".join(b.get("items", [])) for b in slide.blocks)))
    if words > MOST_WORDS:
        yield slide.line, f"the slide `{slide.title}` has {words} words beside its tables, and {MOST_WORDS} fit"
    pictures = [block for block in slide.blocks if block["kind"] == "picture"]
    tables = [block for block in slide.blocks if block["kind"] == "table"]
    if len(pictures) > 1 or (pictures and tables):
        yield slide.line, f"the slide `{slide.title}` has a picture beside another or beside a table: one alone fits"
    if pictures and words > MOST_WORDS // 2:
        yield slide.line, f"the slide `{slide.title}` has {words} words beside a picture, and {MOST_WORDS // 2} fit"
    for table in tables:
        if len(table["rows"]) > MOST_ROWS:
            yield table["line"], f"the table on the slide `{slide.title}` has {len(table['rows'])} rows, and {MOST_ROWS} fit"
    lines = sum(map(n_lines, slide.blocks))
    if lines > MOST_LINES:
        yield slide.line, f"the slide `{slide.title}` takes about {lines:.1f} lines, and {MOST_LINES} fit"
    for picture in pictures:
        path = Path(picture["file"])
        if not picture["alt"].strip():
            yield picture["line"], f"`{picture['file']}` has no text that says what it shows"
        if path.suffix.lower() not in TYPES:
            yield picture["line"], f"`{picture['file']}` is no {', '.join(TYPES)} file"
        elif not (folder / path).is_file():
            yield picture["line"], f"there is no picture `{picture['file']}`"


# HTML

STYLE = """
:root { color-scheme: light dark; --ground: #fdfdfc; --ink: #1a1a1a; --quiet: #555; --rule: #ccc; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ground: #16181b; --ink: #ececec; --quiet: #a9adb3; --rule: #44484e; --link: #8ab8f0; } }
* { box-sizing: border-box; }
html { font: min(1.77vw, 3.15vh)/1.38 system-ui, "DejaVu Sans", "Segoe UI", Arial, sans-serif; }
body { margin: 0; background: var(--ground); color: var(--ink); }
section { position: relative; width: 100vw; height: 100vh; padding: 2.1em 3em 2.6em; display: flex; flex-direction: column; overflow: hidden; }
section:focus { outline: none; }
.js section:not(.current) { display: none; }
h1, h2 { margin: 0 0 .55em; font-size: 1.6em; line-height: 1.15; }
.of { margin: 0 0 .2em; color: var(--quiet); font-size: .8em; }
.number { position: absolute; right: 3em; bottom: 1em; margin: 0; color: var(--quiet); font-size: .75em; }
p, ul, ol { margin: 0 0 .65em; }
li { margin-bottom: .3em; }
table { border-collapse: collapse; width: 100%; margin: 0 0 .65em; font-size: .8em; line-height: 1.3; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3em .9em .3em 0; border-bottom: 1px solid var(--rule); font-weight: inherit; }
thead th { color: var(--quiet); vertical-align: bottom; }
code, .math { font-family: "DejaVu Sans Mono", ui-monospace, Menlo, Consolas, monospace; font-size: .88em; }
a { color: var(--link); }
figure { flex: 1 1 0; min-height: 0; margin: 0 0 .65em; display: flex; justify-content: center; }
img { max-width: 100%; max-height: 100%; object-fit: contain; background: #fff; border-radius: 6px; }
nav { position: fixed; left: 2.7em; bottom: .7em; display: none; gap: .5em; }
.js nav { display: flex; }
nav button { font: inherit; font-size: .75em; color: var(--quiet); background: none; border: 1px solid var(--rule); border-radius: 4px; padding: .1em .7em; cursor: pointer; }
@page { size: 1280px 720px; margin: 0; }
@media print {
  :root { color-scheme: light; --ground: #fff; --ink: #1a1a1a; --quiet: #555; --rule: #ccc; --link: #0b57a4; }
  html { font-size: 22.7px; }
  .js section:not(.current), section { display: flex; }
  section { width: 1280px; height: 720px; break-after: page; break-inside: avoid; }
  section:last-of-type { break-after: auto; }
  .js nav { display: none; }
}
"""

SCRIPT = """
(function () {
  var slides = Array.prototype.slice.call(document.querySelectorAll('section'));
  var at = 0;
  function show(i, focus) {
    at = Math.max(0, Math.min(slides.length - 1, i));
    slides.forEach(function (slide, k) { slide.classList.toggle('current', k === at); });
    if (focus) {
      slides[at].focus({ preventScroll: true });
      try { history.replaceState(null, '', '#' + slides[at].id); } catch (e) { /* a page without an address of its own */ }
    }
  }
  function named() {
    var found = slides.findIndex(function (slide) { return '#' + slide.id === location.hash; });
    return found < 0 ? 0 : found;
  }
  var keys = {
    ArrowRight: 1, ArrowDown: 1, PageDown: 1, ' ': 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1,
    Home: -Infinity, End: Infinity
  };
  document.addEventListener('keydown', function (event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in keys)) return;
    if (event.key === ' ' && event.target.closest('button, a')) return;
    event.preventDefault();
    show(event.key === ' ' && event.shiftKey ? at - 1 : at + keys[event.key], true);
  });
  document.getElementById('back').addEventListener('click', function () { show(at - 1, true); });
  document.getElementById('on').addEventListener('click', function () { show(at + 1, true); });
  window.addEventListener('hashchange', function () { show(named(), true); });
  document.documentElement.classList.add('js');
  show(named(), false);
})();
"""


def html_of(block, folder):
    if block["kind"] == "p":
        return f"<p>{block['text']}</p>"
    if block["kind"] in ("ul", "ol"):
        items = "".join(f"<li>{item}</li>" for item in block["items"])
        return f"<{block['kind']}>{items}</{block['kind']}>"
    if block["kind"] == "picture":
        path = folder / block["file"]
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        kind = TYPES[path.suffix.lower()]
        return f'<figure><img alt="{html.escape(block["alt"])}" src="data:{kind};base64,{data}"></figure>'
    head = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in block["head"])
    rows = "".join(
        "<tr>" + "".join(f'<th scope="row">{cell}</th>' if i == 0 and cell else f"<td>{cell}</td>" for i, cell in enumerate(row)) + "</tr>\n"
        for row in block["rows"]
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>"


def page(slides, folder):
    sections = []
    for i, slide in enumerate(slides, 1):
        heading = "h1" if i == 1 else "h2"
        title = inline(slide.title, slide.line)
        blocks = "\n".join(html_of(block, folder) for block in slide.blocks)
        of = f'<p class="of">{html.escape(slide.section, quote=False)}</p>\n' if slide.section else ""
        sections.append(
            f'<section id="slide-{i}" tabindex="-1" aria-labelledby="title-{i}">\n{of}'
            f'<{heading} id="title-{i}">{title}</{heading}>\n{blocks}\n'
            f'<p class="number"><span aria-label="slide {i} of {len(slides)}" role="img">{i} / {len(slides)}</span></p>\n</section>'
        )
    name = html.escape(bare(inline(slides[0].title, slides[0].line)), quote=False)
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">\n"
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        '<nav aria-label="Slides"><button id="back" type="button" aria-label="Slide before">←</button>'
        '<button id="on" type="button" aria-label="Next slide">→</button></nav>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("document", type=Path, metavar="FILE.md")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="where the slides go")
    parser.add_argument("--check", action="store_true", help="only say whether every slide can be shown")
    args = parser.parse_args()
    if not args.check and not args.out:
        fail("--out FILE.html is missing (or --check)")
    if args.check and args.out:
        fail("--check writes nothing: leave out --out")
    folder = args.document.parent
    try:
        slides = read(args.document.read_text(encoding="utf-8"))
        for slide in slides:
            inline(slide.title, slide.line)
        found = [fault for slide in slides for fault in faults(slide, folder)]
        for line, what in found:
            print(f"error: {args.document}:{line}: {what}", file=sys.stderr)
        if found:
            sys.exit(1)
        if args.check:
            print(f"{len(slides)} slides can be shown")
            return
        text = page(slides, folder)
        args.out.write_text(text, encoding="utf-8")
        print(args.out)
    except Failure as failure:
        fail(f"{args.document}:{failure.line}: {failure.what}")
    except UnicodeDecodeError:
        fail(f"{args.document} is not UTF-8")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
