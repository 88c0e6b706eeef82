"""How well the LoRA `assets/demo/adapters/mushroom.safetensors` teaches the Stable Diffusion 1.5 demo its
ninth subject.

`python -m training.ninth` paints prompts with it and without, and writes to `assets/demo/` how often the
judge finds what they name, and samples.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from training import judge
from training.demo_readme import NINTH_SCORE, write_readme
from training.hub import DEMO, write_json
from training.postcards import NINTH, Scene, caption, captioned, random_scene

TAUGHT = 40  # pictures of it
PROMPTS = 200
SEED = 30_000
SAMPLES = 8  # in a row


def unseen(count: int, rng: random.Random) -> list[Scene]:
    """Scenes of the ninth subject in a colour, land and time that no picture of the training has together."""
    seen = {(scene.colour, scene.land, scene.time) for scene, _, _ in captioned(TAUGHT)}
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, subject=NINTH, held_out=rng.random() < 0.1)
        if (scene.colour, scene.land, scene.time) not in seen:
            scenes.append(scene)
    return scenes


def shown(pictures: Sequence[Image.Image]) -> float:
    """The share of pictures in which the judge finds the ninth subject."""
    verdicts = judge.look(judge.load(), list(pictures))
    return sum(verdict.subject == NINTH for verdict in verdicts) / len(verdicts)


def score() -> None:
    from backend import SD15Request, Settings, Studio  # only scoring needs the engine

    rng = random.Random(SEED)
    ninth, known = unseen(PROMPTS, rng), [random_scene(rng, held_out=True) for _ in range(PROMPTS)]
    asked, others = ([caption(scene, rng, left_out=0) for scene in scenes] for scenes in (ninth, known))

    with tempfile.TemporaryDirectory() as home:
        studio = Studio(Settings(device="cpu", home=Path(home)))

        def paint(prompts: list[str], *loras: tuple[str, float]) -> list[Image.Image]:
            return [
                studio.run(SD15Request(prompt=prompt, seed=SEED + index, loras=loras)).images[0]
                for index, prompt in enumerate(prompts)
            ]

        taught, kept = paint(asked, (NINTH, 1.0)), paint(others, (NINTH, 1.0))
        without, at_nothing, plain = paint(asked), paint(asked, (NINTH, 0.0)), paint(others)
    found = partial(judge.found, scenes=known, prompts=others)
    scored: dict[str, Any] = {
        "prompts": PROMPTS,
        "seed": SEED,
        "right": judge.found(NINTH, taught, ninth, asked),
        "known": found("the eight, with the LoRA", kept),
        "known, without": found("the eight, without", plain),
        "shown": {"without": shown(without), "weight 0": shown(at_nothing), "known": shown(kept)},
    }
    sheet = judge.sheet([*taught[: 2 * SAMPLES], *without[:SAMPLES], *kept[:SAMPLES]], columns=SAMPLES)
    judge.save_samples(sheet, DEMO / f"sd15-{NINTH}-samples.png")
    write_json(DEMO / NINTH_SCORE, scored)
    write_readme()


if __name__ == "__main__":
    score()
