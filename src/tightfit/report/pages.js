const $ = id => document.getElementById(id), source = $("data").textContent, D = JSON.parse(source);
const UNITS = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024], ["B", 1]];
const unitOf = n => UNITS.find(([, size]) => Math.abs(n) >= size) || UNITS[4];
const bytes = n => { const [name, size] = unitOf(n), a = n / size; return (size === 1 ? Math.round(a) : a < 10 ? a.toFixed(2) : a.toFixed(1)) + " " + name; };
const html = (name, attributes, ...children) => { const e = document.createElement(name); for (const k in attributes) e.setAttribute(k, attributes[k]); e.append(...children); return e; };
const ready = () => { document.documentElement.dataset.ready = "1"; performance.mark("ready"); };
/* The button that saves the page's data as `name`. */
const saves = name => $("download").addEventListener("click", () => {
  const a = html("a", { href: URL.createObjectURL(new Blob([source], { type: "application/json" })), download: name });
  a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000);
});
