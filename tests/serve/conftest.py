"""What the tests of the service share."""

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
