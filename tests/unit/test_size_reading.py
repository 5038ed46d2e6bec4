"""Which sizes a pipeline takes is read from its source, whatever stands before it there."""

from __future__ import annotations

import types
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

from steploom.worker.traits import sizes

PATCHED = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=(1, 2, 2)))


class Pipeline(DiffusionPipeline):
    """Takes any size and says nothing."""

    vae_scale_factor = 8
    transformer = types.SimpleNamespace(config=types.SimpleNamespace(patch_size=[1, 2, 2]))
    transformer_2 = None

    def __init__(self) -> None:
        pass

    def __call__(self, image: Any, height: int, width: int) -> Any:
        self.check_inputs(image, height, width)
        return self.prepare_latents(height, width)

    def check_inputs(self, image: Any, height: int, width: int) -> None:
        if image is None:
            raise ValueError("`image` is needed")

    def prepare_latents(self, height: int, width: int) -> Any:
        return height // self.vae_scale_factor, width // self.vae_scale_factor


class Late(Pipeline):
    """Asks for all else first, and for sizes by a name with several meanings."""

    def check_inputs(self, image: Any, height: int, width: int) -> None:
        super().check_inputs(image, height, width)
        if self.transformer_2 is not None:
            base = self.vae_scale_factor * self.transformer_2.config.patch_size[1] * 3
        else:
            base = self.vae_scale_factor * max(self.transformer.config.patch_size[1:])
        if width > 4 * height:
            raise ValueError("too wide")
        if height % base != 0 or width % base != 0:
            raise ValueError(f"must be multiples of {base}")


class Each(Pipeline):
    def check_inputs(self, image: Any, height: int, width: int, frames: int = 1) -> None:
        if frames % 7 != 1:
            raise ValueError("frames")
        if any(size is not None and size % (self.vae_scale_factor * 4) != 0 for size in (height, width)):
            raise ValueError("must be multiples")


class Within(Pipeline):
    """Refuses sizes in the middle of its work, after two names that mean each other."""

    def __call__(self, image: Any, height: int, width: int) -> Any:
        one = self.vae_scale_factor
        other = one
        one = other
        if height % one:
            raise ValueError("must be a multiple of 8")
        image = self.check_inputs(image, height, width)
        if width % 40 != 0:
            raise ValueError("must be a multiple of 40")
        return image


class Warns(Pipeline):
    def check_inputs(self, image: Any, height: int, width: int) -> None:
        if height % 16 != 0:
            print("will be rounded")

    def prepare_latents(self, height: int, width: int) -> Any:
        height = 2 * (int(height) // (self.vae_scale_factor * 2))
        width = 2 * (int(width) // (self.vae_scale_factor * 2))
        return height, width


class RoundsFirst(Late):
    def __call__(self, image: Any, height: int, width: int) -> Any:
        multiple = self.vae_scale_factor * 2
        if height % multiple != 0 or width % multiple != 0:
            rounded_height = ((height + multiple - 1) // multiple) * multiple
            rounded_width = ((width + multiple - 1) // multiple) * multiple
            height, width = rounded_height, rounded_width
        return super().__call__(image, height, width)

    def check_inputs(self, image: Any, height: int, width: int) -> None:
        super().check_inputs(image, height, width)


class RoundsLater(Pipeline):
    def __call__(self, image: Any, height: int, width: int) -> Any:
        self.check_inputs(image, height, width)
        height, width = height // 48 * 48, width // 48 * 48
        return image, height, width

    def check_inputs(self, image: Any, height: int, width: int) -> None:
        if height % 3 != 0 or width % 3 != 0:
            raise ValueError("must be multiples of 3")


class Chooses(Pipeline):
    def __call__(self, image: Any, height: int, width: int) -> Any:
        sizes = [(32, 32), (32, 64)]
        width, height = sizes[int(width > height)]
        return self.prepare_latents(height, width)


class Binned(Pipeline):
    def __call__(self, image: Any, height: int, width: int, use_resolution_binning: bool = True) -> Any:
        if use_resolution_binning:
            height, width = self.image_processor.classify_height_width_bin(height, width, ratios={})
        self.check_inputs(image, height, width)

    def check_inputs(self, image: Any, height: int, width: int) -> None:
        if height % 8 != 0 or width % 8 != 0:
            raise ValueError("must be multiples of 8")


class Stages(Pipeline):
    def __init__(self) -> None:
        self.first, self.second = Late(), Within()
        self.vae_scale_factor = 1


@pytest.mark.parametrize(
    ("pipeline", "multiple"),
    [(Pipeline, 16), (Late, 16), (Each, 32), (Within, 80), (Warns, 1), (RoundsFirst, 1), (RoundsLater, 3),
     (Chooses, 1), (Binned, 1), (Stages, 80)],
)  # fmt: skip
def test_the_multiple_is_what_the_source_refuses_and_what_makes_whole_patches(pipeline: Any, multiple: int) -> None:
    made = pipeline()
    stages = isinstance(made, Stages)  # whose denoisers have no patches here
    assert sizes.multiple(made, None if stages else PATCHED) == multiple


def test_without_patches_only_what_is_refused_counts() -> None:
    assert [sizes.multiple(one(), None) for one in (Pipeline, Late, Within, Warns)] == [1, 16, 40, 1]


def test_without_binning_a_size_is_as_it_was_asked_for() -> None:
    assert sizes.multiple(Binned(), PATCHED, binned=False) == 16
    assert sizes.multiple(Binned(), None, binned=False) == 8
    assert sizes.multiple(Warns(), PATCHED, binned=False) == 1


def test_a_branch_for_components_that_are_not_there_has_no_say() -> None:
    both = Late()
    both.transformer_2 = both.transformer
    assert sizes.multiple(both, None) == 48  # of both branches


def test_a_source_that_cannot_be_read_refuses_nothing() -> None:
    scope: dict[str, Any] = {"Pipeline": Pipeline}
    exec("class Hidden(Pipeline):\n    def __call__(self, height, width):\n        height % 16", scope)
    assert sizes.multiple(scope["Hidden"](), PATCHED) == 1


def test_a_pipeline_without_sizes_takes_any() -> None:
    class Sound(Pipeline):
        def __call__(self, length: float) -> Any:
            return self.check_inputs(None, 1, 1)

    assert sizes.multiple(Sound(), PATCHED) == 1


@pytest.mark.parametrize(("pipeline", "least"), [(Pipeline, 8), (Warns, 16), (RoundsLater, 48), (Stages, 8)])
def test_the_least_size_is_what_rounding_leaves_something_of(pipeline: Any, least: int) -> None:
    assert sizes.least(pipeline()) == least


def test_the_least_size_of_a_size_that_is_divided_twice() -> None:
    class Twice(Pipeline):
        def prepare_latents(self, height: int, width: int) -> Any:
            return height // self.vae_scale_factor // self.transformer.config.patch_size[1]

    assert sizes.least(Twice()) == 16


def test_the_bounds_of_learned_positions() -> None:
    def denoiser(positions: int, *shape: int) -> Any:
        table = types.SimpleNamespace(shape=shape)
        embedding = types.SimpleNamespace(pos_embed_max_size=positions, patch_size=2, pos_embed=table)
        return types.SimpleNamespace(pos_embed=embedding)

    assert sizes.most(Pipeline(), denoiser(96, 1, 96 * 96, 8)) == 96 * 2 * 8  # Stable Diffusion 3
    assert sizes.most(Pipeline(), denoiser(96 * 96, 1, 96 * 96, 8)) == 96 * 2 * 8  # AuraFlow counts all
    assert sizes.most(Pipeline(), None) is None
    config = types.SimpleNamespace(use_learned_positional_embeddings=True, sample_width=90, sample_height=60)
    assert sizes.only(Pipeline(), types.SimpleNamespace(config=config)) == (720, 480)
    config.use_learned_positional_embeddings = False
    assert sizes.only(Pipeline(), types.SimpleNamespace(config=config)) is None


def test_pipelines_that_no_test_builds() -> None:
    """What is read from classes of diffusers that the conformance suite has no model for."""
    flux = object.__new__(diffusers.BriaFibo2Pipeline)
    flux.__dict__["vae_scale_factor"] = 16
    assert sizes.multiple(flux, None) == 32
    video = object.__new__(diffusers.SkyReelsV2ImageToVideoPipeline)
    video.__dict__["vae_scale_factor_spatial"] = 8
    assert sizes.multiple(video, PATCHED) == 16
