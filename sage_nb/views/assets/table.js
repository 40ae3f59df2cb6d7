// A table that sorts by any column. data: {caption, columns: [{key, name, number, help}], rows: [{key: value}]}
"use strict";
sage.register("table", (root, data, {sortable, state, say}) => {
  const chosen = state({sort: "", down: "1"}, () => draw());
  function draw() {
    const names = data.columns.map((column) => column.key);
    const sort = names.includes(chosen.get("sort")) ? chosen.get("sort") : null;
    root.replaceChildren(
      sortable({
        ...data,
        sort,
        descending: chosen.get("down") === "1",
        sorted: (by, down) => {
          chosen.set({sort: by, down: down ? "1" : "0"}, {quiet: true});
          const {name} = data.columns.find((column) => column.key === by);
          say(`sorted by ${name}, ${down ? "largest first" : "smallest first"}`);
        },
      }),
    );
  }
  draw();
});
