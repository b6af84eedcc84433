// The image's area: regions as SVG, the token grid on a canvas below them, and the tools.

import { $, imageAt, loaded, saying, set, svg, toast } from "./util.js";
import * as geometry from "./geometry.js";
import { add, colorOf, commit, put, regions, removeSelected, render, sendMask, size, state } from "./state.js";

const { bounds, clamp, kindOf, shapeOf, snapped } = geometry;
const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const LETTER = 7.2; // pixels of the screen
const MASK = 512; // pixels of a mask that is shown, at most
let gesture = null; // what the pointer is doing
let drawn = null; // the shape that is being drawn, in pixels of the image
let cursor = null; // of the keyboard, [x, y]
let paint = null; // the brush's canvas
const groups = []; // of SVG, by region
const masks = new Map(); // tinted masks by their files and colors

const scale = () => $("shapes").getBoundingClientRect().width / size().width || 1;
const shapes = () => regions().map((region) => shapeOf(region, size()));
const isFree = (i) => !state.marks[i]?.hidden && !state.marks[i]?.locked;

// ---------------------------------------------------------------- what is seen

export function renderStage() {
  const { width, height } = size();
  const room = $("stage").getBoundingClientRect();
  const fit = Math.min((room.width - 32) / width, (room.height - 76) / height);
  const zoom = Math.max(fit, 0.05) * state.zoom;
  Object.assign($("board").style, { width: `${width * zoom}px`, height: `${height * zoom}px` });
  set($("shapes"), { viewBox: `0 0 ${width} ${height}` });
  $("shapes").dataset.tool = state.tool;
  $("board").classList.toggle("has-picture", !$("picture").hidden);
  const all = shapes();
  const layer = $("regions-layer");
  layer.style.display = state.showShapes ? "" : "none";
  while (groups.length > all.length) groups.pop().root.remove();
  all.forEach((shape, i) => {
    groups[i] ??= newGroup(layer);
    renderRegion(groups[i], shape, i, 1 / zoom);
  });
  renderHandles(all, 1 / zoom);
  renderTokens();
}

function newGroup(layer) {
  const group = { root: svg("g"), path: svg("path"), image: svg("image"), label: svg("g", { class: "label" }) };
  group.pill = svg("rect", { height: 20, rx: 5 });
  group.text = svg("text", { x: 7, y: 14 });
  group.label.append(group.pill, group.text);
  group.root.append(group.image, group.path, group.label);
  layer.append(group.root);
  return group;
}

function renderRegion(group, shape, i, unit) {
  const { prompt } = regions()[i];
  const mark = state.marks[i] ?? {};
  const isSelected = state.selected.includes(i);
  const isMask = shape && !shape.box && !shape.rings;
  const key = JSON.stringify([shape, prompt, mark, isSelected, unit, size(), isMask && masks.get(maskKey(i))?.url]);
  if (group.key === key) return;
  group.key = key;
  group.root.style.display = mark.hidden ? "none" : "";
  group.root.setAttribute("class", `region${isSelected ? " selected" : ""}${mark.locked ? " locked" : ""}`);
  group.root.style.setProperty("--color", colorOf(i));
  set(group.path, { d: shape && !isMask ? geometry.pathOf(shape) : "M0 0" });
  const mask = isMask ? tinted(i, shape) : null;
  set(group.image, { href: mask?.url, width: size().width, height: size().height, preserveAspectRatio: "none" });
  const box = bounds(shape) ?? mask?.box ?? [0, 0, 0, 0];
  const isBox = shape?.kind === "box";
  const width = (box[2] - box[0]) * (shape?.rings ? 0.6 : 1);
  const room = Math.max(Math.floor((width / unit - 22) / LETTER), 2);
  const text = `${i}  ${typeof prompt === "string" ? prompt : ""}`.trim();
  group.text.textContent = text.length > room ? `${text.slice(0, Math.max(room - 1, 2)).trim()}…` : text;
  const wide = group.text.getComputedTextLength() + 14;
  set(group.pill, { width: wide });
  const start = isBox ? `${box[0]} ${box[1]}` : `${(box[0] + box[2]) / 2} ${(box[1] + box[3]) / 2}`;
  set(group.label, { transform: `translate(${start}) scale(${unit}) translate(${isBox ? "4 4" : `${-wide / 2} -10`})` });
}

function renderHandles(all, unit) {
  const layer = $("handles");
  layer.replaceChildren();
  const [only] = state.selected;
  const shape = state.selected.length === 1 && isFree(only) && state.showShapes ? all[only] : null;
  const dot = (x, y, name) => {
    const at = `translate(${x} ${y}) scale(${unit})`;
    const touch = svg("circle", { r: 14, class: "touch" });
    layer.append(svg("g", { transform: at, "data-handle": name, class: `handle ${name}` }, touch, svg("circle", { r: 5 })));
  };
  if (shape?.rings) shape.rings.forEach((ring, k) => ring.forEach(([x, y], j) => dot(x, y, `point ${k} ${j}`)));
  else if (shape?.box) {
    const [x0, y0, x1, y1] = shape.box;
    const x = { w: x0, e: x1 };
    const y = { n: y0, s: y1 };
    for (const name of HANDLES) dot(x[name.at(-1)] ?? (x0 + x1) / 2, y[name[0]] ?? (y0 + y1) / 2, name);
  }
  const outline = drawn && (drawn.box || drawn.rings) ? geometry.pathOf(drawn).replace(/Z$/, drawn.open ? "" : "Z") : "";
  const width = 1.5 * unit;
  if (outline) layer.append(svg("path", { d: outline, class: `drawn ${drawn.kind}`, "stroke-width": width }));
  if (cursor) {
    const [x, y] = cursor;
    const cross = `M${x - 12 * unit} ${y}h${24 * unit}M${x} ${y - 12 * unit}v${24 * unit}`;
    layer.append(svg("path", { d: cross, class: "cursor", "stroke-width": 2 * unit }));
  }
}

// Each token in its regions' colors; in several, in stripes; the background dotted.
let tokensKey = null;
function renderTokens() {
  const canvas = $("tokens");
  const grid = state.seen?.grid;
  canvas.hidden = !state.showTokens || !grid;
  if (canvas.hidden) return;
  canvas.classList.toggle("stale", state.errors !== state.seen.errors);
  const colors = regions().map((_, i) => colorOf(i));
  const key = colors.join();
  if (tokensKey?.grid === grid && tokensKey.key === key) return;
  tokensKey = { grid, key };
  const cell = clamp(Math.floor(2048 / Math.max(grid.width, grid.height)), 2, 16);
  Object.assign(canvas, { width: grid.width * cell, height: grid.height * cell });
  const context = canvas.getContext("2d");
  let place = 0;
  for (const [count, ...own] of grid.runs) {
    for (let i = 0; i < count; i++, place++) {
      const x = (place % grid.width) * cell;
      const y = Math.floor(place / grid.width) * cell;
      context.fillStyle = own.length ? colors[own[0]] : "#8889";
      if (!own.length) context.fillRect(x + cell / 2 - 1, y + cell / 2 - 1, 2, 2);
      else context.fillRect(x, y, cell - 0.5, cell - 0.5);
      for (let k = 1; k < own.length; k++) {
        context.fillStyle = colors[own[k]];
        context.beginPath();
        const start = (2 * cell * k) / own.length;
        context.moveTo(x + Math.min(start, cell), y + Math.max(0, start - cell));
        context.lineTo(x + cell, y + (start < cell ? 0 : start - cell));
        context.lineTo(x + cell, y + cell);
        context.lineTo(x, y + cell);
        context.lineTo(x + Math.max(0, start - cell), y + Math.min(start, cell));
        context.fill();
      }
    }
  }
}

// ---------------------------------------------------------------- masks

const fileOf = (name) => [...state.file.split("/").slice(0, -1), name].join("/");
const maskKey = (i) => JSON.stringify([regions()[i].mask ?? [state.layout.map, regions()[i].color], colorOf(i)]);

// The picture of a mask or of a map's color in the region's color; null until it is loaded.
function tinted(i, shape) {
  const key = maskKey(i);
  if (!masks.has(key)) {
    masks.set(key, {});
    if (masks.size > 300) masks.delete(masks.keys().next().value);
    const color = colorOf(i);
    const name = shape.kind === "mask" ? shape.name : state.layout.map;
    const url = state.masks[name] ?? imageAt(fileOf(String(name)));
    const draw = (image) => (masks.set(key, tint(image, color, shape)), render());
    loaded(url).then(draw, () => null); // a wrong name is an error at its field
  }
  return masks.get(key).url ? masks.get(key) : null;
}

function tint(image, color, shape) {
  const factor = Math.min(1, MASK / Math.max(image.width, image.height));
  const canvas = new OffscreenCanvas(Math.ceil(image.width * factor), Math.ceil(image.height * factor));
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = shape.kind === "mask";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const data = context.getImageData(0, 0, canvas.width, canvas.height);
  const rgb = typeof shape.name === "string" ? shape.name.slice(1).match(/../g)?.map((x) => parseInt(x, 16)) : shape.name;
  const own = color.match(/\w\w/g).map((x) => parseInt(x, 16));
  const box = [Infinity, Infinity, 0, 0];
  const pixels = data.data;
  for (let k = 0; k < pixels.length; k += 4) {
    const [r, g, b, a] = pixels.subarray(k, k + 4);
    const isGray = shape.kind === "mask" && (0.299 * r + 0.587 * g + 0.114 * b) * (a / 255) >= 127.5;
    const isInside = isGray || (shape.kind === "color" && Array.isArray(rgb) && r === rgb[0] && g === rgb[1] && b === rgb[2]);
    pixels.set([...own, isInside ? 110 : 0], k);
    if (!isInside) continue;
    const x = (k / 4) % canvas.width;
    const y = Math.floor(k / 4 / canvas.width);
    box[0] = Math.min(box[0], x);
    box[1] = Math.min(box[1], y);
    box[2] = Math.max(box[2], x + 1);
    box[3] = Math.max(box[3], y + 1);
  }
  const page = document.createElement("canvas");
  Object.assign(page, { width: canvas.width, height: canvas.height });
  page.getContext("2d").putImageData(data, 0, 0);
  const sides = [size().width / canvas.width, size().height / canvas.height];
  const edges = box[0] === Infinity ? [0, 0, 0, 0] : box.map((edge, k) => edge * sides[k % 2]);
  return { url: page.toDataURL(), data, box: edges };
}

function isInside(i, shape, x, y) {
  if (shape.box || shape.rings) return geometry.contains(shape, x, y);
  const { data } = masks.get(maskKey(i)) ?? {};
  if (!data) return false;
  const column = Math.floor((x / size().width) * data.width);
  const row = Math.floor((y / size().height) * data.height);
  return data.data[4 * (row * data.width + column) + 3] > 0;
}

async function startPainting() {
  const [i] = state.selected;
  const name = state.selected.length === 1 ? regions()[i]?.mask : null;
  paint = document.createElement("canvas");
  Object.assign(paint, size());
  const context = paint.getContext("2d");
  if (!name) return context;
  const own = paint; // the stroke may be over when the mask is here
  const image = await loaded(state.masks[name] ?? imageAt(fileOf(name)));
  context.globalCompositeOperation = "destination-over";
  const { data } = tint(image, "#ffffff", { kind: "mask" });
  for (let k = 3; k < data.data.length; k += 4) data.data[k] = data.data[k] ? 255 : 0;
  const page = await createImageBitmap(data);
  context.imageSmoothingEnabled = false;
  if (own === paint) context.drawImage(page, 0, 0, paint.width, paint.height);
  return context;
}

function stroke([x0, y0], [x1, y1]) {
  const context = paint.getContext("2d");
  const live = $("paint").getContext("2d");
  for (const target of [context, live]) {
    target.globalCompositeOperation = state.tool === "eraser" && target === context ? "destination-out" : "source-over";
    const color = state.tool === "eraser" ? "#000a" : state.selected.length ? colorOf(state.selected[0]) : "#338ec1";
    const style = target === context ? "#fff" : color;
    Object.assign(target, { lineCap: "round", lineJoin: "round", lineWidth: state.brush, strokeStyle: style });
    target.beginPath();
    target.moveTo(x0, y0);
    target.lineTo(x1, y1 + 0.01);
    target.stroke();
  }
}

const endPainting = saying(async (canvas) => {
  const page = document.createElement("canvas");
  Object.assign(page, { width: canvas.width, height: canvas.height });
  const context = page.getContext("2d");
  context.fillRect(0, 0, page.width, page.height);
  context.drawImage(canvas, 0, 0);
  const name = await sendMask(page.toDataURL("image/png"));
  const [i] = state.selected;
  if (state.selected.length === 1 && kindOf(regions()[i]) === "mask") put(["regions", i, "mask"], name);
  else add({ mask: name });
  $("paint").getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  commit();
});

// ---------------------------------------------------------------- tools

function under(x, y) {
  const all = shapes();
  return all.map((shape, i) => i).filter((i) => all[i] && isFree(i) && state.showShapes && isInside(i, all[i], x, y)).reverse();
}

// keys: of the event, or of the keyboard's cursor.
export function press([x, y], keys = {}, handle = null) {
  const point = [x, y];
  const found = under(x, y);
  const { tool } = state;
  if (gesture?.kind === "polygon") return addPoint(point, keys);
  if (handle && !keys.ctrlKey && !keys.metaKey) {
    gesture = { kind: "resize", handle, shape: shapes()[state.selected[0]] };
  } else if (keys.altKey && found.length) {
    const next = (found.indexOf(state.selected[0]) + 1) % found.length;
    state.selected = [found[next]];
  } else if (keys.shiftKey && found.length && !keys.isDragged) {
    const [i] = found;
    state.selected = state.selected.includes(i) ? state.selected.filter((j) => j !== i) : [...state.selected, i];
    gesture = { kind: "marquee", start: point, kept: state.selected };
  } else if (keys.shiftKey) {
    gesture = { kind: "marquee", start: point, kept: state.selected };
  } else if (tool === "brush" || tool === "eraser") {
    Object.assign($("paint"), size());
    gesture = { kind: "paint", ready: startPainting(), last: point };
    stroke(point, point);
  } else if (tool === "polygon") {
    gesture = { kind: "polygon", points: [] };
    addPoint(point, keys);
  } else if (tool === "freehand") {
    gesture = { kind: "freehand", points: [point] };
  } else if (found.length && !keys.ctrlKey && !keys.metaKey) {
    if (!state.selected.some((i) => found.includes(i))) state.selected = [found[0]];
    const free = state.selected.filter((i) => isFree(i) && bounds(shapes()[i]));
    gesture = { kind: "move", start: point, hit: found[0], shapes: free.map((i) => [i, shapes()[i]]) };
  } else if (tool === "select" && !(keys.ctrlKey || keys.metaKey)) {
    state.selected = [];
    gesture = { kind: "marquee", start: point, kept: [] };
  } else { gesture = { kind: tool === "ellipse" ? "ellipse" : "box", start: point }; }
  render();
}

export function drag([x, y]) {
  if (!gesture) return;
  const { kind, start } = gesture;
  const { width, height } = size();
  const at = [clamp(snapped(x, state.snap), 0, width), clamp(snapped(y, state.snap), 0, height)];
  gesture.isMoved = true;
  if (kind === "move") {
    for (const [i, shape] of gesture.shapes) {
      const [left, top] = bounds(shape);
      const dx = snapped(left + x - start[0], state.snap) - left;
      const dy = snapped(top + y - start[1], state.snap) - top;
      place(i, geometry.moved(shape, dx, dy, size()));
    }
  } else if (kind === "resize") {
    resize(at);
  } else if (kind === "box" || kind === "ellipse" || kind === "marquee") {
    const from = kind === "marquee" ? start : start.map((value, i) => clamp(snapped(value, state.snap), 0, i ? height : width));
    const to = kind === "marquee" ? [x, y] : at;
    const box = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
    drawn = { kind: kind === "ellipse" ? kind : "box", box };
    if (kind === "marquee") selectIn(box);
  } else if (kind === "freehand") {
    gesture.points.push([clamp(x, 0, width), clamp(y, 0, height)]);
    drawn = { kind: "polygon", rings: [gesture.points], open: true };
  } else if (kind === "polygon") {
    drawn = { kind, rings: [[...gesture.points, at]], open: true };
  } else if (kind === "paint") {
    stroke(gesture.last, [x, y]);
    gesture.last = [x, y];
  }
  renderStage();
}

export function release() {
  const done = gesture;
  if (!done || done.kind === "polygon") return;
  gesture = null;
  const box = drawn?.box;
  if ((done.kind === "box" || done.kind === "ellipse") && box && box[2] > box[0] && box[3] > box[1]) {
    add({ [done.kind]: box.map((edge) => +edge.toFixed(2)) });
  } else if (done.kind === "freehand") {
    const points = geometry.simplified(done.points, 2 / scale()).map((point) => point.map(Math.round));
    if (points.length > 3) add({ polygon: points });
  } else if (done.kind === "paint") {
    const canvas = paint;
    done.ready.then(() => endPainting(canvas), (error) => toast(error.message));
  }
  if (done.kind === "move" && !done.isMoved && state.selected.length > 1) state.selected = [done.hit];
  drawn = null;
  commit();
}

function addPoint(point, keys) {
  const { points } = gesture;
  const { width, height } = size();
  let at = [clamp(snapped(point[0], state.snap), 0, width), clamp(snapped(point[1], state.snap), 0, height)];
  if (keys.shiftKey && points.length) at = at45(points.at(-1), at);
  const [x, y] = points[0] ?? [];
  const isNear = Math.hypot(point[0] - x, point[1] - y) < 12 / scale() || (at[0] === x && at[1] === y);
  const isClosed = points.length > 2 && isNear;
  if (isClosed || keys.isLast) {
    if (points.length > 2) add({ polygon: points });
    gesture = drawn = null;
    return commit();
  }
  points.push(at);
  drawn = { kind: "polygon", rings: [[...points, at]], open: true };
  render();
}

function at45([x0, y0], [x, y]) {
  const angle = (Math.round(Math.atan2(y - y0, x - x0) / (Math.PI / 4)) * Math.PI) / 4;
  const length = Math.hypot(x - x0, y - y0);
  return [x0 + length * Math.cos(angle), y0 + length * Math.sin(angle)].map(Math.round);
}

function selectIn([x0, y0, x1, y1]) {
  const inside = shapes().flatMap((shape, i) => {
    const box = isFree(i) && (bounds(shape) ?? masks.get(maskKey(i))?.box);
    return box && box[0] < x1 && box[2] > x0 && box[1] < y1 && box[3] > y0 ? [i] : [];
  });
  state.selected = [...new Set([...gesture.kept, ...inside])];
}

function resize([x, y]) {
  const [i] = state.selected;
  const { shape, handle } = gesture;
  const [what, k, j] = handle.split(" ");
  if (what !== "point") return place(i, geometry.fitted(shape, geometry.resized(shape.box, handle, x, y)));
  const rings = shape.rings.map((ring, a) => ring.map((point, b) => (a === +k && b === +j ? [x, y] : point)));
  return place(i, { ...shape, rings });
}

const place = (i, shape) => put(["regions", i], geometry.withShape(regions()[i], shape, size()));

export function cancelDrawing() {
  const was = gesture || drawn || cursor;
  gesture = drawn = cursor = null;
  render();
  return was;
}

// Arrow keys: move or resize what is selected, else the cursor of the drawing tools.
export function nudge(dx, dy, keys) {
  const step = keys.altKey ? 1 : geometry.SNAP;
  const chosen = state.selected.filter((i) => isFree(i) && bounds(shapes()[i]));
  if (!chosen.length || gesture) {
    const { width, height } = size();
    cursor ??= [snapped(width / 2, true), snapped(height / 2, true)];
    cursor = [clamp(cursor[0] + dx * step, 0, width), clamp(cursor[1] + dy * step, 0, height)];
    if (gesture) drag(cursor);
    return render();
  }
  for (const i of chosen) {
    const shape = shapes()[i];
    const [x0, y0, x1, y1] = bounds(shape);
    const wide = [x0, y0, clamp(x1 + dx * step, x0 + 1, size().width), clamp(y1 + dy * step, y0 + 1, size().height)];
    place(i, keys.shiftKey ? geometry.fitted(shape, wide) : geometry.moved(shape, dx * step, dy * step, size()));
  }
  commit("nudge");
}

// Enter: presses and releases the tool at the cursor.
export function pressKey(keys) {
  if (state.tool === "select" || (!cursor && state.selected.length)) return false;
  if (!cursor) nudge(0, 0, keys);
  if (gesture && gesture.kind !== "polygon") release();
  else press(cursor, { ...keys, ctrlKey: true });
  if (!gesture) cursor = null;
  return true;
}

export function startStage() {
  const board = $("shapes");
  const pointOf = (event) => {
    const box = board.getBoundingClientRect();
    const { width, height } = size();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };
  let next = null;
  board.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault();
    $("stage").focus({ preventScroll: true });
    board.setPointerCapture(event.pointerId);
    cursor = null;
    press(pointOf(event), event, event.target.closest("[data-handle]")?.dataset.handle);
  });
  board.addEventListener("pointermove", (event) => {
    if (!gesture) return;
    if (!next) {
      requestAnimationFrame(() => {
        next?.forEach(drag);
        next = null;
      });
    }
    const isLine = gesture.kind === "freehand" || gesture.kind === "paint";
    const points = isLine ? (event.getCoalescedEvents?.() ?? [event]).map(pointOf) : [pointOf(event)];
    next = isLine ? [...(next ?? []), ...points] : points;
  });
  const end = () => {
    next?.forEach(drag);
    next = null;
    release();
  };
  board.addEventListener("pointerup", end);
  board.addEventListener("pointercancel", end);
  board.addEventListener("dblclick", (event) => {
    if (gesture?.kind === "polygon") return press(pointOf(event), { isLast: true });
    const [i] = under(...pointOf(event));
    if (i !== undefined) document.querySelector(`[data-key="regions[${i}].prompt"] textarea`)?.focus();
  });
  new ResizeObserver(renderStage).observe($("stage"));
}

export function deleteKey() {
  if (gesture?.kind === "polygon") {
    gesture.points.pop();
    return gesture.points.length ? drag(cursor ?? gesture.points.at(-1)) : cancelDrawing();
  }
  removeSelected();
}

