"""Loads the program of `components/tls-job`, which is in no package, as it is mounted into a pod."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from typing import Any

from tests.helpers.manifests import K8S


@cache
def make_certificates() -> Any:
    """Returns the program as a module."""
    path = K8S / "components" / "tls-job" / "make_certificates.py"
    spec = importlib.util.spec_from_file_location("make_certificates", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
