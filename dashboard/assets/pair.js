// Two pictures: side by side, one over the other with a slider, in turn (flicker), or their difference; all zoom together.
const TURN_MS = 700; // below three changes a second, which WCAG 2.3.1 allows

export default function ({ data: [data], parentElement }) {
  const root = parentElement.querySelector(".pair");
  const state = JSON.stringify(data);
  if (root.state !== state) {
    root.state = state;
    clearInterval(root.turning);
    root.replaceChildren(zoomBar(), { slider, flicker, difference, "side by side": sides }[data.mode](data, root));
  }
  linkZoom(root, root.querySelector(".bar"));
}

function labelled({ source, alt, label }) {
  return make("figure", {}, picture(source, alt), make("figcaption", {}, label));
}

function sides(data) {
  return make("div", { class: "sides" }, labelled(data.left), labelled(data.right));
}

function difference(data) {
  return make("div", { class: "sides" }, labelled(data.difference));
}

function flicker(data, root) {
  const pictures = [data.left, data.right].map(({ source, alt }) => picture(source, alt));
  const labels = ["left", "right"].map((side) => make("span", {}, `${side}: ${data[side].label}`));
  pictures[1].classList.add("over");
  let shown = 1;
  const turn = () => {
    shown = 1 - shown;
    pictures[1].hidden = shown === 0;
    labels.forEach((label, side) => label.classList.toggle("unseen", side !== shown));
  };
  const play = make("button", { type: "button" });
  const run = (runs) => {
    clearInterval(root.turning);
    root.turning = runs ? setInterval(() => (root.isConnected ? turn() : clearInterval(root.turning)), TURN_MS) : 0;
    play.textContent = runs ? "Pause" : "Play";
  };
  const step = () => { run(false); turn(); };
  const other = make("button", { type: "button" }, "Other picture");
  const stage = make("div", { class: "stage plain" }, ...pictures);
  play.onclick = () => run(!root.turning);
  other.onclick = step;
  stage.onclick = () => { if (!root.classList.contains("zoomed")) step(); };
  turn();
  run(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  return make("figure", { class: "slider" }, stage,
    make("figcaption", {}, make("span", { class: "turns" }, ...labels), make("div", { class: "bar" }, play, other)));
}

function slider(data, root) {
  const left = picture(data.left.source, data.left.alt);
  const right = picture(data.right.source, data.right.alt);
  right.classList.add("over");
  const line = make("span", { class: "line" });
  const stage = make("div", { class: "stage" }, left, right, line);
  const input = make("input", { type: "range", min: 0, max: 100, step: 1, value: root.cut ?? 50,
    "aria-label": "How much of the left picture is shown" });
  const show = () => { root.cut = input.value; stage.style.setProperty("--cut", `${input.value}%`); };
  const drag = (event) => {
    if (!event.buttons || root.classList.contains("zoomed")) return; // zoomed in, dragging moves the pictures
    const box = stage.getBoundingClientRect();
    input.value = ((event.clientX - box.left) / box.width) * 100;
    show();
  };
  input.oninput = show;
  stage.onpointerdown = drag;
  stage.onpointermove = drag;
  show();
  return make("figure", { class: "slider" }, stage, input,
    make("figcaption", {}, make("span", {}, `left: ${data.left.label}`), make("span", {}, `right: ${data.right.label}`)));
}
