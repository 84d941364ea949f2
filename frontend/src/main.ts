/**
 * The explorer as one ES module: `render` is what the notebook widget calls, `standalone` what a page on its own does.
 *
 * Traits (docs/explorer.md): `record` bytes of the record, gzipped JSON; `step`, `against`, `mode`, `overlay`, `selection`
 * are read and set from both sides; `command` [number, {goto}] from Python.
 */
import "./explorer.css";
import { mount, type Mounted } from "./app.tsx";
import { Walk, type RecordData } from "./record.ts";
import type { State } from "./store.ts";

interface Model {
  get(name: string): unknown;
  set(name: string, value: unknown): void;
  save_changes(): void;
  on(event: string, callback: () => void): void;
  off(event: string, callback: () => void): void;
}

const SHARED = ["step", "against", "mode", "overlay", "selection"] as const;

/** Bytes of a record (gzipped or not) as its data; throws with a message for people. */
export async function read(bytes: Uint8Array): Promise<Partial<RecordData>> {
  let body: BlobPart = bytes as BlobPart;
  if (bytes[0] === 0x1f && bytes[1] === 0x8b) body = await new Response(new Blob([body]).stream().pipeThrough(new DecompressionStream("gzip"))).blob();
  const data: unknown = JSON.parse(await new Response(body as BodyInit).text());
  if (typeof data !== "object" || data === null || Array.isArray(data)) throw new Error("this is not a record: expected a JSON object");
  const version = (data as { adkit_record?: unknown }).adkit_record ?? 1;
  if (version !== 1 && version !== 2) throw new Error(`this record has version ${String(version)}; this explorer reads versions 1 and 2`);
  return data as Partial<RecordData>;
}

async function open(element: HTMLElement, bytes: Uint8Array): Promise<Mounted | null> {
  try {
    return mount(element, new Walk(await read(bytes)));
  } catch (error) {
    const message = document.createElement("p");
    message.className = "adk-broken";
    message.setAttribute("role", "alert");
    message.textContent = `The record cannot be shown: ${error instanceof Error ? error.message : String(error)}`;
    element.replaceChildren(message);
    return null;
  }
}

/** Dark pages: JupyterLab and VS Code say so on the body, others by preference. */
function followTheme(element: HTMLElement): () => void {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (): void => {
    const { body } = document;
    const lab = body.dataset["jpThemeLight"];
    const isDark = lab !== undefined ? lab === "false" : body.classList.contains("vscode-dark") || (!body.classList.contains("vscode-light") && dark.matches);
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
  const stop = followTheme(el);
  let mounted: Mounted | null = null;
  let gone = false;
  const load = async (): Promise<void> => {
    const bytes = model.get("record") as DataView | undefined;
    if (bytes === undefined || bytes.byteLength === 0) return;
    const made = await open(el, new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength));
    if (made === null || gone) return;
    mounted?.dispose();
    mounted = made;
    const { store } = made;
    const pull = (): void => {
      const change: Partial<Record<keyof State, unknown>> = {};
      for (const name of SHARED) {
        const value = model.get(name);
        if (value !== undefined && value !== null && JSON.stringify(value) !== JSON.stringify(store.state[name])) change[name] = value;
      }
      const step = change["step"];
      if (typeof step === "number" && step < 0) delete change["step"];
      store.set(change as Partial<State>);
      const [id] = store.state.selection;
      if (change["selection"] !== undefined && id !== undefined) made.goto(store.state.step, id);
    };
    pull();
    for (const name of SHARED) model.on(`change:${name}`, pull);
    store.subscribe((changed) => {
      let any = false;
      for (const name of SHARED) if (changed.has(name) && JSON.stringify(model.get(name)) !== JSON.stringify(store.state[name])) {
        model.set(name, store.state[name]);
        any = true;
      }
      if (any) model.save_changes();
    });
    model.set("step", store.state.step);
    model.save_changes();
  };
  void load();
  model.on("change:record", () => void load());
  return () => {
    gone = true;
    stop();
    mounted?.dispose();
  };
}

/** A page on its own: the record stands in it as base64. */
export async function standalone(element: HTMLElement, base64: string): Promise<Mounted | null> {
  element.classList.add("adk-root");
  followTheme(element);
  let bytes: Uint8Array;
  try {
    bytes = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
  } catch {
    bytes = new TextEncoder().encode("broken");
  }
  return open(element, bytes);
}

export default { render };
