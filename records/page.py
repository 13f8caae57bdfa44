"""The fixed parts of every report.html: its style, its script, and the page they stand in; the reports fill it.

The page may load nothing: a content security policy forbids every network request, so a report opened in ten years, or
on a machine without a network, shows what it shows today. Colours are CSS variables with a light and a dark value; the
script hands the same variables to Plotly, on loading and on every change of theme.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --page: #ffffff; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --panel: #f7f8f9;
  --good: #18794e; --good-panel: #edf8f1; --bad: #ad5700; --bad-panel: #fff5e8; --focus: #0d74ce; }
@media (prefers-color-scheme: dark) { :root:not([data-theme="light"]) { color-scheme: dark; --page: #111317;
  --ink: #e8eaed; --soft: #a6abb3; --line: #363b42; --panel: #1a1d22; --good: #5fd3a0; --good-panel: #12261d;
  --bad: #ffb366; --bad-panel: #2b1e10; --focus: #70b8ff; } }
:root[data-theme="dark"] { color-scheme: dark; --page: #111317; --ink: #e8eaed; --soft: #a6abb3; --line: #363b42;
  --panel: #1a1d22; --good: #5fd3a0; --good-panel: #12261d; --bad: #ffb366; --bad-panel: #2b1e10; --focus: #70b8ff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { display: flex; gap: 16px; align-items: flex-start; justify-content: space-between; padding-top: 28px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 20px 0 4px; }
p { margin: 6px 0; }
.soft { color: var(--soft); font-size: 0.9rem; }
code, .number { font-variant-numeric: tabular-nums; }
code { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 0.9em; }
button { font: inherit; color: inherit; cursor: pointer; }
button:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--focus);
  outline-offset: 2px; }
#theme { flex: none; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 6px 12px;
  font-size: 0.875rem; }
.verdict { border: 1px solid var(--line); border-left: 5px solid var(--soft); border-radius: 6px; padding: 14px 18px;
  margin: 16px 0; background: var(--panel); }
.verdict.good { border-left-color: var(--good); background: var(--good-panel); }
.verdict.bad { border-left-color: var(--bad); background: var(--bad-panel); }
.verdict .label { font-weight: 600; }
.verdict.good .label { color: var(--good); }
.verdict.bad .label { color: var(--bad); }
.verdict .sentence { font-size: 1.05rem; }
.verdict ul { margin: 8px 0 0; padding-left: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 24px; }
figure { margin: 12px 0 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; font-size: 0.95rem; display: flex; gap: 12px; justify-content: space-between;
  align-items: baseline; }
.save { flex: none; display: flex; gap: 4px; }
.save button { background: none; border: 1px solid var(--line); border-radius: 4px; padding: 1px 7px;
  font-size: 0.72rem; color: var(--soft); }
.save button:hover { color: var(--ink); background: var(--panel); }
a { color: var(--focus); }
.scroll { overflow: auto; max-height: 40rem; }
.scroll:has(table.narrow) { max-height: none; }
.scroll thead th { position: sticky; top: 0; background: var(--page); }
table { border-collapse: collapse; font-size: 0.84rem; width: 100%; }
table.narrow { width: auto; min-width: min(100%, 480px); margin-top: 12px; }
th, td { text-align: left; padding: 5px 7px; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td.name { min-width: 6.5rem; }
td.place, td.label, table.narrow td { overflow-wrap: anywhere; }
td.place { min-width: 8.9rem; }
td.label { min-width: 4rem; }
td.few { min-width: 5.1rem; font-variant-numeric: tabular-nums; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom-width: 2px; }
thead button { text-align: inherit; }
thead button { background: none; border: 0; padding: 0; font-weight: inherit; }
thead button::after { content: " \\2195"; opacity: 0.4; font-size: 0.8em; }
th[aria-sort="ascending"] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: " \\2193"; opacity: 1; }
tr.chosen td { background: var(--panel); }
tr.chosen td.name { font-weight: 600; box-shadow: inset 3px 0 var(--good); }
.yes { color: var(--good); font-weight: 600; }
.no { color: var(--bad); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
footer { margin: 40px 0 32px; }
@media print { #theme, .save { display: none; } .scroll { overflow: visible; max-height: none; } }
"""

SCRIPT = """
(function () {
  "use strict";
  var root = document.documentElement;
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  var button = document.getElementById("theme");
  var figures = JSON.parse(document.getElementById("figure-data").textContent);

  function stored() { try { return localStorage.getItem("report-theme"); } catch (error) { return null; } }
  function store(theme) { try { localStorage.setItem("report-theme", theme); } catch (error) { /* private mode */ } }
  function isDark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
  function colour(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }

  // Keys that Plotly.relayout understands; applied to fresh layouts and to drawn figures alike.
  function themed(layout) {
    var keys = { "font.color": colour("--ink"), "hoverlabel.bgcolor": colour("--panel"),
      "hoverlabel.bordercolor": colour("--line"), "hoverlabel.font.color": colour("--ink"),
      "xaxis.gridcolor": colour("--line"), "yaxis.gridcolor": colour("--line"),
      "xaxis.linecolor": colour("--line"), "yaxis.linecolor": colour("--line") };
    (layout.shapes || []).forEach(function (shape, i) { keys["shapes[" + i + "].line.color"] = colour("--ink"); });
    return keys;
  }
  function name() { button.textContent = isDark() ? "Light theme" : "Dark theme"; }
  function repaint() {
    name();
    Object.keys(figures).forEach(function (id) {
      Plotly.relayout(document.getElementById(id), themed(figures[id].layout));
    });
  }

  var asked = new URLSearchParams(location.search).get("theme") || stored();
  if (asked === "dark" || asked === "light") { root.dataset.theme = asked; }
  name();
  button.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    store(root.dataset.theme);
    repaint();
  });
  system.addEventListener("change", repaint);

  Object.keys(figures).forEach(function (id) {
    var figure = figures[id], element = document.getElementById(id);
    Plotly.newPlot(element, figure.data, figure.layout, { displayModeBar: false, responsive: true })
      .then(function () { return Plotly.relayout(element, themed(figure.layout)); });
  });

  // Saving: Plotly draws the picture in the browser, on the colour of the page, and nothing leaves it.
  document.querySelectorAll("button[data-format]").forEach(function (save) {
    save.addEventListener("click", function () {
      var element = document.getElementById(save.dataset.figure), format = save.dataset.format;
      var layout = Object.assign({}, element.layout, { paper_bgcolor: colour("--page") });
      var size = { format: format, width: element.clientWidth, height: element.clientHeight };
      if (format === "png") { size.scale = 2; }
      Plotly.toImage({ data: element.data, layout: layout }, size).then(function (address) {
        var link = document.createElement("a");
        link.href = address;
        link.download = save.dataset.name + "." + format;
        document.body.appendChild(link);
        link.click();
        link.remove();
      });
    });
  });

  // Sorting: each cell carries its value in data-value; a column of numbers starts with its highest.
  function compare(a, b) {
    var x = parseFloat(a), y = parseFloat(b);
    if (!isNaN(x) && !isNaN(y)) { return x - y; }
    if (isNaN(x) !== isNaN(y) && (a === "" || b === "")) { return a === "" ? -1 : 1; }
    return a.localeCompare(b);
  }
  document.querySelectorAll("th button").forEach(function (head) {
    head.addEventListener("click", function () {
      var th = head.parentNode, table = th.closest("table"), body = table.tBodies[0];
      var column = Array.prototype.indexOf.call(th.parentNode.children, th);
      var before = th.getAttribute("aria-sort");
      var up = before ? before === "descending" : !th.classList.contains("number");
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      Array.prototype.slice.call(body.rows).sort(function (a, b) {
        var order = compare(a.cells[column].dataset.value, b.cells[column].dataset.value);
        return up ? order : -order;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
}());
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<div>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
</div>
<button id="theme" type="button">Theme</button>
</header>
<main>
{body}
<footer class="soft">
{footer}
</footer>
</main>
<script type="application/json" id="figure-data">{figures}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
