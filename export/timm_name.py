"""What may stand behind `timm:`: a model, whose weights they are, and how it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

from regcache.export.checkpoint import check_file
from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError

Value = bool | int | float | str
Origin = Literal["timm", "random", "file", "hf-hub", "local-dir"]
FORMS = "timm:NAME, timm:NAME/FILE, timm:hf-hub:ID or timm:local-dir:DIR"


def _bool(text: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0"}:
        raise ValueError("true or false")
    return text.lower() in {"true", "1"}


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


def _word(text: str) -> str:
    return text


OPTIONS: Mapping[str, Callable[[str], Value]] = {
    **dict.fromkeys(("img_size", "patch_size", "num_classes", "embed_dim", "depth"), _count),
    **dict.fromkeys(("num_heads", "reg_tokens"), _count),
    **dict.fromkeys(("mlp_ratio", "init_values", "drop_rate", "pos_drop_rate"), _number),
    **dict.fromkeys(("proj_drop_rate", "attn_drop_rate", "drop_path_rate"), _number),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "class_token"), _bool),
    **dict.fromkeys(("no_embed_class", "qkv_bias", "qk_norm", "proj_bias", "pre_norm"), _bool),
    **dict.fromkeys(("final_norm", "fc_norm", "pool_include_prefix"), _bool),
    "global_pool": _word,
}
"""The arguments of timm.create_model that a source may give, each with what reads it."""


@dataclass(frozen=True)
class TimmName:
    """`model`: timm's name, none where a config.json gives it; `place`: the file, ID or folder."""

    model: str | None
    origin: Origin = "timm"
    place: str = ""
    options: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, rest: str) -> Self:
        """`text` is the whole source, `rest` what stands behind "timm:".

        Raises InputError for a file or folder that is missing, and for options that timm does not
        take or that are no plain values.
        """
        name, _, asked = rest.partition("?")
        options = _options(text, asked)
        pretrained = options.pop("pretrained", None)
        kind, colon, place = name.partition(":")
        if colon:
            origin = _origin(text, kind, place, asked)
            model = None
        else:
            model, slash, place = name.partition("/")
            origin = "file" if slash else "timm"
        if origin == "file":
            _check_weights(text, name, place)
            place = str(Path(place).expanduser())
        if pretrained is False and origin in {"timm", "random"}:
            origin = "random"
        elif pretrained is False:
            raise InputError(f"{text}: pretrained=false leaves no use for {place}")
        return cls(model, origin, place, options)


def _origin(text: str, kind: str, place: str, asked: str) -> Origin:
    if kind == "hf-hub" and place:
        return "hf-hub"
    if kind == "local-dir" and place:
        folder = Path(place).expanduser()
        if not (folder / "config.json").is_file():
            missing = "no config.json in it; give timm:NAME/FILE"
            raise InputError(f"{text}: {missing if folder.is_dir() else 'no such folder'}")
        return "local-dir"
    option = f"?{asked}" if asked else ""
    known = {"hf_hub": "hf-hub", "hf": "hf-hub", "local_dir": "local-dir", "local": "local-dir"}
    close = get_close_matches(kind.lower(), (*known, "hf-hub", "local-dir"), n=1)
    meant = known.get(close[0], close[0]) if close and place else ""
    hint = f"; did you mean timm:{meant}:{place}{option}?" if meant else ""
    raise InputError(f"{text}: expected {FORMS}{hint}")


def _check_weights(text: str, name: str, place: str) -> None:
    """The file behind NAME/ is there; else what ORG/MODEL or a folder may have meant."""
    file, folder = Path(place).expanduser(), Path(name).expanduser()
    if not file.is_file() and (folder / "config.json").is_file():
        raise InputError(f"{text}: no such file; did you mean timm:local-dir:{name}?")
    if not place or name.startswith("/"):
        raise InputError(f"{text}: expected {FORMS}")
    if not file.exists() and "/" not in place and not file.suffix:
        raise InputError(f"{text}: {place}: no such file; did you mean timm:hf-hub:{name}?")
    if file.suffix == ".onnx":
        raise InputError(f"{text}: weights come as safetensors or from PyTorch, not as ONNX")
    check_file(file, text)


def _options(text: str, asked: str) -> dict[str, Value]:
    known = {**OPTIONS, "pretrained": _bool}
    found: dict[str, Value] = {}
    for item in asked.split("&") if asked else ():
        key, equals, value = item.partition("=")
        if key not in known:
            hint = did_you_mean(key, known) or f"; it takes {', '.join(known)}"
            raise InputError(f"{text}: {key!r} is no option of timm's models{hint}")
        try:
            found[key] = known[key](value)
        except ValueError as error:
            given = f"not {value!r}" if equals else f"as {key}=VALUE"
            raise InputError(f"{text}: {key} takes {error}, {given}") from error
    return found
