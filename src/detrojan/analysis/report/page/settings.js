// All settings: the rows of summary.parquet, filtered, searched and sorted.

const ROWS_AT_ONCE = 400; // a small study is shown, and printed, whole
const ROWS_OF_PAGE = 50;
const SETTING_FILTERS = [["dataset", "data set"], ["architecture", "architecture"], ["attack", "attack"], ["ratio", "ratio"], ["defense", "defense"], ["spc", "SPC"], ["attack_took", "attacks"]];
const SETTING_COLUMNS = [
  ["dataset", "data set", null],
  ["architecture", "architecture", null],
  ["attack", "attack", attackText],
  ["ratio", "ratio", null],
  ["attack_took", "gate", tookText],
  ["defense", "defense", defenseText],
  ["spc", "SPC", spcText],
  ["acc_mean", "ACC, %", share],
  ["asr_mean", "ASR, %", share],
  ["ra_mean", "RA, %", share],
  ["der_mean", "DER, %", share],
  ["num_ok", "cells", null],
  ["seconds", "seconds", seconds],
];
const TEXTS = ["dataset", "architecture", "attack", "ratio", "attack_took", "defense"];

class Settings {
  constructor(page, root, openCells) {
    this.summary = page.tables.summary;
    this.openCells = openCells;
    this.table = root.querySelector("table");
    this.pager = root.querySelector(".pages");
    this.said = root.querySelector(".counts");
    this.sort = null;
    this.first = 0;
    const form = root.querySelector("form");
    const changed = () => {
      this.first = 0;
      this.draw();
    };
    this.filters = makeFilters(form, this.summary, SETTING_FILTERS, changed);
    this.search = element("input", { type: "search", name: "search", autocomplete: "off" });
    this.search.addEventListener("input", changed);
    form.append(element("label", {}, "search ", this.search));
    const all = Array.from({ length: this.summary.length }, (_, row) => row);
    this.columns = SETTING_COLUMNS.filter(([name]) => this.informs(name, all));
    this.places = this.order(page.defenses);
    this.draw();
  }

  /** Where each row stands unless it is sorted: by setting as in the table, in it by rank, untouched first. */
  order(defenses) {
    const ranks = new Map(["none", ...defenses].map((name, rank) => [name, rank]));
    const axes = ["dataset", "architecture", "attack", "ratio", "attack_took"];
    let setting = 0;
    return Array.from({ length: this.summary.length }, (_, row) => {
      if (row && axes.some((axis) => this.summary.at(axis, row) !== this.summary.at(axis, row - 1))) setting++;
      return setting * (ranks.size + 1) + ranks.get(this.summary.at("defense", row));
    });
  }

  /** Whether a column tells rows apart, or has numbers at all. */
  informs(name, rows) {
    const value = (row) => this.summary.at(name, row);
    if (name === "seconds") return rows.some(value);
    if (name.endsWith("_mean")) return rows.some((row) => value(row) !== null);
    if (name === "attack_took") return rows.some((row) => value(row) === false);
    return ["defense", "num_ok"].includes(name) || rows.some((row) => value(row) !== value(rows[0]));
  }

  text(name, row) {
    const value = this.summary.at(name, row);
    if (name === "num_ok") return `${count(value)}/${count(this.summary.at("num_cells", row))}`;
    const write = SETTING_COLUMNS.find(([column]) => column === name)[2];
    return write ? write(value) : String(value);
  }

  rows() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = this.summary.select(chosenValues(this.filters, this.summary));
    const found = !words.length ? chosen : chosen.filter((row) => {
      const text = TEXTS.map((name) => this.text(name, row)).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (!this.sort) return found.sort((a, b) => this.places[a] - this.places[b]);
    const { name, down } = this.sort;
    const key = (row) => this.summary.at(name, row);
    return found.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null); // what is undefined stays last
      const number = typeof x === "number" || name === "ratio";
      return (down ? -1 : 1) * (number ? x - y : String(x).localeCompare(String(y)));
    });
  }

  draw() {
    const rows = this.rows();
    const size = this.summary.length <= ROWS_AT_ONCE ? ROWS_AT_ONCE : ROWS_OF_PAGE;
    const shown = rows.slice(this.first, this.first + size);
    this.table.tHead.replaceChildren(element("tr", {}, ...this.columns.map((column) => this.head(column))));
    this.table.tBodies[0].replaceChildren(...shown.map((row) => this.line(row)));
    this.said.textContent = `${count(rows.length)} of ${plural(this.summary.length, "row")}.`;
    this.pager.replaceChildren(pager(rows.length, size, this.first, (first) => {
      this.first = first;
      this.draw();
      this.table.scrollIntoView({ block: "nearest" });
    }));
  }

  head([name, title, write]) {
    const button = element("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      const again = this.sort?.name === name;
      this.sort = { name, down: again ? !this.sort.down : false };
      this.first = 0;
      this.draw();
      [...this.table.tHead.querySelectorAll("button")].find((other) => other.textContent === title).focus();
    });
    const cell = element("th", { scope: "col", className: this.className(name) }, button);
    if (this.sort?.name === name) cell.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
    return cell;
  }

  className(name) {
    return name === "defense" ? "stick" : this.isNumber(name) ? "n" : "";
  }

  isNumber(name) {
    return /_mean$|^num_ok$|^seconds$|^spc$|^ratio$/.test(name);
  }

  line(row) {
    const at = (name) => this.summary.at(name, row);
    const untouched = at("defense") === "none";
    const line = element("tr", { className: untouched ? "untouched" : at("num_ok") ? "" : "failed" });
    for (const [name] of this.columns) {
      const text = name === "spc" && untouched ? "" : this.text(name, row);
      const cell = element(name === "defense" ? "th" : "td", { className: this.className(name) });
      if (name === "defense") cell.scope = "row";
      const measure = name.match(/^(\w+)_mean$/)?.[1];
      if (measure && at(name) !== null) this.number(cell, text, measure, row);
      else cell.append(text);
      line.append(cell);
    }
    return line;
  }

  number(cell, text, measure, row) {
    const at = (name) => this.summary.at(name, row);
    const button = element("button", { type: "button", className: "number" }, text);
    button.addEventListener("click", () => {
      const axes = ["dataset", "architecture", "attack", "ratio", "attack_took", "defense", "spc"];
      const query = Object.fromEntries(axes.map((axis) => [axis, [at(axis)]]));
      const where = [at("dataset"), at("architecture"), attackText(at("attack"))].join(", ");
      this.openCells(query, `${MEASURES[measure]} ${text} %: ${defenseText(at("defense"))} on ${where}`);
    });
    cell.append(button);
    const [low, high] = [at(`${measure}_low`), at(`${measure}_high`)];
    if (low !== null) cell.append(element("small", {}, `[${share(low)}, ${share(high)}]`));
  }
}
