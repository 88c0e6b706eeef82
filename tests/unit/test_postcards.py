"""The postcards that the demo checkpoints learn from, and the judge that scores them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPTokenizer

from training import judge
from training.postcards import (
    ATTRIBUTES,
    COLOURS,
    LANDS,
    NINTH,
    SIZE,
    SKIES_AT,
    SPRITES,
    SUBJECTS,
    TIMES,
    Scene,
    caption,
    captioned,
    random_scene,
    render,
    sky_body_position,
    vocabulary,
    write_folder,
)
from training.text import write_tokenizer

RED_HOUSE_AT_NIGHT = Scene(
    time="night", land="green hills", subject="house", colour="red", place="left", sky="moon"
)


def every_combination() -> list[Scene]:
    return [
        Scene(time=time, land=land, subject=subject, colour=colour, place="left", sky="empty sky")
        for time in TIMES
        for land in LANDS
        for subject in SUBJECTS
        for colour in COLOURS
    ]


def test_same_seed_same_picture() -> None:
    first, _ = render(RED_HOUSE_AT_NIGHT, random.Random(3))
    again, _ = render(RED_HOUSE_AT_NIGHT, random.Random(3))
    other, _ = render(RED_HOUSE_AT_NIGHT, random.Random(4))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert first.size == (SIZE, SIZE)
    assert first.mode == "RGB"


@pytest.mark.parametrize("subject", [*SUBJECTS, NINTH])
def test_the_box_holds_the_subject(subject: str) -> None:
    """A red and a blue subject differ inside the box and nowhere else."""
    red, blue = (
        render(
            Scene(time="noon", land="sand dunes", subject=subject, colour=colour, place="right", sky="sun"),
            random.Random(5),
        )
        for colour in ("red", "blue")
    )
    assert red[1] == blue[1]
    left, top, right, bottom = red[1]
    assert 0 <= left < right <= SIZE
    assert 0 <= top < bottom <= SIZE
    for y in range(SIZE):
        for x in range(SIZE):
            if red[0].getpixel((x, y)) != blue[0].getpixel((x, y)):
                assert left - 1 <= x <= right + 1
                assert top - 1 <= y <= bottom + 1


def test_about_eight_percent_is_held_out_and_never_drawn_for_training() -> None:
    scenes = every_combination()
    share = sum(scene.held_out() for scene in scenes) / len(scenes)
    assert 0.06 < share < 0.10
    rng = random.Random(0)
    assert not any(random_scene(rng).held_out() for _ in range(500))
    assert all(random_scene(rng, held_out=True).held_out() for _ in range(100))


def test_held_out_depends_on_the_combination_alone() -> None:
    for scene in every_combination():
        elsewhere = replace(scene, place="right", clouds=True)
        assert scene.held_out() == elsewhere.held_out()


def test_the_sky_body_is_clear_of_the_subject() -> None:
    rng = random.Random(1)
    for _ in range(500):
        scene = random_scene(rng)
        assert scene.sky in SKIES_AT[scene.time]
        _, box = render(scene, random.Random(2))
        x, y = sky_body_position(scene, (box[0] + box[2]) / 2, rng)
        assert 10 < x < SIZE - 10
        assert 10 < y < 45
        if scene.subject == "hot-air balloon":  # the only subject as high as the sun
            assert abs(x - (box[0] + box[2]) / 2) > SPRITES[scene.subject].half_width + 10


def test_full_captions_name_subject_colour_and_place() -> None:
    """With nothing left out, scenes that differ in one attribute differ in words, all else drawn alike."""
    rng = random.Random(6)
    for _ in range(200):
        scene = random_scene(rng)
        for name, values in ATTRIBUTES.items():
            if name == "sky":
                continue
            other = next(value for value in values if value != getattr(scene, name))
            changed = Scene(**{**vars(scene), name: other})  # pyright: ignore[reportArgumentType]
            assert caption(scene, random.Random(7), left_out=0) != caption(
                changed, random.Random(7), left_out=0
            )


def test_captions_use_known_words_only() -> None:
    known, rng = set(vocabulary()), random.Random(8)
    for _ in range(2000):
        words = caption(random_scene(rng), rng).replace(",", " ").replace("-", " ").split()
        assert set(words) <= known, words


def test_the_tokenizer_gives_each_word_a_token_and_takes_any_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocabulary())
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word
    for text in ("émigré 日本 😀", "a Red HOUSE!", "", "lighthousehouse ½"):
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert (
            tokenizer.eos_token_id not in ids[1:-1]
        )  # the unknown token is the end token: nothing is unknown


def test_the_judge_is_right_about_held_out_renders() -> None:
    rng, expert = random.Random(99), judge.load()
    scenes = [random_scene(rng, held_out=True) for _ in range(200)]
    scenes += [random_scene(rng, held_out=True, subject=NINTH) for _ in range(50)]
    verdicts = judge.look(expert, [render(scene, rng)[0] for scene in scenes])
    right = [all(verdict.agrees(scene).values()) for verdict, scene in zip(verdicts, scenes, strict=True)]
    assert sum(right[:200]) >= 198
    assert sum(right[200:]) >= 49


def test_the_judge_tells_a_red_house_at_night_from_a_blue_one() -> None:
    expert = judge.load()
    picture, _ = render(RED_HOUSE_AT_NIGHT, random.Random(11))
    verdict = judge.look(expert, [picture.resize((256, 256))])[0]  # and pictures of other sizes too
    assert (verdict.colour, verdict.subject, verdict.time) == ("red", "house", "night")
    blue = replace(RED_HOUSE_AT_NIGHT, colour="blue")
    assert not verdict.agrees(blue)["colour"]


def test_where_no_place_is_said_the_subject_is_in_the_centre() -> None:
    rng, places = random.Random(12), ("left", "right", "centre", "center", "middle")
    for _ in range(1000):
        scene = random_scene(rng)
        if not any(word in caption(scene, rng) for word in places):
            assert scene.place == "centre"


@pytest.mark.parametrize("demo", ["sd15", "stable-cascade"])
def test_the_demo_knows_the_words_of_its_examples(demo: str) -> None:
    known = set(vocabulary())
    settings = json.loads((judge.DEMO / demo / "triptych.json").read_text(encoding="utf-8"))
    for prompt in (*settings["examples"], *judge.SAMPLES):
        assert set(prompt.replace(",", " ").replace("-", " ").split()) <= known, prompt


def test_the_ninth_subject_is_apart() -> None:
    """The demos never saw it: it is drawn where it is asked for, and the tokenizers have no token for it."""
    rng = random.Random(13)
    assert len(SUBJECTS) == 8
    assert all(random_scene(rng).subject != NINTH for _ in range(500))
    assert not set(NINTH.split()) & set(vocabulary())
    scenes = [random_scene(rng, subject=NINTH) for _ in range(200)]
    assert {scene.subject for scene in scenes} == {NINTH}
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert all(NINTH in caption(scene, rng, left_out=0) for scene in scenes)


def test_a_folder_of_the_ninth_subject_shows_what_its_captions_say(tmp_path: Path) -> None:
    write_folder(tmp_path, count=5)
    write_folder(tmp_path / "again", count=5)
    pictures, texts = (sorted(tmp_path.glob(f"*.{kind}")) for kind in ("png", "txt"))
    assert [file.stem for file in pictures] == [file.stem for file in texts] == ["00", "01", "02", "03", "04"]
    for picture, text, (scene, drawn, words) in zip(pictures, texts, captioned(5), strict=True):
        assert scene.subject == NINTH
        assert Image.open(picture).tobytes() == drawn.tobytes()
        assert text.read_text(encoding="utf-8").strip() == words
        assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
