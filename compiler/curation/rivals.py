"""The settings that another library's own quantizer chooses from, at the end of a search."""

from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.other_quantizer import OtherQuantizer
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting


def choose(search: Search, best: Setting, held_out: HeldOut) -> Setting:
    """The best setting; where another library decides, what it makes the least of an error of."""
    if held_out.other is None:
        return best
    chosen = _rivals(search, best, held_out.other)
    return held_out.best({setting: search.registers(setting) for setting in chosen})


def _rivals(search: Search, best: Setting, other: OtherQuantizer) -> list[Setting]:
    """The best setting of the search, the same as tokens, and the best without its registers.

    Where the library rounds what linears compute, these are bounded, as registers that hold a unit
    back make a new outlier there, which a bound takes away; and there is a bound without registers.
    Tokens would be an outlier there that nothing takes away.
    """
    found = [best]
    if best.count and not other.rounds_outputs:
        other_mode = "token" if best.mode == "kv" else "kv"
        found.append(best.model_copy(update={"mode": other_mode, "anew": ()}))
    without = search.best(lambda one: set(one.candidates) != set(best.candidates))
    if without is not None:
        found.append(without)
    if other.rounds_outputs:
        found = [one.model_copy(update={"bounded": True}) for one in (*found, Setting())]
    return list(dict.fromkeys(found))
