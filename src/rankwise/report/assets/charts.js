// Line charts, by uPlot: losses and quality over steps, devices over time.
'use strict';

const LINE_COLORS = ['--c-blue', '--c-vermilion', '--c-green', '--c-orange', '--c-pink', '--c-sky', '--ink', '--c-gray'];
const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 3], [2, 5], [9, 2, 2, 2, 2, 2]];
const charts = [];

/**
 * One chart. Its values are read with the mouse, or with the arrow keys once it has the focus.
 * @param {object} options
 *   title, unit; x: ascending numbers; lines: {label, values, width}; xText(x): how a place is called;
 *   range: {min, max} that the y axis has to show; isLinked: whether it shows the steps that the picture shows; sync: charts with one cursor.
 */
function makeChart({ title, unit = '', x, lines, xText, range = {}, isLinked = false, sync, height = 170, increments }) {
  const said = el('span', { class: 'said' });
  const plot = el('div', { class: 'plot', tabindex: 0, role: 'img', 'aria-label': describe(title, unit, x, lines, xText) });
  const figure = el('figure', { class: 'chart' }, el('figcaption', {}, el('strong', {}, title), unit ? el('span', { class: 'unit' }, ` ${unit}`) : null, said), plot);
  const isOne = lines.length === 1;
  const axis = extra => ({
    stroke: () => color('--ink-soft'), font: canvasFont(),
    grid: { stroke: () => color('--line'), width: 1 }, ticks: { stroke: () => color('--line'), width: 1, size: 4 }, ...extra,
  });
  const told = (u, at) => u.series.slice(1).filter(series => series.show)
    .map((series, index) => ({ series, value: u.data[u.series.indexOf(series)][at], index }))
    .filter(({ value }) => isNumber(value));
  const options = {
    width: 300, height, legend: { show: false }, padding: [8, 22, 0, 0], focus: { alpha: 0.15 },
    scales: { x: { time: false }, y: { range: (u, low, high) => yRange(u.logScale, range, low, high), distr: 1 } },
    axes: [
      axis({ size: 28, values: (u, splits) => splits.map(xText), space: 70, ...(increments && { incrs: increments }) }),
      axis({ size: 56, values: (u, splits) => splits.map(value => value === null ? '' : number(value)), space: 34 }),
    ],
    cursor: { sync: sync ? { key: sync, setSeries: false } : undefined, drag: { x: true, y: false, setScale: !isLinked }, points: { size: 6 } },
    series: [{}, ...lines.map((line, at) => ({
      label: line.label, stroke: () => color(line.color || LINE_COLORS[at % LINE_COLORS.length]), width: line.width || 1.5,
      dash: isOne ? [] : line.dash || DASHES[at % DASHES.length], points: { show: line.values.filter(isNumber).length < 3 },
    }))],
    hooks: {
      setCursor: [u => {
        const at = u.cursor.idx;
        said.replaceChildren();
        if (at === null || at === undefined) return;
        const values = told(u, at);
        if (values.length) said.append(`${xText(u.data[0][at])}: ${readOut(values.length > 1 && u.stressed ? values.filter(({ series }) => series === u.stressed) : values, isOne)}`);
      }],
      setSelect: [u => {
        if (isLinked && shared.heat && u.select.width > 4) {
          const [from, to] = [u.select.left, u.select.left + u.select.width].map(left => u.posToVal(left, 'x'));
          u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          showSteps(shared.heat, from, to);
        }
      }],
    },
  };
  const u = new uPlot(options, [x, ...lines.map(line => line.values)], plot);
  u.logScale = false;
  plot.addEventListener('keydown', event => { if (readByKey(u, event.key, said)) event.preventDefault(); });
  plot.addEventListener('blur', () => u.setCursor({ left: -10, top: -10 }));
  if (isLinked) {
    plot.addEventListener('dblclick', () => shared.heat && showSteps(shared.heat, shared.heat.first, shared.heat.last));
    shared.view.listen(view => u.setScale('x', stepRange(view)));
  }
  charts.push({ u, plot, height });
  return { figure, u };
}

/** The steps that a chart shows: those of the picture, and where that shows its first or last, whatever was logged beyond. */
function stepRange({ from, to }) {
  const { first, last } = shared.heat, logged = shared.data.metrics.filter(metric => metric.steps.length);
  return {
    min: from > first ? from : Math.min(from, ...logged.map(metric => metric.steps[0])),
    max: to < last ? to : Math.max(to, ...logged.map(metric => metric.steps[metric.steps.length - 1])),
  };
}

/** The values under the cursor; of many lines the extremes. */
function readOut(values, isOne) {
  const told = ({ series, value }) => isOne ? number(value) : `${series.label} ${number(value)}`;
  if (values.length <= 3) return values.map(told).join(', ');
  const ordered = [...values].sort((a, b) => a.value - b.value);
  return `${told(ordered[0])} to ${told(ordered[ordered.length - 1])}`;
}

/** What the chart shows, for who does not see it. */
function describe(title, unit, x, lines, xText) {
  const known = lines.flatMap(line => line.values.filter(isNumber));
  if (!known.length) return `${title}: no finite values`;
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  return `${title}, ${lines.length > 1 ? `${lines.length} lines, ` : ''}from ${xText(x[0])} to ${xText(x[x.length - 1])}: lowest ${number(low)}, highest ${number(high)} ${unit}. Arrow keys read values.`;
}

function yRange(isLog, range, low, high) {
  if (!isNumber(low) || !isNumber(high)) return [range.min ?? 0, range.max ?? 1];
  if (isLog) return uPlot.rangeLog(low > 0 ? low : 1e-6, high > 0 ? high : 1, 10, false);
  const bottom = Math.min(low, range.min ?? Infinity), top = Math.max(high, range.max ?? -Infinity);
  const margin = (top - bottom || Math.abs(top) || 1) * 0.05;
  return [range.min !== undefined && bottom === range.min ? bottom : bottom - margin, top + margin];
}

function readByKey(u, key, said) {
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity };
  if (!(key in moves)) return false;
  const [first, last] = u.series[0].idxs, now = u.cursor.idx ?? (moves[key] > 0 ? first - 1 : last + 1);
  const at = Math.min(Math.max(now + moves[key], first), last);
  u.setCursor({ left: u.valToPos(u.data[0][at], 'x'), top: u.over.clientHeight / 2 });
  announce(said.textContent);
  return true;
}

/** As wide as there is room, again when that changes. */
function fitCharts() {
  const widths = charts.map(({ plot }) => plot.clientWidth);  // all are read before one is set: the page is laid out once
  charts.forEach(({ u, height }, at) => {
    const width = widths[at];
    if (width > 0 && width !== u.width) u.setSize({ width, height });
  });
}

function recolorCharts() { for (const { u } of charts) u.redraw(false, true); }

/** Values as uPlot wants them: null where there is none, which is a gap. */
const plain = values => Array.from(values, value => Number.isFinite(value) ? value : null);

function buildMetrics(data) {
  if (!data.metrics.length) return null;
  const stepText = value => `${integer(value)}`;
  const made = data.metrics.map(metric => makeChart({
    title: metric.name, x: Array.from(metric.steps), lines: [{ label: metric.name, values: plain(metric.values) }],
    xText: stepText, isLinked: true, sync: 'steps', unit: metric.notFinite ? `${integer(metric.notFinite)} not finite` : '',
  }));
  const log = el('input', { type: 'checkbox', id: 'log-scale', onchange: () => setLog(made.map(chart => chart.u), log.checked) });
  const thinned = data.metrics.filter(metric => metric.steps.length < metric.logged);
  return el('div', {},
    el('p', { class: 'controls' }, el('label', { for: 'log-scale' }, log, ' logarithmic'),
      el('span', { class: 'hint' }, 'Drag to zoom, double click for all steps.',
        thinned.length ? ` Thinned from up to ${integer(Math.max(...thinned.map(metric => metric.logged)))} points; each lowest and highest is kept.` : '')),
    el('div', { class: 'grid' }, ...made.map(chart => chart.figure)));
}

/** Where a value is not positive its chart stays as it is. */
function setLog(all, isLog) {
  for (const u of all) {
    const values = u.data[1].filter(isNumber);
    u.logScale = isLog && values.length > 0 && values.every(value => value > 0);
    u.scales.y.distr = u.logScale ? 3 : 1;
    u.scales.y.log = 10;
    u.setData(u.data, true);
    if (shared.view.value) u.setScale('x', stepRange(shared.view.value));
  }
}
