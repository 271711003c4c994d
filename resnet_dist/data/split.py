"""Split images into train, validation and test, independently of file order and stable under additions."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from resnet_dist.errors import DataError, UsageError
from resnet_dist.runtime.wording import counted


def assign(
    paths: Sequence[str],
    labels: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    group_by: str | None = None,
) -> list[str]:
    """The part of every image: a key of `shares` (such as "val") or "train".

    The split is stratified: each part with a share above 0 gets `round(share * images)` of each class, at least one.
    Images are ordered by a hash of seed and path, so the order of the files does not matter, and images added later
    move few of the others. With `group_by`, a regular expression on the path, images with equal matches stay
    together, and the shares hold as closely as the groups allow.

    Raises DataError if a class (or, with groups, the data) is too small for the parts, and UsageError if `group_by`
    matches no path.
    """
    if group_by is not None and paths and not any(_matches(path, group_by) for path in paths):
        raise UsageError(f"--group-by '{group_by}' matches none of the {len(paths)} paths, such as '{paths[0]}'")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(paths):
        groups[_group(path, group_by)].append(index)
    ordered = sorted(groups.values(), key=lambda members: _rank(seed, _group(paths[members[0]], group_by)))
    parts = ["train"] * len(paths)
    sizes = Counter(labels)
    wanted = {part: _wanted(sizes, share, part) for part, share in shares.items() if share > 0}
    _check_sizes(sizes, wanted)
    for part, missing in wanted.items():
        for members in ordered:
            counts = Counter(labels[index] for index in members)
            useful = sum(min(count, missing[label]) for label, count in counts.items())
            if parts[members[0]] == "train" and 2 * useful > len(members):
                for index in members:
                    parts[index] = part
                missing.subtract(counts)
        _add_missing_classes(labels, parts, ordered, part)
    if group_by is not None:
        _check_groups(labels, parts, ["train", *wanted])
    return parts


def _add_missing_classes(labels: Sequence[str], parts: list[str], ordered: Sequence[Sequence[int]], part: str) -> None:
    """Give each class that got no image in `part`, because groups are large, the smallest group train can spare."""
    for label in sorted(set(labels)):
        if any(labels[index] == label for index, name in enumerate(parts) if name == part):
            continue
        in_train = [group for group in ordered if parts[group[0]] == "train"]
        left = Counter(name for group in in_train for name in {labels[index] for index in group})
        spare = [group for group in in_train if all(left[labels[index]] > 1 for index in group)]
        having = [group for group in spare if any(labels[index] == label for index in group)]
        for index in min(having, key=len, default=()):
            parts[index] = part


def groups_note(paths: Sequence[str], group_by: str | None) -> Iterator[str]:
    """A warning if `group_by` does not match every path."""
    without = [path for path in paths if group_by is not None and not _matches(path, group_by)]
    if without:
        yield (
            f"WARNING: --group-by '{group_by}' matches {len(paths) - len(without)} of {len(paths)} paths; each of the "
            f"others, such as '{without[0]}', is a group of its own"
        )


def _matches(path: str, pattern: str) -> bool:
    return re.search(pattern, path) is not None


def _group(path: str, pattern: str | None) -> str:
    match = re.search(pattern, path) if pattern is not None else None
    return path if match is None else "\0".join(match.groups(default="") or (match[0],))


def _rank(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{group}".encode(errors="surrogateescape")).digest()


def _wanted(sizes: Mapping[str, int], share: float, part: str) -> Counter[str]:
    return Counter({label: max(1, round(share * size)) for label, size in sizes.items()})


def _check_sizes(sizes: Mapping[str, int], wanted: Mapping[str, Counter[str]]) -> None:
    for label, size in sizes.items():
        if size <= sum(missing[label] for missing in wanted.values()):
            parts = " and ".join(["train", *wanted])
            raise DataError(f"class '{label}' has {counted(size, 'image')}: too few for {parts} in these shares")


def _check_groups(labels: Sequence[str], parts: Sequence[str], names: Sequence[str]) -> None:
    present = set(zip(labels, parts, strict=True))
    for label in sorted(set(labels)):
        absent = [part for part in names if (label, part) not in present]
        if absent:
            raise DataError(f"class '{label}' has too few groups: none is left for {' and '.join(absent)}")
