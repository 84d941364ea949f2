/** Colours of overlays: cividis-like ramps that read in grey and by colour-blind eyes. */
import type { Overlay } from "./record.ts";

const RAMP = [
  [0, 34, 78],
  [53, 69, 108],
  [102, 105, 112],
  [148, 142, 119],
  [200, 184, 102],
  [253, 234, 69],
];
const DIVERGING = [
  [33, 102, 172],
  [146, 197, 222],
  [247, 247, 247],
  [244, 165, 130],
  [178, 24, 43],
];
/** Okabe and Ito, for words. */
const WORDS = [
  [86, 180, 233],
  [230, 159, 0],
  [0, 158, 115],
  [240, 228, 66],
  [0, 114, 178],
  [213, 94, 0],
  [204, 121, 167],
  [153, 153, 153],
];

export interface Scale {
  colour(value: number): string;
  text(value: number): string;
  low: number;
  high: number;
}

export function scaleOf(overlay: Overlay): Scale {
  const finite = overlay.values.filter((v) => Number.isFinite(v));
  const high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  const low = finite.reduce((a, b) => Math.min(a, b), Infinity);
  const positive = finite.filter((v) => v > 0).reduce((a, b) => Math.min(a, b), Infinity);
  // Four orders of magnitude: what costs less than a ten-thousandth of the most is all the same.
  const floor = Math.max(positive, high / 1e4);
  const share = (v: number): number => {
    if (overlay.scale === "log") return v <= 0 ? 0 : high === floor ? 1 : (Math.log(Math.max(v, floor)) - Math.log(floor)) / (Math.log(high) - Math.log(floor));
    if (overlay.scale === "diverging") return 0.5 + v / (2 * Math.max(Math.abs(low), Math.abs(high), 1e-30));
    return high === low ? 1 : (v - low) / (high - low);
  };
  return {
    low: overlay.scale === "log" ? Math.max(low, Math.min(floor, high)) : low,
    high,
    colour: (v) => (overlay.scale === "words" ? `rgb(${WORDS[v % WORDS.length]!.join(",")})` : mix(overlay.scale === "diverging" ? DIVERGING : RAMP, share(v))),
    text: (v) => (overlay.scale === "words" ? (overlay.words[v] ?? "") : measured(v, overlay.unit)),
  };
}

function mix(stops: number[][], at: number): string {
  const x = Math.min(1, Math.max(0, at)) * (stops.length - 1);
  const k = Math.min(stops.length - 2, Math.floor(x));
  const part = x - k;
  return `rgb(${stops[k]!.map((c, n) => Math.round(c + (stops[k + 1]![n]! - c) * part)).join(",")})`;
}

/** A value with its unit; times in the unit that reads best. */
export function measured(v: number, unit: string): string {
  if (unit !== "µs" && unit !== "us") {
    const told = short(v);
    // 86.0 MB, but 12 rows and 1.2e-7 m.
    return unit === "" ? told : /[TGMk]$/.test(told) ? `${told}${unit}` : `${told} ${unit}`;
  }
  const a = Math.abs(v);
  return a >= 1e6 ? `${short(v / 1e6)} s` : a >= 1e3 ? `${short(v / 1e3)} ms` : a >= 1 || v === 0 ? `${short(v)} µs` : `${short(v * 1e3)} ns`;
}

/** A number in three figures: 1.23 k, 4.5 M, 6.7e-6. */
export function short(v: number): string {
  if (v === 0) return "0";
  const a = Math.abs(v);
  if (a < 1e-3) return v.toExponential(1);
  if (a < 1) return v.toPrecision(2);
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]] as const) if (a >= size) return `${(v / size).toPrecision(3)} ${unit}`;
  return a < 10 ? v.toFixed(2) : a < 100 ? v.toFixed(1) : v.toFixed(0);
}

/** Whether dark text can be read on it. */
export function isLight(rgb: string): boolean {
  const [r, g, b] = (rgb.match(/\d+/g) ?? ["255", "255", "255"]).map(Number) as [number, number, number];
  return 0.299 * r + 0.587 * g + 0.114 * b > 140;
}
