// The page: takes pictures, hands them to the worker, shows the classes. Names of files and classes only ever become
// text nodes.

const model = await (await fetch("model.json")).json();
const by = (id) => document.getElementById(id);
const pictures = new Map(); // id -> { file, item, answer }
let worker, ready = false;

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// A worker made from a blob has the page's Content-Security-Policy; one from an address would have none.
function startWorker() {
  worker?.terminate();
  ready = false;
  const code = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
  const place = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  worker = new Worker(place, { type: "module" });
  worker.onmessage = ({ data }) => received(data);
  worker.onerror = () => failed("the model cannot be started in this browser; a newer browser may do");
  worker.postMessage({ start: by("model").value });
  say("Loading the model");
}

function received(data) {
  if (data.total) progress(data.loaded / data.total);
  if (data.failed) failed(data.failed);
  if (data.ready) {
    ready = true;
    progress(null);
    by("status").dataset.ready = JSON.stringify(data.ready);
    say("The model is ready; its self-test passes in this browser.");
    pictures.forEach((picture, id) => worker.postMessage({ picture: picture.file, id }));
  }
  const picture = pictures.get(data.id);
  if (picture) {
    picture.answer = data;
    show(picture);
    report();
  }
}

function failed(reason) {
  progress(null);
  say(`Error: ${reason}`);
}

function say(text) {
  by("status").textContent = text;
}

function progress(share) {
  by("progress").hidden = share === null;
  if (share !== null) by("progress").value = share;
}

// One line for all pictures, which a screen reader reads aloud.
function report() {
  const all = [...pictures.values()], answered = all.filter((picture) => picture.answer);
  if (all.length === 1 && answered.length) say(`${all[0].file.name}: ${summary(all[0].answer)}`);
  else if (answered.length === all.length) say(`${counted(all.length, "picture")} classified`);
  else say(`${answered.length} of ${counted(all.length, "picture")} classified`);
}

function summary({ error, result }) {
  if (error) return error;
  const best = `${model.classes[result.order[0]]}, ${percent(result.probabilities[0])}`;
  return result.abstained ? `the model abstains (${best})` : best;
}

function reasonToAbstain({ order, limit }) {
  const name = model.classes[order[0]];
  return limit === null
    ? `It never predicts “${name}”: no threshold was proved for it`
    : `“${name}” needs at least ${percent(limit)}`;
}

function show({ file, item, answer }) {
  const [picture] = item.children;
  const parts = [picture, el("p", { class: "path" }, file.name)];
  if (!answer) parts.push(el("p", { class: "dim" }, "waiting"));
  else if (answer.error) parts.push(el("p", { class: "wrong" }, answer.error));
  else {
    const { order, probabilities, abstained } = answer.result;
    if (abstained) parts.push(el("p", { class: "abstained" }, el("strong", {}, "The model abstains. "), reasonToAbstain(answer.result)));
    const rows = order.slice(0, topK()).map((number, rank) => row(model.classes[number], probabilities[rank]));
    parts.push(el("ol", {}, ...rows));
  }
  item.replaceChildren(...parts);
}

function row(name, probability) {
  const bar = el("span", { class: "bar", "aria-hidden": "true" });
  bar.style.width = `${100 * probability}%`;
  return el("li", { "data-probability": probability }, el("span", { class: "name" }, name), " ",
    el("span", { class: "share" }, percent(probability)), bar);
}

function topK() {
  const count = Math.trunc(Number(by("top-k").value));
  return Math.min(Math.max(1, count || 1), model.classes.length);
}

function add(files) {
  for (const file of files) {
    const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
    const address = URL.createObjectURL(file);
    const image = el("img", { src: address, alt: "" });
    image.onload = () => URL.revokeObjectURL(address);
    image.onerror = () => { image.hidden = true; };
    const picture = { file, item: el("li", { class: "card" }, image) };
    pictures.set(id, picture);
    by("results").append(picture.item);
    show(picture);
    if (ready) worker.postMessage({ picture: file, id });
  }
  by("clear").disabled = pictures.size === 0;
  if (ready && files.length) report();
}

function clear() {
  pictures.clear();
  by("results").replaceChildren();
  by("clear").disabled = true;
  say("");
  by("pictures").focus();
}

by("pictures").addEventListener("change", ({ target }) => {
  add([...target.files]);
  target.value = ""; // the same file may be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  by("drop").classList.add("over");
});
addEventListener("dragleave", () => by("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  by("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => add([...event.clipboardData.files]));
by("clear").addEventListener("click", clear);
by("top-k").addEventListener("input", () => pictures.forEach(show));
by("model").addEventListener("change", () => {
  pictures.forEach((picture) => {
    delete picture.answer;
    show(picture);
  });
  startWorker();
});

const named = model.classes.length > 10 ? `${model.classes.length} classes` : model.classes.join(", ");
by("about").textContent = `${model.architecture}: ${named}`;
by("top-k").max = model.classes.length;
by("top-k").value = Math.min(5, model.classes.length);
by("model").append(...model.files.map(({ name, precision, bytes }) =>
  el("option", { value: name }, `${precision}, ${Math.round(bytes / 2 ** 20)} MiB`)));
by("model-label").hidden = model.files.length === 1;
by("served").remove();
by("tools").hidden = false;
startWorker();
