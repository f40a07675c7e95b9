// A picture with a slider over the steps of its drawing. The last step is the finished picture.
export default function ({ data: [data], parentElement }) {
  const root = parentElement.querySelector(".scrubber");
  const state = JSON.stringify(data);
  if (root.state === state) return; // an unchanged picture keeps its step and the focus
  root.state = state;
  const last = data.steps.length - 1;
  const image = make("img", {});
  const output = make("output");
  const input = make("input", { type: "range", min: 0, max: last, step: 1, value: last, "aria-label": data.title });
  const show = () => {
    const step = data.steps[Number(input.value)];
    image.src = step.source;
    image.alt = step.alt;
    output.textContent = step.label;
    input.setAttribute("aria-valuetext", step.label);
  };
  input.oninput = show;
  show();
  root.replaceChildren(image, make("label", {}, input, output));
}
