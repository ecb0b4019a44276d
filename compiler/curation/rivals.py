"""The settings that somebody else's quantizer chooses from, at the end of a search."""

from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.search import Search
from regcache.compiler.curation.setting import Setting


def choose(search: Search, best: Setting, held_out: HeldOut) -> Setting:
    """The best setting; where another quantizer decides, what it makes the least of an error of."""
    if held_out.other is None:
        return best
    rounds_outputs = held_out.other.rounds_outputs
    if rounds_outputs is None:
        rounds_outputs = _bound_helps(search, best, held_out)
    chosen = _rivals(search, best, rounds_outputs=rounds_outputs)
    return held_out.best({setting: search.registers(setting) for setting in chosen})


def _bound_helps(search: Search, best: Setting, held_out: HeldOut) -> bool:
    """Whether the quantizer does better with a bound on the best setting: it rounds outputs."""
    pair = best, _bounded(best)
    held_out.best({setting: search.registers(setting) for setting in pair})
    ranked = held_out.ranked
    return pair[1] in ranked and ranked[pair[1]].mean < ranked[best].mean


def _rivals(search: Search, best: Setting, *, rounds_outputs: bool) -> list[Setting]:
    """The best setting of the search, the same as tokens, and the best without its registers.

    Where the quantizer rounds what linears compute, these are bounded, as registers that hold a
    unit back make a new outlier there, which a bound takes away; and there is a bound without
    registers. Tokens would be an outlier there that nothing takes away.
    """
    found = [best]
    if best.count and not rounds_outputs:
        other_mode = "token" if best.mode == "kv" else "kv"
        found.append(best.model_copy(update={"mode": other_mode, "anew": ()}))
    without = search.best(lambda one: set(one.candidates) != set(best.candidates))
    if without is not None:
        found.append(without)
    if rounds_outputs:
        found = [_bounded(one) for one in (*found, Setting())]
    return list(dict.fromkeys(found))


def _bounded(setting: Setting) -> Setting:
    return setting.model_copy(update={"bounded": True})
