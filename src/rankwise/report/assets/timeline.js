// What happened, over the same steps as the picture below it: a lane for each kind, a shape for each kind.
'use strict';

const LANES = [
  { name: 'straggler', label: 'slow rank', color: '--c-vermilion', shape: 'bar' },
  { name: 'hang', label: 'hang', color: '--c-pink', shape: 'cross' },
  { name: 'device', label: 'device', color: '--c-orange', shape: 'triangle' },
  { name: 'warning', label: 'warning', color: '--c-sky', shape: 'dot' },
  { name: 'restart', label: 'restart', color: '--ink', shape: 'line' },
  { name: 'checkpoint', label: 'saved', color: '--c-green', shape: 'diamond' },
];
const LANE_HEIGHT = 20;

/** Everything that has a step, as marks in lanes. A straggler is one before it is told of, and not until it is told to be over. */
function findMarks(data) {
  const marks = [];
  for (const event of data.events) {
    if (event.kind.endsWith('_over') || event.kind === 'checkpoint') continue;
    const lane = LANES.some(known => known.name === event.kind) ? event.kind : 'warning';
    marks.push({ lane, step: event.since ?? event.step, to: event.until ?? event.step, text: event.message });
  }
  for (const saved of data.checkpoints) marks.push({ lane: 'checkpoint', step: saved.step, to: saved.step, text: `checkpoint of step ${integer(saved.step)}` });
  for (const session of data.sessions.slice(1)) marks.push({ lane: 'restart', step: session.step, to: session.step, text: `started again at step ${integer(session.step)}${session.again ? `; ${integer(session.again)} steps were made twice` : ''}` });
  for (const group of data.logs.groups) {
    // What the monitor itself has logged stands among the events already.
    if (isNumber(group.step) && !group.logger.startsWith('rankwise.monitor')) marks.push({ lane: 'warning', step: group.step, to: group.step, text: `${group.level}: ${group.message.split('\n')[0].slice(0, 160)}` });
  }
  return marks;
}

class TimeLine {
  constructor(canvas, marks, heat) {
    this.canvas = canvas;
    this.marks = marks;
    this.heat = heat;
    this.lanes = LANES.filter(lane => marks.some(mark => mark.lane === lane.name));
    this.redraw = perFrame(() => this.draw());
    canvas.addEventListener('pointermove', event => this.point(event));
    canvas.addEventListener('pointerleave', () => tooltip.hide());
    canvas.addEventListener('click', event => {
      const [mark] = this.near(event);
      if (mark) jumpTo(this.heat, mark.step, mark.to);
    });
  }

  layOut() {
    this.width = this.canvas.parentElement.clientWidth;
    this.plotWidth = Math.max(this.width - GUTTER.left - GUTTER.right, 10);
    this.context = fit(this.canvas, this.width, Math.max(this.lanes.length * LANE_HEIGHT + 4, 1));
    this.canvas.hidden = !this.lanes.length;
    this.redraw();
  }

  x(step) {
    const { from, to } = shared.view.value;
    return GUTTER.left + (step - from + 0.5) / (to - from + 1) * this.plotWidth;
  }

  draw() {
    if (!this.context) return;
    const { context } = this;
    context.clearRect(0, 0, this.width, this.lanes.length * LANE_HEIGHT + 4);
    context.font = canvasFont();
    this.lanes.forEach((lane, index) => {
      const y = (index + 0.5) * LANE_HEIGHT;
      context.fillStyle = color('--ink-soft');
      context.textAlign = 'right';
      context.textBaseline = 'middle';
      context.fillText(lane.label, GUTTER.left - 8, y);
      context.fillStyle = color('--line');
      context.fillRect(GUTTER.left, y, this.plotWidth, 1);
      context.fillStyle = context.strokeStyle = color(lane.color);
      for (const mark of this.marks) if (mark.lane === lane.name) this.drawMark(lane.shape, mark, y);
    });
  }

  drawMark(shape, mark, y) {
    const { context } = this, right = GUTTER.left + this.plotWidth;
    let x = this.x(mark.step), end = this.x(mark.to);
    if (end < GUTTER.left - 1 || x > right + 1) return;
    x = Math.max(x, GUTTER.left); end = Math.min(end, right);
    context.lineWidth = 2;
    context.beginPath();
    if (shape === 'bar') context.rect(x - 1, y - 5, Math.max(end - x, 3), 10);
    else if (shape === 'diamond') { context.moveTo(x, y - 6); context.lineTo(x + 5, y); context.lineTo(x, y + 6); context.lineTo(x - 5, y); }
    else if (shape === 'triangle') { context.moveTo(x, y - 6); context.lineTo(x + 6, y + 5); context.lineTo(x - 6, y + 5); }
    else if (shape === 'dot') context.arc(x, y, 3.5, 0, 7);
    else if (shape === 'line') context.rect(x - 1.5, y - 8, 3, 16);
    else {
      context.moveTo(x - 5, y - 5); context.lineTo(x + 5, y + 5); context.moveTo(x + 5, y - 5); context.lineTo(x - 5, y + 5);
      context.lineWidth = 3;
      context.stroke();
      return;
    }
    context.fill();
  }

  near(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left;
    const lane = this.lanes[Math.floor((event.clientY - box.top) / LANE_HEIGHT)];
    if (!lane) return [];
    return this.marks.filter(mark => mark.lane === lane.name && this.x(mark.step) - 7 <= x && x <= this.x(mark.to) + 7);
  }

  point(event) {
    const found = this.near(event);
    this.canvas.style.cursor = found.length ? 'pointer' : '';
    if (!found.length) { tooltip.hide(); return; }
    const lines = found.slice(0, 4).map(mark => `${mark.to > mark.step ? `steps ${integer(mark.step)}\u2013${integer(mark.to)}` : `step ${integer(mark.step)}`}: ${mark.text}`);
    if (found.length > 4) lines.push(`and ${found.length - 4} more here`);
    tooltip.show(lines, event.clientX, event.clientY);
  }
}

/** Shows the steps around what happened, and brings the picture into view. */
function jumpTo(heat, step, to = step) {
  const margin = Math.max(20 * heat.width, Math.round((to - step) * 0.3));
  showSteps(heat, step - margin, to + margin);
  $('steps').scrollIntoView({ block: 'start' });
}
