// How each rank's steps are made up: a table whose first column is a bar.
'use strict';

// Okabe and Ito's colours, which people tell apart whatever their eyes; besides, each phase has a letter and a texture.
const PHASES = {
  data: ['#e69f00', 'D'], forward: ['#56b4e9', 'F'], backward: ['#0072b2', 'B'], optimizer: ['#009e73', 'O'],
  communication: ['#cc79a7', 'C'], checkpoint: ['#f0e442', 'K'], validation: ['#d55e00', 'V'], other: ['#9a9a9a', '\u00b7'],
};
const TEXTURES = {
  data: 'repeating-linear-gradient(45deg, #0003 0 3px, #0000 3px 7px)',
  communication: 'repeating-linear-gradient(-45deg, #0003 0 2px, #0000 2px 5px)',
  checkpoint: 'repeating-linear-gradient(90deg, #0002 0 2px, #0000 2px 6px)',
  validation: 'repeating-linear-gradient(0deg, #0002 0 2px, #0000 2px 5px)',
};
const MORE_COLORS = ['#785ef0', '#dc267f', '#648fff', '#fe6100'];
const LIGHT = new Set(['data', 'forward', 'communication', 'checkpoint', 'other']);

function phaseColor(phase) {
  if (PHASES[phase]) return PHASES[phase][0];
  let sum = 0;
  for (const letter of phase) sum += letter.codePointAt(0);
  return MORE_COLORS[sum % MORE_COLORS.length];
}

const phaseLetter = phase => PHASES[phase] ? PHASES[phase][1] : (phase[0] || '?').toLowerCase();

function phaseSwatch(phase) {
  return el('span', { class: 'key' },
    el('span', { class: `swatch big${LIGHT.has(phase) ? ' light' : ''}`, 'aria-hidden': 'true', style: { backgroundColor: phaseColor(phase), backgroundImage: TEXTURES[phase] || 'none' } }, phaseLetter(phase)), phase);
}

/** A bar: each phase as wide as its share of the longest mean step. */
function phaseBar(row, phases, longest) {
  const parts = phases.map((phase, at) => {
    const value = row.phases[at];
    if (!(value > 0)) return null;
    const share = value / longest;
    return el('span', {
      class: `part${LIGHT.has(phase) ? ' light' : ''}`, title: `${phase} ${seconds(value)} (${percent(value / row.mean)})`,
      style: { width: `${(share * 100).toFixed(3)}%`, backgroundColor: phaseColor(phase), backgroundImage: TEXTURES[phase] || 'none' },
    }, share > 0.06 ? phaseLetter(phase) : '');
  });
  const told = phases.map((phase, at) => `${phase} ${percent(row.phases[at] / row.mean)}`).join(', ');
  return el('div', { class: 'bar', role: 'img', 'aria-label': told }, ...parts);
}

function rankRows(data) {
  const { work, ranks } = data, num = work.phases.length;
  return Array.from(ranks.rank, (rank, place) => ({
    place, rank, node: ranks.node[place], host: ranks.host[place], local_rank: ranks.local_rank[place],
    steps: work.numSteps[place], mean: work.mean[place], median: work.median[place], own: work.own[place], worst: work.worst[place], worstStep: work.worstStep[place],
    phases: Array.from({ length: num }, (_, at) => work.seconds[place * num + at]),
  }));
}

function buildPhases(data) {
  const { work, heat } = data, rows = rankRows(data).filter(row => row.steps > 0);
  if (!rows.length) return null;
  const longest = rows.reduce((most, row) => Math.max(most, row.mean), 0);
  const columns = [
    { label: 'rank', isNumber: true, value: row => row.rank },
    { label: 'host', value: row => row.host },
    { label: 'mean step, by phase', isWide: true, isNumber: false, value: row => row.mean, show: row => phaseBar(row, work.phases, longest) },
    { label: 'own work', isNumber: true, value: row => row.own, show: row => seconds(row.own) },
    { label: 'mean step', isNumber: true, value: row => row.mean, show: row => seconds(row.mean) },
    ...work.phases.map((phase, at) => ({ label: phase, isNumber: true, value: row => row.phases[at], show: row => row.phases[at] > 0 ? seconds(row.phases[at]) : null })),
    { label: 'slowest', isNumber: true, value: row => row.worst, show: row => seconds(row.worst) },
    { label: 'at step', isNumber: true, value: row => row.worstStep, show: row => stepButton(heat, row.worstStep) },
    { label: 'steps', isNumber: true, value: row => row.steps, show: row => integer(row.steps) },
  ];
  const table = makeTable({ caption: 'Phases per rank', columns, rows, sort: rows.length > 1 ? 3 : null, isDown: true, page: 16, empty: 'no rank is chosen' });
  shared.chosen.listen(chosen => table.update(rows.filter(row => chosen[row.place])));
  return el('div', {}, el('p', { class: 'keys' }, ...work.phases.map(phaseSwatch)), table.element);
}
