// Reads what the page carries in itself (written by payload.py), and selects rows of its tables.

/** A table by columns. A column's `at(row)` is a value, or null. */
class Table {
  constructor(length, columns) {
    this.length = length;
    this.columns = columns;
  }

  has(column) {
    return column in this.columns;
  }

  at(column, row) {
    return this.columns[column].at(row);
  }

  row(number) {
    const entries = Object.keys(this.columns).map((name) => [name, this.at(name, number)]);
    return Object.fromEntries(entries);
  }

  /** Values of a column, each once, in order: numbers by size, null last. */
  values(column) {
    return inOrder(new Set(this.columns[column].values));
  }

  /** Numbers of the rows that have, in each column of the query, one of the values listed for it. */
  select(query) {
    // Codes are compared, not values: a column may have a hundred thousand rows, and few values.
    const tests = Object.entries(query).map(([name, wanted]) => {
      const { codes, values } = this.columns[name];
      return { codes, passes: values.map((value) => wanted.includes(value)) };
    });
    const rows = [];
    for (let row = 0; row < this.length; row++) {
      if (tests.every(({ codes, passes }) => passes[codes[row]])) rows.push(row);
    }
    return rows;
  }
}

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f8: Float64Array };

function readColumn({ kind, at, values }, buffer, start, length) {
  const numbers = new ARRAYS[kind](buffer, start + at, length);
  if (values) return { codes: numbers, values, at: (row) => values[numbers[row]] };
  return { at: (row) => (Number.isNaN(numbers[row]) ? null : numbers[row]) };
}

/** Return what `payload.pack` was given: the rest, and the tables in `tables`. */
async function unpack(text) {
  const characters = atob(text.trim());
  const packed = new Uint8Array(characters.length); // filled in a loop: there are millions
  for (let place = 0; place < characters.length; place++) packed[place] = characters.charCodeAt(place);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = Math.ceil((4 + length) / 8) * 8;
  for (const [name, { length: rows, columns }] of Object.entries(header.tables)) {
    const read = Object.entries(columns).map(([column, what]) => [column, readColumn(what, buffer, start, rows)]);
    header.tables[name] = new Table(rows, Object.fromEntries(read));
  }
  return header;
}

function inOrder(values) {
  const number = (value) => (value === null || value === "" ? NaN : Number(value));
  return [...values].sort((a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return number(a) - number(b) || String(a).localeCompare(String(b));
  });
}

const defined = (values) => values.filter((value) => value !== null);

/** Mean of what is not null; null if nothing is. */
function mean(values) {
  const known = defined(values);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}
