// Light or dark.

/** Follow the host's theme (JupyterLab, VS Code) or the system's, unless the reader chose one. */
export function hostTheme() {
  const body = document.body;
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false" ? "dark" : "light";
  if (body.classList.contains("vscode-dark")) return "dark";
  if (body.classList.contains("vscode-light")) return "light";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Keep `root` in step with the host's theme; `button` cycles auto, light, dark. Returns a function that stops it. */
export function followTheme(root, button, changed = () => {}) {
  let theme = "auto";
  const apply = () => {
    root.dataset.theme = theme === "auto" ? hostTheme() : theme;
    button.textContent = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}; press to change`);
    changed();
  };
  const watcher = new MutationObserver(apply);
  watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  const media = matchMedia("(prefers-color-scheme: dark)");
  media.addEventListener("change", apply);
  button.addEventListener("click", () => {
    theme = { auto: "light", light: "dark", dark: "auto" }[theme];
    apply();
  });
  apply();
  return () => {
    watcher.disconnect();
    media.removeEventListener("change", apply);
  };
}
