"""What the stages of a compilation are called where a user reads how far it is."""

from enum import StrEnum

from regcache.compiler.reporter import Step


class Stage(StrEnum):
    """The steps of a compilation, in words."""

    EXPORT = "exporting"
    CALIBRATE = "calibrating"
    EQUALIZE = "equalizing"
    SEARCH = "searching for registers"
    ROTATE = "rotating"
    PLACE = "choosing what stays float"
    RANGES = "choosing ranges"
    ROUND = "rounding weights"
    WRITE = "writing the model"
    BOTH_WAYS = "comparing with the model without registers"
    BOUND = "keeping to --min-cosine"
    PARITY = "taking a first look at parity"
    SPEED = "comparing the speed with float"
    SEAL = "writing the manifest"


# Most of it is a library's import, whatever the model.
EXPORTING = Step(Stage.EXPORT, seconds=5.0)
