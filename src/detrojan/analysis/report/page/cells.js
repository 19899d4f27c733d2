// The way from a number to the cells behind it: a dialog that lists them, then one cell's origin, and the
// commands that explain and recompute it.

const PAGE_OF_CELLS = 50;

const CELL_COLUMNS = [
  ["dataset", "data set", null],
  ["architecture", "architecture", null],
  ["attack", "attack", attackText],
  ["ratio", "ratio", null],
  ["seed", "seed", count],
  ["defense", "defense", defenseText],
  ["spc", "SPC", spcText],
  ["draw", "draw", count],
  ["status", "status", null],
  ["acc", "ACC, %", share],
  ["asr", "ASR, %", share],
  ["ra", "RA, %", share],
  ["der", "DER, %", share],
  ["seconds", "seconds", seconds],
];
const AXES = ["dataset", "architecture", "attack", "ratio", "seed", "defense", "protocol", "spc", "draw"];
const MODEL_AXES = AXES.slice(0, 5);
class CellsDialog {
  constructor(page) {
    this.cells = page.tables.cells;
    this.page = page;
    this.dialog = document.getElementById("cells");
    this.body = this.dialog.querySelector(".body");
    this.dialog.querySelector(".close").addEventListener("click", () => this.dialog.close());
    // A click beside the dialog hits the dialog itself, which its content covers.
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  /** Show the cells that a query selects; `title` says what number they stand behind. */
  open(query, title) {
        this.dialog.querySelector("h2").textContent = title;
    const rows = this.cells.select(query);
    if (rows.length === 1) this.detail(rows[0]);
    else this.list(rows, query, 0);
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }

  list(rows, query, first) {
    const shown = rows.slice(first, first + PAGE_OF_CELLS);
    const varying = CELL_COLUMNS.filter(([name]) => this.varies(name, rows));
    const statuses = {};
    for (const row of rows) {
      const status = this.cells.at("status", row);
      statuses[status] = (statuses[status] ?? 0) + 1;
    }
    const ended = Object.entries(statuses).map(([status, number]) => `${count(number)} ${status}`);
    const line = `${plural(rows.length, "cell")}: ${ended.join(", ") || "none"}.`;
    const said = [element("p", {}, this.describe(query, rows)), element("p", { className: "counts" }, line)];
    if (!rows.length) {
      this.body.replaceChildren(...said);
      return;
    }
    const head = element("tr", {}, ...varying.map(([, title, write]) => headCell(title, write)));
    head.prepend(element("th", { scope: "col", className: "stick" }, "cell"));
    const body = shown.map((row, place) => {
      const open = element("button", { type: "button", className: "number" }, count(first + place + 1));
      open.setAttribute("aria-label", `Cell ${first + place + 1}: where it comes from`);
      open.addEventListener("click", () => this.detail(row, () => this.list(rows, query, first)));
      const cells = varying.map(([name, , write]) => this.valueCell(name, write, row));
      const failed = this.cells.at("status", row) !== "ok";
      return element("tr", { className: failed ? "failed" : "" }, element("th", { scope: "row", className: "stick" }, open), ...cells);
    });
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
    this.body.replaceChildren(
      ...said,
      element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Cells" }, table),
      pager(rows.length, PAGE_OF_CELLS, first, (next) => this.list(rows, query, next)),
      element("p", { className: "quiet" }, "Choose a cell for where it comes from, and for the command that reproduces it."),
    );
  }

  /** Of keys, only those that differ are columns; of measures, those that are known. */
  varies(name, rows) {
    if (!this.cells.has(name)) return false;
    const first = rows.length ? this.cells.at(name, rows[0]) : null;
    if (["acc", "asr", "ra", "der"].includes(name)) return rows.some((row) => this.cells.at(name, row) !== null);
    if (name === "seconds") return rows.some((row) => this.cells.at(name, row));
    if (name === "status") return true;
    return rows.some((row) => this.cells.at(name, row) !== first);
  }

  /** Say in words what all these cells share. */
  describe(query, rows) {
    const shared = CELL_COLUMNS.filter(([name]) => AXES.includes(name) && rows.length && !this.varies(name, rows));
    const words = shared.map(([name, title, write]) => {
      const value = this.cells.at(name, rows[0]);
      return `${title} ${write ? write(value) : value}`;
    });
    if ("attack_took" in query) {
      const took = defined(query.attack_took);
      if (took.length === 1) words.push(took[0] ? "the attack took" : "the attack failed the gate");
    }
    return words.length ? `All of them: ${words.join(", ")}.` : "";
  }

  valueCell(name, write, row) {
    const value = this.cells.at(name, row);
    const text = value === null ? UNDEFINED : write ? write(value) : String(value);
    return element("td", { className: write ? "n" : "" }, text);
  }

  /** Show where a cell comes from; `goBack`, if there is any, shows the list that it was chosen from. */
  detail(row, goBack) {
    const cell = this.cells.row(row);
    const back = element("button", { type: "button", className: "plain", hidden: !goBack }, "← all of these cells");
    back.addEventListener("click", goBack);
    const budget = cell.spc ? `${cell.defense}, SPC ${cell.spc}, draw ${cell.draw}` : defenseText(cell.defense);
    const attack = cell.attack === "none" ? "no attack" : `${cell.attack}, ratio ${cell.ratio}`;
    const parts = [
      element("p", {}, back),
      element("h3", {}, [cell.dataset, cell.architecture, `${attack}, seed ${cell.seed}`, budget].join(" · ")),
      this.result(cell),
    ];
    if (this.page.commands) parts.push(...this.commands(cell));
    const origin = this.origin(cell);
    if (origin.length) parts.push(element("h3", {}, "Origin"), pairs(origin));
    this.body.replaceChildren(...parts);
    this.dialog.scrollTop = 0;
    if (goBack) back.focus();
  }

  result(cell) {
    const before = this.untouched(cell);
    const rows = [["status", cell.status], ["reason", cell.reason ?? ""]];
    if (cell.attack_took !== null) rows.push(["attack", tookText(cell.attack_took)]);
    for (const [name, title] of [["acc", "ACC"], ["asr", "ASR"], ["ra", "RA"], ["der", "DER"]]) {
      if (cell[name] === null) continue;
      const from = before && cell.defense !== "none" && before[name] !== null && name !== "der";
      rows.push([title, `${share(cell[name])} %${from ? `, untouched ${share(before[name])} %` : ""}`]);
    }
    if (cell.num_test) {
      const triggered = cell.num_triggered ? `, ${count(cell.num_triggered)} triggered ones` : "";
      rows.push(["test images", `${count(cell.num_test)} clean ones${triggered}`]);
    }
    return pairs(rows);
  }

  untouched(cell) {
    const model = MODEL_AXES.map((axis) => [axis, [cell[axis]]]);
    const [row] = this.cells.select({ ...Object.fromEntries(model), defense: ["none"] });
    return row === undefined ? null : this.cells.row(row);
  }

  origin(cell) {
    const rows = [];
    if (cell.code) {
      rows.push(["seconds", seconds(cell.seconds)]);
      rows.push(["passes", `${count(cell.forward_passes)} images forward, ${count(cell.backward_passes)} backward`]);
      rows.push(["peak memory", `${count(Math.round(cell.peak_memory_bytes / 1e6))} MB`]);
    }
    rows.push(["device", cell.device], ["code", cell.code], ["git commit", cell.git_commit]);
    rows.push(["versions", assignments(cell.versions)], ["hyperparameters", assignments(cell.hyperparameters)]);
    if ("chosen" in cell) rows.push(["chosen", assignments(cell.chosen)]);
    else if (this.page.commands) rows.push(["chosen", "too large for this page: the first command below shows it"]);
    const shard = this.page.commands && cell.code ? this.shard(cell) : null;
    if (shard) {
      rows.push(["log", `logs/shards/${shard}.log`]);
      rows.push(["predictions", `results/metrics/${shard}/predictions.parquet`]);
    }
    return rows.filter(([, value]) => value);
  }

  /** Return the part of a path that names the shard in which a cell was made, if it is known. */
  shard(cell) {
    const draws = cell.spc ? this.page.draws.find((range) => {
      const [low, high] = range.split("-").map(Number);
      return low <= cell.draw && cell.draw <= (high ?? low);
    }) : "0-0";
    if (!draws) return null;
    const range = draws.includes("-") ? draws : `${draws}-${draws}`;
    const model = `${cell.dataset}/${cell.architecture}/${cell.attack}/ratio-${cell.ratio}/seed-${cell.seed}`;
    return `${model}/${cell.defense}/${cell.protocol}/spc-${cell.spc}/draws-${range}`;
  }

  commands(cell) {
    const text = (axes) => axes.map((axis) => `${axis}=${cell[axis]}`).join(" ");
    const found = [["Explain this number", `detrojan why ${text(AXES)}`]];
    // What was given up when the study was closed was never measured.
    if (cell.code) found.push(["Reproduce it from scratch", `detrojan reproduce ${text(AXES)}`]);
    found.push(["Explain the model", `detrojan why ${text(MODEL_AXES)}`]);
    return [element("h3", {}, "Commands, in the folder of the study"), ...found.map(([what, line]) => command(what, line))];
  }
}

/** Return a JSON object's entries in words. */
function assignments(json) {
  const write = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value));
  try {
    return Object.entries(JSON.parse(json)).map(([name, value]) => `${name} = ${write(value)}`).join(", ");
  } catch {
    return json;
  }
}

function pairs(rows) {
  const entries = rows.filter(([, value]) => value !== "");
  return element("dl", {}, ...entries.flatMap(([name, value]) => [
    element("dt", {}, name),
    element("dd", {}, value),
  ]));
}

/** Return a command with a button that copies it. */
function command(what, line) {
  const code = element("code", {}, line);
  const button = element("button", { type: "button", className: "plain" }, "Copy");
  button.setAttribute("aria-label", `Copy: ${what}`);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(line);
      button.textContent = "Copied";
    } catch {
      // Where a page may not write to the clipboard, it is selected for the reader to copy.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
  });
  return element("div", { className: "command" },
    element("p", {}, what), element("pre", { tabIndex: 0 }, code), button);
}

function headCell(title, isNumber) {
  return element("th", { scope: "col", className: isNumber ? "n" : "" }, title);
}

/** Return buttons for the pages before and after, or nothing if all rows are shown. */
function pager(total, size, first, go) {
  if (total <= size) return element("span");
  const step = (text, to) => {
    const button = element("button", { type: "button", className: "plain", disabled: to < 0 || to >= total }, text);
    button.addEventListener("click", () => go(to));
    return button;
  };
  const last = Math.min(total, first + size);
  return element("p", { className: "pager" },
    step("← before", first - size),
    element("span", {}, `${count(first + 1)} to ${count(last)} of ${count(total)}`),
    step("next →", first + size));
}
