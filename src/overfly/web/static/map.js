"use strict";
// The map page: image, classes and uncertainty of one or two networks, a swipe between them, shares and downloads.
const base = `/maps/${encodeURIComponent(document.querySelector(".maplayout").dataset.key)}`;
const swipe = document.getElementById("swipe");
const line = document.getElementById("line");

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
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

function legend(info, ownColors) {
  const table = document.getElementById("legend");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  const two = info.predictions.length > 1;
  for (const words of ["", "class", ...info.predictions.map((_, index) => (two ? "AB"[index] : "share"))]) head.append(element("th", words));
  const body = table.createTBody();
  const names = [...new Set(info.predictions.flatMap((each) => each.classes.map((one) => one.name)))];
  for (const name of names) {
    const seen = info.predictions.map((each) => each.classes.find((one) => one.name === name));
    const first = seen.find((one) => one);
    const row = body.insertRow();
    const cell = row.insertCell();
    cell.className = "swatch";
    cell.append(swatch(ownColors ? first.color : first.safe_color));
    row.insertCell().textContent = name;
    for (const one of seen) {
      const share = row.insertCell();
      share.className = "number";
      share.textContent = percent(one ? one.share : null);
    }
  }
}

function files(info) {
  const container = document.getElementById("files");
  info.predictions.forEach((each, index) => {
    const which = info.predictions.length > 1 ? ` of ${"AB"[index]}` : "";
    for (const [kind, name] of [["tiff", info.georeferenced ? "GeoTIFF" : "TIFF"], ["png", "PNG"]]) {
      const link = element("a", `Download ${name}${which}`);
      link.className = "button";
      link.href = `${base}/file?${new URLSearchParams({ network: each.network, output: kind })}`;
      link.setAttribute("download", "");
      link.title = each.title;
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
  const tiles = (layer, more, pane) => L.tileLayer(`${base}/tiles/${layer}/{z}/{x}/{y}?${new URLSearchParams(more)}`, { ...settings, pane });
  tiles("image", {}, "tilePane").addTo(map);
  const panes = info.predictions.map((_, index) => {
    const pane = map.createPane(`prediction-${index}`);
    pane.style.zIndex = 250 + index;
    return pane;
  });
  map.fitBounds(bounds);
  let shown = [];

  function clip() {
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

  function draw() {
    const layerName = document.querySelector("input[name=layer]:checked").value;
    const ownColors = document.getElementById("own-colors").checked;
    for (const layer of shown) layer.remove();
    shown = layerName === "image" ? [] : info.predictions.map((each, index) => tiles(layerName, { network: each.network, own_colors: ownColors }, `prediction-${index}`));
    for (const layer of shown) layer.addTo(map);
    legend(info, ownColors);
    document.getElementById("hint").textContent = layerName === "uncertainty"
      ? "Uncertainty is the entropy of each pixel's class probabilities: transparent at 0, dark red at its maximum."
      : info.predictions.map((each, index) => `${info.predictions.length > 1 ? `${"AB"[index]}: ` : ""}${each.title}`).join(" · ");
    swipe.hidden = line.hidden = info.predictions.length < 2 || layerName === "image";
    fade();
    clip();
  }

  function fade() {
    for (const layer of shown) layer.setOpacity(document.getElementById("opacity").value / 100);
  }

  document.getElementById("show").addEventListener("change", draw);
  document.getElementById("opacity").addEventListener("input", fade);
  swipe.addEventListener("input", clip);
  map.on("move zoom viewreset resize", clip);
  files(info);
  draw();
}

fetch(base)
  .then((answer) => (answer.ok ? answer.json() : Promise.reject(new Error(`the server answered ${answer.status}`))))
  .then(showMap)
  .catch((error) => { document.getElementById("hint").textContent = `The map cannot be shown: ${error.message}`; });
