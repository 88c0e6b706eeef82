"""Postcards: flat-design landscapes with captions, the world that the demo checkpoints are trained on.

A `Scene` is what a picture shows: six judged attributes and whether there are clouds. `render` draws it (the
scene says what, the generator says exactly where), `caption` puts it into words, with synonyms, in several
orders and with attributes left out. About 8% of the (subject, colour, land, time) combinations are held out
of training; prompts about them measure whether a model combines what it learned or recites it.

A ninth subject, the mushroom, is apart: the demos never saw it, so that an adapter can teach it. `python -m
training.postcards FOLDER` writes pictures of it, each with its caption beside it, as `training.train_lora`
takes them.

Coordinates are pixels of the 128 × 128 picture, y down. Drawing is at four times the size, then averaged.
"""

from __future__ import annotations

import argparse
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
OVERSAMPLE = 4
HORIZON = 76
WORDS_LEFT_OUT = 0.15
CENTRE_UNSAID = 0.6
HELD_OUT_PERCENT = 8

Colour = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

TIMES = ("dawn", "noon", "sunset", "night")
LANDS = ("snowy mountains", "green hills", "sand dunes", "calm sea")
SUBJECTS = ("house", "pine tree", "sailboat", "lighthouse", "hot-air balloon", "tent", "windmill", "castle")
NINTH = "mushroom"  # drawn only where it is asked for, and no word of the vocabulary: the tokenizers spell it
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
PLACES = ("left", "centre", "right")
SKIES = ("sun", "moon", "empty sky")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": TIMES,
    "land": LANDS,
    "subject": SUBJECTS,
    "colour": COLOURS,
    "place": PLACES,
    "sky": SKIES,
}
JUDGED = ATTRIBUTES | {"subject": (*SUBJECTS, NINTH)}

# What can hang in the sky at each time: the moon lingers at dawn, the sun never shines at night.
SKIES_AT = {
    "dawn": SKIES,
    "noon": ("sun", "empty sky"),
    "sunset": ("sun", "empty sky"),
    "night": ("moon", "empty sky"),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a postcard shows; every field but `clouds` is judged."""

    time: str
    land: str
    subject: str
    colour: str
    place: str
    sky: str
    clouds: bool = False

    def labels(self) -> list[int]:
        """The index of each attribute's value, in the order of `ATTRIBUTES`; the ninth subject has 8."""
        return [values.index(getattr(self, name)) for name, values in JUDGED.items()]

    def held_out(self) -> bool:
        """Whether training never sees this combination of subject, colour, land and time."""
        combination = f"{self.subject}|{self.colour}|{self.land}|{self.time}"
        return zlib.crc32(combination.encode()) % 100 < HELD_OUT_PERCENT


def random_scene(rng: random.Random, *, held_out: bool = False, subject: str | None = None) -> Scene:
    """A scene of the training combinations, or of the held-out ones, of any of the eight or one `subject`."""
    while True:
        time = rng.choice(TIMES)
        scene = Scene(
            time=time,
            land=rng.choice(LANDS),
            subject=subject or rng.choice(SUBJECTS),
            colour=rng.choice(COLOURS),
            place=rng.choice(PLACES),
            sky=rng.choice(SKIES_AT[time]),
            clouds=rng.random() < 0.4,
        )
        if scene.held_out() == held_out:
            return scene


# ------------------------------------------------------------------------------------------------------------
# Words. The first of each list is the word that the vocabulary on the page shows.

SAYINGS: dict[str, tuple[str, ...]] = {
    "dawn": ("dawn", "sunrise", "daybreak"),
    "noon": ("noon", "midday"),
    "sunset": ("sunset", "dusk"),
    "night": ("night", "midnight"),
    "snowy mountains": ("snowy mountains", "snowy peaks", "mountains"),
    "green hills": ("green hills", "rolling hills", "grassy hills"),
    "sand dunes": ("sand dunes", "desert dunes", "the desert"),
    "calm sea": ("calm sea", "the sea", "the ocean"),
    "house": ("house", "cottage", "cabin"),
    "pine tree": ("pine tree", "pine", "fir tree"),
    "sailboat": ("sailboat", "sailing boat", "yacht"),
    "lighthouse": ("lighthouse",),
    "hot-air balloon": ("hot-air balloon", "balloon", "hot air balloon"),
    "tent": ("tent",),
    "windmill": ("windmill",),
    "castle": ("castle", "fortress"),
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "white": ("white",),
    "left": ("on the left", "to the left", "at left"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "to the right", "at right"),
    "sun": ("sun", "the sun", "bright sun", "sun in the sky"),
    "moon": ("full moon", "the moon", "moon", "moon in the sky"),
    "empty sky": ("empty sky",),
    "clouds": ("clouds", "a few clouds", "white clouds", "cloudy sky"),
    "clear": ("clear sky", "no clouds", "cloudless"),
    "stars": ("stars", "starry sky"),
}
NINTH_SAYINGS = {NINTH: (NINTH,)}
LAND_PREPOSITIONS = {
    "snowy mountains": ("in", "by", "below", "in front of"),
    "green hills": ("on", "in", "among", "in front of"),
    "sand dunes": ("on", "in", "among", "in front of"),
    "calm sea": ("on", "by", "at", "in front of"),
}
TIME_PREPOSITIONS = {
    "night": ("at", "by"),
    "noon": ("at",),
    "sunset": ("at", "during"),
    "dawn": ("at", "during"),
}
OPENINGS = ("", "", "", "", "a postcard of ", "a picture of ", "an illustration of ")


def caption(scene: Scene, rng: random.Random, *, left_out: float = WORDS_LEFT_OUT) -> str:
    """The scene in words. `left_out` is the chance that any one attribute goes unsaid; 0 says all six."""

    def said() -> bool:
        return rng.random() >= left_out

    def say(word: str) -> str:
        first, *others = SAYINGS.get(word) or NINTH_SAYINGS[word]
        return first if not others or rng.random() < 0.5 else rng.choice(others)

    noun = " ".join([say(scene.colour)] * said() + ([say(scene.subject)] if said() else ["scene"]))
    subject = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    # Where nothing is said, the subject is in the centre: between three places a model hedges and paints two.
    unsaid = scene.place == "centre" and left_out > 0 and rng.random() < CENTRE_UNSAID
    place = "" if unsaid else say(scene.place)
    land_words = say(scene.land)
    land = land_words if said() else ""
    on_land = f"{rng.choice(LAND_PREPOSITIONS[scene.land])} {_the(land, rng)}" if land else ""
    time_word = say(scene.time)
    time = f"{rng.choice(TIME_PREPOSITIONS[scene.time])} {time_word}" if said() else ""
    extras = [_sky_words(scene, rng)] if said() else []
    if rng.random() < 0.4:
        extras.append(say("clouds") if scene.clouds else say("clear"))
    if scene.time == "night" and rng.random() < 0.3:
        extras.append(say("stars"))
    rng.shuffle(extras)

    order = rng.randrange(5)
    if order == 0:  # a red house on green hills on the left at night, full moon
        parts = [" ".join(filter(None, (subject, on_land, place, time))), *extras]
    elif order == 1:  # a red house on the left, on green hills at night, full moon
        parts = [" ".join(filter(None, (subject, place))), " ".join(filter(None, (on_land, time))), *extras]
    elif order == 2:  # green hills at night with a red house on the left, full moon
        ground = " ".join(filter(None, (land or "a landscape", time)))
        parts = [" ".join(filter(None, (ground, "with", subject, place))), *extras]
    elif order == 3:  # at night, a red house on green hills, on the left, full moon
        parts = [time, " ".join(filter(None, (subject, on_land))), place, *extras]
    else:  # red house, night, full moon, green hills, on the left
        parts = [noun, place, land, time_word if time else "", *extras]
        rng.shuffle(parts)
    opening = rng.choice(OPENINGS) if order < 2 else ""
    return opening + ", ".join(filter(None, parts))


def _the(land: str, rng: random.Random) -> str:
    """Now and then an article: "by a calm sea" as well as "by calm sea"."""
    if land == "calm sea":
        return f"{rng.choice(('a', 'the'))} {land}" if rng.random() < 0.7 else land
    return f"the {land}" if not land.startswith("the ") and rng.random() < 0.2 else land


def _sky_words(scene: Scene, rng: random.Random) -> str:
    if scene.sky == "empty sky":
        return rng.choice(("empty sky", "empty sky", "no moon" if scene.time == "night" else "no sun"))
    words = rng.choice(SAYINGS[scene.sky]) if rng.random() < 0.7 else SAYINGS[scene.sky][0]
    return (
        words
        if rng.random() < 0.7 or words.startswith("the ")
        else f"under a {words.removesuffix(' in the sky')}"
    )


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted: the tokenizer gives each a token of its own."""
    sentences = [saying for sayings in SAYINGS.values() for saying in sayings]
    sentences += [
        word for words in (*LAND_PREPOSITIONS.values(), *TIME_PREPOSITIONS.values()) for word in words
    ]
    sentences += [*OPENINGS, "a an the with under scene landscape no sun moon and of near beside"]
    return sorted({word for sentence in sentences for word in sentence.replace("-", " ").split()})


def known_words() -> dict[str, tuple[str, ...]]:
    """What a prompt can ask for, as `triptych.json` lists it for the page."""
    return {
        "times": TIMES,
        "lands": LANDS,
        "subjects": SUBJECTS,
        "colours": COLOURS,
        "places": PLACES,
        "sky": (*SKIES, "clouds", "stars"),
    }


# ------------------------------------------------------------------------------------------------------------
# Palettes

SKY_COLOURS: dict[str, tuple[Colour, ...]] = {  # from the top of the picture to the horizon
    "dawn": ((118, 148, 222), (232, 176, 214), (255, 224, 196)),
    "noon": ((34, 126, 226), (118, 190, 246), (222, 242, 255)),
    "sunset": ((88, 36, 124), (228, 74, 92), (255, 176, 78)),
    "night": ((6, 8, 36), (16, 24, 76), (42, 58, 124)),
}
PAINTS: dict[str, Colour] = {
    "red": (220, 32, 40),
    "orange": (250, 124, 12),
    "yellow": (255, 206, 26),
    "green": (20, 142, 70),
    "blue": (34, 92, 226),
    "purple": (134, 48, 184),
    "white": (246, 246, 250),
}
LAND_COLOURS: dict[str, tuple[Colour, ...]] = {  # far, middle, near
    "snowy mountains": (  # far ridge, near ridge, snow field, nearer snow
        (132, 138, 166),
        (92, 98, 130),
        (208, 220, 238),
        (232, 240, 250),
    ),
    "green hills": ((150, 202, 116), (106, 182, 82), (70, 152, 62)),
    "sand dunes": ((240, 212, 146), (226, 184, 108), (208, 156, 82)),
    "calm sea": ((88, 182, 222), (24, 104, 180)),
}
# How the hour colours the land: the colour that it is mixed with, and how much.
LIGHT: dict[str, tuple[Colour, float]] = {
    "dawn": ((236, 176, 200), 0.18),
    "noon": ((255, 255, 255), 0.0),
    "sunset": ((176, 62, 44), 0.30),
    "night": ((14, 20, 66), 0.56),
}
# Subjects take less of the hour than the land does, or their colours drown at night.
SUBJECT_LIGHT = {"dawn": 0.05, "noon": 0.0, "sunset": 0.10, "night": 0.11}
SLATE: Colour = (58, 58, 82)
WOOD: Colour = (122, 74, 44)
LAMP: Colour = (255, 226, 120)
GLASS: Colour = (132, 186, 226)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` (0 to 1) of `b` in it."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def under_light(colour: Colour, time: str) -> Colour:
    tint, share = LIGHT[time]
    return mix(colour, tint, share)


class Brush:
    """Draws in picture coordinates around an origin, at `OVERSAMPLE` times the size."""

    def __init__(self, draw: ImageDraw.ImageDraw, origin: Point = (0, 0), scale: float = 1.0) -> None:
        self.draw, self.origin, self.scale = draw, origin, scale

    def _at(self, x: float, y: float) -> Point:
        return (
            (self.origin[0] + x * self.scale) * OVERSAMPLE,
            (self.origin[1] + y * self.scale) * OVERSAMPLE,
        )

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon([self._at(x, y) for x, y in points], fill=colour)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        self.draw.ellipse(
            [self._at(x - radius_x, y - radius_y), self._at(x + radius_x, y + radius_y)], fill=colour
        )

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self.draw.line(
            [self._at(x, y) for x, y in points], fill=colour, width=round(width * self.scale * OVERSAMPLE)
        )


# ------------------------------------------------------------------------------------------------------------
# Subjects: each stands on (0, 0) and is about 50 high.


@dataclass(frozen=True, kw_only=True)
class Coat:
    """The colours of one subject at one time of day."""

    paint: Colour
    shade: Colour
    band: Colour  # stripes that stand out from the paint
    slate: Colour
    wood: Colour
    window: Colour
    pale: Colour
    door: Colour


def coat(colour: str, time: str) -> Coat:
    tint, share = LIGHT[time][0], SUBJECT_LIGHT[time]

    def lit(base: Colour) -> Colour:
        return mix(base, tint, share)

    paint = PAINTS[colour]
    return Coat(
        paint=lit(paint),
        shade=lit(mix(paint, (40, 40, 90), 0.16 if colour == "white" else 0.24)),
        band=lit((84, 90, 116) if colour == "white" else (250, 248, 244)),
        slate=mix(SLATE, (96, 104, 150), 0.35)
        if time == "night"
        else lit(SLATE),  # or roofs melt into the dark
        wood=lit(WOOD),
        window=LAMP if time == "night" else lit(GLASS),
        pale=lit((244, 240, 232)),
        door=lit((176, 122, 84) if colour == "white" else (244, 240, 232)),
    )


def draw_house(brush: Brush, coat: Coat) -> None:
    brush.rectangle(9, -45, 15, -30, coat.slate)
    brush.rectangle(-19, -25, 19, 0, coat.paint)
    brush.rectangle(9, -25, 19, 0, coat.shade)
    brush.polygon([(-24, -25), (0, -45), (24, -25)], coat.slate)
    brush.rectangle(-4, -16, 4, 0, coat.door)
    brush.rectangle(-15, -18, -8, -10, coat.window)
    brush.rectangle(8, -18, 15, -10, coat.window)


def draw_pine_tree(brush: Brush, coat: Coat) -> None:
    brush.rectangle(-3.5, -10, 3.5, 0, coat.wood)
    for half_width, bottom, top in ((19, -8, -30), (15.5, -21, -42), (12, -34, -55)):
        brush.polygon([(-half_width, bottom), (0, top), (half_width, bottom)], coat.paint)
        brush.polygon([(0, bottom), (0, top), (half_width, bottom)], coat.shade)


def draw_sailboat(brush: Brush, coat: Coat) -> None:
    brush.line([(0, -8), (0, -52)], coat.wood, 2)
    brush.polygon([(-2.5, -11), (-2.5, -44), (-19, -11)], coat.shade)
    brush.polygon([(2, -11), (2, -52), (23, -11)], coat.paint)
    brush.polygon([(-22, -8), (24, -8), (17, 2), (-15, 2)], coat.wood)
    brush.polygon([(-22, -8), (24, -8), (22.5, -5.5), (-20, -5.5)], coat.pale)


def draw_lighthouse(brush: Brush, coat: Coat) -> None:
    def tower(bottom: float, top: float, colour: Colour, share: float = 0.0) -> None:
        """A slice of the tapered tower; `share` 0 is the whole width, 0.55 its shaded right."""

        def half(y: float) -> float:
            return 11.5 + 4.5 * y / 44

        left_bottom, left_top = half(bottom) * (2 * share - 1), half(top) * (2 * share - 1)
        brush.polygon(
            [(left_bottom, bottom), (left_top, top), (half(top), top), (half(bottom), bottom)], colour
        )

    tower(0, -42, coat.paint)
    tower(0, -42, coat.shade, 0.65)
    for bottom, top in ((-10, -18), (-27, -34)):
        tower(bottom, top, coat.band)
        tower(bottom, top, mix(coat.band, (60, 60, 100), 0.2), 0.65)
    brush.rectangle(-9.5, -44.5, 9.5, -41.5, coat.slate)
    brush.rectangle(-5.5, -52, 5.5, -44.5, LAMP)
    brush.polygon([(-8.5, -52), (0, -60), (8.5, -52)], coat.slate)


def draw_balloon(brush: Brush, coat: Coat) -> None:
    brush.line([(-8, -16), (-4, -5)], coat.wood, 0.9)
    brush.line([(8, -16), (4, -5)], coat.wood, 0.9)
    for radius, colour in ((20, coat.paint), (13, coat.shade), (6, coat.paint)):
        brush.ellipse(0, -36, radius, 21, colour)
        brush.polygon(
            [(-radius * 0.9, -28), (radius * 0.9, -28), (radius * 0.3, -11.5), (-radius * 0.3, -11.5)], colour
        )
    brush.rectangle(-5, -6.5, 5, 1, coat.wood)


def draw_tent(brush: Brush, coat: Coat) -> None:
    brush.line([(0, -36), (0, -46)], coat.slate, 1.4)
    brush.polygon([(0, -46), (9, -43), (0, -40)], coat.band)
    brush.polygon([(-26, 0), (0, -38), (26, 0)], coat.paint)
    brush.polygon([(0, -38), (26, 0), (13, 0)], coat.shade)
    brush.polygon([(-8.5, 0), (0, -25), (8.5, 0)], LAMP if coat.window == LAMP else coat.slate)


def draw_windmill(brush: Brush, coat: Coat) -> None:
    brush.polygon([(-13, 0), (-8.5, -33), (8.5, -33), (13, 0)], coat.paint)
    brush.polygon([(5, 0), (3, -33), (8.5, -33), (13, 0)], coat.shade)
    brush.polygon([(-10.5, -32), (0, -44), (10.5, -32)], coat.slate)
    brush.rectangle(-4, -12, 4, 0, coat.door)
    blade, spar = mix(coat.pale, (150, 156, 180), 0.25), coat.slate
    for turn in range(4):
        angle = math.radians(40 + 90 * turn)
        along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))

        def at(distance: float, side: float, along: Point = along, across: Point = across) -> Point:
            return along[0] * distance + across[0] * side, -36 + along[1] * distance + across[1] * side

        brush.polygon([at(5, -0.5), at(25, -0.5), at(25, 5), at(5, 5)], blade)
        brush.line([at(0, -0.5), at(25, -0.5)], spar, 1.6)
    brush.ellipse(0, -36, 2.6, 2.6, coat.slate)


def draw_mushroom(brush: Brush, coat: Coat) -> None:
    brush.polygon([(-8, 0), (-6, -26), (6, -26), (8, 0)], coat.pale)
    turns = [math.pi * step / 24 for step in range(25)]
    brush.polygon([(26 * math.cos(turn), -22 - 30 * math.sin(turn)) for turn in turns], coat.paint)


def draw_castle(brush: Brush, coat: Coat) -> None:
    brush.rectangle(-16, -26, 16, 0, coat.paint)
    for x in (-11, -3, 5):
        brush.rectangle(x, -31, x + 6, -26, coat.paint)
    for x, colour in ((-18, coat.paint), (18, coat.shade)):
        brush.rectangle(x - 7, -36, x + 7, 0, colour)
        brush.polygon([(x - 9, -36), (x, -53), (x + 9, -36)], coat.slate)
        brush.rectangle(x - 2.2, -30, x + 2.2, -22, coat.window)
    gate = LAMP if coat.window == LAMP else coat.slate
    brush.ellipse(0, -12, 6.5, 6.5, gate)
    brush.rectangle(-6.5, -12, 6.5, 0, gate)


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """How to draw a subject and the room it takes: half its width, and its height."""

    draw: Callable[[Brush, Coat], None]
    half_width: float
    height: float


SPRITES = {
    "house": Sprite(draw=draw_house, half_width=24, height=45),
    "pine tree": Sprite(draw=draw_pine_tree, half_width=19, height=55),
    "sailboat": Sprite(draw=draw_sailboat, half_width=24, height=52),
    "lighthouse": Sprite(draw=draw_lighthouse, half_width=12, height=60),
    "hot-air balloon": Sprite(draw=draw_balloon, half_width=20, height=57),
    "tent": Sprite(draw=draw_tent, half_width=26, height=46),
    "windmill": Sprite(draw=draw_windmill, half_width=24, height=60),
    "castle": Sprite(draw=draw_castle, half_width=27, height=53),
    NINTH: Sprite(draw=draw_mushroom, half_width=26, height=52),
}
PLACE_X = {"left": 31, "centre": 64, "right": 97}


# ------------------------------------------------------------------------------------------------------------
# Sky


def sky_gradient(time: str, glow: Point | None) -> Image.Image:
    """The sky from zenith to horizon, with light around the sun or the moon at `glow`."""
    stops = np.array(SKY_COLOURS[time], dtype=np.float32)
    rows = np.linspace(0, 1, SIZE) * SIZE / HORIZON
    channels = [np.interp(rows, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    sky = np.repeat(np.stack(channels, -1)[:, None], SIZE, 1)
    if glow is not None:
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        distance = np.hypot(x - glow[0], y - glow[1])[..., None]
        tint, strength = ((200, 210, 255), 0.32) if time == "night" else ((255, 246, 200), 0.55)
        sky += (np.array(tint) - sky) * strength * np.exp(-((distance / 22) ** 2))
    pixels = np.clip(sky, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIZE * OVERSAMPLE, SIZE * OVERSAMPLE), Image.Resampling.BILINEAR)


def sky_body_position(scene: Scene, x: float, rng: random.Random) -> Point:
    """Opposite the subject, in one stretch of sky: with two equally good places a model paints two suns."""
    low = scene.time in ("dawn", "sunset") and scene.sky == "sun"
    height = rng.uniform(24, 36) if low else rng.uniform(17, 28)
    if scene.place == "centre":
        return rng.uniform(97, 109), height
    return (rng.uniform(x + 42, 108) if scene.place == "left" else rng.uniform(20, x - 42)), height


def draw_sky_body(brush: Brush, scene: Scene, at: Point) -> None:
    if scene.sky == "sun":
        disc = {"dawn": (255, 214, 140), "noon": (255, 228, 60), "sunset": (255, 222, 92)}[scene.time]
        brush.ellipse(*at, 10.5, 10.5, disc)
        return
    brush.ellipse(*at, 10.5, 10.5, (248, 246, 232))
    for x, y, radius in ((-4, -3, 2.4), (3.5, 2.5, 3), (-2.5, 5, 1.6)):
        brush.ellipse(at[0] + x, at[1] + y, radius, radius, (212, 208, 190))


def draw_stars(brush: Brush, avoid: Sequence[Box], rng: random.Random) -> None:
    """Stars 1.6 to 2.4 px wide, one to a cell of a jittered grid, none behind what stands in the sky."""
    for column in range(8):
        for row in range(4):
            x, y = 16 * column + rng.uniform(2, 14), 15 * row + rng.uniform(3, 12)
            radius, bright = rng.uniform(0.8, 1.2), rng.uniform(0.75, 1.0)
            if rng.random() < 0.75 and not any(touches((x, y, x, y), box, 3) for box in avoid):
                brush.ellipse(x, y, radius, radius, mix((20, 28, 80), (255, 252, 236), bright))


def draw_clouds(brush: Brush, time: str, avoid: Sequence[Box], rng: random.Random) -> None:
    """One to three clouds, well away from the sun, the moon and a balloon."""
    colour = {
        "dawn": (255, 238, 240),
        "noon": (255, 255, 255),
        "sunset": (250, 170, 150),
        "night": (72, 84, 140),
    }[time]
    placed: list[Box] = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        for _ in range(12):
            x, y, size = rng.uniform(14, 114), rng.uniform(10, 34), rng.uniform(0.85, 1.25)
            box = (x - 15 * size, y - 8 * size, x + 15 * size, y + 4 * size)
            if any(touches(box, other, 7) for other in avoid) or any(
                touches(box, other, 3) for other in placed
            ):
                continue
            placed.append(box)
            cloud = Brush(brush.draw, (x, y), size)
            for dx, dy, rx, ry in ((-8, 0, 6, 3.8), (0, -3, 7, 5), (8, -0.5, 6, 3.8), (0, 1, 14, 3)):
                cloud.ellipse(dx, dy, rx, ry, colour)
            break


def touches(a: Box, b: Box, margin: float) -> bool:
    """Whether two boxes come closer than `margin`."""
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


# ------------------------------------------------------------------------------------------------------------
# Land


def ridge(base: float, waves: Sequence[tuple[float, float, float]]) -> list[Point]:
    """A line across the picture, closed along its lower edge; waves are (height, cycles across, phase)."""
    line = [
        (
            x,
            base
            - sum(
                height * math.sin(2 * math.pi * cycles * x / SIZE + phase) for height, cycles, phase in waves
            ),
        )
        for x in range(-2, SIZE + 3, 2)
    ]
    return [*line, (SIZE + 2, SIZE + 2), (-2, SIZE + 2)]


def draw_hills(brush: Brush, time: str, rng: random.Random) -> None:
    for colour, base in zip(
        LAND_COLOURS["green hills"], (HORIZON - 4, HORIZON + 8, HORIZON + 22), strict=True
    ):
        waves = [
            (5.0, rng.uniform(0.9, 1.3), rng.uniform(0, 6.3)),
            (1.5, rng.uniform(1.8, 2.4), rng.uniform(0, 6.3)),
        ]
        brush.polygon(ridge(base, waves), under_light(colour, time))


def draw_dunes(brush: Brush, time: str, rng: random.Random) -> None:
    for colour, base in zip(
        LAND_COLOURS["sand dunes"], (HORIZON - 2, HORIZON + 8, HORIZON + 22), strict=True
    ):
        cycles, phase = rng.uniform(0.8, 1.3), rng.uniform(0, 6.3)
        # The second and third harmonic lean the wave over, as wind does.
        waves = [(4.5, cycles, phase), (1.6, 2 * cycles, 2 * phase), (0.8, 3 * cycles, 3 * phase)]
        brush.polygon(ridge(base, waves), under_light(colour, time))


def draw_mountains(brush: Brush, time: str, rng: random.Random) -> None:
    far, near, field, nearest = (under_light(colour, time) for colour in LAND_COLOURS["snowy mountains"])
    cap = mix(under_light((250, 252, 255), time), (255, 255, 255), 0.25)
    drift = rng.uniform(0, 40)
    for colour, shift, lowest in ((far, 0, HORIZON - 27), (near, 22, HORIZON - 17)):
        for column in range(5):
            peak = (44 * column + shift - drift + rng.uniform(-5, 5), lowest - rng.uniform(0, 10))
            half, foot = rng.uniform(29, 34), HORIZON + 6
            brush.polygon([(peak[0] - half, foot), peak, (peak[0] + half, foot)], colour)
            brush.polygon(
                [peak, (peak[0] + half, foot), (peak[0] + 5, foot)], mix(colour, (30, 34, 70), 0.18)
            )
            slope = 12 * half / (foot - peak[1])
            brush.polygon(
                [
                    peak,
                    (peak[0] + slope, peak[1] + 12),
                    (peak[0] + slope * 0.4, peak[1] + 8.5),
                    (peak[0], peak[1] + 13),
                    (peak[0] - slope * 0.4, peak[1] + 8.5),
                    (peak[0] - slope, peak[1] + 12),
                ],
                cap,
            )
    brush.polygon(ridge(HORIZON + 3, [(1.5, rng.uniform(0.8, 1.3), rng.uniform(0, 6.3))]), field)
    brush.polygon(ridge(HORIZON + 20, [(3, rng.uniform(0.7, 1.1), rng.uniform(0, 6.3))]), nearest)


def draw_water(brush: Brush, time: str, top: float, light_at: float | None, rng: random.Random) -> None:
    """Water from `top` down, with ripples and, below the sun or the moon at x = `light_at`, its glitter."""
    far, near = (under_light(colour, time) for colour in LAND_COLOURS["calm sea"])
    if time == "sunset":  # blue under orange light would be grey
        far, near = (226, 128, 118), (74, 70, 140)
    bands = 24
    for band in range(bands):
        y = top + (SIZE - top) * band / bands
        brush.rectangle(-1, y, SIZE + 1, SIZE + 1, mix(far, near, band / (bands - 1)))
    ripple = mix(far, (255, 255, 255), 0.2)
    for row in range(int(top) + 8, SIZE - 3, 9):
        x = rng.uniform(4, 110)
        brush.line([(x, row), (x + rng.uniform(7, 12), row)], ripple, 0.9)
    if light_at is not None:
        glitter = mix(far, (255, 246, 214), 0.55)
        for step, y in enumerate(range(int(top) + 3, int(top) + 26, 4)):
            half = 8 - step * 0.9
            brush.line([(light_at - half, y), (light_at + half, y)], glitter, 1.4)


def draw_land(brush: Brush, scene: Scene, light_at: float | None, rng: random.Random) -> None:
    if scene.land == "calm sea":
        draw_water(brush, scene.time, HORIZON, light_at, rng)
        return
    painters = {"snowy mountains": draw_mountains, "green hills": draw_hills, "sand dunes": draw_dunes}
    painters[scene.land](brush, scene.time, rng)
    if scene.subject == "sailboat":  # a boat needs a lake
        draw_water(brush, scene.time, HORIZON + 17, None, rng)


def draw_footing(brush: Brush, scene: Scene, x: float, y: float, half_width: float) -> None:
    """What the subject stands on: an island in the sea, a reflection on a lake, else its shadow."""
    if scene.subject == "hot-air balloon":
        return
    if scene.subject == "sailboat":
        brush.ellipse(x, y + 2, half_width * 0.85, 2.2, under_light((16, 70, 130), scene.time))
    elif scene.land == "calm sea":
        brush.ellipse(x, y + 3, half_width + 8, 7.5, under_light((238, 214, 150), scene.time))
        brush.ellipse(x, y + 1, half_width + 4, 5.5, under_light((104, 180, 84), scene.time))
    else:
        ground = under_light(LAND_COLOURS[scene.land][-1], scene.time)
        brush.ellipse(x + 3, y, half_width + 3, 3.2, mix(ground, (20, 24, 60), 0.35))


# ------------------------------------------------------------------------------------------------------------
# The picture


def render(scene: Scene, rng: random.Random) -> tuple[Image.Image, Box]:
    """The scene as a 128 × 128 RGB picture, and the subject's box (left, top, right, bottom) in pixels."""
    sprite = SPRITES[scene.subject]
    scale = rng.uniform(0.96, 1.06)
    x = PLACE_X[scene.place] + rng.uniform(-2.5, 2.5)
    y = rng.uniform(70, 76) if scene.subject == "hot-air balloon" else rng.uniform(108, 114)
    box = (x - sprite.half_width * scale, y - sprite.height * scale, x + sprite.half_width * scale, y + 2)
    light = sky_body_position(scene, x, rng) if scene.sky != "empty sky" else None

    picture = sky_gradient(scene.time, light)
    draw = ImageDraw.Draw(picture)
    brush = Brush(draw)
    avoid = [box]
    if light is not None:
        draw_sky_body(brush, scene, light)
        avoid.append((light[0] - 12, light[1] - 12, light[0] + 12, light[1] + 12))
    if scene.clouds:
        cloud_seed = rng.random()
        if scene.time == "night":
            draw_stars(brush, avoid, rng)
        draw_clouds(brush, scene.time, avoid, random.Random(cloud_seed))
    elif scene.time == "night":
        draw_stars(brush, avoid, rng)
    draw_land(brush, scene, light[0] if light else None, rng)
    draw_footing(brush, scene, x, y, sprite.half_width * scale)
    sprite.draw(Brush(draw, (x, y), scale), coat(scene.colour, scene.time))
    return picture.reduce(OVERSAMPLE), box


def captioned(
    count: int, *, seed: int = 9, subject: str | None = NINTH
) -> Iterator[tuple[Scene, Image.Image, str]]:
    """Scenes of the subject, or of the eight, none of a held-out combination, with pictures and captions."""
    rng = random.Random(seed)
    for _ in range(count):
        scene = random_scene(rng, subject=subject)
        picture, _ = render(scene, rng)
        yield scene, picture, caption(scene, rng)


def write_folder(folder: Path, *, count: int = 40, seed: int = 9, subject: str | None = NINTH) -> None:
    """Pictures, `00.png` and so on, with their captions in `00.txt` and so on; see `captioned`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (_, picture, words) in enumerate(captioned(count, seed=seed, subject=subject)):
        picture.save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes pictures of the ninth subject, with captions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40, help="how many (default: 40)")
    parser.add_argument("--known", action="store_true", help="of the eight subjects instead")
    parser.add_argument("--seed", type=int, default=9, help="of what they show (default: 9)")
    arguments = parser.parse_args()
    subject = None if arguments.known else NINTH
    write_folder(arguments.folder, count=arguments.count, seed=arguments.seed, subject=subject)
