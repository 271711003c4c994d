// Images as cards on pages, marks, and the CSV of the marked images.

const PAGE = 24;
const marked = new Set();

function picture(row, source, alt) {
  return source ? el("img", { src: source, alt, decoding: "async" }) : el("div", { class: "none", role: "img", "aria-label": alt }, "no picture embedded");
}

// extra: {overlay, lines}: a second picture, more text.
function card(row, extra = {}) {
  const label = nameOf(images.target[row]), prediction = nameOf(images.prediction[row]), path = images.path[row];
  const alt = `${path}, labelled ${label}` + (prediction ? `, predicted ${prediction}` : "");
  const box = el("input", { type: "checkbox", "data-row": row, onchange: (event) => mark(row, event.target.checked) });
  box.checked = marked.has(row);
  const right = images.prediction[row] === images.target[row];
  const lines = [el("p", {}, `${images.split[row]}: label `, el("b", {}, label))];
  if (prediction) lines.push(el("p", {}, el("span", { class: right ? "right" : "wrong" }, right ? "✓ " : "✗ "), "predicted ",
    el("b", {}, prediction), ` ${shown(images.confidence[row])}, loss ${shown(images.loss[row])}`));
  return el("li", { class: marked.has(row) ? "card chosen" : "card", "data-card": row },
    el("div", { class: "pictures" }, picture(row, images.picture[row], alt),
      extra.overlay ? picture(row, extra.overlay, `Grad-CAM of ${path}: regions that led to ${prediction}`) : null),
    ...lines, ...(extra.lines || []).map((text) => el("p", {}, text)),
    el("p", { class: "path" }, path), el("label", {}, box, " mark"));
}

function mark(row, on) {
  if (on) marked.add(row); else marked.delete(row);
  for (const box of document.querySelectorAll(`input[data-row="${row}"]`)) box.checked = on;
  for (const item of document.querySelectorAll(`li[data-card="${row}"]`)) item.classList.toggle("chosen", on);
  showMarked();
}

function showMarked() {
  const bar = document.getElementById("marked");
  bar.hidden = marked.size === 0;
  bar.replaceChildren(el("span", { role: "status" }, `${marked.size} ${marked.size === 1 ? "image" : "images"} marked`),
    el("button", { type: "button", id: "export", onclick: exportMarked }, "Export CSV"),
    el("button", { type: "button", onclick: () => [...marked].forEach((row) => mark(row, false)) }, "Clear"),
    el("span", { class: "dim" }, "for train --exclude-list"));
}

const csvCell = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

// Encodes text as UTF-8. A lone surrogate U+DC80 to U+DCFF stands for an undecodable byte of a file name and is written as that byte.
function bytesOf(text) {
  const parts = text.split(/([\udc80-\udcff])/u);
  return parts.map((part, place) => (place % 2 ? new Uint8Array([part.charCodeAt(0) - 0xdc00]) : part));
}

function exportMarked() {
  const rows = [...marked].sort((a, b) => a - b).map((row) =>
    [images.path[row], nameOf(images.target[row]), nameOf(images.prediction[row]), "exclude"].map(csvCell).join(","));
  const text = ["path,target,prediction,mark", ...rows, ""].join("\n");
  const address = URL.createObjectURL(new Blob(bytesOf(text), { type: "text/csv" }));
  el("a", { href: address, download: "marked.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A list with pages of 24 items. Returns [element, show]; show(items) replaces the items.
function paged(label, draw, wide = false) {
  const list = el("ul", { class: wide ? "cards wide" : "cards", "aria-label": label });
  const where = el("span", { role: "status" });
  let items = [], page = 0;
  const go = (to) => {
    page = to;
    const pages = Math.max(1, Math.ceil(items.length / PAGE));
    list.replaceChildren(...items.slice(page * PAGE, (page + 1) * PAGE).map(draw));
    where.textContent = `${items.length} in total, page ${page + 1} of ${pages}`;
    back.disabled = page === 0; next.disabled = page + 1 >= pages;
  };
  const back = el("button", { type: "button", onclick: () => go(page - 1) }, "Back");
  const next = el("button", { type: "button", onclick: () => go(page + 1) }, "Next");
  const element = el("div", {}, list, el("div", { class: "pages" }, back, next, where));
  return [element, (others) => { items = others; go(0); }];
}

const SORTS = {
  "highest loss first": (a, b) => images.loss[b] - images.loss[a],
  "lowest loss first": (a, b) => images.loss[a] - images.loss[b],
  "least confident first": (a, b) => images.confidence[a] - images.confidence[b],
  "by path": (a, b) => (images.path[a] < images.path[b] ? -1 : 1),
};

// All evaluated images with filters. Returns [element, open]; open(label, prediction, words) sets the filters, null means
// any.
function gallery() {
  const options = content.classes.map((name, number) => el("option", { value: number }, name));
  const choice = (id) => el("select", { id, onchange: () => apply() }, el("option", { value: "" }, "any"), ...options.map((option) => option.cloneNode(true)));
  const label = choice("filter-label"), prediction = choice("filter-prediction");
  const text = el("input", { type: "search", id: "filter-text", oninput: () => apply() });
  const wrong = el("input", { type: "checkbox", id: "filter-wrong", onchange: () => apply() });
  const order = el("select", { id: "filter-order", onchange: () => apply() }, ...Object.keys(SORTS).map((name) => el("option", {}, name)));
  const [list, show] = paged("Images", (row) => card(row));
  const lower = images.path.slice(0, content.listed).map((path) => path.toLowerCase());
  const names = content.classes.map((name) => name.toLowerCase());
  function apply() {
    const words = text.value.toLowerCase(), rows = [];
    for (let row = 0; row < content.listed; row += 1) {
      const target = images.target[row], predicted = images.prediction[row];
      if (label.value !== "" && target !== Number(label.value)) continue;
      if (prediction.value !== "" && predicted !== Number(prediction.value)) continue;
      if (wrong.checked && target === predicted) continue;
      if (words && !lower[row].includes(words) && !names[target].includes(words) && !names[predicted].includes(words)) continue;
      rows.push(row);
    }
    show(rows.sort(SORTS[order.value]));
  }
  const reset = () => { text.value = label.value = prediction.value = ""; wrong.checked = false; apply(); };
  const tools = el("div", { class: "tools", role: "search", "aria-label": "Filter the images" },
    el("label", {}, "path or class contains", text), el("label", {}, "label", label), el("label", {}, "predicted", prediction),
    el("label", {}, "order", order), el("label", {}, wrong, " mistakes only"), el("button", { type: "button", onclick: reset }, "Show all"));
  apply();
  const open = (target, predicted, words = "") => {
    wrong.checked = false;
    text.value = words; label.value = target ?? ""; prediction.value = predicted ?? "";
    apply();
    const heading = document.getElementById("images");
    heading.scrollIntoView(); heading.focus({ preventScroll: true });
  };
  return [el("div", {}, tools, list), open];
}
