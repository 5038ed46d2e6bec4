// Reads the parameters out of a PNG file: they stand in a text chunk of the keyword "steploom", as JSON.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEYWORD = "steploom";

/** What made this file, as the fields of its request; null if it does not say. */
export async function parametersOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (SIGNATURE.some((byte, place) => bytes[place] !== byte)) return null;
  const view = new DataView(bytes.buffer);
  for (let place = 8; place + 12 <= bytes.length;) {
    const length = view.getUint32(place);
    const kind = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    if (kind === "IDAT" || kind === "IEND") return null; // our texts stand before the pixels
    const text = textOf(kind, bytes.subarray(place + 8, place + 8 + length));
    if (text !== null) return fieldsOf(text);
    place += 12 + length;
  }
  return null;
}

/** The text of a chunk with our keyword, uncompressed as we write it. */
function textOf(kind, data) {
  const end = data.indexOf(0);
  if (!["iTXt", "tEXt"].includes(kind) || end < 0) return null;
  if (new TextDecoder("latin1").decode(data.subarray(0, end)) !== KEYWORD) return null;
  if (kind === "tEXt") return new TextDecoder("latin1").decode(data.subarray(end + 1));
  if (data[end + 1] !== 0) return null; // compressed: not ours
  const language = data.indexOf(0, end + 3);
  const translated = data.indexOf(0, language + 1);
  return new TextDecoder().decode(data.subarray(translated + 1));
}

function fieldsOf(text) {
  let fields;
  try {
    fields = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof fields !== "object" || fields === null) return null;
  const seed = /(?<!\\)"seed": (-?\d+)/.exec(text); // as text: it may have more digits than a number here holds
  return seed ? { ...fields, seed: seed[1] } : fields;
}
