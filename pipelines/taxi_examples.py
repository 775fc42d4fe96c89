"""CsvExampleGen for Chicago's taxi trips: adds the label, which the CSV does not have."""

from __future__ import annotations

from typing import Any

import apache_beam as beam
from tfx.components.example_gen.csv_example_gen import component, executor
from tfx.dsl.components.base import executor_spec
from tfx.proto import example_gen_pb2

from pipelines.taxi_trainer import LABEL


def add_label(example: Any) -> Any:
    """Adds the feature `big_tip`: 1 where the tip is more than a fifth of the fare, else 0."""
    tips, fare = ([*example.features.feature[name].float_list.value, 0.0][0] for name in ("tips", "fare"))
    example.features.feature[LABEL].int64_list.value.append(int(tips > 0.2 * fare))
    return example


class Executor(executor.Executor):
    """Reads CSV files as CsvExampleGen does, and adds the label to each row."""

    def GetInputSourceToExamplePTransform(self) -> Any:  # noqa: N802 (a name of TFX)
        """Returns a function from the executor's parameters and a file pattern to a PTransform."""
        read = super().GetInputSourceToExamplePTransform()
        return lambda properties, pattern: read(properties, pattern) | "AddLabel" >> beam.Map(add_label)


class TaxiExampleGen(component.CsvExampleGen):
    """CsvExampleGen, with the feature `big_tip` added: the tip is more than a fifth of the fare."""

    EXECUTOR_SPEC = executor_spec.BeamExecutorSpec(Executor)

    def __init__(self, input_base: str):
        """Takes the .csv files of a folder; two thirds of their rows become `train`, one third `eval`."""
        super().__init__(input_base, csv_files())


def csv_files() -> Any:
    """An input configuration: the .csv files of a folder, and not all that is in it."""
    return example_gen_pb2.Input(splits=[example_gen_pb2.Input.Split(name="single_split", pattern="*.csv")])
