// Live stock: applies the server-sent events of the inventory API to the table.
"use strict";

const MAX_CHANGES = 20;
const FIELDS = ["available_to_promise", "on_hand", "reserved", "incoming", "safety_stock"];

function element(name, text, classes) {
  const created = document.createElement(name);
  if (text !== undefined) created.textContent = text;
  if (classes) created.className = classes;
  return created;
}

function formatNumber(value) {
  return value.toLocaleString("en");
}

function formatMoment(text, extra) {
  const options = { ...extra, day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: "UTC" };
  const time = element("time", new Date(text).toLocaleString("en-GB", options));
  time.dateTime = text;
  return time;
}

function follow(section) {
  const state = document.getElementById("live-state");
  const pause = document.getElementById("pause");
  const changes = document.getElementById("changes");
  const body = document.querySelector("table#levels tbody");
  const product = section.dataset.product;
  const store = section.dataset.store;
  const rows = new Map();
  const key = (productId, storeId) => JSON.stringify([productId, storeId]);
  if (body) for (const row of body.rows) rows.set(key(row.dataset.product, row.dataset.store), row);

  function addRow(level) {
    // add products that become low while the page is open; the page of a product has all its stores
    if (!body || (!product && !level.low_stock)) return undefined;
    const row = document.createElement("tr");
    row.dataset.product = level.product_id;
    row.dataset.store = level.store_id;
    const head = element("th", product ? level.store_id : undefined);
    head.scope = "row";
    if (!product) {
      const link = element("a", level.product_id);
      link.href = "/stock?product_id=" + encodeURIComponent(level.product_id);
      head.append(link);
    }
    row.append(head);
    if (!product) row.append(element("td", level.store_id));
    for (const field of [...FIELDS, "low_stock", "last_event_at"]) {
      const cell = element("td", undefined, FIELDS.includes(field) ? "n" : "");
      cell.dataset.field = field;
      row.append(cell);
    }
    body.prepend(row);
    rows.set(key(level.product_id, level.store_id), row);
    return row;
  }

  function updateRow(level) {
    const row = rows.get(key(level.product_id, level.store_id)) || addRow(level);
    if (!row) return;
    for (const cell of row.querySelectorAll("[data-field]")) {
      const value = level[cell.dataset.field];
      const before = cell.textContent;
      if (cell.dataset.field === "last_event_at") cell.replaceChildren(formatMoment(value));
      else if (cell.dataset.field === "low_stock") cell.textContent = value ? "Low" : "In stock";
      else cell.textContent = formatNumber(value);
      cell.classList.toggle("changed", cell.textContent !== before);
    }
  }

  function addChange(level, asOf) {
    const item = element("li");
    item.append(formatMoment(asOf, { second: "2-digit" }));
    const text = element("span");
    const place = [product ? "" : level.product_id, store ? "" : level.store_id].filter(Boolean).join(", ");
    const figures = `${formatNumber(level.available_to_promise)} available to promise, ${formatNumber(level.on_hand)} on hand${level.low_stock ? ", low" : ""}`;
    text.append(element("strong", place || `${level.product_id}, ${level.store_id}`), ` ${figures}`);
    item.append(text);
    changes.prepend(item);
    while (changes.children.length > MAX_CHANGES) changes.lastElementChild.remove();
  }

  let source;

  function start() {
    const query = new URLSearchParams();
    if (product) query.set("product_id", product);
    if (store) query.set("store_id", store);
    state.textContent = "Connecting…";
    const parameters = query.toString();
    source = new EventSource(section.dataset.stream + (parameters ? "?" + parameters : ""));
    source.addEventListener("open", () => {
      section.dataset.state = "live";
      state.textContent = "Live. Changes appear here and in the table as they happen.";
    });
    source.addEventListener("error", () => {
      section.dataset.state = "away";
      if (source.readyState === EventSource.CLOSED) {
        state.textContent = "The server closed the connection. Reload the page to reconnect.";
        pause.hidden = true;
      } else state.textContent = "Connection lost. Reconnecting…";
    });
    source.addEventListener("stock", (event) => {
      const message = JSON.parse(event.data);
      if (message.level.on_hand === null) return; // no events are left for this product and store
      updateRow(message.level);
      addChange(message.level, message.as_of);
    });
  }

  pause.hidden = false;
  pause.addEventListener("click", () => {
    if (source) {
      source.close();
      source = undefined;
      section.dataset.state = "paused";
      state.textContent = "Paused. Changes are not shown; reload the page to see all of them.";
      pause.textContent = "Resume";
    } else {
      pause.textContent = "Pause";
      start();
    }
  });
  window.addEventListener("pagehide", () => source && source.close());
  window.addEventListener("pageshow", (event) => event.persisted && source && start());
  start();
}

const live = document.querySelector("[data-live]");
if (live) follow(live);
