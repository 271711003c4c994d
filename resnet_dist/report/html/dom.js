"use strict";
// The content, and small ways to build elements. Text from outside only ever becomes a text node or an attribute.

const content = JSON.parse(document.getElementById("content").textContent);
const images = content.images;
const nameOf = (number) => (number < 0 ? "" : content.classes[number]);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function section(id, title, ...children) {
  const heading = el("h2", { id, tabindex: "-1" }, title);
  document.getElementById("main").append(el("section", { "aria-labelledby": id }, heading, ...children));
  document.getElementById("contents").append(el("a", { href: `#${id}` }, title), " ");
}

// A number as people read it; an empty cell stays empty.
function shown(value, digits = 3) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toFixed(digits) : value.toExponential(2);
}

// A region that scrolls by itself, by keyboard too.
const scroll = (label, child) => el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, child);

// A table whose columns sort by a click on their heading; `rows` are arrays of plain values, `cells` may draw one.
function sortable(label, columns, rows, cells = {}) {
  const body = el("tbody");
  const draw = () => body.replaceChildren(...rows.map((row) => el("tr", {},
    ...row.map((value, column) => el("td", {}, cells[column] ? cells[column](value) : shown(value))))));
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const headings = columns.map((name, column) => {
    const heading = el("th", { scope: "col" });
    heading.append(el("button", { type: "button", onclick: () => {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      rows = rows.slice().sort((a, b) => {
        if (a[column] === null || b[column] === null) return (a[column] === null) - (b[column] === null); // empty last
        return falling ? compare(b[column], a[column]) : compare(a[column], b[column]);
      });
      draw();
    } }, name));
    return heading;
  });
  draw();
  return scroll(label, el("table", {}, el("thead", {}, el("tr", {}, ...headings)), body));
}

const facts = (label, rows) => scroll(label, el("table", { class: "facts" },
  el("tbody", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, shown(value)))))));
