// Stock as it changes: follows the server-sent events of the inventory API and writes them into the table.
"use strict";

const MOST_CHANGES = 20;
const FIELDS = ["available_to_promise", "on_hand", "reserved", "incoming", "safety_stock"];

function element(name, text, classes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function figure(value) {
  return value.toLocaleString("en");
}

function moment(text, more) {
  const options = { ...more, day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23", timeZone: "UTC" };
  const made = element("time", new Date(text).toLocaleString("en-GB", options));
  made.dateTime = text;
  return made;
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

  function add(level) {
    // what has become low while the page is open; a product's page shows all its stores
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

  function show(level) {
    const row = rows.get(key(level.product_id, level.store_id)) || add(level);
    if (!row) return;
    for (const cell of row.querySelectorAll("[data-field]")) {
      const value = level[cell.dataset.field];
      const before = cell.textContent;
      if (cell.dataset.field === "last_event_at") cell.replaceChildren(moment(value));
      else if (cell.dataset.field === "low_stock") cell.textContent = value ? "low" : "enough";
      else cell.textContent = figure(value);
      cell.classList.toggle("changed", cell.textContent !== before);
    }
  }

  function tell(level, asOf) {
    const item = element("li");
    item.append(moment(asOf, { second: "2-digit" }));
    const what = element("span");
    const place = [product ? "" : level.product_id, store ? "" : level.store_id].filter(Boolean).join(", ");
    const figures = `${figure(level.available_to_promise)} can be promised, ${figure(level.on_hand)} on hand${level.low_stock ? ", low" : ""}`;
    what.append(element("strong", place || `${level.product_id}, ${level.store_id}`), ` ${figures}`);
    item.append(what);
    changes.prepend(item);
    while (changes.children.length > MOST_CHANGES) changes.lastElementChild.remove();
  }

  let source;

  function start() {
    const query = new URLSearchParams();
    if (product) query.set("product_id", product);
    if (store) query.set("store_id", store);
    state.textContent = "Connecting…";
    const asked = query.toString();
    source = new EventSource(section.dataset.stream + (asked ? "?" + asked : ""));
    source.addEventListener("open", () => {
      section.dataset.state = "live";
      state.textContent = "Following. Changes appear here and in the table as they happen.";
    });
    source.addEventListener("error", () => {
      section.dataset.state = "away";
      if (source.readyState === EventSource.CLOSED) {
        state.textContent = "The server has ended the connection. Load the page again to follow.";
        pause.hidden = true;
      } else state.textContent = "The connection is lost. Trying again…";
    });
    source.addEventListener("stock", (event) => {
      const told = JSON.parse(event.data);
      if (told.level.on_hand === null) return; // nothing is known of it any more
      show(told.level);
      tell(told.level, told.as_of);
    });
  }

  pause.hidden = false;
  pause.addEventListener("click", () => {
    if (source) {
      source.close();
      source = undefined;
      section.dataset.state = "paused";
      state.textContent = "Paused. Changes meanwhile are not shown; load the page again to see all of them.";
      pause.textContent = "Go on";
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
