"use strict";
(() => {
  // Tooltips for anything with data-tip, by pointer and by keyboard.
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + box.height + 24 > innerHeight ? y - box.height - 12 : y + 16) + "px";
  };
  const show = (element, x, y) => {
    tip.textContent = element.dataset.tip;
    tip.classList.add("on");
    place(x, y);
  };
  const hide = () => tip.classList.remove("on");
  document.addEventListener("pointermove", (event) => {
    const element = event.target.closest && event.target.closest("[data-tip]");
    if (element) show(element, event.clientX, event.clientY); else hide();
  });
  document.addEventListener("focusin", (event) => {
    if (!event.target.dataset || !event.target.dataset.tip) return;
    const box = event.target.getBoundingClientRect();
    show(event.target, box.right, box.bottom);
  });
  document.addEventListener("focusout", hide);

  // The ranked table: a header sorts by its column, again the other way round; rows without a value stay last.
  const table = document.getElementById("ranking");
  const body = table.tBodies[0];
  const original = [...body.rows];
  const value = (row, column) => {
    const raw = row.cells[column].dataset.value;
    return raw === undefined || raw === "" ? null : raw;
  };
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const header = button.parentElement, column = header.cellIndex, numeric = header.dataset.kind === "number";
    const first = header.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = header.getAttribute("aria-sort") === first ? other : first;
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const sorted = [...original].sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
    });
    table.classList.toggle("sorted", sorted.some((row, i) => row !== original[i]));
    body.append(...sorted);
  });

  // The gallery of attention.
  const source = document.getElementById("gallery-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const view = document.getElementById("gallery-view");
  const readoutSelect = document.getElementById("gallery-readout");
  const extra = document.getElementById("gallery-extra");
  const CELL = 92, FEW = 8;
  const decode = (readout) => readout.bytes ||= Uint8Array.from(atob(readout.weights), (c) => c.charCodeAt(0));
  const weightsOf = (readout, item, query) => {
    const rows = readout.queries.length + 1, start = (item * rows + query) * readout.tokens;
    return decode(readout).subarray(start, start + readout.tokens);
  };
  const element = (name, text, parent) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const queryName = (readout, query) => query === 0 ? "mean" : "query " + (readout.queries[query - 1] + 1);
  const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";

  const STOPS = [[27, 31, 58], [122, 31, 109], [217, 71, 63], [249, 166, 58], [252, 243, 165]];
  const colour = (t) => {
    const at = Math.min(t * (STOPS.length - 1), STOPS.length - 1.001), k = Math.floor(at), f = at - k;
    return STOPS[k].map((c, i) => Math.round(c + f * (STOPS[k + 1][i] - c)));
  };
  const images = data.kind === "image" ? data.items.map((item) => {
    const image = new Image();
    image.src = item.src;
    return image;
  }) : [];

  const drawCell = (canvas, item, weights, prefix) => {
    const [rows, columns] = data.grid, { width, height } = data.items[item];
    const ratio = devicePixelRatio || 1, scale = CELL / Math.max(width, height);
    canvas.style.width = Math.round(width * scale) + "px";
    canvas.style.height = Math.round(height * scale) + "px";
    canvas.width = Math.round(width * scale * ratio);
    canvas.height = Math.round(height * scale * ratio);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = Math.max(width, height) > 48;
    context.drawImage(images[item], 0, 0, canvas.width, canvas.height);
    if (!weights) return;
    const heat = document.createElement("canvas");
    heat.width = columns;
    heat.height = rows;
    const pixels = new ImageData(columns, rows);
    for (let k = 0; k < rows * columns; k++) {
      const t = weights[prefix + k] / 255;
      pixels.data.set([...colour(t), 150 + 70 * t], 4 * k);
    }
    heat.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(heat, 0, 0, canvas.width, canvas.height);
  };

  const drawImages = (readout, all) => {
    const shown = [0];
    const count = all ? readout.queries.length : Math.min(FEW, readout.queries.length);
    if (readout.queries.length > 1) for (let q = 1; q <= count; q++) shown.push(q);
    const grid = element("table"), head = grid.createTHead().insertRow();
    element("th", "image", head);
    for (const q of shown) {
      const cell = element("th", readout.queries.length > 1 ? queryName(readout, q) : "attention", head);
      const entropy = q && readout.entropy[q - 1];
      if (entropy !== null && q) element("small", "entropy " + entropy.toFixed(2), cell);
    }
    const rows = grid.createTBody();
    data.items.forEach((_, item) => {
      const row = rows.insertRow();
      drawCell(element("canvas", undefined, row.insertCell()), item);
      for (const q of shown) {
        const canvas = element("canvas", undefined, row.insertCell());
        drawCell(canvas, item, weightsOf(readout, item, q), readout.prefix);
        canvas.dataset.tip = queryName(readout, q) + (readout.prefix ? "\non prefix tokens: " + percent(readout.on_prefix[item][q]) : "");
      }
    });
    view.replaceChildren(grid);
  };

  const drawTexts = (readout, query) => {
    const blocks = data.items.map((tokens, item) => {
      const block = element("div"), weights = weightsOf(readout, item, query);
      block.className = "text-item";
      tokens.slice(0, readout.tokens).forEach(([text, space], k) => {
        if (space && k) block.append(" ");
        const span = element("span", text, block);
        span.style.setProperty("--w", (weights[k] / 255).toFixed(3));
      });
      return block;
    });
    view.replaceChildren(...blocks);
  };

  const draw = () => {
    const readout = data.readouts[readoutSelect.selectedIndex];
    if (data.kind === "image") drawImages(readout, extra.value === "all");
    else drawTexts(readout, Math.max(0, extra.selectedIndex));
  };
  const fillExtra = () => {
    const readout = data.readouts[readoutSelect.selectedIndex];
    const options = [];
    if (data.kind === "image") {
      options.push(["few", `${Math.min(FEW, readout.queries.length)} most focused`]);
      if (readout.queries.length > FEW) options.push(["all", `all ${readout.queries.length}`]);
    } else {
      options.push(["0", "mean of all"]);
      if (readout.queries.length > 1) readout.queries.forEach((q, i) => {
        const entropy = readout.entropy[i];
        options.push([String(i + 1), `query ${q + 1}` + (entropy === null ? "" : ` (entropy ${entropy.toFixed(2)})`)]);
      });
    }
    extra.replaceChildren(...options.map(([key, text]) => new Option(text, key)));
    extra.parentElement.hidden = options.length < 2;
  };
  data.readouts.forEach((readout) => readoutSelect.add(new Option(readout.name)));
  readoutSelect.addEventListener("change", () => { fillExtra(); draw(); });
  extra.addEventListener("change", draw);
  fillExtra();
  Promise.all(images.map((image) => image.decode().catch(() => {}))).then(draw);
})();
