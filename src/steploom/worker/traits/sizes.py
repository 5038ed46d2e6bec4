"""Which sizes a pipeline takes: what its own source refuses or rounds, and how its latents are cut into patches."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from steploom.weave import signatures, source_code, untyped
from steploom.weave.source_code import Function, names

_SIZES = frozenset(("height", "width"))

_FACTORS = ("vae_scale_factor_spatial", "vae_spatial_scale_factor", "vae_spatial_compression_ratio", "vae_scale_factor",
            "movq_scale_factor")  # fmt: skip
"""Where pipelines keep how many pixels become one of the latents, along a side."""

_BINNED = frozenset(("classify_height_width_bin", "map_to_standard_shapes"))
_ROUNDED = frozenset(("downscale_height_and_width", "get_new_h_w", "get_default_height_width"))
"""diffusers' functions that give the nearest size that will do: with that argument, and always."""

_STIFF = frozenset(("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"))
"""Blocks of a U-Net that double a side: to what it was before it was halved they cannot."""

_MULTIPLES: Mapping[str, int] = {"WuerstchenCombinedPipeline": 128, "StableCascadeCombinedPipeline": 128}
"""Of cascades that count the latents of their stages in fractions of each other, and say nothing of what is left."""

_EDITING = ("DreamLitePipeline", "DreamLiteMobilePipeline")
"""Pipelines whose latents of a picture have the size that its processor rounds to, and no others do."""

_DECODED_LARGER = ("StableDiffusionUpscalePipeline", "LDMSuperResolutionPipeline")
"""Upscalers whose latents are as large as the picture, so that their VAE makes more of it."""
_ENLARGING = {"StableDiffusionLatentUpscalePipeline": 2.0, "LTXLatentUpsamplePipeline": 2.0,
              "LTX2LatentUpsamplePipeline": 2.0}  # fmt: skip


def told(pipeline: Any, denoiser: Any) -> dict[str, Any]:
    """What :class:`~steploom.protocol.PipelineInfo` says of sizes, by field."""
    return {
        "default_size": default(pipeline, denoiser),
        "follows_pictures": follows_pictures(pipeline),
        "enlarges": enlarges(pipeline),
        "pixels_per_latent": pixels_per_latent(pipeline),
        "size_multiple": multiple(pipeline, denoiser),
        "size_multiple_unbinned": multiple(pipeline, denoiser, binned=False),
        "size_multiple_pictured": multiple_pictured(pipeline),
        "size_least": least(pipeline),
        "size_most": most(pipeline, denoiser),
        "size_only": only(pipeline, denoiser),
    }


def multiple(pipeline: Any, denoiser: Any, *, binned: bool = True) -> int:
    """What ``width`` and ``height`` must be multiples of; 1 where any will do, since the pipeline rounds them.

    Some pipelines refuse sizes, before their work or amidst it; some round them; and some do neither, and fail once
    the denoiser cannot cut the latents into patches.

    Args:
        pipeline: What is asked for an image.
        denoiser: Its denoiser.
        binned: Whether it may take the nearest of the sizes that it was trained for, if it has an argument for that.
    """
    if not signatures.call_parameters(pipeline).keys() >= _SIZES:
        return 1
    of = [_MULTIPLES.get(type(pipeline).__name__, 1)]
    stages = [value for value in vars(pipeline).values() if untyped.is_pipeline(value)]
    of += [multiple(stage, None, binned=binned) for stage in stages] or [_of_one(pipeline, denoiser, binned=binned)]
    return math.lcm(*of)


def multiple_pictured(pipeline: Any) -> int:
    """What ``width`` and ``height`` must be multiples of besides, where a picture is given."""
    if not any(cls.__name__ in _EDITING for cls in type(pipeline).__mro__):
        return 1
    return pipeline.image_processor.config.vae_scale_factor


def _of_one(pipeline: Any, denoiser: Any, *, binned: bool) -> int:
    """The same of a pipeline that is not made of others."""
    call, check, prepare = (source_code.function(pipeline, n) for n in ("__call__", "check_inputs", "prepare_latents"))
    if call is None:
        return 1
    rounding = _ROUNDED | _BINNED if binned else _ROUNDED
    rounds_at = min(_roundings(call, rounding), default=math.inf)
    if rounds_at < _checks_at(call):
        return 1
    of = [number for body in (check, call) if body is not None for number in _divisors(body, pipeline)]
    if rounds_at == math.inf and (prepare is None or not any(_roundings(prepare, rounding))):
        of.append(_pixels_of_a_patch(pipeline, denoiser))
    return math.lcm(*of)


def _divisors(body: Function, pipeline: Any) -> Iterator[int]:
    """The numbers by which a size must be divisible, or ``body`` raises."""
    for divisor in _conditions(body):
        numbers = (value for value in source_code.values(divisor, body, pipeline) if isinstance(value, int))
        yield from (number for number in numbers if number > 0)


def _conditions(body: Function) -> Iterator[ast.expr]:
    """What sizes are divided by in the conditions under which ``body`` raises."""
    for condition in source_code.refusals(body):
        loops = [node for node in ast.walk(condition) if isinstance(node, ast.comprehension)]
        sizes = _SIZES.union(*(names(loop.target) for loop in loops if names(loop.iter) & _SIZES))
        for node in ast.walk(condition):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and names(node.left) & sizes:
                yield node.right


def _checks_at(call: Function) -> float:
    """The line in which sizes are checked."""
    checks = [node.lineno for node in ast.walk(call) if isinstance(node, ast.Call) and _called(node) == "check_inputs"]
    return min([*checks, *(divisor.lineno for divisor in _conditions(call))], default=math.inf)


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _roundings(body: Function, rounding: frozenset[str]) -> Iterator[int]:
    """The lines in which ``body`` makes its sizes multiples of something, itself or with a function of ``rounding``."""
    assigned = list(source_code.assignments(body))
    rounded = {name for targets, value, _ in assigned if _is_rounding(value) for name in targets}
    for targets, value, line in assigned:
        calls = {_called(node) for node in ast.walk(value) if isinstance(node, ast.Call)}
        chosen = isinstance(value, ast.Subscript) and bool(names(value.slice) & _SIZES)
        if targets & _SIZES and (
            _is_rounding(value) or names(value) & (rounded - _SIZES) or calls & rounding or chosen
        ):
            yield line


def _is_rounding(value: ast.expr) -> bool:
    """Whether a size is divided without its remainder and multiplied again: ``height // 16 * 16``."""
    products = (node for node in ast.walk(value) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult))
    return any(
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and names(node.left) & _SIZES
        for product in products
        for node in ast.walk(product)
    )


def _pixels_of_a_patch(pipeline: Any, denoiser: Any) -> int:
    """Pixels along a side of what the denoiser takes as one; 1 if it takes the latents one by one."""
    config = getattr(denoiser, "config", None)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, Sequence) and patch:
        patch = cast("Sequence[Any]", patch)[-1]  # frames come first
    if _STIFF & set(getattr(config, "up_block_types", ())):
        patch = 2 ** getattr(denoiser, "num_upsamplers", 0)
    return patch * (pixels_per_latent(pipeline) or 1) if isinstance(patch, int) and patch > 1 else 1


def only(pipeline: Any, denoiser: Any) -> tuple[int, int] | None:
    """The one ``(width, height)`` for which the denoiser has learned positions (CogVideoX 5B from an image), if so."""
    config = getattr(denoiser, "config", None)
    sides = getattr(config, "sample_width", None), getattr(config, "sample_height", None)
    learned = getattr(config, "use_learned_positional_embeddings", False)
    if learned and isinstance(sides[0], int) and isinstance(sides[1], int):
        return sides[0] * (pixels_per_latent(pipeline) or 1), sides[1] * (pixels_per_latent(pipeline) or 1)
    return None


def least(pipeline: Any) -> int:
    """The smallest width or height of which something is left when the pipeline has rounded it down."""
    stages = [value for value in vars(pipeline).values() if untyped.is_pipeline(value)]
    bodies = [source_code.function(pipeline, name) for name in ("__call__", "prepare_latents")]
    of = [_divided_by(node, body, pipeline) for body in bodies if body is not None for node in ast.walk(body)]
    return max([1, *of, *map(least, stages)])


def _divided_by(node: ast.AST, body: Function, pipeline: Any) -> int:
    """What a size is divided by in ``height // 8 // patch``; 1 if this is something else."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and names(node.left) & _SIZES):
        return 1
    numbers = (value for value in source_code.values(node.right, body, pipeline) if isinstance(value, int))
    return _divided_by(node.left, body, pipeline) * max(numbers, default=1)


def most(pipeline: Any, denoiser: Any) -> int | None:
    """The largest width or height for which the denoiser has learned positions (SD 3, AuraFlow), if it sets a bound."""
    embedding = getattr(denoiser, "pos_embed", None)
    positions, patch = getattr(embedding, "pos_embed_max_size", None), getattr(embedding, "patch_size", None)
    factor = getattr(pipeline, "vae_scale_factor", None)
    if not (isinstance(positions, int) and isinstance(patch, int) and isinstance(factor, int)):
        return None
    in_all = tuple(getattr(getattr(embedding, "pos_embed", None), "shape", ()))[:2] == (1, positions)
    return (math.isqrt(positions) if in_all else positions) * patch * factor


def follows_pictures(pipeline: Any) -> bool:
    """Whether what is made of a picture may have the picture's size, where none is given."""
    parameters = signatures.call_parameters(pipeline)
    return not any(name in parameters and isinstance(parameters[name].default, int) for name in ("width", "height"))


def enlarges(pipeline: Any) -> float:
    """How many times wider and higher its images are than ``width`` and ``height``, or the picture, say."""
    scale = signatures.call_parameters(pipeline).get("resolution_scale")
    if scale is not None and isinstance(scale.default, (int, float)):
        return float(scale.default)
    names = [cls.__name__ for cls in type(pipeline).__mro__]
    if any(name in _DECODED_LARGER for name in names):
        decoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
        levels = getattr(getattr(decoder, "config", None), "block_out_channels", (1,))
        return float(2 ** (len(levels) - 1))
    return next((_ENLARGING[name] for name in names if name in _ENLARGING), 1.0)


def pixels_per_latent(pipeline: Any) -> int:
    """Pixels along a side for each latent; 0 where that is not known."""
    factor = next((value for name in _FACTORS if isinstance(value := getattr(pipeline, name, None), int)), 0)
    if factor or "latent_dim_scale" not in getattr(pipeline, "config", ()):
        return factor
    config = getattr(getattr(pipeline, "vqgan", None), "config", None)  # of Wuerstchen's decoders, which keep none
    return getattr(config, "up_down_scale_factor", 0) * 2 ** (getattr(config, "levels", 1) - 1)


def default(pipeline: Any, denoiser: Any) -> tuple[int, int] | None:
    """``(width, height)`` of what is made when no size is given, if that is known."""
    parameters = signatures.call_parameters(pipeline)
    if not {"width", "height"} <= parameters.keys():
        return None
    fixed = parameters["width"].default, parameters["height"].default
    if isinstance(fixed[0], int) and isinstance(fixed[1], int):
        return fixed[0], fixed[1]
    side = getattr(pipeline, "default_sample_size", None)
    if not isinstance(side, int):
        side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    factor = getattr(pipeline, "vae_scale_factor", 1)
    return (side * factor, side * factor) if isinstance(side, int) and isinstance(factor, int) else None
