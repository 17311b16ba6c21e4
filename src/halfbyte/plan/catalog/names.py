"""Names in a catalogue: spelled in any case and with any dashes, and the nearest ones to a name that is not there."""

import difflib
import re
from collections.abc import Iterable


def plain(name: str) -> str:
    """`RTX 4090`, `rtx_4090` and `rtx-4090` are one name."""
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def nearest(name: str, known: Iterable[str], most: int = 4) -> str:
    """The known names that were probably meant, best first; all of them where none is near."""
    names = sorted(known)
    wanted = plain(name)
    within = [n for n in names if wanted and (wanted in n or n in wanted)]
    close = difflib.get_close_matches(wanted, names, n=most, cutoff=0.5)
    found = list(dict.fromkeys((*within, *close)))[:most]
    return f"did you mean {', '.join(found)}?" if found else f"known are {', '.join(names)}"
