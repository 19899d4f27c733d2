// Brings the page to life. Without this, everything stands there but the heat map's filters, the rows of all
// settings, and the way from a number to its cells.

const page = await unpack(document.getElementById("data").textContent);
const choice = { measure: "der", spc: null };
const cells = new CellsDialog(page);
const openCells = (query, title) => cells.open(query, title);

document.documentElement.classList.add("live");

/** Numbers that stand in the page lead to the cells behind them. */
for (const cell of document.querySelectorAll("[data-cells]")) {
  const button = element("button", { type: "button", className: "number" }, ...cell.childNodes);
  const head = cell.closest("tr").querySelector("th")?.firstChild?.textContent ?? "";
  const column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex]?.textContent.trim() ?? "";
  const title = `${column}: ${head}`;
  button.setAttribute("aria-label", `${title}, ${button.textContent}: the cells behind it`);
  button.addEventListener("click", () => openCells(JSON.parse(cell.dataset.cells), title));
  cell.replaceChildren(button);
}

/** Tables that stand in the page are sorted by their heads. */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (head.tagName !== "TH") return; // above pictures of the numbers beside them
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is undefined stays last
        const order = head.classList.contains("n") ? x - y : x.localeCompare(y);
        return up ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    });
  });
}

const heatMap = new HeatMap(page, document.getElementById("heat"), choice, openCells);
new Settings(page, document.getElementById("all-settings"), openCells);
const figures = new Figures(page, choice, openCells);

/** Of the tables that there are for each measure and budget, show the chosen one. */
function show() {
  for (const block of document.querySelectorAll("[data-block]")) {
    const measure = block.dataset.measure;
    const spc = block.dataset.spc === "" ? null : Number(block.dataset.spc);
    block.hidden = (measure !== undefined && measure !== choice.measure) || spc !== choice.spc;
  }
}

const form = document.getElementById("choice");
form.addEventListener("change", () => {
  const { measure, spc } = Object.fromEntries(new FormData(form));
  const measureChanged = measure !== choice.measure;
  choice.measure = measure;
  choice.spc = spc === undefined || spc === "" ? null : Number(spc);
  show();
  heatMap.draw();
  figures.update(measureChanged);
});
form.reset(); // browsers remember what was chosen before a reload
show();

const theme = document.getElementById("theme");
theme.addEventListener("change", () => {
  document.documentElement.style.colorScheme = theme.value;
});

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
document.documentElement.dataset.ready = "";
