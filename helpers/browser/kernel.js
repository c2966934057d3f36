// Questions to the kernel: each carries an id, and only the answer to the latest question of a kind is heard.

/** { ask(kind, payload, done, failed) } over an anywidget model; `busy(true | false)` says whether one is awaited. */
export function kernelOf(model, busy = () => {}) {
  const view = Math.random().toString(36).slice(2, 10); // all views of a widget hear all answers
  const latest = new Map();
  let count = 0;
  const receive = (message) => {
    const entry = message && latest.get(message.kind);
    if (!entry || entry.id !== message.id) return; // late, or another view's
    latest.delete(message.kind);
    busy(latest.size > 0);
    if (message.error) entry.failed(message.error);
    else entry.done(message);
  };
  model.on("msg:custom", receive);
  return {
    ask(kind, payload, done, failed) {
      const id = `${view}-${count++}`;
      latest.set(kind, { id, done, failed });
      busy(true);
      model.send({ ...payload, id, kind });
    },
    close: () => model.off("msg:custom", receive),
  };
}
