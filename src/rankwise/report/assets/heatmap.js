// The picture of step times: what a cell holds, and drawing it. heatcontrol.js moves in it.
'use strict';

const RAMP = ['#440154', '#482878', '#3e4989', '#31688e', '#26828e', '#1f9e89', '#35b779', '#6ece58', '#b5de2b', '#fde725']
  .map(text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16)));
const GUTTER = { left: 78, right: 10, bottom: 34, top: 2 };

/** A colour of viridis, which also rises in lightness: `share` from 0 to 1. */
function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((value, channel) => Math.round(value + (RAMP[low + 1][channel] - value) * (at - low)));
}

/** What the cells hold, by measure. */
class HeatData {
  constructor(heat, ranks) {
    this.heat = heat;
    this.ranks = ranks;
    this.measures = new Map([
      ['step', { label: heat.width > 1 ? 'step time, longest step' : 'step time', values: heat.step }],
      ['own', { label: 'own work: step time without communication', values: heat.own }],
    ]);
    if (heat.width > 1) this.measures.set('typical', { label: 'step time, middle step', values: heat.typical });
    heat.phases.forEach((phase, at) => this.measures.set(`phase ${phase}`, { label: `phase: ${phase}`, values: heat.most[at] }));
  }

  column(step) { return Math.floor((step - this.heat.first) / this.heat.width); }
  firstStep(column) { return this.heat.first + column * this.heat.width; }
  lastStep(column) { return Math.min(this.firstStep(column) + this.heat.width - 1, this.heat.last); }

  /** Places (in the list of ranks) of those that a row stands for. */
  placesOf(row) {
    const begin = row * this.heat.ranksPerRow;
    const end = Math.min(begin + this.heat.ranksPerRow, this.ranks.rank.length);
    return Array.from({ length: end - begin }, (_, index) => begin + index);
  }

  /** All that is known of a cell; null where no step was finished there. */
  cell(row, column) {
    const { heat } = this, at = row * heat.columns + column;
    if (!isNumber(heat.step[at])) return null;
    const place = row * heat.ranksPerRow + heat.worstRank[at];
    return {
      rank: this.ranks.rank[place], place,
      step: this.firstStep(column) + heat.worstStep[at], from: this.firstStep(column), to: this.lastStep(column),
      seconds: heat.worstSeconds[at], own: heat.own[at], longest: heat.step[at], typical: heat.typical[at],
      phases: Object.fromEntries(heat.phases.map((phase, p) => [phase, heat.atWorst[p][at]])),
      most: Object.fromEntries(heat.phases.map((phase, p) => [phase, heat.most[p][at]])),
    };
  }

  /** From where to where the colours go: as far as half more than the middle, or than nearly all take. Few steps that
      save or validate take ten times as long; with them in the range all others would have one colour. */
  range(values) {
    const known = Float32Array.from(values.filter(value => value > 0)).sort();
    if (!known.length) return { low: 1e-3, high: 1, least: NaN, most: NaN };
    const at = share => known[Math.min(Math.floor(known.length * share), known.length - 1)];
    const low = at(0.01), most = known[known.length - 1];
    return { low, high: Math.max(Math.min(most, Math.max(1.5 * at(0.5), Math.min(at(0.95), 3 * at(0.5)))), low * 1.05), least: known[0], most };
  }
}

/** Draws the part of the picture that is shown. */
class HeatMap {
  constructor(canvas, data) {
    this.canvas = canvas;
    this.data = data;
    this.measure = 'step';
    this.cursor = null;      // {row: place among the shown rows, column}
    this.selection = null;   // [x, x] while a range is dragged
    this.rows = [];
    this.ranges = new Map();
    this.redraw = perFrame(() => this.draw());
  }

  get values() { return this.data.measures.get(this.measure).values; }

  get range() {
    if (!this.ranges.has(this.measure)) this.ranges.set(this.measure, this.data.range(this.values));
    return this.ranges.get(this.measure);
  }

  /** Shows the rows that have a chosen rank. */
  choose(chosen) {
    this.rows = [];
    for (let row = 0; row < this.data.heat.rows; row++) {
      if (this.data.placesOf(row).some(place => chosen[place])) this.rows.push(row);
    }
    this.cursor = null;
    this.layOut();
  }

  layOut() {
    this.width = this.canvas.parentElement.clientWidth;
    this.rowHeight = Math.max(2, Math.min(30, Math.floor(460 / Math.max(this.rows.length, 1))));
    this.plot = { x: GUTTER.left, y: GUTTER.top, width: Math.max(this.width - GUTTER.left - GUTTER.right, 10), height: Math.max(this.rows.length, 1) * this.rowHeight };
    this.context = fit(this.canvas, this.width, this.plot.height + GUTTER.top + GUTTER.bottom);
    this.redraw();
  }

  /** Columns that are shown: from, to, both included. */
  get shown() {
    const view = shared.view.value;
    return [this.data.column(view.from), this.data.column(view.to)];
  }

  columnAt(x) {
    const [from, to] = this.shown;
    const column = from + Math.floor((x - this.plot.x) / this.plot.width * (to - from + 1));
    return Math.min(Math.max(column, from), to);
  }

  rowAt(y) { return Math.min(Math.max(Math.floor((y - this.plot.y) / this.rowHeight), 0), this.rows.length - 1); }

  draw() {
    if (!this.context || !this.plot) return;
    const { context, plot } = this;
    context.clearRect(0, 0, this.width, plot.height + GUTTER.top + GUTTER.bottom);
    if (!this.rows.length) {
      context.fillStyle = color('--ink-soft');
      context.fillText('no rank is chosen', plot.x, plot.y + 20);
      return;
    }
    this.drawCells();
    this.drawAxes();
    this.drawCursor();
  }

  /** One pixel of the picture for each cell, or for several: then the worst of them, so that no spike is lost. */
  drawCells() {
    const [from, to] = this.shown, { plot, values, rows, data } = this, { low, high } = this.range;
    const ratio = window.devicePixelRatio || 1;
    const columns = to - from + 1, width = Math.min(columns, Math.max(1, Math.floor(plot.width * ratio)));
    const picture = new ImageData(width, rows.length), scale = 1 / Math.log(high / low);
    const colors = Array.from({ length: 256 }, (_, at) => ramp(at / 255));
    rows.forEach((row, y) => {
      const line = row * data.heat.columns;
      for (let x = 0; x < width; x++) {
        let worst = -1;
        const end = from + Math.floor((x + 1) * columns / width);
        for (let column = from + Math.floor(x * columns / width); column < end; column++) {
          if (values[line + column] > worst) worst = values[line + column];
        }
        if (worst < 0) continue;
        const share = worst > 0 ? Math.log(worst / low) * scale : 0;
        picture.data.set([...colors[Math.round(Math.min(Math.max(share, 0), 1) * 255)], 255], (y * width + x) * 4);
      }
    });
    const copy = Object.assign(document.createElement('canvas'), { width, height: rows.length });
    copy.getContext('2d').putImageData(picture, 0, 0);
    const { context } = this;
    context.fillStyle = color('--empty');
    context.fillRect(plot.x, plot.y, plot.width, plot.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(copy, plot.x, plot.y, plot.width, plot.height);
    if (this.rowHeight >= 10) {
      context.fillStyle = color('--paper');
      for (let y = 1; y < rows.length; y++) context.fillRect(plot.x, plot.y + y * this.rowHeight - 0.5, plot.width, 1);
    }
  }

  drawAxes() {
    const { context, plot, data } = this, view = shared.view.value;
    context.fillStyle = color('--ink-soft');
    context.strokeStyle = color('--line');
    context.font = canvasFont();
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    const places = this.rows.map(row => data.placesOf(row)[0]);
    const isNewNode = index => !index || data.ranks.node[places[index]] !== data.ranks.node[places[index - 1]];
    const numNodes = places.filter((_, index) => isNewNode(index)).length;
    // Every row has its label where there is room, else each node's first, else some at equal distances.
    const every = Math.ceil(14 / this.rowHeight);
    const isByNode = every > 1 && numNodes > 1 && numNodes * 14 <= plot.height && data.heat.ranksPerRow === 1;
    let free = -Infinity;
    places.forEach((place, index) => {
      const y = plot.y + (index + 0.5) * this.rowHeight;
      if (index && numNodes * 8 < plot.height && isNewNode(index)) context.fillRect(plot.x - 6, y - this.rowHeight / 2 - 0.5, 6, 1);
      if (y < free || (isByNode ? !isNewNode(index) : index % every)) return;
      context.fillText(data.heat.ranksPerRow > 1 ? `${data.ranks.rank[place]}\u2026` : `rank ${data.ranks.rank[place]}`, plot.x - 8, y);
      free = y + 13;
    });
    context.textAlign = 'center';
    context.textBaseline = 'top';
    const [from, to] = this.shown, first = data.firstStep(from), last = data.lastStep(to);
    for (const step of ticks(first, last, plot.width / 90, true)) {
      const x = plot.x + (step - first + 0.5) / (last - first + 1) * plot.width;
      context.fillRect(x, plot.y + plot.height, 1, 4);
      context.fillText(integer(step), Math.min(x, plot.x + plot.width - 14), plot.y + plot.height + 6);
    }
    context.textAlign = 'left';
    context.fillText(view.from === data.heat.first && view.to === data.heat.last ? 'step' : 'step (zoomed)', plot.x, plot.y + plot.height + 20);
  }

  drawCursor() {
    const { context, plot } = this;
    if (this.selection) {
      const [a, b] = this.selection;
      context.fillStyle = color('--select');
      context.fillRect(Math.min(a, b), plot.y, Math.abs(b - a), plot.height);
    }
    if (!this.cursor) return;
    const [from, to] = this.shown, width = plot.width / (to - from + 1);
    if (this.cursor.column < from || this.cursor.column > to) return;
    const x = plot.x + (this.cursor.column - from) * width, y = plot.y + this.cursor.row * this.rowHeight;
    for (const [grow, stroke] of [[1.5, '#000'], [0, '#fff']]) {
      context.lineWidth = 2;
      context.strokeStyle = stroke;
      context.strokeRect(x - 1 - grow, y - 1 - grow, Math.max(width, 4) + 2 + 2 * grow, this.rowHeight + 2 + 2 * grow);
    }
    context.lineWidth = 1;
  }
}
