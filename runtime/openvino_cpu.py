"""OpenVINO's CPU plugin as a runner: nothing is copied."""

from typing import Any, Self

from numpy.typing import NDArray

from regcache.runtime.openvino_session import OpenVinoSession
from regcache.runtime.runners import Loading, Ran


class OpenVinoRunner:
    """A model in OpenVINO as it would be deployed, by the options of its Loading."""

    placement: dict[str, int] | None = None

    def __init__(self, loading: Loading) -> None:
        self._session = OpenVinoSession(
            loading.model,
            threads=loading.threads,
            openvino=loading.openvino,
            outputs=loading.outputs,
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
