"""Packaging, read from settings.ini so that versions and requirements are written once.

A wheel holds the notebooks that are run, their gates, the sweeps and the data manifests as `kilonb/bundled`. They are
copied while the wheel is built, and only into the build folder: a checkout reads them where they are.
"""
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
BUNDLED = ("nbs/experiments/*.ipynb", "nbs/benchmarks/*.ipynb", "nbs/explore/*.ipynb", "nbs/*/*.yaml",
           "data_manifests/*")
_PICTURE = re.compile(r"!\[[^\]]*\]\((?![a-z]+:)([^)\s]+)\)")


def pictures_of(notebook: Path) -> set[Path]:
    """The files of this folder that a notebook shows as Markdown pictures."""
    shown = {(notebook.parent / name).resolve() for name in _PICTURE.findall(notebook.read_text(encoding="utf-8"))}
    return {path for path in shown if path.is_file() and path.is_relative_to(here.resolve())}


def bundled_files() -> list[Path]:
    """What a wheel holds beside the modules, as paths below this folder; an error where a kind is missing."""
    found: set[Path] = set()
    for pattern in BUNDLED:
        files = {path for path in here.glob(pattern) if path.is_file() and not path.name.startswith((".", "_"))}
        if not files: raise SystemExit(f"A wheel needs {pattern}, and there is none beside setup.py.")
        found |= files
    for notebook in [path for path in found if path.suffix == ".ipynb"]: found |= pictures_of(notebook)
    return sorted(path.resolve().relative_to(here.resolve()) for path in found)


class build_bundled(build_py):
    """Copies the bundled files into the build folder, unless the package is installed for editing."""

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False): return
        target = Path(self.build_lib) / "kilonb" / "bundled"
        shutil.rmtree(target, ignore_errors=True)
        for path in bundled_files():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / path, target / path)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if getattr(self, "editable_mode", False): return outputs
        return outputs + [str(Path(self.build_lib) / "kilonb" / "bundled" / path) for path in bundled_files()]

    def get_source_files(self) -> list[str]:
        """For a source archive: the files that a wheel made from it needs."""
        return [*super().get_source_files(), *map(str, bundled_files())]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=["kilonb", "kilonb.*"]),
    # With a folder for all packages setuptools installs for editing by a path file. Its other way, an import hook,
    # comes after the search of folders: beside a clone named kilonb, Python found that folder instead of the package.
    package_dir={"": "."},
    package_data={"kilonb": ["py.typed", "*/assets/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split(),
                    "trackio": settings["trackio_requirements"].split()},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": build_bundled},
    zip_safe=False,
)
