"""What a pipeline's loop does with its noise scheduler, read from its source, and whether another one can follow it.

Loops differ in how they tell a noise scheduler its steps (``sigmas=``, ``mu=``), and in what else of it they use
(``scale_noise``, ``config.sigma_max``). Only what every call comes to counts: nothing within a branch,
but for those that ask which class the noise scheduler is of: the classes that they name go as they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from steploom.weave import signatures, source_code, untyped

_STEPS = 4
_FALLING = np.linspace(1.0, 1 / _STEPS, _STEPS)
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
_OWNER = "self.scheduler."
_NAMED = "isinstance(self.scheduler, "
_IN_ORDER = ("scheduler", "num_inference_steps", "device", "timesteps", "sigmas")
"""What ``retrieve_timesteps`` takes."""
_GUARDED = (ast.If, ast.IfExp, ast.Try)
_ASIDE = (ast.FunctionDef, ast.Lambda)


class Loop(NamedTuple):
    """What a pipeline's code does with ``self.scheduler``, whichever it is.

    Attributes:
        reads: The attributes that it uses; those of the configuration begin with ``config.``.
        steps: The keywords of each call of ``step``.
        tell: Tells a noise scheduler its steps as the loop does.
        tells: With which keywords; where that is not known, in ways of which one must do.
        knows_flows: Whether it gives no ``sigmas`` to one that has ``use_flow_sigmas``.
    """

    reads: frozenset[str]
    steps: list[set[str]]
    tell: Callable[..., Any]
    tells: list[dict[str, Any]]
    knows_flows: bool


@functools.lru_cache(maxsize=64)
def loop_of(cls: type) -> Loop | None:
    """The loop of a pipeline class; None where its source cannot be read."""
    main = source_code.function(cls, "__call__")
    if main is None:
        return None
    bodies = _bodies(cls, main)
    calls = [node for node in _always(main) if isinstance(node, ast.Call)]
    named = {name: [call for call in calls if ast.unparse(call.func) == name]
             for name in ("retrieve_timesteps", f"{_OWNER}set_timesteps", f"{_OWNER}step")}  # fmt: skip
    steps = [{str(word.arg) for word in call.keywords if word.arg} for call in named[f"{_OWNER}step"]]
    retrieving, setting = named["retrieve_timesteps"], named[f"{_OWNER}set_timesteps"]
    tell = inspect.unwrap(cls.__call__).__globals__.get("retrieve_timesteps") if retrieving else None
    told = (retrieving or setting)[0] if len(retrieving or setting) == 1 else None
    tells = [{}, {"mu": 1.0}, {"sigmas": _FALLING.tolist()}] if told is None else _tells(told, main)
    reads = {read for body in bodies for read in _reads(body)}
    return Loop(frozenset(reads), steps, tell or _set_timesteps, tells, "use_flow_sigmas" in ast.unparse(main))


def fault(loop: Loop, noise_scheduler: Any, base: Any = None) -> str | None:
    """Why a loop cannot call a noise scheduler; None if it can.

    Args:
        loop: Of the pipeline.
        noise_scheduler: One that nobody uses: its steps are set.
        base: The pipeline's own, which has what the loop reads.
    """
    wanted = [keywords - set(signatures.parameters_of(noise_scheduler.step)) for keywords in loop.steps]
    if wanted and all(wanted):
        return f"its step() takes no {', '.join(sorted(wanted[0]))}"
    why = _untold(loop, noise_scheduler)
    if why is not None:
        return f"it cannot be told its steps as the pipeline does ({why})"
    for path in sorted(loop.reads):
        where, own = noise_scheduler, base
        for name in path.split("."):
            if not hasattr(where, name):
                return f"it has no {path}"
            where, own = getattr(where, name), getattr(own, name, None)
        if where is None and own is not None and path.startswith("config."):
            return f"its {path} is None"
    return None


def _untold(loop: Loop, noise_scheduler: Any) -> str | None:
    """What it says where none of the ways to tell it its steps will do."""
    why = None
    for keywords in loop.tells:
        without = loop.knows_flows and getattr(noise_scheduler.config, "use_flow_sigmas", False)
        given = {name: value for name, value in keywords.items() if name != "sigmas" or not without}
        try:
            with torch.random.fork_rng(devices=[]), untyped.quietly():
                loop.tell(noise_scheduler, _STEPS, "cpu", **given)
        except _FAULTS as error:
            why = " ".join(str(error).split())
        else:
            return None
    return why


def _set_timesteps(noise_scheduler: Any, steps: int, device: str, **keywords: Any) -> None:
    device_too = {"device": device} if "device" in signatures.parameters_of(noise_scheduler.set_timesteps) else {}
    noise_scheduler.set_timesteps(steps, **device_too, **keywords)


def _bodies(cls: type, main: ast.FunctionDef) -> list[ast.FunctionDef]:
    """The source of ``__call__``, and of the pipeline's own methods that are called in any case."""
    bodies, names = [main], ["__call__"]
    for body in bodies:  # grows
        called = (ast.unparse(node.func) for node in _always(body) if isinstance(node, ast.Call))
        for name in (name.removeprefix("self.") for name in called if name.startswith("self.")):
            found = None
            if name not in names and name.isidentifier() and not hasattr(untyped.PIPELINE, name):
                found = source_code.function(cls, name)
            if found is not None:
                names.append(name)
                bodies.append(found)
    return bodies


def _always(body: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function that are not within a branch, nor behind an ``and`` or ``or``."""
    for name, value in ast.iter_fields(body):
        if isinstance(body, _GUARDED) and name not in ("test", _taken(body)):
            continue
        nodes: list[Any] = value if isinstance(value, list) else [value]
        for node in nodes[:1] if isinstance(body, ast.BoolOp) else nodes:
            if isinstance(node, ast.AST) and not isinstance(node, _ASIDE):
                yield node
                yield from _always(node)


def _taken(branch: ast.AST) -> str:
    """The part of a branch that is for who gives no latents, or for noise schedulers that no name is asked for."""
    test = ast.unparse(branch.test) if isinstance(branch, ast.If) else ""
    if test == "latents is None" or test.startswith(f"not {_NAMED}"):
        return "body"
    return "orelse" if test.startswith(_NAMED) else ""


def _reads(body: ast.AST) -> Iterator[str]:
    for node in _always(body):
        path = ast.unparse(node) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else ""
        read = path.removeprefix(_OWNER).split(".")
        if path.startswith(_OWNER) and all(name.isidentifier() for name in read):
            if read[0] != "config":
                yield read[0]
            elif len(read) > 1 and read[1] != "get":
                yield f"config.{read[1]}"


def _tells(call: ast.Call, main: ast.FunctionDef) -> list[dict[str, Any]]:
    """What is given to ``retrieve_timesteps`` or ``set_timesteps`` in any case, with values of that kind."""
    given = {**dict(zip(_IN_ORDER, call.args, strict=False)), **{word.arg: word.value for word in call.keywords}}
    if ast.unparse(call.func) != "retrieve_timesteps":  # whose others come by name
        given = {word.arg: word.value for word in call.keywords}
    tells: dict[str, Any] = {name: None for name in given if name is not None and name not in (*_IN_ORDER, "mu")}
    if isinstance(given.get("sigmas"), ast.Name):
        made = [value for names, value, _ in source_code.assignments(main) if names == {"sigmas"}]
        text = " ".join(map(ast.unparse, made))
        if any(sign in text for sign in "(["):  # it makes some where none are given
            tells["sigmas"] = _FALLING if "np." in text and "tolist" not in text else _FALLING.tolist()
        elif "timesteps /" in text and "timesteps" in given:  # CogView4 makes both, in numpy
            tells.update(timesteps=1000 * _FALLING, sigmas=_FALLING)
    with_mu, others = {**tells, "mu": 1.0}, given.get(None)
    kept = [value for names, value, _ in source_code.assignments(main) if others and names == source_code.names(others)]
    if "mu" in given or any("'mu'" in ast.unparse(value) for value in kept):
        return [with_mu]
    return [tells] if others is None else [tells, with_mu]
