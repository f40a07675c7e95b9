// Pictures with their captions; a click shows one of them larger.
export default function ({ data: [data], parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".gallery");
  const state = JSON.stringify(data);
  if (root.state === state) return; // an unchanged gallery keeps its elements and the focus
  root.state = state;
  root.classList.toggle("wall", Boolean(data.wall));
  root.style.gridTemplateColumns = data.columns ? `repeat(${data.columns}, minmax(0, 1fr))` : "";
  root.style.maxWidth = data.columns ? "36rem" : "";
  const action = data.action ?? "Show larger";
  root.replaceChildren(...data.pictures.flatMap((one) => {
    const shown = card(one, action, () => setTriggerValue("chosen", { row: one.row, split: one.split ?? "" }));
    return one.heading ? [make("p", { class: "heading", dir: "auto" }, one.heading), shown] : [shown];
  }));
}

function card(one, action, choose) {
  const inside = one.source ? picture(one.source, one.alt) : make("span", { class: "frame empty" }, one.note);
  const button = make("button", { type: "button", class: one.is_miss ? "cell miss" : "cell", "aria-label": `${action}: ${one.alt}${one.source ? "" : ": " + one.note}`, title: one.title }, inside);
  button.onclick = choose;
  const words = make("figcaption", {}, make("span", { class: "caption", dir: "auto" }, one.caption));
  if (one.label) words.append(make("span", { class: "label", dir: "auto" }, one.label));
  if (one.finding) words.append(make("span", { class: "finding", dir: "auto" }, one.finding));
  return make("figure", {}, button, words);
}
