// What the report does beyond showing: theme, sorting, reference method, filters, and live charts.
// The page is complete without it.
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const root = document.documentElement;
root.classList.add("js");

// Theme: the system's, until the reader chooses. Storage can be denied, as in a sandboxed frame.
const remember = (value) => { try { return value ? localStorage.setItem("theme", value) : localStorage.getItem("theme"); } catch { return null; } };
root.dataset.theme = remember() ?? "";
$("#theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  remember((root.dataset.theme = dark ? "light" : "dark"));
});

// The section in view is marked in the navigation.
const links = Object.fromEntries($$(".bar a").map((link) => [link.hash.slice(1), link]));
const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) links[entry.target.id]?.classList.toggle("here", entry.isIntersecting);
}, { rootMargin: "-10% 0px -80%" });
$$("section[id]").forEach((section) => watch.observe(section));

// Matrices: rows by the values of a column, differences from the chosen reference.
const gaps = JSON.parse($("#gaps")?.textContent ?? "{}");
for (const box of $$(".matrix")) {
  const body = $("tbody", box), rows = $$("tr", body);
  const sort = (column) => {
    const key = (row) => (column < 0 ? -rows.indexOf(row) : Number(row.cells[column + 1].dataset.value ?? -1));
    body.append(...[...rows].sort((a, b) => key(b) - key(a)));
    $$("thead th", box).forEach((head, n) => (n - 1 === column ? head.setAttribute("aria-sort", column < 0 ? "none" : "descending") : head.removeAttribute("aria-sort")));
    $(".sort", box).value = column;
  };
  const refer = (reference) => {
    for (const row of rows) {
      row.classList.toggle("reference", row.dataset.method === reference);
      $$("td", row).forEach((cell, n) => {
        const gap = gaps[box.dataset.name][reference][row.dataset.method][n], place = $(".gap", cell);
        if (!place) return;
        place.textContent = gap ? `${gap.sign} ${gap.text} ${gap.interval}`.trim() : row.dataset.method === reference ? "reference" : "–";
        place.title = gap ? `p ${gap.p}` : "";
      });
    }
    $(".reference", box).value = reference;
  };
  $$("th button[data-column]", box).forEach((button) => button.addEventListener("click", () => sort(Number(button.dataset.column))));
  $$("tbody th button", box).forEach((button) => button.addEventListener("click", () => refer(button.closest("tr").dataset.method)));
  $(".sort", box).addEventListener("change", (event) => sort(Number(event.target.value)));
  $(".reference", box).addEventListener("change", (event) => refer(event.target.value));
}

// Examples: those that match all filters.
const filters = $("#filters");
if (filters) {
  const { dataset, method, outcome, category } = filters.elements, cards = $$(".examples > li");
  const show = () => {
    const right = (card) => card.dataset.right.split(" ").includes(method.value);
    const matches = (card) =>
      (!dataset.value || card.dataset.dataset === dataset.value) &&
      (!category.value || card.dataset.category === category.value) &&
      (!outcome.value || right(card) === (outcome.value === "right"));
    for (const card of cards) card.hidden = !matches(card);
    $("#shown").textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} sampled examples`;
  };
  const categories = () => {
    const here = cards.filter((card) => !dataset.value || card.dataset.dataset === dataset.value);
    const options = [...new Set(here.map((card) => card.dataset.category))].sort();
    category.replaceChildren(new Option("all", ""), ...options.map((option) => new Option(option)));
  };
  dataset.addEventListener("change", categories);
  filters.addEventListener("change", show);
  dataset.selectedIndex = 1;
  categories();
  show();
}

// Charts: Vega draws a chart again, with tooltips, once the pointer is over it; until then the page shows its image.
let vega;
const library = () => (vega ??= import(URL.createObjectURL(new Blob([$("#vega").textContent], { type: "text/javascript" }))));
for (const chart of $$(".chart")) {
  chart.addEventListener("pointerenter", async () => {
    const { default: embed } = await library(), plot = $(".plot", chart), label = $("svg", plot).getAttribute("aria-label");
    await embed(plot, JSON.parse($("script", chart).textContent), { renderer: "svg", actions: false });
    const svg = $("svg", plot);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
    chart.dataset.live = "yes";
  }, { once: true });
}
