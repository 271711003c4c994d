// From logits to what is shown, as Predictor in export/predict.py does it; and the picture of the self-test.

// Class numbers in order of their logits, best first (equal logits in order of the classes), the probability of each,
// and the confidence threshold that makes the model abstain, or null. A threshold of null: the class is never predicted.
export function ranked(logits, { temperature, thresholds }) {
  const order = Array.from(logits, (_, i) => i).sort((a, b) => logits[b] - logits[a]);
  const scaled = Float32Array.from(logits, (value) => value / Math.fround(temperature));
  const values = scaled.map((value) => Math.exp(value - scaled[order[0]]));
  const sum = values.reduce((total, value) => total + value, 0);
  const probabilities = order.map((i) => Math.fround(values[i] / sum));
  const limit = thresholds.length ? thresholds[order[0]] : 0;
  return { order, probabilities, abstained: limit === null || probabilities[0] < limit, limit };
}

// The picture of the self-test, packed RGB: the high bytes of multiples of 2654435761.
export function selfTestPixels(size) {
  return Uint8Array.from({ length: size * size * 3 }, (_, i) => Math.imul(i, 2654435761) >>> 24);
}

// The largest error of the logits of the self-test, as a share of the largest logit.
export function selfTestError(logits, expected) {
  const most = (values) => values.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  const errors = expected.map((value, i) => logits[i] - value);
  return errors.every(Number.isFinite) ? most(errors) / Math.max(1, most(expected)) : Infinity;
}
