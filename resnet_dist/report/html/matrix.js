// The confusion matrix: one stop for the tabulator key, arrows from cell to cell, Enter or Space or a click opens one.

// Rows are labels and columns predictions, both of content.matrix; open(label, prediction) shows the images of a cell.
function confusionMatrix(open) {
  const shownClasses = content.matrix, size = shownClasses.length;
  const place = new Map(shownClasses.map((number, row) => [number, row]));
  const counts = shownClasses.map(() => new Array(size).fill(0));
  const totals = new Map();
  for (const [label, prediction, count] of content.confusion) {
    totals.set(label, (totals.get(label) || 0) + count);
    if (place.has(label) && place.has(prediction)) counts[place.get(label)][place.get(prediction)] = count;
  }
  const reading = el("p", { class: "reading", id: "cell", "aria-live": "polite" });
  const words = (row, column) => {
    const count = counts[row][column], total = totals.get(shownClasses[row]) || 0;
    const share = total ? ` (${Math.round((100 * count) / total)} % of the label)` : "";
    return `label ${nameOf(shownClasses[row])}, predicted ${nameOf(shownClasses[column])}: ${count} ${count === 1 ? "image" : "images"}${share}`;
  };
  const cells = counts.map((line, row) => line.map((count, column) => {
    const cell = el("td", { tabindex: row + column === 0 ? "0" : "-1", "data-row": row, "data-column": column,
      class: row === column ? "same" : null, "data-count": count || null }, count ? String(count) : "");
    const total = totals.get(shownClasses[row]);
    if (count) cell.style.setProperty("--share", `${12 + Math.round((48 * count) / total)}%`);
    return cell;
  }));
  const heading = (number, scope) => el("th", { scope, title: nameOf(number) }, el("span", {}, nameOf(number)));
  const longest = Math.max(...shownClasses.map((number) => nameOf(number).length));
  const turned = size > 12 || (size > 4 && longest > 12); // the names of the columns, which would be cut off otherwise
  const kind = (size > 30 ? "large" : size > 12 ? "" : "small") + (turned ? " turned" : "");
  const corner = el("th", { class: "corner" }, el("span", {}, "label ↓"), " ", el("span", {}, "predicted →"));
  const table = el("table", { class: `matrix ${kind}`, role: "grid", "aria-label": "Confusion matrix, rows are labels, columns predictions" },
    el("thead", {}, el("tr", {}, corner, ...shownClasses.map((number) => heading(number, "col")))),
    el("tbody", {}, ...cells.map((line, row) => el("tr", {}, heading(shownClasses[row], "row"), ...line))));
  const cellOf = (event) => event.target.closest("td");
  const choose = (cell) => { if (counts[cell.dataset.row][cell.dataset.column]) open(shownClasses[cell.dataset.row], shownClasses[cell.dataset.column]); };
  const read = (cell) => { reading.textContent = words(Number(cell.dataset.row), Number(cell.dataset.column)); };
  let current = cells[0][0];
  table.addEventListener("click", (event) => cellOf(event) && choose(cellOf(event)));
  table.addEventListener("pointerover", (event) => cellOf(event) && read(cellOf(event)));
  table.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    current.tabIndex = -1; cell.tabIndex = 0; current = cell;
    // The words are the cell's name for whoever hears it; all of them beforehand would be 10,000 strings.
    cell.setAttribute("aria-label", words(Number(cell.dataset.row), Number(cell.dataset.column)));
    read(cell);
  });
  table.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    const row = Number(cell.dataset.row), column = Number(cell.dataset.column), last = size - 1;
    const next = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, last] }[event.key];
    if (next && cells[next[0]] && cells[next[0]][next[1]]) cells[next[0]][next[1]].focus();
    else if (event.key === "Enter" || event.key === " ") choose(cell);
    else if (!next) return;
    event.preventDefault();
  });
  return [scroll("Confusion matrix", table), reading];
}
