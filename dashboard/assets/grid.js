// A table of pictures: labels stay in sight, all zoom together, a click chooses one to compare.
export default function ({ data: [data], parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".grid");
  const shape = JSON.stringify([data.columns, data.rows, data.corner]);
  if (root.shape !== shape) {
    root.shape = shape;
    build(root, data);
  }
  root.style.setProperty("--columns", data.columns.length);
  data.cells.forEach((cell, number) => fill(root.querySelectorAll("td")[number], cell, data));
  linkZoom(root, root.querySelector(".bar"));
  if (!root.hears) {
    root.hears = (event) => focusByKey(root, event);
    document.addEventListener("keydown", root.hears);
  }
  root.choose = (cell, asLeft) => {
    if (!root.dragged) setTriggerValue("chosen", { row: cell.row, column: cell.column, left: asLeft });
  };
}

function build(root, data) {
  const head = make("tr", {}, make("th", { class: "corner", scope: "col" }, data.corner),
    ...data.columns.map((label) => make("th", { scope: "col", title: label }, label)));
  const body = data.rows.map((label) => make("tr", {}, make("th", { scope: "row", title: label }, label),
    ...data.columns.map(() => make("td"))));
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Grid of pictures" },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
  scroll.onkeydown = (event) => moveFocus(root, event, data.columns.length); // not on root, which stays when the columns change
  root.replaceChildren(zoomBar(), scroll);
}

function fill(td, cell, data) {
  const state = JSON.stringify([cell.source, cell.alt, cell.note, cell.under]);
  if (td.state !== state) { // an unchanged picture keeps its element and the focus
    td.state = state;
    const inside = cell.source ? picture(cell.source, cell.alt) : make("span", { class: "frame empty" }, cell.note);
    const button = make("button", { type: "button", class: "cell", "aria-label": cell.source ? cell.alt : `${cell.alt}: ${cell.note}`, title: cell.note || cell.alt }, inside);
    if (!cell.source) button.disabled = true;
    const root = td.closest(".grid");
    button.onclick = (event) => root.choose(cell, event.shiftKey);
    td.replaceChildren(button, ...(cell.under ? [make("span", { class: "under" }, cell.under)] : []));
  }
  const marks = [["left", "L"], ["right", "R"]].filter(([side]) => data[side]?.[0] === cell.row && data[side]?.[1] === cell.column);
  td.dataset.mark = marks.map(([, letter]) => letter).join("");
  td.firstChild.setAttribute("aria-pressed", marks.length > 0);
}

function moveFocus(root, event, columns) {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!by || event.shiftKey || !event.target.classList.contains("cell")) return;
  const buttons = [...root.querySelectorAll("button.cell")];
  let at = buttons.indexOf(event.target) + by;
  while (buttons[at]?.disabled) at += by;
  if (buttons[at]) { event.preventDefault(); buttons[at].focus(); }
}

// Alt and G go to the compared picture from anywhere on the page: dozens of widgets may stand before the grid.
function focusByKey(root, event) {
  if (!root.isConnected) document.removeEventListener("keydown", root.hears); // another page was opened
  if (!root.isConnected || event.code !== "KeyG" || !event.altKey || event.ctrlKey || event.metaKey) return;
  const cell = root.querySelector("td[data-mark*=R] button.cell:enabled") ?? root.querySelector("button.cell:enabled");
  if (cell) { event.preventDefault(); cell.focus(); }
}
