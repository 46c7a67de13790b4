// The button that copies an answer. Streamlit mounts it and gives the text as data.
export default function ({ parentElement, data }) {
  const button = parentElement.querySelector("button");
  button.textContent = data.label;
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(data.text);
    } catch {  // a page that came by plain HTTP from another machine has no clipboard
      const area = Object.assign(document.createElement("textarea"), { value: data.text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "✓";
    setTimeout(() => (button.textContent = data.label), 1200);
  };
}
