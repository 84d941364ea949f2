/**
 * Parts of a record that come when they are wanted: a notebook's widget opens with what is light, asks its kernel for
 * what is looked at, and fetches the rest one by one while nothing else is asked.
 */
import { unpack, type Model } from "./main.ts";
import type { Part } from "./record.ts";
import type { Store } from "./store.ts";

type On = (event: string, callback: (...given: never[]) => void) => void;

/** Let the store's walk ask for what it lacks; a walk that lacks nothing asks nothing. */
export function feed(store: Store, model: Model, on: On): void {
  const { walk } = store;
  if (walk.lacking(0).length === 0 || model.get("parts") !== true) return;
  const edition = model.get("edition");
  const asked = new Set<string>();
  const wanted: Part[] = [];
  let waiting = false;
  const next = (): void => {
    if (waiting || store.walk !== walk) return;
    const part = wanted.pop() ?? walk.lacking(store.state.step).find((p) => !asked.has(name(p)));
    if (part === undefined) return;
    asked.add(name(part));
    waiting = true;
    model.send({ want: part.kind, index: part.index, edition });
  };
  walk.ask = (part) => {
    if (asked.has(name(part)) || wanted.some((p) => name(p) === name(part))) return;
    wanted.push(part);
    queueMicrotask(next);
  };
  on("msg:custom", (async (message: { part?: Part["kind"]; index?: number; edition?: unknown; failed?: string }, buffers: DataView[]) => {
    if (message.part === undefined || message.edition !== edition || store.walk !== walk) return;
    const part = { kind: message.part, index: message.index ?? 0 };
    const [view] = buffers;
    // A part that could not be made is shown as one that holds nothing; the kernel's log has the error.
    const data = view === undefined ? (part.kind === "view" ? {} : []) : await unpack(new Uint8Array(view.buffer, view.byteOffset, view.byteLength));
    waiting = false;
    if (walk.lacks(part)) {
      walk.fill(part, data);
      store.filled(part);
    }
    setTimeout(next, 30);
  }) as never);
  setTimeout(next, 300);
}

function name(part: Part): string {
  return `${part.kind} ${part.index}`;
}
