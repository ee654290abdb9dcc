// Tables that sort and filter. Without this script they are plain tables with everything in them.
"use strict";

/** Rows from which a table gets a box to filter it. */
const FILTERED = 8;
const UNITS = { k: 1e3, M: 1e6, G: 1e9, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, min: 60, h: 3600, ms: 1e-3 };

/** What a cell says, without its second line and its raised sign. */
function words(cell) {
  const copy = cell.cloneNode(true);
  copy.querySelectorAll("small, sup, .hidden").forEach((part) => part.remove());
  return copy.textContent.trim();
}

/** The number that a text begins with, units and all: "−1.2 [−2, 0]", "1 h 12 min", "300 k", "r = 8". Else null. */
function number(text) {
  const plain = text.replace(/^(r = |× )/, "").replace(/\u2212/g, "-").replace(/(\d)[\u202f,](?=\d{3})/g, "$1");
  if (!/^[±+-]?\.?\d/.test(plain) || /^\d{4}-\d\d/.test(plain)) return null;
  const time = plain.match(/^(\d+)\s(h|min)\s(\d+)\s(min|s)$/);
  if (time) return time[1] * UNITS[time[2]] + time[3] * (UNITS[time[4]] || 1);
  const found = plain.match(/^[±]?([+-]?[\d.]+(?:e[+-]?\d+)?)\s?(KiB|MiB|GiB|min|ms|[kMGh](?![a-zA-Z]))?/);
  return found ? parseFloat(found[1]) * (UNITS[found[2]] || 1) : null;
}

/** Order of two cells: numbers by size, words as words. */
function compare(one, other, numeric) {
  return numeric ? one - other : one.localeCompare(other, "en", { numeric: true, sensitivity: "base" });
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  table.original ??= [...body.rows];
  let rows = table.original;
  if (direction !== "none") {
    const keyed = rows.map((row) => ({ row, text: words(row.cells[column]) }));
    const said = keyed.filter((one) => /[\p{L}\p{N}]/u.test(one.text));
    // Numbers if most that is said is one: a word for a run that failed does not make words of a column.
    const numeric = said.filter((one) => number(one.text) !== null).length > said.length / 2;
    for (const one of keyed) one.key = numeric ? number(one.text) : one.text;
    const known = keyed.filter((one) => (numeric ? one.key !== null : said.includes(one)));
    const sign = direction === "ascending" ? 1 : -1;
    known.sort((one, other) => sign * compare(one.key, other.key, numeric));
    const rest = keyed.filter((one) => !known.includes(one)); // no number: last, whatever the direction
    rows = [...known, ...rest].map((one) => one.row);
  }
  body.append(...rows);
  table.classList.toggle("sorted", direction !== "none");
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  if (direction !== "none") table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction);
}

function makeSortable(table) {
  if (table.tBodies[0].rows.length < 2) return;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.classList.contains("word") ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      const now = head.getAttribute("aria-sort");
      sort(table, column, now === null ? first : now === first ? second : "none");
    });
  });
}

function makeFilterable(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < FILTERED) return;
  const label = document.createElement("label");
  const box = document.createElement("input");
  const count = document.createElement("output");
  box.type = "search";
  label.append("Filter rows ", box);
  const bar = document.createElement("div");
  bar.className = "filter";
  bar.append(label, count);
  table.closest(".scroll").before(bar);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  box.addEventListener("input", () => {
    const wanted = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !wanted.every((word) => texts[place].includes(word));
      shown += !row.hidden;
    });
    count.textContent = wanted.length ? `${shown} of ${rows.length} rows` : "";
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  makeSortable(table);
  makeFilterable(table);
}
