// The lists and forms beside the image: regions, and every key of the layout by its JSON Schema.

import { $, button, el, same, set } from "./util.js";
import { kindOf, shapeOf, withShape } from "./geometry.js";
import { add, at, colorOf, commit, info, mark, put, regions, renderNow, reorder, size, state } from "./state.js";

const FIRST = ["prompt", "background_prompt", "style", "width", "height", "steps", "seed", "guidance"];
const USUAL = [...FIRST, "base_ratio", "mask_inject_steps", "preset", "overlap"];
const REGION = ["strength", "feather", "mask_inject_steps", "base_ratio"];
const SHAPES = ["box", "ellipse", "polygon", "mask", "color"];
const LONG = /prompt|style/;
const fields = []; // of the forms that are shown: { key, path, input, show }
let builtRegions = "";
let builtLayout = "";

// ---------------------------------------------------------------- values and texts

function resolved(schema) {
  if (schema.$ref) return { ...info.schema.$defs[schema.$ref.split("/").pop()], ...schema, $ref: undefined };
  const options = (schema.anyOf ?? []).filter((option) => option.type !== "null");
  return options.length === 1 ? { ...schema, ...resolved(options[0]), anyOf: undefined } : schema;
}

const takes = (schema, type) => schema.type === type || (schema.anyOf ?? []).some((option) => option.type === type);

// What was typed, as the layout's value; undefined for nothing.
function valueOf(text, schema) {
  const trimmed = text.trim();
  const isText = schema.type === "string" && !schema.anyOf;
  if (isText && trimmed === '""') return "";
  if (isText) return text === "" && "default" in schema ? undefined : text;
  if (trimmed === "") return undefined;
  if (schema.type === "array" || trimmed.startsWith("[")) {
    try {
      return JSON.parse(trimmed.startsWith("[") ? trimmed : `[${trimmed}]`);
    } catch { return trimmed.startsWith("[") ? text : trimmed.split(/\s*,\s*/); }
  }
  if (/^[-+]?\d{16,}$/.test(trimmed) && JSON.rawJSON) return JSON.rawJSON(String(BigInt(trimmed)));
  return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(trimmed) && isFinite(trimmed) ? Number(trimmed) : text;
}

function textOf(value, schema) {
  if (value === undefined || value === null) return "";
  if (typeof value === "string") return value;
  if (Array.isArray(value) && schema.type === "array" && value.every((part) => typeof part !== "object")) return value.join(", ");
  return JSON.stringify(value);
}

const keyOf = (path) => path.reduce((key, part) => (typeof part === "number" ? `${key}[${part}]` : key ? `${key}.${part}` : part), "");

// ---------------------------------------------------------------- fields

// A label, its input, and what the program says about it.
function field(path, schema, name, input, show) {
  const key = keyOf(path);
  const id = `field ${key}`.replace(/\W+/g, "-");
  const said = el("div", { class: "said", id: `${id}-said` });
  set(input, { id, "aria-describedby": `${id}-said` });
  fields.push({ key, path, input, said, show });
  const hint = schema.description ? el("div", { class: "hint" }, schema.description) : null;
  const label = el("label", { for: id, title: schema.description ?? "" }, name.replaceAll("_", " "));
  return el("div", { class: `field${input.type === "checkbox" ? " check" : ""}`, "data-key": key }, label, input, hint, said);
}

function textField(path, schema, name, isLong = LONG.test(name)) {
  const fallback = schema.default ?? info.defaults[name];
  const placeholder = typeof fallback === "object" || fallback === undefined ? "" : String(fallback);
  const input = isLong ? el("textarea", { rows: 2 }) : el("input", { type: "text", autocomplete: "off" });
  set(input, { placeholder, spellcheck: isLong ? "true" : "false" });
  if (!isLong && (takes(schema, "integer") || takes(schema, "number")) && !takes(schema, "string")) set(input, { inputmode: "decimal" });
  input.addEventListener("input", () => {
    put(path, valueOf(input.value, schema));
    commit(keyOf(path));
  });
  return field(path, schema, name, input, (value) => {
    if (!same(valueOf(input.value, schema), value)) input.value = textOf(value, schema);
    if (value === "" && placeholder) input.placeholder = "(empty)";
    else if (path.length === 1 || isInherited(path)) input.placeholder = textOf(state.seen?.values?.[name], schema) || placeholder;
    if (isLong) fit(input);
  });
}

// A region's own value stands in for the layout's.
const isInherited = (path) => path.length === 3 && ["base_ratio", "mask_inject_steps", "negative_prompt"].includes(path[2]);

function fit(input) {
  if (CSS.supports("field-sizing", "content")) return;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function choiceField(path, schema, name) {
  const first = schema.default ?? "–";
  const names = schema.enum.filter((option) => option !== null && option !== schema.default);
  const options = [el("option", { value: "" }, `${first}`), ...names.map((option) => el("option", {}, option))];
  const input = el("select", {}, ...options);
  input.addEventListener("change", () => {
    put(path, input.value || undefined);
    commit();
  });
  return field(path, schema, name, input, (value) => {
    const isKnown = names.includes(value) || value === undefined || value === null || value === schema.default;
    if (!isKnown && ![...input.options].some((option) => option.value === value)) input.append(el("option", {}, String(value)));
    input.value = value === schema.default ? "" : (value ?? "");
  });
}

function boolField(path, schema, name) {
  const input = el("input", { type: "checkbox" });
  input.addEventListener("change", () => {
    put(path, input.checked === (schema.default ?? false) ? undefined : input.checked);
    commit();
  });
  return field(path, schema, name, input, (value) => (input.checked = value ?? schema.default ?? false));
}

// A list of parts, such as loras, or one part, such as image.
function partsField(path, schema, name) {
  const part = schema.type === "array" ? resolved(schema.items) : schema;
  const value = at(path);
  const entries = schema.type === "array" ? (Array.isArray(value) ? value : []).map((_, i) => [...path, i]) : value ? [path] : [];
  const boxes = entries.map((own) => {
    const gone = () => {
      const isLast = schema.type === "array" && at(path).length === 1;
      put(isLast ? path : own, undefined);
      commit();
    };
    const keys = Object.entries(part.properties).map(([key, inner]) => anyField([...own, key], inner, key));
    return el("div", { class: "part" }, ...keys, button("remove", `Remove from ${name}`, gone, { class: "quiet" }));
  });
  const begin = () => {
    const empty = Object.fromEntries((part.required ?? []).map((key) => [key, ""]));
    put(schema.type === "array" ? [...path, entries.length] : path, empty);
    commit();
  };
  const label = el("span", { class: "title", title: schema.description ?? "" }, name.replaceAll("_", " "));
  const more = button("plus", `Add to ${name.replaceAll("_", " ")}`, begin, { class: "quiet" });
  const isFull = schema.type !== "array" && value;
  const said = el("div", { class: "said" });
  fields.push({ key: keyOf(path), path, said });
  const head = el("div", { class: "head" }, label, isFull ? null : more);
  return el("div", { class: "parts", "data-key": keyOf(path) }, head, said, ...boxes);
}

function anyField(path, given, name) {
  const schema = { ...resolved(given), description: given.description ?? "", default: given.default };
  if (given.default === undefined || given.default === null) delete schema.default;
  const items = schema.type === "array" && schema.items ? resolved(schema.items) : null;
  if (schema.properties || items?.properties) return partsField(path, schema, name);
  if (schema.enum) return choiceField(path, schema, name);
  if (schema.type === "boolean") return boolField(path, schema, name);
  return textField(path, schema, name);
}

// ---------------------------------------------------------------- the region list

function shapeField(i) {
  const region = regions()[i];
  const kind = kindOf(region);
  const schema = { ...info.schema.$defs.Region.properties[kind ?? "box"] };
  if (!kind || !shapeOf(region, size())?.box) {
    return textField(["regions", i, kind ?? "box"], { ...schema, type: kind === "mask" ? "string" : "array" }, kind ?? "box", kind === "polygon");
  }
  const names = ["left", "top", "right", "bottom"];
  const inputs = names.map((name, k) => {
    const input = el("input", { type: "text", inputmode: "decimal", "aria-label": name, title: name, autocomplete: "off" });
    const path = ["regions", i, kind, k];
    input.addEventListener("input", () => {
      put(path, valueOf(input.value, {}) ?? "");
      commit(keyOf(path));
    });
    const show = (value) => !same(valueOf(input.value, {}) ?? "", value) && (input.value = textOf(value, {}));
    fields.push({ key: keyOf(path), path, input, show, said: el("div", { class: "said" }) });
    return input;
  });
  const other = kind === "box" ? "ellipse" : "box";
  const swap = () => {
    const shape = shapeOf(regions()[i], size());
    const changed = withShape({ ...regions()[i], [other]: regions()[i][kind] }, { ...shape, kind: other }, size());
    delete changed[kind];
    put(["regions", i], changed);
    commit();
  };
  const said = el("div", { class: "said" });
  fields.push({ key: keyOf(["regions", i, kind]), path: ["regions", i, kind], said });
  const turn = el("button", { type: "button", class: "link", onclick: swap }, `to ${other}`);
  const label = el("div", { class: "head" }, el("span", { class: "title" }, kind), turn);
  return el("div", { class: "field edges", "data-key": keyOf(["regions", i, kind]) }, label, el("div", { class: "four" }, ...inputs), said);
}

function regionRow(i) {
  const path = ["regions", i];
  const own = state.marks[i] ?? {};
  const isOnly = state.selected.length === 1 && state.selected[0] === i;
  const color = el("input", { type: "color", value: colorOf(i), "aria-label": `Color of region ${i}`, title: "Color" });
  color.addEventListener("input", () => {
    state.marks = state.marks.map((each, j) => (j === i ? { ...each, color: color.value } : each));
    commit(`color ${i}`);
  });
  const schema = info.schema.$defs.Region.properties;
  const prompt = textField([...path, "prompt"], { type: "string" }, `Region ${i}`, true);
  set(prompt.querySelector("textarea"), { rows: 1, placeholder: "what this region shows" });
  const pick = () => {
    state.selected = [i];
    commit();
  };
  prompt.querySelector("textarea").addEventListener("focus", () => state.selected.includes(i) || pick());
  const remove = () => {
    put(path, undefined);
    state.marks = state.marks.filter((_, j) => j !== i);
    state.selected = [];
    commit();
  };
  const buttons = [
    button("up", `Move region ${i} up`, () => reorder(i, -1)),
    button("down", `Move region ${i} down`, () => reorder(i, 1)),
    button(own.hidden ? "hidden" : "eye", own.hidden ? `Show region ${i}` : `Hide region ${i}`, () => mark(i, "hidden"), { "aria-pressed": String(Boolean(own.hidden)) }),
    button(own.locked ? "lock" : "unlocked", own.locked ? `Unlock region ${i}` : `Lock region ${i}`, () => mark(i, "locked"), { "aria-pressed": String(Boolean(own.locked)) }),
    button("copy", `Duplicate region ${i}`, () => (add(regions()[i], i + 1), commit())),
    button("remove", `Delete region ${i}`, remove),
  ];
  const about = el("button", { type: "button", class: "about", onclick: pick, title: `Select region ${i}` });
  const used = el("span", { class: "used", title: "tokens of the prompt, used and read" });
  const swatch = el("span", { class: "swatch" }, color, el("span", { "aria-hidden": "true" }, String(i)));
  fields.push({ about, used, i });
  const row = el("li", { class: "row" }, el("div", { class: "line" }, swatch, prompt, used), el("div", { class: "line" }, about, el("div", { class: "tools-row" }, ...buttons)));
  const said = el("div", { class: "said" });
  fields.push({ key: keyOf(path), path, said });
  row.append(said);
  if (!isOnly) return row;
  const rest = Object.keys(schema).filter((key) => ![...SHAPES, ...REGION, "prompt", "loras"].includes(key));
  const pairs = el("div", { class: "pairs" }, ...REGION.map((key) => anyField([...path, key], schema[key], key)));
  const lora = anyField([...path, "loras"], schema.loras, "loras");
  const more = el("details", {}, el("summary", {}, "More"), ...rest.map((key) => anyField([...path, key], schema[key], key)));
  more.open = state.isMoreOpen ?? false;
  more.addEventListener("toggle", () => (state.isMoreOpen = more.open));
  row.append(el("div", { class: "details" }, shapeField(i), pairs, lora, more));
  return row;
}

// ---------------------------------------------------------------- rendering

// What decides which fields there are; values alone are written into them.
function skeleton(value) {
  if (Array.isArray(value)) return value.some((part) => part && typeof part === "object") ? value.map(skeleton) : 0;
  if (!value || typeof value !== "object") return 0;
  return Object.entries(value).flatMap(([key, part]) => (part && typeof part === "object" ? [[key, skeleton(part)]] : []));
}

function buildRegions() {
  const only = state.selected.length === 1 ? state.selected[0] : -1;
  const marks = state.marks.map(({ hidden, locked }) => [hidden, locked]);
  const key = JSON.stringify([regions().map(skeletonOf), only, marks, state.file]);
  if (key === builtRegions) return;
  builtRegions = key;
  drop("regions");
  const focused = document.activeElement?.id;
  $("region-list").replaceChildren(...regions().map((_, i) => regionRow(i)));
  if (focused?.startsWith("field-regions")) document.getElementById(focused)?.focus({ preventScroll: true });
  $("region-list").children[only]?.scrollIntoView?.({ block: "nearest" });
}

const skeletonOf = (region) => [kindOf(region), Boolean(shapeOf(region, size())?.box), skeleton({ ...region, polygon: 0 })];

function buildLayout() {
  const { regions: _, ...rest } = info.schema.properties;
  const parts = Object.keys(rest).filter((key) => typeof at([key]) === "object");
  const key = JSON.stringify([state.file, parts.map((name) => [name, skeleton(at([name]))])]);
  if (key === builtLayout) return;
  builtLayout = key;
  drop("layout");
  const usual = USUAL.filter((name) => rest[name]).map((name) => anyField([name], rest[name], name));
  const others = Object.keys(rest).filter((name) => !USUAL.includes(name)).map((name) => anyField([name], rest[name], name));
  const isOpen = $("layout-form").querySelector("details")?.open ?? false;
  const more = el("details", {}, el("summary", {}, "All other keys"), el("div", { class: "pairs" }, ...others));
  more.open = isOpen;
  $("layout-form").replaceChildren(el("div", { class: "pairs" }, ...usual), more);
}

function drop(which) {
  const isOf = ({ key, about }) => (which === "regions") === Boolean(about || key.startsWith("regions"));
  fields.splice(0, fields.length, ...fields.filter((each) => !isOf(each)));
}

export function renderPanel() {
  buildRegions();
  buildLayout();
  for (const { path, input, show } of fields) if (input) show(at(path));
  document.querySelectorAll("#region-list > li").forEach((row, i) => {
    row.classList.toggle("selected", state.selected.includes(i));
    row.style.setProperty("--color", colorOf(i));
    row.querySelector("input[type=color]").value = colorOf(i);
    row.querySelector(".swatch").classList.toggle("dark", isDark(colorOf(i)));
  });
  for (const { about, used, i } of fields) if (about) showAbout(about, used, i);
  renderSaid();
  $("no-regions").hidden = regions().length > 0;
}

const isDark = (color) => {
  const [r, g, b] = color.match(/\w\w/g).map((x) => parseInt(x, 16));
  return 0.299 * r + 0.587 * g + 0.114 * b < 128;
};

function showAbout(about, used, i) {
  const own = state.seen?.regions?.[i];
  const text = state.seen?.tokens?.find(({ key }) => key === `regions[${i}].prompt`);
  const kind = kindOf(regions()[i]) ?? "no shape";
  about.textContent = own ? `${own.tokens} token${own.tokens === 1 ? "" : "s"} · ${(100 * own.fraction).toFixed(1)}%` : kind;
  used.textContent = text ? `${text.used ?? "?"}/${text.limit}` : "";
  used.classList.toggle("over", text?.used > text?.limit);
}

// Errors and warnings, each at the field it is about, or else in the list on top.
function renderSaid() {
  const slots = new Map(fields.filter((each) => each.said?.isConnected).map((each) => [each.key, each]));
  const inputs = new Map(fields.filter((each) => each.input).map((each) => [each.key, each.input]));
  const found = new Map();
  const warnings = state.errors.length ? [] : (state.seen?.warnings ?? []);
  const all = [...state.errors.map((each) => ({ ...each, kind: "error" })), ...warnings.map((each) => ({ ...each, kind: "warning" }))];
  for (const each of all) {
    let { key } = each;
    while (key && !slots.has(key)) key = key.replace(/(\.\w+|\[\d+\]|^\w+)$/, "");
    if (key) found.set(key, [...(found.get(key) ?? []), each]);
  }
  for (const [key, { said }] of slots) {
    const texts = (found.get(key) ?? []).map(({ kind, text }) => el("p", { class: kind }, text));
    if (said.textContent !== texts.map((text) => text.textContent).join("")) said.replaceChildren(...texts);
  }
  const wrong = new Set(state.errors.map(({ key }) => key));
  for (const [key, input] of inputs) set(input, { "aria-invalid": wrong.has(key) || null });
  const list = all.map(({ key, kind, text }) => {
    const show = () => showField(key);
    return el("li", { class: kind }, key ? el("button", { type: "button", onclick: show }, text) : text);
  });
  $("problems").replaceChildren(...list);
  $("problem-box").hidden = !list.length;
  const count = (number, name) => (number ? [`${number} ${name}${number > 1 ? "s" : ""}`] : []);
  $("problem-count").textContent = [...count(state.errors.length, "mistake"), ...count(warnings.length, "warning")].join(", ");
  $("problem-box").classList.toggle("has-errors", state.errors.length > 0);
}

export function showField(key) {
  const index = key.match(/^regions\[(\d+)\]/);
  if (index) state.selected = [+index[1]];
  renderNow();
  showTab(index ? "regions" : "layout");
  while (key && !document.querySelector(`[data-key="${CSS.escape(key)}"]`)) key = key.replace(/(\.\w+|\[\d+\]|^\w+)$/, "");
  const box = key && document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  box?.closest("details")?.setAttribute("open", "");
  box?.querySelector("input, textarea, select")?.focus();
}

export function showTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isIt = tab.dataset.tab === name;
    set(tab, { "aria-selected": String(isIt), tabindex: isIt ? 0 : -1 });
    $(`tab-${tab.dataset.tab}`).hidden = !isIt;
  }
}
