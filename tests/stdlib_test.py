"""What must work with the standard library alone: how a run's report is read, and how Keras files are checked.

Written for unittest, so that the build can run it with any Python, installed packages or not.
"""

from __future__ import annotations

import subprocess
import sys
import unittest

from tfopt import keras_file, report
from tfopt.errors import TfoptError


class StandardLibraryTest(unittest.TestCase):
    def test_imports_no_other_package(self):
        code = (
            "import sys, tfopt.errors, tfopt.report, tfopt.keras_file;"
            "print([name for name in ('numpy', 'tensorflow', 'absl', 'jinja2', 'h5py') if name in sys.modules])"
        )
        environment = {"PYTHONPATH": ":".join(sys.path)}
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        self.assertEqual(printed.stdout.strip(), "[]", printed.stderr)

    def test_report_round_trip(self):
        metric = report.Metric("accuracy", 0.975, 540)
        artifact = report.Artifact("int8", "tflite", "model.tflite", 2000, 1000, accuracy=metric)
        text = report.Report(seed=3, artifacts=[artifact]).to_json()
        self.assertEqual(report.Report.from_json(text).to_json(), text)
        self.assertEqual(report.Report.from_json(text).artifacts[0].accuracy, metric)

    def test_damaged_report_is_one_line(self):
        with self.assertRaises(TfoptError) as caught:
            report.Report.from_json("{")
        self.assertNotIn("\n", str(caught.exception))

    def test_lambda_is_found(self):
        config = {"config": {"layers": [{"class_name": "Lambda", "config": {"name": "square"}}]}}
        self.assertEqual(next(keras_file.unsafe(config))[0], "square")


if __name__ == "__main__":
    unittest.main()
