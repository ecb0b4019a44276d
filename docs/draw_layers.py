"""Draw what imports what into docs/architecture.md.

    python docs/draw_layers.py            # writes the part between the two markers anew
    python docs/draw_layers.py --check    # exits with 1 where that part is out of date

A room is a folder or file directly in `compiler/`, or one of the other root folders as a whole.
All imports count, those inside functions too. A circle of rooms is an error that names it.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- layers: written by docs/draw_layers.py -->\n"
END = "<!-- end of layers -->\n"
_FOLDERS = frozenset({"compiler", "export", "passes", "runtime"})

Rooms = dict[str, set[str]]
"""By a room's name, the rooms that it imports."""


def read_rooms() -> Rooms:
    """The rooms of the package and what each imports."""
    graph = grimp.build_graph("regcache", cache_dir=None)
    rooms: Rooms = {}
    for module in graph.modules:
        room = room_of(module)
        if room is None:
            continue
        imported = map(room_of, graph.find_modules_directly_imported_by(module))
        rooms.setdefault(room, set()).update(
            other for other in imported if other is not None and other != room
        )
    return rooms


def room_of(module: str) -> str | None:
    """ "compiler/curation" for regcache.compiler.curation.search; None for the folder itself."""
    parts = module.split(".")[1:]
    if not parts or parts[0] not in _FOLDERS:
        return "regcache"
    if parts[0] != "compiler":
        return parts[0]
    return f"compiler/{parts[1]}" if len(parts) > 1 else None


def floors_of(rooms: Rooms) -> dict[str, int]:
    """How many rooms stand below each, one upon the other. Raises CycleError on a circle."""
    floors: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        floors[room] = 1 + max((floors[other] for other in rooms[room]), default=-1)
    return floors


def reduced(rooms: Rooms) -> Rooms:
    """The arrows that follow from no others: without a -> c where a -> b and b -> c."""
    below: Rooms = {}
    for room in TopologicalSorter(rooms).static_order():
        below[room] = rooms[room].union(*(below[other] for other in rooms[room]))
    return {
        room: others - set().union(*(below[other] for other in others))
        for room, others in rooms.items()
    }


def draw(rooms: Rooms) -> str:
    """The diagram and the table, Markdown."""
    floors = floors_of(rooms)
    order = sorted(rooms, key=lambda room: (-floors[room], room))
    arrows = reduced(rooms)
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {_key(room)}["{room}"]' for room in order]
    lines += [
        f"    {_key(room)} --> {_key(other)}" for room in order for other in sorted(arrows[room])
    ]
    lines += ["```", "", "| floor | room | what it is | imports |", "| --- | --- | --- | --- |"]
    for room in order:
        imported = ", ".join(sorted(rooms[room])) or "-"
        lines.append(f"| {floors[room]} | `{_path(room)}` | {_summary(room)} | {imported} |")
    inside = {room for room in rooms if room.startswith("compiler/")}
    count = sum(len(rooms[room] & inside) for room in inside)
    lines += ["", f"{len(inside)} rooms in `compiler/`, {count} arrows between them."]
    return "\n".join(lines) + "\n"


def replaced(page: str, drawing: str) -> str:
    """The page with the part between the markers drawn anew."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has lost its markers")
    return f"{head}{begin}\n{drawing}\n{end}{tail}"


def _key(room: str) -> str:
    return room.replace("/", "_")


def _path(room: str) -> str:
    """A room's place in the repository: a folder with a slash at its end, or a file."""
    return f"{room}/" if (ROOT / room).is_dir() else f"{room}.py"


def _summary(room: str) -> str:
    """The first line of a room's docstring."""
    folder = ROOT / room
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("|", "\\|")


def main() -> None:
    """Write the page, or check it."""
    old = PAGE.read_text(encoding="utf-8")
    new = replaced(old, draw(read_rooms()))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new, encoding="utf-8")
    elif old != new:
        sys.exit(f"{PAGE.name} is out of date: run python docs/draw_layers.py")


if __name__ == "__main__":
    main()
