// Tables that sort by any column and show a page at a time.
'use strict';

/**
 * @param {object} options
 *   caption: said to those who do not see the heading; rows: any objects;
 *   columns: {label, value(row) for sorting and as text, show(row) a text or element instead, isNumber, isWide};
 *   sort: number of the column that sorts at first, isDown: largest first; page: rows at once; empty: what to say without rows.
 * @returns {{element, update(rows)}}
 */
function makeTable({ caption, columns, rows, sort = null, isDown = false, page = 50, empty = 'nothing' }) {
  const state = { rows, sort, isDown, shown: page };
  const body = el('tbody'), more = el('div', { class: 'more' });
  const heads = columns.map((column, at) => {
    const button = el('button', { type: 'button', class: 'sort', onclick: () => sortBy(at) }, column.label);
    return el('th', { scope: 'col', class: column.isNumber ? 'number' : undefined }, button);
  });
  const table = el('table', {}, el('caption', { class: 'unseen' }, caption), el('thead', {}, el('tr', {}, ...heads)), body);
  const element = el('div', { class: 'table' }, el('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption }, table), more);

  function sortBy(at) {
    state.isDown = state.sort === at ? !state.isDown : Boolean(columns[at].isNumber);
    state.sort = at;
    render();
  }

  function compare(a, b) {
    const [x, y] = [a, b].map(row => columns[state.sort].value(row));
    const isMissing = value => value === null || value === undefined || Number.isNaN(value);
    if (isMissing(x) || isMissing(y)) return isMissing(x) - isMissing(y);  // what is not there comes last either way
    const order = typeof x === 'number' ? x - y : String(x).localeCompare(String(y), 'en', { numeric: true });
    return state.isDown ? -order : order;
  }

  function cell(column, row) {
    const shown = column.show ? column.show(row) : column.value(row);
    const text = shown === null || shown === undefined || shown === '' ? '\u2013' : shown;
    return el('td', { class: [column.isNumber && 'number', column.isWide && 'wide', column.isNarrow && 'narrow'].filter(Boolean).join(' ') || undefined }, text);
  }

  function render() {
    heads.forEach((head, at) => {
      if (at === state.sort) head.setAttribute('aria-sort', state.isDown ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    });
    const ordered = state.sort === null ? state.rows : [...state.rows].sort(compare);
    const visible = ordered.slice(0, state.shown);
    body.replaceChildren(...visible.map(row => el('tr', {}, ...columns.map(column => cell(column, row)))));
    if (!visible.length) body.append(el('tr', {}, el('td', { colspan: columns.length, class: 'nothing' }, empty)));
    const left = ordered.length - visible.length;
    more.replaceChildren();
    if (left > 0) {
      more.append(`${integer(visible.length)} of ${integer(ordered.length)} `,
        el('button', { type: 'button', onclick: () => { state.shown += 5 * page; render(); } }, `show ${integer(Math.min(left, 5 * page))} more`));
    } else if (ordered.length > page) more.append(`all ${integer(ordered.length)}`);
  }

  render();
  return { element, update(updated) { state.rows = updated; state.shown = page; render(); } };
}

/** A button that shows in the picture where something happened. */
function stepButton(heat, step, to, from = step) {
  if (!isNumber(step)) return null;
  if (!heat) return integer(step);
  return el('button', { type: 'button', class: 'link', title: 'show in the picture', onclick: () => jumpTo(heat, from, to) }, integer(step));
}

/** A table of any rows and a field that keeps those with a text in them. */
function makeSearchable(options, textOf) {
  const table = makeTable(options);
  const field = el('input', { type: 'search', placeholder: 'text\u2026', 'aria-label': `search in ${options.caption}` });
  field.addEventListener('input', () => {
    const wanted = field.value.toLowerCase();
    table.update(options.rows.filter(row => textOf(row).toLowerCase().includes(wanted)));
  });
  return el('div', {}, options.rows.length > 5 ? el('div', { class: 'search' }, field) : null, table.element);
}
