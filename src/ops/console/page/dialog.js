// Dialogs: the browser's own, which keep the focus inside and end with Escape.

import { el, failed } from "./dom.js";

/** Opens a dialog; ends when it is closed. `fill(close)` gives its content. */
export function open(title, fill) {
  return new Promise((ended) => {
    const heading = el("h2", { id: "dialog-title" }, title);
    const dialog = el("dialog", { "aria-labelledby": "dialog-title" }, heading);
    const before = document.activeElement;
    dialog.append(...[fill(() => dialog.close())].flat(Infinity).filter(Boolean));
    dialog.addEventListener("close", () => {
      dialog.remove();
      if (before?.isConnected) before.focus();
      else if (before?.id) document.getElementById(before.id)?.focus();
      ended();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A form in a dialog. `fields`: elements; `act(form)` does it, and the dialog closes unless it fails, and then says why. */
export function form(title, fields, { does, isDanger = false, act }) {
  return open(title, (close) => {
    const problem = el("div", {});
    const button = el("button", { type: "submit", class: isDanger ? "danger" : "primary" }, does);
    const submitted = async (event) => {
      event.preventDefault();
      button.disabled = true;
      problem.replaceChildren();
      try {
        await act(event.target);
        close();
      } catch (error) {
        problem.replaceChildren(failed(error));
        button.disabled = false;
      }
    };
    return el("form", { on: { submit: submitted } }, fields, problem,
      el("div", { class: "bar" }, el("button", { type: "button", on: { click: close } }, "Cancel"), button));
  });
}
