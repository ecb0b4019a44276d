"""An ONNX Runtime that says it has CUDA, and computes on the CPU what it is to compute there."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from regcache.runtime.device import CPU_PROVIDER, CUDA


class PretendedCuda:
    """Takes onnxruntime's place; `loads`: the provider that sessions for CUDA say they have.

    `given`: the options of each session, `settings`: its SessionOptions, `models`: the name of its
    file, empty for bytes; all in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loads: str = CUDA) -> None:
        self.given: list[dict[str, Any]] = []
        self.settings: list[Any] = []
        self.models: list[str] = []
        real = ort.InferenceSession

        def open_session(model: Any, settings: Any, **more: Any) -> Any:
            self.settings.append(settings)
            self.given.append(more)
            self.models.append("" if isinstance(model, bytes) else Path(model).name)
            session = real(model, settings, **more | {"providers": [CPU_PROVIDER]})
            if on_cuda(more):
                session.get_providers = lambda: [loads, CPU_PROVIDER]
            return session

        monkeypatch.setattr(ort, "InferenceSession", open_session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU_PROVIDER])
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("looking for libraries"))

    def clear(self) -> None:
        """Forget the sessions so far."""
        self.given.clear()
        self.settings.clear()
        self.models.clear()

    def ran(self, *, on_gpu: bool) -> set[str]:
        """The files that were opened on CUDA, or on the CPU."""
        pairs = zip(self.models, self.given, strict=True)
        return {model for model, more in pairs if on_cuda(more) == on_gpu}


def on_cuda(options: dict[str, Any]) -> bool:
    """Whether the options of a session ask for CUDA."""
    return bool(options["providers"][0][0] == CUDA)
