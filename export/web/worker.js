// The model in a thread of its own, so that the page never freezes. It answers each picture with its ranked classes.
// Messages in: { start: file of model.json }, { picture, id }. Out: { loaded, total }, { ready }, { failed },
// { id, result } and { id, error }.

import * as ort from "./onnxruntime-web.js";
import { MAX_PIXELS, fit, normalised, onWhite } from "./pixels.js";
import { ranked, selfTestError, selfTestPixels } from "./scores.js";

const WASM = "ort-wasm-simd-threaded.wasm";
const address = (name) => new URL(name, import.meta.url);
let model, session;

// The bytes of a file of this folder. `report` is called with the bytes so far.
async function download(name, report) {
  const response = await fetch(address(name));
  if (!response.ok) throw new Error(`${name} cannot be loaded: the server answers ${response.status}`);
  const parts = [];
  let size = 0;
  for (let reader = response.body.getReader(), part; !(part = await reader.read()).done; report(size)) {
    parts.push(part.value);
    size += part.value.length;
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function start(file) {
  model = await (await fetch(address("model.json"))).json();
  const chosen = model.files.find((one) => one.name === file);
  const loaded = [0, 0];
  const report = (place) => (size) => {
    loaded[place] = size;
    postMessage({ loaded: loaded[0] + loaded[1], total: model.runtime_bytes + chosen.bytes });
  };
  const [wasm, bytes] = await Promise.all([download(WASM, report(0)), download(file, report(1))]);
  ort.env.wasm.wasmBinary = wasm; // compiled from memory, so that no server needs to know the type of a .wasm file
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const error = selfTestError(await logitsOf(selfTestPixels(model.preprocessing.img_size)), chosen.self_test);
  if (!(error <= chosen.tolerance)) {
    throw new Error(`${file} computes wrong numbers in this browser: the self-test's relative error is ${error.toExponential(1)}`);
  }
  postMessage({ ready: { error, threads: ort.env.wasm.numThreads } });
}

// Packed RGB of img_size x img_size to the logits.
async function logitsOf(rgb) {
  const size = model.preprocessing.img_size;
  const feeds = model.input === "image"
    ? { image: new ort.Tensor("uint8", rgb, [1, size, size, 3]) }
    : { pixel_values: new ort.Tensor("float32", normalised(rgb, model.preprocessing), [1, 3, size, size]) };
  return Array.from((await session.run(feeds, ["logits"])).logits.data);
}

// The pixels of an image file as this browser decodes it: upright, in its own colours (a colour profile is ignored, as
// in training), transparency on white.
async function decoded(file) {
  const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options).catch(() => {
    throw new Error("this browser cannot decode it: damaged, or not a format for browsers (JPEG, PNG, WebP, GIF, BMP)");
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`${width}x${height} pixels, more than the limit of ${MAX_PIXELS}`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  onWhite(data);
  return { data, width, height };
}

async function classify(file) {
  return ranked(await logitsOf(fit(await decoded(file), model.preprocessing)), model);
}

let turn = Promise.resolve(); // one picture at a time
onmessage = ({ data }) => {
  if (data.start) start(data.start).catch((error) => postMessage({ failed: error.message }));
  else {
    turn = turn.then(() => classify(data.picture)).then(
      (result) => postMessage({ id: data.id, result }),
      (error) => postMessage({ id: data.id, error: error.message }),
    );
  }
};
