"""OpenVINO's CPU plugin as a runner."""

from regcache.runtime.openvino_session import OpenVinoSession
from regcache.runtime.runners import Loading, SessionRunner


class OpenVinoRunner(SessionRunner):
    """A model in OpenVINO as it would be deployed, by the options of its Loading."""

    def __init__(self, loading: Loading) -> None:
        super().__init__(
            OpenVinoSession(
                loading.model,
                threads=loading.threads,
                openvino=loading.openvino,
                outputs=loading.outputs,
            )
        )
