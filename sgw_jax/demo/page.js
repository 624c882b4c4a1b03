// Reads every map's value where the pointer is on any of them, or on the photograph. Runs once; `element` holds the
// view, whose contents gradio replaces, so that listeners are the document's.
const decoded = new WeakMap(); // figure -> promise of its codes

async function codesOf(figure) {
  const packed = Uint8Array.from(atob(figure.dataset.codes), (sign) => sign.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = new DataView(await new Response(stream).arrayBuffer());
  const about = JSON.parse(figure.dataset.about);
  const [, width, channels] = about.shape;
  return {
    about,
    at: (row, column) =>
      Array.from({ length: channels }, (_, channel) => {
        const place = (row * width + column) * channels + channel;
        const code = about.bytes === 1 ? data.getUint8(place) : data.getUint16(2 * place, true);
        return about.bytes === 2 && code === 65535 ? NaN : about.low[channel] + about.step[channel] * code;
      }),
  };
}

const number = (value, digits) => value.toFixed(digits).replace(/^-(?=0(\.0*)?$)/, "").replace("-", "\u2212");

function turned(degrees, positive, negative) {
  const rounded = Math.round(Math.abs(degrees));
  return `${rounded}\u00b0${rounded ? `\u00a0${degrees > 0 ? positive : negative}` : ""}`;
}

// The vector in the axes of the labels; `signs` make x right, y down, z forward of it. Angles are those by which a
// surface is turned away from the camera.
function direction(vector, signs) {
  const [x, y, z] = vector.map((value, axis) => value * signs[axis]);
  const length = Math.hypot(x, y, z);
  if (!(length > 0)) return "no direction";
  const across = turned((Math.atan2(x, -z) * 180) / Math.PI, "right", "left");
  const up = turned((Math.asin(-y / length) * 180) / Math.PI, "up", "down");
  return `(${vector.map((value) => number(value, 2)).join(",\u00a0")}) ${across},\u00a0${up}`;
}

function show(reading, about, values) {
  reading.replaceChildren();
  if (about.kind === "labels") {
    const [name, colour] = about.classes[values[0]] ?? ["no class", null];
    if (colour) reading.append(Object.assign(document.createElement("b"), { style: `background:${colour}` }));
    reading.append(name);
  } else if (values.some(Number.isNaN)) {
    reading.append("no value");
  } else if (about.signs.length) {
    reading.append(direction(values, about.signs));
  } else {
    reading.append(`${values.map((value) => number(value, 2)).join(", ")} ${about.unit}`.trim());
  }
}

// Where an event is on an image's picture, as shares of its width and height; null beside it.
function shares(image, event) {
  const box = image.getBoundingClientRect();
  let [width, height] = [box.width, box.height];
  if (["contain", "scale-down"].includes(getComputedStyle(image).objectFit)) {
    const scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    [width, height] = [scale * image.naturalWidth, scale * image.naturalHeight];
  }
  const across = (event.clientX - box.left - (box.width - width) / 2) / width;
  const down = (event.clientY - box.top - (box.height - height) / 2) / height;
  return across >= 0 && across < 1 && down >= 0 && down < 1 ? [across, down] : null;
}

let latest = 0;

async function read(event) {
  const image = event.target.closest?.(".sgw-picture")?.querySelector("img") ?? event.target.closest?.("#sgw-photo img");
  const place = image && shares(image, event);
  if (!place) return;
  const now = ++latest;
  for (const figure of element.querySelectorAll(".sgw-map")) {
    if (!decoded.has(figure)) decoded.set(figure, codesOf(figure));
  }
  for (const figure of element.querySelectorAll(".sgw-map")) {
    const { about, at } = await decoded.get(figure);
    if (now !== latest) return; // the pointer has moved on
    const [height, width] = about.shape;
    const reading = figure.querySelector(".sgw-reading");
    show(reading, about, at(Math.floor(place[1] * height), Math.floor(place[0] * width)));
    reading.classList.toggle("sgw-above", place[1] > 0.5); // off what is looked at
    const cross = figure.querySelector(".sgw-cross");
    cross.hidden = false;
    Object.assign(cross.style, { left: `${100 * place[0]}%`, top: `${100 * place[1]}%` });
  }
}

document.addEventListener("pointermove", read);
document.addEventListener("pointerdown", read);
