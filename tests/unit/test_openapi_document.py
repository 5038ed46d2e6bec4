"""The OpenAPI document says what the tables of fields and the routes say, neither more nor less."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from steploom.server import create_app
from steploom.server.errors import ApiError
from steploom.server.fields import ANSWER, IGNORED, IMPOSSIBLE, OPENAI, OWN, PARAMS, SIZES, known_fields
from steploom.server.kinds import FormText
from steploom.server.openapi import as_json, component, document, operation
from steploom.server.text.fields import PARAMS as PARAMS_OF_TEXT
from steploom.server.text.fields import _known
from steploom.server.videos.fields import IMPOSSIBLE as IMPOSSIBLE_OF_VIDEOS
from steploom.server.videos.fields import known_fields as known_fields_of_videos
from steploom.testing import FakeEngine

FIELDS = {*OPENAI, *ANSWER, *OWN, *PARAMS, *SIZES, *IGNORED}


@pytest.fixture
def app() -> Starlette:
    return create_app(FakeEngine(max_steps=77), max_images=5, max_prompt_chars=99, api_keys=("k",))


def described(app: Starlette) -> dict[str, Any]:
    return document(app.routes, app.state.server)


def body_of(found: dict[str, Any], what: str, kind: str = "application/json") -> dict[str, Any]:
    return found["paths"][f"/v1/images/{what}"]["post"]["requestBody"]["content"][kind]["schema"]


def test_every_route_is_in_it_with_all_its_methods(app: Starlette) -> None:
    entries = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in app.routes
        if isinstance(route, Route) and route.include_in_schema
        for method in route.methods or ()
        if method != "HEAD"
    }
    paths = described(app)["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == entries
    identifiers = [entry["operationId"] for methods in paths.values() for entry in methods.values()]
    assert len(set(identifiers)) == len(identifiers)
    for methods in paths.values():
        for entry in methods.values():
            assert entry["summary"]
            assert {"400", "500"} < set(entry["responses"])


def test_every_field_that_is_read_is_in_it_and_no_other(app: Starlette) -> None:
    found = described(app)
    generations, edits = body_of(found, "generations"), body_of(found, "edits")
    assert set(generations["properties"]) == FIELDS | set(IMPOSSIBLE)
    assert set(edits["properties"]) == FIELDS | set(IMPOSSIBLE)
    assert set(body_of(found, "generations", "multipart/form-data")["properties"]) == FIELDS
    assert set(body_of(found, "edits", "multipart/form-data")["properties"]) == FIELDS | {"image", "image[]", "mask"}
    for body in (generations, edits):
        assert body["required"] == ["prompt"]
        assert body["additionalProperties"] is False
    for name in set(IMPOSSIBLE) - {"image", "images", "mask"}:
        assert edits["properties"][name]["type"] == "null"


def test_bounds_are_those_of_the_server(app: Starlette) -> None:
    fields = body_of(described(app), "generations", "multipart/form-data")["properties"]
    assert (fields["prompt"]["minLength"], fields["prompt"]["maxLength"]) == (1, 99)
    assert (fields["n"]["minimum"], fields["n"]["maximum"]) == (1, 5)
    assert fields["num_inference_steps"]["maximum"] == 77
    assert fields["output_format"]["enum"] == ["png", "webp", "jpeg"]
    assert fields["stream"]["type"] == "boolean"


@pytest.mark.parametrize("chat", [False, True])
def test_every_field_of_text_is_in_it_and_no_other(app: Starlette, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = described(app)["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == _known(chat=chat)
    assert body["required"] == ["messages" if chat else "prompt"]
    for name in PARAMS_OF_TEXT:
        assert body["properties"][name]["anyOf"][0]["type"]


def test_every_field_of_videos_is_in_it_and_no_other(app: Starlette) -> None:
    for path in ("/v1/videos", "/v1/videos/{video_id}/remix"):
        content = described(app)["paths"][path]["post"]["requestBody"]["content"]
        read = {*known_fields_of_videos(app.state.server.settings), "input_reference"}
        assert set(content["multipart/form-data"]["schema"]["properties"]) == read
        assert set(content["application/json"]["schema"]["properties"]) == read | set(IMPOSSIBLE_OF_VIDEOS)


def test_what_a_kind_says_is_what_it_takes(app: Starlette) -> None:
    types = {"integer": 1.5, "number": "1", "string": 1, "boolean": "true"}
    for name, kind in known_fields(app.state.server.settings).items():
        schema = kind.schema
        for bound, outside in (("minimum", -1), ("maximum", 1)):
            if bound in schema:
                assert kind(name, schema[bound]) == schema[bound]
                with pytest.raises(ApiError, match=r"between|of at least|at most"):
                    kind(name, schema[bound] + outside)
        if "type" in schema:
            with pytest.raises(ApiError) as caught:
                kind(name, types[schema["type"]])
            assert caught.value.param == name
        for word in schema.get("enum", ()):
            assert kind(name, word) == word


def test_forms_say_numbers_as_text_and_json_does_not(app: Starlette) -> None:
    kinds = known_fields(app.state.server.settings)
    assert kinds["n"]("n", FormText("2")) == 2
    assert kinds["guidance_scale"]("guidance_scale", FormText("1.5")) == 1.5
    assert kinds["stream"]("stream", FormText("True")) is True
    assert kinds["lora"]("lora", FormText('[{"name": "ink", "scale": 0.5}]')) == [("ink", 0.5)]
    for name in ("n", "guidance_scale", "stream"):
        with pytest.raises(ApiError, match=name):
            kinds[name](name, "1")


def test_a_reference_leads_somewhere_and_keys_are_asked_for(app: Starlette) -> None:
    found = described(app)
    for name in re.findall(r"#/components/schemas/(\w+)", repr(found)):
        assert name in found["components"]["schemas"]
    secured = {path for path, methods in found["paths"].items() if any("security" in one for one in methods.values())}
    assert "/v1/models" in secured
    assert not secured & {"/live", "/openapi.json", "/v1/images/stored/{name}"}
    assert found["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert "securitySchemes" not in described(create_app(FakeEngine()))["components"]


def test_others_describe_their_routes_in_a_few_lines(app: Starlette) -> None:
    thing = component("Thing", {"type": "object", "properties": {"id": {"type": "string"}}})

    @operation(answers={200: as_json(thing)}, errors=(404,), query={"limit": {"type": "integer"}})
    async def things(request: Request) -> Response:
        """A thing.

        More.
        """
        return JSONResponse({"id": "1"})

    async def bare(request: Request) -> Response:
        """What nobody has described."""
        return JSONResponse({})

    routes = [Route("/v1/things/{thing_id:int}", things), Route("/bare", bare), Route("/x", bare, methods=["DELETE"])]
    found = document(routes, app.state.server)
    entry = found["paths"]["/v1/things/{thing_id}"]["get"]
    assert (entry["operationId"], entry["summary"]) == ("test_openapi_document.things", "A thing.")
    assert [one["name"] for one in entry["parameters"]] == ["thing_id", "limit"]
    assert entry["parameters"][0]["schema"]["type"] == "integer"
    assert set(entry["responses"]) == {"200", "400", "401", "404", "500"}
    assert {"Thing", "Error"} == set(found["components"]["schemas"])
    assert set(found["paths"]["/bare"]["get"]["responses"]) == {"200", "400", "500"}
    assert set(found["paths"]["/x"]) == {"delete"}


def test_it_is_served_with_the_address_of_the_server(app: Starlette) -> None:
    host = Starlette(routes=[Mount("/art", app)])
    answer = TestClient(host).get("/art/openapi.json").json()
    assert (answer["openapi"], answer["servers"]) == ("3.1.0", [{"url": "/art"}])
    assert answer["paths"] == described(app)["paths"]
