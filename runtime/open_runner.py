"""Choose a runner by its name: check that it is there, import what it needs, load a model."""

from importlib import import_module
from importlib.util import find_spec

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.gpu import find_gpu
from regcache.runtime.openvino_options import check_openvino
from regcache.runtime.runners import LIBRARIES, Loading, Runner, RunnerName


def check_runner(name: RunnerName) -> None:
    """Check that a runner's library and device are there, before anything is exported or built.

    Raises InputError or MissingExtraError, in one line that says which of them is missing.
    """
    if name in (RunnerName.ORT_CUDA, RunnerName.ORT_TENSORRT):
        from regcache.runtime.ort_gpu import check_provider

        check_provider(name)
    elif name is RunnerName.OPENVINO:
        check_openvino(f"runner {name}")
    elif name.takes_engines:
        for module, extra in (("polygraphy", "gpu"), LIBRARIES[name]):
            if find_spec(module) is None:
                raise MissingExtraError(f"runner {name}", extra=extra, module=module)
    if name.on_gpu:
        try:
            find_gpu()
        except InputError as error:
            raise InputError(f"runner {name}: {error}") from error


def preload(name: RunnerName) -> None:
    """Import what a runner needs, so that it is not counted as loading a model."""
    if name is RunnerName.ORT_CPU:
        import_module("regcache.runtime.ort_cpu")
    elif name is RunnerName.OPENVINO:
        import_module("regcache.runtime.openvino_cpu")
        import_module("openvino")
    elif name.takes_engines:
        for module in ("regcache.runtime.trt_runner", "polygraphy.cuda", LIBRARIES[name][0]):
            import_module(module)
    else:
        import_module("regcache.runtime.ort_gpu")


def open_runner(loading: Loading) -> Runner:
    """Load a model into its runner.

    Raises InputError, naming the file and the reason, when it cannot be loaded, or when it would
    run elsewhere than on the runner's device.
    """
    if loading.runner is RunnerName.ORT_CPU:
        from regcache.runtime.ort_cpu import OrtCpuRunner

        return OrtCpuRunner(loading)
    if loading.runner is RunnerName.OPENVINO:
        from regcache.runtime.openvino_cpu import OpenVinoRunner

        return OpenVinoRunner(loading)
    if loading.runner.takes_engines:
        from regcache.runtime.trt_runner import TensorRtRunner

        return TensorRtRunner(loading)
    from regcache.runtime.ort_gpu import OrtDeviceRunner, provider_of

    return OrtDeviceRunner(loading, *provider_of(loading))
