"""The drawing, the prompts and the checker of the built-in model, without the model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from steploom import demo
from steploom.demo import checker, scene


def scenes(seed: int, count: int, *, held_out: bool = False) -> list[scene.Scene]:
    rng = np.random.default_rng(seed)
    return [scene.random_scene(rng, held_out=held_out) for _ in range(count)]


def changed(one: scene.Scene, attribute: str, rng: np.random.Generator) -> scene.Scene | None:
    """Return a scene with one attribute of ``one`` changed, or None where that gives no scene of the grammar."""
    if attribute == "background":
        taken = {one.background, *(item.colour for item in one.items)}
        free = [name for name in scene.BACKGROUNDS if name not in taken]
        return dataclasses.replace(one, background=str(rng.choice(free)))
    if attribute == "relation":
        free = [name for name in scene.RELATIONS if name != one.relation]
        return dataclasses.replace(one, relation=str(rng.choice(free))) if one.second else None
    tables = {"shape": scene.SHAPES, "colour": tuple(scene.COLOURS), "size": tuple(scene.SIZES)}
    which = "second" if one.second is not None and rng.random() < 0.5 else "first"
    item: scene.Item = getattr(one, which)
    free = [name for name in tables[attribute] if name not in (getattr(item, attribute), one.background)]
    return dataclasses.replace(one, **{which: dataclasses.replace(item, **{attribute: str(rng.choice(free))})})


def test_the_grammar_is_as_rich_as_promised() -> None:
    assert len(scene.SHAPES) >= 5
    assert len(scene.COLOURS) >= 8
    assert len(scene.SIZES) >= 3
    assert len(scene.RELATIONS) >= 4
    assert len(scene.BACKGROUNDS) >= 6


def test_a_prompt_names_everything() -> None:
    first, second = scene.Item("circle", "red", "large"), scene.Item("square", "blue", "small")
    assert scene.prompt(scene.Scene(first, "white", "above", second)) == demo.EXAMPLE_PROMPT
    assert scene.prompt(scene.Scene(second, "pink")) == "a small blue square on a pink background"


def test_loose_prompts_use_words_of_the_grammar_only() -> None:
    rng = np.random.default_rng(0)
    words = {word for one in scenes(1, 300) for word in scene.loose_prompt(one, rng).split()}
    assert words == set(scene.vocabulary())


def test_training_never_shows_a_held_out_combination_from_either_side() -> None:
    for one in scenes(2, 2000):
        assert one.background not in {item.colour for item in one.items}
        if one.second is not None and one.relation is not None:
            assert not scene.is_held_out(one.first, one.relation)
            assert not scene.is_held_out(one.second, scene.INVERSE[one.relation])


def test_held_out_scenes_are_held_out_and_a_fifth_of_all() -> None:
    for one in scenes(3, 200, held_out=True):
        assert one.relation is not None
        assert scene.is_held_out(one.first, one.relation)
    items = [scene.Item(shape, colour, "small") for shape in scene.SHAPES for colour in scene.COLOURS]
    out = [scene.is_held_out(item, relation) for item in items for relation in scene.RELATIONS]
    assert 0.18 < np.mean(out) < 0.22
    assert all(not all(scene.is_held_out(item, relation) for relation in scene.RELATIONS) for item in items)


def test_the_same_seed_draws_the_same_picture() -> None:
    one = scenes(4, 1)[0]
    pictures = [scene.draw(one, np.random.default_rng(5), 48) for _ in range(2)]
    assert pictures[0].shape == (48, 48, 3)
    assert np.array_equal(pictures[0], pictures[1])


def test_shapes_stay_inside_and_apart() -> None:
    rng = np.random.default_rng(6)
    for one in scenes(7, 300):
        placed = scene.arrange(one, rng)
        for a in placed:
            assert a.radius < a.x < 1 - a.radius
            assert a.radius < a.y < 1 - a.radius
        if len(placed) == 2:
            a, b = placed
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 1.1 * (a.radius + b.radius)


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        scene.outline("blob")


def test_the_checker_is_right_on_drawn_truth() -> None:
    rng = np.random.default_rng(8)
    some = scenes(9, 20) + scenes(10, 20, held_out=True)
    assert all(checker.check(scene.draw(one, rng), one).everything for one in some)


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "background", "relation"])
def test_the_checker_sees_one_changed_attribute(attribute: str) -> None:
    rng = np.random.default_rng(11)
    for one in scenes(12, 8):
        other = changed(one, attribute, rng)
        if other is not None:
            verdict = checker.check(scene.draw(other, rng), one)
            assert not getattr(verdict, attribute)


def test_the_checker_rejects_noise_and_an_empty_picture() -> None:
    one = scenes(13, 1)[0]
    noise = np.random.default_rng(14).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    empty = np.full((64, 64, 3), scene.BACKGROUNDS[one.background], dtype=np.uint8)
    assert not checker.check(noise, one).content
    assert not checker.check(empty, one).content


def test_the_folder_is_known_without_heavy_imports() -> None:
    code = "import sys, steploom.demo as d; assert d.path().name == 'model'; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
