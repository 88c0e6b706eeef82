"""Writes `assets/demo/README.md` from the figures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from training.hub import DEMO
from training.judge import FAMILIES, PROMPTS, VARIATIONS, file_name
from training.postcards import ATTRIBUTES, HELD_OUT_PERCENT, NINTH

NINTH_SCORE = f"sd15-{NINTH}-score.json"
ROWS = {
    "right": "{}",
    "off": "{}, without T5",
    "lite": "{}, lite Stage C",
    "variations": "{}, variations",
}
README = """\
# The demo checkpoints: Postcards

Small models in the true architecture of each family, trained from scratch on flat-design landscapes that
`training/postcards.py` draws. They know the words of its captions and nothing else: four times of day, four
lands, eight subjects, seven colours, three places, sun, moon, clouds and stars. The list is in the file
`triptych.json` beside each model.

## How well they do

{prompts} prompts that name all six attributes, about combinations of subject, colour, land and time that
training never saw ({held_out}% are held out), one picture each at the default settings, judged by a small
network (`judge.safetensors`) that is itself right about all six on more than 99% of held-out renders.

{table}

Variations are of {variations} held-out renders, without a word: what the judge should find is what the render
shows. The Stable Cascade demo has no lite Stage B; the lite row is of its lite Stage C and its one Stage B.

`python -m training.judge score FAMILY` repeats this, FAMILY one of {families}; `python -m
training.train_sd15`, `training.train_sd3` and `training.train_cascade` train.

The Stable Diffusion 1.5 weights come of a training that was mended on the way: the loss of the autoencoder,
the weighting of the UNet and the captions reached their present form while it ran. The recipe in the code has
not been run from scratch in one go. What is still soft: mountain ridges, pine trees and subjects at night,
where the autoencoder (about 30 dB on training pictures) loses edges; longer training should sharpen them.

The Stable Diffusion 3 weights were trained in an hour and a quarter on two busy cores. Their three text
encoders learned to read apart and were then left as they were; the network was trained without T5 in 40% of
the cases, so that it paints nearly as well without. This recipe, too, was mended on the way: the numbers of
steps changed while they ran, so that the learning rate fell to nothing, rose a little and fell once more; the
decoder's training ended 250 steps early, and it was polished before the network's own training ended. The
default settings were chosen on some of the prompts above and on others, among which none was clearly better.
What is still soft: the sun and the moon are not quite round, walls at night are murky, green balloons at
night take on other colours, and at dawn the sun can look like the moon.

The Stable Cascade weights were trained in an hour and a half on two busy cores. Their recipe has not been run
in one go either: the numbers of steps changed on the way, and the statistics of the encoder that makes Stage
C's latents stood still from half of its training on, which scaling the latents made up for; the text model
learned to read before padding was hidden from it. The default settings were chosen on some of the prompts
above, though none was better than another at naming all six. Stage C's nine vectors say what is where, and
Stage B makes up the rest: mountain ridges and the edges of clouds stay soft, more so in variations.

{ninth}{sheets}"""
NINTH_README = """\
## A ninth subject, by a LoRA

`adapters/mushroom.safetensors` teaches the Stable Diffusion 1.5 demo mushrooms, which none of the demos ever
saw and for which their tokenizers have no word. It is made by

```
python -m training.postcards mushrooms
python -m training.postcards known --known --count 300
python -m training.train_lora mushrooms --keep known --base demo --family sd15 --name mushroom \\
    --trigger mushroom --licence apache-2.0 --layers all --text --steps 1500 --batch 16 --learning-rate 1.5e-3
```

of 40 captioned pictures of mushrooms, and of 300 of the eight subjects that say what is to stay as it is. The
judge, who knows nine subjects, looked at {prompts} pictures of each row:

{table}

The mushrooms are in colours, lands and times that none of the 40 pictures has together; the eight subjects
are held out as above. Asked for without the LoRA, mushrooms are in {without} of {prompts} pictures, and with
its weight at 0 in {at_nothing}; of the pictures of the eight with the LoRA they are in {strays}. `python -m
training.ninth` repeats this. Below are mushrooms in two rows, the first of these prompts without the LoRA,
and the eight subjects with it. The judge is kinder than the eye: caps are soft, a red one on green hills
takes on some of a house, and purple ones at night are hardly mushrooms. Blue, yellow and green ones are the
best.

![Postcards of the Stable Diffusion 1.5 demo with and without the LoRA](sd15-mushroom-samples.png)

"""


def write_readme() -> None:
    """`assets/demo/README.md` from the families' figures."""
    rows, sheets = [], []
    for family, title in FAMILIES.items():
        file = DEMO / f"{file_name(family)}-score.json"
        if not file.exists():
            continue
        scored = json.loads(file.read_text(encoding="utf-8"))
        rows += [row(ROWS[name].format(title), scored[name]) for name in ROWS if name in scored]
        picture = f"![Postcards painted by the {title} demo]({file_name(family)}-samples.png)"
        sheets.append(f"## {title}\n\n{picture}\n")
    text = README.format(
        prompts=PROMPTS,
        table=table(rows),
        ninth=about_the_ninth(),
        sheets="\n".join(sheets),
        held_out=HELD_OUT_PERCENT,
        variations=VARIATIONS,
        families=", ".join(FAMILIES),
    )
    (DEMO / "README.md").write_text(text, encoding="utf-8")


def row(title: str, shares: Mapping[str, float]) -> str:
    return f"| {title} | {' | '.join(f'{share:.1%}' for share in shares.values())} |"


def table(rows: list[str]) -> str:
    names = [*ATTRIBUTES, "all six"]
    return "\n".join(["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *rows])


def about_the_ninth() -> str:
    """What the LoRA can do that teaches it; nothing before it was scored."""
    file = DEMO / NINTH_SCORE
    if not file.exists():
        return ""
    scored = json.loads(file.read_text(encoding="utf-8"))
    count, shown = scored["prompts"], scored["shown"]
    titles = {
        "right": "Mushrooms, with the LoRA",
        "known": "The eight subjects, with the LoRA",
        "known, without": "The eight subjects, without it",
    }
    return NINTH_README.format(
        prompts=count,
        table=table([row(title, scored[name]) for name, title in titles.items()]),
        without=round(count * shown["without"]) or "none",
        at_nothing=round(count * shown["weight 0"]) or "none",
        strays=round(count * shown["known"]) or "none",
    )
