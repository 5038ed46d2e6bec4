"""Where a request is meant to go, whoever has put the server there: hosts, and proxies that strip a prefix or not."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from starlette.routing import Match, Mount
from starlette.types import Scope

UNMATCHED = "unmatched"
"""The route of what fits none."""


def place(scope: Scope) -> tuple[Scope, str]:
    """``scope`` with the path that our routes expect, and the path of its route as that is declared.

    Servers put their ``root_path`` before every path, as if the proxy had stripped it; one that has not is served too.
    """
    scope = _whole(_mounted(scope))
    route = route_of(scope)
    root = scope.get("root_path", "").rstrip("/")
    if route == UNMATCHED and root and scope["path"].startswith(f"{root}{root}/"):
        again = {**scope, "path": scope["path"][len(root) :]}
        if (found := route_of(again)) != UNMATCHED:
            return again, found
    return scope, route


def _mounted(scope: Scope) -> Scope:
    """``scope`` without a slash at its end. Litestar mounts with one, and says not where: the client does."""
    path, root = scope["path"], scope.get("root_path", "")
    if not path.endswith("/") or path in ("/", f"{root}/"):
        return scope
    path = path.rstrip("/")
    sent = unquote(scope.get("raw_path") or b"").rstrip("/")
    above = sent.removesuffix(path) if not root and sent.endswith(path) else ""
    return {**scope, "path": above + path, "root_path": root + above}


def _whole(scope: Scope) -> Scope:
    """``scope`` with the whole path: a host behind a proxy that strips its prefix mounts us with a path without it."""
    root, above = scope.get("root_path", ""), scope.get("app_root_path", "")
    if scope["path"].startswith(root) or not scope["path"].startswith(root.removeprefix(above)):
        return scope
    return {**scope, "path": above + scope["path"]}


def route_path(scope: Scope) -> str:
    """The path that routes are matched with; exactly as Starlette has it, or who is let in were not who is served."""
    path, root = scope["path"], scope.get("root_path", "")
    below = path[len(root) :] if path.startswith(root) else path
    return below if below.startswith("/") or path == root else path


def route_of(scope: Scope) -> str:
    """The path of the route that serves ``scope``, as it is declared: with names of parameters for their values."""
    for route in scope["app"].routes:
        path: Any = getattr(route, "path", None)
        if path is not None and route.matches(scope)[0] != Match.NONE:
            return f"{path}/*" if isinstance(route, Mount) else path
    return UNMATCHED
