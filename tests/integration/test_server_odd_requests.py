"""What no client should send: the answer is always the error object, it names the field, and nothing breaks."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from PIL import Image
from serving import file_of

from steploom.server import create_app
from steploom.testing import FakeEngine

IMAGES = "/v1/images/generations"
EDITS = "/v1/images/edits"
PNG = file_of(Image.new("RGB", (8, 8)))
WHOLE = base64.b64encode(PNG).decode()
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}


@contextlib.asynccontextmanager
async def client_of(**settings: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application itself: what a test cannot send to it, nobody can."""
    async with FakeEngine() as engine:
        transport = httpx2.ASGITransport(create_app(engine, **settings), raise_app_exceptions=True)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client


def check(answer: httpx2.Response, status: int, param: str | None, sent: object) -> None:
    assert answer.status_code == status, (sent, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, (sent, error)
    assert error["message"]
    assert len(error["message"]) < 1000
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


ODD_JSON = [
    (b"", None), (b"null", None), (b"[]", None), (b'"a"', None), (b"{", None), (b"{}", "prompt"), (b"\xff\xfe", None),
    (b'{"prompt": NaN}', None), (b'{"prompt": "a", "guidance_scale": NaN}', None),
    (b'{"prompt": "a", "guidance_scale": -Infinity}', None),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
    (b'{"prompt": "a", "guidance_scale": 1%s}' % (b"0" * 400), "guidance_scale"),
    (b'{"prompt": "a", "timeout": 1%s}' % (b"0" * 400), "timeout"),
    (b'{"prompt": "a", "timeout": -0.0}', "timeout"),
    (b'{"prompt": "a", "seed": 1%s}' % (b"0" * 4000), "seed"),
    (b'{"prompt": "a", "seed": 1%s}' % (b"0" * 5000), None),
    (b'{"prompt": "a", "num_inference_steps": 1%s}' % (b"0" * 400), "num_inference_steps"),
    (b'{"prompt": "a", "width": 1%s}' % (b"0" * 400), "width"), (b'{"prompt": "a", "n": 1e300}', "n"),
    (b'{"prompt": "a", "n": "1"}', "n"), (b'{"prompt": "a", "stream": "true"}', "stream"),
    (b'{"prompt": "a", "guidance_scale": "1.5"}', "guidance_scale"), (b'{"prompt": "a", "n": {"a": 1}}', "n"),
    (b'{"prompt": "\\ud800"}', "prompt"), (b'{"prompt": "a", "user": "\\udfff"}', "user"),
    (b'{"prompt": "a", "\\ud800": 1}', "\\ud800"), (b'{"prompt": "a", "style": {"\\ud800": 1}}', "style"),
    (b'{"prompt": "\xed\xa0\x80"}', None), (b'{"prompt": "a", "lora": ["\\ud800"]}', "lora"),
    (b'{"prompt": "a", "lora": %s}' % deep(500).encode(), "lora"), (deep(200_000).encode(), None),
    (b'{"prompt": "a", "quality": %s}' % deep(900).encode(), "quality"),
    (b'{"prompt": "a", "style": {"a": %s}}' % deep(40).encode(), "style"),
    (b'{"prompt": "a", "lora": [1, 2]}', "lora"), (b'{"prompt": "a", "lora": ["ink", 1e999]}', "lora"),
    (b'{"prompt": "a", "lora": {"name": "ink", "scale": true}}', "lora"), (b'{"prompt": "a", "seedx": null}', "seedx"),
    (b'{"prompt": "a", "": 1}', ""), (b'{"prompt": "a", "size": "64X64"}', "size"),
    (b'{"prompt": "a", "size": "64x64\\n"}', "size"), (b'{"prompt": "a", "size": "\xef\xbc\x91x64"}', "size"),
    (b'{"prompt": "a", "prompt": ""}', "prompt"), (b'{"prompt": "a", "mask": "x"}', "mask"),
    (b'{"prompt": "a", "%s": 1}' % (b"y" * 100_000), "y" * 80),
]  # fmt: skip


async def test_odd_json() -> None:
    async with client_of() as client:
        for body, param in ODD_JSON:
            check(await client.post(IMAGES, content=body, headers=JSON), 400, param or None, body[:80])


ODD_PICTURES = [
    ({"image": 1}, "image"), ({"image": []}, "image"), ({"image": ["?"]}, "image"), ({"image": [None]}, "image"),
    ({"image": {"file_id": "f"}}, "image"), ({"image": {"image_url": None}}, "image"), ({"image": ""}, "image"),
    ({"image": "data:image/png;base64,"}, "image"), ({"image": "file:///etc/passwd"}, "image"),
    ({"image": "é"}, "image"), ({"image": ["QUJD"] * 17}, "image"), ({"image": "QUJD"}, "image"),
    ({"images": [{"image_url": {"url": 5}}]}, "images"), ({"image": WHOLE, "mask": "QUJD"}, "mask"),
    ({"image": "QUJD", "mask": ["QUJD", "QUJD"]}, "mask"), ({"image": None}, "image"),
]  # fmt: skip


async def test_odd_pictures() -> None:
    async with client_of() as client:
        for body, param in ODD_PICTURES:
            check(await client.post(EDITS, json={"prompt": "a", **body}), 400, param, body)


def part(name: str | None, data: bytes = b"a", more: str = "", kind: str = "") -> bytes:
    said = "" if name is None else f'; name="{name}"'
    head = f"--x\r\nContent-Disposition: form-data{said}{more}\r\n{kind}\r\n".encode()
    return head + data + b"\r\n"


END = b"--x--\r\n"
ODD_FORMS = [
    (IMAGES, part("prompt") + part("n", b"two") + END, 400, "n"),
    (IMAGES, part("prompt") + part("n", b"1.5") + END, 400, "n"),
    (IMAGES, part("prompt") + part("n", b"1") + part("n", b"1") + END, 400, "n"),
    (IMAGES, part("prompt") + part("n", b"9" * 5000) + END, 400, "n"),
    (IMAGES, part("prompt") + part("stream", b"maybe") + END, 400, "stream"),
    (IMAGES, part("prompt") + part("guidance_scale", b"nan") + END, 400, "guidance_scale"),
    (IMAGES, part("prompt") + part("guidance_scale", b"") + END, 400, "guidance_scale"),
    (IMAGES, part("prompt") + part("lora", b"[" * 100_000) + END, 400, "lora"),
    (IMAGES, part("prompt") + part("lora", b'{"name": 1}') + END, 400, "lora"),
    (IMAGES, part("prompt", more='; filename="p.txt"') + END, 400, "prompt"),
    (IMAGES, part("prompt", b"\xff\xfe") + part("nope") + END, 400, "nope"),
    (IMAGES, part("prompt", b"") + END, 400, "prompt"),
    (IMAGES, part("prompt") + part("prompt[]") + END, 400, "prompt"),
    (IMAGES, part("prompt") + part("image", PNG, '; filename="a.png"') + END, 400, "image"),
    (EDITS, part("prompt") + END, 400, "image"),
    (EDITS, part("prompt") + part("image", b"", '; filename="a.png"') + END, 400, "image"),
    (EDITS, part("prompt") + part("image", b"", '; filename=""') + END, 400, "image"),
    (EDITS, part("prompt") + part("image", b"junk", '; filename="a.png"') + END, 400, "image"),
    (EDITS, part("prompt") + part("image[]", PNG, '; filename="a"') * 17 + END, 400, "image"),
    (EDITS, part("prompt") + part("image[]", PNG, '; filename="a"') * 40 + END, 400, None),
    (EDITS, part("prompt") * 200 + END, 400, None),
    (EDITS, part("prompt") + part("image", PNG, '; filename="a"') + part("mask", b"no", '; filename="m"') + END,
     400, "mask"),
    (IMAGES, part(None) + END, 400, None),
    (IMAGES, b"--y\r\n\r\n", 400, None),
    (IMAGES, b"", 400, "prompt"),
    (IMAGES, part("prompt")[:-4], 400, "prompt"),
]  # fmt: skip


async def test_odd_forms() -> None:
    async with client_of() as client:
        for path, body, status, param in ODD_FORMS:
            check(await client.post(path, content=body, headers=FORM), status, param, body[:200])
        for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\xff"):
            answer = await client.post(
                IMAGES, content=part("prompt") + END, headers={"content-type": kind.encode("latin-1")}
            )
            check(answer, 400, None, kind)
        for charset in ("nonsense", "utf-7", "utf-16", "rot13", "idna", "unicode_escape", "hex"):
            kind = f"multipart/form-data; boundary=x; charset={charset}"
            body = part("prompt", b"+2AA- \\ud800 \xff") + END
            answer = await client.post(IMAGES, content=body, headers={"content-type": kind})
            assert answer.status_code in (200, 400), (charset, answer.text)
        urlencoded = {"content-type": "application/x-www-form-urlencoded"}
        for body, param in (("prompt=a&n=x", "n"), ("n=1", "prompt"), ("prompt=%ff&=1", None), ("&&&=&;", None)):
            check(await client.post(IMAGES, content=body, headers=urlencoded), 400, param, body)


async def test_forms_say_everything_as_text() -> None:
    fields = {"prompt": "a", "n": "2", "stream": "FALSE", "guidance_scale": "1.5", "seed": "-1", "size": "auto",
              "num_inference_steps": "2", "timeout": "20", "priority": "0", "partial_images": "0"}  # fmt: skip
    async with client_of() as client:
        for sent in ({"data": fields}, {"files": {name: (None, value) for name, value in fields.items()}}):
            answer = await client.post(IMAGES, **sent)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["data"]) == 2
        answer = await client.post(EDITS, data={"prompt": "a", "n": "1"}, files=[("image[]", PNG), ("image[]", PNG)])
        assert answer.status_code == 200, answer.text


ODD_HEADERS = [
    ({"authorization": b"Bearer \xc3\xa9\xff"}, 401), ({"authorization": b"\xff"}, 401), ({"authorization": b""}, 401),
    ({"authorization": b"Bearer"}, 401), ({"authorization": b"Basic k"}, 401), ({}, 401),
    ({"authorization": b"bearer  k"}, 200), ({"authorization": "Bearer schlüssel".encode()}, 200),
    ({"authorization": b"Bearer k", "x-request-id": b"r" * 10_000}, 200),
    ({"authorization": b"Bearer k", "x-request-id": b"\xff\x01"}, 200),
    ({"authorization": b"Bearer k", "x-request-id": b""}, 200),
    ({"authorization": b"Bearer k", "idempotency-key": b"\xff" * 5000}, 200),
    ({"authorization": b"Bearer k", "content-type": b"text/plain"}, 415),
    ({"authorization": b"Bearer k", "content-type": b"\xff/\xff"}, 415),
    ({"authorization": b"Bearer k", "content-length": b"9" * 5000}, 413),
    ({"authorization": b"Bearer k", "content-length": b"-1"}, 200),
    ({"authorization": b"Bearer k", "host": b"\xff:99999"}, 200),
]  # fmt: skip


async def test_odd_headers() -> None:
    async with client_of(api_keys=("k", "schlüssel")) as client:
        for headers, status in ODD_HEADERS:
            sent = {**JSON, **headers}
            body = b'{"prompt": "a", "num_inference_steps": 1, "response_format": "url"}'
            answer = await client.post(IMAGES, content=body, headers=sent)
            assert 1 <= len(answer.headers["x-request-id"]) <= 128
            if status == 200:
                assert answer.status_code == 200, (headers, answer.text)
            else:
                check(answer, status, None, headers)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "TRACE", "OPTIONS", "FOO"])
async def test_methods_that_a_path_has_not(method: str) -> None:
    async with client_of() as client:
        answer = await client.request(method, IMAGES)
        check(answer, 405, None, method)
        assert answer.headers["allow"] == "POST"
        if method != "GET":
            answer = await client.request(method, "/v1/requests/x")
            check(answer, 405, None, method)
            assert answer.headers["allow"] == "DELETE, GET, HEAD"


async def test_paths_that_are_not_there() -> None:
    async with client_of() as client:
        for path in ("/v1/nothing", "/v1/models/%F0%9F%92%A9", "/v1/models/a%2Fb",
                     "/v1/requests/%00", "/v1/requests/" + "x" * 5000, "/v1/images/stored/..%2f..%2fetc", "/v1//",
                     "/v1/models/%ed%a0%80", "/v1/images/edits/x"):  # fmt: skip
            answer = await client.get(path)
            check(answer, 404, "model" if "models" in path else None, path)


async def test_what_a_retry_key_stands_for() -> None:
    async with client_of() as client:
        key = {"idempotency-key": "k"}
        assert (await client.post(IMAGES, json={"prompt": "a"}, headers=key)).status_code == 200
        check(await client.post(IMAGES, json={"prompt": "b"}, headers=key), 422, None, "b")
        check(await client.post(IMAGES, content=json.dumps({"prompt": ["a"]}), headers=key), 422, None, "list")
