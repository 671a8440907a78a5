// Puts the page together.
'use strict';

/** Shows the ranks that a text names: "0-7, 12", "node:3", "local:0", "slow", or a part of a host, device or UUID. */
function chooseText(text) {
  const { ranks, suspects } = shared.data, count = ranks.rank.length;
  const terms = text.toLowerCase().split(/[\s,]+/).filter(Boolean), chosen = new Uint8Array(count);
  const slow = new Set(suspects);
  const matches = terms.map(term => {
    const range = /^(\d+)(?:-(\d*))?$/.exec(term), field = /^(node|local|host):(.+)$/.exec(term);
    if (range) {
      const low = Number(range[1]), high = range[2] === undefined ? low : range[2] === '' ? Infinity : Number(range[2]);
      return place => ranks.rank[place] >= low && ranks.rank[place] <= high;
    }
    if (field && field[1] === 'node') return place => String(ranks.node[place]) === field[2];
    if (field && field[1] === 'local') return place => String(ranks.local_rank[place]) === field[2];
    const wanted = field ? field[2] : term;
    if (wanted === 'slow') return place => slow.has(ranks.rank[place]);
    return place => [ranks.host[place], ranks.device[place], ranks.device_name[place], ranks.uuid[place]].some(value => value.toLowerCase().includes(wanted));
  });
  for (let place = 0; place < count; place++) chosen[place] = !terms.length || matches.some(match => match(place)) ? 1 : 0;
  const num = chosen.reduce((sum, value) => sum + value, 0);
  if ($('filter').value !== text) $('filter').value = text;
  $('filter-said').textContent = terms.length ? `${integer(num)} of ${integer(count)} ranks` : '';
  shared.chosen.set(chosen);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $('theme').setAttribute('aria-pressed', theme === 'dark');
  $('theme').textContent = theme === 'dark' ? 'Light' : 'Dark';
  shared.theme.set(theme);
}

/** Puts a part into its section, or takes the section away where there is nothing to show. */
function place(id, part) {
  if (part) $(`${id}-body`).append(part);
  else { $(id).hidden = true; document.querySelector(`nav a[href="#${id}"]`).parentElement.hidden = true; }
}

function buildSteps(data) {
  const { heat } = data;
  if (!heat) return null;
  const picture = new HeatData(heat, data.ranks), map = new HeatMap($('heat'), picture);
  const line = new TimeLine($('timeline'), findMarks(data), heat);
  $('measure').append(...Array.from(picture.measures, ([name, { label }]) => el('option', { value: name }, label)));
  const setMeasure = name => { map.measure = $('measure').value = name; drawLegend(map); map.redraw(); };
  $('measure').addEventListener('change', () => setMeasure($('measure').value));
  const acts = { 'zoom-in': () => zoom(heat, 0.5), 'zoom-out': () => zoom(heat, 2), 'pan-left': () => pan(heat, -0.5), 'pan-right': () => pan(heat, 0.5), 'zoom-all': () => showSteps(heat, heat.first, heat.last) };
  for (const [id, act] of Object.entries(acts)) $(id).addEventListener('click', act);
  const notes = [];
  if (heat.width > 1) notes.push(`Each column is ${integer(heat.width)} steps, and shows the worst of them.`);
  if (heat.ranksPerRow > 1) notes.push(`Each row is ${integer(heat.ranksPerRow)} ranks, and shows the worst of them; Enter or the field above lists them.`);
  $('heat-note').textContent = notes.join(' ');
  controlHeatMap(map);
  shared.view.listen(() => { map.redraw(); line.redraw(); });
  shared.chosen.listen(chosen => map.choose(chosen));
  const slowest = makeTable({
    caption: 'Longest own work', page: 20, rows: slowestCells(picture), sort: 3, isDown: true,
    columns: [
      { label: 'rank', isNumber: true, value: cell => cell.rank },
      { label: 'step', isNumber: true, value: cell => cell.step, show: cell => stepButton(heat, cell.step) },
      { label: 'step time', isNumber: true, value: cell => cell.seconds, show: cell => seconds(cell.seconds) },
      { label: 'own work', isNumber: true, value: cell => cell.own, show: cell => seconds(cell.own) },
      { label: 'phases', isWide: true, value: cell => Object.entries(cell.phases).filter(([, value]) => value > 0).map(([phase, value]) => `${phase} ${seconds(value)}`).join(', ') },
    ],
  });
  $('slowest').append(slowest.element);
  // In step, all ranks take equally long: who is slow shows in its own work.
  setMeasure(data.ranks.rank.length > 1 && heat.phases.includes('communication') ? 'own' : 'step');
  return { map, line, picture, setMeasure, layOut() { map.layOut(); line.layOut(); drawLegend(map); } };
}

function buildLists(data) {
  const { heat } = data;
  const eventOptions = {
    caption: 'Events', rows: data.events, sort: null, page: 20, columns: [
      { label: 'step', isNumber: true, value: event => event.step, show: event => stepButton(heat, event.step, event.until, event.since) },
      { label: 'kind', value: event => event.kind.replace('_', ' ') },
      { label: 'what', isWide: true, value: event => event.message },
      { label: 'ranks', isNarrow: true, value: event => ranksAsText(event.ranks), show: event => event.ranks.length ? el('button', { type: 'button', class: 'link', title: 'show these ranks', onclick: () => chooseText(event.ranks.join(',')) }, ranksAsText(event.ranks)) : null },
      { label: 'phase', value: event => event.phase },
      { label: 'until step', isNumber: true, value: event => event.until, show: event => integer(event.until) },
      { label: 'time (UTC)', value: event => event.time, show: event => moment(event.time) },
    ],
  };
  place('events', data.events.length ? makeSearchable(eventOptions, event => `${event.kind} ${event.message}`) : null);
  const size = value => !isNumber(value) ? null : value < 2 ** 30 ? `${number(value / 2 ** 20)} MiB` : `${number(value / 2 ** 30)} GiB`;
  place('checkpoints', data.checkpoints.length ? makeTable({
    caption: 'Checkpoints', rows: data.checkpoints, page: 20, columns: [
      { label: 'step', isNumber: true, value: saved => saved.step, show: saved => stepButton(heat, saved.step) },
      { label: 'saved (UTC)', value: saved => saved.time, show: saved => moment(saved.time) },
      { label: 'size', isNumber: true, value: saved => saved.bytes, show: saved => size(saved.bytes) },
      ...data.checkpoints.some(saved => isNumber(saved.took)) ? [{ label: 'took', isNumber: true, value: saved => saved.took, show: saved => seconds(saved.took) }] : [],
      { label: 'still there', value: saved => saved.isThere ? 'yes' : 'no' },
    ],
  }).element : null);
  place('logs', data.logs.isThere ? buildLogs(data) : null);
  const { ranks } = data, count = ranks.rank.length;
  const rows = Array.from({ length: count }, (_, at) => ({ place: at, ...Object.fromEntries(Object.entries(ranks).map(([name, values]) => [name, values[at]])) }));
  const identity = makeTable({
    caption: 'Ranks', rows, page: 16, empty: 'no rank is chosen', columns: [
      ...[['rank', 'rank', true], ['local rank', 'local_rank', true], ['node', 'node', true], ['host', 'host'], ['device', 'device'], ['device name', 'device_name'], ['UUID', 'uuid'], ['pid', 'pid', true], ['last step', 'last_step', true], ['end', 'state']]
        .map(([label, name, isNumber]) => ({ label, isNumber, value: row => row[name] })),
    ],
  });
  shared.chosen.listen(chosen => identity.update(rows.filter(row => chosen[row.place])));
  place('ranks', count ? identity.element : null);
}

function buildLogs(data) {
  const { logs, heat } = data;
  const levels = Object.entries(logs.levels).map(([level, count]) => `${integer(count)} ${level}`).join(', ');
  const message = group => {
    const [first, ...rest] = group.message.split('\n'), more = [...rest, group.traceback].filter(Boolean).join('\n');
    return more ? el('details', {}, el('summary', {}, first), el('pre', {}, more)) : first;
  };
  return el('div', {},
    el('p', {}, `${levels || 'no'} records. `, logs.num > logs.groups.length ? `The ${integer(logs.groups.length)} worst of ${integer(logs.num)} kinds of messages from WARNING on, ` : 'From WARNING on, ', 'equal messages of all ranks as one, numbers aside; the first one is shown.',
      logs.numForeign ? ` ${integer(logs.numForeign)} lines were no whole records.` : ''),
    makeSearchable({
      caption: 'Warnings and errors', rows: logs.groups, page: 20, empty: 'no warnings', columns: [
        { label: 'level', value: group => group.level, show: group => el('span', { class: `level ${/ERROR|CRITICAL/.test(group.level) ? 'bad' : 'note'}` }, group.level) },
        { label: 'count', isNumber: true, value: group => group.count, show: group => integer(group.count) },
        { label: 'message', isWide: true, value: group => group.message, show: message },
        { label: 'ranks', isNarrow: true, value: group => group.ranks },
        { label: 'logger', value: group => group.logger },
        { label: 'first step', isNumber: true, value: group => group.step, show: group => stepButton(heat, group.step) },
        { label: 'first (UTC)', value: group => group.first },
        { label: 'last (UTC)', value: group => group.last },
      ],
    }, group => `${group.level} ${group.logger} ${group.message} ${group.traceback}`));
}

async function main() {
  const saved = (() => { try { return localStorage.getItem('rankwise-theme'); } catch { return null; } })();
  setTheme(saved || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'));
  const data = shared.data = await unpack($('data').textContent);
  shared.heat = data.heat;
  const steps = buildSteps(data);
  if (!steps) place('steps', null);
  place('metrics', buildMetrics(data));
  place('phases', buildPhases(data));
  const devices = buildDevices(data);
  place('devices', devices && devices.element);
  buildLists(data);
  if (devices) devices.show();

  const layOut = () => { fitCharts(); if (steps) steps.layOut(); };
  const repaint = () => { recolorCharts(); for (const canvas of document.querySelectorAll('canvas.dash')) canvas.repaint(); if (steps) { steps.map.redraw(); steps.line.redraw(); } };
  $('theme').addEventListener('click', () => {
    const theme = shared.theme.value === 'dark' ? 'light' : 'dark';
    try { localStorage.setItem('rankwise-theme', theme); } catch { /* a page from a file may have no storage */ }
    setTheme(theme);
    repaint();
  });
  // Paper is white, whatever the screen is.
  let screenTheme = null;
  addEventListener('beforeprint', () => { screenTheme = shared.theme.value; setTheme('light'); layOut(); if (steps) { steps.map.draw(); steps.line.draw(); } recolorCharts(); });
  addEventListener('afterprint', () => { setTheme(screenTheme); layOut(); repaint(); });
  $('filter').addEventListener('input', () => chooseText($('filter').value));
  if (data.heat) showSteps(data.heat, data.heat.first, data.heat.last);
  chooseText('');
  layOut();
  new ResizeObserver(perFrame(layOut)).observe(document.body);
  window.rankwiseReport = { data, shared, steps, chooseText, showSteps, charts };
  requestAnimationFrame(() => requestAnimationFrame(() => {
    performance.mark('data-ready');
    document.documentElement.dataset.ready = 'yes';
  }));
}

main().catch(error => {
  $('failed').hidden = false;
  $('failed').append(` ${error}`);
  document.documentElement.dataset.ready = 'failed';
  throw error;
});
