// The History tab. `element` holds a page of the list, written by ui/history.py, `trigger` asks for another or
// for a change. The two dialogs live beside it: a list that is written anew must not close them.
const root = element.closest('.contain'); // Gradio's rules for narrow pages hold within it
root.querySelectorAll('dialog.of-history').forEach((each) => each.remove());
const [viewer, comparison] = ['viewer', 'compare'].map((name) => {
  const dialog = document.createElement('dialog');
  dialog.className = `of-history ${name}`;
  dialog.tabIndex = -1;
  root.append(dialog);
  return dialog;
});
let name = null; // of the picture in the viewer
let place = 0; // where it is among the tiles: when it is deleted, the next one takes it
let arriving = null; // the end of a page that is on its way, at which the viewer goes on
let first = null; // of two to compare

const tiles = () => [...element.querySelectorAll('.thumb')];
const tileOf = (which) => tiles().find((tile) => tile.dataset.name === which);
const start = () => Number(element.querySelector('.history')?.dataset.start ?? 0);
const act = (what) => trigger('act', {start: start(), ...what});
const rightToLeft = () => document.documentElement.dir === 'rtl';

// What the server wrote for a dialog, in the language of now.
const furnish = (dialog) => {
  const parts = element.querySelector(`.${dialog.classList.contains('viewer') ? 'viewer' : 'compare'}-parts`);
  dialog.setAttribute('aria-label', parts.dataset.label);
  dialog.replaceChildren(...parts.cloneNode(true).childNodes);
};

const promptOf = (tile) => tile.parentElement.querySelector('.prompt').textContent;

const detailsOf = (tile) => {
  const details = tile.parentElement.querySelector('.details').cloneNode(true);
  for (const time of details.querySelectorAll('time')) {
    const shown = {dateStyle: 'medium', timeStyle: 'short'};
    time.textContent = new Date(time.dateTime).toLocaleString(document.documentElement.lang || undefined, shown);
  }
  return details.childNodes;
};

// In the shape of a picture that has arrived: its settings may tell another, as those of a grid do.
const shape = (box, picture) => {
  box.style.setProperty('--ratio', (picture.naturalWidth / picture.naturalHeight).toFixed(4));
};

// ---- the viewer

const show = (tile) => {
  const {full, file, favourite, usable} = tile.dataset, picture = viewer.querySelector('.picture img');
  if (name !== tile.dataset.name || !picture.src) {
    picture.style.backgroundImage = `url("${tile.querySelector('img').src}")`; // until the picture itself is there
    picture.style.setProperty('--ratio', tile.dataset.ratio);
    picture.src = full;
    picture.alt = promptOf(tile);
  }
  [name, place] = [tile.dataset.name, tiles().indexOf(tile)];
  viewer.querySelector('.details').replaceChildren(...detailsOf(tile));
  viewer.querySelector('[data-deed=reuse]').hidden = usable !== 'true';
  viewer.querySelector('[data-deed=favourite]').setAttribute('aria-pressed', favourite);
  Object.assign(viewer.querySelector('[data-deed=download]'), {href: `${full}?download`, download: file});
  const count = Number(element.querySelector('.history').dataset.count);
  viewer.querySelector('[data-deed=newer]').disabled = start() + place === 0;
  viewer.querySelector('[data-deed=older]').disabled = start() + place === count - 1;
};

const view = (tile) => {
  furnish(viewer);
  const picture = viewer.querySelector('.picture img');
  picture.addEventListener('load', () => shape(picture, picture));
  name = null;
  show(tile);
  viewer.showModal();
  viewer.focus();
};

const walk = (step) => {
  const all = tiles(), next = all[place + step];
  if (next) {
    viewer.querySelector('.said').replaceChildren();
    show(next);
  } else {
    const {start: from, page, count} = element.querySelector('.history').dataset;
    const to = Number(from) + step * Number(page);
    if (arriving !== null || to < 0 || to >= Number(count)) return;
    arriving = step > 0 ? 0 : -1;
    act({deed: 'page', start: to});
  }
  if (document.activeElement?.disabled || !viewer.contains(document.activeElement)) viewer.focus();
};

viewer.addEventListener('close', () => {
  const told = element.querySelector('.told');
  (tileOf(name) ?? (told?.textContent ? told : tiles()[0]))?.focus();
});
viewer.addEventListener('keydown', (event) => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  walk(rightToLeft() ? -step : step);
});

// ---- two pictures

const pick = (picture) => {
  first = picture;
  const picking = element.querySelector('.picking');
  if (!picking) return;
  picking.hidden = !first;
  if (first) picking.querySelector('img').src = first.small;
};

const pictureOf = (tile) => ({
  name: tile.dataset.name, full: tile.dataset.full, ratio: tile.dataset.ratio, alt: promptOf(tile),
  small: tile.querySelector('img').src, details: [...detailsOf(tile)],
});

// Of the settings only those in which the two differ.
const differing = (sides) => {
  const without = sides.map((side) => side.querySelector('.without'));
  if (without[0]?.textContent === without[1]?.textContent) without.forEach((each) => each?.remove());
  const rows = sides.map((side) => new Map([...side.querySelectorAll('dt')].map((key) => [key.textContent, key])));
  for (const [index, side] of rows.entries()) {
    for (const [key, head] of side) {
      const other = rows[1 - index].get(key);
      if (other && other.nextElementSibling.textContent === head.nextElementSibling.textContent) {
        head.hidden = head.nextElementSibling.hidden = true;
      }
    }
  }
};

const compare = (left, right) => {
  pick(null);
  furnish(comparison);
  const both = comparison.querySelector('.both'), range = both.querySelector('input');
  for (const [image, picture] of [[both.querySelector('.under'), left], [both.querySelector('.over'), right]]) {
    image.src = picture.full;
    image.alt = picture.alt;
  }
  both.style.setProperty('--ratio', left.ratio);
  const under = both.querySelector('.under');
  under.addEventListener('load', () => shape(both, under));
  const sides = [...comparison.querySelectorAll('.details')];
  [left, right].forEach((picture, index) => sides[index].replaceChildren(...picture.details));
  differing(sides);
  const slide = () => {
    both.style.setProperty('--at', `${range.value}%`);
    range.setAttribute('aria-valuetext', `${Math.round(range.value)} %`);
  };
  range.addEventListener('input', slide);
  slide();
  comparison.showModal();
  range.focus();
};

// ---- clicks

const deeds = {
  page: (button) => {
    act({deed: 'page', start: Number(button.dataset.start)});
    if (element.getBoundingClientRect().top < 0) element.scrollIntoView();
  },
  undelete: (button) => {
    if (viewer.open) name = button.dataset.name;
    act({deed: 'undelete', name: button.dataset.name});
  },
  newer: () => walk(-1),
  older: () => walk(1),
  close: (button) => button.closest('dialog').close(),
  cancel: () => pick(null),
  reuse: () => {
    viewer.close();
    trigger('reuse', {name});
  },
  favourite: (button) => act({deed: 'favourite', name, on: button.getAttribute('aria-pressed') !== 'true'}),
  delete: () => act({deed: 'delete', name}),
  compare: () => {
    const tile = tileOf(name);
    viewer.close();
    if (tile) pick(pictureOf(tile));
  },
};

const onClick = (event) => {
  const tile = event.target.closest('.thumb'), button = event.target.closest('button[data-deed]');
  if (tile && first && tile.dataset.name !== first.name) compare(first, pictureOf(tile));
  else if (tile) view(tile);
  else if (button) deeds[button.dataset.deed]?.(button);
  else if (event.target === viewer || event.target === comparison) event.target.close(); // beside what it shows
};
for (const place of [element, viewer, comparison]) place.addEventListener('click', onClick);
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && first) pick(null);
});

// ---- the list is written anew

watch('value', () => {
  pick(first);
  const said = element.querySelector('.told');
  if (viewer.open) {
    const all = tiles(), tile = arriving !== null ? all.at(arriving) : tileOf(name) ?? all[Math.min(place, all.length - 1)];
    arriving = null;
    viewer.querySelector('.said').replaceChildren(...(said?.cloneNode(true).childNodes ?? []));
    if (tile) show(tile);
    else viewer.close();
    if (document.activeElement?.disabled || !viewer.contains(document.activeElement)) viewer.focus();
  } else if (said?.textContent) {
    said.focus({preventScroll: true}); // the button that was pressed may be gone
  } else if (document.activeElement?.disabled) {
    tiles()[0]?.focus({preventScroll: true}); // there are no older ones, or no newer
  }
});
