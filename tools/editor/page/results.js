// Images: the queue and its progress, the strip, and what is shown of an image over the regions.

import { $, button, call, el, imageAt, parse, saying, set, toast } from "./util.js";
import { at, colorOf, commit, regions, render, size, state, undo } from "./state.js";
import { showTab } from "./panel.js";

const jobs = new Map(); // by id, the latest last
const older = []; // images that were in the folder
const tiles = new Map();
const maps = new Map(); // attention maps by the images' names
let worker = { state: "starting" };
let batch = []; // ids of the latest click on Generate

const pathOf = (job) => [...job.file.split("/").slice(0, -1), job.name].join("/");
const isOver = (job) => !["waiting", "running"].includes(job.state);
const sourceOf = (view) => (view?.job ? sourceOfJob(jobs.get(view.job)) : view && imageAt(view.name, view.version));
const sourceOfJob = (job) => (job?.state === "done" ? imageAt(pathOf(job), job.id) : job?.preview);

export const generate = saying(async () => {
  const count = Math.min(Math.max(parseInt($("count").value, 10) || 1, 1), 16);
  const first = at(["seed"]) ?? Math.floor(Math.random() * 2 ** 32);
  const isPlain = Number.isInteger(first);
  const seeds = count > 1 && isPlain ? Array.from({ length: count }, (_, i) => first + i) : [];
  const found = await call("generate", { file: state.file, layout: state.layout, seeds, maps: $("want-maps").checked });
  batch = found.jobs.map((job) => job.id);
  state.view = { job: batch[0] };
  state.showGrid = count > 1;
  renderResults();
});

export const cancelAll = saying(async () => {
  for (const job of jobs.values()) if (!isOver(job)) await call("cancel", { id: job.id });
});

export function listen() {
  const source = new EventSource("api/events");
  source.onmessage = ({ data }) => {
    const event = parse(data);
    if (event.kind === "all") event.jobs.forEach((job) => jobs.set(job.id, job));
    if (event.worker) worker = event.worker;
    if (event.job) heard(event.job);
    renderResults();
  };
  source.onerror = () => (worker = { state: "gone", error: "The editor's program does not answer." });
}

function heard(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  if (before?.state === job.state || !isOver(job)) return;
  if (job.state === "failed") toast(job.error);
  if (job.kept) toast(`${job.name} was drawn before with these settings and is kept.`);
  (job.warnings ?? []).forEach((text) => state.seen?.warnings.some((each) => each.text === text) || toast(text));
}

export async function listResults() {
  const { results } = await call(`results?file=${encodeURIComponent(state.file)}`);
  older.splice(0, older.length, ...results);
  renderResults();
}

// ---------------------------------------------------------------- the strip

export function renderResults() {
  const shown = [...jobs.values()].reverse();
  const names = new Set(shown.filter((job) => job.name).map(pathOf));
  const entries = shown.map((job) => [`job ${job.id}`, job]);
  for (const result of older) if (!names.has(result.name)) entries.push([`file ${result.name}`, result]);
  for (const key of tiles.keys()) if (!entries.some(([other]) => other === key)) (tiles.get(key).root.remove(), tiles.delete(key));
  entries.forEach(([key, entry], i) => {
    if (!tiles.has(key)) tiles.set(key, newTile(entry));
    const tile = tiles.get(key);
    if ($("strip").children[i] !== tile.root) $("strip").insertBefore(tile.root, $("strip").children[i] ?? null);
    renderTile(tile, entry);
  });
  $("strip-empty").hidden = entries.length > 0;
  renderProgress();
  renderView();
}

function newTile(entry) {
  const image = el("img", { alt: "" });
  const text = el("span", { class: "tile-text" });
  const bar = el("span", { class: "bar" }, el("span"));
  const view = entry.id ? { job: entry.id } : { name: entry.name };
  const open = el("button", { type: "button", class: "tile-open", onclick: () => show(view) }, image, bar, text);
  const stop = button("close", "Cancel", saying(() => call("cancel", { id: entry.id })), { class: "stop" });
  const root = el("li", { class: "tile" }, open, entry.id ? stop : null);
  return { root, image, text, bar, open, stop, view };
}

function renderTile(tile, entry) {
  const isJob = Boolean(entry.id);
  const source = isJob ? sourceOfJob(entry) : imageAt(entry.name);
  set(tile.image, { src: source ?? null });
  tile.image.hidden = !source;
  const seed = entry.seed === null || entry.seed === undefined ? "" : `seed ${entry.seed}`;
  const texts = { waiting: `place ${entry.place ?? ""}`, running: `${entry.step ?? 0} / ${entry.steps ?? "…"}`, failed: "failed", cancelled: "cancelled" };
  tile.text.textContent = texts[entry.state] ?? seed;
  set(tile.open, { "aria-label": `${entry.name ?? entry.state}, ${seed}`, "aria-current": JSON.stringify(state.view) === JSON.stringify(tile.view) ? "true" : null, title: entry.error ?? entry.name ?? "" });
  tile.root.className = `tile ${entry.state ?? "done"}`;
  tile.stop.hidden = !isJob || isOver(entry);
  tile.bar.hidden = entry.state !== "running";
  tile.bar.firstChild.style.width = `${(100 * (entry.step ?? 0)) / (entry.steps || 1)}%`;
}

function renderProgress() {
  const open = [...jobs.values()].filter((job) => !isOver(job));
  const running = open.find((job) => job.state === "running");
  const texts = { starting: "Loading the model …", failed: worker.error, restarting: "The drawing process is started anew …", gone: worker.error };
  let text = texts[worker.state] ?? "";
  if (running?.steps) {
    const left = running.left ? ` · ${running.left < 10 ? running.left.toFixed(1) : Math.round(running.left)} s left` : "";
    text = `step ${running.step} of ${running.steps}${left}${open.length > 1 ? ` · ${open.length - 1} waiting` : ""}`;
  }
  $("progress").textContent = text ?? "";
  $("cancel").hidden = !open.length;
}

// ---------------------------------------------------------------- what is shown of an image

export function show(view) {
  Object.assign(state, { view, showGrid: false, compare: null, heat: false });
  showTab("image");
  render();
  renderResults();
}

export function renderView() {
  const source = sourceOf(state.view);
  const picture = $("picture");
  picture.hidden = !source;
  if (source) set(picture, { src: source });
  picture.style.opacity = state.dim;
  const job = state.view?.job && jobs.get(state.view.job);
  const name = job ? (job.state === "done" ? pathOf(job) : null) : state.view?.name;
  const other = sourceOf(state.compare);
  $("compare").hidden = $("compare-at").hidden = !other;
  if (other) {
    set($("compare"), { src: other });
    $("compare").style.clipPath = `inset(0 0 0 ${$("compare-at").value}%)`;
  }
  renderHeat(name);
  renderGrid();
  renderAbout(name, job);
}

// Several seeds side by side, while they are drawn and after.
function renderGrid() {
  $("seeds").hidden = !state.showGrid;
  $("board").classList.toggle("has-seeds", Boolean(state.showGrid));
  if (!state.showGrid) return;
  const { width, height } = size();
  $("seeds").style.gridTemplateColumns = `repeat(${Math.ceil(Math.sqrt((batch.length * height) / width))}, 1fr)`;
  while ($("seeds").children.length > batch.length) $("seeds").lastChild.remove();
  batch.forEach((id, i) => {
    const job = jobs.get(id) ?? { state: "waiting" };
    const cell = $("seeds").children[i] ?? $("seeds").appendChild(el("button", { type: "button" }, el("img", { alt: "" }), el("span")));
    cell.onclick = () => show({ job: id });
    const source = sourceOfJob(job);
    cell.firstChild.hidden = !source;
    set(cell.firstChild, { src: source ?? null });
    cell.lastChild.textContent = job.state === "running" ? `seed ${job.seed} · ${job.step}/${job.steps ?? "…"}` : `seed ${job.seed ?? ""} ${job.state === "done" ? "" : job.state}`;
  });
}

function renderHeat(name) {
  const canvas = $("heat");
  const [i] = state.selected;
  const found = maps.get(name);
  const row = found?.regions[i ?? 0];
  canvas.hidden = !state.heat || !row;
  $("board").classList.toggle("has-heat", !canvas.hidden);
  if (canvas.hidden) return;
  Object.assign(canvas, { width: found.width, height: found.height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(found.width, found.height);
  const color = colorOf(i ?? 0).match(/\w\w/g).map((x) => parseInt(x, 16));
  [...atob(row)].forEach((letter, k) => {
    const heat = letter.charCodeAt(0) / 255;
    pixels.data.set([...color.map((part) => part * heat), 215 - 130 * heat], 4 * k);
  });
  context.putImageData(pixels, 0, 0);
}

let aboutKey = "";
function renderAbout(name, job) {
  const isRegion = state.selected.length === 1;
  const key = JSON.stringify([state.view, name, job?.state, job?.has_maps, state.selected, state.heat, state.compare, [...jobs.keys()].length, regions().length]);
  if (key === aboutKey) return;
  aboutKey = key;
  const box = $("about-image");
  if (!state.view) return box.replaceChildren(el("p", { class: "empty" }, "Draw an image, or choose one in the strip below."));
  if (!name) return box.replaceChildren(el("p", { class: "empty" }, job?.error ?? `This image is ${job?.state ?? "gone"}.`));
  const others = [...jobs.values()].filter((each) => each.state === "done" && pathOf(each) !== name).map((each) => [pathOf(each), { job: each.id }]);
  for (const each of older) if (each.name !== name && !others.some(([other]) => other === each.name)) others.push([each.name, { name: each.name }]);
  const choose = el("select", { "aria-label": "Compare with" }, el("option", { value: "" }, "Compare with …"), ...others.map(([other], i) => el("option", { value: i }, other)));
  choose.value = state.compare ? others.findIndex(([, view]) => JSON.stringify(view) === JSON.stringify(state.compare)) : "";
  choose.onchange = () => ((state.compare = choose.value === "" ? null : others[choose.value][1]), renderResults());
  const act = (text, run, isOff = false, why = "") => el("button", { type: "button", onclick: saying(run), disabled: isOff, title: why }, text);
  const heat = act(state.heat ? "Hide attention" : "Attention of the region", () => toggleHeat(name), !job?.has_maps && !maps.has(name), "Tick “attention maps” before drawing");
  set(heat, { "aria-pressed": String(Boolean(state.heat)) });
  const repaint = act("Repaint this region only", () => repaintRegion(name), !isRegion, "Select one region first");
  const settings = el("dl", { class: "settings" });
  box.replaceChildren(
    el("h2", {}, name),
    settings,
    el("div", { class: "actions" }, act("Use its layout", () => useLayout(name)), repaint, heat, choose),
    el("label", { class: "slider" }, "Opacity", opacitySlider()),
  );
  describe(name, settings);
}

function opacitySlider() {
  const input = el("input", { type: "range", min: 0, max: 1, step: 0.05, value: state.dim });
  input.oninput = () => ((state.dim = +input.value), ($("picture").style.opacity = state.dim));
  return input;
}

async function describe(name, list) {
  const found = await call(`open?name=${encodeURIComponent(name)}`).catch(() => null);
  if (!found) return;
  const { layout } = found;
  const rows = { seed: layout.seed, size: `${layout.width} × ${layout.height}`, steps: layout.steps, guidance: layout.guidance ?? 3.5, regions: (layout.regions ?? []).length, prompt: layout.prompt };
  list.replaceChildren(...Object.entries(rows).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, String(value?.rawJSON ?? value ?? "–"))]));
}

async function useLayout(name) {
  const { layout } = await call(`open?name=${encodeURIComponent(name)}`);
  state.layout = layout;
  state.marks = [];
  commit();
  toast("The layout is that of the image.", "Undo", undo);
}

async function toggleHeat(name) {
  if (!maps.has(name)) maps.set(name, await call(`maps?name=${encodeURIComponent(name.split("/").pop())}`));
  state.heat = !state.heat;
  renderResults();
}

async function repaintRegion(name) {
  const [i] = state.selected;
  const image = { file: name.split("/").pop(), repaint: { regions: [i] } };
  const layout = { ...state.layout, image };
  const seeds = [Math.floor(Math.random() * 2 ** 32)];
  const { jobs: made } = await call("generate", { file: state.file, layout, seeds, maps: false });
  batch = made.map((job) => job.id);
  state.view = { job: batch[0] };
  renderResults();
}

export const closeGrid = () => state.showGrid && ((state.showGrid = false), renderResults(), true);
