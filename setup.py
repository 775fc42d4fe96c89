"""Packages tfopt and its scripts."""

from pathlib import Path

from setuptools import find_packages, setup

# The ranges are those that the tests ran with: TensorFlow 2.21 decides most of them. protobuf 7 drops an
# API that TensorFlow's companions still use; litert-quantizer pins the ai-edge-litert that it goes with.
REQUIRES = [
    "absl-py>=1.4,<3",
    "ai-edge-litert>=2.3,<2.4",
    "flatbuffers>=24.3,<26",
    "jinja2>=3.1,<4",
    "keras>=3.12,<4",
    "litert-quantizer>=0.11,<0.12",
    "numpy>=2,<3",
    "protobuf>=6.31.1,<7",
    "scipy>=1.17,<2",
    "setuptools<81",  # pkg_resources, which parts of TensorFlow's tooling still import
    "tensorflow>=2.21,<2.22",
    "tqdm>=4.60,<5",
]
EXTRAS = {
    # Models saved by Keras 2, and the TensorFlow Model Optimization Toolkit, which works on those only.
    "keras2": ["tensorflow-model-optimization>=0.8,<0.9", "tf-keras>=2.21,<2.22"],
    # The model server and the load test; the protos are those of TensorFlow Serving.
    "serving": [
        "aiohttp>=3.10,<4",
        "hdrhistogram>=0.10.3,<0.10.4",
        "prometheus-client>=0.20,<1",
        "starlette>=0.40,<2",
        "tensorflow-serving-api>=2.19.1,<2.22",
        "uvicorn>=0.30,<1",
    ],
    # Several processes or machines: evaluation, equivalence, calibration, batch inference (docs/beam.md).
    "beam": ["apache-beam>=2.77,<2.78", "tensorflow-serving-api>=2.19.1,<2.22"],
    # Wheels of ml-metadata need glibc >= 2.39; docs/tfx.md has the way for older ones.
    "tfx": ["tensorflow-serving-api>=2.19.1,<2.22", "tfx>=1.21,<1.22"],
    "low_rank": ["tensorly>=0.10,<0.11"],  # Tucker and CP factors of convolutions; SVD needs none
    "digits": ["scikit-learn>=1.5,<2"],  # the data of pipelines/train_digits.py
}
# A formatter or a type checker of another version finds other faults: these two are pinned.
EXTRAS["test"] = [
    *EXTRAS["digits"],
    *EXTRAS["low_rank"],
    "mypy==2.4.1",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "pyyaml>=6,<7",
    "ruff==0.17.6",
]

COMMANDS = [
    "tfopt-optimize = pipelines.optimize:run",
    "tfopt-inspect = pipelines.inspect_model:run",
    "tfopt-compare = pipelines.compare:run",
    "tfopt-evaluate = pipelines.evaluate:run",
    "tfopt-infer = pipelines.infer:run",
    "tfopt-run-tflite = pipelines.run_tflite:main",
    "tfopt-serve = pipelines.serve:run",
    "tfopt-loadtest = pipelines.loadtest:run",
    "tfopt-tune-batching = pipelines.tune_batching:run",
    "tfopt-lint-serving = pipelines.lint_serving:run",
    "tfopt-deployment = pipelines.deployment:run",
    "tfopt-lineage = pipelines.tfx_lineage:run",
]

setup(
    name="tfopt",
    version="0.1.0",
    description="Makes trained TensorFlow models smaller and faster, and proves it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["tfopt", "tfopt.*", "pipelines", "pipelines.*"]),
    package_data={"tfopt": ["**/*.j2", "py.typed"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": COMMANDS},
)
