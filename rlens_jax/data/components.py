"""Items that belong together because they share something, such as questions about one image."""

from collections.abc import Hashable, Iterable


def components(labels: Iterable[Iterable[Hashable]]) -> list[int]:
    """The component of each item, numbered from 0 in order of appearance.

    Items with a common label are in one component, and so are items that other items connect. `labels` are the labels of each
    item.
    """
    parents: list[int] = []
    first_of: dict[Hashable, int] = {}

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    for item, own in enumerate(labels):
        parents.append(item)
        for label in own:
            one, other = sorted((root(first_of.setdefault(label, item)), root(item)))
            parents[other] = one
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(item), len(numbers)) for item in range(len(parents))]
