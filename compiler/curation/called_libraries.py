"""The libraries that this process calls itself, where they are installed."""

from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from io import StringIO
from typing import Any

import onnx

from regcache.compiler.curation.other_quantizer import OtherQuantizer, Ranges, Work
from regcache.compiler.curation.tensor_ranges import tensor_ranges
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import load_model

# The option of quantize_static that keeps ranges in a file, which older versions do not have.
_CACHE = "calibration_cache_path"


@dataclass(frozen=True)
class _Library:
    """`package`: what is imported, and what pip installs."""

    name: str
    package: str
    rounds_outputs: bool

    @property
    def asked_by(self) -> str:
        """`--for` and its name."""
        return f"--for {self.name}"

    def check(self) -> None:
        """Raise InputError, naming the package, where it is not installed."""
        if find_spec(self.package) is None:
            raise InputError(f"{self.asked_by} needs {self.package}: pip install {self.package}")


class _OnnxRuntime(_Library):
    """quantize_static as it comes, min-max; uint8 activations, and int8 weights per channel."""

    def quantize(self, work: Work) -> Ranges | None:
        """Write the quantized model.

        Returns the ranges, where this version of it takes them: its own run to find them is without
        any optimization.
        """
        quantization = import_module("onnxruntime.quantization")
        items, more, ranges = iter(work.feeds), dict[str, Any](), None
        reader = type(
            "Reader",
            (quantization.CalibrationDataReader,),
            {"get_next": lambda _: next(items, None)},
        )
        if _CACHE in signature(quantization.quantize_static).parameters:
            batches = (next(iter(feed.values())) for feed in work.feeds)
            ranges = tensor_ranges(work.graph, batches)
            more[_CACHE] = work.output.with_name("ranges.json")
            data = quantization.TensorsData(quantization.CalibrationMethod.MinMax, ranges)
            quantization.save_tensors_data(data, more[_CACHE])
        quantization.quantize_static(
            work.model,
            work.output,
            reader(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            use_external_data_format=work.large,
            **more,
        )
        return ranges


class _Nncf(_Library):
    """NNCF's post-training quantization for transformers, with its defaults."""

    def quantize(self, work: Work) -> None:
        """Write the quantized model."""
        nncf: Any = import_module("nncf")
        with redirect_stdout(StringIO()):  # Rich's progress bars
            quantized = nncf.quantize(
                load_model(work.model),
                nncf.Dataset(work.feeds),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(work.feeds),
            )
        onnx.save(quantized, work.output, save_as_external_data=work.large)


ORT: OtherQuantizer = _OnnxRuntime("ort", "onnxruntime", rounds_outputs=True)
NNCF: OtherQuantizer = _Nncf("nncf", "nncf", rounds_outputs=False)
