"""What a wheel contains; all else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """A wheel has the package `dsd` with the embedded checkpoint as `dsd/embedded`.

    It has no `flows`: the pipeline needs dvc.yaml and params.yaml, so it runs in a clone, installed as editable.
    """

    def finalize_options(self) -> None:
        self.distribution.package_dir = {"": ".", "dsd.embedded": "models/embedded"}
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [name for name in self.packages if name.partition(".")[0] == "dsd"] + ["dsd.embedded"]
            self.package_data["dsd.embedded"] = ["**/*.json", "**/*.safetensors", "**/*.md", "**/*.txt"]


setup(cmdclass={"build_py": Build})
