// Shapes of regions: a layout's pixels and percentages, and pixels of the image.

export const SNAP = 16;
export const KINDS = ["box", "ellipse", "polygon", "mask", "color"];

export const kindOf = (region) => KINDS.find((kind) => region[kind] !== undefined && region[kind] !== null);
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
export const snapped = (value, isOn) => (isOn ? Math.round(value / SNAP) * SNAP : Math.round(value));

const pixels = (value, side) =>
  typeof value === "string" && value.endsWith("%") ? (parseFloat(value) * side) / 100 : value;

// A number in the form that stood there: a percentage stays one.
function like(old, value, side) {
  if (typeof old === "string" && old.endsWith("%")) return `${+((100 * value) / side).toFixed(3)}%`;
  return +value.toFixed(2);
}

const isPoint = (point) => Array.isArray(point) && point.length === 2 && !Array.isArray(point[0]);

// { kind, box } or { kind, rings } in pixels; null if it is no shape that can be drawn.
export function shapeOf(region, size) {
  const kind = kindOf(region);
  const value = region[kind];
  if (kind === "box" || kind === "ellipse") {
    if (!Array.isArray(value) || value.length !== 4) return null;
    const box = value.map((edge, i) => pixels(edge, i % 2 ? size.height : size.width));
    return box.every(Number.isFinite) ? { kind, box } : null;
  }
  if (kind === "polygon") {
    if (!Array.isArray(value)) return null;
    const rings = (isPoint(value[0]) ? [value] : value).map((ring) =>
      Array.isArray(ring) ? ring.map((point) => [pixels(point?.[0], size.width), pixels(point?.[1], size.height)]) : [],
    );
    const isGood = rings.length && rings.every((ring) => ring.length && ring.flat().every(Number.isFinite));
    return isGood ? { kind, rings } : null;
  }
  return kind ? { kind, name: value } : null;
}

export function withShape(region, shape, size) {
  const found = { ...region };
  const old = region[shape.kind];
  if (shape.box) {
    found[shape.kind] = shape.box.map((edge, i) => like(old?.[i], edge, i % 2 ? size.height : size.width));
  } else if (shape.rings) {
    const isFlat = !old || isPoint(old[0]);
    const rings = shape.rings.map((ring, k) =>
      ring.map(([x, y], i) => {
        const before = isFlat ? old?.[i] : old?.[k]?.[i];
        return [like(before?.[0], x, size.width), like(before?.[1], y, size.height)];
      }),
    );
    found.polygon = isFlat ? rings[0] : rings;
  }
  return found;
}

export function bounds(shape) {
  if (shape?.box) return shape.box;
  if (!shape?.rings) return null;
  const points = shape.rings.flat();
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

export function pathOf(shape) {
  if (shape.box) {
    const [x0, y0, x1, y1] = shape.box;
    if (shape.kind === "box") return `M${x0} ${y0}H${x1}V${y1}H${x0}Z`;
    const rx = (x1 - x0) / 2;
    const ry = (y1 - y0) / 2;
    const y = y0 + ry;
    return `M${x0} ${y}A${rx} ${ry} 0 1 1 ${x1} ${y}A${rx} ${ry} 0 1 1 ${x0} ${y}Z`;
  }
  return shape.rings.map((ring) => `M${ring.map((point) => point.join(" ")).join("L")}Z`).join("");
}

export function contains(shape, x, y) {
  if (shape.box) {
    const [x0, y0, x1, y1] = shape.box;
    if (shape.kind === "box") return x0 <= x && x < x1 && y0 <= y && y < y1;
    return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 < 1;
  }
  let inside = false;
  for (const ring of shape.rings ?? []) {
    ring.forEach(([x1, y1], i) => {
      const [x0, y0] = ring[(i || ring.length) - 1];
      if (y0 > y !== y1 > y && x < ((x1 - x0) * (y - y0)) / (y1 - y0) + x0) inside = !inside;
    });
  }
  return inside;
}

// Moved as far as the image allows.
export function moved(shape, dx, dy, size) {
  const [x0, y0, x1, y1] = bounds(shape);
  const x = clamp(dx, -x0, size.width - x1);
  const y = clamp(dy, -y0, size.height - y1);
  if (shape.box) return { ...shape, box: [x0 + x, y0 + y, x1 + x, y1 + y] };
  return { ...shape, rings: shape.rings.map((ring) => ring.map(([a, b]) => [a + x, b + y])) };
}

// The shape in another box.
export function fitted(shape, box) {
  if (shape.box) return { ...shape, box };
  const [x0, y0, x1, y1] = bounds(shape);
  const scale = (value, low, high, start, end) => start + ((value - low) / (high - low || 1)) * (end - start);
  const point = ([x, y]) => [scale(x, x0, x1, box[0], box[2]), scale(y, y0, y1, box[1], box[3])];
  return { ...shape, rings: shape.rings.map((ring) => ring.map(point)) };
}

// A box's edges after its handle, such as "ne", was dragged to a point.
export function resized(box, handle, x, y, least = 1) {
  const [x0, y0, x1, y1] = box;
  return [
    handle.includes("w") ? Math.min(x, x1 - least) : x0,
    handle.includes("n") ? Math.min(y, y1 - least) : y0,
    handle.includes("e") ? Math.max(x, x0 + least) : x1,
    handle.includes("s") ? Math.max(y, y0 + least) : y1,
  ];
}

// Douglas and Peucker's: the points without which a line would move by more than `most`.
export function simplified(points, most) {
  if (points.length < 3) return points;
  const [a, b] = [points[0], points.at(-1)];
  const length = Math.hypot(b[0] - a[0], b[1] - a[1]);
  const distance = ([x, y]) =>
    length ? Math.abs((b[0] - a[0]) * (a[1] - y) - (a[0] - x) * (b[1] - a[1])) / length : Math.hypot(x - a[0], y - a[1]);
  const distances = points.map(distance);
  const far = distances.indexOf(Math.max(...distances));
  if (distances[far] <= most) return [a, b];
  return [...simplified(points.slice(0, far + 1), most).slice(0, -1), ...simplified(points.slice(far), most)];
}
