sage.register("edits", () => {});
