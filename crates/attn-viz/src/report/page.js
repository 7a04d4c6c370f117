(() => {
  'use strict';

  /** Red, green and blue of each colour in a text of six digits a colour. */
  const table = (text) => text.match(/.{6}/g).map((it) => [0, 2, 4].map((at) => parseInt(it.slice(at, at + 2), 16)));
  const digits = JSON.parse(document.getElementById('colors').textContent);
  const missing = table(digits.missing)[0];
  const viridis = table(digits.viridis);
  const diverging = { light: table(digits.diverging.light), dark: table(digits.diverging.dark) };
  const redrawn = []; // what depends on the theme

  /** An element with properties, attributes where a name has a dash or no property, and children. */
  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in made) made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  // The theme: the reader's system says, unless the button was used. Paper is light.

  const prefersDark = matchMedia('(prefers-color-scheme: dark)');
  const paper = matchMedia('print');
  const isDarkOnScreen = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? 'dark' : 'light')) === 'dark';
  const isDark = () => isDarkOnScreen() && !paper.matches;

  function followTheme() {
    const button = document.getElementById('theme');
    const changed = () => {
      button.textContent = isDarkOnScreen() ? 'Light colours' : 'Dark colours';
      redrawn.forEach((draw) => draw());
    };
    button.hidden = false;
    button.addEventListener('click', () => {
      document.documentElement.dataset.theme = isDarkOnScreen() ? 'light' : 'dark';
      changed();
    });
    for (const query of [prefersDark, paper]) query.addEventListener('change', changed);
    changed();
  }

  // Tables

  const words = new Intl.Collator('en', { numeric: true });

  /** How two cells compare, with empty ones behind all others in either direction. */
  function compareCells(a, b, numeric, direction) {
    const [one, other] = [a, b].map((cell) => (numeric ? cell.dataset.key : cell.textContent) ?? '');
    if (one === '' || other === '') return (one === '') - (other === '');
    const order = numeric ? Number(one) > Number(other) ? 1 : Number(one) < Number(other) ? -1 : 0 : words.compare(one, other);
    return direction * order;
  }

  function sortBy(table, heading) {
    const descending = heading.getAttribute('aria-sort') === 'ascending';
    for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
    heading.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
    const numeric = heading.classList.contains('number');
    const cell = (row) => row.cells[heading.cellIndex];
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compareCells(cell(a), cell(b), numeric, descending ? -1 : 1));
    table.tBodies[0].append(...rows);
  }

  function makeSortable(table) {
    for (const heading of table.tHead.rows[0].cells) {
      const button = element('button', { type: 'button' }, ...heading.childNodes);
      button.addEventListener('click', () => sortBy(table, heading));
      heading.append(button);
    }
  }

  // Attention: bytes to weights

  /** The bytes of a model's heads; rejects where the browser cannot inflate them. */
  async function inflate(text) {
    const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** Weights of a head, row by row. */
  function weightsOf(model, head) {
    const [rows, columns] = [model.rows.length, model.columns.length];
    const values = new Float64Array(rows * columns);
    let at = head.start;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < (model.causal ? row + 1 : columns); column++) {
        const byte = model.bytes[at++];
        values[row * columns + column] = byte === 255 ? NaN : (byte - head.zero) * head.step;
      }
    }
    return values;
  }

  function meanOf(all) {
    const mean = new Float64Array(all[0].length);
    for (const values of all) values.forEach((value, i) => { mean[i] += value / all.length; });
    return mean;
  }

  /** Inflates a model once, and finds where each head begins. */
  async function unpack(model) {
    if (model.bytes) return;
    const bytes = await inflate(model.weights);
    const n = model.rows.length;
    const size = model.causal ? n * (n + 1) / 2 : n * model.columns.length;
    model.layers.flatMap((layer) => layer.heads).forEach((head, i) => { head.start = i * size; });
    model.bytes = bytes;
  }

  const within = (index, n) => Math.min(n - 1, Math.max(0, index));
  const same = (one, other) => one.length === other.length && one.every((token, i) => token === other[i]);

  // Numbers as colours, and in words

  function rangeOf(values) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low <= high ? [low, high] : [0, 1];
  }

  /** The colours of a map on the ground as it is. */
  const colorsOf = (map) => (map.diverging ? diverging[isDark() ? 'dark' : 'light'] : viridis);

  /** Red, green and blue of a value in a map. */
  function colorOf(value, { range: [low, high] }, colors) {
    if (Number.isNaN(value)) return missing;
    const share = high > low ? (value - low) / (high - low) : 0;
    return colors[Math.round((colors.length - 1) * Math.min(1, Math.max(0, share)))];
  }

  /** Black or white, whichever stands out more: at least 4.5 to 1 on any colour. */
  function inkOn(color) {
    const [r, g, b] = color.map((c) => (c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? '#000' : '#fff';
  }

  function inWords(value) {
    if (Number.isNaN(value)) return 'NaN';
    const text = value === 0 || (Math.abs(value) >= 0.001 && Math.abs(value) < 1000) ? value.toFixed(3) : value.toExponential(1);
    return text.replace('-', '\u2212');
  }

  /** The columns of a row with the largest weights, largest first. */
  function strongest(map, row, n) {
    const columns = map.columns.map((_, column) => column);
    const size = (column) => Math.abs(map.at(row, column));
    const seen = columns.filter((column) => size(column) > 0);
    return seen.sort((a, b) => size(b) - size(a) || a - b).slice(0, n);
  }

  // A map of weights on a canvas

  /** Of the cells below a pixel, the one farthest from zero where signs count, else the largest. */
  function most(map, rows, columns) {
    let found = NaN;
    for (let row = rows[0]; row < rows[1]; row++) {
      for (let column = columns[0]; column < columns[1]; column++) {
        const value = map.at(row, column);
        const more = map.diverging ? Math.abs(value) > Math.abs(found) : value > found;
        if (more || Number.isNaN(found)) found = value;
      }
    }
    return found;
  }

  /** Draws a pixel for each cell, or, of more cells than `limit`, the most of those that share one. */
  function drawMap(canvas, map, limit) {
    const [rows, columns] = [map.rows.length, map.columns.length];
    const [height, width] = [Math.min(rows, limit), Math.min(columns, limit)];
    const cells = (pixel, pixels, n) => [Math.floor(pixel * n / pixels), Math.ceil((pixel + 1) * n / pixels)];
    Object.assign(canvas, { width, height });
    const context = canvas.getContext('2d');
    const image = context.createImageData(width, height);
    const colors = colorsOf(map);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const value = most(map, cells(y, height, rows), cells(x, width, columns));
        paint(image, y * width + x, colorOf(value, map, colors));
      }
    }
    context.putImageData(image, 0, 0);
  }

  function paint(image, pixel, color) {
    image.data.set(color, 4 * pixel);
    image.data[4 * pixel + 3] = 255;
  }

  /** All colours of a map in a line. */
  function drawLegend(canvas, map) {
    const colors = colorsOf(map);
    Object.assign(canvas, { width: colors.length, height: 1 });
    const context = canvas.getContext('2d');
    const image = context.createImageData(colors.length, 1);
    colors.forEach((color, x) => paint(image, x, color));
    context.putImageData(image, 0, 0);
  }

  // Controls

  const along = { ArrowRight: 1, ArrowLeft: -1 };
  const across = { ArrowDown: 1, ArrowUp: -1 };
  const jumps = { PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

  /**
   * A list to pick from: one stop of the tab key, `steps` by keys inside, the others for `onKey`. `fill` makes an option for each
   * name, `choose` marks one.
   */
  function picker(label, steps, onPick, onKey = () => false) {
    const list = element('div', { role: 'listbox', className: 'picker', 'aria-label': label });
    const options = () => [...list.children];
    const step = (key) => {
      if (!(key in steps)) return onKey(key);
      const now = options().findIndex((option) => option.tabIndex === 0);
      onPick(within(now + steps[key], options().length));
      return true;
    };
    list.addEventListener('click', (event) => {
      const index = options().findIndex((option) => option.contains(event.target));
      if (index >= 0) onPick(index);
    });
    list.addEventListener('keydown', (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && step(event.key)) event.preventDefault();
    });
    let filled = [];
    let marked = [];
    function fill(names) {
      if (same(names, filled)) return;
      const focused = list.contains(document.activeElement);
      list.replaceChildren(...names.map((name) => element('div', { role: 'option', tabIndex: -1, 'aria-selected': 'false' }, name)));
      if (focused) list.firstChild.focus({ preventScroll: true });
      [filled, marked] = [names, []];
    }
    /** Marks an option; of none, the first is where the tab key stops. */
    function choose(index) {
      const focused = list.contains(document.activeElement);
      for (const option of marked) {
        option.setAttribute('aria-selected', 'false');
        option.tabIndex = -1;
      }
      const [chosen, stop] = [list.children[index], list.children[Math.max(0, index)]];
      chosen?.setAttribute('aria-selected', 'true');
      stop.tabIndex = 0;
      marked = [stop];
      if (focused) chosen?.focus({ preventScroll: true });
      if (chosen) reveal(list, chosen);
    }
    return { list, fill, choose };
  }

  /** Scrolls a box, and not the page, until a child of it is seen. */
  function reveal(box, child) {
    const [outer, inner] = [box.getBoundingClientRect(), child.getBoundingClientRect()];
    if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top;
    if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom;
  }

  let named = 0;

  function chooser(label, onChoose) {
    const select = element('select', { id: `choice-${named++}` });
    select.addEventListener('change', () => onChoose(select.value));
    const fill = (options, chosen) => {
      select.replaceChildren(...options.map(([value, name]) => element('option', { value, textContent: name })));
      select.value = chosen;
    };
    return { root: element('span', {}, element('label', { htmlFor: select.id }, label), ' ', select), fill };
  }

  // A map with its legend, its list and its words

  function panel(onCell, onRow) {
    const canvas = element('canvas', { className: 'map', role: 'img' });
    const marks = ['row-mark', 'column-mark'].map((className) => element('div', { className, 'aria-hidden': 'true' }));
    const legend = element('canvas', { className: 'colors', role: 'img' });
    const ends = [element('span'), element('span')];
    const heading = element('h4');
    const trouble = element('p', { className: 'trouble', hidden: true });
    const list = element('ol', { className: 'tokens', tabIndex: 0 });
    const body = element('div', {},
      element('div', { className: 'frame' }, canvas, ...marks),
      element('div', { className: 'legend' }, ends[0], legend, ends[1]),
      list);
    const root = element('div', { className: 'panel' }, heading, trouble, body);
    let shown = {};

    canvas.addEventListener('click', (event) => {
      const box = canvas.getBoundingClientRect();
      const cell = (share, n) => within(Math.floor(share * n), n);
      onCell(
        cell((event.clientY - box.top) / box.height, shown.map.rows.length),
        cell((event.clientX - box.left) / box.width, shown.map.columns.length));
    });
    list.addEventListener('click', (event) => {
      const index = [...list.children].findIndex((item) => item.contains(event.target));
      if (index >= 0 && same(shown.map.rows, shown.map.columns)) onRow(index);
    });

    function mark(row, column, map) {
      const place = (mark, index, n, start, size) => {
        mark.hidden = index === null;
        mark.style[start] = `${100 * index / n}%`;
        mark.style[size] = `${100 / n}%`;
      };
      place(marks[0], row, map.rows.length, 'top', 'height');
      place(marks[1], column, map.columns.length, 'left', 'width');
    }

    function item(token) {
      return element('li', { className: 'cell' },
        element('span', { className: 'token' }, token), ' ', element('span', { className: 'weight' }));
    }

    function listed(title, map, row, column) {
      if (!same(map.columns, shown.map?.columns ?? [])) list.replaceChildren(...map.columns.map(item));
      const colors = colorsOf(map);
      [...list.children].forEach((it, i) => {
        const value = map.at(row, i);
        const color = colorOf(value, map, colors);
        it.lastChild.textContent = inWords(value);
        it.style.background = `rgb(${color})`;
        it.style.color = inkOn(color);
        it.classList.toggle('chosen', i === column);
      });
      list.classList.toggle('picks', same(map.rows, map.columns));
      list.setAttribute('aria-label', `${title}: weights of the token`);
      if (column !== null) reveal(list, list.children[column]);
    }

    /** Shows a map, or in its place why there is none. */
    function show({ title, map, row, column }) {
      const missing = typeof map === 'string';
      heading.textContent = title;
      trouble.textContent = missing ? map : '';
      [trouble.hidden, body.hidden] = [!missing, missing];
      if (missing) return;
      const limit = Math.max(64, Math.round(canvas.clientWidth * devicePixelRatio) || 384);
      const look = `${map.range} ${isDark()} ${limit}`;
      if (map.values !== shown.map?.values || look !== shown.look) {
        drawMap(canvas, map, limit);
        drawLegend(legend, map);
        [ends[0].textContent, ends[1].textContent] = map.range.map(inWords);
        canvas.setAttribute('aria-label', `${title}: weights of ${map.rows.length} by ${map.columns.length} tokens`);
        legend.setAttribute('aria-label', `colours from ${map.range.map(inWords).join(' to ')}`);
      }
      mark(row, column, map);
      listed(title, map, row, column);
      shown = { map, look };
    }
    return { root, show };
  }

  // A sample: its tokens to pick from, and its maps

  /** Has places for a sample. `onPick` gets a row `t`, a column `k` or both, `onKey` the keys that do not step from row to row. */
  function side(onPick, onKey) {
    const caption = element('p', { className: 'note' });
    const note = element('p', { className: 'note' });
    const tokens = picker('Token that attends', { ...across, ...jumps }, (t) => onPick({ t }), onKey);
    tokens.list.classList.add('rows');
    const panels = [0, 1, 2].map(() => panel((t, k) => onPick({ t, k }), (t) => onPick({ t })));
    const root = element('div', { className: 'side', role: 'group' }, caption, note,
      element('div', { className: 'columns' }, tokens.list, element('div', { className: 'panels' }, ...panels.map((it) => it.root))));

    /** Shows what there is of a sample; of no rows, no list. */
    function show(of) {
      root.setAttribute('aria-label', `Sample ${of.name}`);
      for (const [line, text] of [[caption, of.caption], [note, of.note]]) {
        line.textContent = text;
        line.hidden = text === '';
      }
      tokens.list.hidden = of.rows.length === 0;
      if (of.rows.length > 0) {
        tokens.fill(of.rows);
        tokens.choose(of.row);
      }
      // All before the first is drawn: how many there are is how wide they are.
      panels.forEach((it, i) => { it.root.hidden = i >= of.maps.length; });
      of.maps.forEach((map, i) => panels[i].show(map));
    }
    return { root, show };
  }

  // The state of a viewer in the address, as #s=0&m=0&l=3&h=5&t=7: sample, the one beside it (b), model, the one it is compared with
  // (c), layer, head, token, column (k), the token (u) and column (v) of the sample beside where they are its own, range of colours.

  const keys = ['s', 'b', 'm', 'c', 'l', 'h', 't', 'k', 'u', 'v', 'r'];
  const first = { s: 0, b: null, m: 0, c: null, l: 0, h: 0, t: null, k: null, u: null, v: null, r: null };

  /** The keys of viewers behind the first end in their number. */
  function readState(number) {
    const given = new URLSearchParams(location.hash.slice(1));
    const state = {};
    for (const key of keys) {
      const text = given.get(key + (number || ''));
      if (/^(\d{1,9}|mean)$/.test(text ?? '')) state[key] = text === 'mean' ? text : Number(text);
    }
    return state;
  }

  function writeState(number, state) {
    const given = new URLSearchParams(location.hash.includes('=') ? location.hash.slice(1) : '');
    for (const key of keys) {
      if (state[key] === null) given.delete(key + (number || ''));
      else given.set(key + (number || ''), state[key]);
    }
    history.replaceState(null, '', `#${given}`);
  }

  // The viewer

  function viewer(root, number) {
    const { samples } = JSON.parse(root.querySelector('script').textContent);
    for (const model of samples.flatMap((it) => it.models)) model.columns ??= model.rows;
    const stage = root.querySelector('.stage');
    let state = first;
    let turn = 0;

    const sampleChooser = chooser('Sample', (value) => change({ s: Number(value), t: null, k: null }));
    const besideChooser = chooser('Beside', (value) => change({ b: value === '' ? null : Number(value), u: null, v: null }));
    const modelChooser = chooser('Model', (value) => change({ m: Number(value) }));
    const otherChooser = chooser('Compare with', (value) => change({ c: value === '' ? null : Number(value) }));
    const layerChooser = chooser('Layer', (value) => change({ l: Number(value) }));
    const headChooser = chooser('Head', (value) => change({ h: value === 'mean' ? value : Number(value) }));
    const rangeChooser = chooser('Colours span', (value) => change({ r: value === '' ? null : 1 }));
    const heads = picker('All heads of the layer', { ...along, ...across, ...jumps }, (h) => change({ h }));
    heads.list.classList.add('heads');
    const both = element('p', { className: 'note' });
    const sides = [0, 1].map((i) => side((cell) => pick(i, cell), (key) => pickColumn(i, key)));
    const said = element('div', { className: 'said', 'aria-live': 'polite' });
    const choosers = [sampleChooser, besideChooser, modelChooser, otherChooser, layerChooser, headChooser, rangeChooser];

    const sampleNow = () => samples[state.s];
    const modelNow = () => sampleNow().models[state.m];
    const layerNow = () => modelNow().layers[state.l];
    const clamp = (value, n) => within(Number(value) || 0, n);

    /** One sample or two, and one model or two. */
    const samplesNow = () => [state.s, state.b].filter((it) => it !== null).map((it) => samples[it]);
    const modelsNow = () => [state.m, state.c].filter((it) => it !== null).map((it) => sampleNow().models[it]);

    // What another sample or model has of the same name; undefined where it has none.
    const modelIn = (sample, model) => (sample === sampleNow() ? model : sample.models.find((it) => it.name === model.name));
    const modelsIn = (sample) => modelsNow().map((it) => modelIn(sample, it)).filter(Boolean);
    const layerIn = (model) => (model === modelNow() ? layerNow() : model.layers.find((it) => it.name === layerNow().name));

    /** Whether there are two samples of as many tokens: one that is picked in either is picked in both. */
    function isShared() {
      const [one, other] = samplesNow().map((it) => modelsIn(it)[0]);
      return one.rows.length === other?.rows.length && one.columns.length === other.columns.length;
    }

    /** The key of the state for row `t` or column `k` of a side. */
    const keyOf = (i, key) => (i === 0 || isShared() ? key : { t: 'u', k: 'v' }[key]);

    /** Makes the state one that there is. */
    function settle() {
      state = { ...state };
      state.s = clamp(state.s, samples.length);
      if (!(state.b in samples) || state.b === state.s) state.b = null;
      state.m = clamp(state.m, sampleNow().models.length);
      if (!(state.c in sampleNow().models) || state.c === state.m) state.c = null;
      state.l = clamp(state.l, modelNow().layers.length);
      if (state.h !== 'mean') state.h = clamp(state.h, layerNow().heads.length);
      settleCell('t', 'k', modelNow());
      settleCell('u', 'v', state.b === null || isShared() ? undefined : modelsIn(samples[state.b])[0]);
      if (state.r !== 1) state.r = null;
    }

    function settleCell(t, k, model) {
      if (!model) {
        state[t] = state[k] = null;
        return;
      }
      state[t] = state[t] === null ? model.rows.length - 1 : clamp(state[t], model.rows.length);
      if (state[k] !== null) state[k] = clamp(state[k], model.columns.length);
    }

    function change(with_) {
      state = { ...state, ...with_ };
      settle();
      writeState(number, state);
      render();
    }

    /** Picks a row `t`, a column `k` or both in a side. */
    function pick(i, cell) {
      change(Object.fromEntries(Object.entries(cell).map(([key, value]) => [keyOf(i, key), value])));
    }

    /** Goes to a token attended to, by the arrows along the line; Escape leaves it. */
    function pickColumn(i, key) {
      const [t, k] = ['t', 'k'].map((it) => state[keyOf(i, it)]);
      if (key === 'Escape') pick(i, { k: null });
      else if (key in along) pick(i, { k: k === null ? t : k + along[key] });
      else return false;
      return true;
    }

    /** What a map is called: by its model, and where there are two samples by its sample, too. */
    const titled = (name, sample) => (state.b === null ? name : `${name} on ${sample.name}`);

    /** The map of the chosen head, or of that of the same name in another sample or model; a text where there is none. */
    function mapOf(sample, wanted) {
      const model = modelIn(sample, wanted);
      if (!model) return `${sample.name} has no model ${wanted.name}.`;
      const layer = layerIn(model);
      const title = titled(model.name, sample);
      if (!layer) return `${title} has no ${layerNow().name}.`;
      if (state.h === 'mean') return mapOfHeads(model, layer, layer.heads);
      const { name } = layerNow().heads[state.h];
      const head = layer === layerNow() ? layer.heads[state.h] : layer.heads.find((it) => it.name === name);
      return head ? mapOfHeads(model, head, [head]) : `${title} has no ${name} in ${layer.name}.`;
    }

    let memory = new Map();

    /** What `make` gives, made once; the last few are kept. */
    function kept(key, make) {
      if (memory.size > 16) memory = new Map();
      if (!memory.has(key)) memory.set(key, make());
      return memory.get(key);
    }

    const mapOfHeads = (model, key, heads) =>
      kept(key, () => mapWith(model, meanOf(heads.map((head) => weightsOf(model, head))), false));

    function mapWith({ rows, columns }, values, diverging) {
      const at = (row, column) => values[row * columns.length + column];
      return { rows, columns, values, diverging, at, range: rangeOf(values) };
    }

    function difference(sample, one, other) {
      if (typeof one === 'string' || typeof other === 'string') return 'There is no difference to show.';
      if (!same(one.rows, other.rows) || !same(one.columns, other.columns)) {
        return 'The tokens of the two models differ: there is no difference to show.';
      }
      const key = `${[samples.indexOf(sample), state.s, state.m, state.c, state.l, state.h]}`;
      return kept(key, () => mapWith(one, other.values.map((value, i) => value - one.values[i]), true));
    }

    /** Titles and maps of a sample from left to right, each with the row and the column to show. */
    function mapsOf(sample, i) {
      const names = modelsNow().map((it) => it.name);
      const maps = modelsNow().map((it) => mapOf(sample, it));
      if (names.length === 2) {
        names.push(`${names[1]} \u2212 ${names[0]}`);
        maps.push(difference(sample, ...maps));
      }
      return maps.map((map, at) => ({ i, title: titled(names[at], sample), map, ...cellOf(i, map) }));
    }

    /** Gives all maps one range of colours, all differences another: of all their values, or of those of the chosen tokens. */
    function withRange(shown) {
      const ofToken = ({ map, row }) => rangeOf(map.columns.map((_, column) => map.at(row, column)));
      const rangeWhere = (diverging) => {
        const seen = shown.filter(({ map }) => typeof map !== 'string' && map.diverging === diverging);
        return rangeOf(seen.flatMap((it) => (state.r === 1 ? ofToken(it) : it.map.range)));
      };
      const end = Math.max(...rangeWhere(true).map(Math.abs)) || 1;
      const [weights, differences] = [rangeWhere(false), [-end, end]];
      const colored = (map) => (typeof map === 'string' ? map : { ...map, range: map.diverging ? differences : weights });
      return shown.map((it) => ({ ...it, map: colored(it.map) }));
    }

    function controls() {
      const { models } = sampleNow();
      const numbered = (all) => all.map((it, i) => [i, it.name]);
      sampleChooser.fill(numbered(samples), state.s);
      besideChooser.fill([['', 'none'], ...numbered(samples).filter(([i]) => i !== state.s)], state.b ?? '');
      besideChooser.root.hidden = samples.length < 2;
      modelChooser.fill(numbered(models), state.m);
      otherChooser.fill([['', 'nothing'], ...numbered(models).filter(([i]) => i !== state.m)], state.c ?? '');
      otherChooser.root.hidden = models.length < 2;
      layerChooser.fill(numbered(modelNow().layers), state.l);
      headChooser.fill([...numbered(layerNow().heads), ['mean', 'mean of heads']], state.h);
      rangeChooser.fill([['', 'the map'], [1, 'the token']], state.r ?? '');
      both.textContent = state.b === null ? '' : wordsOfBoth();
      both.hidden = state.b === null;
    }

    /** What is to be known of two samples side by side. */
    function wordsOfBoth() {
      const colors = `All maps have one scale of colours${state.c === null ? '' : ', all differences another'}.`;
      const tokens = isShared()
        ? 'Both samples have the same number of tokens: one picked in either is picked in both.'
        : 'The samples differ in their number of tokens: each has a picked one of its own.';
      const found = modelsIn(samples[state.b]).length > 0;
      return [colors, ...(found ? [tokens] : []), `The heads above are those of ${sampleNow().name}.`].join(' ');
    }

    /** What is to be known of the layer in these models: once where it is the same, else by model. */
    function notesOf(models) {
      const all = models.map((model) => [model.name, layerIn(model)?.note ?? '']);
      if (all.every(([, it]) => it === all[0][1])) return all[0]?.[1] ?? '';
      return all.filter(([, it]) => it !== '').map(([name, it]) => `${name}: ${it}`).join('; ');
    }

    /** What a sample is called and how many tokens it has, where another stands beside it. */
    function captionOf(sample) {
      if (state.b === null) return '';
      const [model] = modelsIn(sample);
      if (!model) return sample.name;
      const { rows, columns } = model;
      const counted = rows.length === 1 ? '1 token' : `${rows.length} tokens`;
      return `${sample.name}: ${counted}${same(rows, columns) ? '' : ` to ${columns.length}`}`;
    }

    let drawn = null;
    function drawHeads() {
      if (drawn !== layerNow()) {
        drawn = layerNow();
        heads.fill(drawn.heads.map((head) => head.name));
        drawn.heads.forEach((head, i) => {
          const canvas = element('canvas', { 'aria-hidden': 'true' });
          drawMap(canvas, mapWith(modelNow(), weightsOf(modelNow(), head), false), 96);
          heads.list.children[i].replaceChildren(canvas, head.name);
        });
      }
      heads.choose(state.h === 'mean' ? -1 : state.h);
    }

    /** The row and the column to show of a map that may have fewer. */
    function cellOf(i, { rows = [], columns = [] }) {
      const [t, k] = ['t', 'k'].map((it) => state[keyOf(i, it)]);
      return { row: Math.min(t, rows.length - 1), column: k < columns.length ? k : null };
    }

    function sentence({ title, map, row, column }) {
      if (typeof map === 'string') return `${title}: ${map}`;
      const head = state.h === 'mean' ? 'mean of heads' : layerNow().heads[state.h].name;
      const to = (i) => `\u201c${map.columns[i]}\u201d (${i}) ${inWords(map.at(row, i))}`;
      const top = strongest(map, row, 5).map(to).join(', ') || 'nothing';
      const chosen = column === null ? '' : ` Chosen: ${to(column)}.`;
      const verb = map.diverging ? 'differs most at' : 'attends most to';
      return `${title}, ${layerNow().name}, ${head}: token ${row} \u201c${map.rows[row]}\u201d ${verb} ${top}.${chosen}`;
    }

    /** Says it aloud where it is something else than before. */
    function say(sentences) {
      if (same(sentences, [...said.children].map((it) => it.textContent))) return;
      said.replaceChildren(...sentences.map((it) => element('p', {}, it)));
    }

    async function render() {
      const mine = ++turn;
      controls();
      try {
        await Promise.all(samplesNow().flatMap(modelsIn).map(unpack));
      } catch {
        refuse('This browser cannot unpack the weights: it lacks DecompressionStream for \u201cdeflate-raw\u201d.');
        return;
      }
      if (mine !== turn) return;
      drawHeads();
      const shown = withRange(samplesNow().flatMap(mapsOf));
      sides.forEach((it, i) => { it.root.hidden = i >= samplesNow().length; });
      samplesNow().forEach((sample, i) => {
        const models = modelsIn(sample);
        sides[i].show({
          name: sample.name,
          caption: captionOf(sample),
          note: notesOf(models),
          rows: models[0]?.rows ?? [],
          row: state[keyOf(i, 't')],
          maps: shown.filter((it) => it.i === i),
        });
      });
      say(shown.map(sentence));
      root.dataset.ready = 'true';
    }

    function refuse(message) {
      stage.replaceChildren(element('p', { className: 'trouble', role: 'alert' }, message));
    }

    stage.append(
      element('div', { className: 'controls', role: 'group', 'aria-label': 'What is shown' }, ...choosers.map((it) => it.root)),
      element('h3', {}, 'Heads of the layer'),
      heads.list,
      element('h3', {}, 'Attention of a token'),
      element('p', { className: 'note hint' }, 'Pick a token in the list or a cell in the map. In the list, up and down go from token to token, left and right through those attended to.'),
      both,
      element('div', { className: 'sides' }, ...sides.map((it) => it.root)),
      said);

    const restore = () => {
      const given = readState(number);
      if (Object.keys(given).length === 0) return;
      state = { ...first, ...given };
      settle();
      render();
    };
    addEventListener('hashchange', restore);
    redrawn.push(() => { if (root.dataset.ready) render(); });
    settle();
    render();
    restore();
  }

  /** The skip link leaves the address to the viewers. */
  function skip(event) {
    event.preventDefault();
    document.getElementById('main').focus();
  }

  document.querySelector('.skip').addEventListener('click', skip);
  document.querySelectorAll('table').forEach(makeSortable);
  document.querySelectorAll('.viewer').forEach(viewer);
  followTheme();
  document.getElementById('no-script').remove();
})();
