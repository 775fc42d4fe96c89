"""TFX components over tfopt. The parts are imported by their modules: `from tfopt.tfx.optimizer import Optimizer`."""
