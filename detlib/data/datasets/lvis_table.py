"""The parser of the tables of LVIS categories."""

from __future__ import annotations

from typing import Any

__all__ = ["parse_lvis_table"]


def parse_lvis_table(table: str) -> list[dict[str, Any]]:
    """Parse comma-separated entries such as "c64 aerosol.n.02 aerosol_can".

    Returns:
        A dict for each category, as in LVIS's annotation files: `id` (from 1), `name`, `synset`, `frequency`
        ("r", "c" or "f"), and `image_count` if the table has it.
    """
    categories = []
    for category_id, entry in enumerate(table.replace("\n", " ").split(","), start=1):
        frequency, synset, name = entry.split(maxsplit=2)
        name = name.strip()
        category = {
            "id": category_id,
            "name": name,
            "synset": f"{name}.n.01" if synset == "-" else synset,
            "frequency": frequency[0],
        }
        if frequency[1:]:
            category["image_count"] = int(frequency[1:])
        categories.append(category)
    return categories
