from __future__ import annotations

import shutil

import emulation
import pytest


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def on_emulator(emulated, monkeypatch):
    emulation.install(monkeypatch, emulated)
    emulated.set_order(emulation.ASCENDING)
    return emulated
