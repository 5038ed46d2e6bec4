"""``steploom serve`` with a probe in its process, for ``benchmarks/server.py``."""

from __future__ import annotations

import asyncio
import collections
import statistics
import sys
import time
from typing import Any

BEAT_S = 0.005


class Probe:
    """How late the event loop is, and who had which tick. Its routes are beside the server's own."""

    def __init__(self, engine: Any) -> None:
        from steploom import EngineObserver

        self.engine = engine
        self.lags: list[float] = []
        self.ticks: collections.deque[tuple[float, float, frozenset[str]]] = collections.deque(maxlen=4000)
        self.users: dict[str, str] = {}
        self.due: float | None = None
        probe = self

        class Observer(EngineObserver):
            def on_queued(self, request: Any) -> None:
                probe.users[request.request_id] = str(request.user)

            def on_tick(self, output: Any, result: Any, began: float, ended: float) -> None:
                names = {probe.users.get(run.rpartition("#")[0], "") for run in output.run_ids}
                probe.ticks.append((began, ended, frozenset(names)))

        engine.observers.append(Observer())

    def beat(self) -> None:
        now = time.monotonic()  # the loop's own clock stands still while it is late
        if self.due is not None:
            self.lags.append(max(0.0, now - self.due))
        self.due = now + BEAT_S
        asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    async def lag(self, _: Any) -> Any:
        """What was late since the last time."""
        from starlette.responses import JSONResponse

        if self.due is None:
            self.beat()
        found, self.lags = sorted(self.lags), []
        if not found:
            return JSONResponse({})
        cuts = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return JSONResponse(
            {name: 1000 * found[min(len(found) - 1, int(cut * len(found)))] for name, cut in cuts.items()}
        )

    async def last_ticks(self, request: Any) -> Any:
        """The ticks of a user's requests after a moment, and how long ticks take."""
        from starlette.responses import JSONResponse

        user, since = request.query_params["user"], float(request.query_params["since"])
        while sum(began > since for began, _, _ in self.ticks) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        late = [(began, ended) for began, ended, users in self.ticks if ended > since and user in users]
        return JSONResponse({
            "freed_s": max((ended - since for _, ended in late), default=0.0),
            "begun_after": sum(began > since for began, _ in late),
            "tick_s": statistics.median(ended - began for began, ended, _ in list(self.ticks)[-40:]),
        })  # fmt: skip

    async def between(self, request: Any) -> Any:
        """How many ticks have ended between two moments."""
        from starlette.responses import JSONResponse

        since, until = (float(request.query_params[name]) for name in ("since", "until"))
        return JSONResponse(sum(since < ended <= until for _, ended, _ in self.ticks))

    async def direct(self, request: Any) -> Any:
        """Many requests at once, without HTTP."""
        from starlette.responses import JSONResponse

        asked = await request.json()
        started = time.perf_counter()
        outputs = await asyncio.gather(*(self.engine.generate(**one) for one in asked))
        seconds = time.perf_counter() - started
        encode = statistics.median(out.timings.encode_s for out in outputs)
        return JSONResponse({"seconds": seconds, "encode_s": encode})


def serve(arguments: list[str]) -> int:
    """``steploom serve`` with the probe in it."""
    from starlette.routing import Route

    import steploom.server
    from steploom.cli.main import main as steploom_main

    made = steploom.server.create_app

    def create_app(engine: Any, *settings: Any) -> Any:
        app, probe = made(engine, *settings), Probe(engine)
        app.router.routes += [
            Route("/probe/lag", probe.lag),
            Route("/probe/ticks", probe.last_ticks),
            Route("/probe/between", probe.between),
            Route("/probe/direct", probe.direct, methods=["POST"]),
        ]
        return app

    steploom.server.create_app = create_app
    return steploom_main(["serve", "--port", "0", *arguments])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
