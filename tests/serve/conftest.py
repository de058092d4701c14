"""What the tests of the service share."""

import contextlib

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
pytest.importorskip("prometheus_client", reason="needs the extra 'serve'")


@pytest.fixture(scope="session")
def service():
    """A service that blocks, in a thread of this process."""
    from serve.running import running

    with running() as url:
        yield url


@pytest.fixture
def start(tmp_path):
    """Starts services with a shadow guard and an audit log."""
    from serve.running import opener
    from serve.shadow_guards import with_shadow

    with contextlib.ExitStack() as stack:

        def begin(shadow, open_guard=opener, **how):
            audit = tmp_path / f"audit-{len(list(tmp_path.glob('*.jsonl')))}.jsonl"
            url = stack.enter_context(with_shadow(shadow, open_guard, audit=audit, **how))
            url.audit = audit
            return url

        yield begin
