// Reports the text of a field soon after the last key, and lets Enter press a button. Shift and Enter begin a line.
export default function ({ data: [data], parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".typing");
  const page = root.ownerDocument;
  root.live = data.live;
  root.report = (text) => setTriggerValue("typed", text);
  if (root.stop) return root.stop; // an unchanged listener keeps its timer
  const isField = (event) => event.target.matches?.(`.st-key-${data.field} textarea`);
  const typed = (event) => {
    if (!isField(event)) return;
    clearTimeout(root.timer);
    if (root.live) root.timer = setTimeout(() => root.report(event.target.value), data.pause);
  };
  const entered = (event) => {
    if (!isField(event) || event.key !== "Enter" || event.shiftKey || event.isComposing || !event.isTrusted) return;
    event.preventDefault();
    event.stopPropagation();
    clearTimeout(root.timer);
    const keys = { key: "Enter", ctrlKey: true, bubbles: true, cancelable: true };
    event.target.dispatchEvent(new KeyboardEvent("keydown", keys)); // Streamlit takes the text
    setTimeout(() => page.querySelector(`.st-key-${data.button} button`)?.click());
  };
  page.addEventListener("input", typed);
  page.addEventListener("keydown", entered, true); // before Streamlit's own handler
  root.stop = () => {
    clearTimeout(root.timer);
    page.removeEventListener("input", typed);
    page.removeEventListener("keydown", entered, true);
    root.stop = null;
  };
  return root.stop;
}
