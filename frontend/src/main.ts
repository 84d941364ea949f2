/**
 * The explorer as one ES module: `render` is what the notebook widget calls, `standalone` what a page on its own does.
 * Traits and messages are those of docs/explorer.md.
 */
import "./explorer.css";
import { mount, type Mounted } from "./app.tsx";
import { feed } from "./feed.ts";
import { liveOf } from "./live.ts";
import { completeOverlays, Walk, type Overlay, type RecordData } from "./record.ts";
import type { State, Store } from "./store.ts";

/** A widget's model as anywidget hands it over. */
export interface Model {
  get(name: string): unknown;
  set(name: string, value: unknown): void;
  save_changes(): void;
  send(content: unknown): void;
  on(event: string, callback: (...given: never[]) => void): void;
  off(event: string, callback: (...given: never[]) => void): void;
}

/** Traits whose values are the state's own. */
const SHARED = ["against", "panes", "step", "mode", "overlay", "search", "selection"] as const;

/** Bytes of a record (gzipped or not) as its data; throws with a message for people. */
export async function read(bytes: Uint8Array): Promise<Partial<RecordData>> {
  const data = await unpack(bytes);
  if (typeof data !== "object" || data === null || Array.isArray(data)) throw new Error("this is not a record: expected a JSON object");
  const version = (data as { adkit_record?: unknown }).adkit_record ?? 1;
  if (version !== 1 && version !== 2) throw new Error(`this record has version ${String(version)}; this explorer reads versions 1 and 2`);
  return data as Partial<RecordData>;
}

/** JSON, gzipped or not. */
export async function unpack(bytes: Uint8Array): Promise<unknown> {
  const given = new Blob([bytes as BlobPart]);
  const zipped = bytes[0] === 0x1f && bytes[1] === 0x8b;
  return JSON.parse(await new Response(zipped ? given.stream().pipeThrough(new DecompressionStream("gzip")) : given).text());
}

function broken(element: HTMLElement, error: unknown): void {
  const message = document.createElement("p");
  message.className = "adk-broken";
  message.setAttribute("role", "alert");
  message.textContent = `The record cannot be shown: ${error instanceof Error ? error.message : String(error)}`;
  element.replaceChildren(message);
}

/** Dark pages: JupyterLab and VS Code say so on the body (high contrast is dark unless it is also light), others by preference. */
function followTheme(element: HTMLElement): () => void {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (): void => {
    const { body } = document;
    const lab = body.dataset["jpThemeLight"];
    const code = (...kinds: string[]): boolean => kinds.some((kind) => body.classList.contains(`vscode-${kind}`));
    const isDark = lab !== undefined ? lab === "false" : code("light", "high-contrast-light") ? false : code("dark", "high-contrast") || dark.matches;
    element.classList.toggle("adk-dark", isDark);
  };
  set();
  const observer = new MutationObserver(set);
  observer.observe(document.body, { attributes: true });
  dark.addEventListener("change", set);
  return () => {
    observer.disconnect();
    dark.removeEventListener("change", set);
  };
}

/** anywidget's hook. */
export function render({ model, el }: { model: Model; el: HTMLElement }): () => void {
  el.classList.add("adk-root");
  const stops = [followTheme(el)];
  const on = (event: string, callback: (...given: never[]) => void): void => {
    model.on(event, callback);
    stops.push(() => model.off(event, callback));
  };
  let mounted: Mounted | null = null;
  let gone = false;
  const load = async (): Promise<void> => {
    const bytes = bytesOf(model.get("record"));
    if (bytes === null) return;
    let walk: Walk;
    try {
      walk = new Walk(await read(bytes));
      walk.data.overlays = await laid(model, walk.data.overlays);
    } catch (error) {
      if (!gone) broken(el, error);
      mounted = null;
      return;
    }
    if (gone) return;
    if (mounted === null) mounted = begin(el, walk, model, on);
    else mounted.store.renew(walk);
    feed(mounted.store, model, on);
    renewed();
  };
  /** A walk that went on is asked for when its kernel is free to answer. */
  let asked = 0;
  const renewed = (): void => {
    const { edition = 0, running = "" } = (model.get("live") ?? {}) as { edition?: number; running?: string };
    if (running !== "" || edition <= Math.max(asked, Number(model.get("edition")))) return;
    asked = edition;
    model.send({ want: "record" });
  };
  let loading = load();
  const again = (): void => {
    loading = loading.then(load);
  };
  on("change:record", again);
  on("change:live", renewed);
  on("change:overlays", () => {
    loading = loading.then(async () => {
      if (mounted === null) return;
      mounted.store.walk.data.overlays = await laid(model, []);
      mounted.store.renew();
    });
  });
  return () => {
    gone = true;
    for (const stop of stops) stop();
    mounted?.dispose();
  };
}

/** Draw a walk, and keep what is looked at the same in Python. */
function begin(el: HTMLElement, walk: Walk, model: Model, on: (event: string, callback: () => void) => void): Mounted {
  const made = mount(el, walk);
  const { store } = made;
  const pull = (): void => {
    const change: Partial<Record<keyof State, unknown>> = {};
    for (const name of SHARED) {
      const value = model.get(name);
      if (value !== undefined && value !== null && !equal(value, store.state[name])) change[name] = value;
    }
    if (typeof change.step === "number" && change.step < 0) delete change.step;
    const unfolded = model.get("unfolded") as string[] | null;
    if (unfolded !== null && unfolded !== undefined && !equal(unfolded, foldState(store))) store.unfold(new Set(["", ...unfolded]));
    store.set(change as Partial<State>);
    const id = store.inspected;
    if (change.selection !== undefined && id !== undefined) made.goto(store.state.step, id);
  };
  const live = (): void => {
    const live = liveOf(model.get("live"));
    // With nothing to draw yet the panel tells of the step at work.
    const at = live.running !== "" && store.graph < 0 ? store.walk.steps.findIndex((s) => s.name === live.running) : -1;
    store.set({ live, ...(at >= 0 ? { step: at } : {}) });
  };
  pull();
  live();
  for (const name of [...SHARED, "unfolded"]) on(`change:${name}`, pull);
  on("change:live", live);
  const push = (): void => {
    let any = false;
    const put = (name: string, value: unknown): void => {
      if (equal(model.get(name), value)) return;
      model.set(name, value);
      any = true;
    };
    // While the kernel runs the pipeline it reads nothing, and which step is shown changes by itself.
    const follows = store.state.live.running !== "" && store.graph < 0;
    for (const name of SHARED) if (name !== "step" || !follows) put(name, store.state[name]);
    put("unfolded", foldState(store));
    if (any) model.save_changes();
  };
  store.subscribe(push);
  push();
  return made;
}

/** Paths of the modules that are open, the model itself left out. */
function foldState(store: Store): string[] {
  return [...store.state.open].filter((path) => path !== "").sort();
}

function equal(a: unknown, b: unknown): boolean {
  return JSON.stringify(a) === JSON.stringify(b);
}

/** The overlays that Python laid over the graph since; those of the record where it sent none. */
async function laid(model: Model, otherwise: Overlay[]): Promise<Overlay[]> {
  const bytes = bytesOf(model.get("overlays"));
  return bytes === null ? otherwise : completeOverlays((await unpack(bytes)) as Overlay[]);
}

function bytesOf(value: unknown): Uint8Array | null {
  const view = value as DataView | undefined;
  return view === undefined || view === null || view.byteLength === 0 ? null : new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** A page on its own: the record stands in it as base64. */
export async function standalone(element: HTMLElement, base64: string): Promise<Mounted | null> {
  element.classList.add("adk-root");
  followTheme(element);
  let bytes: Uint8Array;
  try {
    const letters = atob(base64.trim());
    bytes = new Uint8Array(letters.length);
    for (let k = 0; k < letters.length; k++) bytes[k] = letters.charCodeAt(k); // ten times as fast as Uint8Array.from
  } catch {
    bytes = new TextEncoder().encode("broken");
  }
  try {
    return mount(element, new Walk(await read(bytes)));
  } catch (error) {
    broken(element, error);
    return null;
  }
}

export default { render };
