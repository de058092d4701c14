"""Tests marked ``vllm`` start a real engine, and are skipped where there is none."""

import importlib.util

import pytest

THERE = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not THERE:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make vllm-env"))
