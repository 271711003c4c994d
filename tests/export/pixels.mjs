// What the page's scripts make of pictures and logits, under Node.js.
//   node pixels.mjs < JOBS  ->  {"self_test": [...], "ranked": [...]}
// A picture { file: RGBA bytes, width, height, spec, out } is written to `out` as packed RGB, and to `out`.f32
// normalised.
import { readFileSync, writeFileSync } from "node:fs";
import { fit, normalised, onWhite } from "./pixels.js";
import { ranked, selfTestPixels } from "./scores.js";

const jobs = JSON.parse(readFileSync(0, "utf8"));
for (const { file, width, height, spec, out } of jobs.pictures) {
  const data = new Uint8ClampedArray(readFileSync(file));
  onWhite(data);
  const rgb = fit({ data, width, height }, spec);
  writeFileSync(out, rgb);
  writeFileSync(`${out}.f32`, normalised(rgb, spec));
}
console.log(JSON.stringify({
  self_test: Array.from(selfTestPixels(jobs.size)),
  ranked: jobs.logits.map((logits) => ranked(logits, jobs.model)),
}));
