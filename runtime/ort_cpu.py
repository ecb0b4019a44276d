"""ONNX Runtime's CPU provider as a runner: nothing is copied."""

from typing import Any, Self

from numpy.typing import NDArray

from regcache.runtime.runners import Loading, Ran
from regcache.runtime.session import OrtSession


class OrtCpuRunner:
    """A model in ONNX Runtime as it would be deployed: its own optimisations and threads."""

    placement: dict[str, int] | None = None

    def __init__(self, loading: Loading) -> None:
        self._session = OrtSession(
            loading.model, threads=loading.threads, deployed=True, outputs=loading.outputs
        )
        self.name = self._session.name
        self.fixed_batch = self._session.fixed_batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._session

    def run(self, images: NDArray[Any]) -> Ran:
        """Encode images of the model's dtype and layout."""
        return Ran(self._session.run(images))
