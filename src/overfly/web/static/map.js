"use strict";
// The map page: image, classes and uncertainty of one or two networks with a swipe control, class shares and downloads.
const base = `/maps/${encodeURIComponent(document.querySelector(".maplayout").dataset.key)}`;
const swipe = document.getElementById("swipe");
const line = document.getElementById("line");

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

function updateLegend(info, ownColors) {
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
    row.insertCell().textContent = name;
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
    for (const [kind, name] of [["tiff", info.georeferenced ? "GeoTIFF" : "TIFF"], ["png", "PNG"]]) {
      const link = element("a", `Download ${name}${suffix}`);
      link.className = "button";
      link.href = `${base}/file?${new URLSearchParams({ network: prediction.network, output: kind })}`;
      link.setAttribute("download", "");
      link.title = prediction.title;
      container.append(link);
    }
  });
}

function showMap(info) {
  const map = L.map("map", { crs: L.CRS.Simple, minZoom: -2, maxZoom: info.max_zoom + 4, zoomSnap: 0.25, attributionControl: true });
  map.attributionControl.setPrefix("Leaflet 1.9.4");
  const corner = (x, y) => map.unproject([x, y], info.max_zoom);
  const bounds = L.latLngBounds(corner(0, info.height), corner(info.width, 0));
  const settings = { bounds, noWrap: true, tileSize: 256, minNativeZoom: 0, maxNativeZoom: info.max_zoom, minZoom: -2, maxZoom: info.max_zoom + 4 };
  const tiles = (layer, query, pane) => L.tileLayer(`${base}/tiles/${layer}/{z}/{x}/{y}?${new URLSearchParams(query)}`, { ...settings, pane });
  tiles("image", {}, "tilePane").addTo(map);
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
    shown = layerName === "image" ? [] : info.predictions.map((prediction, index) => tiles(layerName, { network: prediction.network, own_colors: ownColors }, `prediction-${index}`));
    for (const layer of shown) layer.addTo(map);
    updateLegend(info, ownColors);
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

  document.getElementById("show").addEventListener("change", updateLayers);
  document.getElementById("opacity").addEventListener("input", updateOpacity);
  swipe.addEventListener("input", updateSwipe);
  map.on("move zoom viewreset resize", updateSwipe);
  addDownloads(info);
  updateLayers();
}

fetch(base)
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`HTTP status ${response.status}`))))
  .then(showMap)
  .catch((error) => { document.getElementById("hint").textContent = `The map cannot be shown: ${error.message}`; });
