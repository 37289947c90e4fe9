"""Requests generated from the OpenAPI schema: no answer is a 500, and every answer is described.

OVERFLY_FUZZ=500 sets the number of requests a route.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from overfly.web.server import application
from overfly.web.service import Limits
from served import encoded, network, ramp

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

EXAMPLES = int(os.environ.get("OVERFLY_FUZZ", "8"))
APP = application([network("0"), network("1")], limits=Limits(upload=2_000_000, pixels=200_000, seconds=20))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"host": "127.0.0.1"})
IMAGE = encoded(ramp())


@cast(Callable[[Any], Any], SCHEMA.exclude(path="/stream").parametrize())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES < 100)
def test_requests_from_the_schema_never_fail_with_500(case: Any) -> None:
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("image"), bytes) and len(body["image"]) % 2:
        body["image"] = IMAGE  # random bytes are never an image
    response = case.call(headers={"host": "127.0.0.1"})
    assert response.status_code < 500, (case.method, case.path, response.status_code)
    case.validate_response(
        response,
        checks=[
            schemathesis.checks.not_a_server_error,
            schemathesis.specs.openapi.checks.status_code_conformance,
            schemathesis.specs.openapi.checks.content_type_conformance,
            schemathesis.specs.openapi.checks.response_schema_conformance,
        ],
    )


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(APP, base_url="http://127.0.0.1", raise_server_exceptions=False) as result:
        yield result


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@settings(
    max_examples=3 * EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES < 100,
)
@given(data=st.data())
def test_damaged_images_are_predicted_or_refused(client: TestClient, kind: str, data: st.DataObject) -> None:
    image = bytearray(encoded(ramp(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(len(image) // 2, len(image)))
    output = data.draw(st.sampled_from(["png", "tiff", "json"]))
    result = client.post("/predict", files={"image": ("x", bytes(image[:cut]))}, data={"output": output})
    assert result.status_code in (200, 400), result.text
    if result.status_code == 400:
        assert "/" not in result.json()["detail"].split("(")[0], result.text
