// Linked zoom: every picture in `root` shows the same part. The view is kept on `root`, so that new data leave it as it is.
function linkZoom(root, bar) {
  const view = (root.view ??= { zoom: 1, x: 0, y: 0 });
  const input = bar.querySelector("input");
  const show = () => {
    const most = (view.zoom - 1) / 2; // share of a picture's side: its edge stays at the frame's edge
    view.x = Math.max(-most, Math.min(most, view.x));
    view.y = Math.max(-most, Math.min(most, view.y));
    root.style.setProperty("--zoom", view.zoom);
    root.style.setProperty("--x", `${view.x * 100}%`);
    root.style.setProperty("--y", `${view.y * 100}%`);
    root.classList.toggle("zoomed", view.zoom > 1);
    root.classList.toggle("pixels", view.zoom >= 4);
    input.value = view.zoom;
    bar.querySelector("output").textContent = `${Number(view.zoom.toFixed(2))}×`;
  };
  input.oninput = () => { view.zoom = Number(input.value); show(); };
  bar.querySelector("button").onclick = () => { Object.assign(view, { zoom: 1, x: 0, y: 0 }); show(); };
  root.onwheel = (event) => {
    if (!event.ctrlKey) return; // the page scrolls as usual
    event.preventDefault();
    view.zoom = Math.max(1, Math.min(8, view.zoom * Math.exp(-event.deltaY / 300)));
    show();
  };
  root.onkeydown = (event) => {
    root.dragged = false; // a key presses a picture's button also after a drag
    const move = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!move || !event.shiftKey || event.target.tagName === "INPUT") return;
    event.preventDefault();
    view.x += move[0] * 0.1; view.y += move[1] * 0.1;
    show();
  };
  let from = null;
  root.onpointerdown = (event) => {
    const frame = event.target.closest?.(".frame");
    root.dragged = false;
    if (frame && view.zoom > 1) from = { x: event.clientX, y: event.clientY, side: frame.clientWidth, ...{ vx: view.x, vy: view.y } };
  };
  root.onpointermove = (event) => {
    if (!from) return;
    const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
    if (Math.abs(dx) + Math.abs(dy) > 4) root.dragged = true; // a smaller movement is a click
    view.x = from.vx + dx / from.side; view.y = from.vy + dy / from.side;
    show();
  };
  root.onpointerup = root.onpointerleave = () => { from = null; };
  show();
}

// Words and addresses come from anyone's files, so they become text and attributes, never HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function zoomBar() {
  const input = make("input", { type: "range", min: 1, max: 8, step: 0.25, value: 1, "aria-label": "Zoom of all pictures" });
  const hint = "Ctrl and wheel zoom, dragging moves, Shift and arrow keys move";
  return make("div", { class: "bar", title: hint }, make("label", {}, "Zoom ", input), make("output"),
    make("button", { type: "button" }, "Reset"));
}

function picture(source, alt) {
  return make("span", { class: "frame" }, make("img", { src: source, alt, draggable: "false" }));
}
