"""ONNX Runtime's CPU provider as a runner."""

from regcache.runtime.runners import Loading, SessionRunner
from regcache.runtime.session import OrtSession


class OrtCpuRunner(SessionRunner):
    """A model in ONNX Runtime as it would be deployed: its own optimisations and threads."""

    def __init__(self, loading: Loading) -> None:
        super().__init__(
            OrtSession(
                loading.model, threads=loading.threads, deployed=True, outputs=loading.outputs
            )
        )
