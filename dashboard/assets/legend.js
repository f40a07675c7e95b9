// A list of lines with a switch each: its color, its name, its figures. Off means that the line is not drawn.
export default function ({ data: [data], parentElement, setStateValue }) {
  const root = parentElement.querySelector(".legend");
  const state = JSON.stringify(data);
  if (root.state === state) return; // an unchanged list keeps its elements and the focus
  root.state = state;
  const focused = root.querySelector(":focus"); // figures change while a training runs
  const name = focused?.name ? `[name="${CSS.escape(focused.name)}"]` : "";
  const top = root.querySelector("ul")?.scrollTop ?? 0;
  const hidden = new Set(data.hidden);
  const send = () => setStateValue("hidden", [...hidden]);
  const all = (names) => { hidden.clear(); names.forEach((name) => hidden.add(name)); send(); };
  const rows = data.lines.map((line) => {
    const input = make("input", { type: "checkbox", name: line.name });
    input.checked = !hidden.has(line.name);
    input.onchange = () => { input.checked ? hidden.delete(line.name) : hidden.add(line.name); send(); };
    const swatch = make("span", { class: `swatch ${line.dashed ? "dashed" : line.dotted ? "dotted" : ""}`, "aria-hidden": "true" });
    swatch.style.setProperty("--line", line.color);
    const words = make("span", { class: "name", dir: "auto", title: line.name }, line.name);
    const figures = make("span", { class: "figures" }, line.figures);
    return make("li", {}, make("label", {}, input, swatch, make("span", {}, words, figures)));
  });
  const show = make("button", { type: "button", name: "all" }, "All");
  const hide = make("button", { type: "button", name: "none" }, "None");
  show.onclick = () => all([]);
  hide.onclick = () => all(data.lines.map((line) => line.name));
  const list = make("ul", { "aria-label": data.title, tabindex: "0" }, ...rows);
  root.replaceChildren(make("div", { class: "bar" }, make("span", { class: "title" }, data.title), show, hide), list);
  list.scrollTop = top;
  if (focused) root.querySelector(focused.localName + name)?.focus({ preventScroll: true });
}
