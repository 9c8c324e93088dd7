"use strict";
// Search over the pages and public names that `make docs` wrote into the element "pages".
(() => {
  const MOST = 60;
  const field = document.getElementById("words");
  const list = document.getElementById("found");
  const said = document.getElementById("said");
  const pages = JSON.parse(document.getElementById("pages").textContent).map((page) => ({
    ...page,
    title: page.t.toLowerCase(),
    body: page.x.toLowerCase(),
  }));

  // A word in the title counts more than one in the text; every word has to occur.
  function score(page, words) {
    let sum = 0;
    for (const word of words) {
      const inTitle = page.title === word ? 40 : page.title.includes(word) ? 12 : 0;
      const inBody = page.body.includes(word) ? 1 : 0;
      if (!inTitle && !inBody) return 0;
      sum += inTitle + inBody;
    }
    return sum;
  }

  function excerpt(page, words) {
    const at = Math.max(0, ...words.map((word) => page.body.indexOf(word)));
    const from = at > 60 ? page.x.indexOf(" ", at - 60) + 1 : 0;
    return (from ? "… " : "") + page.x.slice(from, from + 200) + (from + 200 < page.x.length ? " …" : "");
  }

  function item(page, words) {
    const entry = document.createElement("li");
    const link = document.createElement("a");
    link.href = page.u;
    link.textContent = page.t;
    const text = document.createElement("p");
    text.textContent = excerpt(page, words);
    entry.append(link, text);
    return entry;
  }

  function search() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length
      ? pages
          .map((page) => ({ page, points: score(page, words) }))
          .filter((one) => one.points)
          .sort((a, b) => b.points - a.points || a.page.t.localeCompare(b.page.t))
      : [];
    list.replaceChildren(...found.slice(0, MOST).map((one) => item(one.page, words)));
    const shown = found.length > MOST ? `, the best ${MOST} are shown` : "";
    said.textContent = words.length ? `${found.length} pages and names${shown}` : "Words, or the name of a function.";
  }

  field.value = new URLSearchParams(window.location.search).get("q") || "";
  field.addEventListener("input", search);
  search();
  field.focus();
})();
