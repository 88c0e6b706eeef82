// The fold of adapters. `element` holds what lies there, written by ui/adapters.py; `trigger` asks for it anew, and
// for the settings that a LoRA is made for. Which LoRAs are used, and how much, stands in the prompt's text alone:
// it is read whenever it changes, and every button and slider here changes it.
const areas = () => element.closest('.studio').querySelectorAll('.ask textarea');
const areaOf = {prompt: () => areas()[0], negative: () => areas()[1]};
const rows = () => [...element.querySelectorAll('.there > li')];

const write = (area, text) => {
  area.value = text;
  area.dispatchEvent(new Event('input', {bubbles: true})); // from here on it is as if it had been typed
  show();
};

// ---- tags, as backend/text/tags.py reads them

const TAG = /<(lora|lyco):([^<>]*)>/gi;
const AT_THE_END = /(?:\s*<(?:lora|lyco):[^<>]*>)*\s*$/i;

const tagsOf = (text) => [...text.matchAll(TAG)].map((found) => {
  const parts = found[2].split(':'), plain = [], told = {};
  parts.forEach((part, at) => {
    if (at && part.includes('=')) told[part.split('=')[0]] = at;
    else if (at) plain.push(at);
  });
  // Where the weights stand: undefined for one that is not written, which is 1.
  const encoders = told.te ?? plain[0], network = told.unet ?? plain[1] ?? encoders;
  const slots = network === encoders ? {both: network} : {network, text: encoders};
  return {start: found.index, end: found.index + found[0].length, kind: found[1], name: parts[0].trim(), parts, slots};
});

const weightOf = ({parts, slots}, slot) => slots[slot] === undefined ? 1 : Number(parts[slots[slot]].split('=').at(-1) || NaN);

const reweigh = (number, slot, weight) => {
  const {value} = areaOf.prompt(), {start, end, kind, parts, slots} = tagsOf(value)[number];
  const at = slots[slot], text = String(Math.round(weight * 1000) / 1000);
  if (at !== undefined) parts[at] = parts[at].replace(/[^=]*$/, text);
  else if (slot === 'both') parts.splice(1, 0, text);
  else parts.push(`te=${text}`); // the network's alone was written
  write(areaOf.prompt(), `${value.slice(0, start)}<${kind}:${parts.join(':')}>${value.slice(end)}`);
};

const without = (text, tags) => tags.reduceRight(
  (left, {start, end}) => left.slice(0, start).trimEnd() + left.slice(end), text).trim();

// ---- what lies there, by the names that prompts may have for it

const called = (row, name) => {
  const wanted = name.toLowerCase(), plain = wanted.replace(/\.(safetensors|ckpt|bin|pt|pth)$/, '');
  return [row.dataset.name, row.dataset.stem].some((each) => [wanted, plain].includes(each.toLowerCase()));
};
const rowOf = (name) => rows().find((row) => row.dataset.kind === 'lora' && called(row, name));
const wordsOf = (row) => JSON.parse(row?.dataset.words ?? '[]');

// A word, or an embedding's name, as it stands in a prompt: in any case, and not within a longer word; a bracket
// may have its backslash or not.
const LETTER = '[\\p{L}\\p{N}_]';
const SIGN = /[.*+?^${}()|[\]\\/]/g;
const patternOf = (word) => {
  const escaped = (sign) => ('()[]\\'.includes(sign) ? '\\\\?\\' : '\\') + sign;
  const text = word.trim(), bare = text.split(/\s+/).map((part) => part.replace(SIGN, escaped)).join('\\s+');
  const [before, after] = [`^${LETTER}`, `${LETTER}$`].map((end) => new RegExp(end, 'u').test(text));
  return new RegExp((before ? `(?<!${LETTER})` : '') + bare + (after ? `(?!${LETTER})` : ''), 'iu');
};
const plainOf = (text) => text.replace(TAG, (tag) => ' '.repeat(tag.length)); // a tag's name is no word
const has = (text, words) => words.some((word) => patternOf(word).test(plainOf(text)));

const insert = (area, word) => {
  if (has(area.value, [word])) return;
  const at = area.value.search(AT_THE_END), text = area.value.slice(0, at).replace(/[\s,]+$/, '');
  write(area, (text ? `${text}, ${word}` : word) + area.value.slice(at).replace(/^(?=\S)/, ' ').trimEnd());
};

// With the weight around it, and the comma before or behind it.
const extract = (area, words) => {
  const names = words.map((word) => `(?:embedding:)?${patternOf(word).source}`).join('|');
  const one = `(?:\\(\\s*(?:${names})\\s*(?::[^()]*)?\\)|(?:${names}))`;
  const alone = new RegExp(`^\\s*${one}\\s*,?\\s*|\\s*,?\\s*${one}`, 'giu');
  write(area, area.value.split(/(<(?:lora|lyco):[^<>]*>)/i).map((part, at) => at % 2 ? part : part.replace(alone, '')).join(''));
};

// ---- what is shown

const isUsed = (row, where, tags = tagsOf(areaOf.prompt().value)) => row.dataset.kind === 'lora'
  ? tags.some(({name}) => called(row, name))
  : has(areaOf[where]().value, wordsOf(row));

// A row for a tag.
const rowFor = ({name, slots}, number) => {
  const row = element.querySelector('.parts > .row').cloneNode(true), known = rowOf(name), part = (which) => row.querySelector(which);
  row.dataset.number = number;
  row.setAttribute('aria-label', name);
  part('.name').textContent = name;
  if (known || /[\\/]/.test(name)) part('.problem').remove(); // of a file elsewhere the plan says whether it is there
  for (const weight of row.querySelectorAll('.weight')) if (!(weight.dataset.slot in slots)) weight.remove();
  for (const word of wordsOf(known)) {
    const button = document.createElement('button');
    Object.assign(button, {type: 'button', textContent: word, dir: 'auto'});
    button.dataset.do = 'word';
    part('.words').append(button);
  }
  if (!wordsOf(known).length) part('.words').remove();
  if (known?.dataset.offer) part('.offer span').textContent = known.dataset.offer;
  else part('.offer').remove();
  return row;
};

const show = () => {
  const used = element.querySelector('.used');
  if (!used || !areaOf.prompt()) return;
  element.querySelector('.raw').hidden = !window.triptychRaw?.[element.querySelector('.adapters').dataset.family];
  const text = areaOf.prompt().value, tags = tagsOf(text);
  const key = JSON.stringify(tags.map(({name, slots}) => [name, Object.keys(slots)]));
  if (used.dataset.key !== key) { // else a slider that is held stays the same one
    used.replaceChildren(...tags.map(rowFor));
    used.dataset.key = key;
  }
  tags.forEach((tag, number) => {
    for (const weight of used.children[number].querySelectorAll('.weight')) {
      for (const input of weight.querySelectorAll('input')) {
        const value = weightOf(tag, weight.dataset.slot);
        if (input !== document.activeElement || input.type === 'range') input.value = Number.isNaN(value) ? '' : value;
        if (input.type === 'range') input.style.setProperty('--at', `${(Number(input.value) + 2) * 25}%`);
      }
    }
    for (const button of used.children[number].querySelectorAll('[data-do=word]')) {
      button.disabled = has(text, [button.textContent]);
    }
  });
  for (const button of element.querySelectorAll('.there [data-toggle]')) {
    const on = isUsed(button.closest('li'), button.dataset.toggle, tags);
    button.classList.toggle('on', on);
    button.firstChild.textContent = on ? button.dataset.remove : button.dataset.add;
  }
};

const filter = () => {
  const search = element.querySelector('[type=search]');
  if (!search) return;
  const words = search.value.toLowerCase().split(/\s+/);
  for (const row of rows()) row.hidden = !words.every((word) => row.dataset.find.includes(word));
  element.querySelector('.none').hidden = rows().some((row) => !row.hidden);
};

// ---- clicks

const deeds = {
  drop: (button, used) => {
    const {value} = areaOf.prompt(), tag = tagsOf(value)[used.dataset.number];
    write(areaOf.prompt(), without(value, [tag]));
    const next = element.querySelector('.used [data-do=drop]') ?? rowOf(tag.name)?.querySelector('button');
    (next ?? areaOf.prompt()).focus(); // the button that was pressed is gone
  },
  word: (button, used) => {
    insert(areaOf.prompt(), button.textContent);
    if (button.disabled) (used.querySelector('[data-do=word]:enabled') ?? used.querySelector('input')).focus();
  },
  offer: (button, used) => {
    const {name} = tagsOf(areaOf.prompt().value)[used.dataset.number];
    trigger('offer', {name: rowOf(name).dataset.name});
  },
};

const toggle = (row, where) => {
  const area = areaOf[where](), {name, kind} = row.dataset;
  if (kind !== 'lora') return isUsed(row, where) ? extract(area, wordsOf(row)) : insert(area, name);
  const own = tagsOf(area.value).filter((tag) => called(row, tag.name));
  write(area, own.length ? without(area.value, own) : `${area.value.trimEnd()} <lora:${name}:1>`.trimStart());
};

element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button?.dataset.toggle) toggle(button.closest('li'), button.dataset.toggle);
  else if (button) deeds[button.dataset.do]?.(button, button.closest('.row'));
});
element.addEventListener('input', (event) => {
  const {target} = event, weight = target.closest('.weight');
  if (target.type === 'search') filter();
  else if (weight && Number.isFinite(target.valueAsNumber)) {
    reweigh(weight.closest('.row').dataset.number, weight.dataset.slot, target.valueAsNumber);
  }
});

// ---- when there is something new to show

watch('value', () => {
  show();
  filter();
});
const hear = () => {
  if (element.isConnected) setTimeout(show); // by then the text is where it is read
  else removeEventListener('triptych-prompt', hear);
};
addEventListener('triptych-prompt', hear);
let seen = false;
new ResizeObserver(([{contentRect}]) => {
  if (contentRect.width && !seen) trigger('look'); // the fold was opened, or its tab
  seen = contentRect.width > 0;
}).observe(element);
