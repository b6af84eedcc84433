// The page's start, its menus and its keyboard.

import { $, button, call, copy, el, icon, saying, set, toast } from "./util.js";
import * as model from "./state.js";
import { cancelDrawing, deleteKey, nudge, pressKey, renderStage, startStage } from "./stage.js";
import { renderPanel, showField, showTab } from "./panel.js";
import { cancelAll, closeGrid, generate, listen, listResults, renderView } from "./results.js";

const { state, info } = model;
const TOOLS = { select: "V", box: "B", ellipse: "E", polygon: "P", freehand: "F", brush: "M", eraser: "X" };
const NAMES = { brush: "Brush for masks", eraser: "Eraser", freehand: "Freehand polygon" };
let clipboard = [];

function render() {
  renderPanel();
  renderView();
  renderStage();
  const { past, future } = model.history();
  $("undo").disabled = !past;
  $("redo").disabled = !future;
  $("file-name").textContent = state.file;
  $("dirty").hidden = !model.isDirty();
  const cost = state.seen?.cost;
  $("cost").textContent = cost ? `${cost.times.toFixed(2)} × plain FLUX` : "";
  $("cost").title = cost ? cost.lines.join("\n") : "";
  $("size").textContent = state.seen ? `${state.seen.width} × ${state.seen.height} · ${state.seen.grid.width} × ${state.seen.grid.height} tokens` : "";
  for (const tool of $("tools").querySelectorAll("[data-tool]")) set(tool, { "aria-pressed": String(tool.dataset.tool === state.tool) });
  set($("show-tokens"), { "aria-pressed": String(state.showTokens) });
  set($("show-regions"), { "aria-pressed": String(state.showShapes) });
  set($("snap"), { "aria-pressed": String(state.snap) });
  $("brush-size").hidden = !["brush", "eraser"].includes(state.tool);
  $("brush-width").value = state.brush;
  document.body.dataset.pending = String(state.pending);
}

const toggle = (key) => () => ((state[key] = !state[key]), model.render());
const useTool = (tool) => () => (cancelDrawing(), (state.tool = tool), model.render());
const zoom = (factor) => () => ((state.zoom = factor ? Math.min(Math.max(state.zoom * factor, 0.25), 8) : 1), renderStage());
const duplicate = () => {
  const own = state.selected.map((i) => copy(model.regions()[i]));
  own.forEach((region) => model.add(region));
  state.selected = own.map((_, k) => model.regions().length - own.length + k);
  model.commit();
};

// ---------------------------------------------------------------- files

const save = saying(async () => {
  try {
    await model.save();
  } catch (error) {
    if (!/changed by another/.test(error.message)) throw error;
    const again = async () => {
      const { version } = await call(`open?name=${encodeURIComponent(state.file)}`);
      await model.save(state.file, version);
    };
    toast(error.message, "Save all the same", saying(again));
  }
});

function ask(title, ...fields) {
  const dialog = $("dialog");
  return new Promise((done) => {
    const form = el("form", { method: "dialog" }, el("h2", {}, title), ...fields);
    form.append(el("div", { class: "actions" }, el("button", { value: "" }, "Cancel"), el("button", { value: "ok", class: "primary" }, "OK")));
    dialog.replaceChildren(form);
    dialog.onclose = () => done(dialog.returnValue === "ok");
    dialog.returnValue = "";
    dialog.showModal();
  });
}

const labeled = (text, input) => el("label", {}, text, input);
const choice = (names) => el("select", {}, ...names.map((name) => el("option", {}, name)));

const openFile = saying(async (name = null) => {
  const names = choice(info.files);
  names.value = state.file;
  if (name === null && !(await ask("Open a layout", labeled("File in the opened folder", names)))) return;
  await model.open(name ?? names.value);
  state.view = null;
  await listResults();
});

const saveAs = saying(async () => {
  const input = el("input", { type: "text", value: state.file, spellcheck: "false" });
  if (await ask("Save as", labeled("File in the opened folder", input))) await model.save(input.value, null);
});

const newFile = saying(async () => {
  const input = el("input", { type: "text", value: "new.yaml", spellcheck: "false" });
  if (await ask("New layout", labeled("File in the opened folder", input))) await model.open(input.value);
});

const bring = saying(async () => {
  const file = el("input", { type: "file", required: true });
  const form = choice(info.imports);
  const width = el("input", { type: "text", inputmode: "numeric", placeholder: "if the file does not say" });
  const height = el("input", { type: "text", inputmode: "numeric", placeholder: "if the file does not say" });
  const fields = [labeled("File", file), labeled("Its form", form), labeled("Width", width), labeled("Height", height)];
  if (!(await ask("Import", ...fields)) || !file.files[0]) return;
  const bytes = new Uint8Array(await file.files[0].arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  const size = width.value && height.value ? [+width.value, +height.value] : null;
  const found = await call("import", { file: state.file, name: file.files[0].name, form: form.value, data: btoa(text), size });
  state.layout = found.layout;
  state.marks = [];
  model.commit();
  found.warnings.forEach((warning) => toast(warning));
});

const send = saying(async () => {
  const form = choice(info.exports);
  if (!(await ask("Export", labeled("Form", form)))) return;
  const found = await call("export", { file: state.file, layout: state.layout, form: form.value });
  [...found.warnings, `Written: ${found.written.join(", ")}`].forEach((text) => toast(text));
});

const help = () => $("keys").showModal();

// ---------------------------------------------------------------- keyboard

function select(by) {
  const count = model.regions().length;
  if (!count) return;
  const from = state.selected[0] ?? (by > 0 ? -1 : 0);
  state.selected = [(from + by + count) % count];
  model.commit();
}

function editPrompt() {
  const [i] = state.selected;
  if (i !== undefined) showField(`regions[${i}].prompt`);
}

function bracket(by) {
  if (["brush", "eraser"].includes(state.tool)) state.brush = Math.min(Math.max(state.brush + 8 * by, 8), 256);
  else if (state.selected.length === 1) return model.reorder(state.selected[0], by);
  return model.render();
}

const markAll = (key) => () => state.selected.forEach((i) => model.mark(i, key));
const pasted = () => (clipboard.forEach((region) => model.add(copy(region))), model.commit());
const copied = () => (clipboard = state.selected.map((i) => copy(model.regions()[i])));
const all = () => ((state.selected = model.regions().map((_, i) => i)), model.commit());
const none = () => cancelDrawing() || closeGrid() || ((state.selected = []), model.commit());
const ANYWHERE = {
  "ctrl+enter": () => generate(), "ctrl+s": () => save(), "ctrl+o": () => openFile(), "ctrl+z": () => model.undo(),
  "ctrl+shift+z": () => model.redo(), "ctrl+y": () => model.redo(),
};
const OUTSIDE_TEXT = {
  ...Object.fromEntries(Object.entries(TOOLS).map(([tool, key]) => [key.toLowerCase(), useTool(tool)])),
  delete: deleteKey, backspace: deleteKey, "ctrl+d": duplicate, "ctrl+c": copied, "ctrl+v": pasted,
  "ctrl+x": () => (copied(), model.removeSelected()), "ctrl+a": all, escape: none, ".": () => select(1), ",": () => select(-1),
  "[": () => bracket(-1), "]": () => bracket(1), h: markAll("hidden"), l: markAll("locked"), t: toggle("showTokens"),
  r: toggle("showShapes"), s: toggle("snap"), "+": zoom(1.25), "-": zoom(0.8), 0: zoom(0), "?": help, "shift+?": help,
};
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function keydown(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const name = `${event.ctrlKey || event.metaKey ? "ctrl+" : ""}${event.shiftKey && event.key.length > 0 && !"?+".includes(key) ? "shift+" : ""}${key}`.toLowerCase();
  if (document.querySelector("dialog[open]")) return;
  const isText = event.target.matches("input:not([type=range], [type=checkbox], [type=color]), textarea, select");
  let run = ANYWHERE[name] ?? (isText ? null : OUTSIDE_TEXT[name]);
  if (isText && name === "escape") run = () => $("stage").focus();
  const isStage = event.target === $("stage") || event.target === document.body;
  if (!run && isStage && ARROWS[event.key] && !event.ctrlKey) run = () => nudge(...ARROWS[event.key], event);
  if (!run && isStage && event.key === "Enter") run = () => pressKey({ isLast: event.shiftKey }) || editPrompt();
  if (!run) return;
  event.preventDefault();
  run();
}

// ---------------------------------------------------------------- start

function build() {
  for (const [tool, key] of Object.entries(TOOLS)) {
    const label = `${NAMES[tool] ?? tool[0].toUpperCase() + tool.slice(1)} (${key})`;
    $("tools").append(button(tool, label, useTool(tool), { "data-tool": tool }));
  }
  for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
  const actions = { undo: model.undo, redo: model.redo, save, open: openFile, "save-as": saveAs, new: newFile, import: bring, export: send, help, generate, cancel: cancelAll };
  Object.assign(actions, { "show-tokens": toggle("showTokens"), "show-regions": toggle("showShapes"), snap: toggle("snap") });
  Object.assign(actions, { "zoom-in": zoom(1.25), "zoom-out": zoom(0.8), "zoom-fit": zoom(0) });
  for (const [id, run] of Object.entries(actions)) {
    $(id).addEventListener("click", () => {
      $("menu").removeAttribute("open");
      run();
    });
  }
  $("add-region").addEventListener("click", () => {
    const { width, height } = model.size();
    const edges = [width / 4, height / 4, (3 * width) / 4, (3 * height) / 4];
    model.add({ box: edges.map((edge) => Math.round(edge / 16) * 16) });
    model.commit();
    editPrompt();
  });
  $("brush-width").addEventListener("input", () => (state.brush = +$("brush-width").value));
  $("compare-at").addEventListener("input", renderView);
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = tabs[(i + by + tabs.length) % tabs.length];
      showTab(next.dataset.tab);
      next.focus();
    });
  });
  document.addEventListener("keydown", keydown);
  document.addEventListener("click", (event) => $("menu").contains(event.target) || $("menu").removeAttribute("open"));
  window.addEventListener("resize", renderStage);
}

async function start() {
  Object.assign(info, await call("start"));
  build();
  model.onChange(render);
  startStage();
  const last = localStorage.getItem(`editor ${info.folder}`);
  const first = info.file ?? (info.files.includes(last) ? last : info.files[0]) ?? "layout.yaml";
  await model.open(first);
  model.onChange(() => localStorage.setItem(`editor ${info.folder}`, state.file));
  showTab("regions");
  listen();
  await listResults();
  document.body.dataset.ready = "true";
}

saying(start)();
window.editor = { model }; // for scripts, and the tests
