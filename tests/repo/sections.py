"""Generated parts of a document: tables, and the text between two marker comments."""

import re


def replaced(document: str, name: str, text: str) -> str:
    """Return `document` with `text` between the markers `<!-- name: … -->` and `<!-- /name -->`, each there once."""
    pattern = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    result, count = pattern.subn(lambda found: f"{found[1]}\n{text}\n{found[2]}", document)
    assert count == 1, f"expected one section `{name}` between its two markers, found {count}"
    return result


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table. Line breaks in a cell become spaces, and bars are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )
