// Moving in the picture of step times: mouse, touch and keys, what a cell says, its legend, its table.
'use strict';

/** Shows these steps in every part that is drawn over steps; kept within the run and wide enough to see. */
function showSteps(heat, from, to) {
  const least = Math.min(heat.last - heat.first, Math.max(heat.width * 4 - 1, 3));
  let low = Math.round(Math.min(from, to)), high = Math.round(Math.max(from, to));
  if (high - low < least) { low -= Math.ceil((least - (high - low)) / 2); high = low + least; }
  if (low < heat.first) { high += heat.first - low; low = heat.first; }
  if (high > heat.last) { low = Math.max(heat.first, low - (high - heat.last)); high = heat.last; }
  shared.view.set({ from: low, to: high });
}

/** What a cell says, in lines. */
function cellLines(map, row, column) {
  const { data } = map, cell = data.cell(map.rows[row], column);
  const places = data.placesOf(map.rows[row]), from = data.firstStep(column), to = data.lastStep(column);
  const who = places.length > 1 ? `ranks ${ranksAsText(places.map(place => data.ranks.rank[place]))}` : `rank ${data.ranks.rank[places[0]]}`;
  const where = from === to ? `step ${integer(from)}` : `steps ${integer(from)}\u2013${integer(to)}`;
  if (!cell) return [el('strong', {}, `${who}, ${where}`), 'no step was finished here'];
  const host = data.ranks.host[cell.place];
  const lines = [
    el('strong', {}, `rank ${cell.rank}, step ${integer(cell.step)}: ${seconds(cell.seconds)}`),
    `${host ? `${host}, ` : ''}local rank ${data.ranks.local_rank[cell.place]}`,
  ];
  if (cell.own < 0.999 * cell.seconds) lines.push(`own work ${seconds(cell.own)}`);
  if (places.length > 1 || from !== to) lines.push(`the most own work of ${places.length > 1 ? `${who}, ` : ''}${where}; the longest step ${seconds(cell.longest)}, the middle one ${seconds(cell.typical)}`);
  const shown = Object.entries(cell.phases).filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
  for (const [phase, value] of shown) {
    const swatch = el('span', { class: 'swatch', style: { background: phaseColor(phase) } });
    lines.push(el('div', {}, swatch, `${phase} ${seconds(value)} (${percent(value / cell.seconds)})`));
  }
  if (map.measure.startsWith('phase ')) {
    const phase = map.measure.slice(6);
    if (from !== to || places.length > 1) lines.push(`most ${phase} in any of these steps: ${seconds(cell.most[phase])}`);
  }
  return lines;
}

function controlHeatMap(map) {
  const { canvas, data } = map, { heat } = data;
  let dragged = null;

  const pointAt = event => {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const setCursor = (row, column) => { map.cursor = { row, column }; map.redraw(); };
  const isInside = point => point.x >= map.plot.x && point.x <= map.plot.x + map.plot.width && point.y < map.plot.y + map.plot.height;

  canvas.addEventListener('pointermove', event => {
    const point = pointAt(event);
    if (dragged !== null) { map.selection = [dragged, Math.min(Math.max(point.x, map.plot.x), map.plot.x + map.plot.width)]; map.redraw(); return; }
    if (!map.rows.length || !isInside(point)) { tooltip.hide(); return; }
    setCursor(map.rowAt(point.y), map.columnAt(point.x));
    tooltip.show(cellLines(map, map.cursor.row, map.cursor.column), event.clientX, event.clientY);
  });
  canvas.addEventListener('pointerleave', () => tooltip.hide());
  canvas.addEventListener('pointerdown', event => {
    const point = pointAt(event);
    if (event.button === 0 && map.rows.length && isInside(point)) {
      dragged = point.x;
      canvas.setPointerCapture(event.pointerId);
      tooltip.hide();
    }
  });
  const letGo = event => {
    if (dragged === null) return;
    const from = dragged, to = map.selection ? map.selection[1] : from;
    dragged = map.selection = null;
    if (event.type === 'pointerup' && Math.abs(to - from) > 6) {
      const [a, b] = [map.columnAt(Math.min(from, to)), map.columnAt(Math.max(from, to))];
      showSteps(heat, data.firstStep(a), data.lastStep(b));
    }
    map.redraw();
  };
  canvas.addEventListener('pointerup', letGo);
  canvas.addEventListener('pointercancel', letGo);
  canvas.addEventListener('dblclick', () => showSteps(heat, heat.first, heat.last));
  canvas.addEventListener('wheel', event => {
    if (!event.ctrlKey && !event.metaKey) return;  // a plain wheel scrolls the page
    event.preventDefault();
    zoom(heat, event.deltaY > 0 ? 1.4 : 1 / 1.4, data.firstStep(map.columnAt(pointAt(event).x)));
  }, { passive: false });
  canvas.addEventListener('keydown', event => { if (!event.altKey && !event.metaKey && moveByKey(map, event.key)) event.preventDefault(); });
  canvas.addEventListener('blur', () => { map.cursor = null; tooltip.hide(); map.redraw(); });
}

/** Shows more or fewer steps around one. */
function zoom(heat, factor, around) {
  const { from, to } = shared.view.value;
  const middle = around === undefined ? (from + to) / 2 : around;
  showSteps(heat, middle - (middle - from) * factor, middle + (to - middle) * factor);
}

function pan(heat, share) {
  const { from, to } = shared.view.value, width = to - from;
  const low = Math.min(Math.max(Math.round(from + share * width), heat.first), heat.last - width);
  shared.view.set({ from: low, to: low + width });
}

/** Arrow keys go from cell to cell, + and - zoom, 0 shows all, Enter shows this rank alone. */
function moveByKey(map, key) {
  const { data } = map, { heat } = data;
  if (!map.rows.length) return false;
  const [from, to] = map.shown;
  const cursor = map.cursor || { row: 0, column: from };
  const page = Math.max(1, Math.round((to - from) / 10));
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -page], PageDown: [0, page] };
  if (key === '+' || key === '=') zoom(heat, 0.5, data.firstStep(cursor.column));
  else if (key === '-') zoom(heat, 2, data.firstStep(cursor.column));
  else if (key === '0' || key === 'Escape') showSteps(heat, heat.first, heat.last);
  else if (key === 'Enter') { chooseText(ranksAsText(data.placesOf(map.rows[cursor.row]).map(place => data.ranks.rank[place]), 1).replace('\u2013', '-')); return true; }
  else if (key === 'Home') cursor.column = data.column(heat.first);
  else if (key === 'End') cursor.column = data.column(heat.last);
  else if (moves[key]) {
    // The first key only shows where one is.
    const [rows, columns] = map.cursor ? moves[key] : [0, 0];
    cursor.row = Math.min(Math.max(cursor.row + rows, 0), map.rows.length - 1);
    cursor.column = Math.min(Math.max(cursor.column + columns, 0), heat.columns - 1);
  } else return false;
  map.cursor = cursor;
  const [low, high] = map.shown;
  if (cursor.column < low) pan(heat, (cursor.column - low - page) / (high - low + 1));
  if (cursor.column > high) pan(heat, (cursor.column - high + page) / (high - low + 1));
  map.redraw();
  const lines = cellLines(map, cursor.row, cursor.column), box = map.canvas.getBoundingClientRect();
  const [left, right] = map.shown;
  const x = box.left + map.plot.x + (cursor.column - left + 0.5) / (right - left + 1) * map.plot.width;
  tooltip.show(lines, x, box.top + map.plot.y + (cursor.row + 1) * map.rowHeight);
  announce(lines.map(line => typeof line === 'string' ? line : line.textContent).join('; '));
  return true;
}

/** The scale of colours, with numbers. */
function drawLegend(map) {
  const { low, high, least, most } = map.range, bar = $('heat-scale');
  const width = bar.clientWidth || 240, context = fit(bar, width, 12);
  for (let x = 0; x < width; x++) {
    context.fillStyle = `rgb(${ramp(x / (width - 1)).join(',')})`;
    context.fillRect(x, 0, 1.5, 12);
  }
  $('heat-low').textContent = least < low ? `\u2264 ${seconds(low)}` : seconds(low);
  $('heat-high').textContent = most > high ? `\u2265 ${seconds(high)} (most ${seconds(most)})` : seconds(high);
}

/** The slowest cells as a table: for who cannot see the picture, and to jump to. */
function slowestCells(data, count = 20) {
  const { heat } = data, found = [];
  const order = Array.from(heat.step.keys()).filter(at => isNumber(heat.step[at])).sort((a, b) => heat.own[b] - heat.own[a]);
  for (const at of order.slice(0, count)) found.push(data.cell(Math.floor(at / heat.columns), at % heat.columns));
  return found;
}
