"""The service against its own OpenAPI document, with requests that schemathesis makes up."""

import pytest
from hypothesis import HealthCheck, given, settings

from serve.running import running
from serve.test_responses import answers as answers_response
from serve.test_upstream import answers, upstream

schemathesis = pytest.importorskip("schemathesis")

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
EXAMPLES = 12


@pytest.fixture(scope="module", params=["own model", "upstream"])
def schema(request):
    def script(handler, body):
        (answers_response if handler.path.endswith("/responses") else answers)(handler, body)

    with upstream(script) as (_, where):
        options = dict(upstream=where) if request.param == "upstream" else {}
        with running(max_reply=2, **options) as url:
            yield schemathesis.openapi.from_url(f"{url}/openapi.json", verify=False)


def test_it_keeps_what_its_document_says(schema):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        response_schema_conformance,
        content_type_conformance,
    ]
    seen = set()
    for operation in (found.ok() for found in schema.get_all_operations()):

        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def keeps(case):
            case.call_and_validate(checks=checks, verify=False)

        keeps()
        seen.add(operation.path)
    chats = {"/v1/chat/completions", "/v1/responses"}
    assert seen >= {"/v1/moderations", "/v1/score", "/healthz"} | chats
