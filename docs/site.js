// Wide tables scroll by themselves: let the keyboard reach those, as it reaches code.
document$.subscribe(() =>
  setTimeout(() => {
    for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
      table.tabIndex = 0;
      table.setAttribute("role", "region");
      table.setAttribute("aria-label", "Table");
    }
  }),
);
