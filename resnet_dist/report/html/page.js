// The sections of the page. A section without content is left out.

function summary() {
  const box = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, shown(value, 4), note ? el("small", {}, note) : null));
  section("summary", "Summary", ...content.about.map((line) => el("p", {}, line)),
    el("dl", { class: "numbers" }, ...content.headline.map(([name, value, note]) => box(name, value, note))));
}

function confusion(open) {
  const pairs = content.confusion.filter(([label, prediction]) => label !== prediction).sort((a, b) => b[2] - a[2]);
  const list = pairs.slice(0, 20).map(([label, prediction, count]) => el("li", {}, el("button", { type: "button", class: "plain", onclick: () => open(label, prediction) },
    `${nameOf(label)}, predicted ${nameOf(prediction)}: ${count}`)));
  const inside = new Set(content.matrix);
  const outside = content.classes.filter((_, number) => !inside.has(number));
  section("confusion", "Confusion matrix",
    el("p", { class: "dim" }, `${content.matrix_note}Rows are labels, columns predictions; a stronger colour is a larger share of the label, green if the prediction is right, red if wrong. Click a cell, or press Enter, to see its images; the arrow keys move between cells.`),
    ...confusionMatrix(open),
    outside.length ? el("details", { id: "left-out" }, el("summary", {}, `Classes that the matrix leaves out (${outside.length})`), el("p", {}, outside.join(", "))) : null,
    el("h3", {}, pairs.length > list.length ? `Most confused: ${list.length} of ${pairs.length} pairs` : "Most confused"),
    list.length ? el("ol", {}, ...list) : el("p", {}, "All images were predicted correctly."));
}

function classes(open) {
  const number = (name) => content.classes.indexOf(name);
  const link = (name) => el("button", { type: "button", class: "plain", onclick: () => open(number(name), null) }, name);
  section("classes", "Classes", sortable("Classes", content.class_columns, content.class_rows, { 0: link }));
}

function topLosses() {
  const list = el("ul", { class: "cards wide", "aria-label": "Top losses" }, ...content.top_losses.map((row) => card(row, { overlay: content.overlays[row] })));
  section("losses", "Top losses", el("p", { class: "dim" }, content.overlays_note), list);
}

function labelErrors() {
  const parts = content.label_errors.filter((part) => part.rows.length || part.note).flatMap((part) => {
    const lines = (item) => [`likely ${nameOf(item[1])}${item[3] ? " (suspected)" : ""}, quality of the label ${shown(item[2])}`];
    const [list, show] = paged(part.title, (item) => card(item[0], { lines: lines(item) }));
    show(part.rows);
    return [el("h3", {}, part.title), el("p", { class: "dim" }, part.note), part.rows.length ? list : null];
  });
  section("labels", "Likely label errors", ...parts);
}

function nearDuplicates() {
  const pair = ([one, other]) => el("li", { class: "card" }, el("ul", { class: "cards", "aria-label": "A pair" }, card(one), card(other)));
  const [list, show] = paged("Pairs that look alike", pair, true);
  show(content.near_duplicates);
  section("duplicates", "Near duplicates of training images", el("p", { class: "dim" }, content.duplicates_note),
    content.near_duplicates.length ? list : null);
}

function provenance() {
  section("provenance", "Provenance", facts("Facts", content.facts),
    ...content.texts.map(([name, text]) => el("details", {}, el("summary", {}, name), el("pre", { tabindex: "0" }, text))));
}

const [allImages, openCell] = gallery();
summary();
if (content.curves.length) section("curves", "Curves", el("div", { class: "charts" }, ...content.curves.map(lineChart)));
confusion(openCell);
section("images", "Images", el("p", { class: "dim" }, content.images_note), allImages);
topLosses();
labelErrors();
if (content.near_duplicates !== null) nearDuplicates();
classes(openCell);
if (content.data.length) section("data", "Data", facts("Data", content.data));
if (content.map) section("map", "Map of the images", pointMap(content.map, openCell));
provenance();
showMarked();
document.body.dataset.ready = "yes";
