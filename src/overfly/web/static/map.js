"use strict";
// The map page: image, classes and uncertainty of one or two networks with a swipe control, class shares and downloads.
const { key, baseMap } = document.querySelector(".maplayout").dataset;
const base = `/maps/${encodeURIComponent(key)}`;
const swipe = document.getElementById("swipe");
const line = document.getElementById("line");
const hidden = new Set();  // names of classes that are switched off

function element(name, text) {
  const created = document.createElement(name);
  if (text !== undefined) created.textContent = text;
  return created;
}

function swatch(color) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const square = document.createElementNS(space, "rect");
  for (const [name, value] of Object.entries({ width: "16", height: "16", fill: color })) square.setAttribute(name, value);
  svg.append(square);
  return svg;
}

function percent(share) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`;
}

function updateLegend(info, ownColors, update) {
  const table = document.getElementById("legend");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  const several = info.predictions.length > 1;
  for (const heading of ["", "class", ...info.predictions.map((_, index) => (several ? "AB"[index] : "share"))]) head.append(element("th", heading));
  const body = table.createTBody();
  const names = [...new Set(info.predictions.flatMap((prediction) => prediction.classes.map(({ name }) => name)))];
  for (const name of names) {
    const shares = info.predictions.map((prediction) => prediction.classes.find((entry) => entry.name === name));
    const first = shares.find((entry) => entry);
    const row = body.insertRow();
    const cell = row.insertCell();
    cell.className = "swatch";
    cell.append(swatch(ownColors ? first.color : first.safe_color));
    const box = element("input");
    box.type = "checkbox";
    box.checked = !hidden.has(name);
    row.classList.toggle("off", !box.checked);
    box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](name); row.classList.toggle("off", !box.checked); update(); });
    const label = element("label");
    label.append(box, name);
    row.insertCell().append(label);
    for (const entry of shares) {
      const shareCell = row.insertCell();
      shareCell.className = "number";
      shareCell.textContent = percent(entry ? entry.share : null);
    }
  }
}

function addDownloads(info) {
  const container = document.getElementById("files");
  info.predictions.forEach((prediction, index) => {
    const suffix = info.predictions.length > 1 ? ` of ${"AB"[index]}` : "";
    for (const [kind, name] of [["tiff", info.georeferenced ? "GeoTIFF" : "TIFF"], ["gpkg", "GeoPackage"], ["png", "PNG"]]) {
      if (kind === "png" && info.width * info.height > 9e6) continue;
      const link = element("a", `Download ${name}${suffix}`);
      link.className = "button";
      link.href = `${base}/file?${new URLSearchParams({ network: prediction.network, output: kind })}`;
      link.setAttribute("download", "");
      link.title = prediction.title;
      container.append(link);
    }
  });
}

// Web Mercator, as shares of the world's width from its top left corner, of a position in the image's pixels; beyond the
// image, its outermost parts are continued.
function worldPosition(info, x, y) {
  const parts = 8;
  const cell = (value) => Math.min(parts - 1, Math.max(0, Math.floor(value)));
  const [column, row] = [(x / info.width) * parts, (y / info.height) * parts];
  const [left, top] = [cell(column), cell(row)];
  const [right, down] = [column - left, row - top];
  const point = (i, j) => info.mercator[(top + j) * (parts + 1) + left + i];
  const blend = (k) => (1 - down) * ((1 - right) * point(0, 0)[k] + right * point(1, 0)[k]) + down * ((1 - right) * point(0, 1)[k] + right * point(1, 1)[k]);
  const world = 2 * Math.PI * 6378137;
  return [0.5 + blend(0) / world, 0.5 - blend(1) / world];
}

// A layer of tiles from elsewhere, drawn into the grid of the image's pixels.
function addBaseMap(map, info, image) {
  const host = new URL(baseMap).host;
  const images = new Map();
  const load = (z, x, y) => {
    const address = baseMap.replaceAll("{z}", z).replaceAll("{x}", x).replaceAll("{y}", y);
    if (!images.has(address)) {
      images.set(address, new Promise((resolve) => {
        const tile = new Image();
        tile.referrerPolicy = "origin";
        tile.onload = () => resolve(tile);
        tile.onerror = () => { images.delete(address); resolve(null); };
        tile.src = address;
      }));
    }
    return images.get(address);
  };
  const draw = async (canvas, coords) => {
    const side = 256 * 2 ** (info.max_zoom - coords.z);
    const at = (i, j) => worldPosition(info, (coords.x + i) * side, (coords.y + j) * side);
    const [origin, alongX, alongY] = [at(0, 0), at(1, 0), at(0, 1)];
    const extent = Math.max(Math.hypot(alongX[0] - origin[0], alongX[1] - origin[1]), Math.hypot(alongY[0] - origin[0], alongY[1] - origin[1]));
    const zoom = Math.min(19, Math.max(0, Math.round(Math.log2(1 / extent))));
    const count = 2 ** zoom;
    const scaled = (point) => point.map((value) => value * count);
    const [o, u, v] = [origin, alongX, alongY].map(scaled);
    const corners = [o, u, v, [u[0] + v[0] - o[0], u[1] + v[1] - o[1]]];
    const range = (k) => [Math.floor(Math.min(...corners.map((corner) => corner[k]))), Math.floor(Math.max(...corners.map((corner) => corner[k])))];
    const [[west, east], [north, south]] = [range(0), range(1)];
    const context = canvas.getContext("2d");
    const shape = new DOMMatrix([(u[0] - o[0]) / 256, (u[1] - o[1]) / 256, (v[0] - o[0]) / 256, (v[1] - o[1]) / 256, o[0] - west, o[1] - north]).inverse();
    const places = [];
    for (let y = Math.max(0, north); y <= Math.min(count - 1, south); y += 1) {
      for (let x = west; x <= east && places.length < 64; x += 1) places.push([x, y]);
    }
    const loaded = await Promise.all(places.map(([x, y]) => load(zoom, ((x % count) + count) % count, y)));
    context.setTransform(shape);
    loaded.forEach((tile, index) => {
      if (tile) context.drawImage(tile, places[index][0] - west, places[index][1] - north, 1 + 1 / 256, 1 + 1 / 256);
    });
    if (places.length && !loaded.some(Boolean)) throw new Error(`the base map of ${host} cannot be loaded`);
  };
  const Layer = L.GridLayer.extend({
    createTile(coords, done) {
      const canvas = L.DomUtil.create("canvas");
      canvas.width = canvas.height = 256;
      draw(canvas, coords).then(() => done(null, canvas), (error) => done(error, canvas));
      return canvas;
    },
  });
  map.createPane("base").style.zIndex = 150;
  const corner = (x, y) => map.unproject([x * info.width, y * info.height], info.max_zoom);
  const bounds = L.latLngBounds(corner(-1, 2), corner(2, -1));
  const layer = new Layer({ bounds, noWrap: true, minZoom: -2, maxZoom: info.max_zoom + 4, pane: "base", attribution: `Base map: ${host}` });
  layer.on("tileerror", ({ error }) => { document.getElementById("hint").textContent = `${error.message}.`; });
  const connect = (id, shown) => document.getElementById(id).addEventListener("change", ({ target }) => { if (target.checked) shown.addTo(map); else shown.remove(); });
  connect("image", image);
  connect("base-map", layer);
  document.getElementById("background").hidden = false;
}

function showMap(info) {
  const meters = (info.meters_per_pixel || 1) * 2 ** info.max_zoom;
  const crs = L.extend({}, L.CRS.Simple, { distance: (from, to) => meters * L.CRS.Simple.distance(from, to) });
  const map = L.map("map", { crs, minZoom: -2, maxZoom: info.max_zoom + 4, zoomSnap: 0.25, attributionControl: true });
  map.attributionControl.setPrefix("Leaflet 1.9.4");
  if (info.meters_per_pixel) L.control.scale({ imperial: false, position: "topright" }).addTo(map);
  const corner = (x, y) => map.unproject([x, y], info.max_zoom);
  const bounds = L.latLngBounds(corner(0, info.height), corner(info.width, 0));
  const settings = { bounds, noWrap: true, tileSize: 256, minNativeZoom: 0, maxNativeZoom: info.max_zoom, minZoom: -2, maxZoom: info.max_zoom + 4 };
  const tiles = (layer, query, pane) => L.tileLayer(`${base}/tiles/${layer}/{z}/{x}/{y}?${new URLSearchParams(query)}`, { ...settings, pane });
  const image = tiles("image", {}, "tilePane").addTo(map);
  if (baseMap && info.mercator) addBaseMap(map, info, image);
  const panes = info.predictions.map((_, index) => {
    const pane = map.createPane(`prediction-${index}`);
    pane.style.zIndex = 250 + index;
    return pane;
  });
  map.fitBounds(bounds);
  let shown = [];

  function updateSwipe() {
    if (panes.length < 2) return;
    const size = map.getSize();
    const x = (swipe.value / 1000) * size.x;
    const top = map.containerPointToLayerPoint([0, 0]);
    const bottom = map.containerPointToLayerPoint(size);
    const middle = map.containerPointToLayerPoint([x, 0]).x;
    for (const layer of shown) {
      const container = layer.getContainer();
      if (!container) continue;
      const left = layer.options.pane === "prediction-0";
      const sides = left ? [top.y, middle, bottom.y, top.x] : [top.y, bottom.x, bottom.y, middle];
      container.style.clip = `rect(${sides.map((side) => `${side}px`).join(",")})`;
    }
    line.style.left = `${x - 1}px`;
  }

  function updateLayers() {
    const layerName = document.querySelector("input[name=layer]:checked").value;
    const ownColors = document.getElementById("own-colors").checked;
    for (const layer of shown) layer.remove();
    const off = (prediction) => prediction.classes.flatMap(({ name }, number) => (hidden.has(name) ? [number] : [])).join(",");
    shown = layerName === "image" ? [] : info.predictions.map((prediction, index) => tiles(layerName, { network: prediction.network, own_colors: ownColors, hidden: off(prediction) }, `prediction-${index}`));
    for (const layer of shown) layer.addTo(map);
    document.getElementById("hint").textContent = layerName === "uncertainty"
      ? "Uncertainty is the entropy of each pixel's class probabilities: transparent at 0, dark red at its maximum."
      : info.predictions.map((prediction, index) => `${info.predictions.length > 1 ? `${"AB"[index]}: ` : ""}${prediction.title}`).join(" · ");
    swipe.hidden = line.hidden = info.predictions.length < 2 || layerName === "image";
    updateOpacity();
    updateSwipe();
  }

  function updateOpacity() {
    for (const layer of shown) layer.setOpacity(document.getElementById("opacity").value / 100);
  }

  const updateColors = () => updateLegend(info, document.getElementById("own-colors").checked, updateLayers);
  document.getElementById("show").addEventListener("change", updateLayers);
  document.getElementById("own-colors").addEventListener("change", updateColors);
  document.getElementById("opacity").addEventListener("input", updateOpacity);
  swipe.addEventListener("input", updateSwipe);
  map.on("move zoom viewreset resize", updateSwipe);
  map.on("mousemove click", ({ latlng }) => {
    const point = map.project(latlng, info.max_zoom).floor();
    if (point.x >= 0 && point.y >= 0 && point.x < info.width && point.y < info.height) readPixel(info, point);
  });
  addDownloads(info);
  updateColors();
  updateLayers();
}

let reading = false;
let next = null;

// One request at a time; while it runs, only the newest position is kept.
async function readPixel(info, point) {
  next = point;
  if (reading) return;
  reading = true;
  while (next) {
    const { x, y } = next;
    next = null;
    const response = await fetch(`${base}/pixels/${x}/${y}`).catch(() => null);
    if (response && response.ok) showPixel(info, x, y, await response.json());
  }
  reading = false;
}

function showPixel(info, x, y, pixel) {
  const parts = [`column ${x}, row ${y}`];
  if (pixel.coordinates) parts.push(`x ${pixel.coordinates[0].toFixed(2)}, y ${pixel.coordinates[1].toFixed(2)}`);
  if (pixel.degrees) parts.push(`${Math.abs(pixel.degrees[1]).toFixed(6)}° ${pixel.degrees[1] < 0 ? "S" : "N"}, ${Math.abs(pixel.degrees[0]).toFixed(6)}° ${pixel.degrees[0] < 0 ? "W" : "E"}`);
  pixel.predictions.forEach(({ name, probability }, index) => {
    parts.push(`${info.predictions.length > 1 ? `${"AB"[index]}: ` : ""}${name === null ? "no data" : `${name}, ${probability} %`}`);
  });
  document.getElementById("pixel").textContent = parts.join(" · ");
}

function duration(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

// Show the progress of an unfinished map until it is finished.
async function load() {
  const job = document.getElementById("job");
  const layout = document.querySelector(".maplayout");
  let begun = null;  // time and progress at which the remaining time is measured from
  for (;;) {
    const response = await fetch(base, { cache: "no-store" });
    const info = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(info.detail || `HTTP status ${response.status}`);
    if (info.state === "failed") throw new Error(info.detail);
    job.hidden = info.state === "finished";
    layout.hidden = !job.hidden;
    if (info.state === "finished") return showMap(info);
    document.getElementById("progress").value = info.progress;
    const [now, done] = [performance.now(), info.progress];
    if (begun === null && done > 0) begun = [now, done];
    const left = begun && done > begun[1] ? `, about ${duration((now - begun[0]) / 1000 * (1 - done) / (done - begun[1]))} left` : "";
    document.getElementById("jobtext").textContent = `The map of ${info.name} (${info.width}×${info.height} pixels) is being made: ${Math.floor(100 * info.progress)} %${left}. You may close this page; the server continues.`;
    await new Promise((resolve) => { setTimeout(resolve, 1000); });
  }
}

load().catch((error) => {
  document.querySelector(".maplayout").hidden = true;
  document.getElementById("job").hidden = false;
  document.getElementById("progress").hidden = true;
  document.getElementById("jobtext").className = "warn";
  document.getElementById("jobtext").textContent = `The map cannot be shown: ${error.message}`;
});
