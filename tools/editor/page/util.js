// Elements, JSON that keeps large integers, and calls of the server.

const SVG = "http://www.w3.org/2000/svg";

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
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
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
  } catch { throw new Error("The editor's program does not answer. Is it still running?"); }
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
    } catch (error) { toast(error.message); }
  };
}
