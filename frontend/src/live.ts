/** A pipeline that runs while one looks: how each step went so far, what is at work, what failed. */
import type { Step } from "./record.ts";

/** What the timeline tells of a step. */
export interface Head {
  name: string;
  stage: string;
  status: string;
  seconds: number;
  memory_bytes: number;
  created: number;
  erased: number;
  changed: number;
  reason: string;
  log: string[];
}

/** Trait `live`, as Python sends it; what is left out is as the record has it. */
export interface Live {
  /** Name of the step at work; empty when none is. */
  running: string;
  /** When it was told, by this browser's clock, and how many seconds the step had been at work by then. */
  told: number;
  elapsed: number;
  /** How far the work of the step is, where it says so. */
  progress: { what: string; done: number; total: number } | null;
  heads: Partial<Head>[];
  error: { step: string; text: string } | null;
  /** What the step at work, or the one that failed, has written to its log so far. */
  log: string[];
}

export const NOTHING: Live = { running: "", told: 0, elapsed: 0, progress: null, heads: [], error: null, log: [] };

export function liveOf(given: unknown): Live {
  return { ...NOTHING, ...(typeof given === "object" && given !== null ? (given as Partial<Live>) : {}), told: performance.now() };
}

export function headOf(step: Step): Head {
  return { ...step, changed: step.changed.length };
}

/** Every step as it stands now. */
export function heads(steps: Step[], live: Live): Head[] {
  const news = new Map(live.heads.map((h) => [h.name, h]));
  const { running, error, log } = live;
  return steps.map((s) => ({ ...headOf(s), ...news.get(s.name), ...(s.name === running ? { status: "running", log } : s.name === error?.step ? { status: "failed", log } : {}) }));
}
