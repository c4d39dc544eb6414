// Sorting, filtering, the theme and copying. Everything is on the page without it; nothing is fetched.
"use strict";
const store = {
  get() { try { return localStorage.getItem("friends-theme"); } catch { return null; } },
  set(value) { try { value ? localStorage.setItem("friends-theme", value) : localStorage.removeItem("friends-theme"); } catch { /* none here */ } },
};
const themes = ["", "light", "dark"];

function setTheme(value) {
  if (value) document.documentElement.dataset.theme = value; else delete document.documentElement.dataset.theme;
}
setTheme(themes.includes(store.get()) ? store.get() : "");

function say(text) {
  const place = document.getElementById("said");
  place.textContent = "";
  setTimeout(() => { place.textContent = text; }, 30); // an emptied region is read again
}

function themeButton() {
  const button = document.getElementById("theme");
  const show = () => { button.textContent = "Theme: " + (document.documentElement.dataset.theme || "system"); };
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = themes.indexOf(document.documentElement.dataset.theme || "");
    const next = themes[(now + 1) % themes.length];
    setTheme(next); store.set(next); show();
  });
  show();
}

// Tables

const order = new Intl.Collator("en", { numeric: true });
const none = () => Object.create(null); // names of axes are a user's
const state = { q: "", preset: "", defense: "", least: "", picks: none(), sorts: none() };

function valueOf(cell) {
  if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  return cell.textContent.trim() || null;
}

function compare(a, b, sign) { // what is missing comes last, whichever way round
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : order.compare(a, b));
}

class Grid {
  constructor(table) {
    this.table = table;
    this.name = table.dataset.name;
    this.preset = table.dataset.preset;
    this.heads = [...table.tHead.rows[0].cells];
    this.none = document.getElementById(`none-${this.name}`);
    const names = this.heads.map(head => head.dataset.axis);
    this.rows = [...table.tBodies[0].rows].map(element => {
      const cells = [...element.cells];
      const picks = none();
      cells.forEach((cell, i) => { if (names[i]) picks[names[i]] = cell.textContent.trim(); });
      const text = cells.map(cell => cell.textContent).join(" ").replace(/\s/g, " ").toLowerCase();
      return { element, cells, picks, text, defense: cells[0].textContent.trim(),
               n: Number((cells.find(cell => cell.classList.contains("n")) || { dataset: { v: 0 } }).dataset.v) };
    });
    this.heads.forEach((head, i) => this.makeButton(head, i));
  }

  makeButton(head, i) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.firstChild.nodeType === 3 ? [head.firstChild] : [...head.childNodes]);
    head.prepend(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = head.dataset.first || "ascending", second = first === "ascending" ? "descending" : "ascending";
      const next = now === null ? first : now === first ? second : null;
      this.sort(next === null ? null : i, next);
      say(next === null ? `${this.table.dataset.title}: original order`
                        : `${this.table.dataset.title}: sorted by ${button.textContent.trim()}, ${next}`);
      keep();
    });
  }

  sort(column, direction) {
    this.heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", direction) : head.removeAttribute("aria-sort"));
    const sign = direction === "descending" ? -1 : 1;
    const keys = new Map(this.rows.map(row => [row, column === null ? null : valueOf(row.cells[column])]));
    const sorted = column === null ? this.rows : [...this.rows].sort((a, b) => compare(keys.get(a), keys.get(b), sign));
    this.table.tBodies[0].append(...sorted.map(row => row.element)); // sort is stable, so ties keep the order of the page
    if (column === null) delete state.sorts[this.name]; else state.sorts[this.name] = `${direction} ${this.heads[column].dataset.key}`;
  }

  filter(words) {
    let shown = 0;
    for (const row of this.rows) {
      const fits = (!state.preset || state.preset === this.preset) && row.n >= (Number(state.least) || 0)
        && (!state.defense || state.defense === row.defense)
        && words.every(word => row.text.includes(word))
        && Object.entries(state.picks).every(([axis, label]) => !label || row.picks[axis] === label);
      row.element.hidden = !fits;
      shown += fits;
    }
    if (this.none) {
      this.none.hidden = shown > 0;
      this.none.parentElement.classList.toggle("empty", shown === 0);
    }
    return shown;
  }
}

const grids = [];

function filterAll() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = grids.reduce((sum, grid) => sum + grid.filter(words), 0);
  const all = grids.reduce((sum, grid) => sum + grid.rows.length, 0);
  const place = document.getElementById("shown");
  if (place) place.value = shown === all ? `All ${all} rows are shown.` : `${shown} of ${all} rows are shown.`;
}

// The state of the page is in its address, so that a view can be linked

function keep() {
  const found = new URLSearchParams();
  if (state.q) found.set("q", state.q);
  for (const name of ["preset", "defense", "least"]) if (state[name]) found.set(name, state[name]);
  for (const [axis, label] of Object.entries(state.picks)) if (label) found.set(`at.${axis}`, label);
  for (const [name, sort] of Object.entries(state.sorts)) found.set(`sort.${name}`, sort);
  const text = found.toString();
  try { history.replaceState(null, "", location.href.split("#")[0] + (text ? `#${text}` : "")); } catch { /* some viewers forbid it */ }
}

function restore() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return false;
  const found = new URLSearchParams(hash);
  for (const name of ["q", "preset", "defense", "least"]) state[name] = found.get(name) || "";
  Object.assign(state, { picks: none(), sorts: none() });
  for (const [key, value] of found) if (key.startsWith("at.")) state.picks[key.slice(3)] = value;
  for (const grid of grids) {
    const [direction, ...rest] = (found.get(`sort.${grid.name}`) || "").split(" ");
    const key = rest.join(" ");
    const column = grid.heads.findIndex(head => head.dataset.key === key);
    if (column >= 0 && ["ascending", "descending"].includes(direction)) grid.sort(column, direction); else grid.sort(null, null);
  }
  return true;
}

function showState(form) { // a link may name what is no longer here: only what the form can show is kept
  const asked = state.picks;
  state.picks = none();
  for (const field of form.elements) {
    if (!field.name) continue;
    const axis = field.name.startsWith("at.") ? field.name.slice(3) : null;
    field.value = (axis === null ? state[field.name] : asked[axis]) || "";
    if (field.tagName === "SELECT" && field.selectedIndex < 0) field.value = "";
    if (axis === null) state[field.name] = field.value; else state.picks[axis] = field.value;
  }
  if (!form.elements.preset) state.preset = "";
}

function filters() {
  const form = document.getElementById("filters");
  if (!form) return;
  form.hidden = false;
  let waiting = 0;
  const take = field => {
    if (field.name.startsWith("at.")) state.picks[field.name.slice(3)] = field.value; else state[field.name] = field.value;
    clearTimeout(waiting);
    waiting = setTimeout(() => { filterAll(); keep(); }, field.name === "q" ? 120 : 0);
  };
  for (const kind of ["input", "change"]) form.addEventListener(kind, event => take(event.target));
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => {
    Object.assign(state, { q: "", preset: "", defense: "", least: "", picks: none() });
    filterAll(); keep();
  }));
  const all = () => { if (restore()) { showState(form); filterAll(); } };
  addEventListener("hashchange", all);
  filterAll();
  all();
}

// Runs

function openTarget() {
  const target = location.hash.length > 1 && !location.hash.includes("=") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
    target.firstElementChild.focus({ preventScroll: true });
  }
}

async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* not everywhere */ }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function copyButtons() {
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const done = await copy(button.parentElement.querySelector("code").textContent);
      button.textContent = done ? "Copied" : "Select and copy by hand";
      say(button.textContent);
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  for (const table of document.querySelectorAll("table.sortable")) grids.push(new Grid(table));
  filters();
  copyButtons();
  addEventListener("hashchange", openTarget);
  openTarget();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
});
