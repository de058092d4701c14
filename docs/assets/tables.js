// Marks cells of figures, such as "0.89 [0.84, 0.93]" and "7 (3 to 9)", so that none is broken,
// and cells of text, so that none becomes a column of single words.
const FIGURE = /^[-+<>]?\*?[\d.,]+ ?%?(e-\d+)?( ?(\[.*\]|\(.*\)|\+ ?\d+|of [\d,]+|x \d+))*( s| h)?$/;
document.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll("article td")) {
    const text = cell.textContent.trim();
    if (text.length < 30 && FIGURE.test(text)) cell.classList.add("figure");
    else if (text.length > 20) cell.classList.add("text");
  }
});
