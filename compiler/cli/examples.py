"""Examples that `--help` of a command ends with."""

_EXAMPLES = {
    "export": ("regcache export timm:vit_base_patch16_224 -o vit.onnx",),
    "inspect": ("regcache inspect encoder.onnx --images photos",),
    "compile": (
        "regcache compile encoder.onnx --images photos -o encoder-int8",
        "regcache compile encoder.onnx --images photos --target cpu -o encoder-cpu",
        "regcache compile encoder.onnx --images photos --target tensorrt-rtx -o encoder-rtx",
        "regcache compile encoder.onnx --images photos --min-cosine 0.999 -o encoder-close",
        "regcache compile vit.onnx --images photos --target tensorrt --precision nvfp4 "
        "--fp4-share .7 -o a",
    ),
    "registers": (
        "regcache registers encoder.onnx --images photos -o with-registers.onnx --for ort",
    ),
    "build": ("regcache build encoder-rtx --compute-capability 8.9",),
    "bundle": ("regcache bundle ARTIFACT --format triton -o model_repository",),
    "parity": (
        "regcache parity ARTIFACT --images evaluation --min-cosine 0.995 --json parity.json",
        "regcache parity ARTIFACT --images evaluation --baseline parity.json",
    ),
    "report": ("regcache report ARTIFACT --images evaluation -o report.html",),
    "reproduce": (
        "regcache reproduce --model hf:facebook/dinov2-base --imagenet imagenet/val --bits 8,6,4",
    ),
    "bench": ("regcache bench ARTIFACT --batch 1,8 --json bench.json",),
    "doctor": ("regcache doctor",),
}


def examples_of(command: str) -> tuple[str, ...]:
    """Commands to start from; a test runs them."""
    return _EXAMPLES[command]


def epilog_of(command: str) -> str:
    """The examples as the end of a command's help, a line each."""
    return "\n\n".join(("For example:", *examples_of(command)))
