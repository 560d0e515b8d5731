"""Names in archives of strangers: which of them can be a path inside of a folder, on every system.

Refused are paths that leave the folder (absolute, a drive, `..`), colons, which are drives or alternate streams of
NTFS, control characters and bytes that are no text, names longer than file systems hold, and paths of many levels; on
Windows also the names of devices and what it cuts off. Spellings that only some disks take for one are the caller's to
compare.

Cost: 5 us a name.
"""

from __future__ import annotations

import os
import re
import unicodedata

DEEPEST, LONGEST = 32, 255  # levels of folders; bytes of a name, which most file systems accept
Parts = tuple[str, ...]
_WINDOWS = os.name == "nt"
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no files' names on Windows


def member_parts(name: str, base: Parts = ()) -> Parts:
    """The components of a member's path, or of a link's target.

    Args:
        name: with slashes of either kind.
        base: the folder of a link, from which its target is seen; without one `..` is refused altogether.

    Raises:
        ValueError: it may not be used; the message has the name, the reason and what is accepted.
    """
    found = list(base)
    outside = not name or bool(re.match(r"[\\/]|[A-Za-z]:", name)) or "\0" in name
    for part in re.split(r"[\\/]", name):
        if part == "..":
            outside = outside or not found or not base
            found = found[:-1]
        elif part not in ("", "."):
            found.append(part)
    if outside:
        raise ValueError(f"the path {shortened(name)}, which leaves the folder; accepted: paths inside it")
    for part in found:
        if (reason := _unusable(part)) is not None:
            raise ValueError(f"the name {shortened(part)}, {reason}")
    if len(found) > DEEPEST:
        raise ValueError(f"a path of {len(found)} levels; accepted: at most {DEEPEST}")
    return tuple(found)


def shortened(name: str) -> str:
    """For messages, in quotes."""
    return repr(name if len(name) <= 100 else f"{name[:60]}...{name[-30:]}")


def _unusable(part: str) -> str | None:
    """Why a component of a path can't be a name everywhere."""
    if ":" in part:
        return "with a colon, which may be a drive or a stream; accepted: names without"
    if not part.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in part):
        return "with control characters or bytes that are no text; accepted: text in UTF-8"
    if len(part.encode(errors="surrogatepass")) > LONGEST:
        return f"of more than {LONGEST} bytes; accepted: shorter ones"
    if _WINDOWS and (_DEVICES.fullmatch(part) or part != part.rstrip(". ") or re.search(r'[<>"|?*]', part)):
        return "which Windows can't hold; accepted: other names"
    return None


__all__ = ["DEEPEST", "LONGEST", "Parts", "member_parts", "shortened"]
