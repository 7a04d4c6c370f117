// Opens a report in Chromium and checks what a reader would: `node report.mjs REPORT.html EXPECTED.json FOLDER [WORD]`.
//
// `ATTN_TEST_BROWSER` names the folder whose `node_modules` holds playwright-core; Chromium is found on the PATH. Pictures of the
// page go into FOLDER. Prints a line for each check, with WORD for those that have it in their name, and ends with 1 where one fails.

import assert from 'node:assert/strict';
import { accessSync, constants, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [file, expectedFile, folder, word = ''] = process.argv.slice(2);
const { chromium } = createRequire(path.join(process.env.ATTN_TEST_BROWSER, 'here.js'))('playwright-core');
const url = pathToFileURL(file).href;
const expected = JSON.parse(readFileSync(expectedFile, 'utf8'));

function onPath(...names) {
  const all = process.env.PATH.split(path.delimiter).flatMap((place) => names.map((name) => path.join(place, name)));
  return all.find((it) => {
    try { accessSync(it, constants.X_OK); return true; } catch { return false; }
  });
}

const executablePath = onPath('chromium', 'chromium-browser', 'google-chrome');
assert(executablePath, 'there is no Chromium on the PATH');
const browser = await chromium.launch({ executablePath });
const noise = [];

/** A page with the report, on which every message, error and request is noted. */
async function open({ hash = '', before, quiet = true, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 900 }, reducedMotion: 'reduce', ...options });
  context.setDefaultTimeout(5000);
  const page = await context.newPage();
  if (quiet) {
    page.on('console', (message) => {
      // What the checks themselves read from canvases.
      if (!message.text().startsWith('Canvas2D: Multiple readback operations')) noise.push(`console: ${message.text()}`);
    });
    page.on('pageerror', (error) => noise.push(`error: ${error.stack}`));
    page.on('request', (request) => {
      if (request.url().split('#')[0] !== url && !request.url().startsWith('data:')) noise.push(`request: ${request.url()}`);
    });
  }
  await page.addInitScript(() => {
    window.violations = [];
    document.addEventListener('securitypolicyviolation', (event) => window.violations.push(event.violatedDirective));
  });
  if (before) await page.addInitScript(before);
  await page.goto(url + hash);
  if (options.javaScriptEnabled !== false && !before) {
    await page.waitForFunction(() => [...document.querySelectorAll('.viewer')].every((it) => it.dataset.ready));
  }
  return page;
}

const viewer = (page, i = 0) => page.locator('.viewer').nth(i);
const select = (page, label) => viewer(page).getByLabel(label, { exact: true });
const side = (page, i) => viewer(page).locator('.side').nth(i);
const chosenToken = (page, i = 0) => side(page, i).locator('.rows [aria-selected="true"]').textContent();
const state = (page) => Object.fromEntries(new URLSearchParams(new URL(page.url()).hash.slice(1)));
const said = (page) => viewer(page).locator('.said').innerText();
const settled = (page) => page.evaluate(() => new Promise((done) => { requestAnimationFrame(() => setTimeout(done, 30)); }));

async function press(page, ...keys) {
  for (const key of keys) {
    await page.keyboard.press(key);
    await settled(page);
  }
}

/** What stands in the coloured list of a panel: tokens with their weights. */
function listed(page, panel = 0) {
  return viewer(page).locator('.panel').nth(panel).locator('.tokens .cell').evaluateAll((cells) => cells.map((cell) => ({
    token: cell.querySelector('.token').textContent,
    weight: Number(cell.querySelector('.weight').textContent.replace('\u2212', '-')),
    color: cell.style.backgroundColor,
    chosen: cell.classList.contains('chosen'),
  })));
}

/** The colour of a cell of a map, as drawn. */
function pixel(page, panel, row, column, i = 0) {
  return viewer(page, i).locator('.panel').nth(panel).locator('.map').evaluate((canvas, [row, column]) => {
    const [r, g, b] = canvas.getContext('2d').getImageData(column, row, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  }, [row, column]);
}

/** Clicks into the middle of a cell of a map and returns where that was. */
async function clickCell(page, row, column, [rows, columns], panel = 0) {
  const canvas = viewer(page).locator('.panel').nth(panel).locator('.map');
  await canvas.scrollIntoViewIfNeeded();
  const box = await canvas.boundingBox();
  const [x, y] = [box.x + box.width * (column + 0.5) / columns, box.y + box.height * (row + 0.5) / rows];
  await page.mouse.click(x, y);
  await settled(page);
  return { x, y };
}

function near(found, wanted, most, what) {
  assert.equal(found.length, wanted.length, what);
  found.forEach((value, i) => {
    if (wanted[i] === null) assert(Number.isNaN(value), `${what} ${i}: ${value}, expected NaN`);
    else assert(Math.abs(value - wanted[i]) <= most, `${what} ${i}: ${value}, expected ${wanted[i]}`);
  });
}

const column = (page, table, i) => page.locator('table').nth(table).locator(`tbody td:nth-child(${i + 1})`).allTextContents();

/** Functions that run in the page: contrast of every text with what is behind it. */
function lowContrast() {
  const parse = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const bad = [];
  let n = 0;
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== '');
    if (!own || !element.checkVisibility() || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'OPTION'].includes(element.tagName)) continue;
    const [one, other] = [parse(getComputedStyle(element).color).slice(0, 3), behind(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    n += 1;
    if (contrast < 4.5) bad.push(`${element.tagName}.${element.className} ${contrast.toFixed(2)}: ${element.textContent.slice(0, 40)}`);
  }
  return { bad, n };
}

/** Functions that run in the page: what an automatic check of accessibility looks for. */
function faults() {
  const found = [];
  const expect = (holds, what) => { if (!holds) found.push(what); };
  const all = (selector) => [...document.querySelectorAll(selector)];
  const referred = (it) => (it.getAttribute('aria-labelledby') ?? '').split(' ').map((id) => document.getElementById(id)?.textContent ?? '').join('');
  const name = (it) => it.getAttribute('aria-label') || referred(it) || it.getAttribute('alt') || [...(it.labels ?? [])].map((label) => label.textContent).join('')
    || (['BUTTON', 'A', 'SUMMARY'].includes(it.tagName) || it.getAttribute('role') === 'option' ? it.textContent.trim() : '');
  expect(document.documentElement.lang === 'en', 'the language is not named');
  expect(document.title !== '', 'the page has no title');
  for (const landmark of ['main', 'h1', 'body > header', 'nav']) expect(all(landmark).length === 1, `there is not one ${landmark}`);
  for (const it of all('button, a, select, summary, img, canvas[role], [role="listbox"], [role="option"], [role="group"], nav, section').filter((it) => it.checkVisibility())) {
    expect(name(it) !== '', `no name: ${it.outerHTML.slice(0, 120)}`);
  }
  for (const it of all('canvas')) expect(it.getAttribute('role') === 'img' || it.getAttribute('aria-hidden') === 'true', 'a canvas without a role');
  const levels = all('h1, h2, h3, h4, h5, h6').filter((it) => it.checkVisibility()).map((it) => Number(it.tagName[1]));
  levels.forEach((level, i) => expect(level <= (levels[i - 1] ?? 0) + 1, `heading ${i} goes from ${levels[i - 1]} to ${level}`));
  const ids = all('[id]').map((it) => it.id);
  expect(new Set(ids).size === ids.length, 'an id is there twice');
  for (const it of all('[role="option"]')) expect(it.parentElement.getAttribute('role') === 'listbox', 'an option outside of a list');
  for (const it of all('[role="listbox"]').filter((it) => it.checkVisibility())) expect(it.querySelectorAll('[tabindex="0"]').length === 1, 'a list without one stop of the tab key');
  for (const it of all('th')) expect(it.scope === 'col', 'a heading of no column');
  for (const it of all('[tabindex]')) expect(it.tabIndex <= 0, 'a tab index above 0');
  expect(all('[aria-live="polite"]').length === all('.viewer').length, 'a viewer says nothing');
  for (const it of all('*')) {
    const style = getComputedStyle(it);
    const scrolls = (['auto', 'scroll'].includes(style.overflowX) && it.scrollWidth > it.clientWidth + 1)
      || (['auto', 'scroll'].includes(style.overflowY) && it.scrollHeight > it.clientHeight + 1);
    expect(!scrolls || it.tabIndex === 0 || it.querySelector('[tabindex="0"]'), `the keyboard cannot scroll ${it.className}`);
  }
  return found;
}

const checks = {
  async 'text of others is text'() {
    const page = await open();
    assert.equal(await page.locator('img[src="x"], main script:not([type]), [onerror]').count(), 0);
    const text = await page.locator('body').innerText();
    for (const it of expected.texts) assert(text.includes(it), it);
    assert(!/[\u202a-\u202e\u2066-\u2069]/.test(await page.evaluate(() => document.body.textContent)), 'a mark of direction');
    assert.equal(await page.evaluate(() => window.evil), undefined);
    assert.deepEqual(await page.evaluate(() => window.violations), []);
    return page;
  },

  async 'the policy lets nothing else in'() {
    const page = await open({ quiet: false });
    await page.evaluate(() => {
      const script = document.createElement('script');
      // Text alone is refused before it runs; what passes as trusted is refused by its hash.
      try { script.text = 'window.evil = 1'; } catch { window.refused = true; }
      script.text = window.trustedTypes.createPolicy('test', { createScript: (text) => text }).createScript('window.evil = 1');
      document.body.append(script);
      const style = document.createElement('style');
      style.textContent = 'body { display: none }';
      document.head.append(style);
      const image = new Image();
      image.src = 'https://example.invalid/x.png';
      document.body.append(image);
    });
    await settled(page);
    assert.equal(await page.evaluate(() => window.evil), undefined);
    assert.equal(await page.evaluate(() => getComputedStyle(document.body).display), 'block');
    const violations = await page.evaluate(() => window.violations);
    assert.equal(await page.evaluate(() => window.refused), true);
    for (const it of ['script-src-elem', 'style-src-elem', 'img-src']) assert(violations.includes(it), `${it}: ${violations}`);
    return page;
  },

  async 'weights in the list are those that were given'() {
    const page = await open();
    for (const { hash, panels } of expected.lists) {
      await page.evaluate((hash) => { location.hash = hash; }, hash);
      await settled(page);
      for (const [i, panel] of panels.entries()) {
        if (panel === null) continue;
        const { tokens, weights } = panel;
        const found = await listed(page, i);
        assert.deepEqual(found.map((it) => it.token), tokens, hash);
        near(found.map((it) => it.weight), weights, expected.error, `${hash} panel ${i}`);
      }
    }
    return page;
  },

  async 'a click into the map picks the row and the column below it'() {
    const page = await open({ hash: '#s=0&m=0&l=1&h=1&t=0' });
    const { tokens } = expected.lists[0].panels[0];
    const n = tokens.length;
    for (const [row, at] of [[0, 0], [n - 1, 0], [5, 3], [n - 1, n - 1], [2, 6]]) {
      const { x, y } = await clickCell(page, row, at, [n, n]);
      assert.equal(await chosenToken(page), tokens[row]);
      const list = await listed(page);
      assert.equal(list.findIndex((it) => it.chosen), at);
      assert.equal(list[at].color, await pixel(page, 0, row, at), 'the colours of list and map');
      assert.deepEqual([state(page).t, state(page).k], [String(row), String(at)]);
      assert((await said(page)).includes(`token ${row} \u201c${tokens[row]}\u201d`), await said(page));
      const inside = await viewer(page).evaluate((root, [x, y]) => {
        const [row, column] = ['.row-mark', '.column-mark'].map((it) => root.querySelector(it).getBoundingClientRect());
        return row.top <= y && y <= row.bottom && column.left <= x && x <= column.right;
      }, [x, y]);
      assert(inside, `the marks of ${row}, ${at}`);
    }
    return page;
  },

  async 'a click into the list of weights picks that token'() {
    const page = await open({ hash: '#s=0&t=2' });
    await viewer(page).locator('.tokens .cell').nth(4).click();
    await settled(page);
    assert.equal(state(page).t, '4');
    assert.equal(await chosenToken(page), expected.lists[0].panels[0].tokens[4]);
    return page;
  },

  async 'the brightest cell is the largest weight'() {
    const page = await open({ hash: '#s=0&m=0&l=1&h=1&t=0' });
    const { largest } = expected;
    const found = await viewer(page).locator('.map').first().evaluate((canvas) => {
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      const bright = (i) => data[4 * i] + data[4 * i + 1];
      const all = Array.from({ length: data.length / 4 }, (_, i) => i);
      const best = all.reduce((best, i) => (bright(i) > bright(best) ? i : best), 0);
      return [Math.floor(best / canvas.width), best % canvas.width];
    });
    assert.deepEqual(found, largest);
    return page;
  },

  async 'of many cells below a pixel the largest is seen'() {
    const page = await open();
    const canvas = viewer(page, 1).locator('.map').first();
    const found = await canvas.evaluate((canvas) => {
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      const bright = [];
      for (let i = 0; i < data.length; i += 4) if (data[i] > 200 && data[i + 1] > 200) bright.push([Math.floor(i / 4 / canvas.width), i / 4 % canvas.width]);
      return { bright, size: [canvas.height, canvas.width] };
    });
    assert(found.size[0] < expected.many.n, `${found.size} pixels`);
    assert(found.bright.length >= 1 && found.bright.length <= 4, `${found.bright}`);
    const [row, column] = found.bright[0].map((at, i) => at / found.size[i] * expected.many.n);
    assert(Math.abs(row - expected.many.row) < 4 && Math.abs(column - expected.many.column) < 4, `${row} ${column}`);
    return page;
  },

  async 'keys pick tokens, columns and heads'() {
    const page = await open({ hash: '#s=0&m=0&l=0&h=0&t=3' });
    const { tokens } = expected.lists[0].panels[0];
    await viewer(page).locator('.rows [aria-selected="true"]').focus();
    const steps = [['ArrowDown', 4], ['ArrowDown', 5], ['ArrowUp', 4], ['Home', 0], ['ArrowUp', 0], ['End', tokens.length - 1]];
    for (const [key, at] of steps) {
      await page.keyboard.press(key);
      await settled(page);
      assert.equal(await chosenToken(page), tokens[at], key);
      assert.equal(await page.evaluate(() => document.activeElement.getAttribute('aria-selected')), 'true', 'focus goes along');
    }
    await page.keyboard.press('ArrowLeft');
    await page.keyboard.press('ArrowLeft');
    await settled(page);
    assert.equal((await listed(page)).findIndex((it) => it.chosen), tokens.length - 2);
    await page.keyboard.press('Escape');
    await settled(page);
    assert.equal(state(page).k, undefined);
    await viewer(page).locator('.heads [tabindex="0"]').focus();
    await page.keyboard.press('ArrowRight');
    await settled(page);
    assert.equal(state(page).h, '1');
    assert.equal(await select(page, 'Head').inputValue(), '1');
    return page;
  },

  async 'each chooser changes what is shown'() {
    const page = await open();
    const before = await said(page);
    await select(page, 'Layer').selectOption('1');
    await settled(page);
    assert.notEqual(await said(page), before);
    assert.equal(await viewer(page).locator('.side .note:visible').innerText(), expected.note);
    await viewer(page).locator('.heads [role="option"]').nth(1).click();
    await settled(page);
    assert((await said(page)).includes('head 1'));
    await select(page, 'Head').selectOption('mean');
    await settled(page);
    assert((await said(page)).includes('mean of heads'));
    assert.equal(await viewer(page).locator('.heads [aria-selected="true"]').count(), 0);
    await select(page, 'Compare with').selectOption('1');
    await settled(page);
    assert.equal(await viewer(page).locator('.panel:visible').count(), 3);
    await select(page, 'Compare with').selectOption('2');
    await settled(page);
    assert((await viewer(page).locator('.panel').nth(2).innerText()).includes('tokens of the two models differ'));
    await select(page, 'Head').selectOption('1');
    await settled(page);
    assert((await viewer(page).locator('.panel').nth(1).innerText()).includes('has no head 1'));
    await select(page, 'Compare with').selectOption('');
    await select(page, 'Sample').selectOption('1');
    await settled(page);
    assert.equal(await viewer(page).locator('.panel:visible').count(), 1);
    assert.equal((await listed(page)).length, expected.crossColumns);
    return page;
  },

  async 'a second sample stands beside the first, with tokens of its own'() {
    const page = await open({ hash: '#s=0&m=0&l=1&h=1&t=7' });
    const sides = viewer(page).locator('.side:visible');
    const maps = viewer(page).locator('.map:visible');
    const before = await said(page);
    assert.deepEqual([await sides.count(), await maps.count()], [1, 1]);
    assert.deepEqual(await select(page, 'Beside').locator('option').allTextContents(), ['none', 'two texts', 'six tokens', 'as many']);
    assert.equal(await select(page, 'Beside').inputValue(), '');

    await select(page, 'Sample').focus();
    await press(page, 'Tab', 'ArrowDown', 'ArrowDown');
    assert.equal(state(page).b, '2', 'the keyboard chooses it');
    assert.deepEqual([await sides.count(), await maps.count()], [2, 2]);
    assert.deepEqual(await viewer(page).locator('h4:visible').allTextContents(), ['before on a fox', 'before on six tokens']);
    for (const [i, name, n] of [[0, 'a fox', 10], [1, 'six tokens', 6]]) {
      assert.equal(await side(page, i).getAttribute('aria-label'), `Sample ${name}`);
      assert.deepEqual(await side(page, i).locator('.note:visible').allTextContents(), [`${name}: ${n} tokens`, expected.note]);
      assert.equal(await side(page, i).locator('.rows [role="option"]').count(), n);
      assert.equal((await listed(page, 3 * i)).length, n);
      assert.deepEqual(await maps.nth(i).evaluate((canvas) => [canvas.width, canvas.height]), [n, n]);
    }
    const [one, other] = await maps.evaluateAll((all) => all.map((it) => it.getBoundingClientRect().toJSON()));
    assert(other.left > one.right && Math.abs(other.top - one.top) < 1, `${JSON.stringify([one, other])} are side by side`);
    assert(one.width > 200 && Math.abs(other.width - one.width) < 1, `${one.width} ${other.width}`);

    // The keys of each list pick in its own sample.
    await side(page, 1).locator('.rows [tabindex="0"]').focus();
    await press(page, 'ArrowUp', 'ArrowUp', 'ArrowLeft', 'ArrowLeft');
    const [t, u, k, v] = ['t', 'u', 'k', 'v'].map((key) => state(page)[key]);
    assert.deepEqual([t, u, k, v], ['7', '3', undefined, '2']);
    assert.deepEqual((await Promise.all([0, 3].map((i) => listed(page, i)))).map((list) => list.findIndex((it) => it.chosen)), [-1, 2]);
    const { tokens } = expected.lists[0].panels[0];
    assert.deepEqual([await chosenToken(page, 0), await chosenToken(page, 1)], [tokens[7], tokens[3]]);
    const words = (await said(page)).split(/\n+/);
    assert(words[0].startsWith('before on a fox, layer 1, head 1: token 7 '), words[0]);
    assert(words[1].startsWith('before on six tokens, layer 1, head 1: token 3 '), words[1]);
    await clickCell(page, 5, 1, [6, 6], 3);
    assert.deepEqual([state(page).t, state(page).u, state(page).v], ['7', '5', '1']);

    const again = await open({ hash: new URL(page.url()).hash });
    assert.equal(await said(again), await said(page), 'the address restores both');
    await again.context().close();

    await select(page, 'Colours span').selectOption('the token');
    await settled(page);
    assert((await viewer(page).innerText()).includes('All maps have one scale of colours.'));
    const weights = (await Promise.all([0, 3].map((i) => listed(page, i)))).flat().map((it) => it.weight);
    for (const i of [0, 1]) {
      const ends = await side(page, i).locator('.legend:visible span').allTextContents();
      assert.deepEqual(ends.map(Number), [Math.min(...weights), Math.max(...weights)], 'two samples have the colours of one range');
    }

    await select(page, 'Colours span').selectOption('the map');
    await select(page, 'Beside').selectOption('none');
    await settled(page);
    assert.deepEqual([await sides.count(), await maps.count()], [1, 1]);
    assert.equal(new URL(page.url()).hash, '#s=0&m=0&l=1&h=1&t=7');
    assert.equal(await said(page), before);
    return page;
  },

  async 'of samples with as many tokens one is picked in both, of both models'() {
    const page = await open({ hash: '#s=0&b=3&m=0&c=1&l=0&h=2&t=5' });
    const on = (sample) => ['before', 'after', 'after \u2212 before'].map((name) => `${name} on ${sample}`);
    assert.deepEqual(await viewer(page).locator('h4:visible').allTextContents(), [...on('a fox'), ...on('as many')]);
    await side(page, 1).locator('.rows [tabindex="0"]').focus();
    await press(page, 'ArrowDown');
    assert.deepEqual([state(page).t, state(page).u], ['6', undefined]);
    const { tokens } = expected.lists[0].panels[0];
    assert.deepEqual([await chosenToken(page, 0), await chosenToken(page, 1)], [tokens[6], tokens[3]]);
    await clickCell(page, 8, 2, [10, 10], 3);
    const chosen = await Promise.all([0, 1, 2, 3, 4, 5].map((i) => listed(page, i)));
    assert.deepEqual(chosen.map((list) => list.findIndex((it) => it.chosen)), [2, 2, 2, 2, 2, 2]);
    const legends = await viewer(page).locator('.legend:visible').allInnerTexts();
    assert.deepEqual(legends.slice(0, 3), legends.slice(3), 'one range for maps, one for differences');
    // The sample beside becomes the first: it is not beside itself.
    await select(page, 'Sample').selectOption('3');
    await settled(page);
    assert.equal(await viewer(page).locator('.side:visible').count(), 1);
    assert.equal(await select(page, 'Beside').inputValue(), '');
    return page;
  },

  async 'what the second sample lacks is said in its place'() {
    const cases = [
      ['#s=0&b=1&m=0&l=0&h=0', ['two texts has no model before.'], 0],
      ['#s=0&b=2&m=0&l=1&h=2', ['before on six tokens has no head 2 in layer 1.'], 6],
      ['#s=0&b=2&m=1&l=1&h=0', ['after on six tokens has no layer 1.'], 6],
      ['#s=0&b=2&m=2&c=0&l=0&h=0&t=3', [`six tokens has no model ${expected.texts[0]}.`, 'There is no difference to show.'], 6],
    ];
    for (const [hash, missing, n] of cases) {
      const page = await open({ hash });
      assert.deepEqual(await side(page, 1).locator('.trouble:visible').allTextContents(), missing, hash);
      assert.equal(await side(page, 1).locator('.map:visible').count(), missing.length - 1, hash);
      assert.equal(await side(page, 0).locator('.map').first().isVisible(), true, hash);
      assert.equal(await side(page, 1).locator('.rows [role="option"]:visible').count(), n, hash);
      assert((await said(page)).includes(missing[0]), hash);
      assert.deepEqual(await page.evaluate(faults), [], hash);
      await page.context().close();
    }
  },

  async 'colours span the map or the token'() {
    const page = await open({ hash: '#s=0&m=0&l=1&h=1&t=7' });
    const ends = () => viewer(page).locator('.panel').first().locator('.legend span').allTextContents();
    assert.deepEqual((await ends()).map(Number), [0, 1]);
    await select(page, 'Colours span').selectOption('the token');
    await settled(page);
    const list = await listed(page);
    const weights = list.map((it) => it.weight);
    assert.deepEqual((await ends()).map(Number), [Math.min(...weights), Math.max(...weights)]);
    const largest = weights.indexOf(Math.max(...weights));
    assert.equal(list[largest].color, 'rgb(253, 231, 37)');
    assert.equal(list[largest].color, await pixel(page, 0, 7, largest));
    assert.equal(state(page).r, '1');
    await select(page, 'Compare with').selectOption('1');
    await settled(page);
    const both = await Promise.all([0, 1].map((i) => listed(page, i)));
    const most = Math.max(...both.flat().map((it) => it.weight));
    for (const i of [0, 1]) {
      const end = viewer(page).locator('.panel').nth(i).locator('.legend span').last();
      assert.equal(Number(await end.textContent()), most, 'two models have the colours of one range');
    }
    return page;
  },

  async 'zero is in the middle of the colours of a difference'() {
    const page = await open({ hash: '#s=0&m=0&c=1&l=0&h=0&t=5' });
    const ends = await viewer(page).locator('.panel').nth(2).locator('.legend span').allTextContents();
    assert.equal(ends[0].replace('\u2212', ''), ends[1]);
    const list = await listed(page, 2);
    const above = list.findIndex((it) => it.weight === 0);
    const middle = await viewer(page).locator('.panel').nth(2).locator('.colors').evaluate((canvas) => [...canvas.getContext('2d').getImageData(127, 0, 1, 1).data.slice(0, 3)]);
    assert.equal(list[above].color, `rgb(${middle.join(', ')})`);
    const ranges = await Promise.all([0, 1].map((i) => viewer(page).locator('.panel').nth(i).locator('.legend').innerText()));
    assert.equal(ranges[0], ranges[1], 'two models have the colours of one range');
    return page;
  },

  async 'the five largest are said in order'() {
    const page = await open({ hash: '#s=0&m=0&l=1&h=1&t=7' });
    const list = await listed(page);
    const top = list.map(({ weight }, i) => [weight, i]).sort((a, b) => b[0] - a[0]).slice(0, 5).map(([, i]) => i);
    const found = [...(await said(page)).matchAll(/\((\d+)\) [\d.]+/g)].map((it) => Number(it[1]));
    assert.deepEqual(found, top);
    return page;
  },

  async 'the address restores what was shown'() {
    const page = await open();
    await select(page, 'Layer').selectOption('1');
    await select(page, 'Head').selectOption('1');
    await clickCell(page, 7, 3, [10, 10]);
    const [address, words] = [new URL(page.url()).hash, await said(page)];
    assert.equal(address, '#s=0&m=0&l=1&h=1&t=7&k=3');
    const again = await open({ hash: address });
    assert.equal(await said(again), words);
    for (const bad of ['#s=0&b=0&u=99&v=99', '#s=0&b=2&u=99&v=99&t=99', '#s=0&b=mean&u=mean', '#s=99&b=99&m=7&l=88&h=77&t=66&k=55&c=44', '#s=-1&t=x&h=&m=<b>', '#section-1']) {
      const page = await open({ hash: bad });
      assert((await said(page)).includes('token'), bad);
      await page.context().close();
    }
    await viewer(again, 1).locator('.rows [role="option"]').nth(2).click();
    await settled(again);
    assert.deepEqual([state(again).t, state(again).t1], ['7', '2'], 'two viewers in one address');
    await again.context().close();
    return page;
  },

  async 'tables sort by number and by word, empty cells last'() {
    const page = await open();
    const heads = page.locator('table').first().locator('th');
    const press = async (i) => { await heads.nth(i).getByRole('button').click(); };
    await press(1);
    assert.deepEqual(await column(page, 0, 0), expected.sorted.up);
    assert.equal(await heads.nth(1).getAttribute('aria-sort'), 'ascending');
    await press(1);
    assert.deepEqual(await column(page, 0, 0), expected.sorted.down);
    assert.equal(await heads.nth(1).getAttribute('aria-sort'), 'descending');
    await heads.nth(0).getByRole('button').focus();
    await page.keyboard.press('Enter');
    assert.deepEqual(await column(page, 0, 0), expected.sorted.words);
    assert.deepEqual([await heads.nth(0).getAttribute('aria-sort'), await heads.nth(1).getAttribute('aria-sort')], ['ascending', null]);
    return page;
  },

  async 'the tab key reaches everything in order, and shows where it is'() {
    const page = await open({ hash: '#s=0&b=2&m=0&c=1&l=0&h=0&t=5' });
    await page.evaluate(() => { scrollTo(0, 0); });
    const wanted = await page.evaluate(() => {
      const stops = [...document.querySelectorAll('a[href], button, select, summary, [tabindex="0"]')].filter((it) => it.checkVisibility());
      stops.forEach((it, i) => { it.dataset.stop = i; });
      return stops.length;
    });
    for (let i = 0; i < wanted; i++) {
      await page.keyboard.press('Tab');
      const at = await page.evaluate(() => {
        const style = getComputedStyle(document.activeElement);
        return { stop: document.activeElement.dataset.stop, outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2, what: document.activeElement.outerHTML.slice(0, 100) };
      });
      assert.equal(at.stop, String(i), `stop ${i} of ${wanted}: ${at.what}`);
      assert(at.outline, `no ring around ${at.what}`);
    }
    await page.locator('.skip').focus();
    assert((await page.locator('.skip').boundingBox()).x >= 0);
    await page.keyboard.press('Enter');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'main');
    return page;
  },

  async 'names, landmarks, headings and contrast, light and dark'() {
    for (const colorScheme of ['light', 'dark']) {
      const page = await open({ colorScheme, hash: '#s=0&b=2&m=0&c=1&l=0&h=0&t=5&k=2' });
      await page.locator('details').evaluateAll((all) => all.forEach((it) => { it.open = true; }));
      assert.deepEqual(await page.evaluate(faults), []);
      const { bad, n } = await page.evaluate(lowContrast);
      assert(n > 80, `${n} texts`);
      assert.deepEqual(bad, [], colorScheme);
      await page.context().close();
    }
  },

  async 'dark and light follow the system and the button, pictures too'() {
    const page = await open({ colorScheme: 'dark', hash: '#s=0&m=0&c=1&l=0&h=0&t=5' });
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const seen = () => page.locator('figure img:visible').first().getAttribute('class');
    const zero = () => pixel(page, 2, 0, 9);
    assert.deepEqual([await ground(), await seen()], ['rgb(22, 24, 28)', 'on-dark']);
    assert.equal(await zero(), 'rgb(36, 39, 44)');
    await page.getByRole('button', { name: 'Light colours' }).click();
    await settled(page);
    assert.deepEqual([await ground(), await seen()], ['rgb(255, 255, 255)', 'on-light']);
    assert.equal(await zero(), 'rgb(247, 247, 247)');
    await page.getByRole('button', { name: 'Dark colours' }).click();
    assert.equal(await ground(), 'rgb(22, 24, 28)');
    await page.emulateMedia({ media: 'print' });
    assert.equal(await seen(), 'on-light', 'paper is light');
    assert.equal(await page.locator('nav').isVisible(), false);
    await settled(page);
    assert.equal(await zero(), 'rgb(247, 247, 247)');
    return page;
  },

  async 'nothing moves by itself where that is not wanted'() {
    const page = await open();
    const behavior = () => page.evaluate(() => getComputedStyle(document.documentElement).scrollBehavior);
    assert.equal(await behavior(), 'auto');
    await page.emulateMedia({ reducedMotion: 'no-preference' });
    assert.equal(await behavior(), 'smooth');
    return page;
  },

  async 'a phone scrolls down alone'() {
    for (const hash of ['', '#s=0&m=0&c=1&l=0&h=0&t=5&k=2', '#s=1', '#s=0&b=2&m=0&l=0&h=0']) {
      const page = await open({ viewport: { width: 360, height: 740 }, deviceScaleFactor: 2, hash });
      const width = await page.evaluate(() => { scrollTo(500, 0); return [document.documentElement.scrollWidth, scrollX]; });
      assert.deepEqual(width, [360, 0], hash);
      const boxes = await page.locator('.scroll, pre').evaluateAll((all) => all.filter((it) => it.scrollWidth > it.clientWidth).length);
      assert(boxes >= 3, `${boxes} boxes scroll`);
      const sides = await viewer(page).locator('.side:visible').evaluateAll((all) => all.map((it) => it.getBoundingClientRect().toJSON()));
      assert.equal(sides.length, hash.includes('&b=') ? 2 : 1);
      if (sides[1]) assert(sides[1].top >= sides[0].bottom && sides[1].left === sides[0].left, 'samples stand below each other');
      await page.context().close();
    }
  },

  async 'it says what it cannot do'() {
    const old = await open({ before: () => { delete window.DecompressionStream; } });
    await old.waitForSelector('.viewer [role="alert"]');
    assert((await viewer(old).innerText()).includes('DecompressionStream'));
    await old.context().close();
    const page = await open({ javaScriptEnabled: false });
    assert(await page.getByText('did not run').isVisible());
    assert((await column(page, 0, 0)).length > 2);
    return page;
  },

  async 'pictures of it are taken'() {
    for (const colorScheme of ['light', 'dark']) {
      const page = await open({ colorScheme, hash: '#s=0&m=0&c=1&l=1&h=1&t=7&k=3' });
      await viewer(page).locator('.stage').screenshot({ path: path.join(folder, `viewer-${colorScheme}.png`) });
      await page.evaluate(() => { scrollTo(0, 0); });
      await page.screenshot({ path: path.join(folder, `page-${colorScheme}.png`) });
      await page.context().close();
    }
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks).filter(([name]) => name.includes(word))) {
  noise.length = 0;
  const start = performance.now();
  try {
    const page = await check();
    await page?.context().close();
    assert.deepEqual(noise, []);
    console.log(`ok      ${name} (${((performance.now() - start) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.stack}\n`);
  }
}
await browser.close();
process.exitCode = failed > 0 ? 1 : 0;
