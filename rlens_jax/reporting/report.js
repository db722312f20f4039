"use strict";
// Values of charts and heat maps on hover, touch and keyboard focus, and the theme button. The page is complete without them.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Put a tip next to a point of its holder (pixels), on the side with more room, inside the holder.
function place(tip, holder, left, top) {
  tip.hidden = false;
  const room = holder.clientWidth - tip.offsetWidth;
  const wanted = left > holder.clientWidth / 2 ? left - tip.offsetWidth - 12 : left + 12;
  tip.style.left = Math.max(0, Math.min(wanted, room)) + "px";
  tip.style.top = top + "px";
}

function chart(figure) {
  const steps = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const plot = figure.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const tip = plot.appendChild(element("div", { class: "tip", hidden: "" }));
  const box = svg.viewBox.baseVal;
  let at = -1;

  // For keyboards and screen readers the plot is a slider: arrows move along the axis, and the value is read out.
  for (const [key, value] of Object.entries({
    tabindex: 0, role: "slider", "aria-label": svg.getAttribute("aria-label") + "; arrow keys read the values",
    "aria-valuemin": 0, "aria-valuemax": steps.length - 1, "aria-valuenow": 0, "aria-valuetext": steps[0].title,
  })) plot.setAttribute(key, value);

  function hide() {
    tip.hidden = true;
    cursor.replaceChildren();
    at = -1;
  }

  function show(number) {
    at = Math.max(0, Math.min(number, steps.length - 1));
    const step = steps[at];
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("d", `M${step.left} ${svg.dataset.top}V${svg.dataset.bottom}`);
    const dots = step.readings.map((reading) => {
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("class", reading.style);
      dot.setAttribute("cx", step.left);
      dot.setAttribute("cy", reading.top);
      dot.setAttribute("r", 4);
      return dot;
    });
    cursor.replaceChildren(line, ...dots);
    tip.replaceChildren(element("p", {}, step.title));
    for (const reading of [...step.readings].reverse()) {
      const row = element("p", { class: reading.style });
      row.append(
        element("b", {}, reading.value), ` ${reading.name} `,
        element("small", {}, `(${reading.interval})${reading.note ? " " + reading.note : ""}`),
      );
      tip.append(row);
    }
    const scale = svg.clientWidth / box.width;
    place(tip, plot, step.left * scale, 0);
    // Curves fall from the upper left, so a tip at the lower edge covers least.
    tip.style.top = Math.max(0, (svg.dataset.bottom - 6) * scale - tip.offsetHeight) + "px";
    plot.setAttribute("aria-valuenow", at);
    plot.setAttribute("aria-valuetext", [...tip.children].map((row) => row.textContent).join("; "));
  }

  function point(event) {
    const x = (event.clientX - svg.getBoundingClientRect().left) * box.width / svg.clientWidth;
    const distance = (step) => Math.abs(step.left - x);
    show(steps.reduce((best, step, number) => (distance(step) < distance(steps[best]) ? number : best), 0));
  }

  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    else if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}

function heatMap(table) {
  const figure = table.closest("figure");
  figure.style.position = "relative";
  const tip = figure.appendChild(element("div", { class: "tip", role: "status", hidden: "" }));
  const hide = () => { tip.hidden = true; };
  table.setAttribute("role", "grid");
  const cells = table.querySelectorAll("td[data-tip]");
  for (const cell of cells) cell.tabIndex = -1;
  if (cells.length) cells[0].tabIndex = 0;

  function show(cell) {
    tip.textContent = cell.dataset.tip;
    const box = cell.getBoundingClientRect();
    const holder = figure.getBoundingClientRect();
    place(tip, figure, box.left + box.width / 2 - holder.left, box.bottom - holder.top + 6);
  }

  for (const kind of ["pointerover", "pointerdown", "focusin"]) {
    table.addEventListener(kind, (event) => {
      const cell = event.target.closest("td[data-tip]");
      if (cell) show(cell);
      else hide();
    });
  }
  table.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  table.addEventListener("focusout", hide);
  table.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const cell = event.target.closest("td");
    if (!by || !cell) return undefined;
    event.preventDefault();
    const rows = [...table.tBodies[0].rows];
    let row = rows.indexOf(cell.parentElement) + by[0];
    let column = cell.cellIndex + by[1];
    // Skip the layers that were ranked already.
    while (rows[row] && rows[row].cells[column] && !rows[row].cells[column].dataset.tip) {
      row += by[0];
      column += by[1];
    }
    const next = rows[row] && rows[row].cells[column];
    if (next && next.dataset.tip) {
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
    return undefined;
  });
}

function themeButton(button) {
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const rename = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    rename();
  });
  system.addEventListener("change", rename);
  rename();
  button.hidden = false;
}

document.querySelectorAll("figure.chart").forEach(chart);
document.querySelectorAll("table.heat").forEach(heatMap);
themeButton(document.getElementById("theme"));
