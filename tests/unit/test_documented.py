"""What a user can set is documented, or this fails."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INTERNAL = {"MEGIDO_FAILPOINT", "MEGIDO_KAFKA_"}
"""A switch of the fault tests; a prefix."""


def test_every_environment_variable_is_documented() -> None:
    sources = [path for folder in ("cli", "services", "shared") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r'"((?:MEGIDO|PROXY)_[A-Z_]+)"', path.read_text())}
    assert len(read) > 5
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert {name for name in read - INTERNAL if f"`{name}`" not in page} == set()


def test_links_in_the_documentation_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 10
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []
