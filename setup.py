"""Package metadata and the mapping from the top-level folders to ``avalanche_firn.*``."""

from pathlib import Path

from setuptools import setup

FOLDERS = ("models", "benchmarks", "plugins", "evaluation", "strategies", "experiments")
ROOT = Path(__file__).parent
HUGGINGFACE = ["datasets>=4.0"]  # runs no code of a data set's own
RAY = ["ray[client]>=2.40"]  # client: for --on ray://HOST:PORT
# peft: loads adapters back; playwright: drives the Chromium that looks at dashboards
TESTS = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "peft>=0.15", "playwright>=1.40", *HUGGINGFACE, *RAY]

setup(
    name="avalanche-firn",
    version="0.1.0",
    description="Continual-learning strategies and plugins for Avalanche, centred on pre-trained models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # avalanche_firn.plugins lives in plugins/, and so on; the import package has no root module of its own.
    package_dir={f"avalanche_firn.{folder}": folder for folder in FOLDERS},
    packages=[f"avalanche_firn.{folder}" for folder in FOLDERS],
    package_data={
        **{f"avalanche_firn.{folder}": ["py.typed"] for folder in FOLDERS},
        "avalanche_firn.models": ["py.typed", "weights/*.safetensors", "weights/*.json"],
        "avalanche_firn.experiments": ["py.typed", "recipes/*.yaml"],
    },
    install_requires=[
        "avalanche-lib>=0.6,<0.7",
        "kornia>=0.7.3",
        "matplotlib>=3.10",
        "numpy>=1.24",
        "pydantic>=2.6",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "scikit-learn>=1.3",
        "tensorboard>=2.15",
        "timm>=1.0.26",  # from then on it reads weights with weights_only=True
        "torch>=2.6",  # before, weights_only=True could be made to run code (CVE-2025-32434)
        "torchvision>=0.21",
        "tqdm>=4.65",
    ],
    extras_require={
        "huggingface": HUGGINGFACE,
        "ray": RAY,
        "test": TESTS,
        "dev": [
            *TESTS,
            *("ruff>=0.6", "mypy>=1.10", "build>=1.2", "types-PyYAML", "types-tqdm"),
        ],
    },
    entry_points={"console_scripts": ["firn = avalanche_firn.experiments.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
