"""What is sent to hurt the server is refused before any work; whoever may not come in, does not."""

from __future__ import annotations

import base64
import contextlib
import socket
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import anyio
import hostile
import httpx2
import pytest
from PIL import Image
from serving import file_of, listening

from steploom.server import create_app
from steploom.testing import FakeEngine

LIMIT = 1 << 20
WHOLE = file_of(Image.new("RGB", (16, 16)))


@contextlib.asynccontextmanager
async def plain(**settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    limits = settings.pop("engine", {})
    async with (
        FakeEngine(**limits) as engine,
        listening(create_app(engine, **settings)) as address,
        httpx2.AsyncClient(base_url=address) as client,
    ):
        yield client


@pytest.mark.slow
async def test_pictures_that_would_fill_the_memory_are_refused() -> None:
    async with plain() as client:
        for name, data in hostile.FILES.items():
            for files in ({"image": data}, {"image": WHOLE, "mask": data}):
                answer = await client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
                assert answer.status_code == 400, (name, answer.text)
                assert answer.json()["error"]["param"] == ("mask" if "mask" in files else "image")
        answer = await client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": hostile.ENDLESS})
        assert answer.status_code == 200  # of which no more is read
        many = [("image", ("a.png", file_of(Image.new("L", (1000, 1000))))) for _ in range(5)]
        assert (await client.post("/v1/images/edits", data={"prompt": "a"}, files=many)).status_code == 200
    async with plain(engine={"max_pixels": 1_000_000}) as client:
        answer = await client.post("/v1/images/edits", data={"prompt": "a"}, files=many)
        assert "together" in answer.json()["error"]["message"]


async def test_no_address_is_fetched_and_no_path_read() -> None:
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.setblocking(False)
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        async with plain() as client:
            for image in (address, "file:///etc/passwd", "/etc/passwd", "/etc/passwd0", {"image_url": address},
                          [{"image_url": {"url": "file:///etc/passwd"}}], "ftp://127.0.0.1/a"):  # fmt: skip
                answer = await client.post("/v1/images/edits", json={"prompt": "a", "image": image})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image"), image
                assert "root:" not in answer.text
            for lora in ("/etc/passwd", "owner/name", {"name": address}):
                answer = await client.post("/v1/images/generations", json={"prompt": "a", "lora": lora})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora")
            data = f"data:image/png;base64,{base64.b64encode(WHOLE).decode()}"
            assert (await client.post("/v1/images/edits", json={"prompt": "a", "image": data})).status_code == 200
        with pytest.raises(BlockingIOError):
            trap.accept()


def form(*parts: tuple[str, str, bytes]) -> bytes:
    lines = [b'--X\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), more.encode(), value)
             for name, more, value in parts]  # fmt: skip
    return b"".join([*lines, b"--X--\r\n"])


async def test_bodies_that_go_on_are_refused() -> None:
    kinds = {"json": "application/json", "form": "multipart/form-data; boundary=X",
             "text": "application/x-www-form-urlencoded"}  # fmt: skip
    bodies = [
        ("form", form(*[(f"f{place}", "", b"x") for place in range(3000)]), 400),
        ("form", form(*[("image", '; filename="x"', b"x") for _ in range(3000)]), 400),
        ("form", b"--X\r\nA: " + b"a" * (LIMIT // 2) + b"\r\n\r\nx\r\n--X--\r\n", 400),
        ("form", b"--X\r\n" + b"A: a\r\n" * 10_000 + b"\r\nx\r\n--X--\r\n", 400),
        ("form", form(("prompt", "", b"a" * (LIMIT // 2))), 400),
        ("form", b"--Y\r\n", 400),
        ("text", b"&".join(b"f%d=1" % place for place in range(3000)), 400),
        ("json", b'{"prompt": "a", "lora": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        ("json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        ("json", b'{"prompt": "a", "lora": [' + b"1," * 300_000 + b"1]}", 400),
        ("json", b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", 400),
        ("json", b'{"prompt": "\xff"}', 400),
        ("json", b"a" * (LIMIT + 1), 413),
    ]
    async with plain(max_body_bytes=LIMIT) as client:
        for kind, body, status in bodies:
            for route in ("generations", "edits"):
                head = {"content-type": kinds[kind], "idempotency-key": "k"}
                answer = await client.post(f"/v1/images/{route}", content=body, headers=head)
                assert answer.status_code == status, (kind, body[:40], answer.text)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                assert (b"1,1,1" in body) == ("200000 values" in answer.text)  # not even decoded


async def test_what_asks_for_too_much_is_refused_before_any_work() -> None:
    async with plain(max_images=2, engine={"max_steps": 20, "max_pixels": 64 * 64}) as client:
        for name, value, param in (("n", 3, "n"), ("num_inference_steps", 21, None), ("size", "64x72", None),
                                   ("width", 6400, "width"), ("prompt", "a" * 40_000, "prompt")):  # fmt: skip
            answer = await client.post("/v1/images/generations", json={"prompt": "a", name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param or name), answer.text
        assert (await client.get("/v1/requests")).json()["data"] == []


async def raw(client: httpx2.AsyncClient, request: bytes) -> bytes:
    """The answer to a request as it stands, until the server closes the connection."""
    host, port = urllib.parse.urlsplit(str(client.base_url)).netloc.split(":")
    async with await anyio.connect_tcp(host, int(port)) as stream:
        await stream.send(request)
        return b"".join([part async for part in stream])


async def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    async with plain(body_timeout_s=0.05) as client:
        answer = await raw(client, b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in answer
        assert (await client.post("/v1/images/generations", json={"prompt": "a"})).status_code == 200


async def test_keys_may_be_any_bytes() -> None:
    async with plain(api_keys=("right", "schlüssel")) as client:
        for given, status in ((b"Bearer \xff\xfe", 401), (b"\xe9", 401), (b"", 401), (b"Bearer", 401),
                              (b"Basic right", 401), (b"bearer  right", 200),
                              ("Bearer schlüssel".encode(), 200)):  # fmt: skip
            answer = await client.get("/v1/models", headers=[(b"authorization", given)])
            assert answer.status_code == status, given
        for path in ("/v1/models", "/v1/images/generations", "/v1/requests", "/v1/nothing", "/v1/models/demo"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/live")).status_code == 200


async def test_pages_of_others_may_not_use_it() -> None:
    evil = {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}
    own = {"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}
    async with plain() as client:
        asked = {"data": {"prompt": "a"}}
        refused = await client.post("/v1/images/generations", headers=evil, **asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert (await client.post("/v1/images/generations", headers=own, **asked)).status_code == 200
        answer = await client.get("/v1/models", headers=evil)
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        preflight = await client.options("/v1/models", headers={**evil, "access-control-request-method": "GET"})
        assert preflight.status_code == 405
    async with plain(cors_origins=("http://evil.example",)) as client:
        allowed = await client.post("/v1/images/generations", headers=evil, **asked)
        assert allowed.headers["access-control-allow-origin"] == "http://evil.example"


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://evil.example", "192.168.1.5:8000", 403),
        ("http://192.168.1.5:9000", "192.168.1.5:8000", 403),
        ("null", "192.168.1.5:8000", 403),
        ("http://192.168.1.5:8000", "192.168.1.5:8000", 200),
        ("http://box", "Box:80", 200),
        ("https://box", "box", 200),
    ],
)
async def test_pages_are_known_where_browsers_send_no_site(origin: str, host: str, status: int) -> None:
    """As in a network at home: plain HTTP, at another machine than the browser's."""
    async with plain() as client:
        headers = {"origin": origin, "host": host}
        answer = await client.post("/v1/images/generations", headers=headers, data={"prompt": "a"})
        assert answer.status_code == status


async def test_methods_are_what_http_says() -> None:
    async with plain() as client:
        for path in ("/live", "/ready", "/health", "/v1/models"):
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert (await client.request("BREW", path)).status_code == 405
        answer = await client.get("/v1/images/generations")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_previews_can_be_off() -> None:
    async with plain(previews=False) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "a", "stream": True, "partial_images": 3})
        kinds = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event:")]
        assert kinds == ["image_generation.completed"]


async def test_paths_do_not_lead_around_the_key() -> None:
    async with plain(api_keys=("k",)) as client:
        for path in ("//v1/models", "/v1//models", "/V1/models", "/%76%31/models", "/./v1/models", "/x/../v1/models",
                     "/v1/images/stored/../../models", "/v1/images/stored/%2e%2e/%2e%2e/models"):  # fmt: skip
            answer = await raw(client, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            assert answer.split()[1] in (b"401", b"404"), path
            assert b'"owned_by"' not in answer
