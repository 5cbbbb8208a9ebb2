"use strict";
// Every heading of a table becomes a button that sorts by its column; without scripts the table stays as it is.
for (const table of document.querySelectorAll("table:not(.matrix)")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => parseFloat(text(row).replace("\u2212", "-"));
      const rows = [...body.rows];
      const numeric = rows.some((row) => !Number.isNaN(number(row)));
      rows.sort((a, b) => {
        if (!numeric) return (down ? -1 : 1) * text(a).localeCompare(text(b), undefined, { numeric: true });
        const x = number(a), y = number(b);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return down ? y - x : x - y;
      });
      body.append(...rows);
    });
  });
}
