// What every other part uses: the data, small helpers, and what the parts share (shown steps, chosen ranks, theme).
'use strict';

const TYPES = { u8: Uint8Array, u16: Uint16Array, i32: Int32Array, f32: Float32Array, seconds: Uint16Array, f16: Uint16Array };

// Seconds come in 16 bits, equal steps in the logarithm: 0 is none, 1 no time. See quantise() in arrays.py.
const SECONDS = new Float32Array(65536);
SECONDS[0] = NaN;
for (let q = 2; q < 65536; q++) SECONDS[q] = 1e-6 * Math.exp((q - 1) / 65534 * Math.log(1e10));

// Numbers of 16 bits, as IEEE 754 lays them out.
const HALVES = new Float32Array(65536);
for (let h = 0; h < 65536; h++) {
  const sign = h & 0x8000 ? -1 : 1, exponent = h >> 10 & 31, part = h & 1023;
  if (exponent === 31) HALVES[h] = part ? NaN : sign * Infinity;
  else HALVES[h] = sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : part * 2 ** -24);
}

// A plain loop: the `from` of typed arrays calls a function for each number, which takes ten times as long.
function lookedUp(table, places) {
  const found = new Float32Array(places.length);
  for (let at = 0; at < places.length; at++) found[at] = table[places[at]];
  return found;
}

/** The object that Packer.pack wrote, with its arrays in place of what stood for them. */
async function unpack(text) {
  const letters = atob(text), packed = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) packed[at] = letters.charCodeAt(at);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)), (_, value) => {
    if (!value || typeof value.$ !== 'string' || !TYPES[value.$]) return value;  // a log may have a level called "$"
    const array = new TYPES[value.$](buffer, 4 + length + value.at, value.n);
    return value.$ === 'seconds' ? lookedUp(SECONDS, array) : value.$ === 'f16' ? lookedUp(HALVES, array) : array;
  });
}

const $ = id => document.getElementById(id);

/** An element. Text only ever goes in as text: nothing that a log says becomes markup. */
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (key === 'style') Object.assign(made.style, value);
    else made.setAttribute(key, value === true ? '' : value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

/** Tells those who listen that something changed. */
class Shared {
  constructor(value) { this.value = value; this.listeners = []; }
  listen(listener) { this.listeners.push(listener); }
  set(value) { this.value = value; for (const listener of this.listeners) listener(value); }
}

const shared = {
  view: new Shared(null),        // {from, to}: the steps that are shown, both included
  chosen: new Shared(null),      // Uint8Array over ranks: 1 where the rank is shown
  theme: new Shared('light'),
};

/** What a CSS variable says now: canvases draw in the colours of the theme. */
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const NUMBER = new Intl.NumberFormat('en-US', { maximumSignificantDigits: 3 });
const INTEGER = new Intl.NumberFormat('en-US');
const isNumber = value => typeof value === 'number' && Number.isFinite(value);

/** Seconds as a person reads them: "12.3 ms", "1.2 s", "2 h 05 min". */
function seconds(value) {
  if (!isNumber(value)) return '\u2013';
  if (value < 9.995e-4) return value === 0 ? '0' : `${NUMBER.format(value * 1e6)} \u00b5s`;
  if (value < 0.9995) return `${NUMBER.format(value * 1e3)} ms`;
  if (value < 119.5) return `${NUMBER.format(value)} s`;
  const whole = Math.round(value);
  const pad = number => String(number).padStart(2, '0');
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole % 3600 / 60), whole % 60];
  if (hours) return minutes ? `${hours} h ${pad(minutes)} min` : `${hours} h`;
  return rest ? `${minutes} min ${pad(rest)} s` : `${minutes} min`;
}

const number = value => isNumber(value) ? NUMBER.format(value) : '\u2013';
const integer = value => isNumber(value) ? INTEGER.format(value) : '\u2013';
const percent = value => isNumber(value) ? `${NUMBER.format(value * 100)} %` : '\u2013';

/** Neighbours as ranges, at most so many: "0-3, 7, 9-12". */
function ranksAsText(ranks, most = 8) {
  const runs = [];
  for (const rank of [...ranks].sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && rank === last[1] + 1) last[1] = rank; else if (!last || rank !== last[1]) runs.push([rank, rank]);
  }
  const texts = runs.slice(0, most).map(([a, b]) => a === b ? `${a}` : `${a}\u2013${b}`);
  return texts.join(', ') + (runs.length > most ? ', \u2026' : '');
}

/** UTC, as the logs write it. */
function moment(time) {
  if (!isNumber(time)) return '\u2013';
  const date = new Date(time * 1000);
  return Number.isNaN(date.getTime()) ? '\u2013' : date.toISOString().slice(0, 19).replace('T', ' ');
}

/** The font of canvases, which grows with the page's. */
const canvasFont = () => `${Math.round(parseFloat(getComputedStyle(document.documentElement).fontSize) * 0.75)}px system-ui, sans-serif`;

/** A canvas in the pixels of the screen; gives its context, scaled so that one is one CSS pixel. */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** Calls back at most once a frame, however often it is asked to. */
function perFrame(act) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; act(); });
  };
}

/** Round numbers for an axis between two values, about so many. */
function ticks(low, high, count, whole = false) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].find(factor => factor * power >= raw) * power;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
}

// One box for all tooltips; what it says is announced politely too.
const tooltip = {
  show(lines, x, y) {
    const box = $('tooltip');
    box.replaceChildren(...lines.map(line => typeof line === 'string' ? el('div', {}, line) : line));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? Math.max(4, x - width - 12) : x + 16;
    const top = y + 12 + height > innerHeight ? Math.max(4, y - height - 12) : y + 12;
    Object.assign(box.style, { left: `${left}px`, top: `${top}px` });
  },
  hide() { $('tooltip').hidden = true; },
};

/** For who cannot see what the cursor is on. */
function announce(text) { $('announcer').textContent = text; }
