// Draws the figures live: the same specifications as on paper, in the page's colours and at its width.

const ENLARGED = 1.6; // pixels a point: text of 7.5 points on paper has 12 pixels here
const NARROWEST = 74; // points, of a panel among several
const LEAST = 340; // points, of a single panel that is wide on paper: on a phone it is moved sideways

/** Replace the colours of paper by those of the page, which follow its theme. */
function themed(part, colors) {
  if (typeof part === "string") return colors[part.toLowerCase()] ?? part;
  if (Array.isArray(part)) return part.map((item) => themed(item, colors));
  if (part === null || typeof part !== "object") return part;
  return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, key === "values" ? value : themed(value, colors)]));
}

class Figures {
  constructor(page, choice, openCells) {
    this.page = page;
    this.choice = choice;
    this.openCells = openCells;
    this.views = new Map();
    this.colors = { ...page.colors, white: "transparent", black: "currentColor", "#000000": "currentColor" };
    this.config = themed(page.config, this.colors);
    const observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        this.draw(target);
      }
    }, { rootMargin: "600px" });
    this.figures = [...document.querySelectorAll("figure[data-figure]")];
    for (const figure of this.figures) observer.observe(figure);
    let waiting;
    addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.views.forEach((view, figure) => this.fit(figure)), 200);
    });
  }

  figure(place) {
    const name = place.dataset.figure;
    return this.page.figures[place.dataset.byMeasure === undefined ? name : `${name}_${this.choice.measure}`];
  }

  async draw(place) {
    const figure = this.figure(place);
    const live = place.querySelector(".live");
    if (!figure) {
      live.textContent = `Nothing to show for ${MEASURES[this.choice.measure]}.`;
      place.classList.add("drawn");
      return;
    }
    const spec = themed(figure.spec, this.colors);
    const width = live.parentElement.clientWidth / ENLARGED;
    if (spec.columns) spec.columns = Math.max(1, Math.min(spec.columns, Math.floor((width - 50) / NARROWEST)));
    const { view } = await vegaEmbed(live, spec, {
      mode: "vega-lite",
      ast: true, // expressions are interpreted: the page's policy lets nothing be evaluated
      renderer: "svg",
      actions: false,
      config: this.config,
      tooltip: { theme: "custom" },
    });
    live.setAttribute("role", "img");
    live.setAttribute("aria-label", figure.alt);
    view.addEventListener("click", (event, item) => {
      if (item?.datum?.defense) this.openCells(this.query(item.datum), `${item.datum.defense}, in the figure`);
    });
    this.views.set(place, { view, columns: spec.columns ?? 1, faceted: Boolean(spec.columns), inches: figure.inches });
    place.classList.add("drawn");
    await this.choose(place);
    this.fit(place);
  }

  /** The cells behind a mark. */
  query(datum) {
    const known = this.page.defenses.includes(datum.defense) ? datum.defense : "none";
    const query = { defense: [known], attack_took: [true] };
    const spc = Number(datum.SPC ?? datum.spc);
    if (spc) query.spc = [spc, 0];
    if (datum.attack) query.attack = [datum.attack];
    return query;
  }

  /** Show the chosen budget, where a figure has one. */
  async choose(place) {
    const { view } = this.views.get(place);
    if (place.dataset.byMeasure !== undefined) {
      await view.signal("spc", this.choice.spc === null ? "pooled" : String(this.choice.spc)).runAsync();
    }
  }

  /** Make a figure as wide as its place, in points; its SVG is then enlarged to fill it. */
  async fit(place) {
    const { view, columns, faceted, inches } = this.views.get(place);
    const svg = place.querySelector("svg.marks");
    const room = place.querySelector(".live").parentElement.clientWidth;
    if (!svg || !room) return; // printing, or a folded part
    const least = faceted || inches < 5 ? 0 : LEAST;
    const wanted = Math.max(least, Math.min(room / ENLARGED, 72 * inches * 1.3));
    const signal = faceted ? "child_width" : "width";
    for (let round = 0; round < 2; round++) {
      const missing = wanted - svg.viewBox.baseVal.width;
      await view.signal(signal, Math.max(40, view.signal(signal) + missing / columns)).resize().runAsync();
      await view.runAsync(); // the first run measures what the second lays out
    }
    svg.style.width = `${svg.viewBox.baseVal.width * ENLARGED}px`;
  }

  async update(measureChanged) {
    for (const place of this.figures) {
      if (place.dataset.byMeasure === undefined || !this.views.has(place)) continue;
      if (measureChanged) await this.draw(place);
      else await this.choose(place);
    }
  }
}
