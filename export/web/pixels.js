// From the pixels of a picture to the input of the network, bit for bit as export/predict.py does it with Pillow.

const PRECISION_BITS = 22; // of the weights: 32 - 8 - 2, as in Pillow's Resample.c
export const MAX_PIXELS = 64_000_000;

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight: (x) => {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

// The first input pixel, the number of input pixels and the fixed-point weights of each output pixel in `from`..`to`.
function taps(size, target, filter, from, to) {
  const { support, weight } = FILTERS[filter];
  const scale = size / target;
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const most = Math.ceil(reach) * 2 + 1;
  const first = new Int32Array(to - from), count = new Int32Array(to - from), weights = new Int32Array((to - from) * most);
  for (let i = 0; i < to - from; i++) {
    const center = (from + i + 0.5) * scale;
    first[i] = Math.max(0, Math.trunc(center - reach + 0.5));
    count[i] = Math.min(size, Math.trunc(center + reach + 0.5)) - first[i];
    const exact = Array.from({ length: count[i] }, (_, x) => weight((x + first[i] - center + 0.5) * (1 / stretch)));
    const sum = exact.reduce((total, value) => total + value, 0);
    exact.forEach((value, x) => {
      const fixed = (sum === 0 ? value : value / sum) * (1 << PRECISION_BITS);
      weights[i * most + x] = Math.trunc(fixed + (fixed < 0 ? -0.5 : 0.5));
    });
  }
  return { first, count, weights, most };
}

function clipped(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

// One pass over lines of pixels. Input pixel x of a line is at (line * lineStep + x * step); the output is packed RGB.
function pass(source, lines, lineStep, step, target, outLineStep, outStep, { first, count, weights, most }) {
  const half = 1 << (PRECISION_BITS - 1);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < first.length; i++) {
      let red = half, green = half, blue = half;
      let place = line * lineStep + first[i] * step;
      const end = i * most + count[i];
      for (let k = i * most; k < end; k++, place += step) {
        const weight = weights[k];
        red += source[place] * weight;
        green += source[place + 1] * weight;
        blue += source[place + 2] * weight;
      }
      const out = line * outLineStep + i * outStep;
      target[out] = clipped(red);
      target[out + 1] = clipped(green);
      target[out + 2] = clipped(blue);
    }
  }
}

// The part of `columns` x `rows` pixels from (left, top) of a picture that is resized to inner[0] x inner[1], as packed
// RGB. Pillow rounds to 8 bits between its two passes and, from version 13 on, begins with the height if the picture
// loses more than twice as many rows as columns. Only what the part needs is computed.
function resized({ data, width, height }, inner, filter, left, top, columns, rows) {
  const across = inner[0] === width ? copies(left, columns) : taps(width, inner[0], filter, left, left + columns);
  const down = inner[1] === height ? copies(top, rows) : taps(height, inner[1], filter, top, top + rows);
  const lost = height - inner[1], out = new Uint8Array(rows * columns * 3);
  const heightFirst = lost > 0 && lost > 2 * (width - inner[0]);
  const [one, two] = heightFirst ? [down, across] : [across, down];
  const start = two.first[0], stop = Math.max(...two.first.map((first, i) => first + two.count[i]));
  two.first.forEach((first, i) => { two.first[i] = first - start; });
  const between = new Uint8Array((stop - start) * one.first.length * 3);
  if (heightFirst) {
    pass(data.subarray(start * 4), stop - start, 4, width * 4, between, 3, (stop - start) * 3, one);
    pass(between, rows, (stop - start) * 3, 3, out, columns * 3, 3, two);
  } else {
    pass(data.subarray(start * width * 4), stop - start, width * 4, 4, between, columns * 3, 3, one);
    pass(between, columns, 3, columns * 3, out, 3, columns * 3, two);
  }
  return out;
}

// Weights that copy the pixels in `from`..`from + length`.
function copies(from, length) {
  const first = Int32Array.from({ length }, (_, i) => from + i);
  return { first, count: new Int32Array(length).fill(1), weights: new Int32Array(length).fill(1 << PRECISION_BITS), most: 1 };
}

// Python's round(): halves go to the even number.
function rounded(value) {
  const down = Math.floor(value);
  if (value - down !== 0.5) return Math.round(value);
  return down % 2 === 0 ? down : down + 1;
}

// The size to which a picture is resized before it is cropped or padded.
function innerSize(width, height, spec) {
  const size = spec.img_size;
  if (spec.resize_mode === "squash") return [size, size];
  if (spec.resize_mode === "pad") {
    const scale = size / Math.max(width, height);
    return [Math.max(1, rounded(width * scale)), Math.max(1, rounded(height * scale))];
  }
  const short = Math.min(width, height), long = Math.max(width, height);
  const longer = short === spec.resize ? long : Math.floor((spec.resize * long) / short);
  return width <= height ? [spec.resize, longer] : [longer, spec.resize];
}

// Put RGBA pixels on white, in place, with the rounding of Pillow's alpha_composite.
export function onWhite(data) {
  for (let i = 0; i < data.length; i += 4) {
    const alpha = data[i + 3];
    if (alpha === 255) continue;
    for (let channel = i; channel < i + 3; channel++) {
      const sum = 128 * (data[channel] * alpha + 255 * (255 - alpha)) + (0x80 << 7);
      data[channel] = ((sum >> 8) + sum) >> 15;
    }
    data[i + 3] = 255;
  }
}

// Resize and crop a picture { data: RGBA, width, height } without transparency. Returns packed RGB of img_size x
// img_size; throws an Error with one line if the picture is too narrow.
export function fit(picture, spec) {
  const size = spec.img_size, { width, height } = picture;
  const inner = innerSize(width, height, spec);
  if (inner[0] * Math.max(inner[1], height) > Math.max(MAX_PIXELS, width * height)) {
    throw new Error(`${width}x${height} pixels: too narrow, resizing it would exceed the pixel limit`);
  }
  if (spec.resize_mode !== "pad") {
    const [left, top] = inner.map((side) => rounded((side - size) / 2));
    return resized(picture, inner, spec.interpolation, left, top, size, size);
  }
  const out = new Uint8Array(size * size * 3);
  for (let i = 0; i < out.length; i++) out[i] = spec.fill[i % 3];
  const content = resized(picture, inner, spec.interpolation, 0, 0, inner[0], inner[1]);
  const [left, top] = inner.map((side) => Math.floor((size - side) / 2));
  for (let row = 0; row < inner[1]; row++) {
    const line = content.subarray(row * inner[0] * 3, (row + 1) * inner[0] * 3);
    out.set(line, ((top + row) * size + left) * 3);
  }
  return out;
}

// Packed RGB to float32 (3, S, S), normalised by a table of 256 values per channel as in predict.py.
export function normalised(rgb, spec) {
  const area = rgb.length / 3, out = new Float32Array(rgb.length);
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(spec.mean[channel]), std = Math.fround(spec.std[channel]);
    const table = Float32Array.from({ length: 256 }, (_, i) => Math.fround(Math.fround(i / 255) - mean) / std);
    for (let i = 0; i < area; i++) out[channel * area + i] = table[rgb[3 * i + channel]];
  }
  return out;
}
