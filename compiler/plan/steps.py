"""The steps that `regcache compile` takes with given options, and what each usually costs."""

from collections.abc import Iterator

from regcache.compiler.calibration.stored_rows import stores_rows
from regcache.compiler.job.breadth import LEAST_IMAGES, Breadth
from regcache.compiler.job.context import choose_target
from regcache.compiler.job.effort import RegisterChoice
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.stages import EXPORTING, Stage
from regcache.compiler.reporter import Step

# Images through the float model that take as long, measured with benchmarks/compile_cost.py on
# DINOv2-S and 50 photographs: for one image that is calibrated on, or in all.
_CALIBRATE, _EQUALIZE, _SEARCH, _ROTATE, _PLACE = 1.3, 32.0, 3.6, 9.0, 56.0
_ROTATE_VALUES = 1.0  # where the share leaves room for no more
_RANGES, _ROUND, _WRITE, _PARITY, _SPEED = 7.0, 37.0, 6.0, 15.0, 6.0
_BOUND = 60.0
# Quantizing without registers, too, and the images that decide, in float and through both models.
_BOTH_WAYS = _RANGES + _ROUND + _WRITE + 3 * 24.0
# Of the search and of the placement, what grows with the images that sensitivity is measured on.
_SENSITIVITY = 0.4
# Of what looks at a fixed number of tokens, images have this many there.
TOKENS = 257
# Whatever the model, in seconds.
_TIMING, _HASHING = 0.1, 0.2


def planned_steps(options: CompileOptions, images: int, *, tokens: int = TOKENS) -> list[Step]:
    """The steps for so many calibration images of `tokens` tokens, in order.

    Of those that are not `sure`, the search decides whether they are needed: registers change the
    encoder, and what was known of it.
    """
    return list(_steps(options, images, TOKENS / tokens))


def _steps(options: CompileOptions, images: int, fewer: float) -> Iterator[Step]:
    """`fewer`: images for the same number of tokens, beside those that costs were measured on."""
    yield EXPORTING
    if not options.precision.quantizes:
        yield Step(Stage.WRITE, images=_WRITE)
        yield Step(Stage.PARITY, images=_PARITY)
        yield Step(Stage.SEAL, seconds=_HASHING)
        return
    breadth = Breadth.of(options.effort)
    closer = breadth.sensitivity / Breadth().sensitivity * _SENSITIVITY + 1 - _SENSITIVITY
    searches = may_search(options, images)
    target = choose_target(options)
    places = options.measures_damage and target.activation_bits is not None
    if options.rotates:
        yield Step(Stage.ROTATE, images=_ROTATE if options.rotations_leave < 1 else _ROTATE_VALUES)
    yield from _even(options, images, fewer, sure=True)
    if searches:
        yield Step(Stage.SEARCH, images=closer * _SEARCH * min(images, breadth.images))
        yield from _even(options, images, fewer, sure=False)
    if places:
        yield Step(Stage.PLACE, images=closer * _PLACE, sure=not searches)
    yield Step(Stage.RANGES, images=_RANGES * fewer)
    if stores_rows(target, options.rounding):
        yield Step(Stage.ROUND, images=_ROUND * fewer)
    bounded = options.min_cosine is not None
    if searches or not bounded:
        yield Step(Stage.WRITE, images=_WRITE, sure=not bounded)
    if searches:
        yield Step(Stage.BOTH_WAYS, images=_BOTH_WAYS, sure=False)
    if bounded:
        yield Step(Stage.BOUND, images=_BOUND)
    yield Step(Stage.PARITY, images=_PARITY)
    if options.profile.timed and options.simulate is None:
        yield Step(Stage.SPEED, images=_SPEED, seconds=_TIMING)
    yield Step(Stage.SEAL, seconds=_HASHING)


def _even(options: CompileOptions, images: int, fewer: float, *, sure: bool) -> Iterator[Step]:
    yield Step(Stage.CALIBRATE, images=_CALIBRATE * images, sure=sure)
    if options.equalize:
        yield Step(Stage.EQUALIZE, images=_EQUALIZE * fewer, sure=sure)


def may_search(options: CompileOptions, images: int) -> bool:
    """Whether so many images are searched for registers."""
    quantizes = choose_target(options).activation_bits is not None
    return options.registers is RegisterChoice.AUTO and quantizes and images >= LEAST_IMAGES
