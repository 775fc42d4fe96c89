"""tfopt makes trained TensorFlow models smaller and faster, and proves it.

Importing this package imports no TensorFlow; the modules that need it do.
"""
