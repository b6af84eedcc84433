// Elements, JSON that keeps large integers, and calls of the server.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = {
  select: "M4 3l12 6-5 2-2 5z",
  box: "M3.5 4.5h13v11h-13z",
  ellipse: "M10 4.5c4 0 6.5 2.4 6.5 5.5s-2.5 5.5-6.5 5.500S3.5 13.1 3.5 10 6 4.5 10 4.500z",
  polygon: "M4 15L5.5 6 11 3.5 16.5 8.5 13 16z",
  freehand: "M3 13c2-7 5-10 6-7s-3 8 0 8 3-6 5-6 0 4 3 4",
  brush: "M16.5 3.500L9 11M9 11c-2.5-.5-4 1-4 3 0 1-.5 1.5-1.5 2 3 1 6.5 0 6.5-3z",
  eraser: "M8 16h8M4 12l7-7.5 5 5L9.5 16H7.500z",
  undo: "M4 8h8a4 4 0 0 1 0 8H8M4 8l3.5-3.500M4 8l3.5 3.5",
  redo: "M16 8H8a4 4 0 0 0 0 8h4M16 8l-3.5-3.500M16 8l-3.5 3.5",
  eye: "M2.5 10C5 5.5 15 5.5 17.5 10 15 14.5 5 14.5 2.5 10zM10 8a2 2 0 1 0 0 4 2 2 0 0 0 0-4z",
  hidden: "M2.5 10C5 5.5 15 5.5 17.5 10 15 14.5 5 14.5 2.5 10zM4 16L16 4",
  lock: "M5.5 9h9v7h-9zM7 9V6.500a3 3 0 0 1 6 0V9",
  unlocked: "M5.5 9h9v7h-9zM7 9V6.500a3 3 0 0 1 5.7-1.3",
  up: "M10 16V4M5 9l5-5 5 5",
  down: "M10 4v12M5 11l5 5 5-5",
  copy: "M7 7h9v9H7zM4 13V4h9",
  remove: "M4.5 6h11M8 6V4h4v2M6 6l.7 10h6.600L14 6",
  plus: "M10 4v12M4 10h12",
  minus: "M4 10h12",
  close: "M5 5l10 10M15 5L5 15",
  more: "M4 6h12M4 10h12M4 14h12",
  help: "M7 7.500a3 3 0 1 1 4.5 2.600c-1 .6-1.5 1-1.5 2.200M10 15.500v.1",
};

export const $ = (id) => document.getElementById(id);

// An element: el("button", { class: "x", onclick: f }, "text", child). Text never becomes HTML.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  set(node, attributes);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  set(node, attributes);
  node.append(...children);
  return node;
}

export function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === null || value === undefined || value === false) node.removeAttribute(name);
    else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
  }
}

export function icon(name) {
  const path = svg("path", { d: SHAPES[name] });
  return svg("svg", { viewBox: "0 0 20 20", class: "icon", "aria-hidden": "true" }, path);
}

export function button(name, label, onclick, attributes = {}) {
  return el("button", { type: "button", title: label, "aria-label": label, onclick, ...attributes }, icon(name));
}

// Integers beyond 2^53 keep all digits, as JSON.rawJSON.
export function parse(text) {
  return JSON.parse(text, (_, value, context) => {
    const isLarge = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
    return isLarge && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
  });
}

export const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
export const copy = (value) => (value === undefined ? undefined : parse(JSON.stringify(value)));

export async function call(name, body) {
  const request = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(`api/${name}`, request);
  } catch {
    throw new Error("The editor's program does not answer. Is it still running?");
  }
  const found = parse(await response.text());
  if (!response.ok) throw new Error(found.error);
  return found;
}

export const imageAt = (name, version = "") => `api/image?name=${encodeURIComponent(name)}${version && `#${version}`}`;

export function loaded(url) {
  return new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => fail(new Error("the image cannot be read"));
    image.src = url;
  });
}

// A message at the bottom, with an optional action.
export function toast(text, action = null, run = null) {
  const box = el("div", { class: "toast", role: "status" }, el("span", {}, text));
  const end = () => box.remove();
  if (action) box.append(el("button", { type: "button", onclick: () => (end(), run()) }, action));
  box.append(button("close", "Dismiss", end, { class: "quiet" }));
  $("toasts").append(box);
  setTimeout(end, action ? 20000 : 8000);
}

export function saying(run) {
  return async (...given) => {
    try {
      return await run(...given);
    } catch (error) {
      toast(error.message);
    }
  };
}
