"""TensorFlow's Model Optimization Toolkit, for models that are still Keras 2: `--engine=tfmot`.

`engine.py` is this process's side. The rest runs in a child process whose Keras is Keras 2, and begins at `worker.py`.
"""
