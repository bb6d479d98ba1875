"""Print the lowest versions that pyproject.toml allows, as pip constraints: `python .ci/lowest.py > lowest.txt`."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(line for extra in extras for line in extra)}):
    bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,.*)?", requirement)
    if bound:
        print(f"{bound[1]}=={bound[2]}")
    elif not requirement.startswith(f"{project['name']}["):
        raise SystemExit(f"{requirement!r} has no lower bound; write it as name>=version")
