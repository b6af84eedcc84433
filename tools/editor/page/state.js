// What is edited: the layout's values, undo and redo, the draft that survives a reload, and the
// server's answer to each change.

import { call, copy, parse, same, toast } from "./util.js";

const TYPING = 1000; // milliseconds within which changes of one field are one step back
const STEPS = 1000; // that can be undone

export const info = {}; // the server's: schema, defaults, colors, model ...
export const state = {
  file: null,
  version: null,
  saved: "", // the layout on disk, as text
  layout: { prompt: "", regions: [] },
  marks: [], // of each region: color, hidden, locked
  selected: [],
  masks: {}, // drawn ones, as data URLs by their names
  sent: new Set(), // names of masks that the server has
  seen: null, // its answer to the latest layout without mistakes
  errors: [],
  pending: false,
  tool: "select",
  snap: true,
  showTokens: true,
  showShapes: true,
  brush: 48,
  zoom: 1,
  view: null, // the image under the regions: { name } or { job }
  dim: 1, // its opacity
};

const past = [];
const future = [];
let current = { text: "", selected: [] };
let latest = { label: null, time: 0 };
const listeners = [];

export const onChange = (listener) => listeners.push(listener);
let isAwaited = false; // the next frame, to render
export function renderNow() {
  isAwaited = false;
  listeners.forEach((listener) => listener());
}
export function render() {
  if (!isAwaited) requestAnimationFrame(() => isAwaited && renderNow());
  isAwaited = true;
}
export const regions = () => (Array.isArray(state.layout.regions) ? state.layout.regions : []);
export const size = () => ({
  width: state.seen?.width ?? numberOr(state.layout.width, info.defaults.size),
  height: state.seen?.height ?? numberOr(state.layout.height, info.defaults.size),
});
export const isDirty = () => JSON.stringify(state.layout) !== state.saved;
export const colorOf = (i) => state.marks[i]?.color ?? info.colors[i % 61];
export const history = () => ({ past: past.length, future: future.length });

const numberOr = (value, other) => (Number.isInteger(value) && value >= 16 && value <= 8192 ? value : other);
const snapshot = () => ({ text: JSON.stringify([state.layout, state.marks]), selected: state.selected });

// Shows a change; `commit` makes it a step that can be undone. label: of one field's changes.
export function commit(label = null) {
  const regionsNow = regions();
  state.marks = regionsNow.map((_, i) => state.marks[i] ?? { color: freeColor() });
  state.selected = state.selected.filter((i) => i < regionsNow.length);
  const next = snapshot();
  if (next.text === current.text) current = next;
  else {
    const isTyping = label && label === latest.label && Date.now() - latest.time < TYPING;
    if (!isTyping) past.push(current);
    if (past.length > STEPS) past.shift();
    latest = { label, time: Date.now() };
    current = next;
    future.length = 0;
    keepDraft();
    check();
  }
  render();
}

function freeColor() {
  const used = new Set(state.marks.map((mark) => mark?.color));
  return info.colors.slice(0, 61).find((color) => !used.has(color)) ?? info.colors[0];
}

export function undo() { if (past.length) restore(past.pop(), future); }

export function redo() { if (future.length) restore(future.pop(), past); }

function restore(step, other) {
  other.push(current);
  current = step;
  latest = { label: null, time: 0 };
  [state.layout, state.marks] = parse(step.text);
  state.selected = step.selected;
  keepDraft();
  check();
  render();
}

// ---------------------------------------------------------------- regions

export const at = (path) => path.reduce((value, key) => value?.[key], state.layout);

// Sets a value of the layout, or removes its key, without changing what history holds.
export function put(path, value) {
  const changed = (part, [key, ...rest]) => {
    if (rest.length) value = changed(part?.[key] ?? (typeof rest[0] === "number" ? [] : {}), rest);
    const found = Array.isArray(part) ? [...part] : { ...part };
    if (value !== undefined) found[key] = value;
    else if (Array.isArray(found)) found.splice(key, 1);
    else delete found[key];
    return found;
  };
  state.layout = changed(state.layout, path);
}

export function add(region, place = regions().length, mark = null) {
  if (regions().length >= 61) return toast("A layout has at most 61 regions.");
  const found = [...regions()];
  found.splice(place, 0, { prompt: "", ...region });
  state.marks.splice(place, 0, mark ?? { color: freeColor() });
  put(["regions"], found);
  state.selected = [place];
}

export function removeSelected() {
  const gone = new Set(state.selected.filter((i) => !state.marks[i].locked));
  put(["regions"], regions().filter((_, i) => !gone.has(i)));
  state.marks = state.marks.filter((_, i) => !gone.has(i));
  state.selected = [];
  commit();
}

// by: -1 one place up in the list, 1 one down.
export function reorder(i, by) {
  const j = i + by;
  if (j < 0 || j >= regions().length) return;
  const found = [...regions()];
  [found[i], found[j]] = [found[j], found[i]];
  const marks = [...state.marks];
  [marks[i], marks[j]] = [marks[j], marks[i]];
  state.marks = marks;
  put(["regions"], found);
  state.selected = [j];
  commit();
}

export function mark(i, key) {
  state.marks = state.marks.map((own, j) => (j === i ? { ...own, [key]: !own[key] || undefined } : own));
  commit();
}

// ---------------------------------------------------------------- the server's answer

let isAsking = false;
let isStale = false;

export async function check() {
  isStale = true;
  state.pending = true;
  if (isAsking) return;
  isAsking = true;
  while (isStale) {
    isStale = false;
    try {
      await sendMasks();
      const start = performance.now();
      const found = await call("check", { file: state.file, layout: state.layout });
      state.checkTime = performance.now() - start;
      state.errors = found.errors;
      if (found.grid) state.seen = found;
    } catch (error) { state.errors = [{ key: "", text: error.message }]; }
  }
  isAsking = false;
  state.pending = false;
  render();
}

async function sendMasks() {
  for (const { mask } of regions()) {
    if (typeof mask !== "string" || !state.masks[mask] || state.sent.has(mask)) continue;
    await sendMask(state.masks[mask]);
  }
}

export async function sendMask(url) {
  const { name } = await call("mask", { file: state.file, data: url.split(",")[1] });
  state.masks[name] = url;
  state.sent.add(name);
  return name;
}

// ---------------------------------------------------------------- files

const draftKey = () => `editor ${info.folder} ${state.file}`;

function keepDraft() {
  const names = new Set(regions().map((region) => region.mask));
  const masks = Object.fromEntries(Object.entries(state.masks).filter(([name]) => names.has(name)));
  try {
    if (!isDirty()) localStorage.removeItem(draftKey());
    else localStorage.setItem(draftKey(), JSON.stringify({ layout: state.layout, marks: state.marks, masks }));
  } catch { toast("The browser has no room to keep what is not saved."); }
  showTitle();
}

function showTitle() { document.title = `${isDirty() ? "• " : ""}${state.file} – layout editor`; }

export async function open(name) {
  const found = await call(`open?name=${encodeURIComponent(name)}`);
  begin(found);
  return found;
}

// Starts with a layout: what open or import answered.
export function begin({ file, version, layout }) {
  Object.assign(state, { file, version, layout, selected: [], marks: [], masks: {}, sent: new Set(), seen: null });
  state.saved = version ? JSON.stringify(layout) : "";
  state.marks = regions().map((_, i) => ({ color: info.colors[i % 61] }));
  past.length = 0;
  future.length = 0;
  current = snapshot();
  let draft = null;
  try {
    draft = parse(localStorage.getItem(draftKey()) ?? "null");
  } catch { localStorage.removeItem(draftKey()); }
  if (draft && !same(draft.layout, layout)) {
    Object.assign(state, { layout: draft.layout, marks: draft.marks, masks: draft.masks });
    commit();
    toast("Changes that were not saved are back.", "Discard", undo);
  }
  showTitle();
  check();
  render();
}

export async function save(name = state.file, version = state.version) {
  const layout = copy(state.layout);
  const found = await call("save", { file: name, layout, version });
  const isOther = name !== state.file;
  localStorage.removeItem(draftKey());
  Object.assign(state, { file: found.file, version: found.version, saved: JSON.stringify(layout) });
  state.sent = new Set(regions().map((region) => region.mask).filter(Boolean));
  if (!found.comments) toast("Saved. Its comments could not be kept: aliases stand where something changed.");
  else toast(`Saved ${found.file}.`);
  if (isOther) info.files = [...new Set([...info.files, found.file])].sort();
  showTitle();
  check();
}

