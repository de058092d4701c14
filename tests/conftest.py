"""What all tests share: no network, fixed random numbers, and one tiny chat model."""

import gc
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several test processes share the cores

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

SHAPED = [
    "latentguard.probes.axis",
    "latentguard.probes.probe",
    "latentguard.states",
    "latentguard.interventions",
    "latentguard.models.generate",
    "latentguard.models.chat_model",
    "latentguard.models.edits",
    "latentguard.models.hooks",
    "latentguard.models.prefill",
]
install_import_hook(SHAPED, "shape_checks.check_shapes")

settings.register_profile(
    "latentguard",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("latentguard")


SLOW_FILES = (
    "study/test_whole_study.py",
    "integrations/test_ray.py",
    "documentation/test_executed.py",
    "serve/test_clients.py",
    "documentation/test_in_browser.py",
    "real/test_default_model.py",
    "cli/test_stress.py",
    "guard/test_packs.py",
    "robustness/test_run.py",
    "models/test_split.py",
    "cli/test_process.py",
    "cli/test_extras.py",
)
"""Files of half a minute or so; the others take seconds."""


def pytest_collection_modifyitems(items):
    """Slow files come first, so that no process of the test run ends alone with one of them."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(SLOW_FILES))


def pytest_collection_finish():
    """What is loaded by now stays: looking through it for garbage takes 5 % of the test run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are too small for more


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level tokenizer with a ChatML template."""
    from models.families import FAMILIES

    return FAMILIES["qwen2.5"].tokenizer


@pytest.fixture(scope="session")
def model(tokenizer):
    """A random Llama, 4 blocks of width 32, that speaks ChatML. Tests leave it as it is."""
    from models.architectures import chat_model

    return chat_model("llama", tokenizer)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium():
    """Debian's browser, or Chrome. Not for the session: Playwright keeps an event loop running."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
