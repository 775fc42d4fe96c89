"""tfopt makes trained TensorFlow models smaller and faster, and proves it.

    from tfopt.optimize import Options, optimize

    result = optimize("saved_models/digits", "/tmp/digits", Options(tflite=("float32",)))
    print(result.report.table())

Importing this package imports no TensorFlow; the modules that need it do.
"""
