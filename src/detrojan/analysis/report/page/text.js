// Writes values as the rest of the report does, and makes elements. Names, reasons and settings come from
// outside: they only ever become text.

const UNDEFINED = "–";
const MEASURES = { der: "DER", asr: "ASR", acc: "ACC", ra: "RA" };

/** Return a number with this many decimals, as Python does: what lies in the middle goes to the even digit. */
function fixed(value, decimals) {
  let text = value.toFixed(decimals);
  // toFixed rounds up what lies exactly in the middle; of the numbers that are written here with a decimal
  // or two, only odd multiples of 1/4 and 1/8 can.
  const scaled = Math.abs(value) * 10 ** decimals;
  if (scaled % 1 === 0.5 && (value * 8) % 1 === 0 && Math.floor(scaled) % 2 === 0) {
    text = (Math.sign(value) * Math.floor(scaled) / 10 ** decimals).toFixed(decimals);
  }
  return Number(text) === 0 ? text.replace("-", "") : text;
}

/** Return a fraction in percent. */
const share = (value) => (value === null ? UNDEFINED : fixed(100 * value, 1));

const grouped = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");

const count = (value) => (value === null ? UNDEFINED : grouped(String(value)));

function seconds(value) {
  if (value === null) return UNDEFINED;
  if (value >= 100) return grouped(fixed(value, 0));
  return fixed(value, value >= 1 || value === 0 ? 1 : 2);
}

const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

const attackText = (attack) => (attack === "none" ? "no attack" : attack);
const defenseText = (defense) => (defense === "none" ? "untouched" : defense);
const spcText = (spc) => (spc ? String(spc) : "none");
const tookText = (took) => (took === null ? "" : took ? "took" : "failed the gate");

/** Return an element: `element("td", { className: "n" }, "text", another)`. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}
