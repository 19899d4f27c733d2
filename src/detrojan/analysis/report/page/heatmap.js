// The heat map of defenses against attacks: a table whose numbers are recomputed for the chosen filters.

const FILTERS = [["dataset", "data set"], ["architecture", "architecture"], ["ratio", "ratio"], ["attack_took", "attacks"]];

class HeatMap {
  constructor(page, root, choice, openCells) {
    this.summary = page.tables.summary;
    this.page = page;
    this.choice = choice;
    this.openCells = openCells;
    this.table = root.querySelector("table");
    this.note = root.querySelector(".explained");
    this.code = root.querySelector("code");
    this.legend = root.querySelector(".legend");
    this.sortedBy = null;
    this.filters = makeFilters(root.querySelector("form"), this.summary, FILTERS, () => this.draw());
    // That the gate was passed is what all other numbers of the report are about.
    const took = this.filters.attack_took;
    if (took.options.length > 1) took.value = took.options[took.options.length - 1].value;
    this.draw();
  }

  /** The query that the filters and the chosen budget stand for; columns of the summary, and of the cells. */
  query() {
    const query = chosenValues(this.filters, this.summary);
    // Methods that are given no data, and untouched models, have no budget.
    if (this.choice.spc !== null) query.spc = [this.choice.spc, 0];
    return query;
  }

  draw() {
    const { measure } = this.choice;
    const column = `${measure}_mean`;
    const clean = this.filters.attack_took.value === "false" ? [] : this.rows({ ...this.query(), attack: ["none"], attack_took: [null] });
    const attacked = this.rows(this.query()).filter((row) => this.summary.at("attack", row) !== "none");
    const groups = {};
    for (const row of [...attacked, ...clean]) {
      const key = `${this.summary.at("defense", row)}\n${this.summary.at("attack", row)}`;
      (groups[key] ??= []).push(row);
    }
    const means = Object.fromEntries(Object.entries(groups).map(([key, rows]) => [key, this.mean(rows, column)]));
    const present = new Set(Object.keys(means).filter((key) => means[key] !== null).map((key) => key.split("\n")[1]));
    const attacks = inOrder([...present].filter((attack) => attack !== "none"));
    if (present.has("none")) attacks.push("none");
    const names = ["none", ...this.page.defenses].filter((name) => attacks.some((attack) => `${name}\n${attack}` in groups));
    this.sort(names, means, attacks);
    this.table.tHead.replaceChildren(this.head(attacks));
    this.table.tBodies[0].replaceChildren(...names.map((name) => this.line(name, attacks, means, groups, measure)));
    this.explain(measure, attacks.length && names.length);
  }

  rows(query) {
    return this.summary.select(query);
  }

  /** Mean over settings, each by its mean over budgets, as in `charts.heat`. */
  mean(rows, column) {
    const settings = {};
    for (const row of rows) {
      const key = ["dataset", "architecture", "ratio"].map((axis) => this.summary.at(axis, row)).join("\n");
      (settings[key] ??= []).push(this.summary.at(column, row));
    }
    return mean(Object.values(settings).map(mean));
  }

  sort(names, means, attacks) {
    if (!attacks.includes(this.sortedBy)) return;
    const sign = this.page.lower_is_better.includes(this.choice.measure) ? 1 : -1;
    const value = (name) => means[`${name}\n${this.sortedBy}`] ?? sign * Infinity;
    names.sort((a, b) => sign * (value(a) - value(b)));
  }

  head(attacks) {
    const cell = (attack, text, explained) => {
      const button = element("button", { type: "button", title: explained }, text);
      button.addEventListener("click", () => {
        this.sortedBy = attack;
        this.draw();
        [...this.table.tHead.querySelectorAll("button")].find((other) => other.textContent === text)?.focus();
      });
      const made = element("th", { scope: "col", className: attack ? "n" : "stick" }, button);
      const up = this.page.lower_is_better.includes(this.choice.measure);
      if (this.sortedBy === attack && attack) made.setAttribute("aria-sort", up ? "ascending" : "descending");
      return made;
    };
    const first = cell(null, "defense", "Sort by the ranking");
    return element("tr", {}, first, ...attacks.map((attack) => cell(attack, attackText(attack), "Sort by this column, best first")));
  }

  line(name, attacks, means, groups, measure) {
    const head = element("th", { scope: "row", className: "stick" }, defenseText(name));
    if (this.page.upper_bounds.includes(name)) head.append(" ", element("span", { className: "badge" }, "upper bound"));
    return element("tr", { className: name === "none" ? "untouched" : "" }, head, ...attacks.map((attack) => {
      const key = `${name}\n${attack}`;
      const value = means[key] ?? null;
      const rows = groups[key] ?? [];
      const total = rows.reduce((sum, row) => sum + this.summary.at("num_cells", row), 0);
      const ended = rows.reduce((sum, row) => sum + this.summary.at("num_ok", row), 0);
      if (!rows.length) return element("td", { className: "n" }, "");
      const number = element("button", { type: "button", className: "number" }, share(value));
      const said = `${defenseText(name)}, ${attackText(attack)}: ${MEASURES[measure]} ${share(value)}, ${count(ended)} of ${plural(total, "cell")} ended well`;
      number.title = said;
      number.setAttribute("aria-label", said);
      number.addEventListener("click", () => {
        const gate = attack === "none" ? { attack_took: [null] } : {};
        const query = { ...this.query(), ...gate, attack: [attack], defense: [name] };
        this.openCells(query, `${MEASURES[measure]} ${share(value)} %: ${defenseText(name)}, ${attackText(attack)}`);
      });
      const cell = element("td", { className: value !== null && ended < total ? "n heat partial" : "n heat" }, number);
      this.paint(cell, value, measure);
      return cell;
    }));
  }

  paint(cell, value, measure) {
    if (value === null) return;
    const shade = this.shade(value, measure);
    cell.style.backgroundColor = this.color(shade);
    const [from, to] = this.page.pale;
    cell.style.color = shade > from && shade < to ? "#000" : "#fff";
  }

  /** How good a share is, from 0 to 1: the same in all reports, as `charts.shade`. */
  shade(value, measure) {
    const within = Math.min(1, Math.max(0, value));
    return this.page.lower_is_better.includes(measure) ? 1 - within : within;
  }

  /** A colour of the palette, mixed from its two neighbours. */
  color(shade) {
    const { palette } = this.page;
    const place = shade * (palette.length - 1);
    const below = Math.min(palette.length - 2, Math.floor(place));
    const channels = [0, 1, 2].map((channel) => {
      const [a, b] = [palette[below], palette[below + 1]].map((hex) => parseInt(hex.slice(1 + 2 * channel, 3 + 2 * channel), 16));
      return Math.round(a + (b - a) * (place - below));
    });
    return `rgb(${channels.join(", ")})`;
  }

  explain(measure, any) {
    const flipped = this.page.lower_is_better.includes(measure);
    this.legend.hidden = !any;
    this.legend.querySelector(".low").textContent = `bad, ${flipped ? 100 : 0} %`;
    this.legend.querySelector(".high").textContent = `${flipped ? 0 : 100} %, good`;
    this.legend.querySelector(".title").textContent = measure === "der" ? "DER (50 %: untouched)" : MEASURES[measure];
    this.legend.querySelector(".ramp").style.background = `linear-gradient(to right, ${this.page.palette.join(", ")})`;
    const dotted = this.table.querySelector(".partial") ? " A dot: some of the cells have no result." : "";
    this.note.textContent = any
      ? `Percent: means over the settings that the filters leave, each by its mean over budgets.${dotted} Click a number to see its cells.`
      : `The filters leave no cell that has the measure ${MEASURES[measure]}.`;
    this.code.textContent = this.pandas(measure);
  }

  /** The same numbers by pandas, for the chosen filters. */
  pandas(measure) {
    const write = (axis, value) => (["ratio", "spc"].includes(axis) ? String(value) : JSON.stringify(value));
    const { attack_took: took, ...query } = this.query();
    const conditions = Object.entries(query).map(([axis, values]) => `summary["${axis}"].isin([${values.map((value) => write(axis, value)).join(", ")}])`);
    // Clean models, of which the gate says nothing, stay beside those whose attack took.
    if (took?.[0]) conditions.push(`(summary["attack_took"].isin([True]) | (summary["attack"] == "none"))`);
    else if (took) conditions.push(`summary["attack_took"].isin([False])`);
    const chosen = conditions.length ? `summary[${conditions.join(" & ")}]` : "summary";
    return `import pandas
summary = pandas.read_parquet("results/tables/summary.parquet")
chosen = ${chosen}
settings = chosen.groupby(["defense", "attack", "dataset", "architecture", "ratio"])["${measure}_mean"].mean()
print(100 * settings.groupby(["defense", "attack"]).mean().unstack())`;
  }
}

function optionText(column, value) {
  const write = {
    attack: attackText,
    attack_took: (took) => (took ? "that took" : "that failed the gate"),
    defense: defenseText,
    spc: spcText,
  }[column];
  return write ? write(value) : String(value);
}

/** Fill a form with a choice for each column that has two values or more; return the choices by column. */
function makeFilters(form, table, columns, changed) {
  const made = {};
  for (const [column, title] of columns) {
    // Clean models have no ratio.
    const values = defined(table.values(column)).filter((value) => column !== "ratio" || value !== "0");
    const select = element("select", { name: column });
    select.append(element("option", { value: "" }, "all"));
    for (const value of values) select.append(element("option", { value: String(value) }, optionText(column, value)));
    select.addEventListener("change", changed);
    const needless = values.length < 2 && values[0] !== false; // that all attacks failed is to be seen
    const label = element("label", { hidden: needless }, `${title} `, select);
    form.append(label);
    made[column] = select;
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  return made;
}

/** Return the query that the choices of `makeFilters` stand for. */
function chosenValues(filters, table) {
  const query = {};
  for (const [column, select] of Object.entries(filters)) {
    if (select.value === "") continue;
    query[column] = table.values(column).filter((value) => String(value) === select.value);
  }
  return query;
}
