// Lines over epochs or steps, and a map of points, as SVG with their numbers beside them.

const BOX = { width: 480, height: 250, left: 52, right: 10, top: 8, bottom: 34 };
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "1 2", "12 4"];
const colour = (number) => `var(--s${number % 6})`;

// Round values between low and high, about `wanted` of them and at least `least` apart; powers of ten where `log`.
function ticks(low, high, wanted, log, least = 0) {
  if (log) {
    const found = [];
    for (let power = Math.ceil(low); power <= Math.floor(high); power += 1) found.push(power);
    return found.length > 1 ? found : [low, (low + high) / 2, high];
  }
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(least, power * [1, 2, 5, 10].find((factor) => factor * power >= raw));
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

function scale(values, from, to) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low === high) { low -= 0.5; high += 0.5; }
  return { low, high, at: (value) => from + ((value - low) / (high - low)) * (to - from) };
}

function axes(chart, x, y) {
  const text = (value) => (chart.log ? (10 ** value).toExponential(0) : String(Number(value.toPrecision(3))));
  return [
    ...ticks(y.low, y.high, 5, chart.log).flatMap((value) => [
      svg("line", { class: "grid", x1: BOX.left, x2: BOX.width - BOX.right, y1: y.at(value), y2: y.at(value) }),
      svg("text", { x: BOX.left - 6, y: y.at(value) + 4, "text-anchor": "end" }, text(value))]),
    ...ticks(x.low, x.high, 6, false, 1).map((value) =>
      svg("text", { x: x.at(value), y: BOX.height - 18, "text-anchor": "middle" }, String(Number(value.toPrecision(6))))),
    svg("text", { x: (BOX.left + BOX.width) / 2, y: BOX.height - 3, "text-anchor": "middle" }, chart.x)];
}

// chart: {title, x, log, phases: [x, ...], series: [{name, points: [[x, y], ...]}]}
function lineChart(chart) {
  const value = (y) => (chart.log ? Math.log10(y) : y);
  const series = chart.series.map((one) => ({ ...one, points: one.points.filter(([, y]) => y !== null && (!chart.log || y > 0)) }))
    .filter((one) => one.points.length);
  if (!series.length) return el("p", { class: "dim" }, `${chart.title}: no values`);
  const all = series.flatMap((one) => one.points);
  const x = scale(all.map((point) => point[0]), BOX.left + 4, BOX.width - BOX.right - 4);
  const y = scale(all.map((point) => value(point[1])), BOX.height - BOX.bottom, BOX.top + 4);
  const said = series.map((one) => `${one.name} from ${shown(one.points[0][1])} to ${shown(one.points.at(-1)[1])}`).join("; ");
  const cursor = svg("line", { class: "grid", y1: BOX.top, y2: BOX.height - BOX.bottom, x1: -9, x2: -9 });
  const reading = el("p", { class: "reading" });
  const drawing = svg("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `${chart.title} by ${chart.x}: ${said}` },
    ...axes(chart, x, y),
    ...chart.phases.map((at) => svg("line", { class: "grid", "stroke-dasharray": "4 3", x1: x.at(at), x2: x.at(at), y1: BOX.top, y2: BOX.height - BOX.bottom })),
    cursor,
    ...series.flatMap((one, number) => [
      svg("polyline", { class: "line", stroke: colour(number), "stroke-dasharray": DASHES[number % 6],
        points: one.points.map(([a, b]) => `${x.at(a).toFixed(1)},${y.at(value(b)).toFixed(1)}`).join(" ") }),
      ...(one.points.length <= 40 ? one.points.map(([a, b]) => svg("circle", { cx: x.at(a), cy: y.at(value(b)), r: 2.4, fill: colour(number) })) : [])]));
  drawing.addEventListener("pointermove", (event) => {
    const place = drawing.getBoundingClientRect();
    const wanted = ((event.clientX - place.left) / place.width) * BOX.width;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(x.at(b[0]) - wanted) < Math.abs(x.at(a[0]) - wanted) ? b : a));
    const at = nearest(all)[0];
    cursor.setAttribute("x1", x.at(at)); cursor.setAttribute("x2", x.at(at));
    reading.textContent = `${chart.x} ${at}: ` + series.map((one) => `${one.name} ${shown(nearest(one.points)[1], 4)}`).join(", ");
  });
  const legend = el("div", { class: "legend", "aria-hidden": "true" }, ...series.map((one, number) => el("span", {},
    svg("svg", { viewBox: "0 0 26 10" }, svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(number), "stroke-width": 2, "stroke-dasharray": DASHES[number % 6] })), one.name)));
  return el("figure", {}, el("figcaption", {}, chart.title), legend, drawing, reading, numbersOf(chart, series));
}

function numbersOf(chart, series) {
  const at = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const kept = at.filter((_, place) => place % Math.ceil(at.length / 100) === 0);
  const of = series.map((one) => new Map(one.points));
  const rows = kept.map((a) => el("tr", {}, el("th", { scope: "row" }, shown(a)), ...of.map((points) => el("td", {}, shown(points.get(a), 4)))));
  const head = el("tr", {}, el("th", { scope: "col" }, chart.x), ...series.map((one) => el("th", { scope: "col" }, one.name)));
  return el("details", {}, el("summary", {}, `Numbers of ${chart.title.toLowerCase()}`),
    scroll(`Numbers of ${chart.title}`, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))));
}

// points: [[row, x, y], ...]; a click on a dot shows its image.
function pointMap(points, open) {
  const x = scale(points.map((point) => point[1]), 10, BOX.width - 10);
  const y = scale(points.map((point) => point[2]), BOX.height - 10, 10);
  const reading = el("p", { class: "reading" });
  const words = (row) => `${images.path[row]}, label ${nameOf(images.target[row])}, predicted ${nameOf(images.prediction[row])}`;
  const dot = ([row, a, b]) => svg("circle", { cx: x.at(a).toFixed(1), cy: y.at(b).toFixed(1), "data-row": row, fill: hue(images.target[row]),
    r: images.target[row] === images.prediction[row] ? 2.5 : 5, stroke: "var(--text)", "stroke-width": images.target[row] === images.prediction[row] ? 0 : 1.2 });
  const drawing = svg("svg", { class: "dots", viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img",
    "aria-label": `Map of ${points.length} images by the two main directions of what the network sees in them; alike images lie together` }, ...points.map(dot));
  const rowOf = (event) => event.target.dataset.row;
  drawing.addEventListener("pointerover", (event) => { if (rowOf(event)) reading.textContent = words(Number(rowOf(event))); });
  drawing.addEventListener("click", (event) => { if (rowOf(event)) open(null, null, images.path[rowOf(event)]); });
  const names = [...new Set(points.map((point) => images.target[point[0]]))].sort((a, b) => a - b);
  const more = names.length > 20 ? el("span", { class: "dim" }, `and ${names.length - 20} more classes: point at a dot to see its class`) : null;
  const legend = el("div", { class: "legend", "aria-hidden": "true" }, ...names.slice(0, 20).map((number) =>
    el("span", {}, svg("svg", { viewBox: "0 0 26 10" }, svg("circle", { cx: 13, cy: 5, r: 5, fill: hue(number) })), nameOf(number))), more);
  return el("figure", {}, el("figcaption", {}, "Principal components of the features, a dot per image, mistakes larger and ringed"), legend, drawing, reading);
}

// Colours of many classes, as far apart on the wheel as their golden angle.
const hue = (number) => `hsl(${(number * 137.508 + 210) % 360} 65% 52%)`;
