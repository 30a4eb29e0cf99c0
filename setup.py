"""Package mapping: the top-level folders are sub-packages of svf_fast, so that no generic name reaches site-packages."""

from setuptools import find_packages, setup

SUBPACKAGES = ("kernels", "train", "bench")

packages = find_packages(include=["svf_fast", "svf_fast.*"])
package_dir = {"svf_fast": "svf_fast"}
for folder in SUBPACKAGES:
    name = f"svf_fast.{folder}"
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    package_dir[name] = folder

setup(packages=packages, package_dir=package_dir)
