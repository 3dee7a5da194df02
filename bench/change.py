"""What changing one region of a screen in a branch costs: tiles read again, stored, pages rewritten."""

import numpy as np

from bench.examples import TINY, repository, screens
from bench.measure import Rows, row
from him.adapters.pillow import PillowDecoder

REGION_PX = 60


def run(*, tiny: bool = False) -> Rows:
    """Rows for a region inside one tile and for one that touches a neighbour's halo."""
    name = TINY[0] if tiny else "adminlte-tables-4k"
    path = next(screen for screen in screens(tiny=tiny) if screen.stem == name)
    picture = PillowDecoder().decode(path.read_bytes(), name)
    places = {"inside a tile": (700, 700), "on a tile's edge, in its neighbours' halo": (700, 1000)}
    with repository(tiny=tiny) as repo:
        of = -(-picture.shape[0] // 512) * -(-picture.shape[1] // 512)
        for label, (y, x) in places.items():
            changed = np.array(picture)
            changed[y : y + REGION_PX, x : x + REGION_PX] = 200
            branch = repo.branch(f"change-{x}", source="main")
            before, size = repo.stored_pages(), repo.stored_bytes()
            report = branch.put_image(changed, name)
            yield row("change", f"{label}: tiles of the screen", of, "tiles")
            yield row("change", f"{label}: tiles read again", report.tiles_read, "tiles")
            yield row("change", f"{label}: lines recognised again", report.lines_read, "lines")
            yield row("change", f"{label}: tiles stored", report.tiles_written, "tiles")
            yield row("change", f"{label}: pages and directory nodes written", repo.stored_pages() - before, "pages")
            yield row("change", f"{label}: bytes stored", repo.stored_bytes() - size, "bytes")
            differing = sum(one["stream"] == "screen" for one in repo.snapshot("main").diff(repo.snapshot(branch.id)))
            yield row("change", f"{label}: screen tiles that differ", differing, "tiles")
