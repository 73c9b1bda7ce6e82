"""What a process is told about memory before its first big tensor."""

from __future__ import annotations

import os

import pytest

from dar.record.environment import settle_heap

CAPS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_few_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch):
    for name in CAPS:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    settle_heap()
    assert {name: os.environ[name] for name in CAPS} == dict.fromkeys(CAPS, "64")


def test_a_cap_of_the_users_own_stands(monkeypatch: pytest.MonkeyPatch):
    for name in CAPS:
        monkeypatch.setenv(name, "7")
    settle_heap()
    assert [os.environ[name] for name in CAPS] == ["7", "7"]
