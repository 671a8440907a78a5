// What each device said over time: a node's ranks as lines, or all ranks as the middle one between the extremes.
'use strict';

/** Where a line has no number for a moment it goes on; for longer it has a gap. */
function bridged(values, most = 2) {
  const found = plain(values);
  for (let at = 0; at < found.length; at++) {
    if (found[at] !== null) continue;
    let end = at;
    while (end < found.length && found[end] === null) end++;
    if (end - at <= most && at > 0 && end < found.length) found.fill(undefined, at, end);
    at = end;
  }
  return found;
}

const TIME_INCREMENTS = [1e-3, 0.01, 0.1, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800];

function buildDevices(data) {
  const { devices, ranks } = data;
  if (!devices) return null;
  const width = devices.seconds / devices.buckets || 1;
  // Each part of the time has two values, in the order they came in.
  const x = Array.from({ length: devices.buckets * 2 }, (_, at) => (Math.floor(at / 2) + (at % 2 ? 0.75 : 0.25)) * width);
  const holder = el('div', { class: 'grid' });
  const name = node => {
    const host = ranks.host[node.places[0]];
    return `node ${node.node}${host ? `: ${host}` : ''}`;
  };
  const choice = el('select', { id: 'node', onchange: () => show(choice.value) },
    el('option', { value: 'all' }, 'all ranks: lowest, middle, highest'),
    ...devices.nodes.map((node, at) => el('option', { value: at }, name(node))));
  const key = el('p', { class: 'keys' });
  let own = [];

  function linesOf(which, reading) {
    if (which === 'all') {
      const { low, middle, high } = devices.all[reading];
      return [['highest', high, 1, '--c-vermilion', [2, 2]], ['middle', middle, 2, '--c-blue', []], ['lowest', low, 1, '--c-green', [7, 3]]]
        .map(([label, values, thick, shade, dash]) => ({ label, values: bridged(values), width: thick, color: shade, dash }));
    }
    const node = devices.nodes[which];
    return node.places.map((place, at) => ({
      place, label: `rank ${ranks.rank[place]}`, values: node.lines[reading][at] ? bridged(node.lines[reading][at]) : x.map(() => null),
      color: LINE_COLORS[at % LINE_COLORS.length], dash: DASHES[at % DASHES.length],
    }));
  }

  function show(which) {
    for (const { chart } of own) { charts.splice(charts.findIndex(known => known.u === chart.u), 1); chart.u.destroy(); }
    own = devices.readings.map((reading, at) => ({ at, lines: linesOf(which, at) }))
      .filter(({ lines }) => lines.some(line => line.values.some(isNumber)))
      .map(({ at, lines }) => {
        const reading = devices.readings[at];
        const range = reading.name === 'utilisation_percent' ? { min: 0, max: 100 } : reading.name.includes('temperature') || reading.name.includes('clock') ? {} : { min: 0 };
        return { lines, chart: makeChart({ title: reading.label, unit: reading.unit === 'C' ? '\u00b0C' : reading.unit, x, lines, xText: seconds, range, sync: 'time', increments: TIME_INCREMENTS }) };
      });
    holder.replaceChildren(...own.map(({ chart }) => chart.figure));
    const called = line => which === 'all' ? line.label : `${line.label}${ranks.local_rank[line.place] === null ? '' : ` (local ${ranks.local_rank[line.place]})`}`;
    key.replaceChildren(...(own.length ? own[0].lines : []).map((line, at) =>
      el('button', { type: 'button', class: 'key', 'aria-pressed': 'false', title: 'show this line before the others', onclick: () => stress(at) }, dashSwatch(line), called(line))));
    hideOthers();
    fitCharts();
  }

  /** One line before the others; the same again, all alike. */
  function stress(at) {
    const isNew = key.children[at].getAttribute('aria-pressed') !== 'true';
    [...key.children].forEach((button, index) => button.setAttribute('aria-pressed', String(isNew && index === at)));
    for (const { chart } of own) {
      chart.u.stressed = isNew ? chart.u.series[at + 1] : null;
      chart.u.setSeries(isNew ? at + 1 : null, { focus: isNew });
    }
  }

  /** Lines of ranks that are not chosen are not drawn. */
  function hideOthers() {
    const chosen = shared.chosen.value;
    if (!chosen) return;
    for (const { chart, lines } of own) lines.forEach((line, at) => {
      const isShown = line.place === undefined || Boolean(chosen[line.place]);
      if (chart.u.series[at + 1].show !== isShown) chart.u.setSeries(at + 1, { show: isShown });
    });
    own[0]?.lines.forEach((line, at) => key.children[at].classList.toggle('off', line.place !== undefined && !chosen[line.place]));
  }

  shared.chosen.listen(chosen => {
    const isThere = node => node.places.some(place => chosen[place]);
    const now = devices.nodes[choice.value];
    const other = devices.nodes.findIndex(isThere);
    if (now && !isThere(now) && other >= 0) { choice.value = other; show(choice.value); } else hideOthers();
  });
  const suspect = devices.nodes.findIndex(node => node.places.some(place => data.suspects.includes(ranks.rank[place])));
  choice.value = devices.nodes.length ? Math.max(suspect, 0) : 'all';
  const left = devices.numNodes - devices.nodes.length;
  const element = el('div', {},
    el('p', { class: 'controls' }, el('label', { for: 'node' }, 'Show '), choice),
    el('p', { class: 'hint' }, 'Time begins with the first sample of each node.',
      devices.numThinned > devices.buckets * 2 ? ` Thinned from up to ${integer(devices.numThinned)} samples a rank; of each ${seconds(width)} the lowest and the highest value are kept.` : '',
      left > 0 ? ` ${integer(left)} of ${integer(devices.numNodes)} nodes are only in the lines of all ranks.` : ''),
    key, holder);
  return { element, show: () => show(choice.value) };
}

/** A short piece of the line, dashes and all. */
function dashSwatch(line) {
  const canvas = el('canvas', { class: 'dash', 'aria-hidden': 'true' });
  canvas.repaint = () => {
    const context = fit(canvas, 28, 10);
    context.strokeStyle = color(line.color);
    context.lineWidth = 2;
    context.setLineDash(line.dash);
    context.beginPath();
    context.moveTo(0, 5);
    context.lineTo(28, 5);
    context.stroke();
  };
  canvas.repaint();
  return canvas;
}
