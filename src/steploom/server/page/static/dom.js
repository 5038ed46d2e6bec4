// Small helpers for the document. Text goes in as text only: nothing that a user typed is ever read as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties, data-* (`data`), aria-* (`aria`) and children. */
export function el(tag, { data = {}, aria = {}, ...props } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), props);
  Object.assign(made.dataset, data);
  for (const [name, value] of Object.entries(aria)) made.setAttribute(`aria-${name}`, value);
  made.append(...children);
  return made;
}

export const DYES = 10;

/** The colour of a request, by its number: the same on its card, in its lane, and in every tab. */
export const dye = (number) => `var(--dye-${((number ?? 0) % DYES + DYES) % DYES})`;

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 0.0995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  return seconds < 9.95 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}

/** "alone", or "batch of 3": how many requests share a forward, which may be an average. */
export const company = (requests) => (requests < 1.5 ? "alone" : `batch of ${Math.round(requests)}`);

/** The bytes that base64 text stands for, as a URL of this page. Whoever takes it has to revoke it. */
export function blobOf(base64, type) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  return new Blob([bytes], { type });
}
