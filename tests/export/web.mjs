// What onnxruntime-web (wasm, one thread) makes of a batch: what a browser would, but under node.
//   node web.mjs INPUT.f32 8,3,224,224 MODEL.onnx...  ->  {"MODEL.onnx": [logit, ...], ...}
// INPUT.f32 is the tensor as raw float32. Needs `npm install onnxruntime-web` in the folder of this file.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const [input, dims, ...models] = process.argv.slice(2);
const values = new Float32Array(new Uint8Array(readFileSync(input)).buffer);
const feeds = { pixel_values: new ort.Tensor("float32", values, dims.split(",").map(Number)) };
const found = {};
for (const model of models) {
  const bytes = new Uint8Array(readFileSync(model));
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  found[model] = Array.from((await session.run(feeds)).logits.data);
}
console.log(JSON.stringify(found));
