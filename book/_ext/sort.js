// Put into the one page that has the table; without it the table is a plain one.
for (const table of document.querySelectorAll("table.all-results")) {
  const rows = [...table.tBodies[0].rows];
  const text = (row, i) => row.cells[i].textContent.trim();
  const number = s => parseFloat(s.replace("\u2212", "-").replace(/,/g, ""));
  const box = document.createElement("div");
  box.className = "filters";
  const count = document.createElement("output");
  const fields = [];
  const show = () => {
    let n = 0;
    for (const row of rows) {
      row.hidden = !fields.every(([i, field]) => i < 0
        ? field.value.toLowerCase().split(/\s+/).every(word => row.textContent.toLowerCase().includes(word))
        : !field.value || text(row, i) === field.value);
      n += !row.hidden;
    }
    count.textContent = n + " of " + rows.length + " rows";
  };
  const add = (i, field, label) => {
    field.setAttribute("aria-label", label);
    field.addEventListener("input", show);
    fields.push([i, field]);
    box.append(field);
  };
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "Filter";
  add(-1, search, "Filter the rows");
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const label = head.textContent.trim();
    if (["Data", "Task", "Kind"].includes(label)) {
      const choice = document.createElement("select");
      choice.append(new Option(label + ": all", ""));
      for (const value of [...new Set(rows.map(row => text(row, i)))].sort()) if (value) choice.append(new Option(value));
      add(i, choice, label);
    }
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const numeric = rows.every(row => !text(row, i) || !isNaN(number(text(row, i))));
      rows.sort((a, b) => {
        const [x, y] = [text(a, i), text(b, i)];
        if (!x || !y) return !x - !y;
        return sign * (numeric ? number(x) - number(y) : x.localeCompare(y, "en"));
      });
      table.tBodies[0].append(...rows);
    });
  });
  box.append(count);
  (table.closest(".scroll") || table).before(box);
  show();
}
