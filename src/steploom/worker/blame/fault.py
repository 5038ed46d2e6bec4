"""Whose fault it is that a pipeline raised: of the request's arguments, if it did before the first step was taken.

What a pipeline makes of its arguments it finds out on the way: of ``clip_skip=50`` after the text encoder has run, of
latents of another shape in the denoiser's first layer. So what is raised before the first step has ended, and not by
the device or by ourselves, is held against the arguments that it names, or that stand in the line that raised it.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, cast

import msgspec
import torch

from steploom.errors import InvalidRequest, SteploomError
from steploom.given import is_whole
from steploom.media.pictures import brief, leaves, shape_of
from steploom.protocol import ErrorInfo, PipelineInfo
from steploom.protocol.pictures import FRAMES, pictures_among
from steploom.requests import DiffusionRequest
from steploom.weave import program
from steploom.weave.machine_faults import is_of_machine
from steploom.weave.noise import observed
from steploom.weave.program import Program
from steploom.worker.blame.picture_faults import in_processing, of_pictures

_KINDS = (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError, AssertionError)
"""What is raised at arguments that do not fit; of runtime errors those that are about shapes."""

_SHAPES = re.compile(
    r"shape|size|dimension|\b[2-5]D\b|channel|sequence length|unpack|out of (range|bounds)|broadcast", re.IGNORECASE
)
_TRUTH = re.compile(r"truth value of an array|boolean value of tensor", re.IGNORECASE)
"""What arrays say where plain values are asked for: ``size or (height, width)``."""
_DTYPE = "dtype"
"""What is said of a model whose parts are of several: no argument's fault."""
_WORD = re.compile(r"[A-Za-z_]\w*")
_QUOTED = re.compile(r"`(\w+)`")
_ONE_OF = re.compile(r"only (pass )?one of `|be used together", re.IGNORECASE)
"""What is said of two arguments of which none is wrong, and none missing."""
_CHECKS = re.compile(r"\bcheck_inputs\(")
"""A line that hands all arguments on, to be looked at: it is no evidence of any."""
_SCHEDULED = re.compile(r"\bscheduler\.")
"""A line in which a pipeline asks something of its noise scheduler."""
_OWN_FIELDS = ("noise_scheduler", "output_type")
"""Fields of the request that may be at fault, although no line of a pipeline is about them before the first step."""
_SIZES = {"width", "height"}
"""Arguments that stand in every line about the latents of a picture."""
_EVEN = {"width": (16, 0), "height": (16, 0), **dict.fromkeys(FRAMES, (8, 1))}
"""What sizes are usually multiples of, and how many more."""

_TO_WRITE = ("prompt", "messages", "gen_length", "block_length")
"""What says how many tokens there are, those to be written among them."""

_SHORTENING = ("strength", "denoising_start", "denoising_end", "timesteps", "sigmas")
_PER_PROMPT = ("prompt_2", "prompt_3", "prompt_4")
"""Texts of a second encoder and so on, one for each prompt."""
_TEXTS = ("prompt", *_PER_PROMPT, "negative_prompt", "negative_prompt_2", "negative_prompt_3")
"""Arguments that stand in every line that encodes them."""
_OF_TEXT = re.compile(r"TextEncodeInput|text input must be|either `text` or|surrogates")
"""What tokenizers say of what is no text."""

_LONGEST = 400
"""Characters of the pipeline's words that are told."""

_PRINTED = re.compile(r"\btensor\([^()]*\)")
"""A whole tensor, as some print it."""

_OWN = str(Path(program.__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


def failure(
    error: BaseException,
    request: DiffusionRequest | None = None,
    info: PipelineInfo | None = None,
    run: Program | None = None,
) -> ErrorInfo:
    """Describes an exception and lets go of its frames.

    Args:
        error: What was raised.
        request: For which request, if it may be that one's fault.
        info: What its pipeline accepts, if that is known.
        run: What was run of it; None if nothing was.
    """
    text = "".join(traceback.format_exception(error))
    told = ErrorInfo.of(error, text)
    traced = told.traceback
    if request is not None and _has_words(error):
        said = _PRINTED.sub("<Tensor>", " ".join(told.message.removeprefix(f"{type(error).__name__}: ").split()))
        said = said[:_LONGEST]
        told = _blamed(error, said, request, info, run) or told
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    return msgspec.structs.replace(told, traceback=traced)


def _has_words(error: BaseException) -> TypeGuard[Exception]:
    """Whether an exception is a pipeline's, and says what it is."""
    try:
        str(error)
    except Exception:  # noqa: BLE001 - a stranger's exception
        return False
    return isinstance(error, Exception) and not isinstance(error, SteploomError)


def _blamed(
    error: Exception, said: str, request: DiffusionRequest, info: PipelineInfo | None, run: Program | None
) -> ErrorInfo | None:
    """What to tell if the request is at fault, with one of its pictures or another argument; None if it is not."""
    steps, called = (0, False) if run is None else (run.steps, run.called)
    frames = _frames(error)
    ours = _is_ours(frames) and not _is_of_step(error, frames, request)
    given, left_out = _given(request), _left_out(request, info)
    culprits = {} if ours else _culprits(frames, said, given, left_out)
    speaks_of_others = _ONE_OF.search(said) or left_out.keys() & set(_QUOTED.findall(said))
    if info is not None and run is not None and not speaks_of_others:
        pictures = pictures_among(request.params, info)
        if not culprits.keys() - _SIZES or culprits.keys() & pictures.keys() or in_processing(error):
            blamed = of_pictures(error, request, info, steps=steps, module=run.failed)
            if blamed is not None:
                return ErrorInfo.of(blamed)
    if steps and not ours and culprits.keys() == {"noise_scheduler"}:
        return _of_noise_scheduler(error, said, culprits, steps)
    writes = info is not None and info.default_length is not None
    return None if steps or ours else _of_arguments(error, said, given, culprits, called=called, writes=writes)


def _of_noise_scheduler(error: Exception, said: str, given: Mapping[str, Any], steps: int) -> ErrorInfo | None:
    """What to tell where a request's own noise scheduler failed after some steps, as some do at the last."""
    if is_of_machine(error) or isinstance(error, RuntimeError):
        return None
    why = f"{type(error).__name__}: {said}" if said else type(error).__name__
    words = f"the pipeline's loop and it do not go together: it failed after {steps} steps ({why}); give another"
    return ErrorInfo("InvalidRequest", _told(given, words), field="noise_scheduler")


def _of_arguments(
    error: Exception, said: str, given: Mapping[str, Any], culprits: Mapping[str, Any], *, called: bool, writes: bool
) -> ErrorInfo | None:
    """What to tell if an argument is at fault that the pipeline found out about before its first step."""
    spelled = _spelled(said, given)
    if ambiguous := _TRUTH.search(said) is not None:
        culprits = {name: value for name, value in culprits.items() if shape_of(value) is not None} or culprits
    if _is_template(error) or (not called and isinstance(error, (ValueError, TypeError))):
        return ErrorInfo("InvalidRequest", _told(culprits, said), field=_field(culprits, spelled))
    about_shapes = _SHAPES.search(said) is not None
    if is_of_machine(error) or _DTYPE in said.lower():
        return None
    if not isinstance(error, _KINDS) and not (isinstance(error, RuntimeError) and (about_shapes or ambiguous)):
        return None
    if about_shapes and not culprits.keys() - _EVEN.keys():
        culprits = _too_few_texts(given) or culprits
    if about_shapes and not culprits.keys() - _EVEN.keys():
        culprits = {name: value for name, value in given.items() if _has_shape(name, value)} or culprits
        culprits = culprits or _uneven(given, writes=writes)
    if not culprits:
        return None
    words = f"the pipeline cannot go on with this ({type(error).__name__}: {said}); give another, or leave it out"
    return ErrorInfo("InvalidRequest", _told(culprits, words), field=_field(culprits, spelled))


def _field(culprits: Mapping[str, Any], said: str) -> str | None:
    """The one that is named of several: what was left out, rather than what was given; else what the error is about."""
    left_out = [name for name, value in culprits.items() if value is None]
    about = [word for word in _WORD.findall(said)[:1] if word in culprits]
    return next(iter([*left_out, *about, *sorted(culprits)]), None)


def _given(request: DiffusionRequest) -> dict[str, Any]:
    """What a request gives that may be at fault, by name."""
    own = {name: getattr(request, name) for name in ("prompt", *_OWN_FIELDS)}
    return {name: value for name, value in {**own, **request.params}.items() if value is not None}


def _left_out(request: DiffusionRequest, info: PipelineInfo | None) -> dict[str, None]:
    """What a request does not give although it might, and for which its pipeline has no value of its own."""
    parameters = [] if info is None else info.parameters
    given = _given(request)
    return {one.name: None for one in parameters if one.takes_none and one.name not in given.keys() | _SIZES}


def no_steps(request: DiffusionRequest, shortened_by: str = "") -> InvalidRequest | None:
    """What to raise when arguments of the request leave no step to take; None if it has none that could.

    Args:
        request: The request.
        shortened_by: The argument of its pipeline that does so also where it is not given, if there is one.
    """
    given = {name: request.params[name] for name in _SHORTENING if request.params.get(name) is not None}
    by = ""
    if not given and shortened_by:
        by = f", by the pipeline's own {shortened_by}"
        given = {"num_inference_steps": request.params.get("num_inference_steps")}
    if not given:
        return None
    return InvalidRequest(_told(given, f"leaves no step to take{by}; give another, or more steps"), field=min(given))


def _is_template(error: BaseException) -> bool:
    """Whether it is what chat templates (Jinja's) raise about messages."""
    return any(kind.__name__ == "TemplateError" for kind in type(error).__mro__)


def _is_ours(frames: Sequence[traceback.FrameSummary]) -> bool:
    """Whether it was our own code that raised; not so for a woven module that fails, or that lacks an attribute."""
    innermost = frames[-1] if frames else None
    if innermost is None or not innermost.filename.startswith(_OWN):
        return False
    return innermost.name not in (program.suspend.__name__, "__getattr__")


def _is_of_step(error: Exception, frames: Sequence[traceback.FrameSummary], request: DiffusionRequest) -> bool:
    """Whether the request's own noise scheduler does not take what the pipeline's loop gives its ``step``.

    That is raised in our own frame, which calls it for the pipeline.
    """
    of_step = isinstance(error, TypeError) and request.noise_scheduler is not None
    return of_step and frames[-1].name == "step" and frames[-1].filename == observed.__file__


def _culprits(
    frames: Sequence[traceback.FrameSummary], said: str, given: Mapping[str, Any], left_out: Mapping[str, None]
) -> dict[str, Any]:
    """Those of the arguments that the error names; else those in the innermost line of the pipeline that has any."""
    texts = {name: given[name] for name in _TEXTS if name in given}
    if _OF_TEXT.search(said):
        no_texts = {name: value for name, value in texts.items() if not _is_text(value)}
        return no_texts or {name: None for name in left_out if name == "prompt"}
    for text in chain.from_iterable(map(_listed, texts.values())):
        if isinstance(text, str) and len(text) > 1:
            said = said.replace(text, "")  # a prompt may speak of anything
    in_module = bool(frames) and frames[-1].name == program.suspend.__name__
    lines = [] if in_module else [_segment(frame) for frame in reversed(frames)]
    scheduled = any(map(_SCHEDULED.search, lines))
    of_schedule = {name: value for name, value in given.items() if name == "noise_scheduler" and scheduled}
    quoted = {name: None for name in _QUOTED.findall(said) if name in left_out and not _ONE_OF.search(said)}
    named = of_schedule or quoted | _names(_spelled(said, given), given)
    suspects = {name: value for name, value in given.items() if name not in texts and name not in _OWN_FIELDS}
    if "NoneType" in said:
        suspects |= left_out
    for line in lines:
        named = named or ({} if _CHECKS.search(line) else _names(line, suspects))
    if "prompt" in left_out and named.get("prompt_embeds", "") is None:
        named = {"prompt": None} | named  # which they are made of
    return named


def _names(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a text names, also with an underscore before them, and one of several."""
    found = {word.lstrip("_") for word in _WORD.findall(text)}
    words = found | {f"{word}s" for word in found}
    return {name: value for name, value in given.items() if name in words}


def _spelled(said: str, given: Mapping[str, Any]) -> str:
    """An error's words, in which arguments that it calls ``mask image`` or ``prompts`` have their names."""
    for name in sorted(given, key=len, reverse=True):
        words = re.escape((name.removeprefix("num_") if "_per_" in name else name).replace("_", " "))
        several = "" if name.endswith("s") else "s?"
        said = re.sub(rf"\b{words}{several}\b", lambda _, name=name: name, said, flags=re.IGNORECASE)
    return said


def _is_text(value: Any) -> bool:
    """Whether a tokenizer takes it: a text without lone surrogates, or a list of such."""
    return all(isinstance(one, str) and is_whole(one) for one in _listed(value))


def _listed(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _too_few_texts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Second texts that are one beside several prompts: some pipelines repeat it, others cannot join the two."""
    several = isinstance(given.get("prompt"), list) and len(given["prompt"]) > 1
    return {name: given[name] for name in _PER_PROMPT if isinstance(given.get(name), str)} if several else {}


def _uneven(given: Mapping[str, Any], *, writes: bool) -> dict[str, Any]:
    """Those of the sizes that few models take; else the length of the text, which any may bound."""
    sizes = {name: given[name] for name in _EVEN if isinstance(given.get(name), int)}
    uneven = {name: size for name, size in sizes.items() if (size - _EVEN[name][1]) % _EVEN[name][0]}
    lengths = _TO_WRITE if writes else ("max_sequence_length",)
    return uneven or {name: value for name, value in given.items() if name in lengths}


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it was raised, the innermost frame last; torch's own left out."""
    return [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]


def _segment(frame: traceback.FrameSummary) -> str:
    """The source of the expression that a frame was about; all of its line where that is not known."""
    first = frame.lineno or 0
    last = frame.end_lineno or first
    lines = [linecache.getline(frame.filename, number) for number in range(first, last + 1)]
    lines[-1] = lines[-1][: frame.end_colno]
    lines[0] = lines[0][frame.colno :]
    return "".join(lines)


def _has_shape(name: str, value: Any) -> bool:
    """Whether a value is a tensor or an array, or holds some."""
    return any(shape_of(leaf) is not None for leaf in leaves(name, value))


def _told(given: Mapping[str, Any], words: str) -> str:
    """``strength=0, sigmas=[1.0, 0.5]: `` and the words; these alone if nothing is suspect."""
    named = ", ".join(f"{name}={brief(value)}" for name, value in sorted(given.items()))
    return f"{named}: {words}" if named else words
