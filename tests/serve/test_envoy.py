"""A real Envoy before an upstream asks the guard by the filter of the documentation."""

import contextlib
import json
import subprocess
import time

import httpx
import pytest
import yaml

from serve.running import SOURCE, flagged, passed, running
from serve.test_upstream import answers, chat, upstream

ENVOY = SOURCE.parent / ".venv-clients/bin/envoy"
PAGE = SOURCE.parent / "docs/how-to/integrations.md"
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.skipif(not ENVOY.exists(), reason="needs 'make clients'")


def documented_filters():
    """The filters that the page on Envoy tells people to use."""
    section = PAGE.read_text("utf-8").split("## Envoy")[1]
    return yaml.safe_load(section.split("```yaml")[1].split("```")[0])["http_filters"]


def cluster(name, url):
    host, port = url.split("/")[2].split(":")
    address = {"socket_address": {"address": host, "port_value": int(port)}}
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address}}]}]
    assignment = {"cluster_name": name, "endpoints": endpoints}
    return {"name": name, "type": "STATIC", "load_assignment": assignment}


def configuration(guard, behind):
    """Everything to the upstream, through the documented filter and Envoy's router."""
    router = {
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
        },
    }
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "chats",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [*documented_filters(), router],
    }
    name = "envoy.filters.network.http_connection_manager"
    chain = {"filters": [{"name": name, "typed_config": manager}]}
    local = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    clusters = [cluster("latentguard", guard), cluster("upstream", behind)]
    return {
        "admin": {"address": local},
        "static_resources": {
            "listeners": [{"name": "chats", "address": local, "filter_chains": [chain]}],
            "clusters": clusters,
        },
    }


@contextlib.contextmanager
def envoy(folder, guard, behind):
    """Envoy as a URL."""
    config, admin = folder / "envoy.yaml", folder / "admin"
    config.write_text(yaml.safe_dump(configuration(guard, behind)))
    command = [ENVOY, "-c", config, "--admin-address-path", admin, "--concurrency", "1"]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [*map(str, command), "--use-dynamic-base-id"], stdout=log, stderr=log
        )
    try:
        yield f"http://{_listener(admin, child, folder / 'log')}"
    finally:
        child.terminate()
        child.wait(20)


def _listener(admin, child, log):
    """Where Envoy listens, once it does."""
    for _ in range(600):
        assert child.poll() is None, log.read_text()[-2000:]
        if admin.exists() and admin.read_text():
            page = httpx.get(f"http://{admin.read_text()}/listeners?format=json").json()
            for one in page.get("listener_statuses", []):
                where = one["local_address"]["socket_address"]
                return f"{where['address']}:{where['port_value']}"
        time.sleep(0.05)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """Envoy's URL, and the decision and body of each chat that has reached the upstream."""
    seen = []

    def record(handler, body):
        seen.append((handler.headers["x-latentguard-decision"], body))
        answers(handler)

    with (
        upstream(record) as (_, behind),
        running() as guard,
        envoy(tmp_path_factory.mktemp("envoy"), guard, behind) as url,
    ):
        yield url, seen


def test_a_harmless_chat_reaches_the_upstream_as_it_was_sent(proxy):
    url, seen = proxy
    answer = httpx.post(f"{url}{CHAT}", json=chat(passed(), temperature=0.5))
    assert answer.status_code == 200, answer.text
    assert seen == [("allow", chat(passed(), temperature=0.5))]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, chat(flagged())), ("/v1/responses", {"input": flagged()})]
)
def test_a_flagged_chat_does_not(proxy, path, body):
    url, seen = proxy
    before = len(seen)
    answer = httpx.post(f"{url}{path}", json=body)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "content_filter"
    assert len(seen) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', 400),
        (json.dumps(chat("a" * (1 << 20))).encode(), 413),
        (b"no JSON", 400),
    ],
)
def test_what_cannot_be_read_does_not(proxy, body, status):
    url, seen = proxy
    before = len(seen)
    assert httpx.post(f"{url}{CHAT}", content=body).status_code == status
    assert len(seen) == before


def test_without_the_guard_nothing_does(tmp_path):
    with upstream(answers) as (seen, behind):
        with running() as guard:
            pass
        with envoy(tmp_path, guard, behind) as url:
            answer = httpx.post(f"{url}{CHAT}", json=chat(passed()))
    assert answer.status_code == 403
    assert not seen
